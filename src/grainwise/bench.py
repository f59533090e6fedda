"""Deployed files side by side with the uncompressed one: the metric on the test split, bytes, milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from grainwise.evaluate.data import Batch, Data, Splits, take
from grainwise.evaluate.deployed import file_metric, first_samples, race
from grainwise.evaluate.measures import Metric, resolve_metric
from grainwise.export.kernels import found_kernels
from grainwise.export.manifest import MODEL, PROFILE, ArtefactError, read_sealed
from grainwise.export.runtime import DISABLED, optimised
from grainwise.graph.forward import Forward, default_forward
from grainwise.plan.profile import CompressionProfile
from grainwise.realise.reference import fingerprint
from grainwise.session import EXAMPLE_SAMPLES, reference_file

REFERENCE = "uncompressed"
"""Name of the file that the others are compared with."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Contest:
    """Files for the same task. files: by name, the uncompressed one first. test: the split that they are judged on.
    inputs: names of their inputs, in the order of a batch's tensors. foreign: names of files that other tools wrote
    (`deployed.race`).
    """

    files: Mapping[str, bytes]
    test: Sequence[Batch]
    inputs: Sequence[str]
    metric: Metric
    foreign: frozenset[str] = frozenset()

    @staticmethod
    def of(
        directories: Sequence[str | Path],
        model: nn.Module,
        data: Data,
        *,
        metric: str | Metric = "accuracy",
        forward: Forward = default_forward,
    ) -> Contest:
        """The ONNX files of artefacts, under the names of their directories, and that of `model`.

        Raises ArtefactError for a directory that is none, is damaged, has no ONNX file, is of other weights than
        `model` has or is given twice, and what `Session.prepare` raises for the model, the data and the metric.
        """
        weights = fingerprint(model)
        found: dict[str, bytes] = {}
        for directory in map(str, directories):
            if directory in (*found, REFERENCE):
                raise ArtefactError(f"{directory} is there twice; give each artefact once")
            found[directory] = _file_of(Path(directory), weights)
        splits, score = Splits.read(data), resolve_metric(metric)
        full, inputs = reference_file(model, take(splits.test, EXAMPLE_SAMPLES)[0].inputs, forward)
        return Contest({REFERENCE: full, **found}, splits.test, inputs, score)

    def sample(self, count: int) -> dict[str, Any]:
        """The first `count` samples of the test split, to be timed on. Raises DataError when there are fewer."""
        return first_samples(self.test, self.inputs, count)

    def row(self, name: str) -> Row:
        """What a file is without a clock: the metric on the test split, bytes, and the 8-bit kernels that it runs."""
        content, foreign = self.files[name], name in self.foreign
        counts = found_kernels(optimised(content, disabled=() if foreign else DISABLED).graph)
        return {
            "name": name,
            "metric": file_metric(content, self.test, self.inputs, self.metric, foreign=foreign),
            "size_bytes": len(content),
            "size_ratio": len(content) / len(self.files[REFERENCE]),
            "kernels": ", ".join(f"{count} {kernel}" for kernel, count in sorted(counts.items())),
        }

    def rows(self, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Row]:
        found: list[Row] = []
        for name in self.files:
            progress(len(found), len(self.files))
            found.append(self.row(name))
        progress(len(found), len(found))
        return found

    def standings(self, rows: Sequence[Row], sample: Mapping[str, Any], *, threads: int, seconds: float) -> Row:
        """Time all files in turn; their rows with milliseconds under `files`, and how it was timed.

        latency_ratio: of the time to that of the uncompressed file, as `clock` says. noise: |ratio - 1| of that file
        against itself; noisy when it is too large to tell files apart.
        """
        raced = race(self.files, sample, seconds, threads=threads, foreign=self.foreign)
        files = []
        for row in rows:
            timing = raced.timings[row["name"]]
            times = {"p50_ms": timing.p50_ms, "p95_ms": timing.p95_ms, "latency_ratio": raced.ratios[row["name"]]}
            files.append({**row, **times})
        return {
            "device": raced.machine.device,
            "runtime": f"{raced.machine.runtime} {raced.machine.version}",
            "threads": threads,
            "batch": raced.batch,
            "rounds": raced.timings[REFERENCE].runs,
            "clock": raced.clock,
            "noise": raced.spread,
            "noisy": raced.noisy,
            "files": files,
        }


def _file_of(root: Path, weights: str) -> bytes:
    """An artefact's ONNX file, after every digest was checked."""
    manifest = read_sealed(root)
    if manifest.deployment is None:
        raise ArtefactError(f"{root} has no {MODEL}: it was made for PyTorch; export it for an ONNX Runtime target")
    if (made_for := CompressionProfile.load(root / PROFILE).model) and made_for != weights:
        raise ArtefactError(f"{root} was made from other weights than this network has; give the network of the search")
    return (root / MODEL).read_bytes()
