"""Tables of what keeps a study alive, and of what many workers are worth."""

from __future__ import annotations

from statistics import median
from typing import Any

from bench import markdown


def store() -> str:
    bodies = markdown.read("store")
    head = ["database", "errors", "trials/s", "p99, ms", "500 layers: ms a trial", "of these processor"]
    lines = []
    for name, body in bodies.items():
        many, one = body["together"], body["alone"]
        figures = (many["trials_per_second"], many["p99_ms"], one["median_ms"], one["processor_ms"])
        lines.append([name, str(len(many["errors"])), *map(str, figures)])
    return (
        f"{markdown.table(head, lines)}\n\n"
        + "; ".join(f"{b['command']} on {b['machine']}" for b in bodies.values())
        + "."
    )


def scaling() -> str:
    body = markdown.read("scaling")
    shares = ("efficiency", "waiting_for_batches", "driver_and_store")
    head = [
        "workers",
        "evaluations/s",
        "efficiency",
        "waiting for batches",
        "driver and store",
        "processor, ms a trial",
    ]
    lines = [
        [str(r["workers"]), str(r["evaluations_per_second"]), *(f"{r[s]:.1%}" for s in shares), str(r["processor_ms"])]
        for r in body["rows"]
    ]
    return (
        f"{markdown.table(head, lines)}\n\n{body['seconds']:g} s an evaluation, profiles of {body['layers']} layers; "
        f"`{body['command']}` on {body['machine']}."
    )


def losses() -> str:
    """One line: how many workers were killed, and what became of the trials."""
    body = markdown.read("losses")
    ends = ", ".join(f"{count} {state}" for state, count in body["trials"].items())
    facts = {
        "kills": body["kills"],
        "trials": ends,
        "evaluations": body["evaluations"],
        "other figures": body["other_figures"],
        "a worker starts in": f"{body['start_seconds']} s",
        "work again after a kill": f"{body['back_seconds']['median']} s, at most {body['back_seconds']['most']}",
    }
    return (
        f"{markdown.table(list(facts), [list(map(str, facts.values()))])}\n\n`{body['command']}` on {body['machine']}."
    )


def soak() -> str:
    """Memory and open files of a long search, early and at its end, and what it left behind."""
    body = markdown.read("soak")
    head = ["trials", "memory of the search, MB", "of its worker", "open files", "of its worker"]
    lines = [
        [
            f"{row['trials']:,}",
            f"{row['this_process_kb'] / 1024:.0f}",
            f"{row['worker_kb'] / 1024:.0f}",
            str(row["open_files"]),
            str(row["worker_open_files"]),
        ]
        for row in body["rows"]
    ]
    left = len(body["left_behind"]), len(body["left_behind_by_a_kill"])
    return (
        f"{markdown.table(head, lines)}\n\nLeft behind at the end: {left[0]} files; after a kill -9: {left[1]}. "
        f"`{body['command']}` on {body['machine']}."
    )


def workers() -> str:
    """For each network, evaluations per second and memory of each pool."""
    if not markdown.made("workers"):
        return "No results yet: `python -m bench.workers`."
    return "\n\n".join(_pools(name, body) for name, body in markdown.read("workers").items())


def _pools(name: str, body: dict[str, Any]) -> str:
    rows = body["rows"]
    one = next(row["evaluations_per_second"] for row in rows if row["pool"] == "1 processes")
    head = ["pool", "evaluations/s", "of one process", "memory of its own, MB"]
    lines = [
        [
            row["pool"],
            str(row["evaluations_per_second"]),
            f"{row['evaluations_per_second'] / one:.2f}",
            f"{median(row['memory_kb']) / 1024:.0f}" if "memory_kb" in row else "—",
        ]
        for row in rows
    ]
    return f"{markdown.table(head, lines)}\n\n{name}; `{body['command']}` on {body['machine']}."
