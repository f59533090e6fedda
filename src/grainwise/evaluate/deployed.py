"""Figures of a file in its runtime: the metric on a split, and milliseconds side by side with the uncompressed file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from onnx import ModelProto

from grainwise.evaluate.data import Batch, tensors_of
from grainwise.evaluate.evaluator import targets_of
from grainwise.evaluate.measures import Metric, checked
from grainwise.evaluate.timing import Machine, Timing, device_name, interleaved, noise, ratio
from grainwise.export.runtime import open_session, run

SECONDS = 2.0  # of timing two programs side by side
THREADS = 1


def file_metric(file: ModelProto | bytes, batches: Sequence[Batch], names: Sequence[str], metric: Metric) -> float:
    """The metric of a file's outputs on a split. names: of the file's inputs, in the order of a batch's tensors."""
    session = open_session(file if isinstance(file, bytes) else file.SerializeToString())
    found = [torch.from_numpy(run(session, feed(batch.inputs, names))) for batch in batches]
    return checked(metric, torch.cat(found), targets_of(batches))


def feed(inputs: Any, names: Sequence[str]) -> dict[str, Any]:
    """The tensors of a batch by the names of a file's inputs."""
    return dict(zip(names, tensors_of(inputs), strict=True))


def first_sample(inputs: Any, names: Sequence[str]) -> dict[str, Any]:
    """A batch of one, as arrays, ready to run."""
    return {name: tensor[:1].contiguous().numpy() for name, tensor in feed(inputs, names).items()}


@dataclass(frozen=True, slots=True)
class Race:
    """Files timed in turn at batch 1 and one thread, the first of them twice. ratios: of the processor time to that of
    the first file, by name. spread: of the first file against itself: what the ratios are uncertain by.
    """

    timings: Mapping[str, Timing]
    ratios: Mapping[str, float]
    spread: float
    noisy: bool
    machine: Machine


def race(files: Mapping[str, bytes], sample: Mapping[str, Any], seconds: float = SECONDS) -> Race:
    """Time files side by side on one sample (`first_sample`); the first is what the others are compared with."""
    import onnxruntime

    sessions = {name: open_session(content, threads=THREADS) for name, content in files.items()}
    first = next(iter(files))
    again = f"{first} again"

    def program(session: Any) -> Any:
        return lambda: session.run(None, dict(sample))

    programs = {**{name: program(s) for name, s in sessions.items()}, again: program(sessions[first])}
    timings = interleaved(programs, seconds=seconds)
    found = noise(timings[first], timings[again])
    ratios = {name: ratio(timings[name], timings[first]) for name in files}
    machine = Machine(device_name(), THREADS, "onnxruntime", onnxruntime.__version__)
    return Race({name: timings[name] for name in files}, ratios, found.spread, found.noisy, machine)


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
        "latency_batch": 1,
    }
