from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grainwise.recover import checkpoint
from grainwise.recover.checkpoint import NAME, Checkpoint
from grainwise.recover.errors import RecoveryError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3, dtype=torch.int32), "c": torch.ones(2).half()}
FACTS = {"settings": {"start": "x"}, "progress": {"losses": [0.1, 1 / 3]}}


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    Checkpoint(TENSORS, FACTS).save(folder)
    found = Checkpoint.load(folder)
    assert found.facts == FACTS and found.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(found.tensors[n], t) and found.tensors[n].dtype == t.dtype for n, t in TENSORS.items())
    assert [path.name for path in folder.iterdir()] == [NAME]
    assert load_file(folder / NAME).keys() == TENSORS.keys()  # a plain safetensors file
    Checkpoint.remove(folder)
    assert not folder.exists()


def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    Checkpoint(TENSORS, FACTS).save(tmp_path)
    whole = (tmp_path / NAME).read_bytes()
    for place in range(8, len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x04
        (tmp_path / NAME).write_bytes(damaged)
        try:
            found = Checkpoint.load(tmp_path)
        except RecoveryError as error:
            assert "delete it and begin anew" in str(error)
        else:  # a blank of the padding, or the escaped form of the same text
            assert found.facts == FACTS and all(torch.equal(found.tensors[n], t) for n, t in TENSORS.items())
    for size in range(0, len(whole), 7):
        (tmp_path / NAME).write_bytes(whole[:size])
        with pytest.raises(RecoveryError, match="begin anew"):
            Checkpoint.load(tmp_path)


def test_a_full_disk_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Checkpoint(TENSORS, FACTS).save(tmp_path)
    whole = (tmp_path / NAME).read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(RecoveryError, match=rf"could not be written to {tmp_path} .*about \d+ bytes are needed"):
        Checkpoint({}, {}).save(tmp_path)
    assert (tmp_path / NAME).read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_nothing_that_is_not_finite_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Checkpoint({}, {"loss": float("nan")}).save(tmp_path)
    assert not any(tmp_path.iterdir())


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert not Checkpoint.exists(tmp_path)
    with pytest.raises(RecoveryError, match="there is no checkpoint"):
        Checkpoint.load(tmp_path)
