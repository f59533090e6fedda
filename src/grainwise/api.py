"""`compress`: from a trained model to a compression profile and a smaller model, in one call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from grainwise.evaluate.data import Data, Splits, take
from grainwise.evaluate.evaluator import outputs_of, targets_of
from grainwise.evaluate.measures import Metric, checked, resolve_metric
from grainwise.export.artefact import ArtefactError, load
from grainwise.export.weights import weights_bytes
from grainwise.graph.forward import Forward, default_forward
from grainwise.graph.recording import record
from grainwise.plan.choices import Entry, Method
from grainwise.plan.profile import CompressionProfile, ProfileError
from grainwise.plan.projection import Projection
from grainwise.plan.space import SpaceKind
from grainwise.realise.reference import channels_last
from grainwise.search.baselines import EvolutionSearcher, RandomSearcher
from grainwise.search.driver import Budget, Judge, search
from grainwise.search.prior import Prior
from grainwise.search.rl import ControllerConfig, ControllerSearcher
from grainwise.search.searcher import Searcher
from grainwise.session import Result, Session
from grainwise.store.studies import Store, StoreError
from grainwise.study.measurement import Failure
from grainwise.study.reward import REWARDS, Reward, WithComplexity
from grainwise.study.sensitivity import Sensitivity
from grainwise.study.trial import Trial, best, meets

LEADERS = 5  # candidates that are built for deployment before one is chosen


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How to search. Measured so far: searcher, projection and prior (docs/controller.md)."""

    searcher: Literal["rl", "random", "evolution"] = "rl"
    algorithm: Literal["reinforce", "ppo"] = "ppo"
    """Policy-gradient formula of the controller."""
    credit: Literal["terminal", "per_layer"] = "terminal"
    """`per_layer` evaluates after each layer too: a profile then costs as many evaluations as it has entries."""
    projected: bool = True
    """Mask entries that can no longer meet the budgets while a profile is chosen."""
    prior: bool = True
    """Start at the sensitivity scores."""
    reward: str | Reward = "hard_budget"
    """`weighted_product`, `absolute`, `hard_budget`, or a function (measurement, reference, entries) -> float."""
    complexity_weight: float = 0.1
    """Weight of the push towards a mix of techniques; 0 switches it off."""
    space: SpaceKind = SpaceKind.CHAIN
    methods: tuple[Method, ...] = tuple(Method)
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        reward = self.reward if isinstance(self.reward, str) else getattr(self.reward, "__qualname__", "function")
        return {**asdict(self), "reward": reward, "methods": [str(m) for m in self.methods], "space": str(self.space)}


@dataclass(frozen=True, slots=True)
class Observer:
    """What a person wants to see while it runs; every callback may be left out.

    stage: a stage begins (`trace`, `sensitivity`, `search`, `finish`). progress: (done, total) of the stage.
    trial: (trial, best so far) after each trial.
    """

    stage: Callable[[str], None] = field(default=lambda name: None)
    progress: Callable[[int, int], None] = field(default=lambda done, total: None)
    trial: Callable[[Trial, Trial | None], None] = field(default=lambda trial, leader: None)


class Infeasible(RuntimeError):
    """The search ended without a profile that meets the budgets."""


def compress(
    model: nn.Module,
    *,
    data: Data,
    constraints: Mapping[str, float],
    metric: str | Metric = "accuracy",
    budget: str | int = 300,
    forward: Forward = default_forward,
    study: str = "default",
    store: str = "sqlite:///grainwise.db",
    resume: bool = False,
    options: SearchOptions = SearchOptions(),
    observer: Observer = Observer(),
) -> Result:
    """Search the compression of each layer of `model` and return the really compressed network.

    constraints: `size` and `macs` as shares of the uncompressed network, (0, 1]; `accuracy_drop`, absolute, is checked
        on the search split at the end. budget: evaluations (`300`) or time (`"20m"`).
    study, store: where trials are kept as they finish. resume: go on with a study that was cut; the same profiles
        follow as in an uncut search.

    Raises TraceError, DataError, MetricError, Unreachable (no profile can meet the constraints), StoreError, or
    Infeasible (none was found). The model itself is not changed.
    """
    observer.stage("trace")
    session = Session.prepare(model, data, metric=metric, forward=forward, space=options.space, methods=options.methods)
    budgets = session.budgets(constraints)
    projection = Projection(session.cost, budgets)
    limit = Budget.parse(budget)
    database = Store(store)
    try:
        sensitivity = _open_study(database, study, session, constraints, options, observer, resume=resume)
        searcher = make_searcher(session, projection, sensitivity, options, limit.evaluations)
        judge = Judge(
            session.evaluator,
            make_reward(session, budgets, options),
            session.evaluator.reference,
            session.space.graph,
            per_layer=options.credit == "per_layer" and options.searcher == "rl",
        )
        observer.stage("search")
        seen: list[Trial] = list(database.trials(study))

        def watch(trial: Trial) -> None:
            seen.append(trial)
            observer.trial(trial, best(seen, budgets))

        trials = search(searcher=searcher, judge=judge, store=database, study=study, budget=limit, observer=watch)
    finally:
        database.close()
    observer.stage("finish")
    return session.finish(choose(session, trials, budgets), len(trials))


def make_reward(session: Session, budgets: Mapping[str, float], options: SearchOptions) -> Reward:
    """The reward that guides the search. Raises ValueError for an unknown name."""
    if isinstance(options.reward, str) and options.reward not in REWARDS:
        raise ValueError(f"no reward is called {options.reward!r}; give one of {', '.join(REWARDS)} or a function")
    reward = REWARDS[options.reward](budgets) if isinstance(options.reward, str) else options.reward
    if options.complexity_weight:
        return WithComplexity(reward, session.space.graph, options.complexity_weight)
    return reward


