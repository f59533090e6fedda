"""The user's data: three disjoint splits, checked, held as batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

SPLITS = ("calibration", "search", "test")


class DataError(ValueError):
    """The data cannot be used; the message says which split, what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class Batch:
    """inputs: what `forward` gives to the model: a tensor, a tuple or a dict of tensors, samples along dimension 0.
    targets: what the metric compares with, or None (calibration needs none).
    """

    inputs: Any
    targets: Tensor | None


@dataclass(frozen=True, slots=True)
class Data:
    """Three disjoint splits. calibration: statistics, batch norm and layer problems are fitted on it (labels are not
    read). search: candidates are ranked on it. test: read once, for the final figures.

    Each is an iterable of batches: `(inputs, targets)`, a dict with `labels` or `targets` among its inputs, or, for
    calibration, inputs alone. It is read once.
    """

    calibration: Iterable[Any]
    search: Iterable[Any]
    test: Iterable[Any]


@dataclass(frozen=True, slots=True)
class Splits:
    """`Data` read, checked and held in memory. fingerprint: SHA-256 of the calibration samples. owners: the split of
    each sample, by its SHA-256.
    """

    calibration: tuple[Batch, ...]
    search: tuple[Batch, ...]
    test: tuple[Batch, ...]
    fingerprint: str
    owners: Mapping[bytes, str]

    @staticmethod
    def read(data: Data) -> Splits:
        """Raises DataError for an empty split, a batch of unknown form, missing targets, or a sample in two splits."""
        splits = {name: tuple(_batches(name, getattr(data, name))) for name in SPLITS}
        seen: dict[bytes, str] = {}
        fingerprint = hashlib.sha256()
        for name, batches in splits.items():
            for digest in (d for batch in batches for d in _digests(batch.inputs)):
                if seen.setdefault(digest, name) != name:
                    raise _shared(name, seen[digest])
                if name == "calibration":
                    fingerprint.update(digest)
        return Splits(splits["calibration"], splits["search"], splits["test"], fingerprint.hexdigest(), seen)

    def training(self, raw: Any) -> tuple[Batch, str]:
        """A batch to train on, and its SHA-256. Raises DataError as `read` does, too for a sample that is in a split.

        Targets may be left out.
        """
        batch = _batch("training", raw)
        whole = hashlib.sha256()
        for digest in _digests(batch.inputs):
            if digest in self.owners:
                raise _shared("training", self.owners[digest])
            whole.update(digest)
        return Batch(fast_layout(batch.inputs), batch.targets), whole.hexdigest()


def _shared(one: str, other: str) -> DataError:
    return DataError(
        f"a sample of the {one} split is in the {other} split too; figures would be flattered: "
        "make calibration, search and test disjoint, and training data disjoint from all of them"
    )


def tensors_of(inputs: Any) -> Iterator[Tensor]:
    """The tensors of a batch's inputs."""
    if isinstance(inputs, Tensor):
        yield inputs
    else:
        values = inputs.values() if isinstance(inputs, Mapping) else inputs
        yield from (value for value in values if isinstance(value, Tensor))


def samples_in(inputs: Any) -> int:
    return len(next(tensors_of(inputs)))


def take(batches: Sequence[Batch], count: int) -> tuple[Batch, ...]:
    """The first `count` samples of `batches`."""
    taken: list[Batch] = []
    for batch in batches:
        if count <= 0:
            break
        size = samples_in(batch.inputs)
        cut = min(size, count)
        targets = None if batch.targets is None else batch.targets[:cut]
        taken.append(Batch(_map(batch.inputs, lambda t, n=cut: t[:n]), targets))
        count -= size
    return tuple(taken)


def _map(inputs: Any, change: Any) -> Any:
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {key: change(value) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    return type(inputs)(change(value) if isinstance(value, Tensor) else value for value in inputs)


def fast_layout(inputs: Any) -> Any:
    """Pictures in channels-last memory, in which convolutions on a CPU run 1.6 times as fast; all else as it is."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    return _map(inputs, convert)


def _batches(split: str, loader: Iterable[Any]) -> Iterator[Batch]:
    count = 0
    for raw in loader:
        batch = _batch(split, raw)
        if split != "calibration" and batch.targets is None:
            raise DataError(
                f"a batch of the {split} split has no targets; give (inputs, targets) or a dict with 'labels'"
            )
        count += samples_in(batch.inputs)
        yield Batch(fast_layout(batch.inputs), batch.targets)
    if count == 0:
        raise DataError(f"the {split} split is empty; give at least one batch")


def _batch(split: str, raw: Any) -> Batch:
    if isinstance(raw, Tensor):
        return Batch(raw, None)
    if isinstance(raw, Mapping):
        key = next((k for k in ("labels", "targets") if k in raw), None)
        inputs = {k: v for k, v in raw.items() if k != key}
        batch = Batch(inputs, None if key is None else torch.as_tensor(raw[key]))
    elif isinstance(raw, tuple | list) and len(raw) == 2:
        batch = Batch(raw[0], torch.as_tensor(raw[1]))
    else:
        raise DataError(f"a batch of the {split} split is a {type(raw).__name__}; give (inputs, targets) or a dict")
    if not any(True for _ in tensors_of(batch.inputs)):
        raise DataError(f"a batch of the {split} split holds no tensor among its inputs")
    return batch


def _digests(inputs: Any) -> Iterator[bytes]:
    """One SHA-256 a sample, over all its tensors."""
    columns = [np.ascontiguousarray(t.detach().cpu().contiguous().numpy()) for t in tensors_of(inputs)]
    for sample in zip(*columns, strict=True):
        digest = hashlib.sha256()
        for value in sample:
            digest.update(value.tobytes())
        yield digest.digest()
