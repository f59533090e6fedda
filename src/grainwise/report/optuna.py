"""A study as one of Optuna's, for its dashboard and its plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grainwise.plan.choices import UNCOMPRESSED
from grainwise.store.studies import Store
from grainwise.study.measurement import Failure


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
    study = optuna.create_study(study_name=name, storage=f"sqlite:///{out}", direction="minimize")
    try:
        for trial, params in zip(trials, texts, strict=True):
            outcome = trial.outcome
            figures: dict[str, Any]
            value: float | None
            failed = isinstance(outcome, Failure)
            if isinstance(outcome, Failure):
                figures, value = {"failure": f"{outcome.stage}: {outcome.reason}"}, None
            else:
                figures, value = outcome.to_json(), outcome.divergence
            study.add_trial(
                optuna.trial.create_trial(
                    state=optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE,
                    value=value,
                    params=params,
                    distributions=kinds,
                    user_attrs={**figures, "reward": trial.reward, "source": trial.source, "seconds": trial.seconds},
                )
            )
    finally:
        study._storage.remove_session()
    return len(trials)
