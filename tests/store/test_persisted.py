"""That the look at persisted files sees a pickle; `tests/test_cli.py` has it look at all that a search leaves."""

from __future__ import annotations

import pickle
from contextlib import closing
from pathlib import Path

import pytest
from safetensors import SafetensorError

from grainwise.store.studies import Checkpoint, Store
from tests.store.persisted import check
from tests.store.store_contract import DONE


@pytest.mark.parametrize("tensors", [b"", pickle.dumps({"a": 1})], ids=["nothing", "a pickle"])
def test_a_cell_of_a_database(tensors: bytes, tmp_path: Path) -> None:
    with closing(Store(f"sqlite:///{tmp_path / 's.db'}")) as store:
        store.create("s", {})
        store.add("s", DONE, keys={0: "k"})
        store.save_checkpoint("s", Checkpoint(1, {}, tensors))
    with pytest.raises(SafetensorError):
        check(tmp_path / "s.db")


@pytest.mark.parametrize("name", ["a.safetensors", "a.json", "a.pt"])
def test_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises((SafetensorError, ValueError)):
        check(tmp_path / name)
