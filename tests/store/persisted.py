"""Every file that a search writes is JSON, SQLite or safetensors, beside an artefact's ONNX model and its words."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import onnx
from safetensors.torch import load, load_file


def refuse_nan(token: str) -> float:
    raise ValueError(f"{token} is no JSON")


def check(path: Path) -> None:
    """Raises for a file, or a cell of a database, that is something else."""
    match path.suffix:
        case ".json":
            json.loads(path.read_text(), parse_constant=refuse_nan)
        case ".safetensors":
            load_file(path)
        case ".db":
            check_database(path)
        case ".onnx":
            onnx.checker.check_model(onnx.load(path, load_external_data=False))
        case ".md":
            path.read_text()
        case _:
            raise ValueError(f"{path.name} is of no known kind")


def check_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as store:
        for (table,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            kinds = {name: kind for _, name, kind, *_ in store.execute(f"PRAGMA table_info({table})")}
            for name, kind in kinds.items():
                for (cell,) in store.execute(f"SELECT {name} FROM {table}"):
                    if kind == "JSON" and cell is not None:
                        json.loads(cell, parse_constant=refuse_nan)
                    elif isinstance(cell, bytes):
                        load(cell)
