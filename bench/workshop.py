"""Files that a bench makes one by one and keeps, so that a run that was cut goes on where it was, and their race."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from bench.controller import kept_sensitivity
from grainwise.api import SearchOptions, make_judge, make_searcher
from grainwise.bench import REFERENCE, Contest
from grainwise.calibrate import with_latency
from grainwise.evaluate.data import Data
from grainwise.evaluate.deployed import outputs_in
from grainwise.evaluate.evaluator import outputs_of
from grainwise.evaluate.measures import Metric
from grainwise.export.manifest import MODEL
from grainwise.export.runtime import open_session
from grainwise.leaders import Infeasible, aimed, choose
from grainwise.plan.choices import Entry, Method
from grainwise.plan.profile import entries_to_json
from grainwise.plan.projection import Unreachable
from grainwise.search.driver import Budget, search
from grainwise.session import Result, Session
from grainwise.store.studies import Store
from grainwise.study.sensitivity import Sensitivity

Row = dict[str, Any]
SEED = 0
# Of a result, what the file alone does not say: the candidate in PyTorch on the test split, and how near the file is.
MODULE = {"accuracy": "module_metric", "top1_agreement": "top1_agreement", "max_abs_difference": "max_abs_difference"}


class Kept:
    """The rows of a results file, written to the disk one by one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.body: dict[str, Row] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def rows(self, part: str) -> dict[str, Row]:
        """By name."""
        return {row["name"]: row for row in self.body.get(part, {}).get("rows", [])}

    def find(self, part: str, name: str, settings: Row, file: Path) -> Row | None:
        """The row, if it was made with these settings and its file is still the one that it speaks of."""
        row = self.rows(part).get(name)
        if row is None or row["settings"] != settings:
            return None
        return row if "failed" in row or (file.exists() and row["sha256"] == digest(file.read_bytes())) else None

    def keep(self, part: str, row: Row) -> None:
        rows = {**self.rows(part), row["name"]: row}
        self.update(part, rows=list(rows.values()), races=[])  # none of them had this file

    def update(self, part: str, **facts: Any) -> None:
        """Facts of a part beside its rows; the file on the disk is always whole."""
        self.body[part] = {**self.body.get(part, {}), **facts}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        partial.write_text(json.dumps(self.body, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True, slots=True)
class Order:
    """A row to be made. kind: `reference`, `uniform`, `search` or `foreign`. settings: what it depends on, as JSON.
    make: its file and further figures; it may raise Infeasible or Unreachable, which is kept as the row's outcome.
    """

    name: str
    kind: str
    settings: Row
    make: Callable[[], tuple[bytes, Row]]


@dataclass(frozen=True, slots=True)
class Part:
    """A network, its data, and what of it is made and timed.

    metric, target: as for `compress`. methods: that its searches may use. evaluations: of each search. minutes: that
    all takes on one thread, about. orders: the rows, one after the other; a later one may look at `Workshop.kept`.
    samples: the batches that are timed.
    """

    name: str
    title: str
    model: Callable[[], nn.Module]
    data: Callable[[], Data]
    orders: Callable[[Workshop], Iterator[Order]]
    samples: Callable[[Contest], Iterator[Mapping[str, Any]]]
    minutes: int
    metric: str | Metric = "accuracy"
    methods: tuple[Method, ...] = tuple(Method)
    evaluations: int = 200
    target: str = "ort-cpu"


class Workshop:
    """One part of the bench: a session, prepared when it is needed, and a folder for its files."""

    def __init__(self, part: Part, folder: Path, kept: Kept, evaluations: int) -> None:
        self.part, self.kept, self.evaluations = part, kept, evaluations
        self.folder = folder / part.name
        self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def session(self) -> Session:
        network = self.part
        return Session.prepare(
            network.model(), network.data(), metric=network.metric, methods=network.methods, target=network.target
        )

    @cached_property
    def timed(self) -> Session:
        return with_latency(self.session)

    @cached_property
    def sensitivity(self) -> Sensitivity:
        store = Store(f"sqlite:///{self.folder / 'sensitivity.db'}")
        try:
            return kept_sensitivity(self.session, store)
        finally:
            store.close()

    @property
    def reference(self) -> bytes:
        file = self.session.evaluator.reference_file
        assert file is not None
        content: bytes = file.SerializeToString()
        return content

    @property
    def settings(self) -> Row:
        """What every file depends on."""
        session = self.session
        model, data = session.model_fingerprint, session.splits.fingerprint
        return {"model": model, "data": data, "target": session.reference.target.name}

    def uncompressed(self) -> Order:
        return Order(REFERENCE, "reference", self.settings, lambda: (self.reference, {}))

    def uniform(self, name: str, entries: Mapping[str, Entry]) -> Order:
        settings = {**self.settings, "entries": entries_to_json(entries)}
        return Order(name, "uniform", settings, lambda: self._export(name, self.session.finish(entries, 0)))

    def searched(self, name: str, constraints: Mapping[str, float]) -> Order:
        settings = {
            **self.settings,
            "constraints": dict(constraints),
            "evaluations": self.evaluations,
            "methods": [str(method) for method in self.part.methods],
            "seed": SEED,
        }
        return Order(name, "search", settings, lambda: self._export(name, self._search(name, constraints)))

    def _search(self, name: str, constraints: Mapping[str, float]) -> Result:
        """As `compress` does. A search that was cut begins anew: with new milliseconds it would take other turns."""
        session = self.timed if "latency" in constraints else self.session
        stem = self.folder / f"{name}.db"
        for old in self.folder.glob(f"{stem.name}*"):
            old.unlink()
        options, store = SearchOptions(seed=SEED), Store(f"sqlite:///{stem}")
        try:
            store.create(name, {"constraints": dict(constraints)})
            budgets = session.budgets(constraints)
            projection = session.projection(budgets, aimed(session, budgets, self.sensitivity))
            trials = search(
                searcher=make_searcher(session, projection, self.sensitivity, options, self.evaluations),
                judge=make_judge(session, budgets, options),
                store=store,
                study=name,
                budget=Budget(evaluations=self.evaluations),
            )
        finally:
            store.close()
        return session.finish(choose(session, trials, budgets), len(trials))

    def _export(self, name: str, result: Result) -> tuple[bytes, Row]:
        directory = result.export(self.folder / name)
        figures = result.figures()
        extra = {ours: figures[theirs] for theirs, ours in MODULE.items()}
        extra |= {"made_at_ratio": figures["latency_ratio"], "trials": result.trials}
        content = (directory / MODEL).read_bytes()
        return content, extra | self._compared(content, result.model)

    def _compared(self, content: bytes, module: nn.Module) -> Row:
        """Samples of the test split, and those of them that file and module put into the same class."""
        evaluator, test = self.session.evaluator, self.session.splits.test
        assert evaluator.marked is not None
        file = outputs_in(open_session(content), test, evaluator.marked.skeleton.inputs)
        ours = outputs_of(module, test, evaluator.forward).numpy()
        return {"test_samples": len(ours), "test_same_class": int((file.argmax(-1) == ours.argmax(-1)).sum())}

    def run(self, order: Order) -> Row:
        """The row of an order, from the results file or made now; either way its file lies in the folder."""
        file = self.folder / f"{order.name}.onnx"
        if (row := self.kept.find(self.part.name, order.name, order.settings, file)) is not None:
            print(f"{self.part.name}: {order.name}: kept", flush=True)
            return row
        facts = {"name": order.name, "kind": order.kind, "settings": order.settings}
        try:
            content, extra = order.make()
        except (Infeasible, Unreachable) as error:
            row = {**facts, "failed": str(error)}
        else:
            file.write_bytes(content)
            contest = self.contest({order.name: content}, foreign={order.name} if order.kind == "foreign" else ())
            row = {**facts, **contest.row(order.name), **extra, "sha256": digest(content)}
        self.kept.keep(self.part.name, row)
        print(f"{self.part.name}: {json.dumps({k: v for k, v in row.items() if k != 'settings'})}", flush=True)
        return row

    def race(self, rows: Sequence[Row], seconds: float) -> list[Row]:
        """All files that the rows speak of, timed in turn in this process: one race for each sample."""
        files = {row["name"]: (self.folder / f"{row['name']}.onnx").read_bytes() for row in rows if "failed" not in row}
        contest = self.contest(files, {row["name"] for row in rows if row["kind"] == "foreign"})
        names = [{"name": name} for name in contest.files]
        return [contest.standings(names, sample, threads=1, seconds=seconds) for sample in self.part.samples(contest)]

    def contest(self, files: Mapping[str, bytes], foreign: Iterable[str] = ()) -> Contest:
        session = self.session
        assert session.evaluator.marked is not None
        inputs, metric = session.evaluator.marked.skeleton.inputs, session.evaluator.scoring.metric
        return Contest({REFERENCE: self.reference, **files}, session.splits.test, inputs, metric, frozenset(foreign))
