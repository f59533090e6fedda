"""Studies and trials in a database by URL; a profile is one JSON column, a checkpoint is one row beside its batch."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from sqlalchemy import CursorResult, Table, bindparam, delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session

from grainwise.store.database import (
    StoreError,
    advice,
    alone,
    connect,
    damage,
    named,
    path_of,
    recovery,
    writing,
)
from grainwise.store.migrations import HEAD, STEPS, ForeignDatabase, migrate, step_of
from grainwise.store.schema import (
    CheckpointRow,
    MeasurementRow,
    Sealed,
    StudyRow,
    TrialRow,
    asked,
    finished,
    kept,
    queued,
)
from grainwise.study.measurement import Measurement
from grainwise.study.trial import State, Task, Trial

__all__ = ["Checkpoint", "Store", "StoreError", "Study", "UnderWay"]

_UNFINISHED = (State.PENDING, State.RUNNING)
_Row = TypeVar("_Row", bound=Sealed)

# Statements of every trial, made once: to put one together takes longer than a database takes to carry it out.
_TRIALS, _MEASUREMENTS = TrialRow.__table__, MeasurementRow.__table__
assert isinstance(_TRIALS, Table) and isinstance(_MEASUREMENTS, Table)
_WAITING = (
    _TRIALS.c.study == bindparam("of"),
    _TRIALS.c.number == bindparam("which"),
    _TRIALS.c.state.in_(_UNFINISHED),
)
_START = update(_TRIALS).where(*_WAITING).values(state=State.RUNNING, worker=bindparam("hand"), started=bindparam("at"))
_FINISH = update(_TRIALS).where(*_WAITING, _TRIALS.c.worker == bindparam("hand"), _TRIALS.c.seal == bindparam("asked"))
_INSERT = insert(_TRIALS)
_KEEP = {
    "sqlite": sqlite.insert(_MEASUREMENTS).on_conflict_do_nothing(),
    "postgresql": postgresql.insert(_MEASUREMENTS).on_conflict_do_nothing(),
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """State of a searcher after `trials` trials were told: JSON body and the bytes of a safetensors file."""

    trials: int
    body: dict[str, Any]
    tensors: bytes


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A trial in a worker's hands. started: seconds since 1970 by that machine's clock."""

    number: int
    worker: str
    started: float


@dataclass(frozen=True, slots=True)
class Study:
    """What a study is without its profiles. created: ISO 8601, UTC. counts: trials by state; running: in hands."""

    name: str
    created: str
    counts: Mapping[State, int]
    running: tuple[UnderWay, ...]


