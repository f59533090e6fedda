"""What several commands take, and what is made of it: networks, data and sessions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from grainwise.session import Session

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
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="processes that evaluate, with one thread each if several; 1, or a cluster's")
]
PoolOption = Annotated[str | None, typer.Option("--pool", help="inline, processes or ray")]
AddressOption = Annotated[str | None, typer.Option("--address", help="of a Ray cluster, or auto")]
LimitOption = Annotated[float | None, typer.Option("--limit", help="seconds that one evaluation may take")]
ThreadsOption = Annotated[int | None, typer.Option(help="threads that torch uses; its own default otherwise")]


def factory(path: str, what: str) -> Callable[..., Any]:
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


def read_network(model: str, data: str, threads: int | None = None) -> tuple[Any, Any]:
    """The network and the data that two `module:function` make, once the number of threads is set."""
    if threads:
        from grainwise.threads import limit_threads

        limit_threads(threads)
    return factory(model, "the model")(), factory(data, "the data")()


def hooks(metric: str, forward: str | None) -> dict[str, Any]:
    """The metric and the forward as arguments of the library's functions."""
    found: dict[str, Any] = {"metric": factory(metric, "the metric") if ":" in metric else metric}
    if forward:
        found["forward"] = factory(forward, "the forward")
    return found


def prepared(
    model: str, data: str, metric: str, forward: str | None, threads: int | None = None, **options: Any
) -> Session:
    """A session on what the options name."""
    from grainwise.session import Session

    network, loaded = read_network(model, data, threads)
    return Session.prepare(network, loaded, **hooks(metric, forward), **options)
