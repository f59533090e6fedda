"""What a recovery is to do, on candidates of the tiny network: learn, resume, and keep what is good."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grainwise.graph.skeleton import skeleton_forward
from grainwise.interrupt import Stopped
from grainwise.methods.storage import PackedWeight
from grainwise.plan.choices import Choice, Entry, Granularity, Method
from grainwise.realise.reference import fingerprint
from grainwise.recover import recovery
from grainwise.recover.checkpoint import NAME, Checkpoint
from grainwise.recover.errors import RecoveryError
from grainwise.recover.options import RecoverOptions
from grainwise.recover.recovery import Recovered
from grainwise.study.measurement import Measurement
from tests.export.candidates import PLANS, quantised
from tests.networks import tiny_training
from tests.recover.candidates import MIXED, Case, outputs_of, score, splits

PLENTY = {
    **PLANS,
    "mixed kinds": MIXED,
    "separable": {"block.0": Entry(Choice(Method.DISTILL, Granularity.LAYER, 0.25), quantised(4))},
    "few channels": {"block.0": Entry(Choice(Method.PRUNE, Granularity.CHANNEL, 0.7))},
}
QUICK = RecoverOptions(learning_rate=0.01, warm_up=4)


@pytest.mark.parametrize("plan", list(PLENTY))
def test_a_whole_network_computes_what_was_trained(plan: str) -> None:
    """Residual sums, points, ghosts, factors, students and folded norms included, with ranges that were set anew."""
    case = Case.of(PLENTY[plan])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for change in case.trainee.student.parameters():
            change.add_(0.1 * torch.randn(change.shape, generator=generator))
    before = outputs_of(case.network)
    case.trainee.settle()
    found = outputs_of(case.network)
    trained = torch.cat([case.trainee.student(batch.inputs) for batch in splits().search])
    torch.testing.assert_close(found, trained, rtol=0, atol=1e-5 * float(found.std()))
    assert (found - before).abs().mean() > 1e-3 * found.std()


@pytest.mark.parametrize("plan", ["mixed kinds", "factorized", "ghost", "separable", "few channels", "bitmask"])
def test_what_compression_lost_is_won_back(plan: str) -> None:
    case = Case.of(PLENTY[plan])
    kept = {name: m.support.clone() for name, m in case.network.named_modules() if _pruned(m)}
    found = case.recover(epochs=6, options=QUICK)
    start, best = found.scores[0]["divergence"], found.scores[found.best]["divergence"]
    assert best < 0.8 * start
    assert sum(found.losses[-4:]) < sum(found.losses[:4])
    assert score(case.network).divergence == best  # what is left is the best one, packed
    assert all(torch.equal(case.network.get_submodule(name).support, support) for name, support in kept.items())


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("granularity", [Granularity.LAYER, Granularity.CHANNEL])
def test_a_channel_that_all_but_vanishes_is_stored_as_trained(bits: int, granularity: Granularity) -> None:
    """Its scale is what keeps the sums of its bias within 32 bits, and follows a range that was set anew."""
    case = Case.of({"stem": Entry(precision=quantised(bits, granularity))}, vanishing=True)
    (stem,) = [shadow for shadow in case.trainee.student.shadows if shadow.path == "stem"]
    with torch.no_grad():
        stem.values.start.mul_(3.0)
        stem.bias.change[3] = 2.0
        for point in case.network.points.children():
            getattr(point, "scale", torch.zeros(())).mul_(20.0)  # as if ranges had been far too wide
    case.network.stem.x_scale.mul_(20.0)
    case.trainee.settle()
    trained = torch.cat([case.trainee.student(batch.inputs) for batch in splits().search])
    found = outputs_of(case.network)
    torch.testing.assert_close(found, trained, rtol=0, atol=1e-5 * float(found.std()))
    unit = case.network.stem.x_scale * case.network.stem.packed.row_scale()
    sums = case.network.stem.bias / unit
    assert float(sums.abs().max()) < 2.0**31 and torch.equal(sums.round() * unit, case.network.stem.bias)


def _pruned(module: object) -> bool:
    return isinstance(module, PackedWeight) and module.support is not None


def test_every_part_is_trained() -> None:
    case = Case.of({**MIXED, "block.0": Entry(Choice(Method.DISTILL, Granularity.CHANNEL, 0.5), quantised(8))})
    paths = {shadow.path for shadow in case.trainee.student.shadows}
    inside = {"down.0", "down.1", "down.2", "block.0.primary", "block.0.cheap"}
    assert paths == {"stem", "block.3", "fc", "block.1", *inside}  # block.1: the norm behind a ghost
    case.recover(epochs=1)
    still = [name for name, change in case.trainee.student.named_parameters() if not change.any()]
    assert still == []


class Loader:
    """Shuffled pictures; at a batch of an epoch, counted over all, it does what a test wants."""

    def __init__(self, at: int = -1, event: str = "") -> None:
        self.at, self.event, self.count = at, event, 0

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Tensor]:
        images = torch.cat([inputs for inputs, _ in tiny_training()])
        for part in torch.randperm(len(images)).split(32):
            self.count += 1
            if self.count == self.at:
                self._happen()
            yield images[part] * (float("nan") if self.count == self.at and self.event == "nan" else 1.0)

    def _happen(self) -> None:
        if self.event == "crash":
            raise OSError("the disk is gone")
        if self.event in ("SIGTERM", "SIGINT"):
            os.kill(os.getpid(), getattr(signal, self.event))


def uncut(epochs: int = 3) -> tuple[Recovered, str]:
    case = Case.of(MIXED)
    return case.recover(Loader(), epochs=epochs, options=QUICK), fingerprint(case.network)


@pytest.mark.parametrize(
    ("event", "at"), [("SIGTERM", 3), ("SIGINT", 6), ("SIGTERM", 4), ("SIGTERM", 12), ("crash", 7)], ids=str
)
def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(event: str, at: int, tmp_path: Path) -> None:
    """In the middle of an epoch, at its end, at the very end, and by an error with a checkpoint some steps old."""
    wanted, network = uncut()
    seconds = 0.0 if event == "crash" else 1000.0
    options = RecoverOptions(learning_rate=0.01, warm_up=4, checkpoint_seconds=seconds)
    with pytest.raises(OSError if event == "crash" else Stopped):
        Case.of(MIXED).recover(Loader(at, event), options=options, folder=tmp_path)
    assert Checkpoint.load(tmp_path).facts["progress"]["step"] == (at - 1 if event == "crash" else at)
    case = Case.of(MIXED)
    torch.manual_seed(77)  # whatever another process has
    found = case.recover(Loader(), options=options, folder=tmp_path, resume=True)
    assert found.losses == pytest.approx(wanted.losses, abs=1e-6) and len(found.losses) == 12
    assert found.scores == wanted.scores and found.best == wanted.best
    assert fingerprint(case.network) == network


def test_the_best_state_outlives_a_cut(tmp_path: Path) -> None:
    """Nothing after the cut is better than what came before it."""
    with pytest.raises(Stopped):
        Case.of(MIXED).recover(Loader(6, "SIGTERM"), options=QUICK, folder=tmp_path)
    kept = Checkpoint.load(tmp_path)
    assert kept.facts["progress"]["best"] == 1
    kept.facts["progress"]["scores"][1]["divergence"] = 0.0
    kept.save(tmp_path)
    case = Case.of(MIXED)
    found = case.recover(Loader(), options=QUICK, folder=tmp_path, resume=True)
    assert found.best == 1 and len(found.scores) == 4
    state = case.network.state_dict()
    wanted = {name.removeprefix("best."): t for name, t in kept.tensors.items() if name.startswith("best.")}
    assert state.keys() == wanted.keys() and all(torch.equal(state[name], value) for name, value in wanted.items())


def test_signals_are_as_they_were_afterwards(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="by signal 15 after 2 steps"):
        Case.of(MIXED).recover(Loader(2, "SIGTERM"))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_loss_that_is_not_a_number_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    options = RecoverOptions(checkpoint_seconds=0.0)
    with pytest.raises(RecoveryError, match=r"the loss is nan at step 7 of the recovery: lower the learning rate"):
        Case.of(MIXED).recover(Loader(7, "nan"), options=options, folder=tmp_path)
    kept = Checkpoint.load(tmp_path)
    assert kept.facts["progress"]["step"] == 6
    assert all(torch.isfinite(t.float()).all() for t in kept.tensors.values())
    found = Case.of(MIXED).recover(Loader(), options=options, folder=tmp_path, resume=True)
    assert len(found.losses) == 12


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        Case.of(MIXED).recover(Loader(2, "SIGTERM"), options=QUICK, folder=tmp_path)
    kept = (tmp_path / NAME).read_bytes()
    others: list[tuple[str, Mapping[str, Any], Any]] = [
        ("start", PLANS["int8"], {"options": QUICK}),
        ("options", MIXED, {}),
        ("budget", MIXED, {"options": QUICK, "epochs": 4}),
        ("batches", MIXED, {"options": QUICK, "train": tiny_training()[:2]}),
    ]
    for name, entries, changed in others:
        with pytest.raises(RecoveryError, match=f"is of another {name}"):
            Case.of(entries).recover(**{"train": Loader(), "folder": tmp_path, "resume": True, **changed})
    with pytest.raises(RecoveryError, match="has a checkpoint of a recovery that was cut"):
        Case.of(MIXED).recover(Loader(), options=QUICK, folder=tmp_path)
    with pytest.raises(RecoveryError, match="no folder to resume from"):
        Case.of(MIXED).recover(Loader(), options=QUICK, resume=True)
    assert (tmp_path / NAME).read_bytes() == kept


def test_the_start_is_kept_where_nothing_is_better() -> None:
    case = Case.of(PLANS["int8"])
    before = fingerprint(case.network)
    found = case.recover(epochs=10, options=RecoverOptions(learning_rate=1.0, warm_up=0, patience=2))
    assert found.best == 0 and found.epochs < 10  # stopped early
    assert fingerprint(case.network) == before


@pytest.mark.parametrize(("better", "epochs"), [((), 7), ((3,), 7), ((3, 6), 8), ((7, 8), 10), ((7, 10), 9)])
def test_patience_begins_at_half_of_the_steps_and_anew_with_each_better_state(
    better: tuple[int, ...], epochs: int
) -> None:
    """Of ten epochs; better: those that lower the divergence."""
    divergences = iter([1.0, *(1 - 0.01 * epoch if epoch in better else 2.0 for epoch in range(1, 11))])
    case = Case.of(PLANS["int8"])
    options = RecoverOptions(patience=2)
    found = case.recover(epochs=10, options=options, measure=lambda network: Measurement(0.5, next(divergences), 1, 1))
    assert found.epochs == epochs


@pytest.mark.parametrize(("after", "best"), [((1.2, 1.0, 1.1), 0), ((1.1, 0.99, 0.995), 2), ((0.5, 0.9, 0.4), 3)])
def test_the_state_of_lowest_divergence_is_kept_the_start_among_them(after: tuple[float, ...], best: int) -> None:
    divergences = iter((1.0, *after))
    case = Case.of(PLANS["int8"])
    found = case.recover(measure=lambda network: Measurement(0.5, next(divergences), 1, 1))
    assert found.best == best and len(found.scores) == 4


def test_minutes_become_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of a second a reading: each step takes one, so a quarter of a minute is 15 steps."""
    now = iter(range(10_000))
    monkeypatch.setattr(recovery.time, "monotonic", lambda: float(next(now)))
    found = Case.of(PLANS["int8"]).recover(epochs=None, minutes=0.25)
    assert len(found.losses) == 15 and found.seconds == 15
    assert found.epochs == 4  # of four batches, the last one cut
    assert found.figures()["recovery_minutes"] == 0.25


def test_the_last_epoch_is_that_of_the_budget() -> None:
    found = Case.of(PLANS["int8"]).recover(epochs=2)
    assert [score["step"] for score in found.scores] == [0, 4, 8] and found.epochs == 2


def test_progress_says_where_it_stands() -> None:
    said: list[tuple[int, int, str]] = []
    Case.of(PLANS["int8"]).recover(epochs=1, watch=lambda *words: said.append(words))
    assert [(done, total) for done, total, _ in said] == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4), (4, 4)]
    assert said[1][2].startswith("loss 0.") and "epoch 0, best divergence" in said[1][2]


def test_the_teacher_is_not_changed() -> None:
    case = Case.of(MIXED)
    before = fingerprint(case.loss.teacher)
    case.recover(epochs=1)
    assert fingerprint(case.loss.teacher) == before
    assert skeleton_forward(case.network, splits().search[0].inputs).isfinite().all()
