"""Write the tables of README.md and docs/ from bench/results/*.json, between their markers.

python -m bench.tables
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import markdown
from bench.layer_tables import methods, shrinkage, students
from bench.study_tables import losses, scaling, soak, store, workers
from bench.training_tables import adaptive, recover, timelines

ROOT = Path(__file__).parents[1]


def frontier() -> str:
    """One row a search of a single constraint: what was asked, and what its file is beside the uncompressed one."""
    part = markdown.read("deploy")["resnet20"]
    race = part["races"][0]
    times = {file["name"]: file["latency_ratio"] for file in race["files"]}
    full = part["rows"][0]
    lines = []
    for found in part["rows"]:
        asked = found["settings"].get("constraints", {})
        if "failed" in found or len(asked) != 1:
            continue
        ((cost, share),) = asked.items()
        lines.append(
            [
                f"{cost} ≤ {share}",
                f"{times[found['name']]:.3f}",
                f"{found['size_ratio']:.4f}",
                f"{found['size_bytes']:,}",
                f"{100 * found['metric']:.2f} %",
                f"{100 * (full['metric'] - found['metric']):.2f}",
            ]
        )
    alone = race["files"][0]["p50_ms"]
    note = (
        f"Uncompressed: {full['size_bytes']:,} bytes, {alone:.2f} ms, {100 * full['metric']:.2f} %, "
        f"at batch {race['batch']} on {race['threads']} thread; the uncompressed file against itself is off by "
        f"{race['noise']:.3f}. {part['evaluations']} evaluations each, seed {part['seed']}; `{part['command']}` on "
        f"{part['machine']}."
    )
    return f"{markdown.table(['asked', 'time', 'size', 'bytes', 'test accuracy', 'drop, points'], lines)}\n\n{note}"


def controller() -> str:
    """A table a number of evaluations."""
    return "\n\n".join(map(_varied, markdown.read("controller").values()))


def _varied(body: dict[str, Any]) -> str:
    """Means over seeds, variants in the order of their divergence."""
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for found in body["rows"]:
        by_variant.setdefault(found["variant"], []).append(found)

    def mean(rows: list[dict[str, Any]], name: str) -> float:
        return float(statistics.mean(row.get(name, float("nan")) for row in rows))

    def text(rows: list[dict[str, Any]], name: str, digits: int, scale: float = 1) -> str:
        values = [scale * row.get(name, float("nan")) for row in rows]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    lines = [
        [
            variant,
            text(rows, "best_divergence", 5),
            text(rows, "test_accuracy", 2, 100),
            f"{mean(rows, 'within_budget') / body['evaluations']:.0%}",
            str(len(rows)),
        ]
        for variant, rows in sorted(by_variant.items(), key=lambda item: mean(item[1], "best_divergence"))
    ]
    asked = ", ".join(f"{name} ≤ {share}" for name, share in body["constraints"].items())
    note = (
        f"ResNet-20/CIFAR-10 ({100 * body['reference_test_accuracy']:.2f} % uncompressed), {asked}, "
        f"{body['evaluations']} evaluations on {body['search_pictures']} pictures, mean ± deviation over the seeds. A "
        f"prior costs {body['sensitivity_evaluations']} passes of 128 calibration pictures before the search, once for "
        f"all. `{body['command']}` on {body['machine']}."
    )
    head = ["variant", "best divergence, nats", "its test accuracy, %", "within budgets", "seeds"]
    return f"{markdown.table(head, lines)}\n\n{note}"


def latency() -> str:
    """One row a network and way of predicting."""
    body = markdown.read("latency")
    ways = {
        "sum": "sum of parts, as a search adds up",
        "whole": "whole profile known",
        "noise_floor": "same files twice",
    }
    rows = [
        [
            found["network"],
            words,
            f"{found[way]['mean_percentage_error']:.2f} %",
            f"{found[way]['rank_correlation']:.3f}",
        ]
        for found in body["networks"]
        for way, words in ways.items()
    ]
    machine = body["networks"][0]["machine"]
    note = (
        f"Held-out random profiles, seed {body['seed']}; `{body['command']}` on {machine['device']}, "
        f"{machine['threads']} thread, {machine['runtime']} {machine['version']}."
    )
    return f"{markdown.table(['network', 'predicted by', 'mean error', 'rank correlation'], rows)}\n\n{note}"


def sharing() -> str:
    """One row a network and set of shared kinds; the differences are those of divergences from the full set's."""
    parts = []
    for name, network in markdown.read("sharing").items():
        rates = {row["row"]: row["evaluations"] / row["seconds"] for row in network["rows"]}
        naive = rates["naive loop"]
        rows = [
            [
                row["row"],
                f"{rates[row['row']]:.2f}",
                f"{rates[row['row']] / naive:.1f}",
                "equal" if row["equal"] else f"{row['largest_difference']:.1e}",
            ]
            for row in network["rows"]
        ]
        head = [
            f"{name}, {network['samples']} samples",
            "evaluations a second",
            "times naive",
            "difference",
        ]
        parts += [markdown.table(head, rows), f"`{network['command']}` on {network['machine']}."]
    return "\n\n".join(parts)


