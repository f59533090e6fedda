"""How far studies are: rows for `grainwise studies`, the facts of `grainwise status`."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.table import Table

from grainwise.store.studies import Store
from grainwise.study.measurement import Failure
from grainwise.study.trial import State, best


def studies(store: Store) -> list[dict[str, Any]]:
    """A row for each study, in the order in which they were begun; records of `compare` have no trials."""
    found = [store.study(name) for name in store.studies()]
    return [
        {"study": s.name, "created": s.created, **{str(state): s.counts.get(state, 0) for state in State}}
        for s in found
    ]


def status(store: Store, name: str) -> dict[str, Any]:
    """Everything that is known of a study but for its profiles. running: trials in a worker's hands, since so many
    seconds; a search that was killed leaves its last ones there until it goes on.
    """
    study, settings, trials = store.study(name), store.settings(name), store.trials(name)
    leader = best(trials, settings.get("budgets", {}))
    now = time.time()
    failures = [t for t in trials if isinstance(t.outcome, Failure)]
    return {
        "study": study.name,
        "created": study.created,
        **{key: settings[key] for key in ("target", "constraints", "budgets", "budget") if key in settings},
        "trials": {str(state): study.counts.get(state, 0) for state in State},
        "evaluation_seconds": sum(trial.seconds for trial in trials),
        "running": [
            {"trial": r.number, "worker": r.worker, "seconds": max(0.0, now - r.started)} for r in study.running
        ],
        "failures": [
            {"trial": t.number, "stage": t.outcome.stage, "reason": t.outcome.reason}
            for t in failures
            if isinstance(t.outcome, Failure)
        ],
        "best": None
        if leader is None or leader.measurement is None
        else {"trial": leader.number, **leader.measurement.to_json()},
    }


def show_studies(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(*(rows[0] if rows else ("study",)))
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)


def show_status(facts: dict[str, Any], console: Console) -> None:
    for key, value in facts.items():
        for line in value if isinstance(value, list) else [value]:
            console.print(f"{key}: {line}", highlight=False, markup=False)
