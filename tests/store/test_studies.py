from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from grainwise.plan.choices import PRECISIONS, STRUCTURES, Entry
from grainwise.store.studies import Checkpoint, Store, StoreError
from grainwise.study.measurement import Failure, Measurement
from grainwise.study.trial import Trial

ENTRIES = {"a": Entry(STRUCTURES[5], PRECISIONS[3])}
DONE = Trial(0, ENTRIES, Measurement(0.5, 0.1, 10, 20), 0.9, "controller", 0.25, (0.2, 0.9))
FAILED = Trial(1, ENTRIES, Failure("build", "why"), None, "controller", 0.5)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'studies.db'}"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = Store(url)
    opened.create("s", {"seed": 1})
    yield opened
    opened.close()


def test_trials_and_checkpoint_survive_reopening(store: Store, url: str) -> None:
    for trial in (FAILED, DONE):
        store.add("s", trial)
    store.save_checkpoint("s", Checkpoint(1, {"a": 1}, b"x"))
    store.save_checkpoint("s", Checkpoint(2, {"a": 2}, b"y"))
    store.close()
    again = Store(url)
    assert again.trials("s") == (DONE, FAILED)
    assert again.checkpoint("s") == Checkpoint(2, {"a": 2}, b"y")
    assert again.settings("s") == {"seed": 1}
    assert again.studies() == ("s",)
    again.close()


def test_measurements_serve_other_studies_and_failures_do_not(store: Store, url: str) -> None:
    store.create("other", {})
    store.add("s", DONE, key="k")
    store.add("s", FAILED, key="f")
    store.add("other", DONE, key="k")
    store.add("other", FAILED)
    assert store.measurement("f") is None
    assert store.measurement("") is None
    store.close()
    again = Store(url)
    assert again.measurement("k") == DONE.outcome
    again.close()


def test_a_database_from_before_measurements_gets_their_table(store: Store, url: str) -> None:
    store.add("s", DONE)
    store.close()
    with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
        connection.execute("DROP TABLE measurements")
    connection.close()
    again = Store(url)
    assert again.trials("s") == (DONE,)
    assert again.measurement("k") is None
    again.add("s", FAILED, key="k")
    again.close()


def test_a_trial_number_is_given_once(store: Store) -> None:
    store.add("s", DONE)
    with pytest.raises(StoreError, match="could not be read or written"):
        store.add("s", DONE)


def test_names_are_checked(store: Store) -> None:
    with pytest.raises(StoreError, match="already"):
        store.create("s", {})
    with pytest.raises(StoreError, match="has no study 'other'; it has 's'"):
        store.trials("other")
    assert store.checkpoint("s") is None


def test_foreign_and_damaged_databases_are_refused(store: Store, url: str, tmp_path: Path) -> None:
    store.close()
    path = Path(url.removeprefix("sqlite:///"))
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE grainwise_schema SET version = 99")
    connection.close()
    with pytest.raises(StoreError, match="another version"):
        Store(url)
    (tmp_path / "junk.db").write_bytes(b"junk" * 1000)
    with pytest.raises(StoreError, match="cannot be opened"):
        Store(f"sqlite:///{tmp_path / 'junk.db'}")
    with pytest.raises(StoreError, match="cannot be opened"):
        Store("sqlite:////no/such/directory/x.db")


def test_the_file_is_durable_and_holds_no_pickle(store: Store, url: str) -> None:
    store.add("s", DONE)
    with store._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
    store.close()
    assert b"\x80\x04\x95" not in Path(url.removeprefix("sqlite:///")).read_bytes()
