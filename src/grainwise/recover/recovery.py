"""Recovery: a deployed candidate is trained to compute what the uncompressed network does, epoch by epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grainwise.graph.forward import Forward
from grainwise.graph.skeleton import Skeleton
from grainwise.interrupt import StopFlag, Stopped, stop_flag
from grainwise.realise.deploy import set_ranges
from grainwise.realise.reference import fingerprint
from grainwise.recover.batches import TrainingBatches
from grainwise.recover.checkpoint import Checkpoint, part
from grainwise.recover.errors import RecoveryError
from grainwise.recover.options import STANDARD, RecoverOptions, TrainingBudget, learning_rate
from grainwise.recover.step import Distillation, NotFinite, Student, train_step
from grainwise.study.measurement import Measurement

PROBE = 8  # steps that are timed before minutes become a number of steps

Score = Callable[[nn.Module], Measurement]
"""A deployed candidate -> its measurement on the search split."""

Watch = Callable[[int, int, str], None]
"""(steps done, steps in all or 0 while that is not known, what to say of it)."""


@dataclass(frozen=True)
class Trainee:
    """What is recovered. student: on a network of the caller's own, which is written to. skeleton: that the network is
    a candidate of, None for the packed target. calibration: batches of inputs that 8-bit ranges are set on.
    """

    student: Student
    forward: Forward
    skeleton: Skeleton | None
    calibration: Sequence[Any]

    def settle(self) -> None:
        """Make the network what the shadows say, with ranges set anew: what can be deployed."""
        self.student.store()
        if self.skeleton is not None:
            set_ranges(self.student.network, self.skeleton, self.calibration, self.forward)


@dataclass
class Progress:
    """Where a run stands: batches done of the present epoch, steps in all, seconds of training. total: steps of the
    whole run, None while that is not known. last: SHA-256 of the last batch. losses: of every step. scores: measured
    after each epoch, first of all at the start. best: number of the score that is to be kept.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    total: int | None = None
    seconds: float = 0.0
    last: str | None = None
    losses: list[float] = field(default_factory=list)
    scores: list[dict[str, float]] = field(default_factory=list)
    best: int = 0


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a recovery gave: the figures of the network that was kept are `scores[best]`; 0 is the start."""

    losses: tuple[float, ...]
    scores: tuple[dict[str, float], ...]
    best: int
    epochs: int
    seconds: float

    def figures(self) -> dict[str, float]:
        """For the artefact's manifest."""
        first = self.scores[0]
        return {
            "recovery_epochs": float(self.epochs),
            "recovery_best_epoch": float(self.best),
            "recovery_minutes": self.seconds / 60,
            "unrecovered_search_accuracy": first["metric"],
            "unrecovered_divergence": first["divergence"],
        }


def recover(
    candidate: Trainee,
    loss: Distillation,
    batches: TrainingBatches,
    score: Score,
    *,
    budget: TrainingBudget,
    options: RecoverOptions = STANDARD,
    folder: Path | None = None,
    resume: bool = False,
    watch: Watch = lambda done, total, note: None,
) -> Recovered:
    """Train the candidate's network, and leave it in the state of lowest divergence on the search split: after an
    epoch, or as it was.

    folder: where a checkpoint is kept while it runs. resume: go on from it, to the same losses as an uncut run.

    Raises RecoveryError (a loss that is not finite, training data that run dry, a checkpoint that does not fit or
    cannot be written), DataError (a sample of another split), or Stopped after Ctrl-C or SIGTERM, with a checkpoint
    that is up to date. What the folder held last stays.
    """
    run = _Run(candidate, loss, batches, score, budget, options, folder, watch)
    if resume:
        run.restore()
    elif folder is not None and Checkpoint.exists(folder):
        raise RecoveryError(f"{folder} has a checkpoint of a recovery that was cut: resume it, or delete it")
    with stop_flag() as flag:
        run.train(flag)
    return run.finish()


