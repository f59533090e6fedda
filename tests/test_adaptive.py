"""Adaptive compression in loops of the user's own, on the tiny network."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import grainwise as gw
from grainwise.adaptive import PICTURE, PROFILE
from grainwise.decision import Decider
from grainwise.evaluate.evaluator import Evaluator
from grainwise.plan.choices import Choice, Entry, Granularity, Method
from grainwise.plan.profile import CompressionProfile
from grainwise.plan.projection import Unreachable
from grainwise.realise.library import VariantLibrary
from grainwise.realise.reference import fingerprint
from grainwise.recover.checkpoint import Checkpoint
from grainwise.recover.errors import RecoveryError
from grainwise.recover.forms import Dress
from tests.networks import tiny, tiny_data, tiny_training

HARD = {"size": 0.25, "macs": 0.7}
QUICK = gw.AdaptiveOptions(evaluations=6, samples=32)
EPOCHS = 3


class Loop:
    """A user's training loop with a shuffled loader, momentum and a schedule."""

    def __init__(self, epochs: int = EPOCHS, **options: Any) -> None:
        torch.manual_seed(3)
        self.network = tiny()
        self.optimiser = torch.optim.SGD(self.network.parameters(), 0.02, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimiser, 1, 0.7)
        stateful = {"optimiser": self.optimiser, "schedule": self.schedule}
        settings = {"constraints": HARD, "target": "packed", "options": QUICK, **options}
        self.adaptive = gw.AdaptiveCompression(
            self.network, data=tiny_data(), epochs=epochs, stateful=stateful, **settings
        )

    def step(self, inputs: Tensor, labels: Tensor) -> None:
        self.optimiser.zero_grad()
        nn.functional.cross_entropy(self.network(inputs), labels).backward()
        self.optimiser.step()

    def epoch(self) -> None:
        self.network.train()
        batches = tiny_training()
        for number in torch.randperm(len(batches)).tolist():
            self.step(*batches[number])
        self.schedule.step()

    def run(self, until: int | None = None) -> Loop:
        for _ in range(self.adaptive.epoch, self.adaptive.epochs if until is None else until):
            self.epoch()
            self.adaptive.end_epoch()
        return self


def test_a_network_is_compressed_while_it_trains_and_exported(tmp_path: Path) -> None:
    hard = {"size": 0.45, "macs": 0.7}  # the first profile is too large for the second decision's budget
    loop = Loop(target="ort-cpu", constraints=hard, folder=tmp_path / "run")
    history = loop.run().adaptive.history
    assert [epoch.source is None for epoch in history] == [False, False, True]
    for epoch in history[:2]:
        assert all(epoch.given[name] <= epoch.asked[name] for name in hard)
    assert history[0].asked["size"] > history[1].asked["size"] == hard["size"]
    assert history[0].entries != history[1].entries == history[2].entries
    result = loop.adaptive.result()
    figures = result.figures()
    assert figures["size_bytes"] <= hard["size"] * figures["reference_size_bytes"]
    assert figures["macs"] <= hard["macs"] * figures["reference_macs"]
    assert figures["divergence"] < 0.05  # what was trained is what is deployed, but for rounded activations
    result.export(tmp_path / "artefact")
    loaded = gw.load(tmp_path / "artefact", loop.network)
    assert loaded.profile.entries == history[-1].entries
    kept = CompressionProfile.load(tmp_path / "run" / PROFILE)
    assert kept.entries == loaded.profile.entries
    assert (tmp_path / "run" / PICTURE).read_text(encoding="utf-8").startswith("<svg")


def test_what_is_realised_computes_what_was_trained() -> None:
    loop = Loop().run()
    loop.network.eval()
    batches = list(tiny_data().test)
    with torch.no_grad():
        worn = torch.cat([loop.network(inputs) for inputs, _ in batches])
        result = loop.adaptive.result()
        found = torch.cat([result.model(inputs) for inputs, _ in batches])
        assert torch.equal(torch.cat([loop.network(inputs) for inputs, _ in batches]), worn)
    assert torch.allclose(found, worn, atol=0.05 * float(worn.abs().max()))


def test_without_constraints_the_weights_are_those_of_plain_training() -> None:
    plain = Loop(constraints={})
    for _ in range(EPOCHS):
        plain.epoch()
    watched = Loop(constraints={}).run()
    assert fingerprint(watched.network) == fingerprint(plain.network)


def test_decisions_leave_the_generators_of_the_user_alone() -> None:
    loop = Loop()
    loop.epoch()
    before, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()
    loop.adaptive.end_epoch()
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], legacy)


def test_a_run_that_is_cut_five_times_ends_as_an_uncut_one(tmp_path: Path) -> None:
    whole = Loop(epochs=6).run()
    for cut in range(1, 7):  # each loop is a process of its own, all that goes on is in the folder
        cut_one = Loop(epochs=6, folder=tmp_path, resume=cut > 1)
        cut_one.run(until=cut)
        if cut < 6:
            cut_one.epoch()  # lost: the cut comes in the middle of the next one
    assert cut_one.adaptive.entries == whole.adaptive.entries
    assert [e.given for e in cut_one.adaptive.history] == [e.given for e in whole.adaptive.history]
    assert fingerprint(cut_one.network) == fingerprint(whole.network)
    assert cut_one.adaptive.result().figures() == whole.adaptive.result().figures()


