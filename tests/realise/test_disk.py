"""The library on disk: what is found there is what would be solved; anything else is solved anew."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grainwise.plan.choices import PRECISIONS, STRUCTURES, Choice, Entry, Granularity, Method
from grainwise.plan.target import TARGETS
from grainwise.realise import disk as module
from grainwise.realise.build import build
from grainwise.realise.disk import VariantsOnDisk
from grainwise.realise.library import VariantLibrary
from grainwise.realise.reference import Reference
from grainwise.session import Session
from tests.evaluate.candidates import SUBJECTS, prepared, profiles

KEY = {"layer": "down", "entry": "none"}
INT4 = Choice(Method.QUANTIZE, Granularity.CHANNEL, 4)
PRUNE = Choice(Method.PRUNE, Granularity.CHANNEL, 0.5)
STUDENT = Choice(Method.DISTILL, Granularity.BLOCK, 0.5)
MIXED = {"stem": Entry(PRUNE, INT4), "block.0": Entry(STUDENT, INT4), "down": Entry(STRUCTURES[3], INT4)}


def library(reference: Reference, folder: Path, **options: int) -> VariantLibrary:
    return VariantLibrary(reference, VariantsOnDisk(folder, reference, **options))


def never(*_: object) -> object:
    raise AssertionError("was solved again")


@pytest.mark.parametrize("name", SUBJECTS)
def test_what_is_read_is_what_was_solved(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = prepared(name)
    asked = profiles(session, 8, seed=2)
    if name == "residual":
        asked.append(MIXED)
    reference = session.reference
    plain = [build(VariantLibrary(reference), entries) for entries in asked]
    first, second = library(reference, tmp_path), library(reference, tmp_path)
    solved = [build(first, entries) for entries in asked]
    for source in ("restructure", "realise", "train_block", "rank_units"):
        monkeypatch.setattr(f"grainwise.realise.library.{source}", never)
    read = [build(second, entries) for entries in asked]
    assert second.disk is not None
    assert second.disk.misses == 0 < second.disk.hits
    x = session.splits.search[0].inputs
    for a, b, c in zip(plain, solved, read, strict=True):
        assert all(torch.equal(v, c.state_dict()[n]) for n, v in a.state_dict().items())
        assert list(a.state_dict()) == list(b.state_dict()) == list(c.state_dict())
        with torch.no_grad():
            outputs = [reference.forward(model, x) for model in (a, b, c)]
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])


def changed(session: Session, what: str) -> Reference:
    """The reference with one thing different."""
    reference = session.reference
    match what:
        case "weight":
            model = copy.deepcopy(reference.model)
            with torch.no_grad():
                model.fc.weight[0, 0] += 1e-3
            return replace(reference, model=model)
        case "picture":
            first, *others = reference.calibration
            other = first.clone()
            other[0, 0, 0, 0] += 1e-3
            return replace(reference, calibration=(other, *others))
        case "hessian":
            hessians = {n: h.clone() for n, h in reference.hessians.items()}
            hessians["down"][0, 0, 0] *= 1 + 1e-6
            return replace(reference, hessians=hessians)
        case _:
            return replace(reference, target=TARGETS["ort-cpu-avx2"])


@pytest.mark.parametrize("what", ["weight", "picture", "hessian", "target"])
def test_another_problem_is_a_miss(what: str, session: Session, tmp_path: Path) -> None:
    VariantsOnDisk(tmp_path, session.reference).save(KEY, 1, {"a": torch.ones(2)})
    assert VariantsOnDisk(tmp_path, session.reference).load(KEY) is not None
    assert VariantsOnDisk(tmp_path, changed(session, what)).load(KEY) is None
    for other in ({"layer": "fc"}, {"entry": str(INT4)}, {"cut": [[0, 1], None]}):
        assert VariantsOnDisk(tmp_path, session.reference).load({**KEY, **other}) is None


def test_other_code_is_a_miss(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    VariantsOnDisk(tmp_path, session.reference).save(KEY, 1, {"a": torch.ones(2)})
    monkeypatch.setattr(module, "code_version", lambda *_: "another")
    assert VariantsOnDisk(tmp_path, session.reference).load(KEY) is None


def test_damage_is_a_miss_and_is_repaired(session: Session, tmp_path: Path) -> None:
    """Every cut and every flipped bit is found, or the file says what it said before."""
    rng = random.Random(0)
    kept = VariantsOnDisk(tmp_path, session.reference)
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(3, dtype=torch.uint8)}
    kept.save(KEY, {"type": "layer"}, tensors)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    caught = 0
    for damaged in (*_flipped(whole, 100, rng), *(whole[: rng.randrange(len(whole))] for _ in range(50)), b""):
        path.write_bytes(damaged)
        found = kept.load(KEY)
        if found is None:
            caught += 1
        else:
            assert found[0] == {"type": "layer"}
            assert all(torch.equal(found[1][n], v) for n, v in tensors.items())
    assert caught >= 148  # some bits of the padding or of a letter's case mean nothing
    path.write_bytes(b"no file")
    made = library(session.reference, tmp_path)
    layer = session.space.graph.layer("down")
    first = made.layer(layer, Entry(precision=INT4), {})
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    again = library(session.reference, tmp_path)
    assert torch.equal(first.weight, again.layer(layer, Entry(precision=INT4), {}).weight)
    assert again.disk is not None
    assert (again.disk.hits, again.disk.misses) == (0, 1)
    assert library(session.reference, tmp_path).layer(layer, Entry(precision=INT4), {}) is not None
    assert not list(tmp_path.glob("*.part"))


def _flipped(whole: bytes, count: int, rng: random.Random) -> Sequence[bytes]:
    found = []
    for _ in range(count):
        bits = bytearray(whole)
        place = rng.randrange(len(bits))
        bits[place] ^= 1 << rng.randrange(8)
        found.append(bytes(bits))
    return found


def test_a_file_under_anothers_name_is_a_miss(session: Session, tmp_path: Path) -> None:
    kept = VariantsOnDisk(tmp_path, session.reference)
    kept.save(KEY, 1, {"a": torch.ones(2)})
    (first,) = tmp_path.iterdir()
    kept.save({**KEY, "entry": "other"}, 2, {"a": torch.zeros(2)})
    (second,) = set(tmp_path.iterdir()) - {first}
    second.write_bytes(first.read_bytes())
    assert kept.load({**KEY, "entry": "other"}) is None


def test_what_was_not_used_for_longest_goes_first(session: Session, tmp_path: Path) -> None:
    import os

    kept = VariantsOnDisk(tmp_path, session.reference, limit_bytes=50_000)
    keys = [{"layer": "down", "entry": str(number)} for number in range(20)]
    for number, key in enumerate(keys):
        kept.save(key, None, {"a": torch.zeros(1000)})
        for path in tmp_path.iterdir():  # a clock that ticks with every file
            if path.stat().st_mtime > 1e6 + 1e5:
                os.utime(path, (1e6 + number, 1e6 + number))
        assert kept.load(keys[0]) is not None  # in use all the time
        for path in tmp_path.iterdir():
            if path.stat().st_mtime > 1e6 + 1e5:
                os.utime(path, (1e6 + number + 0.5, 1e6 + number + 0.5))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 50_000
    left = [number for number, key in enumerate(keys) if kept.load(key) is not None]
    assert left[0] == 0
    assert left[1:] == list(range(20 - len(left) + 1, 20))
    assert len(left) >= 8


def test_a_folder_that_cannot_be_written_keeps_nothing(session: Session, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    made = library(session.reference, blocked / "folder")
    assert made.layer(session.space.graph.layer("down"), Entry(precision=PRECISIONS[1]), {}) is not None