class _Run:
    def __init__(
        self,
        candidate: Trainee,
        loss: Distillation,
        batches: TrainingBatches,
        score: Score,
        budget: TrainingBudget,
        options: RecoverOptions,
        folder: Path | None,
        watch: Watch,
    ) -> None:
        self._candidate, self._loss, self._batches, self._score = candidate, loss, batches, score
        self._budget, self._options, self._folder, self._watch = budget, options, folder, watch
        self._network, student = candidate.student.network, candidate.student
        self._changes = dict(student.named_parameters())
        self._optimiser = torch.optim.Adam(self._changes.values(), lr=options.learning_rate)
        total = None if budget.epochs is None else budget.epochs * batches.per_epoch
        self._at = Progress(total=total)
        self._settings = {
            "start": fingerprint(self._network),
            "options": asdict(options) | {"checkpoint_seconds": None},
            "budget": asdict(budget),
            "batches": batches.per_epoch,
        }
        self._best = _state(self._network)
        self._saved = time.monotonic()

    # -- the algorithm

    def train(self, flag: StopFlag) -> None:
        at = self._at
        if not at.scores:
            self._judge()
        while at.batch or not self._over():  # an epoch that was cut after its last step is still to be judged
            if not self._spent():
                self._epoch(flag)
            at.epoch, at.batch, at.last = at.epoch + 1, 0, None
            self._candidate.settle()
            self._judge()
            self._keep(flag, now=True)

    def _epoch(self, flag: StopFlag) -> None:
        at = self._at
        with closing(self._batches.epoch(at.epoch, at.batch, at.last)) as batches:
            for inputs, digest in batches:
                self._step(inputs, digest)
                self._keep(flag)
                if self._spent():
                    return

    def _step(self, inputs: Any, digest: str) -> None:
        at, begin = self._at, time.monotonic()
        rate = learning_rate(at.step, at.total, self._options)
        try:
            at.losses.append(train_step(self._loss, inputs, self._optimiser, rate))
        except NotFinite as error:
            raise RecoveryError(
                f"{error} at step {at.step + 1} of the recovery: lower the learning rate "
                f"({self._options.learning_rate}) or look for NaN in the training data; what was there is unchanged"
            ) from error
        at.step, at.batch, at.last = at.step + 1, at.batch + 1, digest
        at.seconds += time.monotonic() - begin
        if at.total is None and at.step == PROBE:
            assert self._budget.minutes is not None
            at.total = max(PROBE, round(60 * self._budget.minutes * PROBE / at.seconds))
        self._watch(at.step, at.total or 0, f"loss {at.losses[-1]:.4f}, {self._said()}")

    def _judge(self) -> None:
        """Measure the network; remember it if it is the best so far."""
        at, found = self._at, self._score(self._network)
        at.scores.append({"step": at.step, "divergence": found.divergence, "metric": found.metric})
        if found.divergence < at.scores[at.best]["divergence"]:
            at.best = len(at.scores) - 1
            self._best = _state(self._network)
        self._watch(at.step, at.total or 0, self._said())

    def _said(self) -> str:
        at = self._at
        best = at.scores[at.best]
        return f"epoch {at.epoch}, best divergence {best['divergence']:.4f}, metric {best['metric']:.4f}"

    def _spent(self) -> bool:
        """True when no further step is to be made. Minutes are kept even if steps became slower than they began."""
        at, minutes = self._at, self._budget.minutes
        return (at.total is not None and at.step >= at.total) or (minutes is not None and at.seconds >= 60 * minutes)

    def _over(self) -> bool:
        """True as well when patience is out. It begins at half of the steps: while the learning rate is high the
        divergence swings, and it falls as the rate does.
        """
        at = self._at
        since = max(at.scores[at.best]["step"], (at.total or 0) / 2)
        return self._spent() or sum(score["step"] > since for score in at.scores) >= self._options.patience

    def finish(self) -> Recovered:
        """Leave the network as the best one seen."""
        at = self._at
        self._network.load_state_dict(self._best)
        return Recovered(tuple(at.losses), tuple(at.scores), at.best, at.epoch, at.seconds)

    # -- checkpoints

    def _keep(self, flag: StopFlag, *, now: bool = False) -> None:
        """Save when it is time to; raises Stopped when that was asked for."""
        due = now or flag.stop() or time.monotonic() - self._saved >= self._options.checkpoint_seconds
        if due and self._folder is not None:
            Checkpoint(self._tensors(), {"settings": self._settings, "progress": asdict(self._at)}).save(self._folder)
            self._saved = time.monotonic()
        if flag.stop():
            raise Stopped(f"the recovery was stopped by signal {flag.number} after {self._at.step} steps")

    def _tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {f"change.{name}": value for name, value in self._changes.items()}
        for name, parameter in self._changes.items():
            found |= {f"adam.{part}.{name}": value for part, value in self._optimiser.state[parameter].items()}
        for kind, state in (("network", _state(self._network)), ("best", self._best)):
            found |= {f"{kind}.{name}": value for name, value in state.items()}
        return found

    def restore(self) -> None:
        """Go on where the checkpoint stands. Raises RecoveryError when there is none or it is of another run."""
        if self._folder is None:
            raise RecoveryError("there is no folder to resume from; give the one that the checkpoint is in")
        kept = Checkpoint.load(self._folder)
        for name, value in self._settings.items():
            if kept.facts["settings"].get(name) != value:
                raise RecoveryError(
                    f"the checkpoint in {self._folder} is of another {name}: {kept.facts['settings'].get(name)}, not "
                    f"{value}; delete it to begin anew"
                )
        self._at = Progress(**kept.facts["progress"])
        with torch.no_grad():
            for name, parameter in self._changes.items():
                parameter.copy_(kept.tensors[f"change.{name}"])
                parts = ("step", "exp_avg", "exp_avg_sq")
                if self._at.step:
                    self._optimiser.state[parameter] = {p: kept.tensors[f"adam.{p}.{name}"].clone() for p in parts}
        self._network.load_state_dict(part(kept.tensors, "network."))
        self._best = part(kept.tensors, "best.")


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}
