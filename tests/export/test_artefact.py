from __future__ import annotations

import errno
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grainwise.export import artefact
from grainwise.export.artefact import ArtefactError, load
from grainwise.plan.choices import Choice, Entry, Granularity, Method
from grainwise.session import Result, Session
from tests.networks import pictures, tiny

ENTRIES = {
    "stem": Entry(Choice(Method.PRUNE, Granularity.CHANNEL, 0.3), Choice(Method.QUANTIZE, Granularity.CHANNEL, 4)),
    "block.0": Entry(Choice(Method.DISTILL, Granularity.BLOCK, 0.5)),
    "down": Entry(Choice(Method.FACTORIZE, Granularity.CHANNEL, 0.5), Choice(Method.QUANTIZE, Granularity.LAYER, 8)),
    "fc": Entry(Choice(Method.PRUNE, Granularity.LAYER, 0.5), Choice(Method.QUANTIZE, Granularity.CHANNEL, 8)),
}


@pytest.fixture(scope="module")
def result(session: Session) -> Result:
    return session.finish(ENTRIES, trials=7)


@pytest.fixture
def saved(result: Result, tmp_path: Path) -> Path:
    return result.export(tmp_path / "out")


def test_a_new_process_computes_the_same_logits(result: Result, saved: Path) -> None:
    code = (
        "import sys, torch, grainwise as gw\n"
        "from tests.networks import tiny, pictures\n"
        "torch.set_num_threads(1)\n"
        f"model = gw.load({str(saved)!r}, tiny(seed=5)).model\n"
        f"torch.save(model(pictures(16, 11)[0][0]), {str(saved / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    logits = torch.load(saved / "logits.pt", weights_only=True)
    torch.testing.assert_close(logits, result.model(pictures(16, 11)[0][0]), rtol=0, atol=1e-5)


def test_the_file_has_the_claimed_bytes(result: Result, saved: Path) -> None:
    assert result.measurement.size_bytes == (saved / artefact.WEIGHTS).stat().st_size
    assert sorted(p.name for p in saved.iterdir()) == [
        "README.md",
        "manifest.json",
        "model.safetensors",
        "profile.json",
    ]
    profile = json.loads((saved / artefact.PROFILE).read_text())
    assert profile["layers"]["block.0"]["structure"] == {"method": "distill", "granularity": "block", "level": 0.5}


def test_every_flip_and_cut_is_noticed(saved: Path) -> None:
    chance = random.Random(0)
    for name in (artefact.WEIGHTS, artefact.PROFILE, artefact.CARD):
        good = (saved / name).read_bytes()
        for _ in range(20):
            place = chance.randrange(len(good))
            flipped = bytes([good[place] ^ (1 << chance.randrange(8))])
            for bad in (good[:place] + flipped + good[place + 1 :], good[:place]):
                (saved / name).write_bytes(bad)
                with pytest.raises(ArtefactError, match=f"{name} is not the file"):
                    load(saved, tiny())
        (saved / name).write_bytes(good)
    load(saved, tiny())


def test_a_foreign_network_is_refused(saved: Path) -> None:
    with pytest.raises(ArtefactError, match="does not fit this network"):
        load(saved, torch.nn.Sequential(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../../etc/passwd": {"sha256": "0" * 64, "bytes": 1}}},
        {"version": 3},
        {"files": {}},
        {"modules": {"stem": {"kind": "os.system"}}},
        {"modules": {"nowhere.at.all": {"kind": "linear"}}},
        {"norms": {"norm": "x"}},
        {"resized": {"stem": [1]}},
    ],
)
def test_a_manifest_that_lies_is_refused(saved: Path, change: dict[str, Any]) -> None:
    path = saved / artefact.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtefactError):
        load(saved, tiny())


def test_a_full_disk_leaves_the_old_artefact(result: Result, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("save_file", "_sync"):
        with monkeypatch.context() as patched:
            patched.setattr(artefact, function, full)
            with pytest.raises(ArtefactError, match="No space left on device.*bytes are needed.*untouched"):
                result.export(saved)
            with pytest.raises(ArtefactError, match="No space left"):
                result.export(saved.parent / "new")
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["out"]


def test_a_manifest_of_version_1_is_read(saved: Path) -> None:
    path = saved / artefact.MANIFEST
    manifest = json.loads(path.read_text())
    assert manifest.pop("deployment") is None
    path.write_text(json.dumps({**manifest, "version": 1}))
    found = load(saved, tiny())
    assert (found.manifest.version, found.manifest.deployment) == (1, None)


def test_packed_weights_need_their_network(saved: Path) -> None:
    with pytest.raises(ArtefactError, match=r"has no model.onnx: .*give the network too"):
        load(saved)


def test_a_directory_that_is_no_artefact_is_left_alone(result: Result, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ArtefactError, match="is no artefact"):
        result.export(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_missing_file_is_named(saved: Path) -> None:
    (saved / artefact.WEIGHTS).unlink()
    with pytest.raises(ArtefactError, match="model.safetensors cannot be read"):
        load(saved, tiny())
    with pytest.raises(ArtefactError, match="is .* an artefact"):
        load(saved.parent / "nowhere", tiny())
