"""The artefact: a directory with packed weights, profile, model card, and a manifest that all is checked against."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grainwise.export.manifest import (
    CARD,
    MANIFEST,
    MODEL,
    PROFILE,
    WEIGHTS,
    ArtefactError,
    DeploymentSpec,
    InputSpec,
    Manifest,
    Nest,
    read_sealed,
    seal,
)
from grainwise.export.openvino import open_openvino
from grainwise.export.runtime import Deployed, Runner, open_session
from grainwise.export.weights import file_bytes, stored_tensors
from grainwise.graph.forward import Forward, default_forward
from grainwise.graph.skeleton import JOINS, POINTS, Skeleton, build_skeleton, skeleton_forward
from grainwise.graph.trace import trace
from grainwise.methods.activations import EightBit, EightBitSum
from grainwise.methods.modules import construct, describe
from grainwise.plan.layers import LayerGraph
from grainwise.plan.profile import CompressionProfile
from grainwise.plan.target import check_processor
from grainwise.realise.norms import FrozenNorm, freeze_norms
from grainwise.realise.reference import channels_last
from grainwise.realise.swap import swap

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["Artefact", "ArtefactError", "Deployment", "load", "save"]

RUNTIMES: dict[str, Callable[[str | Path | bytes], Runner]] = {
    "onnxruntime": open_session,
    "openvino": open_openvino,
}
"""Programs that run an artefact's file; the first is the one that it was made and measured for."""

_SAMPLES = 2  # of the batch that a network is traced on: one would hide the batch dimension


@dataclass(frozen=True, slots=True)
class Artefact:
    """An artefact that was read and checked. weights_bytes: size of the weights file on disk. forward: how a batch goes
    through the model.
    """

    model: nn.Module
    profile: CompressionProfile
    manifest: Manifest
    weights_bytes: int
    forward: Forward


@dataclass(frozen=True, slots=True)
class Deployment:
    """What an artefact with an ONNX file is made of beside the module. skeleton: that the module is a candidate of.
    target: name of the target that it was made for. example: a batch of inputs, of which names, types and shapes are
    kept: a tensor, or a sequence or mapping of tensors.
    """

    skeleton: Skeleton
    file: ModelProto
    target: str
    example: Any

    def spec(self, model: nn.Module) -> DeploymentSpec:
        """What the manifest says of a deployed candidate. Raises ArtefactError for an example of another form."""
        nest, tensors = _parts(self.example)
        folded = [unit.norm for unit in self.skeleton.units.values() if unit.norm is not None]

        def holds(path: str, kind: type[nn.Module]) -> bool:
            return isinstance(model.get_submodule(path), kind)

        return DeploymentSpec(
            target=self.target,
            nest=nest,
            inputs=tuple(
                InputSpec.model_validate(
                    {"name": n, "dtype": str(t.dtype).removeprefix("torch."), "shape": t.shape[1:]}
                )
                for n, t in zip(self.skeleton.inputs, tensors, strict=True)
            ),
            points=tuple(name for name in self.skeleton.points if holds(f"{POINTS}.{name}", EightBit)),
            joins=tuple(join.name for join in self.skeleton.joins if holds(f"{JOINS}.{join.name}", EightBitSum)),
            folded=tuple(norm for norm in folded if holds(norm, nn.Identity)),
        )


def _parts(batch: Any) -> tuple[Nest, list[Tensor]]:
    """How the tensors of a batch make it up, and the tensors. Raises ArtefactError for anything else than tensors."""
    nest: Nest = "tensor" if isinstance(batch, Tensor) else "mapping" if isinstance(batch, Mapping) else "sequence"
    tensors = [batch] if nest == "tensor" else list(batch.values() if nest == "mapping" else batch)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise ArtefactError(
            "a batch must be a tensor, or a sequence or mapping of nothing but tensors, to be described"
        )
    return nest, tensors


