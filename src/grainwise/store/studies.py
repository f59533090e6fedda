"""Studies and trials in a database by URL; a profile is one JSON column, a checkpoint is one row beside its batch."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, Float, ForeignKey, Integer, LargeBinary, String, UniqueConstraint, create_engine, event
from sqlalchemy.exc import DatabaseError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from grainwise.plan.profile import entries_from_json, entries_to_json
from grainwise.study.measurement import Failure, Measurement
from grainwise.study.trial import Trial

SCHEMA_VERSION = 1


class StoreError(RuntimeError):
    """The store cannot be used; the message names its URL, what is wrong and what to do."""


class _Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON}  # noqa: RUF012  (SQLAlchemy's own declaration)


class _SchemaRow(_Base):
    __tablename__ = "grainwise_schema"
    version: Mapped[int] = mapped_column(Integer, primary_key=True)


class _StudyRow(_Base):
    __tablename__ = "studies"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    settings: Mapped[dict[str, Any]]
    created: Mapped[str] = mapped_column(String(40))


class _TrialRow(_Base):
    __tablename__ = "trials"
    __table_args__ = (UniqueConstraint("study", "number"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    study: Mapped[int] = mapped_column(ForeignKey("studies.id"), index=True)
    number: Mapped[int]
    entries: Mapped[dict[str, Any]]
    outcome: Mapped[dict[str, Any]]
    reward: Mapped[float | None] = mapped_column(Float)
    source: Mapped[str] = mapped_column(String(40))
    seconds: Mapped[float] = mapped_column(Float)


class _MeasurementRow(_Base):
    """Added after version 1 was released: databases of that version get the empty table when they are opened."""

    __tablename__ = "measurements"
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    body: Mapped[dict[str, Any]]


class _CheckpointRow(_Base):
    __tablename__ = "checkpoints"
    study: Mapped[int] = mapped_column(ForeignKey("studies.id"), primary_key=True)
    trials: Mapped[int]
    body: Mapped[dict[str, Any]]
    tensors: Mapped[bytes] = mapped_column(LargeBinary)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """State of a searcher after `trials` trials were told: JSON body and the bytes of a safetensors file."""

    trials: int
    body: dict[str, Any]
    tensors: bytes


def _outcome_to_json(trial: Trial) -> dict[str, Any]:
    if isinstance(trial.outcome, Failure):
        return {"failed": trial.outcome.stage, "reason": trial.outcome.reason}
    return {**trial.outcome.to_json(), "prefix_rewards": list(trial.prefix_rewards)}


def _trial(row: _TrialRow) -> Trial:
    body = dict(row.outcome)
    prefix = tuple(body.pop("prefix_rewards", ()))
    outcome = Failure(body["failed"], body["reason"]) if "failed" in body else Measurement(**body)
    return Trial(row.number, entries_from_json(row.entries), outcome, row.reward, row.source, row.seconds, prefix)


class Store:
    """One database of studies, by SQLAlchemy URL (`sqlite:///grainwise.db`).

    Each write is one transaction that is on the disk when the call returns. create: make the database if there is none.
    Raises StoreError when the database cannot be opened, is of another schema, or is damaged.
    """

    def __init__(self, url: str, *, create: bool = True) -> None:
        self.url = url
        try:
            self._engine = create_engine(url)
            if (
                not create
                and self._engine.dialect.name == "sqlite"
                and not Path(str(self._engine.url.database)).exists()
            ):
                raise StoreError(f"there is no store {url}; give the URL that the search was begun with")
            if self._engine.dialect.name == "sqlite":
                event.listen(self._engine, "connect", _durable)
            _Base.metadata.create_all(self._engine)
            with self._session() as session:
                version = session.get(_SchemaRow, SCHEMA_VERSION)
                if version is None and session.query(_SchemaRow).count():
                    raise StoreError(f"the store {url} was written by another version of grainwise; use that version")
                if version is None:
                    session.add(_SchemaRow(version=SCHEMA_VERSION))
        except SQLAlchemyError as error:
            raise StoreError(f"the store {url} cannot be opened: {_first_line(error)}") from error

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _session(self) -> Iterator[Session]:
        try:
            with Session(self._engine) as session, session.begin():
                yield session
        except DatabaseError as error:
            raise StoreError(f"the store {self.url} could not be read or written: {_first_line(error)}") from error

    def studies(self) -> tuple[str, ...]:
        with self._session() as session:
            return tuple(row.name for row in session.query(_StudyRow).order_by(_StudyRow.id))

    def create(self, name: str, settings: dict[str, Any]) -> None:
        """Raises StoreError when the study exists."""
        with self._session() as session:
            if session.query(_StudyRow).filter_by(name=name).count():
                raise StoreError(f"the store {self.url} has a study {name!r} already; resume it or give another name")
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            session.add(_StudyRow(name=name, settings=settings, created=now))

    def settings(self, name: str) -> dict[str, Any]:
        with self._session() as session:
            return dict(self._study(session, name).settings)

    def add(self, name: str, trial: Trial, *, key: str = "") -> None:
        """key: under which the trial's measurement serves other studies too, if any."""
        with self._session() as session:
            if key and trial.measurement is not None:
                session.merge(_MeasurementRow(key=key, body=trial.measurement.to_json()))
            session.add(
                _TrialRow(
                    study=self._study(session, name).id,
                    number=trial.number,
                    entries=entries_to_json(trial.entries),
                    outcome=_outcome_to_json(trial),
                    reward=trial.reward,
                    source=trial.source,
                    seconds=trial.seconds,
                )
            )

    def measurement(self, key: str) -> Measurement | None:
        """What `add` was given under the key, in any study."""
        with self._session() as session:
            row = session.get(_MeasurementRow, key)
            return None if row is None else Measurement(**row.body)

    def trials(self, name: str) -> tuple[Trial, ...]:
        """All trials of a study, by number."""
        with self._session() as session:
            rows: Sequence[_TrialRow] = (
                session.query(_TrialRow).filter_by(study=self._study(session, name).id).order_by(_TrialRow.number).all()
            )
            return tuple(_trial(row) for row in rows)

    def save_checkpoint(self, name: str, checkpoint: Checkpoint) -> None:
        with self._session() as session:
            session.merge(
                _CheckpointRow(
                    study=self._study(session, name).id,
                    trials=checkpoint.trials,
                    body=checkpoint.body,
                    tensors=checkpoint.tensors,
                )
            )

    def checkpoint(self, name: str) -> Checkpoint | None:
        with self._session() as session:
            row = session.get(_CheckpointRow, self._study(session, name).id)
            return None if row is None else Checkpoint(row.trials, dict(row.body), row.tensors)

    def _study(self, session: Session, name: str) -> _StudyRow:
        row = session.query(_StudyRow).filter_by(name=name).one_or_none()
        if row is None:
            known = ", ".join(repr(r.name) for r in session.query(_StudyRow)) or "none"
            raise StoreError(f"the store {self.url} has no study {name!r}; it has {known}")
        return row


def _durable(connection: Any, _: Any) -> None:
    """Write-ahead log, and every commit forced to the disk."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
