from __future__ import annotations

import gc
import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grainwise.cli import app
from tests.store.persisted import check
from tests.store.test_studies import old_database

NETWORK = ["--model", "tests.networks:tiny", "--data", "tests.networks:tiny_data"]
ROOT = Path(__file__).parents[1]
run = CliRunner().invoke


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Solved layers are kept beside the test, not for the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_commands_in_a_row(tmp_path: Path) -> None:
    store = ["--store", f"sqlite:///{tmp_path / 's.db'}", "--study", "cli"]
    out = str(tmp_path / "out")
    limits = ["--size", "0.5", "--accuracy-drop", "1", "--budget", "20"]
    found = run(app, ["search", *NETWORK, *store, *limits, "--out", out, "--json", "--threads", "1"])
    assert found.exit_code == 0, found.output
    figures = json.loads(found.stdout)
    assert figures["size_bytes"] <= 0.5 * figures["reference_size_bytes"]
    assert figures["missed"] is None

    best = run(app, ["best", *store, "--json", "--out", str(tmp_path / "best.json")])
    assert json.loads(best.stdout)["trials"] == 20
    assert "divergence" in run(app, ["best", *store]).stdout

    applied = run(app, ["apply", str(tmp_path / "best.json"), *NETWORK, "--out", str(tmp_path / "again"), "--json"])
    assert json.loads(applied.stdout)["size_bytes"] <= figures["reference_size_bytes"]

    verified = run(app, ["verify", out, *NETWORK, "--json"])
    assert verified.exit_code == 0, verified.output
    wanted = {
        "onnx_accuracy",
        "onnx_size_bytes",
        "latency_ms",
        "reference_latency_ms",
        "max_abs_difference",
        "kernels",
        "accuracy",
        "reference_accuracy",
        "size_bytes",
        "reference_size_bytes",
        "macs",
        "reference_macs",
        "trials",
    }
    assert wanted <= set(json.loads(verified.stdout))
    assert json.loads(verified.stdout)["accuracy"] == figures["accuracy"]
    assert "milliseconds, p50, batch 1" in run(app, ["verify", out, *NETWORK]).stdout

    options = ["--seconds", "0.2", "--batch", "3", "--threads", "2"]
    raced = run(app, ["bench", out, *NETWORK, *options, "--json"])
    assert raced.exit_code == 0, raced.output
    facts = json.loads(raced.stdout)
    assert (facts["batch"], facts["threads"], facts["clock"]) == (3, 2, "time on the clock")
    full, found = facts["files"]
    assert (full["size_bytes"], found["size_bytes"]) == (figures["reference_size_bytes"], figures["size_bytes"])
    assert found["metric"] == json.loads(verified.stdout)["onnx_accuracy"]
    assert "timing 2 files in turn for 0.2 s" in raced.stderr

    others = tmp_path / "cache" / "Microsoft"  # ONNX Runtime's own
    files = [path for path in tmp_path.rglob("*") if path.is_file() and others not in path.parents]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".db", ".onnx", ".md"}
    for path in files:
        check(path)


def test_compare_prints_a_table_or_json_and_draws(tmp_path: Path) -> None:
    runs = ["--searcher", "greedy", "--searcher", "additive:fisher", "--seeds", "2", "--evaluations", "5"]
    store = ["--store", f"sqlite:///{tmp_path / 's.db'}", "--target", "packed", "--size", "0.3"]
    found = run(app, ["compare", *NETWORK, *runs, *store, "--plot", str(tmp_path / "c.svg"), "--json"])
    assert found.exit_code == 0, found.output
    body = json.loads(found.stdout)
    assert {row["searcher"] for row in body["summary"]} == {"greedy", "additive:fisher"}
    assert [(r["searcher"], r["seed"]) for r in body["runs"]][:2] == [("greedy", 0), ("additive:fisher", 0)]
    assert (tmp_path / "c.svg").read_text().count("<polyline") == 4
    best = run(app, ["best", *store[:2], "--study", "compare/greedy/5 evaluations/seed 0", "--json"])
    assert json.loads(best.stdout)["divergence"] == body["runs"][0]["best"]["divergence"]
    again = run(app, ["compare", *NETWORK, *runs, *store])  # from the store
    assert "additive:fisher" in again.stdout and "5 evaluations, 2 seeds" in again.stdout


