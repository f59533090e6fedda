"""The command line: one function a command, heavy imports inside."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from grainwise.session import Result, Session

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learn which compression each layer of a trained PyTorch network takes, and apply it for real.",
)

ModelOption = Annotated[str, typer.Option("--model", help="module:function that returns the trained network")]
DataOption = Annotated[str, typer.Option("--data", help="module:function that returns a grainwise.Data")]
MetricOption = Annotated[str, typer.Option(help="accuracy, or module:function (outputs, targets) -> float")]
ForwardOption = Annotated[str | None, typer.Option(help="module:function (model, inputs) -> outputs")]
TargetOption = Annotated[
    str, typer.Option(help="ort-cpu, ort-cpu-avx2, ort-cpu-vnni, ort-cpu-float (size only), or packed (no file)")
]
StudyOption = Annotated[str, typer.Option(help="name of the study")]
StoreOption = Annotated[str, typer.Option(help="URL of the store")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON on standard output")]
WorkersOption = Annotated[int, typer.Option(min=1, help="processes that evaluate, with one thread each if several")]
LimitOption = Annotated[float | None, typer.Option("--limit", help="seconds that one evaluation may take")]
ThreadsOption = Annotated[int | None, typer.Option(help="threads that torch uses; its own default otherwise")]


def _factory(path: str, what: str) -> Callable[..., Any]:
    """The function that `module:function` names; only ever a word of the command line."""
    module, _, function = path.partition(":")
    if not module or not function:
        raise typer.BadParameter(f"{what} is given as module:function, got {path!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(f"{what} {path!r} cannot be imported: {error}") from error
    if not callable(found):
        raise typer.BadParameter(f"{what} {path!r} is no function")
    return found  # type: ignore[no-any-return]


@contextmanager
def _plain_errors(resume: Callable[[], str] = str, kept: str = "every finished trial is kept") -> Iterator[None]:
    """Expected errors become one sentence and exit code 1; Ctrl-C tells how to go on and exits with 130."""
    try:
        yield
    except KeyboardInterrupt:
        command = resume()
        _stop(f"stopped; {kept}{command and f'. Go on with:{chr(10)}  {command}'}", 130)
    except (ValueError, RuntimeError, OSError, TypeError, ImportError) as error:
        _stop(f"error: {error}", 1)


def _note(message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


def _stop(message: str, code: int) -> None:
    _note(message)
    raise typer.Exit(code)


def _print_json(body: Any) -> None:
    typer.echo(json.dumps(body, indent=2, allow_nan=False))


def _session(
    model: str, data: str, metric: str, forward: str | None, threads: int | None = None, **options: Any
) -> Session:
    import torch

    from grainwise.session import Session

    if threads:
        torch.set_num_threads(threads)
    return Session.prepare(
        _factory(model, "the model")(), _factory(data, "the data")(), **_hooks(metric, forward), **options
    )


def _hooks(metric: str, forward: str | None) -> dict[str, Any]:
    hooks: dict[str, Any] = {"metric": _factory(metric, "the metric") if ":" in metric else metric}
    if forward:
        hooks["forward"] = _factory(forward, "the forward")
    return hooks


@app.command()
def inspect(
    model: ModelOption,
    data: DataOption,
    metric: MetricOption = "accuracy",
    forward: ForwardOption = None,
    space: Annotated[str, typer.Option(help="chain or single")] = "chain",
    target: TargetOption = "ort-cpu",
    as_json: JsonOption = False,
) -> None:
    """Show layers, weights, MACs, feature-map statistics, legal choices, and why the others are not."""
    from grainwise.report.tables import inspection, show_inspection

    with _plain_errors():
        session = _session(model, data, metric, forward, space=space, target=target)
        facts = inspection(session.space, session.statistics().tolist(), session.reference.target)
        if as_json:
            _print_json(facts)
        else:
            show_inspection(facts, Console())


@app.command()
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
    seed: int = 0,
    study: StudyOption = "default",
    store: StoreOption = "sqlite:///grainwise.db",
    workers: WorkersOption = 1,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search the compression of each layer, build the best profile, and write the artefact."""
    wanted = {"size": size, "macs": macs, "latency": latency, "accuracy_drop": accuracy_drop}

    def order() -> dict[str, Any]:
        from grainwise.api import SearchOptions
        from grainwise.plan.space import SpaceKind

        options = SearchOptions(
            searcher=searcher,
            algorithm=algorithm,  # type: ignore[arg-type]  # checked by SearchOptions
            credit=credit,  # type: ignore[arg-type]
            reward=_factory(reward, "the reward") if ":" in reward else reward,
            complexity_weight=complexity_weight,
            space=SpaceKind(space),
            seed=seed,
        )
        constraints = {name: share for name, share in wanted.items() if share is not None}
        return {"constraints": constraints, "target": target, "budget": budget, "options": options, "resume": False}

    own = {"--reward": reward} if ":" in reward else {}
    _searched(order, study, store, model, data, metric, forward, workers, limit, threads, out, as_json, own)


