"""`compress`: from a trained model to a compression profile and a smaller model, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from grainwise.calibrate import with_latency
from grainwise.evaluate.calibration import Calibration
from grainwise.evaluate.data import Data
from grainwise.evaluate.measures import Metric
from grainwise.evaluate.sharing import EVERYTHING, Sharing
from grainwise.graph.forward import Forward, default_forward
from grainwise.leaders import aimed, choose
from grainwise.methods.distill import PLAIN_STUDENTS, StudentOptions
from grainwise.plan.choices import Method
from grainwise.plan.profile import CompressionProfile, ProfileError
from grainwise.plan.projection import Projection
from grainwise.plan.space import SpaceKind
from grainwise.plan.target import check_processor
from grainwise.search.driver import BATCH, Budget, Judge, search
from grainwise.search.registry import Given, Table, technique
from grainwise.search.rl import ControllerConfig
from grainwise.search.searcher import Searcher
from grainwise.session import Result, Session
from grainwise.store.studies import Store, StoreError
from grainwise.study.reward import REWARDS, Reward, WithComplexity
from grainwise.study.sensitivity import Sensitivity
from grainwise.study.trial import Trial, best, meets
from grainwise.workers.pool import Inline, Pool
from grainwise.workers.processes import Processes
from grainwise.workers.students import train_students


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How to search. Measured so far: searcher, projection and prior (docs/controller.md)."""

    searcher: str = "rl"
    """A name of `search.registry.TECHNIQUES`: `rl` is the controller."""
    algorithm: Literal["reinforce", "ppo"] = "ppo"
    """Policy-gradient formula of the controller."""
    credit: Literal["terminal", "per_layer"] = "terminal"
    """`per_layer` evaluates after each layer too: a profile then costs as many evaluations as it has entries."""
    projected: bool = True
    """Mask entries that can no longer meet the budgets while a profile is chosen (`rl`, `random`, `evolution`)."""
    prior: bool = True
    """Start at the sensitivity scores, where the searcher knows how to; `additive` and `greedy` need them."""
    reward: str | Reward = "hard_budget"
    """`weighted_product`, `absolute`, `hard_budget`, or a function (measurement, reference, entries) -> float."""
    complexity_weight: float = 0.1
    """Weight of the push towards a mix of techniques; 0 switches it off."""
    space: SpaceKind = SpaceKind.CHAIN
    methods: tuple[Method, ...] = tuple(Method)
    students: StudentOptions = PLAIN_STUDENTS
    """How students of blocks are trained."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown searcher or one that needs a prior and gets none; RuntimeError when a
        package that it needs is not installed.
        """
        if technique(self.searcher).needs_table and not self.prior:
            raise ValueError(f"the searcher {self.searcher} is made of sensitivity scores: leave prior on")

    def to_json(self) -> dict[str, Any]:
        reward = self.reward if isinstance(self.reward, str) else getattr(self.reward, "__qualname__", "function")
        return {**asdict(self), "reward": reward, "methods": [str(m) for m in self.methods], "space": str(self.space)}

    @staticmethod
    def from_json(body: Mapping[str, Any], reward: Reward | None = None) -> SearchOptions:
        """Inverse of `to_json`. reward: the function, where it is one of the user's own.

        Raises ValueError when such a function is not given.
        """
        if reward is None and body["reward"] not in REWARDS:
            raise ValueError(f"the study was begun with a reward of your own, {body['reward']}: give it again")
        methods = tuple(Method(method) for method in body["methods"])
        students = StudentOptions(**body.get("students", {}))  # a study from before there were options has the defaults
        return SearchOptions(
            **{
                **body,
                "reward": reward or body["reward"],
                "methods": methods,
                "students": students,
                "space": SpaceKind(body["space"]),
            }
        )


@dataclass(frozen=True, slots=True)
class Observer:
    """What a person wants to see while it runs; every callback may be left out.

    stage: a stage begins (`trace`, `latency`, `students`, `sensitivity`, `search`, `recover`, `finish`). progress:
    (done, total) of the stage. trial: (trial, best so far) after each trial. stop: asked before each; at True the
    search ends with `Stopped`. step: (done, total, words) after each step of a recovery.
    """

    stage: Callable[[str], None] = field(default=lambda name: None)
    progress: Callable[[int, int], None] = field(default=lambda done, total: None)
    trial: Callable[[Trial, Trial | None], None] = field(default=lambda trial, leader: None)
    stop: Callable[[], bool] = field(default=lambda: False)
    step: Callable[[int, int, str], None] = field(default=lambda done, total, note: None)


SILENT = Observer()


