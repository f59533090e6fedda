"""The command line: one function a command, heavy imports inside."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from grainwise.session import Session

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
def _plain_errors(resume: str = "", kept: str = "every finished trial is kept") -> Iterator[None]:
    """Expected errors become one sentence and exit code 1; Ctrl-C tells how to go on and exits with 130."""
    try:
        yield
    except KeyboardInterrupt:
        _stop(f"stopped; {kept}{resume and f'. Go on with:{chr(10)}  {resume}'}", 130)
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
    resume: Annotated[bool, typer.Option("--resume", help="go on with the study where it was cut")] = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search the compression of each layer, build the best profile, and write the artefact."""
    import torch

    from grainwise.api import Observer, SearchOptions, compress, missed
    from grainwise.evaluate.kernels import cache_folder
    from grainwise.evaluate.sharing import Sharing
    from grainwise.plan.space import SpaceKind
    from grainwise.report.progress import LiveProgress
    from grainwise.report.tables import show_figures

    words = [word for word in sys.argv[1:] if word != "--resume"]
    with _plain_errors(" ".join(["grainwise", *words, "--resume"])):
        if threads:
            torch.set_num_threads(threads)
        wanted = {"size": size, "macs": macs, "latency": latency, "accuracy_drop": accuracy_drop}
        constraints = {name: share for name, share in wanted.items() if share is not None}
        options = SearchOptions(
            searcher=searcher,
            algorithm=algorithm,  # type: ignore[arg-type]  # checked by SearchOptions
            credit=credit,  # type: ignore[arg-type]
            reward=_factory(reward, "the reward") if ":" in reward else reward,
            complexity_weight=complexity_weight,
            space=SpaceKind(space),
            seed=seed,
        )
        network, loaded = _factory(model, "the model")(), _factory(data, "the data")()
        with LiveProgress(int(budget) if budget.isdigit() else None) as live:
            result = compress(
                network,
                data=loaded,
                constraints=constraints,
                target=target,
                budget=budget,
                study=study,
                store=store,
                resume=resume,
                options=options,
                observer=Observer(live.stage, live.progress, live.trial),
                sharing=Sharing(folder=cache_folder() / "variants"),
                **_hooks(metric, forward),
            )
        if out is not None:
            result.export(out)
        complaint = missed(result, constraints)
        if as_json:
            _print_json({**result.figures(), "missed": complaint, "profile": json.loads(result.profile.to_json())})
        else:
            show_figures(result.figures(), Console())
            if out is not None:
                typer.echo(f"artefact: {out}")
            if complaint:
                typer.echo(f"constraint missed: {complaint}")


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

    with _plain_errors(" ".join(["grainwise", *sys.argv[1:]])):
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

    words = " ".join(["grainwise", *(word for word in sys.argv[1:] if word != "--resume"), "--resume"])
    with _plain_errors(words, "the artefact is unchanged and a checkpoint is kept beside it"):
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


def main() -> None:
    """Entry point of the `grainwise` command."""
    app()