def test_inspect_shows_layers_and_why_not() -> None:
    facts = json.loads(run(app, ["inspect", *NETWORK, "--json"]).stdout)
    by_name = {layer["name"]: layer for layer in facts["layers"]}
    assert by_name["stem"]["weights"] == 16 * 3 * 9
    assert "the network's outputs" in " ".join(by_name["fc"]["refused"])
    assert facts["macs"] == sum(layer["macs"] for layer in facts["layers"])
    text = run(app, ["inspect", *NETWORK]).stdout
    assert "multiply-accumulates per sample" in text
    assert "fc: not" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "/nowhere", *NETWORK], "/nowhere/manifest.json cannot be read"),
        (["apply", "/nowhere.json", *NETWORK, "--out", "/tmp/x"], "/nowhere.json cannot be read"),
        (["best", "--store", "sqlite:////nowhere/x.db"], "there is no store"),
        (["bench", "/nowhere", *NETWORK], "is /nowhere an artefact?"),
        (["search", *NETWORK, "--size", "7", "--store", "sqlite://"], "in (0, 1]"),
        (
            ["compare", *NETWORK, "--size", "0.3", "--searcher", "luck", "--store", "sqlite://"],
            "give one of rl, random",
        ),
        (["compare", *NETWORK, "--searcher", "random", "--store", "sqlite://"], "give a constraint for at least one"),
        (["search", *NETWORK, "--size", "0.3", "--budget", "soon", "--store", "sqlite://"], "a budget is"),
        (["inspect", "--model", "tests.test_cli:broken", "--data", "tests.networks:tiny_data"], "pass forward="),
        (["inspect", "--model", "tests.networks:tiny", "--data", "tests.test_cli:nothing"], "split is empty"),
        (["inspect", *NETWORK, "--metric", "tests.test_cli:not_a_number"], "the metric gave nan"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], message: str) -> None:
    found = run(app, arguments)
    assert found.exit_code == 1
    *progress, sentence = found.stderr.strip().splitlines()
    assert sentence.startswith("error: ")
    assert message in sentence
    assert not any("rror" in line for line in progress)
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    "path", ["tests.networks", "tests.networks:absent", "no.such.module:x", "tests.networks:__doc__"]
)
def test_a_factory_that_is_none_is_refused(path: str) -> None:
    found = run(app, ["inspect", "--model", path, "--data", "tests.networks:tiny_data"])
    assert found.exit_code == 2
    assert "the model" in found.stderr


