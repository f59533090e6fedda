"""Where a recovery stands, as one file: tensors in safetensors, all else as JSON in its header, replaced as a whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from grainwise.realise.reference import tensors_digest
from grainwise.recover.errors import RecoveryError

NAME = "checkpoint.safetensors"
FORMAT = "grainwise.recovery.1"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """tensors: by name. facts: JSON-able; `settings` among them says what the run is a run of."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    def save(self, folder: Path) -> None:
        """Replace the checkpoint in `folder`; after a crash there is the old one or the new one, whole.

        Raises RecoveryError when it cannot be written (a full disk, no permission); the old one is then untouched.
        """
        names = sorted(self.tensors)
        tensors = {name: self.tensors[name].detach().contiguous() for name in names}
        header = {"format": FORMAT, "facts": json.dumps(self.facts, allow_nan=False)}
        header["sha256"] = _digest(tensors, header["facts"])
        content = save(tensors, header)
        partial = folder / f".{NAME}.partial-{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(folder / NAME)
            _sync(folder)
        except OSError as error:
            raise RecoveryError(
                f"the checkpoint could not be written to {folder} ({error}); about {len(content)} bytes are needed "
                "there, an older checkpoint is untouched"
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    @staticmethod
    def load(folder: Path) -> Checkpoint:
        """Raises RecoveryError when there is none, or when it is damaged."""
        path = folder / NAME
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        except FileNotFoundError as error:
            raise RecoveryError(f"there is no checkpoint {path} to go on from") from error
        except (OSError, SafetensorError) as error:
            raise RecoveryError(f"the checkpoint {path} cannot be read ({error}); delete it and begin anew") from error
        facts = header.get("facts", "")
        if header.get("format") != FORMAT or header.get("sha256") != _digest(tensors, facts):
            raise RecoveryError(f"the checkpoint {path} is damaged or of another version; delete it and begin anew")
        return Checkpoint(tensors, json.loads(facts))

    @staticmethod
    def exists(folder: Path) -> bool:
        return (folder / NAME).exists()

    @staticmethod
    def remove(folder: Path) -> None:
        """Delete the checkpoint, and the folder if nothing else is in it."""
        (folder / NAME).unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _digest(tensors: Mapping[str, Tensor], facts: str) -> str:
    """Of values, names and facts; tensors in the order of their names."""
    parts = [tensors_digest(tensors.values()), *tensors, facts]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
