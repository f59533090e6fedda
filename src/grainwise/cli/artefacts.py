"""Commands on networks and artefacts."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from grainwise.cli.options import (
    DataOption,
    ForwardOption,
    JsonOption,
    MetricOption,
    ModelOption,
    TargetOption,
    ThreadsOption,
    factory,
    hooks,
    prepared,
    read_network,
)
from grainwise.cli.speaking import note, plain_errors, print_json


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

    with plain_errors():
        session = prepared(model, data, metric, forward, space=space, target=target)
        facts = inspection(session.space, session.statistics().tolist(), session.reference.target)
        if as_json:
            print_json(facts)
        else:
            show_inspection(facts, Console())


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

    with plain_errors():
        read = CompressionProfile.load(profile)
        session = prepared(model, data, metric, forward, threads, space=read.space, target=read.target)
        from grainwise.api import apply_profile

        result = apply_profile(read, session)
        result.export(out)
        print_json(result.figures()) if as_json else show_figures(result.figures(), Console())


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

    with plain_errors():
        from grainwise.artefacts import verify_artefact

        network, loaded = read_network(model, data, threads)
        figures = verify_artefact(directory, network, loaded, runtime=runtime, **hooks(metric, forward))
        print_json(figures) if as_json else show_figures(figures, Console())


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
    with plain_errors(lambda: again, "the artefact is unchanged and a checkpoint is kept beside it"):
        from grainwise.api import Observer
        from grainwise.artefacts import recover_artefact
        from grainwise.recover.options import RecoverOptions

        network, loaded = read_network(model, data, threads)
        batches = factory(train, "the training data")()
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
                **hooks(metric, forward),
            )
        if as_json:
            print_json(result.figures())
            return
        show_figures(result.figures(), Console())
        better = result.recovery is not None and result.recovery.best > 0
        typer.echo(f"artefact: {directory}" if better else f"nothing better was found; {directory} is unchanged")


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

    with plain_errors():
        from grainwise.bench import Contest

        network, loaded = read_network(model, data)
        with LiveProgress(None) as live:
            live.stage("trace")
            contest = Contest.of(directories, network, loaded, **hooks(metric, forward))
            sample = contest.sample(batch)
            live.stage("accuracy")
            rows = contest.rows(live.progress)
        # A live line would take processor time from what is timed, so the last part is only announced.
        note(f"timing {len(rows)} files in turn for {seconds:g} s")
        facts = contest.standings(rows, sample, threads=threads, seconds=seconds)
        print_json(facts) if as_json else show_contest(facts, Console())
