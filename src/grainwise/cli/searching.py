"""Commands that search."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from grainwise.cli.options import (
    AddressOption,
    DataOption,
    ForwardOption,
    JsonOption,
    LimitOption,
    MetricOption,
    ModelOption,
    PoolOption,
    StoreOption,
    StudyOption,
    TargetOption,
    ThreadsOption,
    WorkersOption,
    factory,
    hooks,
    prepared,
    read_network,
)
from grainwise.cli.speaking import plain_errors, print_json, this_command
from grainwise.interrupt import stop_flag

if TYPE_CHECKING:
    from grainwise.report.progress import LiveProgress
    from grainwise.session import Result


@dataclass(frozen=True, slots=True)
class _Run:
    """What `search` and `resume` have in common; every field is a word of the command line."""

    study: str
    store: str
    model: str
    data: str
    metric: str
    forward: str | None
    workers: int | None
    pool: str | None
    address: str | None
    limit: float | None
    threads: int | None
    out: Path | None
    as_json: bool

    def again(self, own: Mapping[str, str]) -> str:
        """The command that goes on with this run. own: options that are `resume`'s alone."""
        words = {"--model": self.model, "--data": self.data, "--store": self.store, **own}
        words |= {} if self.metric == "accuracy" else {"--metric": self.metric}
        words |= {"--forward": self.forward} if self.forward else {}
        words |= {"--threads": str(self.threads)} if self.threads else {}
        words |= {"--workers": str(self.workers)} if self.workers else {}
        words |= {"--pool": self.pool} if self.pool else {}
        words |= {"--address": self.address} if self.address else {}
        words |= {"--limit": f"{self.limit:g}"} if self.limit is not None else {}
        words |= {"--out": str(self.out)} if self.out else {}
        return shlex.join(["grainwise", "resume", self.study, *(part for pair in words.items() for part in pair)])

    def go(self, order: Callable[[], dict[str, Any]], own: Mapping[str, str]) -> None:
        """Search as `order` says, which gives further arguments of `compress`; show and write the result."""
        stages: list[str] = []
        with (
            stop_flag(working=False) as flag,
            plain_errors(lambda: self.again(own) if "search" in stages else this_command()),
        ):
            from grainwise.report.progress import LiveProgress

            arguments = order()
            budget = arguments["budget"]
            with LiveProgress(int(budget) if budget.isdigit() else None) as live:

                def stage(name: str) -> None:
                    stages.append(name)
                    flag.working = name == "search"
                    live.stage(name)

                result = self._compress(live, stage, flag.stop, arguments)
            _show(result, arguments["constraints"], self.out, self.as_json)

    def _compress(
        self, live: LiveProgress, stage: Callable[[str], None], stop: Callable[[], bool], arguments: Mapping[str, Any]
    ) -> Result:
        from grainwise.api import Observer, compress
        from grainwise.evaluate.kernels import cache_folder
        from grainwise.evaluate.sharing import Sharing

        several = (self.workers or 1) > 1 or self.pool == "ray"
        network, loaded = read_network(self.model, self.data, self.threads or (1 if several else None))
        return compress(
            network,
            data=loaded,
            study=self.study,
            store=self.store,
            observer=Observer(stage, live.progress, live.trial, stop),
            sharing=Sharing(folder=cache_folder() / "variants"),
            workers=self.workers,
            limit_seconds=self.limit,
            pool=self.pool,
            address=self.address,
            **arguments,
            **hooks(self.metric, self.forward),
        )


