"""The tables of a store as the present code reads and writes them; `migrations` makes them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from sqlalchemy import JSON, Double, ForeignKey, LargeBinary, String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from grainwise.plan.choices import Entry, numbers_of
from grainwise.plan.profile import entries_from_json, entries_to_json
from grainwise.store.seal import seal
from grainwise.study.measurement import Failure, Measurement
from grainwise.study.trial import State, Task, Trial


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON(none_as_null=True), float: Double}  # noqa: RUF012  (SQLAlchemy's own)


class StudyRow(Base):
    """settings: what the study is a search of. created: date and time in UTC, ISO 8601."""

    __tablename__ = "studies"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    settings: Mapped[dict[str, Any]]
    created: Mapped[str] = mapped_column(String(40))
    seal: Mapped[str] = mapped_column(String(64))

    def sealed(self) -> str:
        return seal([self.name, self.settings, self.created])


class TrialRow(Base):
    """One profile, in one JSON column, and what it gave. Until a trial is finished it has no profile, which would be
    written three times over, and its seal is that of the profile that was asked for.
    """

    __tablename__ = "trials"
    __table_args__ = (UniqueConstraint("study", "number"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    study: Mapped[int] = mapped_column(ForeignKey("studies.id"))
    number: Mapped[int]
    state: Mapped[str] = mapped_column(String(10))
    entries: Mapped[dict[str, Any]]
    outcome: Mapped[dict[str, Any] | None]
    reward: Mapped[float | None]
    source: Mapped[str] = mapped_column(String(40))
    seconds: Mapped[float | None]
    policy: Mapped[int | None]
    worker: Mapped[str | None] = mapped_column(String(200))
    started: Mapped[float | None]
    seal: Mapped[str | None] = mapped_column(String(64))

    def sealed(self) -> str:
        facts = [self.study, self.number, str(self.state), self.source, self.policy, self.worker]
        return seal([*facts, self.entries, self.outcome, self.reward, self.seconds, self.started])

    def trial(self) -> Trial:
        """The finished trial of this row."""
        body = dict(self.outcome or {})
        prefix = tuple(body.pop("prefix_rewards", ()))
        outcome = Failure(body["failed"], body["reason"]) if "failed" in body else Measurement(**body)
        return Trial(
            self.number,
            entries_from_json(self.entries),
            outcome,
            self.reward,
            self.source,
            self.seconds or 0.0,
            prefix,
            self.policy,
            self.worker,
            self.started,
        )


class MeasurementRow(Base):
    """What a profile gave, for all studies whose key is the same."""

    __tablename__ = "measurements"
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    body: Mapped[dict[str, Any]]
    seal: Mapped[str] = mapped_column(String(64))

    def sealed(self) -> str:
        return seal([self.key, self.body])


class CheckpointRow(Base):
    """The state of a study's searcher after its last whole batch: JSON and the bytes of a safetensors file."""

    __tablename__ = "checkpoints"
    study: Mapped[int] = mapped_column(ForeignKey("studies.id"), primary_key=True)
    trials: Mapped[int]
    body: Mapped[dict[str, Any]]
    tensors: Mapped[bytes] = mapped_column(LargeBinary)
    seal: Mapped[str] = mapped_column(String(64))

    def sealed(self) -> str:
        return seal([self.study, self.trials, self.body, hashlib.sha256(self.tensors).hexdigest()])


def asked(entries: Mapping[str, Entry]) -> str:
    """The seal of a profile that was asked for: of action numbers, since many workers wait while a batch is queued."""
    return seal({name: found for name, entry in entries.items() if (found := numbers_of(entry)) != (0, 0)})


def queued(study: int, task: Task) -> dict[str, Any]:
    """The columns of a trial that is to be."""
    known = {"entries": {}, "source": task.source, "policy": task.policy, "seal": asked(task.entries)}
    return {"study": study, "number": task.number, "state": State.PENDING, **known}


def finished(study: int, trial: Trial) -> dict[str, Any]:
    """The columns of a trial that has ended. Raises ValueError for a figure that is not finite."""
    columns = {
        "study": study,
        "number": trial.number,
        "state": State.FAILED if isinstance(trial.outcome, Failure) else State.DONE,
        "entries": entries_to_json(trial.entries),
        "outcome": _outcome_to_json(trial),
        "reward": trial.reward,
        "source": trial.source,
        "seconds": trial.seconds,
        "policy": trial.policy,
        "worker": trial.worker,
        "started": trial.started,
    }
    return {**columns, "seal": TrialRow(**columns).sealed()}


def kept(key: str, measurement: Measurement) -> dict[str, Any]:
    """The columns of a measurement for other studies."""
    row = MeasurementRow(key=key, body=measurement.to_json())
    return {"key": key, "body": row.body, "seal": row.sealed()}


Sealed = StudyRow | TrialRow | MeasurementRow | CheckpointRow


def _outcome_to_json(trial: Trial) -> dict[str, Any]:
    if isinstance(trial.outcome, Failure):
        return {"failed": trial.outcome.stage, "reason": trial.outcome.reason}
    return {**trial.outcome.to_json(), "prefix_rewards": list(trial.prefix_rewards)}
