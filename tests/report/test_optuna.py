from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from grainwise.report.optuna import export_optuna
from grainwise.store.studies import Store
from tests.store.store_contract import DONE, FAILED


def test_optuna_opens_an_exported_study(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 's.db'}")
    store.create("s", {})
    store.add("s", DONE, FAILED)
    assert export_optuna(store, "s", tmp_path / "o.db") == 2
    with pytest.raises(ValueError, match="there already"):
        export_optuna(store, "s", tmp_path / "o.db")
    store.close()
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 'o.db'}")
    done, failed = study.trials
    assert done.value == 0.1 and done.params == {name: str(entry) for name, entry in DONE.entries.items()}
    assert done.user_attrs["size_bytes"] == 10 and study.best_trial.number == 0
    assert failed.state is optuna.trial.TrialState.FAIL and failed.user_attrs["failure"] == "build: why"
    study._storage.remove_session()
