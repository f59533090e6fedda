"""Optuna's samplers behind ask and tell: TPE and NSGA-II on one categorical parameter for each layer's entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from grainwise.plan.choices import PRECISIONS, Entry
from grainwise.plan.prices import COSTS
from grainwise.plan.projection import Projection
from grainwise.search.searcher import Proposal, State
from grainwise.search.walks import Guide, Key, distinct, entries_of, key_of, sample, uniform
from grainwise.study.measurement import Failure
from grainwise.study.trial import Trial

if TYPE_CHECKING:
    import optuna

_KEY = "key"  # user attribute of Optuna's trials: the profile that was evaluated


class OptunaSearcher:
    """One of Optuna's samplers, minimising divergence under the constraints cost / budget - 1 <= 0.

    sampler: `tpe` (Bergstra et al. 2011) or `nsgaii` (Deb et al. 2002), with Optuna's own settings. start: a profile
    that is proposed first, or None. Proposals are legal (an entry that earlier ones rule out gives way to a random
    one) but may exceed the budgets: keeping to them is the sampler's part.

    The study lives in memory. Each draw is by a sampler newly seeded with (seed, number of the draw), and draws end
    with the batch, so that the ended draws are all of the state.
    """

    def __init__(
        self,
        projection: Projection,
        sampler: Literal["tpe", "nsgaii"],
        *,
        start: Mapping[str, Entry] | None = None,
        seed: int = 0,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._sampler = {"tpe": optuna.samplers.TPESampler, "nsgaii": optuna.samplers.NSGAIISampler}[sampler]
        self._source = f"optuna:{sampler}"
        self._projection = projection
        self._start = None if start is None else key_of(projection, start)
        self._seed = seed
        self._space: dict[str, optuna.distributions.BaseDistribution] = {}
        for index, layer in enumerate(projection.space.layers):
            numbers = [int(s) * len(PRECISIONS) + int(p) for s, p in np.argwhere(projection.cost.pairs(index))]
            self._space[layer.name] = optuna.distributions.CategoricalDistribution(numbers)
        self._budgets = {n: float(b) for n, b in zip(COSTS, projection.budget, strict=True) if np.isfinite(b)}
        self._rng = np.random.default_rng(seed)
        self._seen: set[Key] = set()
        self._study = optuna.create_study()
        self._drawn: list[tuple[optuna.Trial, Key]] = []  # since the last `tell`

    # -- proposing

    def ask(self, count: int) -> list[Proposal]:
        proposals = []
        if count and self._start is not None and self._start not in self._seen:
            self._seen.add(self._start)
            self._draw_known(self._start)
            proposals.append(Proposal(entries_of(self._projection, self._start), "start"))
        missing = count - len(proposals)
        new = distinct(self._projection, missing, self._draw, self._seen, self._rng, projected=False)
        drawn = {key for _, key in self._drawn}
        for key in (key_of(self._projection, entries) for entries in new):
            if key not in drawn:  # a mutation, since the sampler had nothing new to offer
                self._draw_known(key)
        return proposals + [Proposal(entries, self._source) for entries in new]

    def _draw(self, count: int, temperature: float) -> list[dict[str, Entry]]:
        profiles = []
        for _ in range(count):
            trial = self._ask()
            asked = entries_of(self._projection, [trial.params[name] for name in self._space])
            guides = [Guide(asked, frozenset())]
            (legal,) = sample(self._projection, 1, uniform, self._rng, guides=guides, projected=False)
            self._drawn.append((trial, key_of(self._projection, legal)))
            profiles.append(legal)
        return profiles

    def _draw_known(self, key: Key) -> None:
        self._study.enqueue_trial(dict(zip(self._space, key, strict=True)))
        self._drawn.append((self._ask(), key))

    def _ask(self) -> optuna.Trial:
        number = len(self._study.get_trials(deepcopy=False, states=self._ended)) + len(self._drawn)
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        self._study.sampler = self._sampler(seed=seed)
        return self._study.ask(self._space)

    @property
    def _ended(self) -> tuple[optuna.trial.TrialState, ...]:
        return self._optuna.trial.TrialState.COMPLETE, self._optuna.trial.TrialState.FAIL

    # -- learning

    def tell(self, trials: Sequence[Trial]) -> None:
        """Every draw is told what its profile gave; one that repeated a profile, what that gave before."""
        known = {tuple(t.user_attrs[_KEY]): t for t in self._study.get_trials(deepcopy=False, states=self._ended)}
        outcomes = {key_of(self._projection, trial.entries): trial.outcome for trial in trials}
        for trial, key in self._drawn:
            trial.set_user_attr(_KEY, list(key))
            outcome, before = outcomes.get(key), known.get(key)
            divergence: float | None = None
            if outcome is not None and not isinstance(outcome, Failure):
                divergence = outcome.divergence
                excess = {name: outcome.cost(name) / budget - 1 for name, budget in self._budgets.items()}
            elif before is not None and before.value is not None:
                divergence, excess = before.value, before.constraints
            if divergence is None:
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
                continue
            for name, value in excess.items():
                trial.set_constraint(name, value)
            self._study.tell(trial, divergence)
        self._drawn.clear()

    # -- interruption

    def state(self) -> State:
        told = [
            {"params": t.params, "value": t.value, "key": t.user_attrs[_KEY], "attributes": t.system_attrs}
            for t in self._study.get_trials(deepcopy=False, states=self._ended)
        ]
        return {}, {"rng": self._rng.bit_generator.state, "seen": sorted(self._seen), "told": told, "seed": self._seed}

    def restore(self, tensors: Mapping[str, Tensor], body: Mapping[str, Any]) -> None:
        self._rng.bit_generator.state = body["rng"]
        self._seed = int(body["seed"])
        self._seen = {tuple(key) for key in body["seen"]}
        self._study = self._optuna.create_study()
        self._drawn.clear()
        complete, failed = self._ended
        for told in body["told"]:
            trial = self._optuna.trial.create_trial(
                state=failed if told["value"] is None else complete,
                value=told["value"],
                params=told["params"],
                distributions=self._space,
                user_attrs={_KEY: told["key"]},
                system_attrs=told["attributes"],
            )
            self._study.add_trial(trial)