def test_no_stale_variant_is_used_and_none_is_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a decision measures is what a library that has never seen other weights gives."""
    measured: list[tuple[Any, Any, Any]] = []
    many = Evaluator.many

    def watch(self: Evaluator, profiles: Any, *args: Any) -> Any:
        found = list(many(self, profiles, *args))
        measured.append((copy.deepcopy(self.library.reference), profiles, dict(found)))
        yield from found

    monkeypatch.setattr(Evaluator, "many", watch)
    loop = Loop().run()
    decider = loop.adaptive._decider
    assert decider is not None
    seen = {fingerprint(reference.model) for reference, _, _ in measured}
    assert len(seen) == 2  # decisions, each on weights of its own
    monkeypatch.undo()
    for reference, profiles, outcomes in measured:
        session = decider.session
        batches = session.splits.search[:1]
        fresh = session.moved(reference.model, batches).evaluator
        assert type(fresh.library) is VariantLibrary
        again = dict(fresh.many(profiles))
        assert again == outcomes
    dress = Dress(loop.network)
    assert decider.snapshot(dress) is decider.snapshot(dress)
    now = decider.snapshot(dress)
    with torch.no_grad():
        loop.network.fc.weight[0, 0] += 1e-3
    assert decider.snapshot(dress) is not now


def test_a_held_profile_is_only_left_for_a_better_one() -> None:
    loop = Loop()
    decider, session = loop.adaptive._decider, loop.adaptive._session
    assert decider is not None and session is not None
    dress, budgets = Dress(loop.network), session.budgets(HARD)
    first = decider.choose(dress, {}, budgets)
    strict = Decider(session, gw.AdaptiveOptions(evaluations=6, samples=32, margin=0.99))
    held = strict.choose(dress, first.entries, budgets)
    assert (held.source, held.entries) == ("held", first.entries)


def test_a_profile_of_ones_own_is_kept_from_the_start() -> None:
    own = {
        "block.0": Entry(Choice(Method.PRUNE, Granularity.CHANNEL, 0.5), Choice(Method.QUANTIZE, Granularity.LAYER, 8))
    }
    loop = Loop(profile=CompressionProfile(own), constraints={}, epochs=2)
    assert loop.adaptive.entries == own
    assert loop.run().adaptive.history[-1].entries == own
    assert loop.adaptive.result().entries == own


def broken(loop: Loop) -> None:
    loop.step(torch.full((4, 3, 8, 8), math.nan), torch.zeros(4, dtype=torch.long))


def dry(loop: Loop) -> None:
    loop.network.eval()
    loop.network(tiny_training()[0][0])  # validation is no training


def rebuilt(loop: Loop) -> None:
    loop.epoch()
    loop.network.fc = nn.Linear(32, 5)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (broken, "'stem.weight' holds NaN or infinity after epoch 2: the loss diverged"),
        (dry, "no batch went through the network in epoch 2: the training data ran dry"),
        (rebuilt, "the network has changed since training began, first at 'fc.bias'"),
    ],
)
def test_what_goes_wrong_in_training_is_one_sentence_and_keeps_the_last_epoch(
    tmp_path: Path, fault: Callable[[Loop], None], message: str
) -> None:
    loop = Loop(folder=tmp_path).run(until=1)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    fault(loop)
    with pytest.raises(RecoveryError, match=message) as raised:
        loop.adaptive.end_epoch()
    assert str(raised.value).endswith(f"{tmp_path} holds epoch 1")
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert Loop(folder=tmp_path, resume=True).adaptive.epoch == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "give at least 1 epoch, got 0"),
        ({"constraints": {"size": 2.0}}, ValueError, "the constraint size is a share"),
        (
            {"constraints": {"accuracy_drop": 0.01}},
            ValueError,
            "'accuracy_drop' cannot be a constraint while a network trains",
        ),
        ({"constraints": {"size": 1e-4}}, Unreachable, "cannot be met"),
        ({"resume": True}, RecoveryError, "there is no folder to resume from"),
        (
            {"profile": CompressionProfile({"fc": Entry(Choice(Method.FACTORIZE, Granularity.LAYER, 0.5))})},
            ValueError,
            "cannot take factorize/layer/0.5",
        ),
    ],
)
def test_bad_requests_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Loop(**options)


def test_a_checkpoint_is_neither_overwritten_nor_taken_for_another_run(tmp_path: Path) -> None:
    Loop(folder=tmp_path).run(until=1)
    with pytest.raises(RecoveryError, match="resume it, or delete it"):
        Loop(folder=tmp_path)
    with pytest.raises(RecoveryError, match="is of another constraints"):
        Loop(folder=tmp_path, resume=True, constraints={"size": 0.3})
    assert json.dumps(Checkpoint.load(tmp_path).facts["settings"]["epochs"]) == str(EPOCHS)


def test_results_and_epochs_are_counted() -> None:
    loop = Loop(epochs=1)
    with pytest.raises(RecoveryError, match="after 1 epochs; 0 are done"):
        loop.adaptive.result()
    with pytest.raises(ValueError, match="the trainer is set to 2 epochs, the compression to 1"):
        loop.adaptive.expects(2)
    loop.adaptive.expects(1)
    loop.run()
    with pytest.raises(RecoveryError, match="all 1 epochs are done"):
        loop.adaptive.end_epoch()
