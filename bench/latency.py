"""How well the latency table predicts whole networks: random profiles, predicted and then really run.

    python -m bench.latency [--profiles 20] [--rounds 300] [--networks resnet20 mobilenet_v2]

ResNet-20 (pictures of 32 pixels) and MobileNetV2 of width 1.0 with random weights (96 pixels), batch 1, one thread. The
table is measured from nothing; its line is fitted to the networks that a search fits it to (`calibration_profiles`),
and tested on other random profiles, drawn from the whole space but for students of blocks, which run as pruned channels
do. All files are timed in turn, and each tested profile twice: the error between its two times is the noise floor of
the run. `sum` is what a search adds up layer by layer, `whole` the prediction for a finished profile.
Writes bench/results/latency.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from examples import resnet20
from grainwise.evaluate.calibration import calibration_profiles, random_profile, time_files
from grainwise.evaluate.grids import grids, reachable
from grainwise.evaluate.kernels import KernelTimes, Key
from grainwise.evaluate.latency import LatencyTable
from grainwise.evaluate.places import input_shapes
from grainwise.evaluate.timing import mean_percentage_error, rank_correlation
from grainwise.export.graph import MarkedGraph
from grainwise.graph.forward import default_forward
from grainwise.graph.skeleton import build_skeleton, skeleton_forward
from grainwise.graph.trace import trace
from grainwise.plan.choices import PRECISIONS, STRUCTURES, Entry
from grainwise.plan.cost import CostModel
from grainwise.plan.space import SearchSpace
from grainwise.plan.target import resolve_target
from grainwise.realise.build import build
from grainwise.realise.deploy import deploy
from grainwise.realise.library import VariantLibrary
from grainwise.realise.reference import Reference

RESULTS = Path(__file__).parent / "results" / "latency.json"
SEED = 0
CHECKED = 200  # entries at widths that were not measured


def mobilenet_v2() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    torch.manual_seed(SEED)
    config = MobileNetV2Config(image_size=96, depth_multiplier=1.0)
    config.num_labels = 10
    model: nn.Module = MobileNetV2ForImageClassification(config)
    return model.eval()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (resnet20.pretrained, 32),
    "mobilenet_v2": (mobilenet_v2, 96),
}


@dataclass(frozen=True)
class Subject:
    """A network, the space of its profiles, and what its files are made with."""

    batch: Tensor
    library: VariantLibrary
    marked: MarkedGraph
    space: SearchSpace
    cost: CostModel

    @staticmethod
    def of(name: str) -> Subject:
        make, size = NETWORKS[name]
        model, target = make(), resolve_target("ort-cpu")
        batch = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(SEED))
        graph = trace(model, batch)
        skeleton = build_skeleton(model, batch[:2], default_forward, graph)
        marked = MarkedGraph.export(skeleton, graph, batch[:2])
        reference = Reference.gather(model, graph, [batch], default_forward, target, skeleton)
        space = SearchSpace.of(graph)
        return Subject(batch, VariantLibrary(reference), marked, space, CostModel(space, {}))

    def table(self, folder: Path) -> LatencyTable:
        reference = self.library.reference
        shapes = input_shapes(reference.model, self.batch[:1], default_forward, reference.graph)
        return LatencyTable(self.marked, shapes, grids(self.space), KernelTimes(reference.target, folder=folder))

    def file(self, entries: Mapping[str, Entry]) -> bytes:
        """A profile's file, its ranges set on one batch of noise: kernels do not depend on them."""
        built = copy.deepcopy(build(self.library, entries))
        skeleton = self.library.reference.skeleton
        assert skeleton is not None
        deploy(built, skeleton, [self.batch], skeleton_forward)
        content: bytes = self.marked.write(built, {}).SerializeToString()
        return content