def save(
    directory: str | Path,
    model: nn.Module,
    *,
    reference: nn.Module,
    graph: LayerGraph,
    profile: CompressionProfile,
    figures: Mapping[str, float | int | str | None],
    card: str,
    deployment: Deployment | None = None,
) -> Path:
    """Write the artefact of a compressed `model`; an older one in `directory` stays until the new one is complete.

    deployment: given when `model` is a deployed candidate of a skeleton; its ONNX file is then written too.

    Raises ArtefactError when it cannot be written (a full disk, no permission) or `directory` holds something else;
    nothing half-written is left.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST).is_file())):
        raise ArtefactError(f"{target} exists and is no artefact; give another directory")
    frozen = copy.deepcopy(model)
    freeze_norms(frozen)
    tensors = {name: value.contiguous() for name, value in stored_tensors(frozen)}
    texts = {PROFILE: profile.to_json().encode(), CARD: card.encode()}
    files = texts if deployment is None else {**texts, MODEL: deployment.file.SerializeToString()}
    described = {
        "modules": _modules(frozen, graph, deployment),
        "norms": {n: len(m.weight) for n, m in frozen.named_modules() if isinstance(m, FrozenNorm)},
        "resized": _resized(frozen, deployment.skeleton.module if deployment else reference, graph),
        "figures": dict(figures),
        "deployment": deployment and deployment.spec(frozen),
    }
    try:
        with _replacing(target) as partial:
            _write(partial, tensors, files, described)
            _sync(partial)
            read_sealed(partial)  # what is on the disk, before it takes the place of an older one
    except (OSError, SafetensorError) as error:
        size = file_bytes(tensors) + sum(map(len, files.values()))
        raise ArtefactError(
            f"the artefact could not be written to {target} ({error}); about {size} bytes are needed there, "
            "nothing was left behind and an older artefact is untouched"
        ) from error
    return target


def _write(
    directory: Path, tensors: Mapping[str, Tensor], files: Mapping[str, bytes], described: Mapping[str, Any]
) -> None:
    """All files, the manifest with their digests last."""
    save_file(dict(tensors), directory / WEIGHTS)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    manifest = Manifest(files={name: seal(directory / name) for name in (WEIGHTS, *files)}, **described)
    (directory / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


@overload
def load(directory: str | Path, *, runtime: str = "onnxruntime") -> Deployed: ...
@overload
def load(directory: str | Path, model: nn.Module, forward: Forward = default_forward) -> Artefact: ...
def load(
    directory: str | Path,
    model: nn.Module | None = None,
    forward: Forward = default_forward,
    *,
    runtime: str = "onnxruntime",
) -> Artefact | Deployed:
    """Read an artefact: its ONNX file, ready to run, or its weights into a copy of `model`, the uncompressed
    architecture with any weights.

    forward: how a batch goes through `model`, where that must be known to take the network apart again.
    runtime: `onnxruntime`, or `openvino`, which computes a little differently (`grainwise verify --runtime openvino`);
        of the file, so not together with `model`.

    Every file is checked against the manifest first. Raises ArtefactError naming what does not fit, ImportError when
    the file is to be run and the runtime is not installed, FileError when the runtime cannot run it, ProcessorError
    when it would compute wrongly here, ValueError for an unknown runtime.
    """
    check_runtime(runtime)
    if model is not None and runtime != "onnxruntime":
        raise ValueError(f"a network was given, which PyTorch runs; leave it out to run the file in {runtime}")
    root = Path(directory)
    manifest = read_sealed(root)
    profile = CompressionProfile.load(root / PROFILE)
    if model is None:
        if manifest.deployment is None:
            raise ArtefactError(f"{root} has no {MODEL}: its weights are for PyTorch; give the network too")
        check_processor(profile.target, profile.entries.values())  # OpenVINO's kernels overflow too
        return Deployed(RUNTIMES[runtime](root / MODEL), profile, manifest)
    try:
        rebuilt = _rebuilt(manifest, model, forward)
        _resize(rebuilt, manifest.resized)
        _fill(rebuilt, root / WEIGHTS)
    except (AttributeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtefactError(f"{root} does not fit this network ({error}); give the one it was made from") from error
    size, through = manifest.files[WEIGHTS].bytes, skeleton_forward if manifest.deployment else forward
    return Artefact(rebuilt.eval().requires_grad_(False), profile, manifest, size, through)


def check_runtime(name: str) -> None:
    """Raises ValueError for a runtime that there is not."""
    if name not in RUNTIMES:
        raise ValueError(f"no runtime is called {name!r}; give one of {', '.join(RUNTIMES)}")


def _rebuilt(manifest: Manifest, model: nn.Module, forward: Forward) -> nn.Module:
    """The compressed network without its values."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if manifest.deployment is not None:
        model = _skeleton_of(model, manifest.deployment, forward)
    for name, spec in manifest.modules.items():
        swap(model, name, construct(spec))
    norms = {name: FrozenNorm(channels) for name, channels in manifest.norms.items()}
    for name, norm in norms.items():
        model.get_submodule(name)
        model.set_submodule(name, norm)
    return model if manifest.deployment is None else channels_last(model)


