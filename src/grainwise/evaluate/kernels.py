"""Kernel times of entries at their shapes: measured in bulk, remembered on disk for a machine and target."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grainwise.evaluate.conversions import Kernel, Line, fit_line
from grainwise.evaluate.places import Place
from grainwise.evaluate.profiling import (
    Branch,
    BranchWriter,
    Measured,
    measured,
    profile,
    profile_branches,
    profiler_cost,
)
from grainwise.evaluate.timing import Machine, Progress, device_name
from grainwise.methods.structure import blank
from grainwise.plan.choices import NONE, Choice, Granularity, Method
from grainwise.plan.layers import Geometry, Kind
from grainwise.plan.shapes import stages
from grainwise.plan.space import narrows
from grainwise.plan.target import Realisation, Target

SCHEMA_VERSION = 1
BATCH = 24  # branches of one file: about the kernels of a network, so that caches are as full
_ANCHORS = 2
_LINE_ATTEMPTS = 10
_ATTEMPTS = 4  # at a file, while the machine is slower than this share of its best:
_UNDISTURBED = 0.93
_LEAST_MS = 1e-4  # of a kernel
BATCH_MACS = 2_000_000_000  # multiply-accumulates of one file

_EIGHT = Choice(Method.QUANTIZE, Granularity.CHANNEL, 8)
_SAMPLE_SHAPES = ((16, 8, 8), (32, 8, 8), (64, 8, 8), (16, 32, 32), (32, 32, 32), (96, 24, 24), (64, 48, 48))


@dataclass(frozen=True, slots=True)
class Key:
    """What decides the kernels of an entry; entries of equal keys share one measurement.

    shape: of the layer's input without the batch. structure, precision: as they run: what only saves bytes is left out,
    and all bits of an 8-bit kernel are one. normed: a norm follows that cannot be folded. clip: the operator of
    `places.CLIPS` that follows and is a part of the kernel, or nothing.
    """

    geometry: Geometry
    shape: tuple[int, ...]
    structure: Choice
    precision: Choice
    normed: bool = False
    clip: str = ""

    @staticmethod
    def of(target: Target, geometry: Geometry, structure: Choice, precision: Choice, place: Place) -> Key:
        """Of an entry at a (narrowed) geometry."""
        how = target.realisations(geometry, structure, precision)
        zeros = structure.method is Method.PRUNE and Realisation.SPARSE not in how
        runs_as = NONE if zeros or narrows(structure) else structure
        if Realisation.GATHERED not in how:
            quantised = {Realisation.STATIC, Realisation.DYNAMIC}.intersection(how)
            same = target.realisations(geometry, structure, _EIGHT) == how
            precision = NONE if not quantised else _EIGHT if same else precision
        ghost = (structure.method, structure.granularity) == (Method.DISTILL, Granularity.CHANNEL)
        shape = _narrowed(place.shape, geometry)
        if place.padded:
            shape = (shape[0], *(size - 2 * zeros for size, zeros in zip(shape[1:], place.padded, strict=True)))
            geometry = replace(geometry, padding=tuple(map(sum, zip(geometry.padding, place.padded, strict=True))))
        biased = replace(geometry, bias=geometry.kind is not Kind.EMBEDDING)  # norms are folded into biases
        clip = place.clip if geometry.kernel and Realisation.STATIC not in how else ""
        return Key(biased, shape, runs_as, precision, place.normed and ghost, clip)

    @property
    def text(self) -> str:
        """Equal for equal keys, and readable."""
        g = self.geometry
        sides = [",".join(map(str, part)) for part in (g.kernel, g.stride, g.padding, g.dilation)]
        spatial = "x".join(map(str, self.shape))
        words = [g.kind, f"{g.inputs}>{g.outputs}", f"groups {g.groups}", "k/s/p/d " + "/".join(sides), f"at {spatial}"]
        return " ".join(
            [*words, str(self.structure), str(self.precision), *(["normed"] if self.normed else []), self.clip]
        ).rstrip()

    def branch(self, target: Target) -> Branch:
        module = blank(self.geometry, self.structure, self.precision, target)
        static = target.static(self.geometry, self.structure, self.precision)
        return Branch(module, self.geometry, self.shape, static, self.normed, self.clip)

    @property
    def macs(self) -> int:
        """Multiply-accumulates, all stages at the input's positions: for dividing work."""
        positions = 1
        for size in self.shape[1:] if self.geometry.kernel else self.shape[:-1]:
            positions *= size
        return positions * sum(stage.geometry.weights for stage in stages(self.geometry, self.structure))