def compress(
    model: nn.Module,
    *,
    data: Data,
    constraints: Mapping[str, float],
    metric: str | Metric = "accuracy",
    target: str = "ort-cpu",
    budget: str | int = 300,
    forward: Forward = default_forward,
    study: str = "default",
    store: str = "sqlite:///grainwise.db",
    resume: bool = False,
    options: SearchOptions = SearchOptions(),
    observer: Observer = SILENT,
    sharing: Sharing = EVERYTHING,
    workers: int | None = None,
    limit_seconds: float | None = None,
    pool: str | None = None,
    address: str | None = None,
) -> Result:
    """Search the compression of each layer of `model` and return the really compressed network.

    constraints: `size`, `macs` and `latency` (batch 1, one thread, this machine) as shares of the uncompressed network,
        (0, 1]; `accuracy_drop`, absolute, is checked on the search split at the end.
    target: `ort-cpu` (ONNX Runtime on this processor), a name of `plan.target.TARGETS`, or `packed` for PyTorch without
        a file. budget: evaluations (`300`) or time (`"20m"`).
    study, store: where trials are kept as they finish. resume: go on with a study that was cut; the same profiles
        follow as in an uncut search. sharing: what is computed once; with a folder, later searches begin warm.
    workers: processes that evaluate, 1 unless given; the same profiles follow with any number of them, but that a study
        begun with more than BATCH has batches of as many.
    pool: `inline`, `processes`, `ray`; by default processes where there are several or a limit. address: of a Ray
        cluster, or `auto`, whose processors all evaluate unless `workers` says otherwise.
    limit_seconds: of one evaluation, which then runs in another process even with one worker: what takes longer three
        times is a failed trial.

    Raises TraceError, DataError, MetricError, Unreachable (no profile can meet the constraints), StoreError, Stopped
    (`Observer.stop`), Infeasible (none was found), or ProcessorError (files for this target would not run right here).
    The model itself is not changed.
    """
    check_processor(target)
    limit = Budget.parse(budget)
    observer.stage("trace")
    session = Session.prepare(
        model,
        data,
        metric=metric,
        forward=forward,
        space=options.space,
        methods=options.methods,
        target=target,
        sharing=sharing,
        students=options.students,
    )
    with closing(Store(store)) as database:
        kept = database.settings(study) if resume else {}
        if "latency" in constraints:
            observer.stage("latency")
            line = Calibration(**kept["line"]) if kept.get("line") else None
            session = with_latency(session, observer.progress, line)
        budgets = kept["budgets"] if resume else session.budgets(constraints)
        session.projection(budgets)  # refused at once where nothing can meet them
        if (workers or 1) > 1 and Method.DISTILL in options.methods and pool in (None, "processes"):
            observer.stage("students")
            train_students(session.evaluator.library, workers or 1)

        def measure(table: Table) -> Sensitivity:
            observer.stage("sensitivity")
            return session.sensitivity(observer.progress, table)

        sensitivity, aim = open_study(
            database,
            study,
            study_settings(session, constraints, budgets, options),
            options,
            measure,
            lambda scores: aimed(session, budgets, scores),
            resume=resume,
            noted={"budget": str(budget), "batch": batch_of(pool, workers, address)},
        )
        observer.stage("search")
        with pool_of(session, pool, workers, limit_seconds, address) as opened:
            trials = search(
                searcher=make_searcher(
                    session, session.projection(budgets, aim), sensitivity, options, limit.evaluations
                ),
                judge=make_judge(session, budgets, options),
                store=database,
                study=study,
                budget=limit,
                observer=watching(observer, database.trials(study), budgets),
                batch=database.settings(study).get("batch", BATCH),  # a study goes on in the batches that it began in
                pool=opened,
                stop=observer.stop,
            )
    observer.stage("finish")
    return session.finish(choose(session, trials, budgets), len(trials))


def watching(observer: Observer, trials: Iterable[Trial], budgets: Mapping[str, float]) -> Callable[[Trial], None]:
    """Tells the observer of each trial and of the best one so far, after those that there are."""
    seen = list(trials)

    def watch(trial: Trial) -> None:
        seen.append(trial)
        observer.trial(trial, best(seen, budgets))

    return watch


def batch_of(pool: str | None, workers: int | None, address: str | None) -> int:
    """Profiles that a new study proposes at a time: one for each worker, and no fewer than one process is given."""
    if pool == "ray" and workers is None:
        from grainwise.workers.cluster import workers_of

        workers = workers_of(address)
    return max(BATCH, workers or 1)


@contextmanager
def pool_of(
    session: Session, kind: str | None, workers: int | None, limit_seconds: float | None, address: str | None
) -> Iterator[Pool]:
    """Where a search evaluates, until it ends. Raises ValueError for an unknown pool, or what it does not take."""
    evaluate = session.evaluator
    alone = workers in (None, 1) and limit_seconds is None
    match kind or ("inline" if alone else "processes"):
        case "inline" if alone and address is None:
            pool: Pool = Inline(evaluate)
        case "inline":
            raise ValueError("the pool inline is this process: it takes no workers, no limit and no address")
        case "processes" if address is None:
            pool = Processes(evaluate, 1 if workers is None else workers, limit_seconds)
        case "processes":
            raise ValueError(f"the pool processes is this machine alone; for {address} give --pool ray")
        case "ray":
            from grainwise.workers.cluster import Cluster

            pool = Cluster(evaluate, workers, limit_seconds, address)
        case other:
            raise ValueError(f"no pool is called {other!r}; give inline, processes or ray")
    try:
        yield pool
    finally:
        pool.close()


