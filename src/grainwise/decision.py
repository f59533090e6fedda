"""One decision while a network trains: the controller proposes profiles for its weights as they are now, they are
measured, and the controller learns from what they gave.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grainwise.evaluate.data import take
from grainwise.evaluate.fisher import fisher_sensitivity
from grainwise.plan.choices import Entry
from grainwise.plan.projection import Projection
from grainwise.realise.norms import reestimate_norms
from grainwise.realise.reference import fingerprint
from grainwise.recover.errors import RecoveryError
from grainwise.recover.forms import Dress, begin
from grainwise.recover.pressure import AdaptiveOptions
from grainwise.search.draft import Draft
from grainwise.search.local import reduce
from grainwise.search.prior import Table, fill, finite_scores
from grainwise.search.rl import ControllerConfig, ControllerSearcher
from grainwise.search.searcher import Proposal, State
from grainwise.session import Session
from grainwise.study.measurement import Failure, Measurement
from grainwise.study.reward import HardBudget
from grainwise.study.trial import Trial, best, meets

SCORED = 64  # samples that scores of single choices are estimated on
HELD = "held"


@dataclass(frozen=True, slots=True)
class Decision:
    """entries: of every layer. source: what proposed them, `held` for the profile in force, tightened where it exceeded
    the budgets. measurement: its divergence is that from the network as it is, before it is rounded.
    """

    entries: Mapping[str, Entry]
    source: str
    measurement: Measurement
    trials: int


class Decider:
    """Decides again and again, for a network that trains in between. The policy is carried from decision to decision;
    what it saw is not, since the weights have moved.
    """

    def __init__(self, session: Session, options: AdaptiveOptions) -> None:
        self.session = session
        self.options = options
        self._snapshot: Session | None = None
        self._policy: State | None = None
        self._count = 0

    def snapshot(self, dress: Dress) -> Session:
        """A session on the weights as they are, rounding left out: what was computed from other weights is never used,
        and what was computed from the same ones is used again.
        """
        twin = copy.deepcopy(dress.network).eval()
        with torch.no_grad():
            for name, form in dress.forms.items():
                weight = twin.get_submodule(name).weight
                assert isinstance(weight, nn.Parameter)
                weight.copy_(form.dense(weight))
        if dress.forms:  # the norms have seen rounded weights
            reference = self.session.reference
            reestimate_norms(twin, reference.calibration, reference.forward)
        if self._snapshot is None or self._snapshot.model_fingerprint != fingerprint(twin):
            search = take(self.session.splits.search, self.options.samples)
            self._snapshot = self.session.moved(twin, search)
        return self._snapshot

    def keep(self, dress: Dress, entries: Mapping[str, Entry]) -> None:
        """Put on a profile for the weights as they are."""
        self._wear(dress, self.snapshot(dress), entries)

    def choose(self, dress: Dress, held: Mapping[str, Entry], budgets: Mapping[str, float]) -> Decision:
        """Choose a profile within absolute budgets, and put it on. held: the profile in force.

        Raises RecoveryError when none is found.
        """
        now = self.snapshot(dress)
        evaluator = now.evaluator
        scores = fisher_sensitivity(
            evaluator.library, now.space, now.splits.search, evaluator.scoring, samples=SCORED, seed=self._count
        )
        projection = now.projection(budgets)
        config = ControllerConfig(horizon=self.options.evaluations)
        seed = self.options.seed + self._count
        searcher = ControllerSearcher(projection, now.features(), scores, seed=seed, config=config)
        if self._policy is not None:
            searcher.trainer.restore(*self._policy)
        kept = tightened(projection, finite_scores(projection, scores), held)
        trials = [] if kept is None else self._judged(now, [Proposal(kept, HELD)], budgets, 0)
        searcher.replay(trials)
        while (left := self.options.evaluations - len(trials)) > 0:
            asked = searcher.ask(min(left, self.options.evaluations // 2))
            found = self._judged(now, asked, budgets, len(trials))
            searcher.tell(found)
            trials += found
        self._policy, self._count = searcher.trainer.state(), self._count + 1
        chosen = self._chosen(trials, budgets)
        self._wear(dress, now, chosen.entries)
        self._snapshot = None  # its variants may be gigabytes, and the weights move on
        return chosen

    @staticmethod
    def _wear(dress: Dress, now: Session, entries: Mapping[str, Entry]) -> None:
        dress.wear(begin(dress.network, now.evaluator.library, entries))

    def _judged(
        self, now: Session, proposals: Sequence[Proposal], budgets: Mapping[str, float], first: int
    ) -> list[Trial]:
        """Trials of the proposals, numbered from `first`. Bytes are those that the deployed network will have."""
        reward, found = HardBudget(budgets), dict(now.evaluator.many([proposal.entries for proposal in proposals]))
        trials = []
        for number, proposal in enumerate(proposals):
            outcome = found[number]
            worth = None
            if not isinstance(outcome, Failure):
                worth = reward(outcome, now.evaluator.reference, proposal.entries)
            trials.append(Trial(first + number, proposal.entries, outcome, worth, proposal.source, 0.0))
        return trials

    def _chosen(self, trials: Sequence[Trial], budgets: Mapping[str, float]) -> Decision:
        """The best profile, or the one that is held where the best is hardly better. Raises RecoveryError for none."""
        leader = best(trials, budgets)
        if leader is None or leader.measurement is None:
            failed = next((t.outcome for t in trials if isinstance(t.outcome, Failure)), None)
            raise RecoveryError(
                f"none of {len(trials)} profiles met the budgets {dict(budgets)}"
                + (f": {failed.reason}" if failed else "; allow more evaluations or a looser constraint")
            )
        held, found = trials[0].measurement, leader.measurement
        if trials[0].source == HELD and held is not None and meets(held, budgets):
            if found.divergence > (1 - self.options.margin) * held.divergence:
                return Decision(trials[0].entries, HELD, held, len(trials))
        return Decision(leader.entries, leader.source, found, len(trials))

    # -- interruption

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What decides later decisions: tensors for safetensors, a body for JSON."""
        tensors, body = self._policy or ({}, {})
        return dict(tensors), {"policy": body, "count": self._count}

    def restore(self, tensors: Mapping[str, Tensor], body: Mapping[str, Any]) -> None:
        self._policy = (dict(tensors), body["policy"]) if tensors else None
        self._count = int(body["count"])


def tightened(projection: Projection, scores: Table, held: Mapping[str, Entry]) -> dict[str, Entry] | None:
    """A profile with as few entries changed as it takes to meet the budgets, slack filled; None when single changes do
    not lead there.
    """
    draft = Draft(projection.cost, held)
    if not reduce(draft, scores, projection):
        return None
    fill(draft, scores, projection.budget)
    return draft.entries()