def search() -> str:
    """One table a task: techniques by mean divergence, what it was after fewer evaluations, and the test metric."""
    if not markdown.made("search"):
        return "No results yet: `python -m bench.search`."
    return "\n\n".join(map(_searched, markdown.read("search").values()))


def _searched(task: dict[str, Any]) -> str:
    marks = list(next(iter(task["marks"].values())))

    def after(name: str, mark: str) -> str:
        found = [task["marks"][f"{name}/{seed}"][mark] for seed in task["seeds"]]
        return "—" if None in found else f"{statistics.mean(found):.4f}"

    def spread(pair: list[float] | None, scale: float, digits: int) -> str:
        return "none within" if pair is None else f"{scale * pair[0]:.{digits}f} ± {scale * pair[1]:.{digits}f}"

    def as_good(name: str) -> str:
        found = [task["as_good"][f"{name}/{seed}"] for seed in task["seeds"]]
        reached = [one["seconds"] for one in found if one is not None]
        return f"{statistics.mean(reached):.0f} ({len(reached)} of {len(found)})" if reached else "never"

    rows = [
        [
            f"`{row['searcher']}`",
            *(after(row["searcher"], mark) for mark in marks[:-1]),
            spread(row["divergence"], 1, 5),
            spread(row["test_metric"], 100, 2),
            spread(row["seconds"], 1, 0),
            as_good(row["searcher"]),
            f"{100 * row['within_budgets']:.0f} %",
        ]
        for row in task["rows"]
    ]
    head = ["technique", *(f"after {mark}" for mark in marks[:-1]), f"after {marks[-1]}", "test metric, %"]
    asked = ", ".join(f"{name} ≤ {share:g}" for name, share in task["constraints"].items())
    note = (
        f"Divergence ({task['divergence']}) of the best profile within {asked}, mean ± deviation over "
        f"{len(task['seeds'])} seeds; {task['samples']} search samples, target {task['target']}. Uncompressed: "
        f"{100 * task['reference_test_metric']:.2f} % on the test split. Seconds count the scores in full; to "
        f"`additive`'s best are those until a profile was as good as its best one of that seed, mean over the seeds "
        f"where one was. `{task['command']}` on {task['machine']}."
    )
    table = markdown.table([*head, "seconds to best", "to `additive`'s best", "within budgets"], rows)
    return f"### {task['title']}\n\n{table}\n\n{note}"


def deploy() -> str:
    """One table a network: every file of its race, then what the search has against each uniform one."""
    if not markdown.made("deploy"):
        return "No results yet: `python -m bench.deploy`."
    return "\n\n".join(_deployed(part) for part in markdown.read("deploy").values() if part.get("races"))


def _deployed(part: dict[str, Any]) -> str:
    races = part["races"]
    times = {(number, file["name"]): file for number, race in enumerate(races) for file in race["files"]}
    reference, compared = part["rows"][0], any("test_samples" in row for row in part["rows"])
    head = ["file", "metric", "drop, points", "bytes", "size", *(f"time, batch {race['batch']}" for race in races)]
    lines = [
        [
            row["name"],
            f"{100 * row['metric']:.2f}",
            f"{100 * (reference['metric'] - row['metric']):.2f}",
            f"{row['size_bytes']:,}",
            f"{row['size_ratio']:.4f}",
            *(f"{times[number, row['name']]['latency_ratio']:.3f}" for number in range(len(races))),
            row["kernels"] or "none",
            *([_same_class(row)] if compared else []),
        ]
        for row in part["rows"]
        if "failed" not in row
    ]
    first, full = races[0], races[0]["files"][0]
    spreads = ", ".join(f"{race['noise']:.3f} at batch {race['batch']}" for race in races)
    files = [{**times[0, row["name"]], **row} for row in part["rows"] if "failed" not in row]
    note = (
        f"Times are ratios of {first['clock']} to the uncompressed file, which takes {full['p50_ms']:.3f} ms (p50; p95 "
        f"{full['p95_ms']:.3f}) at batch {first['batch']}; against itself it is off by {spreads}. "
        f"{part['evaluations']} evaluations for each search, seed {part['seed']}; "
        f"`{part['command']}` on {part['machine']}, {first['threads']} thread."
    )
    failed = [f"{row['name']}: {row['failed']}" for row in part["rows"] if "failed" in row]
    duels = duel(files, first["noise"])
    parts = [
        f"### {part['title']}",
        markdown.table([*head, "8-bit kernels", *(["module in the same class"] if compared else [])], lines),
        *failed,
        *([duels] if duels else []),
        note,
    ]
    return "\n\n".join(parts)


def _same_class(row: dict[str, Any]) -> str:
    return f"{row['test_same_class']:,} of {row['test_samples']:,}" if "test_samples" in row else "—"


EQUAL = 0.001  # of the metric: ten pictures of ten thousand