def interpolation(subject: Subject, table: LatencyTable, generator: np.random.Generator) -> dict[str, float | int]:
    """Error of entries at widths between the measured ones, which are measured for the purpose."""
    options = []
    left = reachable(subject.space)
    for index, layer in enumerate(subject.space.layers):
        between = sorted(left[layer.name] - set(table.grids[layer.name].pairs()))
        pairs = np.argwhere(subject.space.pairs(index)).tolist()
        options += [(layer, widths, s, p) for widths in between for s, p in pairs if layer.name in table.places]
    if not options:
        return {"entries": 0}
    keys, guesses = [], []
    for number in generator.choice(len(options), min(CHECKED, len(options)), replace=False):
        layer, (inputs, outputs), s, p = options[number]
        geometry = layer.geometry.resized(inputs=inputs, outputs=outputs)
        entry = STRUCTURES[s], PRECISIONS[p]
        keys.append(Key.of(table.times.target, geometry, *entry, table.places[layer.name]))
        guesses.append(table.measured(layer, geometry, *entry).ms)
    table.times.ensure(keys)
    true, guessed = np.array([table.times[key].ms for key in keys]), np.array(guesses)
    return {
        "entries": len(keys),
        "mean_percentage_error": round(mean_percentage_error(guesses, true.tolist()), 2),
        "error_percent_of_all_time": round(100 * float(np.abs(guessed - true).sum() / true.sum()), 2),
        "bias_percent_of_all_time": round(100 * float((guessed - true).sum() / true.sum()), 2),
    }


def quality(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    return {
        "mean_percentage_error": round(mean_percentage_error(predicted, measured), 2),
        "rank_correlation": round(rank_correlation(predicted, measured), 3),
    }


def study(name: str, count: int, rounds: int, folder: Path) -> dict[str, Any]:
    """One network's part of the results."""
    subject, generator = Subject.of(name), np.random.default_rng(SEED)
    fitted = calibration_profiles(subject.space, generator)
    tested = {f"random {n}": random_profile(subject.space, generator) for n in range(1, count + 1)}
    start = time.perf_counter()
    table = subject.table(folder)
    entries = table.prepare(subject.space)
    seconds = time.perf_counter() - start
    files = {label: subject.file(profile) for label, profile in (fitted | tested).items()}
    files |= {f"{label} again": files[label] for label in tested}
    inputs = {subject.marked.skeleton.inputs[0]: subject.batch[:1].numpy()}
    ms = {label: timing.cpu_median_ms for label, timing in time_files(files, inputs, rounds=rounds).items()}
    table = table.calibrated(subject.cost, [(profile, ms[label]) for label, profile in fitted.items()])
    profiles = {
        label: {
            "measured_ms": ms[label],
            "sum_ms": table.sum_ms(profile, subject.cost),
            "whole_ms": table.predict_ms(profile, subject.cost),
        }
        for label, profile in (fitted | tested).items()
    }
    true = [ms[label] for label in tested]
    found = {part: quality([profiles[label][f"{part}_ms"] for label in tested], true) for part in ("sum", "whole")}
    return {
        "network": name,
        "table": {"entries": entries, "seconds": round(seconds, 1)},
        "sum": found["sum"] | {"slope": round(table.parts.slope, 3), "offset_ms": round(table.parts.offset_ms, 4)},
        "whole": found["whole"] | {"slope": round(table.whole.slope, 3), "offset_ms": round(table.whole.offset_ms, 4)},
        "noise_floor": quality([ms[f"{label} again"] for label in tested], true),
        "spread_of_measured": round(float(np.std(true) / np.mean(true)), 3),
        "interpolation": interpolation(subject, table, generator),
        "machine": table.times.machine.to_json(),
        "profiles": {label: {key: round(v, 4) for key, v in row.items()} for label, row in profiles.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--profiles", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        networks = [study(name, args.profiles, args.rounds, Path(folder)) for name in args.networks]
    command = " ".join(["python -m bench.latency", *sys.argv[1:]])
    result = {"command": command, "seed": SEED, "rounds": args.rounds, "networks": networks}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in networks:
        print(json.dumps({key: value for key, value in row.items() if key != "profiles"}, indent=1))


if __name__ == "__main__":
    main()
