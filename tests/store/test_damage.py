"""Full disks and damaged files: the right answer or one sentence, and what can be read is recovered."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grainwise.plan.choices import PRECISIONS, STRUCTURES, Entry
from grainwise.plan.profile import CompressionProfile
from grainwise.store.recovery import recover
from grainwise.store.studies import Checkpoint, Store, StoreError
from grainwise.study.trial import Trial
from tests.store.store_contract import DONE, trial

TRIALS = 16


def wide(number: int, layers: int = 24) -> Trial:
    """A trial whose profile fills most of a page."""
    entries = {f"layer{i}": Entry(STRUCTURES[(i + number) % 9], PRECISIONS[i % 5]) for i in range(1, layers)}
    return replace(trial(number), entries={n: e for n, e in entries.items() if e != Entry()}, reward=number / 7)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database in good health."""
    path = tmp_path_factory.mktemp("whole") / "s.db"
    store = Store(f"sqlite:///{path}")
    store.create("s", {"seed": 1, "text": "x" * 500})
    for number in range(TRIALS):
        store.add("s", wide(number), keys={number: f"key {number}"})
    store.save_checkpoint("s", Checkpoint(TRIALS, {"a": list(range(300))}, bytes(range(256)) * 20))
    store.close()
    return path


def answers(path: Path) -> tuple[Any, ...]:
    """All that can be asked of a store."""
    store = Store(f"sqlite:///{path}", create=False)
    try:
        asked = store.studies(), store.settings("s"), store.trials("s"), store.checkpoint("s"), store.study("s")
        return *asked, store.measurement("key 3")
    finally:
        store.close()


def judged(path: Path, truth: tuple[Any, ...]) -> str:
    try:
        return "right" if answers(path) == truth else "wrong"
    except StoreError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return "refused"


def flipped(whole: Path, target: Path, rng: np.random.Generator) -> None:
    content = bytearray(whole.read_bytes())
    content[int(rng.integers(len(content)))] ^= int(rng.integers(1, 256))
    target.write_bytes(content)


def test_a_flipped_byte_gives_the_right_answer_or_a_sentence(whole: Path, tmp_path: Path) -> None:
    truth, rng, damaged = answers(whole), np.random.default_rng(0), tmp_path / "damaged.db"
    seen: Counter[str] = Counter()
    for _ in range(100):
        flipped(whole, damaged, rng)
        seen[judged(damaged, truth)] += 1
        _forget(damaged)
    assert seen["wrong"] == 0 and seen["refused"] > 40, seen


def test_without_seals_some_answers_would_be_wrong(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth, rng, damaged = answers(whole), np.random.default_rng(0), tmp_path / "damaged.db"
    monkeypatch.setattr(Store, "_checked", lambda store, row: row)
    seen: Counter[str] = Counter()
    for _ in range(40):
        flipped(whole, damaged, rng)
        seen[judged(damaged, truth)] += 1
        _forget(damaged)
    assert seen["wrong"] > 0, seen


def test_a_truncated_file_is_refused_with_advice(whole: Path, tmp_path: Path) -> None:
    content, damaged = whole.read_bytes(), tmp_path / "damaged.db"
    for length in np.linspace(1, len(content) - 1, 20).astype(int):
        damaged.write_bytes(content[:length])
        with pytest.raises(StoreError) as caught:
            answers(damaged)
        nothing = length < 100 and "holds no studies" in str(caught.value)  # less than the header of a database
        assert nothing or f"grainwise db recover --store sqlite:///{damaged}" in str(caught.value)
        _forget(damaged)


def test_what_can_be_read_is_recovered_and_goes_on(whole: Path, tmp_path: Path) -> None:
    truth, rng, damaged = answers(whole)[2], np.random.default_rng(1), tmp_path / "damaged.db"
    saved, hopeless = [], 0
    for number in range(8):
        flipped(whole, damaged, rng)
        out = f"sqlite:///{tmp_path / f'{number}.db'}"
        try:
            found = recover(f"sqlite:///{damaged}", out)
        except StoreError as error:
            assert "nothing of the store" in str(error)
            hopeless += 1
            continue
        store = Store(out)
        trials = store.trials("s") if found.studies else ()
        assert set(t.number for t in trials) <= set(range(TRIALS)) and all(truth[t.number] == t for t in trials)
        assert len(trials) == found.trials
        saved.append(found.trials)
        if found.studies and found.trials < TRIALS:
            assert found.checkpoints == 0 and found.refused > 0
        store.close()
    assert hopeless <= 1 and np.mean(saved) > TRIALS - 3, (hopeless, saved)


def test_pages_that_cannot_be_read_cost_their_own_rows_only(whole: Path, tmp_path: Path) -> None:
    """Two pages in the middle of the trials are overwritten."""
    content, damaged = bytearray(whole.read_bytes()), tmp_path / "damaged.db"
    pages = [
        i for i in range(len(content) // 4096) if content[i * 4096] == 13 and b"layer9" in content[i * 4096 :][:4096]
    ]
    assert len(pages) > 6
    for page in (pages[2], pages[5]):
        content[page * 4096 : (page + 1) * 4096] = b"\xff" * 4096
    damaged.write_bytes(content)
    found = recover(f"sqlite:///{damaged}", f"sqlite:///{tmp_path / 'new.db'}")
    assert found.studies == 1 and TRIALS - 6 <= found.trials < TRIALS and found.checkpoints == 0


def test_only_a_damaged_file_can_be_recovered(tmp_path: Path) -> None:
    for url, message in {
        f"sqlite:///{tmp_path / 'absent.db'}": "there is no store",
        "sqlite://": "no file of SQLite",
    }.items():
        with pytest.raises(StoreError, match=message):
            recover(url, f"sqlite:///{tmp_path / 'new.db'}")


def test_a_full_disk_keeps_every_trial_that_was_acknowledged(tmp_path: Path, full: bool) -> None:
    """A process that may write so many bytes to a file adds trials until it cannot; at 3 places, 100 with --full."""
    for number, room in enumerate(random.Random(0).sample(range(400_000, 900_000), 100 if full else 3)):
        (tmp_path / str(number)).mkdir()
        check_full_disk(tmp_path / str(number), room)


def check_full_disk(tmp_path: Path, room: int) -> None:
    url = f"sqlite:///{tmp_path / 's.db'}"
    store = Store(url)
    store.create("s", {})
    store.close()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _add_until_full(url, writing, room)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as lines:
        *told, sentence = lines.read().splitlines()
    assert os.waitpid(child, 0)[1] == 0
    assert len(told) > room // 100_000
    assert f"{tmp_path} has " in sentence and "bytes free: make room, then resume" in sentence
    store = Store(url)
    assert [t.number for t in store.trials("s")] == [int(number) for number in told]
    with store._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
    store.add("s", wide(len(told)))  # there is room again
    store.close()


def _add_until_full(url: str, tell: int, room: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    store = Store(url)
    for number in range(10_000):
        try:
            store.add("s", wide(number, 200))
        except StoreError as error:
            os.write(tell, f"{error}\n".encode())
            return
        os.write(tell, f"{number}\n".encode())


def test_a_profile_file_is_old_or_new(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    CompressionProfile(dict(wide(0).entries)).save(path)
    before = path.read_text()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            CompressionProfile(dict(wide(1, 200).entries)).save(path)
        except OSError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["best.json"]


def _forget(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def test_the_fixture_is_sound(whole: Path, tmp_path: Path) -> None:
    shutil.copy(whole, tmp_path / "copy.db")
    assert judged(tmp_path / "copy.db", answers(whole)) == "right"
    assert answers(whole)[2][0].measurement == DONE.measurement