def search(
    model: ModelOption,
    data: DataOption,
    size: Annotated[float | None, typer.Option(help="bytes of the file, as a share of the uncompressed one")] = None,
    macs: Annotated[float | None, typer.Option(help="multiply-accumulates, as a share")] = None,
    latency: Annotated[float | None, typer.Option(help="milliseconds at batch 1 on this machine, as a share")] = None,
    accuracy_drop: Annotated[float | None, typer.Option(help="largest drop of the metric on the search split")] = None,
    budget: Annotated[str, typer.Option(help="evaluations (300) or a time (20m)")] = "300",
    out: Annotated[Path | None, typer.Option(help="directory for the artefact")] = None,
    metric: MetricOption = "accuracy",
    forward: ForwardOption = None,
    target: TargetOption = "ort-cpu",
    searcher: Annotated[str, typer.Option(help="rl (the controller), or a name that compare knows")] = "rl",
    algorithm: Annotated[str, typer.Option(help="ppo or reinforce")] = "ppo",
    credit: Annotated[str, typer.Option(help="terminal or per_layer")] = "terminal",
    reward: Annotated[
        str, typer.Option(help="hard_budget, weighted_product, absolute, or module:function")
    ] = "hard_budget",
    complexity_weight: Annotated[float, typer.Option(help="push towards a mix of techniques")] = 0.1,
    space: Annotated[str, typer.Option(help="chain or single")] = "chain",
    student_steps: Annotated[int, typer.Option(help="training steps of a block's student")] = 60,
    student_loss: Annotated[str, typer.Option(help="squared or absolute")] = "squared",
    seed: int = 0,
    study: StudyOption = "default",
    store: StoreOption = "sqlite:///grainwise.db",
    workers: WorkersOption = None,
    pool: PoolOption = None,
    address: AddressOption = None,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search the compression of each layer, build the best profile, and write the artefact."""
    wanted = {"size": size, "macs": macs, "latency": latency, "accuracy_drop": accuracy_drop}

    def order() -> dict[str, Any]:
        from grainwise.api import SearchOptions
        from grainwise.methods.distill import StudentOptions
        from grainwise.plan.space import SpaceKind

        options = SearchOptions(
            searcher=searcher,
            algorithm=algorithm,  # type: ignore[arg-type]  # checked by SearchOptions
            credit=credit,  # type: ignore[arg-type]
            reward=factory(reward, "the reward") if ":" in reward else reward,
            complexity_weight=complexity_weight,
            space=SpaceKind(space),
            students=StudentOptions(student_steps, student_loss),
            seed=seed,
        )
        constraints = {name: share for name, share in wanted.items() if share is not None}
        return {"constraints": constraints, "target": target, "budget": budget, "options": options, "resume": False}

    own = {"--reward": reward} if ":" in reward else {}
    _Run(study, store, model, data, metric, forward, workers, pool, address, limit, threads, out, as_json).go(
        order, own
    )


def resume(
    study: Annotated[str, typer.Argument(help="name of the study")],
    model: ModelOption,
    data: DataOption,
    budget: Annotated[str | None, typer.Option(help="another one than the search was begun with")] = None,
    out: Annotated[Path | None, typer.Option(help="directory for the artefact")] = None,
    metric: MetricOption = "accuracy",
    forward: ForwardOption = None,
    reward: Annotated[str | None, typer.Option(help="module:function, when the search was begun with one")] = None,
    store: StoreOption = "sqlite:///grainwise.db",
    workers: WorkersOption = None,
    pool: PoolOption = None,
    address: AddressOption = None,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Go on with a search that was cut, to the same profiles; the model and the data are given again, never stored."""

    def order() -> dict[str, Any]:
        from grainwise.api import SearchOptions
        from grainwise.store.studies import Store

        with closing(Store(store, create=False)) as opened:
            kept = opened.settings(study)
        if budget is None and "budget" not in kept:
            raise ValueError(f"study {study!r} does not say how long it was to be: give --budget")
        options = SearchOptions.from_json(kept["options"], factory(reward, "the reward") if reward else None)
        settings = {"constraints": kept["constraints"], "target": kept["target"], "budget": budget or kept["budget"]}
        return {**settings, "options": options, "resume": True}

    own = {name: word for name, word in (("--reward", reward), ("--budget", budget)) if word is not None}
    _Run(study, store, model, data, metric, forward, workers, pool, address, limit, threads, out, as_json).go(
        order, own
    )


def _show(result: Result, constraints: dict[str, float], out: Path | None, as_json: bool) -> None:
    """Write the artefact; show the figures and, if so, which constraint is missed."""
    from grainwise.api import missed
    from grainwise.report.tables import show_figures

    if out is not None:
        result.export(out)
    complaint = missed(result, constraints)
    if as_json:
        print_json({**result.figures(), "missed": complaint, "profile": json.loads(result.profile.to_json())})
        return
    show_figures(result.figures(), Console())
    if out is not None:
        typer.echo(f"artefact: {out}")
    if complaint:
        typer.echo(f"constraint missed: {complaint}")


def compare(
    model: ModelOption,
    data: DataOption,
    searchers: Annotated[
        list[str], typer.Option("--searcher", help="a name, or several times; an unknown one lists all")
    ],
    size: Annotated[float | None, typer.Option(help="bytes of the file, as a share of the uncompressed one")] = None,
    macs: Annotated[float | None, typer.Option(help="multiply-accumulates, as a share")] = None,
    latency: Annotated[float | None, typer.Option(help="milliseconds at batch 1 on this machine, as a share")] = None,
    evaluations: Annotated[int, typer.Option(help="of each run")] = 300,
    seeds: Annotated[int, typer.Option(help="runs of each searcher: seeds 0, 1, ...")] = 3,
    plot: Annotated[Path | None, typer.Option(help="write the curves to this SVG file")] = None,
    metric: MetricOption = "accuracy",
    forward: ForwardOption = None,
    target: TargetOption = "ort-cpu",
    space: Annotated[str, typer.Option(help="chain or single")] = "chain",
    study: Annotated[str, typer.Option(help="the runs are studies whose names begin with this")] = "compare",
    store: StoreOption = "sqlite:///grainwise.db",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run searchers at equal evaluations over seeds; the same command goes on where it was cut."""
    from grainwise.plan.space import SpaceKind
    from grainwise.report.comparison import curves, show_comparison, summary
    from grainwise.report.plot import plot as draw
    from grainwise.report.progress import LiveProgress

    with plain_errors(this_command):
        from dataclasses import replace

        from grainwise.api import Observer
        from grainwise.compare import OPTIONS
        from grainwise.compare import compare as run
        from grainwise.evaluate.sharing import Sharing
        from grainwise.search.registry import technique
        from grainwise.store.studies import Store

        for name in searchers:
            technique(name)
        wanted = {"size": size, "macs": macs, "latency": latency}
        constraints = {name: share for name, share in wanted.items() if share is not None}
        apart = Sharing(measurements=False)  # each run pays for its own evaluations
        session = prepared(model, data, metric, forward, threads, space=space, target=target, sharing=apart)
        with LiveProgress(evaluations) as live, closing(Store(store)) as opened:
            body = run(
                session,
                searchers=searchers,
                seeds=range(seeds),
                evaluations=evaluations,
                constraints=constraints,
                store=opened,
                study=study,
                options=replace(OPTIONS, space=SpaceKind(space)),
                observer=Observer(live.stage, live.progress, live.trial),
            )
        if plot is not None:
            panels = {"best divergence, nats": (curves(body, "divergence"), True)}
            panels["its metric on the search split"] = curves(body, "metric"), False
            plot.write_text(draw(panels), encoding="utf-8")
        if as_json:
            print_json({"summary": summary(body), **body})
        else:
            show_comparison(body, Console())


def best(
    study: StudyOption = "default",
    store: StoreOption = "sqlite:///grainwise.db",
    out: Annotated[Path | None, typer.Option(help="write the profile to this file")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the best profile of a study so far (by divergence, within the budgets), from the store alone."""
    from grainwise.store.studies import Store
    from grainwise.study.trial import best as best_trial

    with plain_errors(), closing(Store(store, create=False)) as database:
        settings, trials = database.settings(study), database.trials(study)
        leader = best_trial(trials, settings["budgets"])
        if leader is None or leader.measurement is None:
            raise RuntimeError(
                f"none of the {len(trials)} trials of study {study!r} meets the budgets {settings['budgets']}"
            )
        profile = _stored_profile(settings, leader)
        if out is not None:
            profile.save(out)
        if as_json:
            figures = {"trial": leader.number, "trials": len(trials), **leader.measurement.to_json()}
            print_json({**figures, "profile": json.loads(profile.to_json())})
        else:
            console = Console()
            console.print(f"trial {leader.number} of {len(trials)}: {leader.measurement}")
            for layer, entry in profile.entries.items():
                console.print(f"  {layer}: {entry}", highlight=False)


def _stored_profile(settings: dict[str, Any], leader: Any) -> Any:
    from grainwise.plan.choices import UNCOMPRESSED
    from grainwise.plan.profile import CompressionProfile
    from grainwise.plan.space import SpaceKind

    entries = {name: entry for name, entry in leader.entries.items() if entry != UNCOMPRESSED}
    kind = SpaceKind(settings["options"]["space"])
    metrics = {name: float(value) for name, value in leader.measurement.to_json().items()}
    return CompressionProfile(
        entries, settings["model"], settings["data"], target=settings["target"], space=kind, metrics=metrics
    )