def make_reward(session: Session, budgets: Mapping[str, float], options: SearchOptions) -> Reward:
    """The reward that guides the search. Raises ValueError for an unknown name."""
    if isinstance(options.reward, str) and options.reward not in REWARDS:
        raise ValueError(f"no reward is called {options.reward!r}; give one of {', '.join(REWARDS)} or a function")
    reward = REWARDS[options.reward](budgets) if isinstance(options.reward, str) else options.reward
    if options.complexity_weight:
        return WithComplexity(reward, session.space.graph, options.complexity_weight)
    return reward


def make_judge(session: Session, budgets: Mapping[str, float], options: SearchOptions) -> Judge:
    """What a profile's outcome is worth. Raises ValueError for an unknown reward."""
    evaluator, reward = session.evaluator, make_reward(session, budgets, options)
    per_layer = options.credit == "per_layer" and options.searcher == "rl"
    return Judge(evaluator, reward, evaluator.reference, session.space.graph, per_layer)


def make_searcher(
    session: Session,
    projection: Projection,
    sensitivity: Sensitivity | None,
    options: SearchOptions,
    evaluations: int | None = None,
) -> Searcher:
    """The searcher that the options name; `evaluations` are expected, when that is known."""
    config = ControllerConfig(
        algorithm=options.algorithm,
        credit=options.credit,
        use_prior=options.prior,
        projected=options.projected,
        horizon=evaluations or ControllerConfig().horizon,
    )
    given = Given(projection, session.features, sensitivity, options.seed, config)
    return technique(options.searcher).make(given)


def apply_profile(profile: CompressionProfile, session: Session) -> Result:
    """Build what a profile asks for. Raises ProfileError when it was made for other weights or asks for what the
    network cannot take.
    """
    if profile.target != session.reference.target.name:
        raise ProfileError(f"the profile is for the target {profile.target}, not {session.reference.target.name}")
    if profile.model and profile.model != session.model_fingerprint:
        raise ProfileError("the profile was made for other weights than this network has")
    try:
        return session.finish(profile.entries, int(profile.metrics.get("trials", 0)))
    except ValueError as error:
        raise ProfileError(str(error)) from error


def missed(result: Result, constraints: Mapping[str, float]) -> str | None:
    """What constraint the result misses, in words, or None."""
    drop = result.reference.metric - result.measurement.metric
    if "accuracy_drop" in constraints and drop > constraints["accuracy_drop"]:
        return f"the metric drops by {drop:.4f} on the search split, more than {constraints['accuracy_drop']:.4f}"
    ratio = result.deployed.get("latency_ratio")
    if "latency" in constraints and isinstance(ratio, float) and ratio > constraints["latency"]:
        return f"the file takes {ratio:.3f} of the uncompressed file's time, more than {constraints['latency']}"
    budgets = result.session.budgets(constraints)
    return None if meets(result.measurement, budgets) else f"{result.measurement} exceeds {budgets}"


def open_study(
    database: Store,
    study: str,
    settings: Mapping[str, Any],
    options: SearchOptions,
    measure: Callable[[Table], Sensitivity],
    aim: Callable[[Sensitivity | None], float],
    *,
    resume: bool,
    noted: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Sensitivity | None, float]:
    """Create the study, or check that the one to go on with is the same search; returns the scores it starts from and
    what share of a latency budget it aims at (`aimed`), both kept with it or measured now. noted: kept with a new study
    for people and `grainwise resume`; it may be another one when the study goes on.
    """
    if resume:
        kept = database.settings(study)
        scores = kept.pop("sensitivity")
        for name, value in settings.items():
            if kept[name] != value:
                raise StoreError(f"study {study!r} was begun with another {name}: {kept[name]}, not {value}")
        return None if scores is None else Sensitivity.from_json(scores), kept["aim"]
    if study in database.studies():
        raise StoreError(f"the store {database.url} has a study {study!r} already; resume it or give another name")
    table = technique(options.searcher).table if options.prior else None
    sensitivity = None if table is None else measure(table)
    share, scores = aim(sensitivity), None if sensitivity is None else sensitivity.to_json()
    database.create(study, {**settings, **noted, "aim": share, "sensitivity": scores})
    return sensitivity, share


def study_settings(
    session: Session, constraints: Mapping[str, float], budgets: Mapping[str, float], options: SearchOptions
) -> dict[str, Any]:
    """What a study is a search of. Milliseconds differ from run to run, so the budgets and the line that predicts them
    are kept with it: a search that goes on must make the same proposals.
    """
    return {
        "model": session.model_fingerprint,
        "target": session.reference.target.name,
        "data": session.splits.fingerprint,
        "constraints": dict(constraints),
        "options": options.to_json(),
        "budgets": dict(budgets),
        "line": None if session.line is None else asdict(session.line),
    }