def _narrowed(shape: Sequence[int], geometry: Geometry) -> tuple[int, ...]:
    """The input's shape with the channels that `geometry` reads."""
    if geometry.kind is Kind.EMBEDDING:
        return tuple(shape)
    return (geometry.inputs, *shape[1:]) if geometry.kernel else (*shape[:-1], geometry.inputs)


def cache_folder() -> Path:
    """Where measurements are kept: the user's cache directory."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "grainwise"


class KernelTimes:
    """Times of this machine for one target, measured where they are missing.

    folder: where they are remembered, by default `cache_folder()`; None keeps them in memory alone.
    """

    def __init__(self, target: Target, *, threads: int = 1, folder: Path | None = None, remember: bool = True) -> None:
        if target.runtime != "onnxruntime":
            raise ValueError(f"{target.name} does not run in ONNX Runtime: its kernels cannot be timed")
        self.target = target
        version = importlib.import_module("onnxruntime").__version__
        self.machine = Machine(device_name(), threads, target.runtime, version)
        facts = json.dumps([SCHEMA_VERSION, target.name, self.machine.to_json()])
        digest = hashlib.sha256(facts.encode()).hexdigest()[:16]
        self.path = (folder or cache_folder()) / f"kernels-{digest}.json" if remember else None
        self._times: dict[str, Measured] = {}
        self._lines: dict[Kernel, Line] = {}
        self.profiler_ms = self._anchors_ms = 0.0
        self._read()

    def __getitem__(self, key: Key) -> Measured:
        if key.text not in self._times:
            self.ensure([key])
        return self._times[key.text]

    def __len__(self) -> int:
        """Entries that were measured."""
        return len(self._times)

    def ensure(self, keys: Iterable[Key], progress: Progress = lambda done, total: None) -> int:
        """Measures all keys that are missing, in as few files as possible; their number. progress: (done, total)."""
        missing = {key.text: key for key in keys if key.text not in self._times}
        if not missing:
            return 0
        if not self._lines:
            self._measure_lines()
        done = 0
        for batch in _batches(list(missing.values())):
            self._times |= {key.text: times for key, times in zip(batch, self._measure(batch), strict=True)}
            done += len(batch)
            progress(done, len(missing))
        self._write()
        return len(missing)

    def _measure(self, batch: Sequence[Key]) -> list[Measured]:
        """Times as they would be if the machine were as fast as it was for the anchors: other programs slow a processor
        by half for seconds at a time, and the anchors in the same file with everything else. What runs much slower is
        measured again.
        """
        branches = [key.branch(self.target) for key in (*_anchors(self.target), *batch)]
        speed, found = 0.0, [Measured(0.0)]
        for _ in range(_ATTEMPTS):
            again = profile_branches(branches, threads=self.machine.threads)
            faster = self._anchors_ms / sum(times.ms for times in again[:_ANCHORS])
            if faster > speed:
                speed, found = faster, again
            if speed > _UNDISTURBED:
                break
        return [replace(m, ms=self._own(m.ms * speed, m.kernels)) for m in found[_ANCHORS:]]

    def _own(self, ms: float, kernels: int = 1) -> float:
        """Time of some kernels without what the profiler adds."""
        return max(ms - kernels * self.profiler_ms, kernels * _LEAST_MS)

    def line(self, kernel: Kernel) -> Line:
        """Milliseconds of a kernel between layers by the numbers that it writes."""
        if not self._lines:
            self._measure_lines()
            self._write()
        return self._lines[kernel]

    def _measure_lines(self) -> None:
        writer = BranchWriter()
        for number, shape in enumerate(_SAMPLE_SHAPES):
            _sample(writer, shape, f"sample{number}", self.target)
        ends = [writer.add(key.branch(self.target)) for key in _anchors(self.target)]
        threads, file = self.machine.threads, writer.file()
        self.profiler_ms = profiler_cost(threads)
        runs = [profile(file, writer.feeds, threads=threads) for _ in range(_LINE_ATTEMPTS)]
        best = [min(nodes, key=lambda node: node.ms) for nodes in zip(*runs, strict=True)]
        self._anchors_ms = sum(measured(best, end, writer.feeds, convolved=True).ms for end in ends)
        for kernel in Kernel:
            samples = [(node.elements, self._own(node.ms)) for node in best if node.kind == kernel]
            self._lines[kernel] = fit_line(samples)

    # -- on disk

    def _read(self) -> None:
        """What was measured before; a file that cannot be read counts as none."""
        try:
            stored: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8")) if self.path else {}
            times = {
                text: Measured(float(ms), int(n), bool(r), bool(w)) for text, (ms, n, r, w) in stored["times"].items()
            }
            lines = {Kernel(name): Line(float(a), float(b)) for name, (a, b) in stored["lines"].items()}
            facts = float(stored["profiler_ms"]), float(stored["anchors_ms"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return
        if lines.keys() == set(Kernel):
            self._times, self._lines = times, lines
            self.profiler_ms, self._anchors_ms = facts

    def _write(self) -> None:
        if self.path is None:
            return
        stored = {
            "target": self.target.name,
            "machine": self.machine.to_json(),
            "profiler_ms": self.profiler_ms,
            "anchors_ms": self._anchors_ms,
            "lines": {kernel: (line.base_ms, line.element_ms) for kernel, line in self._lines.items()},
            "times": {text: (m.ms, m.kernels, m.reads_blocked, m.writes_blocked) for text, m in self._times.items()},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem, suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(stored, file)
        Path(name).replace(self.path)


def _batches(keys: Sequence[Key]) -> Iterator[list[Key]]:
    """The keys in parts that fit into one file."""
    batch: list[Key] = []
    macs = 0
    for key in keys:
        if batch and (len(batch) == BATCH or macs + key.macs > BATCH_MACS):
            yield batch
            batch, macs = [], 0
        batch.append(key)
        macs += key.macs
    if batch:
        yield batch


def _sample(writer: BranchWriter, shape: tuple[int, int, int], name: str, target: Target) -> None:
    """Branches that hold every kernel of `Kernel` at one shape."""
    channels = shape[0]
    pointwise = Geometry(Kind.CONV2D, channels, channels, (1, 1), (1, 1), (0, 0), (1, 1), bias=True)
    writer.add(Branch(blank(pointwise, NONE, NONE, target), pointwise, shape), whole=True)
    writer.add(Branch(blank(pointwise, NONE, _EIGHT, target), pointwise, shape, static=True), whole=True)
    x, other = writer.input(shape), writer.input(shape, own="other")
    writer.outputs.append(writer.node("Relu", [writer.node("Add", [x, other], f"{name}.sum")], f"{name}.relu"))
    first, second = (writer.point(value, f"{name}.{value}.point") for value in (x, other))
    total = writer.node("Add", [first, second], f"{name}.total")
    writer.outputs.append(writer.point(total, f"{total}.point"))


def _anchors(target: Target) -> tuple[Key, ...]:
    """Layers that are timed in every file, to see how fast the machine is at that moment: one float, one 8-bit."""
    convolution = Geometry(Kind.CONV2D, 32, 32, (3, 3), (1, 1), (1, 1), (1, 1), bias=True)
    return tuple(Key.of(target, convolution, NONE, precision, Place((32, 16, 16))) for precision in (NONE, _EIGHT))
