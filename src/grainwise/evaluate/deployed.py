"""Figures of a file in its runtime: the metric on a split, and milliseconds side by side with the uncompressed file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto

from grainwise.evaluate.data import Batch, DataError, samples_in, take, tensors_of
from grainwise.evaluate.evaluator import targets_of
from grainwise.evaluate.measures import Metric, checked
from grainwise.evaluate.timing import Machine, Timing, device_name, interleaved, noise, ratio
from grainwise.export.openvino import open_openvino
from grainwise.export.parity import Difference
from grainwise.export.runtime import DISABLED, Runner, open_session, required, run

SECONDS = 2.0  # of timing two programs side by side
THREADS = 1
_CLOCKS = ("processor time", "time on the clock")


def file_metric(
    file: ModelProto | bytes,
    batches: Sequence[Batch],
    names: Sequence[str],
    metric: Metric,
    *,
    foreign: bool = False,
) -> float:
    """The metric of a file's outputs on a split. names: of the file's inputs, in the order of a batch's tensors.

    foreign: as in `race`.
    """
    session = _open(file if isinstance(file, bytes) else file.SerializeToString(), foreign=foreign)
    return checked(metric, torch.from_numpy(outputs_in(session, batches, names, foreign=foreign)), targets_of(batches))


def outputs_in(
    session: Runner, batches: Sequence[Batch], names: Sequence[str], *, foreign: bool = False
) -> NDArray[Any]:
    """A file's outputs for all samples of a split."""
    return np.concatenate([run(session, _named(session, feed(batch.inputs, names), foreign)) for batch in batches])


def feed(inputs: Any, names: Sequence[str]) -> dict[str, Any]:
    """The tensors of a batch by the names of a file's inputs."""
    return dict(zip(names, tensors_of(inputs), strict=True))


def first_sample(inputs: Any, names: Sequence[str]) -> dict[str, Any]:
    """A batch of one, as arrays, ready to run."""
    return {name: tensor[:1].contiguous().numpy() for name, tensor in feed(inputs, names).items()}


def first_samples(batches: Sequence[Batch], names: Sequence[str], count: int) -> dict[str, Any]:
    """The first `count` samples of a split as one batch of arrays. Raises DataError when it has fewer."""
    taken = [feed(batch.inputs, names) for batch in take(batches, count)]
    if (there := sum(samples_in(batch.inputs) for batch in batches)) < count:
        raise DataError(f"a batch of {count} samples was asked for, and the split has {there}")
    try:
        return {name: np.concatenate([part[name].numpy() for part in taken]) for name in names}
    except ValueError as error:
        raise DataError(f"the first {count} samples of the split do not go into one batch: {error}") from error


@dataclass(frozen=True, slots=True)
class Race:
    """Files timed in turn, the first of them opened and timed twice. ratios: of the time to that of the first file, by
    name: processor time for one thread, time on the clock for more. spread: of the first file against itself: what the
    ratios are uncertain by.
    """

    timings: Mapping[str, Timing]
    ratios: Mapping[str, float]
    spread: float
    noisy: bool
    machine: Machine
    batch: int

    @property
    def clock(self) -> str:
        """What the ratios are of, in words."""
        return _CLOCKS[self.machine.threads > 1]


def race(
    files: Mapping[str, bytes | Runner],
    sample: Mapping[str, Any],
    seconds: float | None = None,
    *,
    threads: int = THREADS,
    foreign: Collection[str] = (),
) -> Race:
    """Time files side by side on one batch (`first_sample`); the first is what the others are compared with.

    files: for ONNX Runtime, or opened already in another runtime. seconds: by default SECONDS. foreign: files of other
    tools, which run with every optimisation of ONNX Runtime, as their makers reckon with, and take the sample's arrays
    in their order.
    """
    import onnxruntime

    def program(name: str) -> Callable[[], object]:
        session = _open(files[name], threads=threads, foreign=name in foreign)
        arrays = _named(session, sample, name in foreign)
        return lambda: session.run(None, arrays)

    programs = {name: program(name) for name in files}
    first = next(iter(files))
    again = f"{first} again"
    timings = interleaved({**programs, again: program(first)}, seconds=SECONDS if seconds is None else seconds)
    wall = threads > 1
    found = noise(timings[first], timings[again], wall=wall)
    ratios = {name: ratio(timings[name], timings[first], wall=wall) for name in files}
    machine = Machine(device_name(), threads, "onnxruntime", onnxruntime.__version__)
    batch = len(next(iter(sample.values())))
    return Race({name: timings[name] for name in files}, ratios, found.spread, found.noisy, machine, batch)


def _open(file: bytes | Runner, *, threads: int = THREADS, foreign: bool) -> Runner:
    if not isinstance(file, bytes):
        return file
    session: Runner = open_session(file, threads=threads, disabled=() if foreign else DISABLED)
    return session


def _named(session: Runner, inputs: Mapping[str, Any], foreign: bool) -> dict[str, Any]:
    names = [spec.name for spec in session.get_inputs()]
    return dict(zip(names, inputs.values(), strict=True)) if foreign else {name: inputs[name] for name in names}


def race_figures(found: Race, candidate: str) -> dict[str, float | int | str | None]:
    """A candidate beside the reference, the first of the race, for reports and the manifest."""
    reference = next(iter(found.timings))
    mine, its = found.timings[candidate], found.timings[reference]
    return {
        "latency_ms": mine.p50_ms,
        "latency_p95_ms": mine.p95_ms,
        "reference_latency_ms": its.p50_ms,
        "reference_latency_p95_ms": its.p95_ms,
        "latency_ratio": found.ratios[candidate],
        "latency_noise": found.spread,
        "latency_device": found.machine.device,
        "latency_runtime": f"{found.machine.runtime} {found.machine.version}",
        "latency_threads": found.machine.threads,
        "latency_batch": found.batch,
    }


def openvino_figures(
    content: bytes, batches: Sequence[Batch], names: Sequence[str], metric: Metric
) -> dict[str, float | int | str | None]:
    """A file in OpenVINO beside the same file in ONNX Runtime: outputs and metric on a split, and milliseconds.

    Raises FileError when OpenVINO cannot run the file, ImportError without OpenVINO.
    """
    other = open_openvino(content, threads=THREADS)
    found = outputs_in(other, batches, names)
    difference = Difference.between(outputs_in(open_session(content), batches, names), found)
    raced = race({"onnxruntime": content, "openvino": other}, first_sample(batches[0].inputs, names))
    return {
        "openvino_accuracy": checked(metric, torch.from_numpy(found), targets_of(batches)),
        "openvino_max_abs_difference": difference.largest,
        "openvino_mean_abs_difference": difference.mean,
        "openvino_relative_difference": difference.share,
        "openvino_top1_agreement": difference.agreement,
        "openvino_latency_ms": raced.timings["openvino"].p50_ms,
        "openvino_latency_p95_ms": raced.timings["openvino"].p95_ms,
        "openvino_latency_ratio": raced.ratios["openvino"],
        "openvino_latency_noise": raced.spread,
        "openvino_kernels": ", ".join(f"{count} {name}" for name, count in other.kernels.items()),
        "openvino_version": required("openvino").__version__.partition("-")[0],
    }
