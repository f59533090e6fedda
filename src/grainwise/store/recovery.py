"""What can still be read of a damaged SQLite store, copied into a new one."""

from __future__ import annotations

import json
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from grainwise.store.database import StoreError, connect, path_of
from grainwise.store.schema import CheckpointRow, StudyRow, TrialRow
from grainwise.store.studies import Checkpoint, Store
from grainwise.study.trial import State

_UNREADABLE = (sqlite3.DatabaseError, UnicodeDecodeError)  # the second: of a message that quotes a damaged schema
_JSON = ("settings", "entries", "outcome", "body")
_LAST = 2**40  # rows are numbered from 1
_TRIES = 4_000  # of ranges that cannot be read to their end


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was copied, and how many rows were found that are not as they were written. unreadable: rows of which not
    even that could be found out are counted nowhere.
    """

    studies: int
    trials: int
    checkpoints: int
    refused: int


def recover(url: str, out: str) -> Recovered:
    """Copy every study, finished trial and checkpoint that is as it was written into the new store `out`.

    A checkpoint goes with its study only when all trials that it was told of are there; without, a search that goes on
    begins with its first batch again, and takes the trials that are stored as they are.

    Raises StoreError when `url` is no SQLite file, nothing of it can be read, or `out` is there already.
    """
    source, target = _file(url), _file(out)
    if not source.exists():
        raise StoreError(f"there is no store {url}; give the URL of the damaged one")
    if target.exists():
        raise StoreError(f"the store {out} is there already; give a new one to recover into")
    with closing(sqlite3.connect(f"file:{quote(str(source))}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        connection.text_factory = lambda content: content.decode(errors="replace")
        studies = list(_rows(connection, "studies"))
        trials, checkpoints = list(_rows(connection, "trials")), list(_rows(connection, "checkpoints"))
    if not studies:
        raise StoreError(f"nothing of the store {url} can be read; the program sqlite3 may read more (its .recover)")
    if "seal" not in studies[0]:
        raise StoreError(
            f"the store {url} is of version 0.1, whose rows have no seals: take out of it what the program sqlite3 can "
            "read (its .recover), then upgrade that"
        )
    with closing(Store(out)) as store:
        return _copy(store, studies, trials, checkpoints)


def _copy(store: Store, studies: list[Any], trials: list[Any], checkpoints: list[Any]) -> Recovered:
    done = {"studies": 0, "trials": 0, "checkpoints": 0}
    for body in studies:
        study = _as_written(StudyRow, body)
        if study is None or study.name in store.studies():
            continue
        store.create(study.name, study.settings)
        done["studies"] += 1
        kept = set()
        for row in (_as_written(TrialRow, found) for found in trials if found.get("study") == study.id):
            if row is not None and row.number not in kept and row.state in (State.DONE, State.FAILED):
                store.add(study.name, row.trial())
                kept.add(row.number)
        done["trials"] += len(kept)
        for point in (_as_written(CheckpointRow, found) for found in checkpoints if found.get("study") == study.id):
            if point is not None and kept >= set(range(point.trials)):
                store.save_checkpoint(study.name, Checkpoint(point.trials, point.body, point.tensors))
                done["checkpoints"] += 1
    finished = [row for row in trials if row.get("state") not in (State.PENDING, State.RUNNING)]
    found = len(studies) + len(finished) + len(checkpoints)
    return Recovered(**done, refused=found - sum(done.values()))


def _file(url: str) -> Path:
    engine = connect(url)
    engine.dispose()
    file = path_of(engine.url)
    if file is None:
        raise StoreError(f"{url} is no file of SQLite: a server is recovered with the means of its makers")
    return file


def _as_written(kind: Callable[..., Any], body: Mapping[str, Any]) -> Any:
    """The row, or None when it is not as it was written."""
    try:
        row = kind(**{name: json.loads(v) if name in _JSON and v is not None else v for name, v in body.items()})
        return row if row.seal == row.sealed() else None
    except (ValueError, TypeError, AttributeError):
        return None


def _rows(connection: sqlite3.Connection, table: str) -> Iterator[dict[str, Any]]:
    """The rows of a table that can be read: from the front to the first page that cannot, from the back to the last
    one, and so on between them, by halves.
    """
    waiting = deque([(0, _LAST)])
    for _ in range(_TRIES):
        if not waiting:
            return
        low, high = waiting.popleft()
        last, first = low - 1, high + 1
        try:
            for row in _between(connection, table, low, high, "ASC"):
                last = row["rowid_"]
                yield _plain(row)
            continue
        except _UNREADABLE:
            pass
        with suppress(*_UNREADABLE):
            for row in _between(connection, table, last + 1, high, "DESC"):
                first = row["rowid_"]
                yield _plain(row)
        if last + 1 < first - 1:
            middle = (last + first) // 2
            waiting += [(last + 1, middle), (middle + 1, first - 1)]


def _between(connection: sqlite3.Connection, table: str, low: int, high: int, order: str) -> Iterator[sqlite3.Row]:
    query = f"SELECT rowid AS rowid_, * FROM {table} NOT INDEXED WHERE rowid BETWEEN ? AND ? ORDER BY rowid {order}"  # noqa: S608  (names of ours)
    return connection.execute(query, (low, high))


def _plain(row: sqlite3.Row) -> dict[str, Any]:
    return {name: row[name] for name in row.keys() if name != "rowid_"}