def duel(files: list[dict[str, Any]], noise: float) -> str:
    """For each file that is no search's, of the found files of equal or better metric: the smallest, the smallest that
    is no slower (beyond the noise), the fastest, and the fastest that is no larger; empty with nothing to compare.
    """
    found = [file for file in files if file["kind"] == "search"]
    lines = []
    for other in [file for file in files if file["kind"] in ("uniform", "foreign")]:
        good = [file for file in found if file["metric"] >= other["metric"] - EQUAL]
        as_fast = [f for f in good if f["latency_ratio"] <= other["latency_ratio"] + noise]
        as_small = [f for f in good if f["size_bytes"] <= other["size_bytes"]]
        cells = [other["name"]]
        pools = ((good, "size_bytes"), (as_fast, "size_bytes"), (good, "latency_ratio"), (as_small, "latency_ratio"))
        for pool, name in pools:
            best = min(pool, key=lambda file: file[name], default=other)
            share = best[name] / other[name]
            gain = 100 * (best["metric"] - other["metric"])
            cells.append(f"x {share:.3f} ({gain:+.2f}): {best['name']}" if share < 1 else "none")
        lines.append(cells)
    head = ["at no lower metric than", "bytes", "bytes, no slower", "time", "time, no larger"]
    note = f"In brackets: points of the metric more or less; within {100 * EQUAL:g} they count as equal."
    return f"{markdown.table(head, lines)}\n\n{note}" if found and lines else ""


def peers() -> str:
    """One table for each cost and share, the most accurate first, then the versions of the peers."""
    if not markdown.made("peers"):
        return "No results yet: `python -m bench.peers`."
    body = markdown.read("peers")["resnet20"]
    asked: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = {}
    for row in body["rows"]:
        asked.setdefault((row["cost"], row["share"]), {}).setdefault(row["technique"], []).append(row)
    parts = []
    for (cost, share), found in sorted(asked.items(), key=lambda item: (item[0][0] != "size", -item[0][1])):
        done = {name: rows for name, rows in found.items() if not any("failed" in row for row in rows)}
        ordered = sorted(done.items(), key=lambda item: -statistics.mean(row["accuracy"] for row in item[1]))
        head = [
            "technique",
            "test accuracy, %",
            "without recalibration, %",
            "size",
            "file",
            "MACs",
            "processor seconds",
        ]
        failed = [f"- `{name}`: {row['failed']}" for name, rows in found.items() for row in rows if "failed" in row]
        title = f"### Size 1/{1 / share:g}" if cost == "size" else f"### MACs {share:g}"
        lines = [_peer(name, rows) for name, rows in ordered]
        parts += [title, markdown.table(head, lines), *(["\n".join(failed)] if failed else [])]
    versions = {row["technique"]: row["versions"] for row in body["rows"] if "versions" in row}
    lines = [[f"`{name}`", ", ".join(f"{k} {v}" for k, v in found.items())] for name, found in versions.items()]
    full = body["reference"]
    note = (
        f"Uncompressed: {100 * full['accuracy']:.2f} %, {full['counted_bytes']:,} bytes as counted here, "
        f"{full['macs'] / 1e6:.1f} M MACs. {body['evaluations']} evaluations for each of our searches; "
        f"`python -m bench.peers` on {body['machine']}, 1 thread."
    )
    return "\n\n".join([*parts, "### Versions", markdown.table(["technique", "packages"], lines), note])


def _peer(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """Means over the seeds, with the deviation where there are several."""

    def text(key: str, scale: float, digits: int) -> str:
        values = [scale * row[key] for row in rows if key in row]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}" if values else "—"

    shares = [text(key, 1, 4) for key in ("size", "file", "macs")]
    return [f"`{name}`", text("accuracy", 100, 2), text("accuracy_as_it_came", 100, 2), *shares, text("seconds", 1, 0)]


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "frontier": ("README.md", frontier),
    "controller": ("docs/controller.md", controller),
    "methods": ("docs/methods.md", methods),
    "shrinkage": ("docs/methods.md", shrinkage),
    "students": ("docs/methods.md", students),
    "search": ("docs/search.md", search),
    "latency": ("docs/latency.md", latency),
    "deploy": ("docs/deploy.md", deploy),
    "peers": ("docs/peers.md", peers),
    "recover": ("docs/recover.md", recover),
    "store": ("docs/studies.md", store),
    "losses": ("docs/studies.md", losses),
    "soak": ("docs/studies.md", soak),
    "sharing": ("docs/sharing.md", sharing),
    "workers": ("docs/studies.md", workers),
    "scaling": ("docs/scaling.md", scaling),
    "adaptive": ("docs/adaptive.md", adaptive),
}


def main() -> None:
    for name, (file, make) in TABLES.items():
        path = ROOT / file
        begin, end = f"<!-- {name}: made by bench.tables -->", f"<!-- end {name} -->"
        head, _, rest = path.read_text(encoding="utf-8").partition(begin)
        tail = rest.partition(end)[2]
        path.write_text(f"{head}{begin}\n{make()}\n{end}{tail}", encoding="utf-8")
    for file, picture in timelines().items():
        (ROOT / "docs" / file).write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
