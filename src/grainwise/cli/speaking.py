"""What a command says: results as JSON, notes and errors as one sentence."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console


@contextmanager
def plain_errors(resume: Callable[[], str] = str, kept: str = "every finished trial is kept") -> Iterator[None]:
    """Expected errors become one sentence and exit code 1; Ctrl-C tells how to go on and exits with 130."""
    try:
        yield
    except KeyboardInterrupt:
        command = resume()
        _stop(f"stopped; {kept}{command and f'. Go on with:{chr(10)}  {command}'}", 130)
    except (ValueError, RuntimeError, OSError, TypeError, ImportError) as error:
        _stop(f"error: {error}", 1)


def note(message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


def _stop(message: str, code: int) -> None:
    note(message)
    raise typer.Exit(code)


def print_json(body: Any) -> None:
    typer.echo(json.dumps(body, indent=2, allow_nan=False))


def this_command() -> str:
    return shlex.join(["grainwise", *sys.argv[1:]])
