"""The reinforcement-learning searcher: the controller proposes, the policy trainer learns from what the trials gave.

Letters: N profiles, L layers, F static features, S structures, P precisions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grainwise.controller.network import Controller, Inputs, Memory, Rollout
from grainwise.controller.policy_gradient import per_layer_credit, terminal_credit
from grainwise.controller.trainer import Algorithm, PolicyTrainer, TrainerConfig
from grainwise.plan.choices import PRECISIONS, STRUCTURES, Entry, numbers_of
from grainwise.plan.prices import COSTS
from grainwise.plan.projection import Projection, Walk
from grainwise.search.beliefs import Beliefs
from grainwise.search.draft import Draft
from grainwise.search.local import exchange
from grainwise.search.prior import finite_scores
from grainwise.search.programme import Programme, solved_prior
from grainwise.search.searcher import Proposal, State
from grainwise.search.walks import Guide, Key, distinct, entries_of, filled, key_of, sample
from grainwise.study.sensitivity import Sensitivity
from grainwise.study.trial import Trial

_S, _P = len(STRUCTURES), len(PRECISIONS)
DYNAMICS = len(COSTS) + 1  # what is left of each budget, log of the multiplier's factor
_PARENTS = 1.5  # mean rank of the elite profiles that sampled scores are solved around
_SPREAD = 0.3  # of the sampled scores: all of the posterior's doubt, in hundreds of scores at once, leads far astray
_RESOLVED = 4  # times as many trials before the programme is solved again: scores move ever less, and it takes longest
_TRIES = 6  # solutions for each new one that is wanted, at most
_ILLEGAL = 2.0  # summary of a choice that the layer cannot take


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """How the controller searches."""

    algorithm: Algorithm = "ppo"
    """Policy gradient: `reinforce` or `ppo`."""
    credit: Literal["terminal", "per_layer"] = "terminal"
    """What a decision is credited with: the profile's reward, or its own share (needs `Trial.prefix_rewards`)."""
    use_prior: bool = True
    """Start at the prior of the sensitivity scores, and fill slack by them."""
    projected: bool = True
    """Mask entries that can no longer meet the budgets; without it only legality is respected."""
    learning_rate: float = 3e-3
    """0 leaves the policy as it starts."""
    horizon: int = 300
    """Evaluations that are expected: by then the search has turned from exploring to exploiting."""
    temperature: float = 0.5
    """Of the prior, see `Prior`."""
    learn_scores: bool = True
    """Correct the scores of the prior by the measurements, see `beliefs`."""
    sampled: float = 0.5
    """Share of the proposals that solve corrected and sampled scores, at most, once there are measurements; the
    controller makes the others."""
    exchanged: float = 0.5
    """Share of the others that are neighbours of elite profiles by the corrected scores, at most."""
    elite: int = 16
    """Best trials that the policy imitates and, later, samples around."""
    replay: int = 16
    """Stored trials that join each policy-gradient step, importance-weighted."""


@dataclass(slots=True)
class _Memory:
    """A trial with what the controller saw. log_probs: `[1, L]` under the policy when it was stored; reward and
    divergence are NaN after a failure.
    """

    key: Key
    reward: float
    divergence: float
    rollout: Rollout
    log_probs: Tensor


