"""A comparison of searchers as a table, and the figures that the table is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import inf, nan
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Column, Table

_COLUMNS = {
    "divergence": "divergence, nats",
    "metric": "metric, search",
    "test_metric": "metric, test",
}


def summary(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a searcher, best mean divergence first: `[mean, deviation]` over seeds (null when a run found nothing
    within the budgets), seconds to the best profile, trials within the budgets, trials by what proposed them.
    """
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for run in body["runs"]:
        by_name.setdefault(run["searcher"], []).append(run)
    rows = []
    for name, runs in by_name.items():
        found = [run["best"] for run in runs if "best" in run]
        sources: Counter[str] = sum((Counter(run["sources"]) for run in runs), Counter())
        row: dict[str, Any] = {"searcher": name, "runs": len(runs)}
        for figure in (*_COLUMNS, "seconds"):
            row[figure] = _spread([one[figure] for one in found]) if len(found) == len(runs) else None
        row |= {
            "seconds_in_all": _spread([run["seconds"] for run in runs]),
            "searcher_seconds": _spread([run["searcher_seconds"] for run in runs]),
            "score_passes": runs[0]["score_passes"],
            "within_budgets": mean(run["within_budgets"] for run in runs) / body["evaluations"],
            "sources": dict(sources),
            "best_sources": dict(Counter(one["source"] for one in found)),
        }
        rows.append(row)
    return sorted(rows, key=lambda row: row["divergence"][0] if row["divergence"] else inf)


def _spread(values: Sequence[float]) -> list[float]:
    return [mean(values), stdev(values) if len(values) > 1 else 0.0]


def show_comparison(body: Mapping[str, Any], console: Console) -> None:
    head = (*_COLUMNS.values(), "seconds to best", "score passes", "in budget", "best from")
    table = Table(Column("searcher", no_wrap=True), *head)
    for row in summary(body):
        table.add_row(
            row["searcher"],
            *(_text(row[figure], 4) for figure in _COLUMNS),
            _text(row["seconds"], 1),
            str(row["score_passes"]),
            f"{row['within_budgets']:.0%}",
            ", ".join(f"{source} {count}" for source, count in row["best_sources"].items()) or "-",
        )
    console.print(table)
    asked = ", ".join(f"{name} <= {share:g}" for name, share in body["constraints"].items())
    seeds = len(body["seeds"])
    console.print(
        f"{asked}; {body['evaluations']} evaluations, {seeds} seed{'s' * (seeds > 1)} (mean ± deviation), target "
        f"{body['target']}. Uncompressed: metric {body['reference']['metric']:.4f} on the search split. Seconds count "
        "the score passes in full, whoever shares them.",
        highlight=False,
    )


def _text(spread: Sequence[float] | None, digits: int) -> str:
    return "none in budget" if spread is None else f"{spread[0]:.{digits}f} ± {spread[1]:.{digits}f}"


def curves(body: Mapping[str, Any], figure: str) -> dict[str, list[list[float]]]:
    """By searcher the curve of each seed: `divergence` or `metric` of the best profile after 1, 2, ... evaluations; NaN
    before anything met the budgets.
    """
    found: dict[str, list[list[float]]] = {}
    for run in body["runs"]:
        points = [nan if value is None else float(value) for value in run[f"{figure}_curve"]]
        found.setdefault(run["searcher"], []).append(points)
    return found
