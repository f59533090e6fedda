"""Commands on stores, from what is in them alone."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from grainwise.cli.options import JsonOption, StoreOption
from grainwise.cli.speaking import plain_errors, print_json


def studies(store: StoreOption = "sqlite:///grainwise.db", as_json: JsonOption = False) -> None:
    """List the studies of a store, with their trials by state."""
    from grainwise.report import studies as report
    from grainwise.store.studies import Store

    with plain_errors(), closing(Store(store, create=False)) as opened:
        rows = report.studies(opened)
        print_json(rows) if as_json else report.show_studies(rows, Console())


def status(
    study: Annotated[str, typer.Argument(help="name of the study")],
    store: StoreOption = "sqlite:///grainwise.db",
    as_json: JsonOption = False,
) -> None:
    """Show how far a study is: trials by state, the best one, failures with reasons, what runs where."""
    from grainwise.report import studies as report
    from grainwise.store.studies import Store

    with plain_errors(), closing(Store(store, create=False)) as opened:
        facts = report.status(opened, study)
        print_json(facts) if as_json else report.show_status(facts, Console())


def gc(
    store: StoreOption = "sqlite:///grainwise.db",
    remove: Annotated[bool, typer.Option("--remove", help="remove it; without, it is only listed")] = False,
    as_json: JsonOption = False,
) -> None:
    """List what killed searches left: half-written files, and trials in the hands of dead processes."""
    from grainwise.evaluate.kernels import cache_folder
    from grainwise.store import litter
    from grainwise.store.studies import Store

    with plain_errors(), closing(Store(store, create=False)) as opened:
        found = litter.find(cache_folder() / "variants", opened)
        if remove:
            litter.remove(found, opened)
        body = {"removed": remove, "files": [str(path) for path in found.files], "studies": list(found.studies)}
        if as_json:
            print_json(body)
            return
        for path in found.files:
            typer.echo(f"half-written file: {path}")
        for name in found.studies:
            typer.echo(f"trials in dead hands: study {name}")
        count = len(found.files) + len(found.studies)
        typer.echo(f"{count} removed" if remove else f"{count} found" + (", remove with --remove" if count else ""))


def export_optuna(
    study: Annotated[str, typer.Argument(help="name of the study")],
    out: Annotated[Path, typer.Option(help="new database of Optuna's")],
    store: StoreOption = "sqlite:///grainwise.db",
) -> None:
    """Write a study as one of Optuna's, for its dashboard and plots."""
    from grainwise.report.optuna import export_optuna as export
    from grainwise.store.studies import Store

    with plain_errors(), closing(Store(store, create=False)) as opened:
        typer.echo(f"{out}: {export(opened, study, out)} trials")


def upgrade_store(store: StoreOption = "sqlite:///grainwise.db") -> None:
    """Take the database of an older grainwise to this version; there is no way back."""
    from grainwise.store.studies import Store

    with plain_errors(), closing(Store(store, create=False, upgrade=True)) as opened:
        typer.echo(f"{opened.url} is of this version, with {len(opened.studies())} studies")


def recover_store(
    out: Annotated[str, typer.Option(help="path of the new database")],
    store: StoreOption = "sqlite:///grainwise.db",
) -> None:
    """Copy what is as it was written from a damaged database into a new one."""
    from grainwise.store.recovery import recover

    with plain_errors():
        found = recover(store, f"sqlite:///{out}")
        typer.echo(
            f"{out}: {found.studies} studies, {found.trials} trials, {found.checkpoints} checkpoints; "
            f"{found.refused} rows were not as they were written and are left out"
        )
