"""Commands on stores, from what is in them alone."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from grainwise.cli.options import JsonOption, StoreOption
from grainwise.cli.speaking import plain_errors, print_json


def studies(store: StoreOption = "sqlite:///grainwise.db", as_json: JsonOption = False) -> None:
    """List the studies of a store, with their trials by state."""
    from grainwise.report import studies as report
    from grainwise.store.studies import Store

    with plain_errors():
        rows = report.studies(Store(store, create=False))
        print_json(rows) if as_json else report.show_studies(rows, Console())


def status(
    study: Annotated[str, typer.Argument(help="name of the study")],
    store: StoreOption = "sqlite:///grainwise.db",
    as_json: JsonOption = False,
) -> None:
    """Show how far a study is: trials by state, the best one, failures with reasons, what runs where."""
    from grainwise.report import studies as report
    from grainwise.store.studies import Store

    with plain_errors():
        facts = report.status(Store(store, create=False), study)
        print_json(facts) if as_json else report.show_status(facts, Console())


def upgrade_store(store: StoreOption = "sqlite:///grainwise.db") -> None:
    """Take the database of an older grainwise to this version; there is no way back."""
    from grainwise.store.studies import Store

    with plain_errors():
        opened = Store(store, create=False, upgrade=True)
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
