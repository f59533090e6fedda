"""What each kind of shared state saves: evaluations per second of a search's own profiles, kinds added and left out.

    python -m bench.sharing [--networks resnet20 minilm] [--evaluations 64] [--naive 8]

ResNet-20 on 512 pictures with all methods, MiniLM on 256 words with pruning and quantisation, target `packed`; the
profiles are those of a controller's search, in its batches of 16. The naive loop is what one would write first: copy
the network in float32, solve every changed layer, estimate batch norm on the calibration split, evaluate; it has H and
the reference's outputs beforehand, and runs on the first profiles only. Then kinds are added one by one, and each is
left out of the full set where that is not a row already. Where the library is shared, its layers are solved before the
clock starts; `layers solved as they come` is a search that begins with none. One process, one thread, wall clock.
Writes bench/results/sharing.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.controller import kept_sensitivity
from examples import cifar10, minilm, resnet20
from grainwise import Data
from grainwise.api import SearchOptions, make_judge, make_searcher
from grainwise.evaluate.data import Batch
from grainwise.evaluate.evaluator import Evaluator, outputs_of
from grainwise.evaluate.sharing import EVERYTHING, Sharing
from grainwise.evaluate.timing import device_name, rank_correlation
from grainwise.export.weights import weights_bytes
from grainwise.plan.choices import Entry, Method
from grainwise.plan.projection import Projection
from grainwise.realise.build import build, standards_of
from grainwise.realise.disk import VariantsOnDisk
from grainwise.realise.library import VariantLibrary
from grainwise.realise.norms import norms, reestimate_norms
from grainwise.search.driver import BATCH, Budget, search
from grainwise.session import Session
from grainwise.store.studies import Store
from grainwise.study.measurement import Measurement, Outcome

RESULTS = Path(__file__).parent / "results" / "sharing.json"
PICTURES, WORDS = 512, 256
Profile = Mapping[str, Entry]


@dataclass(frozen=True)
class Subject:
    """session: prepared with everything shared. profiles: of its search, in the order asked."""

    session: Session
    profiles: Sequence[Profile]

    def batches(self) -> Iterator[Sequence[Profile]]:
        for start in range(0, len(self.profiles), BATCH):
            yield self.profiles[start : start + BATCH]

    def evaluator(self, sharing: Sharing, library: VariantLibrary | None = None) -> Evaluator:
        e = self.session.evaluator
        return Evaluator(library or e.library, e.splits, e.cost, e.scoring, e.marked, sharing)


def _resnet20() -> Session:
    part = cifar10.parts(calibration=cifar10.CALIBRATION, search=PICTURES, test=128)
    data = Data(**{name: cifar10.batches(*pictures, 128) for name, pictures in part.items()})
    return Session.prepare(resnet20.pretrained(), data, target="packed")


def _minilm() -> Session:
    full = minilm.data()
    data = replace(full, calibration=list(full.calibration)[:1], search=list(full.search)[: WORDS // minilm.BATCH])
    methods = (Method.PRUNE, Method.QUANTIZE)
    return Session.prepare(minilm.model(), data, metric=minilm.metric, methods=methods, target="packed")


NETWORKS: dict[str, tuple[Callable[[], Session], dict[str, float]]] = {
    "resnet20": (_resnet20, {"size": 0.15, "macs": 0.75}),
    "minilm": (_minilm, {"size": 0.3}),
}


def subject_of(name: str, evaluations: int) -> Subject:
    """The network with the profiles of a search; layers are solved on the way."""
    make, constraints = NETWORKS[name]
    session, options = make(), SearchOptions()
    budgets = session.budgets(constraints)
    Path("out").mkdir(exist_ok=True)
    scores = kept_sensitivity(session, Store("sqlite:///out/bench-sharing.db"))
    searcher = make_searcher(session, Projection(session.cost, budgets), scores, options, evaluations)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"sqlite:///{folder}/search.db")
        store.create(name, {})
        trials = search(
            searcher=searcher,
            judge=make_judge(session, budgets, options),
            store=store,
            study=name,
            budget=Budget(evaluations=evaluations),
        )
        store.close()
    return Subject(session, [trial.entries for trial in trials])


# -- loops without the evaluator


def _laid_out(batches: Sequence[Batch], layout: torch.memory_format) -> list[Batch]:
    def moved(value: Any) -> Any:
        four = isinstance(value, torch.Tensor) and value.dim() == 4
        return value.contiguous(memory_format=layout) if four else value

    return [replace(batch, inputs=moved(batch.inputs)) for batch in batches]


def plain_loop(subject: Subject, profiles: Sequence[Profile], *, fast_layout: bool, variants: bool) -> list[Outcome]:
    """Candidates one by one, batch norm estimated in a pass of its own."""
    evaluator = subject.session.evaluator
    layout = torch.channels_last if fast_layout else torch.contiguous_format
    splits = evaluator.splits
    calibration = [batch.inputs for batch in _laid_out(splits.calibration, layout)]
    searched = _laid_out(splits.search, layout)
    found: list[Outcome] = []
    for entries in profiles:
        library = evaluator.library if variants else VariantLibrary(evaluator.library.reference)
        model: nn.Module = copy.deepcopy(build(library, entries)).to(memory_format=layout)  # type: ignore[call-overload]
        standards = standards_of(library, entries, library.reference.standards)
        if any(norms(model)):
            reestimate_norms(model, calibration, evaluator.forward, standards)
        outputs = outputs_of(model, searched, evaluator.forward)
        found.append(evaluator._judged(outputs, entries, weights_bytes(model)))
    return found


def shared_loop(subject: Subject, evaluator: Evaluator, store: Store | None = None) -> list[Outcome]:
    """The evaluator on batches of a search."""
    found: list[Outcome] = []
    for batch in subject.batches():
        outcomes = dict(evaluator.many(batch) if store is None else evaluator.many(batch, store.measurement))
        found += [outcomes[number] for number in range(len(batch))]
    return found


# -- the table


def rows_of(subject: Subject, naive: int) -> Iterator[tuple[str, Callable[[], list[Outcome]]]]:
    few = subject.profiles[:naive]

    def evaluated(**switches: Any) -> Callable[[], list[Outcome]]:
        return lambda: shared_loop(subject, subject.evaluator(replace(EVERYTHING, **switches)))

    yield "naive loop", lambda: plain_loop(subject, few, fast_layout=False, variants=False)
    yield "naive loop, layers solved beforehand", lambda: plain_loop(subject, few, fast_layout=False, variants=True)
    yield "+ channels-last memory", lambda: plain_loop(subject, few, fast_layout=True, variants=False)
    yield "+ variant library", lambda: plain_loop(subject, subject.profiles, fast_layout=True, variants=True)
    yield "+ batch norm in the same pass, shared modules", evaluated(prefixes=False)
    yield "+ prefix activations: everything", evaluated()
    yield (
        "everything, layers solved as they come",
        lambda: shared_loop(subject, subject.evaluator(EVERYTHING, VariantLibrary(subject.session.reference))),
    )
    with tempfile.TemporaryDirectory() as folder:
        yield from _later_searches(subject, Path(folder))
    yield "everything but the reference's outputs", evaluated(reference=False)
    yield "everything but the variant library", lambda: few_only(subject, naive, replace(EVERYTHING, variants=False))
    yield "everything but channels-last memory", lambda: without_channels_last(subject)


def _later_searches(subject: Subject, folder: Path) -> Iterator[tuple[str, Callable[[], list[Outcome]]]]:
    """Searches on the same network in another process: an empty library, and what an earlier one left behind."""
    reference = subject.session.reference

    def library() -> VariantLibrary:
        return VariantLibrary(reference, VariantsOnDisk(folder, reference))

    first = subject.evaluator(EVERYTHING, library())
    shared_loop(subject, first)
    yield (
        "a second search: layers from the disk",
        lambda: shared_loop(subject, subject.evaluator(EVERYTHING, library())),
    )
    store = Store(f"sqlite:///{folder}/measurements.db")
    evaluator = subject.evaluator(EVERYTHING)
    if evaluator.key(subject.profiles[0]):
        from grainwise.study.trial import Trial

        store.create("first", {})
        for number, (entries, outcome) in enumerate(
            zip(subject.profiles, shared_loop(subject, evaluator), strict=True)
        ):
            trial = Trial(number, entries, outcome, None, "first", 0.0)
            store.add("first", trial, keys={number: evaluator.key(entries)})
        yield (
            "the same profiles in another study: measurements from the store",
            lambda: shared_loop(subject, subject.evaluator(EVERYTHING), store),
        )
    store.close()


def few_only(subject: Subject, naive: int, sharing: Sharing) -> list[Outcome]:
    return shared_loop(Subject(subject.session, subject.profiles[:naive]), subject.evaluator(sharing))


def without_channels_last(subject: Subject) -> list[Outcome]:
    """Everything, on pictures and convolution weights in plain memory; the subject is laid out again afterwards."""
    session, layout = subject.session, torch.contiguous_format
    evaluator = session.evaluator
    splits = replace(evaluator.splits, search=tuple(_laid_out(evaluator.splits.search, layout)))
    assert evaluator.form is not None
    modules = (session.reference.model, evaluator.form.module)
    for module in modules:
        module.to(memory_format=layout)  # type: ignore[call-overload]
    try:
        plain = Evaluator(evaluator.library, splits, evaluator.cost, evaluator.scoring, evaluator.marked)
        plain.__dict__["form"] = evaluator.form
        return shared_loop(subject, plain)
    finally:
        for module in modules:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def compared(found: Sequence[Outcome], expected: Sequence[Outcome]) -> dict[str, Any]:
    """How the divergences of the first profiles differ from those of the full set."""
    pairs = [
        (a.divergence, b.divergence)
        for a, b in zip(found, expected, strict=False)
        if isinstance(a, Measurement) and isinstance(b, Measurement)
    ]
    same = all(a == b for a, b in zip(found, expected, strict=False))
    return {
        "equal": same,
        "largest_difference": max(abs(a - b) for a, b in pairs),
        "rank_correlation": rank_correlation(*map(list, zip(*pairs, strict=True))) if len(pairs) > 2 else None,
    }


def measure(name: str, evaluations: int, naive: int) -> dict[str, Any]:
    subject = subject_of(name, evaluations)
    start = time.perf_counter()
    everything = shared_loop(subject, subject.evaluator(EVERYTHING))
    print(f"{name}: one pass of {len(everything)} profiles takes {time.perf_counter() - start:.1f} s", flush=True)
    rows = []
    for words, loop in rows_of(subject, naive):
        start = time.perf_counter()
        outcomes = loop()
        seconds = time.perf_counter() - start
        row = {"row": words, "evaluations": len(outcomes), "seconds": round(seconds, 3)}
        rows.append({**row, **compared(outcomes, everything)})
        print(json.dumps(rows[-1]), flush=True)
    samples = sum(len(batch.targets) for batch in subject.session.splits.search if batch.targets is not None)
    runs = subject.session.evaluator.prefixes
    kept = None if runs is None else {"kept_bytes": runs.kept_bytes}
    return {"samples": samples, "profiles": len(everything), "prefixes": kept, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--evaluations", type=int, default=64)
    parser.add_argument("--naive", type=int, default=8, help="profiles that the slow loops run on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.networks:
        found = measure(name, arguments.evaluations, arguments.naive)
        asked = f"--networks {name} --evaluations {arguments.evaluations} --naive {arguments.naive}"
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[name] = {
            "command": f"python -m bench.sharing {asked}",
            "machine": f"{device_name()}, {platform.machine()}, torch {torch.__version__}, 1 process, 1 thread",
            **found,
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