def make_searcher(
    session: Session,
    projection: Projection,
    sensitivity: Sensitivity | None,
    options: SearchOptions,
    evaluations: int | None = None,
) -> Searcher:
    """The searcher that the options name; `evaluations` are expected, when that is known."""
    match options.searcher:
        case "rl":
            config = ControllerConfig(
                algorithm=options.algorithm,
                credit=options.credit,
                use_prior=options.prior,
                projected=options.projected,
                horizon=evaluations or ControllerConfig().horizon,
            )
            return ControllerSearcher(projection, session.features(), sensitivity, seed=options.seed, config=config)
        case "random":
            return RandomSearcher(projection, projected=options.projected, seed=options.seed)
        case "evolution":
            prior = None if sensitivity is None else Prior(projection, sensitivity)
            return EvolutionSearcher(projection, projected=options.projected, prior=prior, seed=options.seed)
    raise ValueError(f"no searcher is called {options.searcher!r}; give rl, random or evolution")


def choose(session: Session, trials: Iterable[Trial], budgets: Mapping[str, float]) -> dict[str, Entry]:
    """The entries to deploy: of the leading trials the one whose deployed form diverges least. Raises Infeasible."""
    pool, leaders = list(trials), list[Trial]()
    while len(leaders) < LEADERS and (leader := best(pool, budgets)) is not None:
        leaders.append(leader)
        pool = [trial for trial in pool if trial.entries != leader.entries]
    if not leaders:
        raise Infeasible(
            f"none of {len(pool)} trials met the budgets {dict(budgets)}; allow more evaluations or a looser constraint"
            + next(
                (f" (first failure, at {f.stage}: {f.reason})" for t in pool if isinstance(f := t.outcome, Failure)), ""
            )
        )
    finished = [(session.evaluator.finish(leader.entries)[1].divergence, leader.number) for leader in leaders]
    return dict(next(leader.entries for leader in leaders if leader.number == min(finished)[1]))


def apply_profile(profile: CompressionProfile, session: Session) -> Result:
    """Build what a profile asks for. Raises ProfileError when it was made for other weights or asks for what the
    network cannot take.
    """
    if profile.model and profile.model != session.model_fingerprint:
        raise ProfileError("the profile was made for other weights than this network has")
    try:
        return session.finish(profile.entries, int(profile.metrics.get("trials", 0)))
    except ValueError as error:
        raise ProfileError(str(error)) from error


def verify_artefact(
    directory: str | Path,
    model: nn.Module,
    data: Data,
    *,
    metric: str | Metric = "accuracy",
    forward: Forward = default_forward,
) -> dict[str, float | int | str | None]:
    """Reload an artefact and measure it anew: every figure is computed from the files, the model and the data.

    Raises ArtefactError when a file is damaged, does not fit the model, or its size is not what the search claimed.
    """
    found = load(directory, model)
    claimed = found.manifest.figures
    if claimed.get("size_bytes") != found.weights_bytes:
        raise ArtefactError(
            f"{directory} claims {claimed.get('size_bytes')} bytes of weights, the file has {found.weights_bytes}"
        )
    splits = Splits.read(data)
    score = resolve_metric(metric)
    example = take(splits.test, 1)[0].inputs
    figures: dict[str, float | int | str | None] = {}
    for prefix, network in (("", found.model), ("reference_", copy.deepcopy(model).eval())):
        outputs = outputs_of(channels_last(network), splits.test, forward)
        figures[f"{prefix}accuracy"] = checked(score, outputs, targets_of(splits.test))
        figures[f"{prefix}macs"] = record(network, example, forward).macs
    return {
        **figures,
        "size_bytes": found.weights_bytes,
        "reference_size_bytes": weights_bytes(model),
        "trials": claimed.get("trials"),
        "claimed_accuracy": claimed.get("accuracy"),
        "claimed_macs": claimed.get("macs"),
    }


def missed(result: Result, constraints: Mapping[str, float]) -> str | None:
    """What constraint the result misses, in words, or None."""
    drop = result.reference.metric - result.measurement.metric
    if "accuracy_drop" in constraints and drop > constraints["accuracy_drop"]:
        return f"the metric drops by {drop:.4f} on the search split, more than {constraints['accuracy_drop']:.4f}"
    budgets = result.session.budgets(constraints)
    return None if meets(result.measurement, budgets) else f"{result.measurement} exceeds {budgets}"


def _open_study(
    database: Store,
    study: str,
    session: Session,
    constraints: Mapping[str, float],
    options: SearchOptions,
    observer: Observer,
    *,
    resume: bool,
) -> Sensitivity | None:
    """Create the study, or check that the one to go on with is the same search; returns its sensitivity scores."""
    settings: dict[str, Any] = {
        "model": session.model_fingerprint,
        "data": session.splits.fingerprint,
        "constraints": dict(constraints),
        "budgets": session.budgets(constraints),
        "options": options.to_json(),
    }
    if resume:
        kept = database.settings(study)
        scores = kept.pop("sensitivity")
        for name, value in settings.items():
            if kept[name] != value:
                raise StoreError(f"study {study!r} was begun with another {name}: {kept[name]}, not {value}")
        return None if scores is None else Sensitivity.from_json(scores)
    if study in database.studies():
        raise StoreError(f"the store {database.url} has a study {study!r} already; resume it or give another name")
    sensitivity = None
    if options.prior:
        observer.stage("sensitivity")
        sensitivity = session.sensitivity(observer.progress)
    scores = None if sensitivity is None else sensitivity.to_json()
    database.create(study, {**settings, "sensitivity": scores})
    return sensitivity