class Store:
    """One database of studies, by SQLAlchemy URL: `sqlite:///grainwise.db`, or `postgresql://user@host/database`.

    Each write is one transaction that is on the disk when the call returns; several processes may use one store, a
    study is searched by one at a time. create: make the database if there is none. upgrade: take one of an older
    version to the present one; without it, it is refused.

    Raises StoreError when the database cannot be opened, is of another version, or is damaged.
    """

    def __init__(self, url: str, *, create: bool = True, upgrade: bool = False) -> None:
        self._engine = connect(url)
        self.url = named(self._engine.url)
        self._ids: dict[str, int] = {}
        with ExitStack() as unopened:
            unopened.callback(self.close)
            try:
                self._open(create, upgrade)
            except ForeignDatabase as error:
                raise StoreError(f"the store {self.url} is none of grainwise's: {error}; give another URL") from error
            except (SQLAlchemyError, ValueError, TypeError, KeyError) as error:
                raise StoreError(f"the store {self.url} cannot be opened: {advice(error, self._engine.url)}") from error
            unopened.pop_all()

    def _open(self, create: bool, upgrade: bool) -> None:
        file = path_of(self._engine.url)
        if not create and file is not None and not file.exists():
            raise StoreError(f"there is no store {self.url}; give the URL that the search was begun with")
        with self._engine.begin() as connection:
            found = step_of(connection)
            if found is not None and (fault := damage(connection)):
                raise self._damaged(fault)
        if found is None and not create:
            raise StoreError(f"the store {self.url} holds no studies; give the URL that the search was begun with")
        if found is None or (found in STEPS[:-1] and upgrade):
            with writing(self._engine).begin() as connection:
                alone(connection)
                if step_of(connection) == found:  # else another process has done it meanwhile
                    migrate(connection)
        elif found in STEPS[:-1]:
            raise StoreError(
                f"the store {self.url} was written by an older grainwise (its tables are at step {found}, these are at "
                f"{HEAD}); take it to this version with: grainwise db upgrade --store {self.url}"
            )
        elif found != HEAD:
            raise StoreError(
                f"the store {self.url} was written by a newer version of grainwise (its tables are at step {found}, "
                f"this one knows {HEAD}): use that version, there is no way back"
            )

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _session(self, *, write: bool = False) -> Iterator[Session]:
        """One transaction; whatever cannot be read or written is a StoreError."""
        try:
            with Session(writing(self._engine) if write else self._engine) as session, session.begin():
                yield session
        except SQLAlchemyError as error:
            reason = advice(error, self._engine.url)
            raise StoreError(f"the store {self.url} could not be read or written: {reason}") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:  # not what its table says
            raise self._damaged(advice(error, self._engine.url)) from error

    def _damaged(self, fault: str) -> StoreError:
        return StoreError(f"the store {self.url} is damaged ({fault}); {recovery(self._engine.url)}")

    def _checked(self, row: _Row) -> _Row:
        """The row, as it was written."""
        if row.seal != row.sealed():
            raise self._damaged(f"a row of {row.__tablename__} is not as it was written")
        return row

    def studies(self) -> tuple[str, ...]:
        with self._session() as session:
            return tuple(session.scalars(select(StudyRow.name).order_by(StudyRow.id)))

    def create(self, name: str, settings: Mapping[str, Any]) -> None:
        """Raises StoreError when the study exists."""
        with self._session(write=True) as session:
            if session.scalar(select(StudyRow.id).filter_by(name=name)) is not None:
                raise StoreError(f"the store {self.url} has a study {name!r} already; resume it or give another name")
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            row = StudyRow(name=name, settings=dict(settings), created=now)
            row.seal = row.sealed()
            session.add(row)

    def settings(self, name: str) -> dict[str, Any]:
        with self._session() as session:
            return dict(self._study(session, name).settings)

    def study(self, name: str) -> Study:
        """How far a study is, without reading its profiles."""
        with self._session() as session:
            row = self._study(session, name)
            counted = select(TrialRow.state, func.count()).filter_by(study=row.id).group_by(TrialRow.state)
            counts = Counter({State(state): count for state, count in session.execute(counted)})
            columns = select(TrialRow.number, TrialRow.worker, TrialRow.started).order_by(TrialRow.number)
            running = session.execute(columns.filter_by(study=row.id, state=State.RUNNING))
            hands = tuple(UnderWay(number, worker or "", started or 0.0) for number, worker, started in running)
            return Study(row.name, row.created, counts, hands)

    def queue(self, name: str, tasks: Iterable[Task]) -> None:
        """The trials to be, in place of all that were not finished: another process that still works on one of those
        will not be able to `add` it.
        """
        with self._session(write=True) as session:
            study = self._id(session, name)
            session.execute(delete(TrialRow).where(TrialRow.study == study, TrialRow.state.in_(_UNFINISHED)))
            if rows := [queued(study, task) for task in tasks]:
                session.execute(insert(TrialRow), rows)

    def start(self, name: str, hands: Mapping[int, str], started: float) -> None:
        """Queued trials, by number, go into the hands of workers. Raises StoreError when one is not in the queue (any
        more); then none has changed hands.
        """
        with self._session(write=True) as session:
            study = self._id(session, name)
            for number, worker in hands.items():
                row = {"of": study, "which": number, "hand": worker, "at": started}
                if not _changed(session.connection().execute(_START, row)):
                    raise self._taken(name, number)

    def add(self, name: str, *trials: Trial, keys: Mapping[int, str] = MappingProxyType({})) -> None:
        """Finished trials, all or none. keys: under which a trial's measurement serves other studies too, by number.

        Raises StoreError when one of them is finished already, or was given to another worker since.
        """
        with self._session(write=True) as session:
            study, connection = self._id(session, name), session.connection()
            measured = {
                keys[t.number]: t.measurement for t in trials if t.measurement is not None and keys.get(t.number)
            }
            if measured:
                rows = [kept(key, measurement) for key, measurement in measured.items()]
                connection.execute(_KEEP[connection.dialect.name], rows)
            for trial in trials:
                columns = finished(study, trial)
                row = {"of": study, "which": trial.number, "hand": trial.worker, "asked": asked(trial.entries)}
                if _changed(connection.execute(_FINISH.values(columns), row)):
                    continue
                try:
                    connection.execute(_INSERT, columns)  # of no queue
                except IntegrityError as error:
                    raise self._taken(name, trial.number) from error

    def _taken(self, name: str, number: int) -> StoreError:
        return StoreError(
            f"trial {number} of study {name!r} in the store {self.url} is in other hands or finished: another process "
            "searches this study; let one do so at a time, then resume"
        )

    def measurement(self, key: str) -> Measurement | None:
        """What `add` was given under the key, in any study."""
        with self._session() as session:
            row = session.get(MeasurementRow, key)
            return None if row is None else Measurement(**self._checked(row).body)

    def trials(self, name: str) -> tuple[Trial, ...]:
        """All finished trials of a study, by number."""
        with self._session() as session:
            study = self._study(session, name).id
            ended = select(TrialRow).where(TrialRow.study == study, TrialRow.state.not_in(_UNFINISHED))
            trials = [self._checked(row).trial() for row in session.scalars(ended.order_by(TrialRow.number))]
            told = session.scalar(select(CheckpointRow.trials).filter_by(study=study)) or 0
            if [trial.number for trial in trials[:told]] != list(range(told)):
                raise self._damaged(f"study {name!r} has lost some of its first {told} trials")
            return tuple(trials)

    def save_checkpoint(self, name: str, checkpoint: Checkpoint) -> None:
        with self._session(write=True) as session:
            row = CheckpointRow(
                study=self._id(session, name),
                trials=checkpoint.trials,
                body=checkpoint.body,
                tensors=checkpoint.tensors,
            )
            row.seal = row.sealed()
            session.merge(row)

    def checkpoint(self, name: str) -> Checkpoint | None:
        with self._session() as session:
            row = session.get(CheckpointRow, self._id(session, name))
            return None if row is None else Checkpoint(self._checked(row).trials, dict(row.body), row.tensors)

    def _id(self, session: Session, name: str) -> int:
        """Of a study, without reading its settings; it stays the same, so it is asked for once."""
        if name in self._ids:
            return self._ids[name]
        found = session.scalar(select(StudyRow.id).filter_by(name=name))
        if found is None:
            known = ", ".join(map(repr, session.scalars(select(StudyRow.name).order_by(StudyRow.id)))) or "none"
            raise StoreError(f"the store {self.url} has no study {name!r}; it has {known}")
        self._ids[name] = found
        return found

    def _study(self, session: Session, name: str) -> StudyRow:
        return self._checked(session.get_one(StudyRow, self._id(session, name)))


def _changed(done: CursorResult[Any]) -> bool:
    return done.rowcount > 0
