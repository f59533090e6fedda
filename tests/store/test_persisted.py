"""Every file that a search writes is JSON, SQLite or safetensors, beside an artefact's ONNX model and its words."""

from __future__ import annotations

import json
import pickle
import sqlite3
from contextlib import closing
from pathlib import Path

import onnx
import pytest
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from typer.testing import CliRunner

from grainwise.cli import app


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that a search by two workers left: its store, its artefact, its cache of solved layers."""
    made = tmp_path_factory.mktemp("persisted")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_CACHE_HOME", str(made / "cache"))
        factories = ["--model", "tests.networks:tiny", "--data", "tests.networks:tiny_data"]
        limits = ["--size", "0.5", "--budget", "18", "--workers", "2", "--threads", "1"]
        kept = ["--store", f"sqlite:///{made / 's.db'}", "--out", str(made / "out")]
        found = CliRunner().invoke(app, ["search", *factories, *limits, *kept])
    assert found.exit_code == 0, found.output
    return made


def test_every_file_is_of_a_kind_that_runs_nothing(folder: Path) -> None:
    others = folder / "cache" / "Microsoft"  # ONNX Runtime's own
    files = [path for path in folder.rglob("*") if path.is_file() and others not in path.parents]
    assert {path.suffix for path in files} >= {".json", ".safetensors", ".db", ".onnx"}
    for path in files:
        check(path)


def test_a_pickle_in_a_cell_or_a_file_is_seen(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "s.db"
    copy.write_bytes((folder / "s.db").read_bytes())
    with closing(sqlite3.connect(copy)) as store:
        store.execute("UPDATE checkpoints SET tensors = ?", (pickle.dumps({"a": 1}),))
        store.commit()
    with pytest.raises(SafetensorError):
        check(copy)
    for name in ("a.safetensors", "a.json", "a.pt"):
        (tmp_path / name).write_bytes(pickle.dumps({"a": 1}))
        with pytest.raises((SafetensorError, ValueError)):
            check(tmp_path / name)
