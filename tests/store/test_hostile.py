"""A database written by an attacker, who knows how seals are made: nothing of it is imported or unpickled, and every
reading ends in an answer or in one sentence.
"""

from __future__ import annotations

import json
import pickle
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from grainwise.api import SearchOptions
from grainwise.report.studies import status
from grainwise.search import driver
from grainwise.search.baselines import RandomSearcher
from grainwise.session import Session
from grainwise.store.schema import StudyRow, TrialRow
from grainwise.store.studies import Checkpoint, Store
from tests.store.store_contract import DONE

EVIL = "grainwise_canary:run"
watched: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class" or (event == "import" and str(arguments[0]).startswith("grainwise_canary")):
        watched.append(f"{event} {arguments}")


sys.addaudithook(_watch)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return __import__, ("grainwise_canary",)


@pytest.fixture(autouse=True)
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "grainwise_canary.py").write_text("def run(*a, **k): raise SystemExit('it ran')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    watched.clear()
    yield
    found = [*watched]
    assert "grainwise_canary" not in sys.modules and not found, found


OPTIONS = {**SearchOptions().to_json()}
SETTINGS = {"options": OPTIONS, "budgets": {}, "model": EVIL, "data": EVIL, "target": "packed", "constraints": {}}
DEEP = "[" * 200_000 + "]" * 200_000

ATTACKS: dict[str, dict[str, Any]] = {
    "reward": {"settings": {**SETTINGS, "options": {**OPTIONS, "reward": EVIL}}},
    "searcher": {"settings": {**SETTINGS, "options": {**OPTIONS, "searcher": EVIL}}},
    "settings that are no object": {"settings": [EVIL]},
    "pickled checkpoint": {"tensors": pickle.dumps(Bomb())},
    "checkpoint of an absurd size": {"tensors": (2**60).to_bytes(8, "little") + b"{}"},
    "checkpoint of another searcher": {"body": {"__reduce__": EVIL}},
    "entries": {"entries": {"a": {"structure": {"method": EVIL, "granularity": "layer", "level": 1e308}}}},
    "entries that are no object": {"entries": EVIL},
    "outcome": {"outcome": {"metric": EVIL, "divergence": 0.1, "size_bytes": 10, "macs": 20}},
    "outcome of other names": {"outcome": {"__class__": EVIL}},
    "deep JSON": {"raw": DEEP},
    "endless number": {"raw": '{"a": 1e99999}'},
    "wrong seal": {"seal": "0" * 64},
}


def attack(path: Path, change: dict[str, Any]) -> None:
    store = Store(f"sqlite:///{path}")
    store.create("s", change.get("settings", SETTINGS) if isinstance(change.get("settings", {}), dict) else {})
    store.add("s", DONE, keys={0: "k"})
    store.save_checkpoint("s", Checkpoint(1, change.get("body", {"a": 1}), change.get("tensors", b"")))
    store.close()
    with closing(sqlite3.connect(path)) as connection:
        if isinstance(change.get("settings"), list):
            row = connection.execute("SELECT name, created FROM studies").fetchone()
            seal = StudyRow(name=row[0], settings=change["settings"], created=row[1]).sealed()
            connection.execute("UPDATE studies SET settings = ?, seal = ?", (json.dumps(change["settings"]), seal))
        for column in ("entries", "outcome"):
            if column in change:
                values = dict(
                    study=1,
                    number=0,
                    state="done",
                    source=DONE.source,
                    policy=0,
                    worker=DONE.worker,
                    reward=DONE.reward,
                )
                text = connection.execute("SELECT entries, outcome FROM trials").fetchone()
                values |= {"entries": json.loads(text[0]), "outcome": json.loads(text[1]), column: change[column]}
                seal = TrialRow(**values, seconds=DONE.seconds, started=DONE.started).sealed()
                connection.execute(f"UPDATE trials SET {column} = ?, seal = ?", (json.dumps(change[column]), seal))
        if "raw" in change:
            for table, column in (("studies", "settings"), ("trials", "entries"), ("checkpoints", "body")):
                connection.execute(f"UPDATE {table} SET {column} = ?", (change["raw"],))
        if "seal" in change:
            for table in ("studies", "trials", "checkpoints", "measurements"):
                connection.execute(f"UPDATE {table} SET seal = ?", (change["seal"],))
        connection.commit()


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_of_a_hostile_database_is_imported_or_unpickled(name: str, tmp_path: Path, session: Session) -> None:
    attack(tmp_path / "s.db", ATTACKS[name])
    store = Store(f"sqlite:///{tmp_path / 's.db'}", create=False)
    searcher = RandomSearcher(session.projection(session.budgets({"size": 0.4})), seed=0)
    readings: dict[str, Callable[[], Any]] = {
        "studies": store.studies,
        "study": lambda: store.study("s"),
        "trials": lambda: store.trials("s"),
        "status": lambda: status(store, "s"),
        "resume": lambda: SearchOptions.from_json(store.settings("s")["options"]),
        "restore": lambda: driver._restore(searcher, store, "s"),
        "measurement": lambda: store.measurement("k"),
    }
    refused = 0
    for read in readings.values():
        try:
            read()
        except (ValueError, RuntimeError) as error:  # what the command line tells in one sentence
            assert not isinstance(error, RecursionError) and "\n" not in str(error)[:200]
            refused += 1
    store.close()
    assert refused or name in ("settings that are no object",), name


def test_the_watch_sees_a_bomb(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        pickle.loads(pickle.dumps(Bomb()))
        assert not watched
    sys.modules.pop("grainwise_canary", None)
    watched.clear()


def test_sealed_rows_are_sealed_by_the_attacker_too(tmp_path: Path) -> None:
    """Else the attacks would be refused for their seals alone."""
    attack(tmp_path / "s.db", {"outcome": {**DONE.outcome.to_json(), "metric": 0.25}})  # type: ignore[union-attr]
    store = Store(f"sqlite:///{tmp_path / 's.db'}")
    assert store.trials("s")[0].measurement is not None and store.trials("s")[0].measurement.metric == 0.25
    store.close()
