"""A study as one of Optuna's, for its dashboard and its plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grainwise.plan.choices import UNCOMPRESSED
from grainwise.store.studies import Store
from grainwise.study.measurement import Failure
from grainwise.study.trial import Trial


def export_optuna(store: Store, name: str, out: Path) -> int:
    """Write the finished trials of a study into a new SQLite database of Optuna's; how many there are.

    A layer is a categorical parameter, the divergence is minimised, all other figures are attributes.
    Raises ValueError when the file is there already, RuntimeError when optuna is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise RuntimeError("a study of Optuna's needs the package optuna: pip install 'grainwise[optuna]'") from error
    if out.exists():
        raise ValueError(f"{out} is there already; give a new file")
    trials = store.trials(name)
    layers = sorted({layer for trial in trials for layer in trial.entries})
    texts = [{layer: str(trial.entries.get(layer, UNCOMPRESSED)) for layer in layers} for trial in trials]
    kinds: dict[str, optuna.distributions.BaseDistribution] = {
        layer: optuna.distributions.CategoricalDistribution(sorted({text[layer] for text in texts})) for layer in layers
    }
    part = out.with_name(f"{out.name}.part")  # an export that was cut leaves no file that looks whole
    part.unlink(missing_ok=True)
    storage = optuna.storages.RDBStorage(f"sqlite:///{part}")
    try:
        study = optuna.create_study(study_name=name, storage=storage, direction="minimize")
        for trial, params in zip(trials, texts, strict=True):
            study.add_trial(optuna.trial.create_trial(params=params, distributions=kinds, **_told(trial)))
    finally:
        storage.engine.dispose()
    part.rename(out)
    return len(trials)


def _told(trial: Trial) -> dict[str, Any]:
    """State, value and attributes of a trial, as `create_trial` takes them."""
    from optuna.trial import TrialState

    about = {"reward": trial.reward, "source": trial.source, "seconds": trial.seconds}
    if isinstance(trial.outcome, Failure):
        failure = f"{trial.outcome.stage}: {trial.outcome.reason}"
        return {"state": TrialState.FAIL, "user_attrs": {"failure": failure, **about}}
    figures = {**trial.outcome.to_json(), **about}
    return {"state": TrialState.COMPLETE, "value": trial.outcome.divergence, "user_attrs": figures}
