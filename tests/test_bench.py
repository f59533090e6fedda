"""Artefacts side by side: figures against those of other ways to get them, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import pytest
from rich.console import Console

import grainwise as gw
from grainwise.bench import REFERENCE, Contest
from grainwise.evaluate.calibration import plain_profiles
from grainwise.export.manifest import ArtefactError
from grainwise.report.tables import show_contest
from grainwise.session import Session
from tests.export.candidates import tiny_candidate
from tests.networks import tiny, tiny_data


@pytest.fixture(scope="module")
def int8(onnx_session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = onnx_session.finish(plain_profiles(onnx_session.space)["int8"], 0)
    return result.export(tmp_path_factory.mktemp("artefacts") / "int8")


def test_files_stand_side_by_side(int8: Path) -> None:
    contest = Contest.of([int8], tiny(), tiny_data())
    steps: list[tuple[int, int]] = []
    rows = contest.rows(lambda done, total: steps.append((done, total)))
    assert steps == [(0, 2), (1, 2), (2, 2)]
    full, small = rows
    assert [row["name"] for row in rows] == [REFERENCE, str(int8)]
    network = gw.load(int8)
    hits = [(network(inputs).argmax(1) == targets.numpy()).mean() for inputs, targets in tiny_data().test]
    assert small["metric"] == pytest.approx(np.mean(hits))
    assert small["size_bytes"] == (int8 / "model.onnx").stat().st_size
    assert small["size_ratio"] == small["size_bytes"] / full["size_bytes"]
    # The stem, the block's two, the strided one; the residual sum; the classifier.
    assert small["kernels"] == "1 DynamicQuantizeMatMul, 1 QLinearAdd, 4 QLinearConv"
    assert (full["kernels"], full["size_ratio"]) == ("", 1.0)
    facts = contest.standings(rows, contest.sample(5), threads=1, seconds=0.2)
    assert (facts["batch"], facts["threads"], facts["clock"]) == (5, 1, "processor time")
    assert facts["files"][0]["latency_ratio"] == 1.0
    assert all(0 < file["p50_ms"] <= file["p95_ms"] for file in facts["files"])
    assert {**facts["files"][1], **small} == facts["files"][1]
    console = Console(file=io.StringIO(), width=200)
    show_contest(facts, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{small['size_bytes']:,} " in text
    assert f"{int8}: 8-bit kernels: {small['kernels']}" in text
    assert "Batch 5, 1 thread, onnxruntime" in text


def test_what_cannot_stand_beside_the_network_is_refused(int8: Path, session: Session, tmp_path: Path) -> None:
    packed = session.finish({}, 0).export(tmp_path / "packed")
    for directories, network, message in (
        ([packed], tiny(), f"{packed} has no model.onnx"),
        ([int8], tiny(1), f"{int8} was made from other weights"),
        ([int8, int8], tiny(), f"{int8} is there twice"),
        ([tmp_path], tiny(), f"is {tmp_path} an artefact"),
    ):
        with pytest.raises(ArtefactError, match=message):
            Contest.of(directories, network, tiny_data())


def test_files_of_other_tools_run_as_their_makers_mean(onnx_session: Session) -> None:
    """Their inputs may have other names, and float layers between quantised ones may be rounded (DISABLED)."""
    file = tiny_candidate("mixed")[1].SerializeToString()
    named = onnx.load_from_string(file)
    for node in named.graph.node:
        node.input[:] = ["pixels" if name == "input" else name for name in node.input]
    named.graph.input[0].name = "pixels"
    batches = onnx_session.splits.test
    metric = onnx_session.evaluator.scoring.metric
    files = {REFERENCE: tiny_candidate("float")[1].SerializeToString(), "other": named.SerializeToString()}
    ours = Contest({**files, "other": file}, batches, ["input"], metric)
    foreign = Contest(files, batches, ["input"], metric, frozenset({"other"}))
    assert "2 QLinearConv" in ours.row("other")["kernels"]
    assert "3 QLinearConv" in foreign.row("other")["kernels"]
    assert foreign.row("other")["metric"] == pytest.approx(ours.row("other")["metric"], abs=0.1)
    facts = foreign.standings([{"name": name} for name in files], foreign.sample(1), threads=1, seconds=0.1)
    assert [file["name"] for file in facts["files"]] == [REFERENCE, "other"]
    with pytest.raises(KeyError, match="pixels"):
        Contest(files, batches, ["input"], metric).row("other")
