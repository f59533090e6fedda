"""The manifest of an artefact: every file with its digest, and how the modules of the network are built anew."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

WEIGHTS, PROFILE, MANIFEST, CARD, MODEL = (
    "model.safetensors",
    "profile.json",
    "manifest.json",
    "README.md",
    "model.onnx",
)

Nest = Literal["tensor", "sequence", "mapping"]
"""How tensors make up a batch."""


class ArtefactError(ValueError):
    """An artefact cannot be written or used; the message names the file, what is wrong and what to do."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileSeal(_Strict):
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class InputSpec(_Strict):
    """One tensor of a batch. shape: without the batch dimension."""

    name: str
    dtype: Literal["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    shape: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...]


class DeploymentSpec(_Strict):
    """What an artefact with an ONNX file has beside the layers.

    nest: how the inputs make up a batch. points: values kept in 8 bits. joins: sums of such values. folded: batch norms
    that went into the layer before them.
    """

    target: str
    nest: Nest
    inputs: Annotated[tuple[InputSpec, ...], Field(min_length=1)]
    points: tuple[str, ...]
    joins: tuple[str, ...]
    folded: tuple[str, ...]


class Manifest(_Strict):
    """What the directory holds.

    files: SHA-256 and bytes of every file beside this one. modules: how each swapped layer is constructed, by path.
    norms: channels of each frozen batch norm, by path. resized: shapes of other parameters that were narrowed.
    figures: what the search found: test and search figures, trials, reference figures. deployment: None where there is
    no ONNX file, as in all artefacts of version 1.
    """

    format: Literal["grainwise.artefact"] = "grainwise.artefact"
    version: Literal[1, 2] = 2
    files: dict[str, FileSeal]
    modules: dict[str, dict[str, Any]]
    norms: dict[str, int]
    resized: dict[str, list[int]]
    figures: dict[str, float | int | str | None]
    deployment: DeploymentSpec | None = None

    @property
    def sealed(self) -> tuple[str, ...]:
        """Names of the files that the artefact has beside its manifest."""
        return (WEIGHTS, PROFILE, CARD, *((MODEL,) if self.deployment else ()))


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


def read_sealed(root: Path) -> Manifest:
    """The manifest, after every file was found to be the one that it describes. Raises ArtefactError."""
    manifest = read_manifest(root)
    for name in manifest.files:
        if name not in manifest.sealed:
            raise ArtefactError(f"{root / MANIFEST} names a file {name!r} that an artefact does not have")
    for name in manifest.sealed:
        if name not in manifest.files or seal(root / name) != manifest.files[name]:
            raise ArtefactError(f"{root / name} is not the file that the manifest describes: damaged or replaced")
    return manifest


def seal(path: Path) -> FileSeal:
    """Digest and size of a file. Raises ArtefactError when it cannot be read."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return FileSeal(sha256=digest, bytes=path.stat().st_size)
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror}") from error