def _trials_in(database: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            done = "SELECT count(*) FROM trials WHERE state = 'done'"  # those asked for are there before they run
            return int(connection.execute(done).fetchone()[0])
    except sqlite3.OperationalError:  # not there yet
        return 0


def _started(store: str, budget: str) -> subprocess.Popen[str]:
    arguments = ["search", *NETWORK, "--size", "0.3", "--budget", budget, "--store", store, "--study", "s"]
    arguments += ["--target", "packed", "--threads", "1", "--searcher", "random"]
    command = [sys.executable, "-c", "from grainwise.cli import main; main()", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"})


def _wait_for_trials(process: subprocess.Popen[str], database: Path) -> None:
    for _ in range(1200):
        time.sleep(0.05)
        if _trials_in(database) > 0:
            return
        assert process.poll() is None, process.stderr and process.stderr.read()
    raise AssertionError("no trial within a minute")


def test_ctrl_c_finishes_the_trial_and_the_command_that_it_prints_goes_on(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 's.db'}"
    process = _started(store, "60")
    try:
        _wait_for_trials(process, tmp_path / "s.db")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "stopping after the running step; Ctrl-C again stops at once" in errors
    assert "every finished trial is kept" in errors and "Traceback" not in errors
    before = json.loads(run(app, ["status", "s", "--store", store, "--json"]).stdout)
    assert 0 < before["trials"]["done"] < 60, before
    command = shlex.split(errors.strip().splitlines()[-1])
    assert command[:3] == ["grainwise", "resume", "s"]
    found = run(app, [*command[1:], "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["trials"] == 60
    rows = json.loads(run(app, ["studies", "--store", store, "--json"]).stdout)
    assert [(row["study"], row["done"] + row["failed"], row["running"]) for row in rows] == [("s", 60, 0)]


def test_the_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    """The running trial would take a minute."""
    arguments = ["search", *NETWORK, "--size", "0.3", "--budget", "9", "--store", f"sqlite:///{tmp_path / 's.db'}"]
    arguments += ["--metric", "tests.test_cli:slow", "--target", "packed", "--searcher", "random"]
    command = [sys.executable, "-c", "from grainwise.cli import main; main()", *arguments]
    environment = {**os.environ, "SLOW": str(tmp_path / "slow")}
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        while not (tmp_path / "slow").exists():
            time.sleep(0.05)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - start < 20  # on a busy machine; 2 s on a quiet one
    finally:
        process.kill()
    assert process.returncode == 130
    assert "--metric tests.test_cli:slow" in errors


def test_a_store_is_upgraded_recovered_and_shown(tmp_path: Path) -> None:
    url = old_database(tmp_path / "old.db")
    refused = run(app, ["status", "tiny", "--store", url])
    assert refused.exit_code == 1 and f"grainwise db upgrade --store {url}" in refused.stderr
    assert "with 2 studies" in run(app, ["db", "upgrade", "--store", url]).stdout
    assert "best: {'trial': 5, 'metric': 0.265625" in run(app, ["status", "tiny", "--store", url]).stdout
    facts = json.loads(run(app, ["status", "other", "--store", url, "--json"]).stdout)
    assert facts["failures"] == [{"trial": 1, "stage": "build", "reason": "why"}]
    assert "tiny" in run(app, ["studies", "--store", url]).stdout
    new = str(tmp_path / "new.db")
    told = run(app, ["db", "recover", "--store", url, "--out", new]).stdout
    assert "2 studies, 8 trials, 2 checkpoints; 0 rows" in told
    again = run(app, ["db", "recover", "--store", url, "--out", new])
    assert again.exit_code == 1 and "is there already" in again.stderr
    resumed = run(app, ["resume", "tiny", *NETWORK, "--store", url])
    assert resumed.exit_code == 1 and "give --budget" in resumed.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["studies"],
        ["status", "tiny"],
        ["status", "nobody"],
        ["gc"],
        ["export-optuna", "tiny", "--out", "optuna.db"],
        ["resume", "tiny", *NETWORK],  # refused: it does not say how long
    ],
    ids=" ".join,
)
def test_commands_close_the_store(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    url = old_database(tmp_path / "s.db")
    gc.collect()
    gc.disable()  # it would close what was forgotten
    try:
        run(app, ["db", "upgrade", "--store", url])
        assert not (tmp_path / "s.db-wal").exists()
        run(app, [*command, "--store", url])
        assert not (tmp_path / "s.db-wal").exists()
    finally:
        gc.enable()


def test_what_killed_searches_left_is_listed_then_removed_and_a_study_is_given_to_optuna(tmp_path: Path) -> None:
    url, variants = old_database(tmp_path / "s.db"), tmp_path / "cache" / "grainwise" / "variants"
    run(app, ["db", "upgrade", "--store", url])
    variants.mkdir(parents=True)
    half = variants / "cut.part"
    half.touch()
    os.utime(half, (1, 1))
    listed = run(app, ["gc", "--store", url])
    assert f"half-written file: {half}" in listed.stdout and "1 found, remove with --remove" in listed.stdout
    assert half.exists()
    body = json.loads(run(app, ["gc", "--store", url, "--remove", "--json"]).stdout)
    assert body == {"removed": True, "files": [str(half)], "studies": []} and not half.exists()
    assert "0 found" in run(app, ["gc", "--store", url]).stdout
    out = str(tmp_path / "optuna.db")
    assert "6 trials" in run(app, ["export-optuna", "tiny", "--store", url, "--out", out]).stdout
    again = run(app, ["export-optuna", "tiny", "--store", url, "--out", out])
    assert again.exit_code == 1 and "there already" in again.stderr
    missing = run(app, ["export-optuna", "nobody", "--store", url, "--out", str(tmp_path / "none.db")])
    assert missing.exit_code == 1 and not (tmp_path / "none.db").exists()


def slow(outputs: object, targets: object) -> float:
    """A metric that takes a minute once the search runs: from its second call on."""
    marker = Path(os.environ["SLOW"])
    slow.calls = getattr(slow, "calls", 0) + 1  # type: ignore[attr-defined]
    if slow.calls > 1:  # type: ignore[attr-defined]
        marker.touch()
        time.sleep(60)
    return 0.5


def broken() -> object:
    import torch

    return torch.nn.Linear(7, 2)


def nothing() -> object:
    from grainwise import Data

    return Data([], [], [])


def not_a_number(outputs: object, targets: object) -> float:
    return float("nan")
