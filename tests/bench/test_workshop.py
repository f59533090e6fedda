"""Rows are kept as they are made, skipped while they hold, made again when they do not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench import contenders, deploy, markdown, tables
from bench.workshop import Kept, Order, Part, Workshop, digest
from grainwise.bench import REFERENCE, Contest
from grainwise.search.driver import Judge
from grainwise.session import Session
from tests.networks import tiny, tiny_data


def test_a_row_holds_while_settings_and_file_are_the_same(tmp_path: Path) -> None:
    file, path = tmp_path / "a.onnx", tmp_path / "new" / "results.json"
    file.write_bytes(b"one")
    kept = Kept(path)
    kept.update("part", races=[1], seed=3)
    row = {"name": "a", "settings": {"n": 1}, "sha256": digest(b"one")}
    kept.keep("part", {"name": "b", "settings": {}, "failed": "none found"})
    kept.keep("part", {**row, "settings": {"n": 0}})
    kept.keep("part", row)
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
    again = Kept(path)
    assert again.find("part", "a", {"n": 1}, file) == row
    assert again.find("part", "b", {}, tmp_path / "absent") is not None
    assert again.find("part", "a", {"n": 2}, file) is None
    assert again.find("part", "c", {}, file) is again.find("other", "a", {"n": 1}, file) is None
    assert json.loads(path.read_text())["part"] == {
        "races": [],  # the race before this row says nothing of it
        "seed": 3,
        "rows": [{"name": "b", "settings": {}, "failed": "none found"}, row],
    }
    file.write_bytes(b"two")
    assert again.find("part", "a", {"n": 1}, file) is None
    file.unlink()
    assert again.find("part", "a", {"n": 1}, file) is None


def orders(shop: Workshop) -> Iterator[Order]:
    yield shop.uncompressed()
    yield shop.uniform("int8", contenders.eight_bit(shop.session.space))
    yield shop.searched("search", {"size": 0.5})
    yield shop.searched("hopeless", {"size": 0.001})
    for path in sorted((shop.folder.parent / "contenders").glob("*.onnx")):
        yield deploy._foreign(path)


def samples(contest: Contest) -> Iterator[Mapping[str, Any]]:
    yield contest.sample(2)


PART = Part("tiny", "A tiny network", tiny, tiny_data, orders, samples, minutes=0)


def test_a_second_run_makes_nothing_but_the_race(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, onnx_session: Session
) -> None:
    monkeypatch.setattr(Session, "prepare", lambda *_, **__: onnx_session)
    path = tmp_path / "results.json"
    run = partial(deploy.run, PART, tmp_path / "files", evaluations=4, seconds=0.1, command="a command")
    run(kept=Kept(path))
    first = json.loads(path.read_text())["tiny"]
    rows = {row["name"]: row for row in first["rows"]}
    assert list(rows) == [REFERENCE, "int8", "search", "hopeless"]
    assert "cannot be met" in rows["hopeless"]["failed"]
    assert rows["search"]["size_ratio"] <= 0.5
    assert rows["search"]["trials"] == rows["search"]["settings"]["evaluations"] == 4
    (race,) = first["races"]
    assert [file["name"] for file in race["files"]] == [REFERENCE, "int8", "search"]
    assert race["batch"] == 2
    assert (tmp_path / "files" / "tiny" / "int8.onnx").stat().st_size == rows["int8"]["size_bytes"]

    outside = tmp_path / "files" / "contenders" / "another.onnx"
    outside.parent.mkdir()
    outside.write_bytes((tmp_path / "files" / "tiny" / "int8.onnx").read_bytes())
    with monkeypatch.context() as sealed:
        for owner, name in ((Session, "finish"), (Session, "sensitivity"), (Judge, "__call__")):
            sealed.setattr(owner, name, lambda *_, **__: pytest.fail("made again"))
        run(kept=Kept(path))
    second = json.loads(path.read_text())["tiny"]
    assert second["rows"][:4] == first["rows"]
    assert second["rows"][4]["name"] == "another"
    assert second["rows"][4]["metric"] == rows["int8"]["metric"]
    assert [file["name"] for file in second["races"][0]["files"]] == [REFERENCE, "int8", "search", "another"]

    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert tables.deploy() == "No results yet: `python -m bench.deploy`."
    path.rename(tmp_path / "deploy.json")
    text = tables.deploy()
    assert f"| int8 | {100 * rows['int8']['metric']:.2f} |" in text
    assert f"hopeless: {rows['hopeless']['failed']}" in text
    assert "`a command`" in text


def test_the_searches_of_resnet20_are_asked_for_less_than_the_uniform_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, onnx_session: Session
) -> None:
    monkeypatch.setattr(Session, "prepare", lambda *_, **__: onnx_session)
    kept = Kept(tmp_path / "results.json")
    names = ["int8", *(f"int8, {share}% of channels pruned" for share in (30, 50, 70))]
    for number, name in enumerate(names, 1):
        kept.keep("resnet20", {"name": name, "made_at_ratio": 0.5 / number, "size_ratio": 0.2 / number})
    (tmp_path / "contenders").mkdir()
    (tmp_path / "contenders" / "theirs.onnx").write_bytes(b"file")
    found = list(deploy.PARTS["resnet20"].orders(Workshop(deploy.PARTS["resnet20"], tmp_path, kept, 200)))
    asked = {order.name: order.settings["constraints"] for order in found if order.kind == "search"}
    assert asked == {
        **{f"search, latency {share}": {"latency": share} for share in (0.8, 0.7, 0.6, 0.5)},
        **{f"search, size {share}": {"size": share} for share in (0.2, 0.125)},
        "search, as fast as int8, x 0.85 of its size": {"latency": 0.515, "size": 0.17},  # a search aims 3 % lower
        "search, as fast as int8, x 0.7 of its size": {"latency": 0.515, "size": 0.14},
        f"search, as fast as {names[1]}, x 0.85 of its size": {"latency": 0.258, "size": 0.085},
        f"search, as fast as {names[1]}, x 0.7 of its size": {"latency": 0.258, "size": 0.07},
    }
    kinds = [(order.name, order.kind) for order in found if order.kind != "search"]
    foreign = [("int8 by ONNX Runtime's quantize_static", "foreign"), ("theirs", "foreign")]
    assert kinds == [(REFERENCE, "reference"), *foreign, *((name, "uniform") for name in names)]


def test_smaller_splits_leave_the_test_split_alone() -> None:
    data = deploy._few(tiny_data(), 1, 2)
    assert [len(list(getattr(data, split))) for split in ("calibration", "search", "test")] == [1, 2, 2]
