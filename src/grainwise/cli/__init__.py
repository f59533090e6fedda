"""The command line: one function a command, heavy imports inside."""

from __future__ import annotations

import typer

from grainwise.cli.artefacts import apply, bench, inspect, recover, verify
from grainwise.cli.searching import best, compare, resume, search
from grainwise.cli.stores import export_optuna, gc, recover_store, status, studies, upgrade_store

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learn which compression each layer of a trained PyTorch network takes, and apply it for real.",
)
for command in (inspect, search, resume, compare, best, apply, verify, recover, bench, studies, status, gc):
    app.command()(command)
app.command("export-optuna")(export_optuna)

database = typer.Typer(no_args_is_help=True, help="Look after the database of a store.")
database.command("upgrade")(upgrade_store)
database.command("recover")(recover_store)
app.add_typer(database, name="db")


def main() -> None:
    """Entry point of the `grainwise` command."""
    app()