@app.command()
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
    workers: WorkersOption = 1,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Go on with a search that was cut, to the same profiles; the model and the data are given again, never stored."""

    def order() -> dict[str, Any]:
        from grainwise.api import SearchOptions
        from grainwise.store.studies import Store

        kept = Store(store, create=False).settings(study)
        if budget is None and "budget" not in kept:
            raise ValueError(f"study {study!r} does not say how long it was to be: give --budget")
        options = SearchOptions.from_json(kept["options"], _factory(reward, "the reward") if reward else None)
        settings = {"constraints": kept["constraints"], "target": kept["target"], "budget": budget or kept["budget"]}
        return {**settings, "options": options, "resume": True}

    own = {name: word for name, word in (("--reward", reward), ("--budget", budget)) if word is not None}
    _searched(order, study, store, model, data, metric, forward, workers, limit, threads, out, as_json, own)


def _searched(
    order: Callable[[], dict[str, Any]],
    study: str,
    store: str,
    model: str,
    data: str,
    metric: str,
    forward: str | None,
    workers: int,
    limit: float | None,
    threads: int | None,
    out: Path | None,
    as_json: bool,
    own: dict[str, str],
) -> None:
    """Run the search that `order` gives the arguments of, show and write its result. own: further words with which it
    goes on after Ctrl-C.
    """
    from grainwise.interrupt import interrupts

    words = {"--model": model, "--data": data, "--store": store, **own}
    words |= {} if metric == "accuracy" else {"--metric": metric}
    words |= {"--forward": forward} if forward else {}
    words |= {"--threads": str(threads)} if threads else {}
    words |= {"--workers": str(workers)} if workers > 1 else {}
    words |= {"--limit": f"{limit:g}"} if limit is not None else {}
    words |= {"--out": str(out)} if out else {}
    again = shlex.join(["grainwise", "resume", study, *(part for pair in words.items() for part in pair)])
    stages: list[str] = []
    with interrupts() as received, _plain_errors(lambda: again if "search" in stages else _this_command()):
        import torch

        from grainwise.api import Observer, compress
        from grainwise.evaluate.kernels import cache_folder
        from grainwise.evaluate.sharing import Sharing
        from grainwise.report.progress import LiveProgress
        from grainwise.search.driver import Stopped

        if threads or workers > 1:
            torch.set_num_threads(threads or 1)
        ordered, network, loaded = order(), _factory(model, "the model")(), _factory(data, "the data")()
        budget = ordered["budget"]
        with LiveProgress(int(budget) if budget.isdigit() else None) as live:

            def stage(name: str) -> None:
                stages.append(name)
                received.searching = name == "search"
                live.stage(name)

            try:
                result = compress(
                    network,
                    data=loaded,
                    study=study,
                    store=store,
                    observer=Observer(stage, live.progress, live.trial, received.stop),
                    sharing=Sharing(folder=cache_folder() / "variants"),
                    workers=workers,
                    limit_seconds=limit,
                    **ordered,
                    **_hooks(metric, forward),
                )
            except Stopped as stopped:
                raise KeyboardInterrupt from stopped
        _show(result, ordered["constraints"], out, as_json)


def _show(result: Result, constraints: dict[str, float], out: Path | None, as_json: bool) -> None:
    """Write the artefact; show the figures and, if so, which constraint is missed."""
    from grainwise.api import missed
    from grainwise.report.tables import show_figures

    if out is not None:
        result.export(out)
    complaint = missed(result, constraints)
    if as_json:
        _print_json({**result.figures(), "missed": complaint, "profile": json.loads(result.profile.to_json())})
        return
    show_figures(result.figures(), Console())
    if out is not None:
        typer.echo(f"artefact: {out}")
    if complaint:
        typer.echo(f"constraint missed: {complaint}")


def _this_command() -> str:
    return shlex.join(["grainwise", *sys.argv[1:]])


@app.command()
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

    with _plain_errors(_this_command):
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
        session = _session(model, data, metric, forward, threads, space=space, target=target, sharing=apart)
        with LiveProgress(evaluations) as live:
            body = run(
                session,
                searchers=searchers,
                seeds=range(seeds),
                evaluations=evaluations,
                constraints=constraints,
                store=Store(store),
                study=study,
                options=replace(OPTIONS, space=SpaceKind(space)),
                observer=Observer(live.stage, live.progress, live.trial),
            )
        if plot is not None:
            panels = {"best divergence, nats": (curves(body, "divergence"), True)}
            panels["its metric on the search split"] = curves(body, "metric"), False
            plot.write_text(draw(panels), encoding="utf-8")
        if as_json:
            _print_json({"summary": summary(body), **body})
        else:
            show_comparison(body, Console())


@app.command()
def best(
    study: StudyOption = "default",
    store: StoreOption = "sqlite:///grainwise.db",
    out: Annotated[Path | None, typer.Option(help="write the profile to this file")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the best profile of a study so far (by divergence, within the budgets), from the store alone."""
    from grainwise.store.studies import Store
    from grainwise.study.trial import best as best_trial

    with _plain_errors():
        database = Store(store, create=False)
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
            _print_json({**figures, "profile": json.loads(profile.to_json())})
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