class ControllerSearcher:
    """The LSTM controller and its trainer behind ask and tell.

    features: `[L, F]` float32 static features of the layers. The first batch holds the additive solution of the prior,
    so that the result is never worse than it.
    """

    def __init__(
        self,
        projection: Projection,
        features: Tensor,
        sensitivity: Sensitivity | None,
        *,
        seed: int = 0,
        config: ControllerConfig | None = None,
    ) -> None:
        self.config = config or ControllerConfig()
        self._projection = projection
        scores = sensitivity if self.config.use_prior else None
        self._programme = Programme(projection)
        self._prior = solved_prior(self._programme, scores, self.config.temperature)
        self._sensitivity = self._prior.sensitivity
        self._static = _standardised(features)
        self._summary = _summary(projection, self._prior.sensitivity)
        controller = Controller(features.shape[1], DYNAMICS, generator=torch.Generator().manual_seed(seed))
        trainer = TrainerConfig(algorithm=self.config.algorithm, learning_rate=self.config.learning_rate)
        self.trainer = PolicyTrainer(controller, trainer)
        self._rng = np.random.default_rng(seed)
        self._seen: set[Key] = set()
        self._memory: list[_Memory] = []
        self._told = 0
        self._beliefs: Beliefs | None = None  # of all measurements, once there are some to correct scores by
        self._solution: Key = ()  # of the programme, at scores that `_solved_at` trials had corrected
        self._solved_at = 0

    # -- proposing

    def ask(self, count: int) -> list[Proposal]:
        proposals = []
        if not self._told and self._prior.sensitivity is not None:
            first = self._prior.solution()
            if key_of(self._projection, first) not in self._seen:
                self._seen.add(key_of(self._projection, first))
                proposals.append(Proposal(first, "prior"))
        proposals += self._sampled(round(self.config.sampled * (count - len(proposals))))
        proposals += self._neighbours(round(self.config.exchanged * (count - len(proposals))))
        missing, projected = count - len(proposals), self.config.projected
        new = distinct(self._projection, missing, self._draw, self._seen, self._rng, projected=projected)
        return proposals + [Proposal(entries, "controller") for entries in new]

    def _sampled(self, count: int) -> list[Proposal]:
        """Up to `count` new profiles: the solution of the scores as they are now, then solutions of scores drawn around
        them (Thompson sampling), half of them reached from that solution and half from elite profiles.
        """
        elite = self._elite()
        if count < 1 or not elite or self._beliefs is None:
            return []
        cost = self._projection.cost
        parents = [Draft(cost, entries_of(self._projection, m.key)) for m in elite]
        if self._told >= _RESOLVED * self._solved_at:
            solved = self._programme.solve(self._prior.scores, self._prior.improved(parents[0]))
            self._solution, self._solved_at = key_of(self._projection, solved), self._told
        anchor = Draft(cost, entries_of(self._projection, self._solution))
        solution = Draft(cost, self._prior.improved(anchor))
        proposals = []
        for number in range(_TRIES * count):
            found, source = solution.entries(), "programme"
            if number:
                drawn = self._beliefs.sample(self._rng, _SPREAD)
                rank = min(len(parents) - 1, int(self._rng.exponential(_PARENTS)))
                around = solution if self._rng.random() < 0.5 else parents[rank]
                found, source = self._prior.improved(around, finite_scores(self._projection, drawn)), "thompson"
            key = key_of(self._projection, found)
            if key not in self._seen:
                self._seen.add(key)
                proposals.append(Proposal(found, source))
            if len(proposals) == count:
                break
        return proposals

    def _neighbours(self, count: int) -> list[Proposal]:
        """Up to `count` new profiles: one entry of an elite profile changed, the others solved around it."""
        elite = self._elite()
        if count < 1 or not elite or self._beliefs is None:
            return []
        proposals = []
        for _ in range(_TRIES * count):
            parent = elite[min(len(elite) - 1, int(self._rng.exponential(_PARENTS)))]
            entries = entries_of(self._projection, parent.key)
            found = exchange(self._projection, entries, self._prior.scores, self._rng)
            if found is None or (key := key_of(self._projection, found)) in self._seen:
                continue
            self._seen.add(key)
            proposals.append(Proposal(found, "neighbour"))
            if len(proposals) == count:
                break
        return proposals

    def propose(self, count: int) -> list[Proposal]:
        """Profiles of the policy as it is, without regard to what was tried; the search is not moved on."""
        rng = np.random.default_rng(self._rng.bit_generator.state["state"]["state"] % 2**63)
        drawn = sample(self._projection, count, _Lockstep(self), rng, projected=self.config.projected)
        return [Proposal(entries, "controller") for entries in self._filled(drawn, None)]

    def _draw(self, count: int, temperature: float) -> list[dict[str, Entry]]:
        guides = [self._guide() for _ in range(count)]
        drawn = sample(
            self._projection,
            count,
            _Lockstep(self),
            self._rng,
            guides=guides,
            projected=self.config.projected,
            temperature=temperature,
        )
        return self._filled(drawn, guides)

    def _filled(self, drawn: list[dict[str, Entry]], guides: Sequence[Guide | None] | None) -> list[dict[str, Entry]]:
        scores = self._prior.scores if self._prior.sensitivity is not None and self.config.projected else None
        return filled(self._projection, drawn, scores, guides)

    def _guide(self) -> Guide | None:
        """With a chance that grows over the horizon: an elite profile with 1-4 layers decided anew."""
        progress = min(1.0, self._told / self.config.horizon)
        elite = self._elite()
        if not elite or self._rng.random() >= min(0.9, 2 * progress):
            return None
        ranks = np.arange(1, len(elite) + 1, dtype=np.float64)
        chances = ranks**-1 / (ranks**-1).sum()
        parent = elite[int(self._rng.choice(len(elite), p=chances))]
        layers = len(parent.key)
        changed = self._rng.choice(layers, min(layers, int(self._rng.integers(1, 5))), replace=False)
        return Guide(entries_of(self._projection, parent.key), frozenset(int(i) for i in changed))

    def _elite(self) -> list[_Memory]:
        good = [m for m in self._memory if math.isfinite(m.reward)]
        return sorted(good, key=lambda m: -m.reward)[: self.config.elite]

    # -- learning

    def tell(self, trials: Sequence[Trial]) -> None:
        fresh = self._remember(trials)
        self._told += len(trials)
        self._believe()
        if not fresh or self.config.learning_rate == 0:
            return
        older = self._memory[: len(self._memory) - len(fresh)]
        size = min(self.config.replay, len(older))
        chosen = fresh + [older[i] for i in self._rng.choice(len(older), size, replace=False)] if size else fresh
        elite = self._elite()
        self.trainer.update(
            self._repriced(chosen),
            self._credit(chosen, trials),
            old_log_probs=torch.cat([m.log_probs for m in chosen]),
            elite=self._repriced(elite) if elite else None,
            elite_weights=torch.linspace(1, 0.2, len(elite)) if elite else None,
        )

    def _believe(self) -> None:
        """Correct the prior's scores by all measurements; what the controller saw is priced by them from now on."""
        if self._sensitivity is None or not self.config.learn_scores:
            return
        measured = [m for m in self._memory if math.isfinite(m.divergence)]
        self._beliefs = Beliefs(self._sensitivity, [m.key for m in measured], [m.divergence for m in measured])
        self._prior.learn(self._beliefs.mean())

    def _repriced(self, chosen: Sequence[_Memory]) -> Rollout:
        """The rollouts with the prior's present log-weights at the multipliers of their walks."""
        rollout = Rollout.join([m.rollout for m in chosen])
        factors = np.exp(4 * rollout.inputs.dynamic[..., -1].double().numpy())
        prior = torch.tensor(self._prior.batch_log_weights(factors), dtype=torch.float32)
        return replace(rollout, inputs=replace(rollout.inputs, prior=prior))

    def replay(self, trials: Sequence[Trial]) -> None:
        """Learn from trials that others proposed: they count as known, join the elite and the importance-weighted
        replay. Trials that failed are only remembered as tried.
        """
        self._seen.update(key_of(self._projection, trial.entries) for trial in trials)
        self._remember([trial for trial in trials if trial.reward is not None])
        self._believe()

    def _remember(self, trials: Sequence[Trial]) -> list[_Memory]:
        if not trials:
            return []
        rollout = self._retrace([trial.entries for trial in trials])
        with torch.no_grad():
            log_probs = self.trainer.controller.evaluate(rollout)[0]
        new = [
            _Memory(
                key_of(self._projection, trial.entries),
                math.nan if trial.reward is None else float(trial.reward),
                math.nan if trial.measurement is None else trial.measurement.divergence,
                one,
                row[None],
            )
            for trial, one, row in zip(trials, rollout.split(), log_probs, strict=True)
        ]
        self._memory += new
        return new

    def _credit(self, chosen: Sequence[_Memory], trials: Sequence[Trial]) -> Tensor:
        """`[N, L]` advantages; replayed trials have no prefix rewards and take the terminal credit."""
        layers = len(self._projection.space.layers)
        advantages = terminal_credit(torch.tensor([m.reward for m in chosen]), layers).clone()
        if self.config.credit == "per_layer" and all(len(t.prefix_rewards) == layers for t in trials):
            prefix = torch.tensor([t.prefix_rewards for t in trials])
            advantages[: len(trials)] = per_layer_credit(prefix, 1.0)  # the uncompressed network keeps all quality
        return advantages

    def _retrace(self, profiles: Sequence[Mapping[str, Entry]]) -> Rollout:
        """Whole profiles as the rollout that the controller would have made; their entries are never masked."""
        walks, seen = [Walk(self._projection) for _ in profiles], []
        actions: list[list[int]] = []
        for layer in self._projection.space.layers:
            taken = [entries[layer.name] for entries in profiles]
            mask = np.stack([walk.allowed() if self.config.projected else walk.legal() for walk in walks])
            mask[(range(len(walks)), *zip(*map(numbers_of, taken), strict=True))] = True
            seen.append(self.inputs(walks, mask, actions[-1] if actions else [_S * _P] * len(walks)))
            actions.append([_flat(entry) for entry in taken])
            for walk, entry in zip(walks, taken, strict=True):
                walk.take(entry)
        joined = {name: torch.cat([getattr(i, name) for i in seen], dim=1) for name in Inputs.__dataclass_fields__}
        return Rollout(Inputs(**joined), torch.tensor(actions).T)

    def inputs(self, walks: Sequence[Walk], mask: NDArray[np.bool_], previous: Sequence[int]) -> Inputs:
        """What the controller sees at the walks' current layer, with L = 1. mask: `[N, S, P]`."""
        count, step = len(walks), walks[0].step
        budget = self._projection.budget
        finite = np.isfinite(budget)
        dynamic, prior = [], []
        for walk in walks:
            factor = self._prior.factor(walk)
            left = np.where(finite, 1 - walk.completed / np.where(finite, budget, 1.0), 1.0)
            dynamic.append([*np.clip(left, -1, 1), math.log(factor) / 4])
            prior.append(self._prior.log_weights(walk, factor))
        return Inputs(
            static=self._static[step].expand(count, 1, -1),
            dynamic=torch.tensor(dynamic, dtype=torch.float32)[:, None],
            summary=self._summary[step].expand(count, 1, -1),
            previous=torch.tensor(list(previous))[:, None],
            prior=torch.tensor(np.stack(prior), dtype=torch.float32)[:, None],
            mask=torch.from_numpy(mask)[:, None],
        )

    # -- interruption

    def state(self) -> State:
        tensors, trainer = self.trainer.state()
        if self._memory:
            tensors["replay.keys"] = torch.tensor([m.key for m in self._memory])
            tensors["replay.rewards"] = torch.tensor([m.reward for m in self._memory], dtype=torch.float64)
            tensors["replay.divergences"] = torch.tensor([m.divergence for m in self._memory], dtype=torch.float64)
            tensors["replay.dynamic"] = torch.cat([m.rollout.inputs.dynamic for m in self._memory])
            tensors["replay.log_probs"] = torch.cat([m.log_probs for m in self._memory])
        body = {"trainer": trainer, "rng": self._rng.bit_generator.state, "told": self._told}
        body |= {"solution": self._solution, "solved_at": self._solved_at}
        return tensors, {**body, "seen": sorted(self._seen - {m.key for m in self._memory})}

    def restore(self, tensors: Mapping[str, Tensor], body: Mapping[str, Any]) -> None:
        self.trainer.restore(tensors, body["trainer"])
        self._rng.bit_generator.state = body["rng"]
        self._told = int(body["told"])
        self._solution, self._solved_at = tuple(body["solution"]), int(body["solved_at"])
        self._seen = {tuple(key) for key in body["seen"]}
        self._memory = []
        if "replay.keys" in tensors:
            names = ("keys", "rewards", "divergences", "dynamic", "log_probs")
            keys, rewards, divergences, dynamic, log_probs = (tensors[f"replay.{name}"] for name in names)
            rollout = self._retrace([entries_of(self._projection, key) for key in keys.tolist()])
            rollout = replace(rollout, inputs=replace(rollout.inputs, dynamic=dynamic))
            figures = zip(keys.tolist(), rewards.tolist(), divergences.tolist(), strict=True)
            self._memory = [
                _Memory(tuple(key), reward, divergence, one, row[None])
                for (key, reward, divergence), one, row in zip(figures, rollout.split(), log_probs, strict=True)
            ]
        self._seen.update(m.key for m in self._memory)
        self._believe()


