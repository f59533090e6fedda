"""The artefact: a directory with packed weights, profile, model card, and a manifest that all is checked against."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from grainwise.export.weights import file_bytes, stored_tensors
from grainwise.methods.modules import construct, describe
from grainwise.plan.layers import LayerGraph
from grainwise.plan.profile import CompressionProfile
from grainwise.realise.norms import FrozenNorm, freeze_norms
from grainwise.realise.swap import swap

WEIGHTS, PROFILE, MANIFEST, CARD = "model.safetensors", "profile.json", "manifest.json", "README.md"


class ArtefactError(ValueError):
    """An artefact cannot be written or used; the message names the file, what is wrong and what to do."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _FileJson(_Strict):
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class Manifest(_Strict):
    """What the directory holds.

    files: SHA-256 and bytes of every file beside this one. modules: how each swapped layer is constructed, by path.
    norms: channels of each frozen batch norm, by path. resized: shapes of other parameters that were narrowed.
    figures: what the search found: test and search figures, trials, reference figures.
    """

    format: Literal["grainwise.artefact"] = "grainwise.artefact"
    version: Literal[1] = 1
    files: dict[str, _FileJson]
    modules: dict[str, dict[str, Any]]
    norms: dict[str, int]
    resized: dict[str, list[int]]
    figures: dict[str, float | int | str | None]


@dataclass(frozen=True, slots=True)
class Artefact:
    """An artefact that was read and checked. weights_bytes: size of the weights file on disk."""

    model: nn.Module
    profile: CompressionProfile
    manifest: Manifest
    weights_bytes: int


def save(
    directory: str | Path,
    model: nn.Module,
    *,
    reference: nn.Module,
    graph: LayerGraph,
    profile: CompressionProfile,
    figures: Mapping[str, float | int | str | None],
    card: str,
) -> Path:
    """Write the artefact of a compressed `model`; an older one in `directory` stays until the new one is complete.

    Raises ArtefactError when it cannot be written (a full disk, no permission) or `directory` holds something else;
    nothing half-written is left.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST).is_file())):
        raise ArtefactError(f"{target} exists and is no artefact; give another directory")
    frozen = copy.deepcopy(model)
    freeze_norms(frozen)
    tensors = {name: value.contiguous() for name, value in stored_tensors(frozen)}
    try:
        with _replacing(target) as partial:
            save_file(tensors, partial / WEIGHTS)
            (partial / PROFILE).write_text(profile.to_json(), encoding="utf-8")
            (partial / CARD).write_text(card, encoding="utf-8")
            manifest = Manifest(
                files={name: _FileJson(**_seal(partial / name)) for name in (WEIGHTS, PROFILE, CARD)},
                modules=_modules(frozen, graph),
                norms={n: len(m.weight) for n, m in frozen.named_modules() if isinstance(m, FrozenNorm)},
                resized=_resized(frozen, reference, graph),
                figures=dict(figures),
            )
            (partial / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
            _sync(partial)
    except (OSError, SafetensorError) as error:
        size = file_bytes(tensors)
        raise ArtefactError(
            f"the artefact could not be written to {target} ({error}); about {size} bytes are needed there, "
            "nothing was left behind and an older artefact is untouched"
        ) from error
    return target


def load(directory: str | Path, model: nn.Module) -> Artefact:
    """Read an artefact into a copy of `model`, the uncompressed architecture with any weights.

    Every file is checked against the manifest first. Raises ArtefactError naming what does not fit.
    """
    root = Path(directory)
    manifest = read_manifest(root)
    for name, sealed in manifest.files.items():
        if name not in (WEIGHTS, PROFILE, CARD):
            raise ArtefactError(f"{root / MANIFEST} names a file {name!r} that an artefact does not have")
        if _seal(root / name) != sealed.model_dump():
            raise ArtefactError(f"{root / name} is not the file that the manifest describes: damaged or replaced")
    profile = CompressionProfile.load(root / PROFILE)
    rebuilt = copy.deepcopy(model).eval().requires_grad_(False)
    try:
        for name, spec in manifest.modules.items():
            swap(rebuilt, name, construct(spec))
        for name, channels in manifest.norms.items():
            rebuilt.get_submodule(name)
            rebuilt.set_submodule(name, FrozenNorm(channels))
        _resize(rebuilt, manifest.resized)
        _fill(rebuilt, root / WEIGHTS)
    except (AttributeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtefactError(f"{root} does not fit this network ({error}); give the one it was made from") from error
    return Artefact(rebuilt.eval(), profile, manifest, (root / WEIGHTS).stat().st_size)


def read_manifest(root: Path) -> Manifest:
    """Raises ArtefactError when `root` has no readable manifest."""
    path = root / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror}; is {root} an artefact?") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtefactError(f"{path} is no manifest: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _modules(model: nn.Module, graph: LayerGraph) -> dict[str, dict[str, Any]]:
    return {
        layer.name: describe(model.get_submodule(layer.name))
        for layer in graph.layers
        if not layer.blocked and not layer.tied_to and not any(other.tied_to == layer.name for other in graph.layers)
    }


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


def _seal(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror}") from error


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
