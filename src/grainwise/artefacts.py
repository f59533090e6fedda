"""An artefact taken up again: measured anew, or fine-tuned and replaced."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from grainwise.api import SILENT, Observer
from grainwise.evaluate.data import Data, Splits, take
from grainwise.evaluate.deployed import (
    file_metric,
    first_sample,
    openvino_figures,
    outputs_in,
    race,
    race_figures,
)
from grainwise.evaluate.evaluator import outputs_of, targets_of
from grainwise.evaluate.measures import Metric, checked, resolve_metric
from grainwise.export.artefact import Artefact, check_runtime, load
from grainwise.export.manifest import MODEL, ArtefactError
from grainwise.export.runtime import kernels, open_session
from grainwise.export.weights import weights_bytes
from grainwise.graph.forward import Forward, default_forward
from grainwise.graph.recording import record
from grainwise.plan.target import check_processor
from grainwise.realise.reference import channels_last, fingerprint
from grainwise.recover.checkpoint import Checkpoint
from grainwise.recover.options import STANDARD, RecoverOptions, training_budget
from grainwise.session import EXAMPLE_SAMPLES, Result, Session, reference_file

PARITY_SAMPLES = 512  # of the test split, on which file and module are compared


def verify_artefact(
    directory: str | Path,
    model: nn.Module,
    data: Data,
    *,
    metric: str | Metric = "accuracy",
    forward: Forward = default_forward,
    runtime: str = "onnxruntime",
) -> dict[str, float | int | str | None]:
    """Reload an artefact and measure it anew: every figure is computed from the files, the model and the data.

    runtime: `openvino` runs the file there too and compares it with ONNX Runtime.

    Raises ArtefactError when a file is damaged, does not fit the model, or its size is not what the search claimed;
    FileError when the runtime cannot run the file, ValueError for an unknown runtime.
    """
    check_runtime(runtime)
    found = load(directory, model, forward)
    manifest = found.manifest
    deployed = manifest.deployment is not None
    if runtime != "onnxruntime" and not deployed:
        raise ArtefactError(f"{directory} has no {MODEL} that {runtime} could run: its weights are for PyTorch")
    size, claimed = manifest.files[MODEL].bytes if deployed else found.weights_bytes, manifest.figures
    if claimed.get("size_bytes") != size:
        raise ArtefactError(f"{directory} claims {claimed.get('size_bytes')} bytes, the file has {size}")
    splits = Splits.read(data)
    score = resolve_metric(metric)
    example = take(splits.test, EXAMPLE_SAMPLES)[0].inputs
    reference = copy.deepcopy(model).eval()
    figures: dict[str, float | int | str | None] = {}
    for prefix, network, way in (("", found.model, found.forward), ("reference_", reference, forward)):
        outputs = outputs_of(channels_last(network), splits.test, way)
        figures[f"{prefix}accuracy"] = checked(score, outputs, targets_of(splits.test))
        figures[f"{prefix}macs"] = record(network, example, way).macs
    figures |= {"size_bytes": size, "reference_size_bytes": weights_bytes(model), "trials": claimed.get("trials")}
    if deployed:
        figures |= _verify_file(Path(directory), found, reference, splits, score, forward, runtime)
    return {**figures, "claimed_accuracy": claimed.get("accuracy"), "claimed_macs": claimed.get("macs")}


def recover_artefact(
    directory: str | Path,
    model: nn.Module,
    data: Data,
    train: Iterable[Any],
    *,
    epochs: int | None = None,
    minutes: float | None = None,
    metric: str | Metric = "accuracy",
    forward: Forward = default_forward,
    options: RecoverOptions = STANDARD,
    resume: bool = False,
    observer: Observer = SILENT,
) -> Result:
    """Fine-tune the network of an artefact as `Result.recover` does, and put the recovered one in its place once its
    file has passed the parity gate. Where nothing better is found the artefact stays as it is.

    A checkpoint is kept beside the directory meanwhile (`checkpoint_folder`); resume: go on from it.

    Raises ArtefactError (damaged, made from another network), RecoveryError, DataError, ParityError, or Stopped on
    Ctrl-C or SIGTERM; the artefact is then unchanged.
    """
    budget, folder = training_budget(epochs, minutes), checkpoint_folder(directory)
    observer.stage("trace")
    found = load(directory, model, forward)
    profile = found.profile
    if profile.model != fingerprint(model):
        raise ArtefactError(
            f"{directory} was made from other weights than this network has; give the one it was made from"
        )
    session = Session.prepare(model, data, metric=metric, forward=forward, space=profile.space, target=profile.target)
    observer.stage("recover")
    start = session.evaluator.deployed(found.model, profile.entries)
    candidate, recovered = session.recover(
        start,
        profile.entries,
        train,
        budget=budget,
        options=options,
        folder=folder,
        resume=resume,
        watch=observer.step,
    )
    observer.stage("finish")
    trials = found.manifest.figures.get("trials")
    result = session.result(candidate, profile.entries, int(trials or 0), recovered)
    if recovered.best:
        result.export(directory)
    Checkpoint.remove(folder)
    return result


def checkpoint_folder(directory: str | Path) -> Path:
    """Where the recovery of an artefact keeps its checkpoint."""
    path = Path(directory)
    return path.with_name(f"{path.name}.recovery")


def _verify_file(
    root: Path, found: Artefact, reference: nn.Module, splits: Splits, metric: Metric, forward: Forward, runtime: str
) -> dict[str, float | int | str | None]:
    """Figures of an artefact's ONNX file: from the file, beside the PyTorch module and the uncompressed network."""
    check_processor(found.profile.target, found.profile.entries.values())
    content = (root / MODEL).read_bytes()
    example = take(splits.test, EXAMPLE_SAMPLES)[0].inputs
    full, names = reference_file(reference, example, forward)
    some = take(splits.test, PARITY_SAMPLES)
    ours = outputs_of(found.model, some, found.forward)
    files = outputs_in(open_session(content), some, names)
    raced = race({"reference": full, "candidate": content}, first_sample(example, names))
    counts = kernels(content)
    return {
        "reference_size_bytes": len(full),
        "onnx_accuracy": file_metric(content, splits.test, names, metric),
        "onnx_size_bytes": len(content),
        "max_abs_difference": float(np.abs(ours.numpy() - files).max()),
        "top1_agreement": float((ours.numpy().argmax(-1) == files.argmax(-1)).mean()),
        "kernels": ", ".join(f"{count} {name}" for name, count in sorted(counts.items())),
        **race_figures(raced, "candidate"),
        **(openvino_figures(content, splits.test, names, metric) if runtime == "openvino" else {}),
    }