class _Lockstep:
    """The controller as a policy of `sample`: it remembers the LSTM's memory and the entries before."""

    def __init__(self, searcher: ControllerSearcher) -> None:
        self._searcher = searcher
        self._memory: Memory | None = None

    def __call__(self, walks: Sequence[Walk], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        previous = [_flat(next(reversed(walk.entries.values()))) if walk.entries else _S * _P for walk in walks]
        inputs = self._searcher.inputs(walks, mask, previous)
        log_probs, self._memory = self._searcher.trainer.controller.step(inputs, self._memory)
        return np.asarray(log_probs.numpy(), dtype=np.float64)


def _flat(entry: Entry) -> int:
    s, p = numbers_of(entry)
    return s * _P + p


def _standardised(features: Tensor) -> Tensor:
    """`[L, F]` with zero mean and unit deviation over the layers: networks differ in scale."""
    centred = features.float() - features.float().mean(dim=0)
    return (centred / centred.std(dim=0, correction=0).clamp(min=1e-6)).clamp(-4, 4)


def _summary(projection: Projection, sensitivity: Sensitivity | None) -> Tensor:
    """`[L, S + P]` log10 of the scores, in about -2..1; a large constant where illegal."""
    legal = np.concatenate([projection.space.structures, projection.space.precisions], axis=1)
    if sensitivity is None:
        scaled = np.zeros(legal.shape)
    else:
        scores = np.concatenate([sensitivity.structures, sensitivity.precisions], axis=1)
        scaled = np.log10(np.clip(scores, 1e-6, 1e3)) / 3
    return torch.tensor(np.where(legal, scaled, _ILLEGAL), dtype=torch.float32)
