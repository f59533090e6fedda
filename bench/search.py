"""Which technique finds the best profiles at equal evaluations: networks x costs x techniques x seeds.

    python -m bench.search [TASK ...] [--seeds 5] [--techniques NAME ...] [--worker]

Runs in pieces: each search is a study in out/bench-search/TASK.db and is skipped when it is complete; several processes
with --worker share the work, each with seeds of its own. A run without it writes bench/results/search.json;
`python -m bench.tables` makes the tables in docs/search.md, where the plan stands that was written before test data
were read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples import cifar10, efficientnet_lite0, minilm, mobilenet, resnet20
from grainwise.compare import compare
from grainwise.evaluate.data import Data
from grainwise.evaluate.timing import device_name
from grainwise.plan.choices import Method
from grainwise.report.comparison import summary
from grainwise.session import Session
from grainwise.store.studies import Store

RESULTS = Path(__file__).parent / "results" / "search.json"
STUDIES = Path("out") / "bench-search"
LEADING = ("rl", "additive+thompson", "additive", "evolution")
_QUICK = ("rl", "additive", "evolution")  # of the leading ones those that solve in seconds, not in minutes
ALL = (*LEADING, "greedy", "optuna:tpe", "random", "evolution:plain")
GOAL = "additive"  # how soon others are as good as its best profile in the end
MARKS = (1, 30, 100, 300)  # evaluations after which the best divergence is reported, and at the end


def _pictures(data: Callable[[], Data], search: int) -> Callable[[], Data]:
    """Of the search split only the first batches; calibration and test as they are."""

    def some() -> Data:
        found = data()
        return replace(found, search=list(islice(found.search, search)))

    return some


@dataclass(frozen=True, slots=True)
class Task:
    """A network and what is asked of it. prepared: further arguments of `Session.prepare`."""

    title: str
    model: Callable[[], nn.Module]
    data: Callable[[], Data]
    constraints: Mapping[str, float]
    techniques: Sequence[str] = ALL
    evaluations: int = 300
    target: str = "ort-cpu-vnni"
    prepared: Mapping[str, Any] = field(default_factory=dict)


_CIFAR = _pictures(cifar10.splits, 1)
TASKS = {
    "resnet20-size": Task("ResNet-20, size", resnet20.pretrained, _CIFAR, {"size": 0.1}),
    "resnet20-macs": Task("ResNet-20, MACs", resnet20.pretrained, _CIFAR, {"macs": 0.6}),
    "resnet20-mixed": Task("ResNet-20, size and MACs", resnet20.pretrained, _CIFAR, {"size": 0.12, "macs": 0.75}),
    "resnet20-tight": Task(
        "ResNet-20, size and MACs, tight", resnet20.pretrained, _CIFAR, {"size": 0.08, "macs": 0.6}, _QUICK
    ),
    "resnet20-tightest": Task(
        "ResNet-20, size and MACs, tightest", resnet20.pretrained, _CIFAR, {"size": 0.06, "macs": 0.5}, _QUICK
    ),
    "resnet20-tightest-512": Task(
        "ResNet-20, size and MACs, tightest, by 512 pictures",
        resnet20.pretrained,
        partial(cifar10.splits, 512),
        {"size": 0.06, "macs": 0.5},
        _QUICK,
    ),
    "resnet20-long": Task(
        "ResNet-20, size and MACs, long", resnet20.pretrained, _CIFAR, {"size": 0.12, "macs": 0.75}, LEADING, 1000
    ),
    "mobilenet-mixed": Task(
        "MobileNetV2, size and MACs", mobilenet.pretrained, _CIFAR, {"size": 0.12, "macs": 0.75}, (*_QUICK, "greedy")
    ),
    "mobilenet-tight": Task(
        "MobileNetV2, size and MACs, tight", mobilenet.pretrained, _CIFAR, {"size": 0.1, "macs": 0.7}, _QUICK
    ),
    "resnet20-bits": Task(
        "ResNet-20, size by bits alone",
        resnet20.pretrained,
        _CIFAR,
        {"size": 0.1},
        _QUICK,
        prepared={"methods": (Method.QUANTIZE,)},
    ),
    "resnet20-latency": Task(
        "ResNet-20, latency", resnet20.pretrained, _CIFAR, {"latency": 0.75}, _QUICK, target="ort-cpu"
    ),
    "minilm-mixed": Task(
        "MiniLM, size and MACs",
        minilm.model,
        _pictures(minilm.data, 8),
        {"size": 0.15, "macs": 0.8},
        _QUICK,
        150,
        prepared={"metric": minilm.metric, "methods": (Method.PRUNE, Method.QUANTIZE)},
    ),
    "efficientnet-mixed": Task(
        "EfficientNet-Lite0, size and MACs",
        efficientnet_lite0.model,
        _pictures(efficientnet_lite0.data, 4),
        {"size": 0.2, "macs": 0.9},
        LEADING,
    ),
}


def run(task: Task, name: str, seeds: Sequence[int], techniques: Sequence[str]) -> dict[str, Any]:
    """All searches of a task that are not there yet, and the figures of all."""
    session = Session.prepare(task.model(), task.data(), target=task.target, **task.prepared)
    STUDIES.mkdir(parents=True, exist_ok=True)
    store = Store(f"sqlite:///{STUDIES / name}.db")
    try:
        body = compare(
            session,
            searchers=techniques,
            seeds=seeds,
            evaluations=task.evaluations,
            constraints=task.constraints,
            store=store,
            study=name,
        )
    finally:
        store.close()
    reference = session.evaluator.test(session.reference.model, session.evaluator.scoring.forward)
    marked = (*(mark for mark in MARKS if mark < task.evaluations), task.evaluations)
    marks = {
        f"{one['searcher']}/{one['seed']}": {str(mark): one["divergence_curve"][mark - 1] for mark in marked}
        for one in body["runs"]
    }
    goals = {one["seed"]: one["divergence_curve"][-1] for one in body["runs"] if one["searcher"] == GOAL}
    keep = ("constraints", "evaluations", "seeds", "target")
    return {
        "title": task.title,
        **{key: body[key] for key in keep},
        "reference_test_metric": reference,
        "rows": summary(body),
        "marks": marks,
        "as_good": {f"{one['searcher']}/{one['seed']}": _as_good(one, goals.get(one["seed"])) for one in body["runs"]},
        "divergence": session.evaluator.scoring.divergence.__name__.replace("_", " "),
        "samples": sum(len(batch.targets) for batch in session.splits.search if batch.targets is not None),
        "runs": [{"searcher": one["searcher"], "seed": one["seed"], **one.get("best", {})} for one in body["runs"]],
    }


def _as_good(one: Mapping[str, Any], goal: float | None) -> dict[str, float] | None:
    """Evaluations and seconds after which a run had a profile of that divergence; None when it never had."""
    reached = enumerate(value is not None and goal is not None and value <= goal for value in one["divergence_curve"])
    first = next((number for number, enough in reached if enough), None)
    return None if first is None else {"evaluations": first + 1, "seconds": one["seconds_curve"][first]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tasks", nargs="*", default=list(TASKS), metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--techniques", nargs="+", metavar="NAME", help="all that the task names otherwise")
    parser.add_argument("--worker", action="store_true", help="make searches, write no results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    command = " ".join(["python -m bench.search", *(a for a in sys.argv[1:] if a != "--worker")])
    for name in arguments.tasks:
        found = run(TASKS[name], name, arguments.seeds, arguments.techniques or TASKS[name].techniques)
        print(json.dumps(found["rows"], indent=1), flush=True)
        if not arguments.worker:
            results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
            results[name] = {**found, "command": command, "machine": f"{device_name()}, torch {torch.__version__}"}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
