from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from grainwise.store.litter import Litter, find, remove
from grainwise.store.studies import Store
from grainwise.study.trial import State
from tests.store.store_contract import TASKS


def test_what_killed_searches_left_is_found_and_removed(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 's.db'}")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    hands = {"dead": f"{host}:{ended.pid}/1", "alive": f"{host}:{os.getpid()}", "elsewhere": f"x{host}:{ended.pid}"}
    for name, worker in hands.items():
        store.create(name, {})
        store.queue(name, TASKS)
        store.start(name, {0: worker}, 1.0)
    for name in ("old.part", "new.part", "old.safetensors"):
        (tmp_path / name).touch()
        if name.startswith("old"):
            os.utime(tmp_path / name, (1, 1))
    found = find(tmp_path, store)
    assert found == Litter((tmp_path / "old.part",), ("dead",))
    assert (tmp_path / "old.part").exists()
    remove(found, store)
    assert sorted(path.name for path in tmp_path.glob("*.[ps]a*t*")) == ["new.part", "old.safetensors"]
    assert not store.study("dead").counts and store.study("alive").counts[State.RUNNING] == 1
    assert find(tmp_path, store) == Litter((), ())
    store.close()