def _skeleton_of(model: nn.Module, spec: DeploymentSpec, forward: Forward) -> nn.Module:
    """The skeleton of the network with empty points and sums in 8 bits, folded norms left out."""
    tensors = {i.name: torch.zeros(_SAMPLES, *i.shape, dtype=getattr(torch, i.dtype)) for i in spec.inputs}
    listed = tuple(tensors.values())
    inputs = listed[0] if spec.nest == "tensor" else listed if spec.nest == "sequence" else tensors
    try:
        skeleton = build_skeleton(model, inputs, forward, trace(model, inputs, forward)).module
    except Exception as error:  # whatever torch.export and the network's own code raise
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"it cannot be shown as a graph: {first}") from error
    empty = {f"{POINTS}.{name}": EightBit() for name in spec.points}
    sums = {f"{JOINS}.{name}": EightBitSum(*(EightBit() for _ in range(3))) for name in spec.joins}
    for name, module in {**empty, **sums, **{name: nn.Identity() for name in spec.folded}}.items():
        skeleton.get_submodule(name)
        skeleton.set_submodule(name, module)
    return skeleton


def _modules(model: nn.Module, graph: LayerGraph, deployment: Deployment | None) -> dict[str, dict[str, Any]]:
    """How each layer is constructed that a profile can compress; tied ones keep the user's module."""
    tied = {layer.tied_to for layer in graph.layers}
    names = [layer.name for layer in graph.layers if not layer.blocked and not layer.tied_to and layer.name not in tied]
    return {n: describe(model.get_submodule(n)) for n in names if deployment is None or n in deployment.skeleton.units}


def _resized(model: nn.Module, reference: nn.Module, graph: LayerGraph) -> dict[str, list[int]]:
    """Shapes of parameters and buffers outside of layers and norms that narrowing cut."""
    before = {name: value.shape for name, value in reference.state_dict().items()}
    swapped = {layer.name for layer in graph.layers} | {
        name for name, module in model.named_modules() if isinstance(module, FrozenNorm)
    }
    return {
        name: list(value.shape)
        for name, value in model.state_dict().items()
        if name in before and before[name] != value.shape and name.rpartition(".")[0] not in swapped
    }


def _resize(model: nn.Module, shapes: Mapping[str, list[int]]) -> None:
    for name, shape in shapes.items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        old = getattr(owner, attribute)
        empty = old.new_empty(shape)
        setattr(owner, attribute, nn.Parameter(empty, requires_grad=False) if isinstance(old, nn.Parameter) else empty)


def _fill(model: nn.Module, weights: Path) -> None:
    """Load the file's tensors: none missing but aliases of shared ones, none left over."""
    tensors = load_file(weights)
    expected = dict(stored_tensors(model))
    if set(expected) != set(tensors):
        odd = sorted(set(expected) ^ set(tensors))[0]
        raise ValueError(f"tensor {odd!r} is only on one side")
    model.load_state_dict(tensors, strict=False)


def _sync(directory: Path) -> None:
    """Force files and directory to the disk, so that the rename that follows publishes whole files only."""
    for path in (*directory.iterdir(), directory):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A fresh directory beside `target` that takes its place when the block ends well and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        if target.exists():
            target.rename(old)
        partial.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
