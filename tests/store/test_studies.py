"""The store on SQLite, and what only SQLite does."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from grainwise.store.migrations import HEAD
from grainwise.store.studies import Checkpoint, Store, StoreError
from grainwise.study.measurement import Failure
from grainwise.study.trial import State, best
from tests.store.store_contract import DONE, ENTRIES, StoreContract

OLD = Path(__file__).parent / "databases"


def old_database(path: Path, *statements: str) -> str:
    """A database as version 0.1 wrote it, changed by the statements; its URL."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript((OLD / "0001.sql").read_text(encoding="utf-8"))
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return f"sqlite:///{path}"


class TestSqlite(StoreContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path / 'studies.db'}"

    def test_the_file_is_durable_and_holds_no_pickle(self, store: Store, url: str) -> None:
        store.add("s", DONE)
        with store._engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        store.close()
        assert b"\x80\x04\x95" not in Path(url.removeprefix("sqlite:///")).read_bytes()


def test_an_older_database_is_refused_and_upgraded_when_asked(tmp_path: Path) -> None:
    url = old_database(tmp_path / "old.db")
    with pytest.raises(StoreError, match="older grainwise .* step 0001.*grainwise db upgrade --store sqlite"):
        Store(url)
    store = Store(url, create=False, upgrade=True)
    assert store.studies() == ("tiny", "other")
    assert store.study("tiny").counts == {State.DONE: 6}
    assert store.study("other").counts == {State.DONE: 1, State.FAILED: 1}
    tiny, other = store.trials("tiny"), store.trials("other")
    leader = best(tiny, store.settings("tiny")["budgets"])
    assert leader is not None and leader.measurement is not None
    assert (leader.number, leader.measurement.divergence) == (5, 0.020738039672208147)
    assert (other[0].prefix_rewards, other[0].reward, other[0].policy, other[0].worker) == ((0.2, 0.9), 0.9, None, None)
    assert other[1].outcome == Failure("build", "why")
    assert store.checkpoint("other") == Checkpoint(2, {"a": 2}, b"y")
    found = store.checkpoint("tiny")
    assert found is not None and found.trials == 6
    assert store.measurement("k") == DONE.measurement
    store.add("other", DONE.__class__(2, ENTRIES, DONE.outcome, 0.5, "random", 0.1))
    store.close()
    with closing(sqlite3.connect(tmp_path / "old.db")) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(HEAD,)]
        # what version 0.1 asks: is my number there? else: is there another one?
        assert connection.execute("SELECT version FROM grainwise_schema").fetchall() == [(2,)]
    Store(url).close()
    Store(url, upgrade=True).close()


def test_a_database_from_before_measurements_is_upgraded(tmp_path: Path) -> None:
    store = Store(old_database(tmp_path / "old.db", "DROP TABLE measurements"), upgrade=True)
    assert store.measurement("k") is None
    assert len(store.trials("tiny")) == 6
    store.close()


def test_an_upgrade_that_is_cut_leaves_the_old_database(tmp_path: Path) -> None:
    url = old_database(tmp_path / "old.db", "UPDATE trials SET outcome = '[' WHERE number = 5")
    before = _dump(tmp_path / "old.db")
    with pytest.raises(StoreError, match="cannot be opened"):
        Store(url, upgrade=True)
    assert _dump(tmp_path / "old.db") == before


def _dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


def test_what_is_no_store_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "junk.db").write_bytes(b"junk" * 1000)
    with closing(sqlite3.connect(tmp_path / "foreign.db")) as connection:
        connection.execute("CREATE TABLE trials (id INTEGER)")
    (tmp_path / "empty.db").touch()
    refused = {
        f"sqlite:///{tmp_path / 'junk.db'}": "cannot be opened: .*not a database",
        f"sqlite:///{tmp_path / 'foreign.db'}": "none of grainwise's",
        f"sqlite:///{tmp_path / 'empty.db'}": "holds no studies",
        f"sqlite:///{tmp_path / 'absent.db'}": "there is no store",
        "sqlite:////no/such/directory/x.db": "there is no store",
        "mysql://localhost/x": "of no kind that grainwise knows",
        "studies.db": "is no URL",
    }
    for url, message in refused.items():
        with pytest.raises(StoreError, match=message) as caught:
            Store(url, create=False)
        assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match="cannot be opened"):
        Store("sqlite:////no/such/directory/x.db")


def test_a_password_is_not_told() -> None:
    with pytest.raises(StoreError) as caught:
        Store("postgresql://me:secret@127.0.0.1:1/x")
    assert "secret" not in str(caught.value) and "127.0.0.1" in str(caught.value)