@app.command()
def apply(
    profile: Annotated[Path, typer.Argument(help="profile.json")],
    model: ModelOption,
    data: DataOption,
    out: Annotated[Path, typer.Option(help="directory for the artefact")],
    metric: MetricOption = "accuracy",
    forward: ForwardOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compress a network as a saved profile says, and write the artefact."""
    from grainwise.plan.profile import CompressionProfile
    from grainwise.report.tables import show_figures

    with _plain_errors():
        read = CompressionProfile.load(profile)
        session = _session(model, data, metric, forward, threads, space=read.space, target=read.target)
        from grainwise.api import apply_profile

        result = apply_profile(read, session)
        result.export(out)
        _print_json(result.figures()) if as_json else show_figures(result.figures(), Console())


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="the artefact")],
    model: ModelOption,
    data: DataOption,
    metric: MetricOption = "accuracy",
    forward: ForwardOption = None,
    runtime: Annotated[str, typer.Option(help="onnxruntime; openvino compares the two")] = "onnxruntime",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check an artefact's files, reload it, recount its bytes and measure it anew on the test split."""
    from grainwise.report.tables import show_figures

    with _plain_errors():
        from grainwise.api import verify_artefact

        if threads:
            import torch

            torch.set_num_threads(threads)
        network, loaded = _factory(model, "the model")(), _factory(data, "the data")()
        figures = verify_artefact(directory, network, loaded, runtime=runtime, **_hooks(metric, forward))
        _print_json(figures) if as_json else show_figures(figures, Console())


@app.command()
def recover(
    directory: Annotated[Path, typer.Argument(help="the artefact")],
    model: ModelOption,
    data: DataOption,
    train: Annotated[str, typer.Option(help="module:function that returns training batches, read anew each epoch")],
    epochs: Annotated[int | None, typer.Option(help="of the training data; 3 unless minutes are given")] = None,
    minutes: Annotated[float | None, typer.Option(help="of training, instead of epochs")] = None,
    learning_rate: Annotated[float, typer.Option(help="at its peak, as a share of the weights' size")] = 0.004,
    seed: Annotated[int, typer.Option(help="of the training data's order")] = 0,
    metric: MetricOption = "accuracy",
    forward: ForwardOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the checkpoint beside the artefact")] = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune an artefact's network towards the uncompressed one, and replace the artefact once that is verified."""
    from grainwise.report.progress import LiveProgress
    from grainwise.report.tables import show_figures

    again = shlex.join(["grainwise", *(word for word in sys.argv[1:] if word != "--resume"), "--resume"])
    with _plain_errors(lambda: again, "the artefact is unchanged and a checkpoint is kept beside it"):
        import torch

        from grainwise.api import Observer, recover_artefact
        from grainwise.recover.options import RecoverOptions

        if threads:
            torch.set_num_threads(threads)
        network, loaded, batches = (
            _factory(path, what)()
            for path, what in ((model, "the model"), (data, "the data"), (train, "the training data"))
        )
        with LiveProgress(None) as live:
            result = recover_artefact(
                directory,
                network,
                loaded,
                batches,
                epochs=epochs,
                minutes=minutes,
                options=RecoverOptions(learning_rate=learning_rate, seed=seed),
                resume=resume,
                observer=Observer(stage=live.stage, step=live.step),
                **_hooks(metric, forward),
            )
        if as_json:
            _print_json(result.figures())
            return
        show_figures(result.figures(), Console())
        better = result.recovery is not None and result.recovery.best > 0
        typer.echo(f"artefact: {directory}" if better else f"nothing better was found; {directory} is unchanged")


@app.command()
def bench(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="artefacts")],
    model: ModelOption,
    data: DataOption,
    metric: MetricOption = "accuracy",
    forward: ForwardOption = None,
    batch: Annotated[int, typer.Option(min=1, help="samples in a timed batch")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="threads of a timed call")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="of timing, all files together")] = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Run artefacts and the uncompressed network side by side: the metric on the test split, bytes, milliseconds."""
    from grainwise.report.progress import LiveProgress
    from grainwise.report.tables import show_contest

    with _plain_errors():
        from grainwise.bench import Contest

        network, loaded = _factory(model, "the model")(), _factory(data, "the data")()
        with LiveProgress(None) as live:
            live.stage("trace")
            contest = Contest.of(directories, network, loaded, **_hooks(metric, forward))
            sample = contest.sample(batch)
            live.stage("accuracy")
            rows = contest.rows(live.progress)
        # A live line would take processor time from what is timed, so the last part is only announced.
        _note(f"timing {len(rows)} files in turn for {seconds:g} s")
        facts = contest.standings(rows, sample, threads=threads, seconds=seconds)
        _print_json(facts) if as_json else show_contest(facts, Console())


@app.command()
def studies(store: StoreOption = "sqlite:///grainwise.db", as_json: JsonOption = False) -> None:
    """List the studies of a store, with their trials by state."""
    from grainwise.report import studies as report
    from grainwise.store.studies import Store

    with _plain_errors():
        rows = report.studies(Store(store, create=False))
        _print_json(rows) if as_json else report.show_studies(rows, Console())


@app.command()
def status(
    study: Annotated[str, typer.Argument(help="name of the study")],
    store: StoreOption = "sqlite:///grainwise.db",
    as_json: JsonOption = False,
) -> None:
    """Show how far a study is: trials by state, the best one, failures with reasons, what runs where."""
    from grainwise.report import studies as report
    from grainwise.store.studies import Store

    with _plain_errors():
        facts = report.status(Store(store, create=False), study)
        _print_json(facts) if as_json else report.show_status(facts, Console())


store_app = typer.Typer(no_args_is_help=True, help="Look after the database of a store.")
app.add_typer(store_app, name="db")


@store_app.command("upgrade")
def upgrade_store(store: StoreOption = "sqlite:///grainwise.db") -> None:
    """Take the database of an older grainwise to this version; there is no way back."""
    from grainwise.store.studies import Store

    with _plain_errors():
        opened = Store(store, create=False, upgrade=True)
        typer.echo(f"{opened.url} is of this version, with {len(opened.studies())} studies")


@store_app.command("recover")
def recover_store(
    out: Annotated[str, typer.Option(help="path of the new database")],
    store: StoreOption = "sqlite:///grainwise.db",
) -> None:
    """Copy what is as it was written from a damaged database into a new one."""
    from grainwise.store.recovery import recover

    with _plain_errors():
        found = recover(store, f"sqlite:///{out}")
        typer.echo(
            f"{out}: {found.studies} studies, {found.trials} trials, {found.checkpoints} checkpoints; "
            f"{found.refused} rows were not as they were written and are left out"
        )


def main() -> None:
    """Entry point of the `grainwise` command."""
    app()
