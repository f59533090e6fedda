"""Artefacts with an ONNX file: written, read and refused."""

from __future__ import annotations

import errno
import json
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto
from torch import Tensor, nn

from grainwise.export import artefact
from grainwise.export.artefact import RUNTIMES, ArtefactError, Deployment, load
from grainwise.export.manifest import MANIFEST, MODEL, WEIGHTS
from grainwise.export.runtime import open_session, run
from grainwise.graph.forward import Forward
from grainwise.plan import target
from grainwise.plan.choices import Choice, Entry, Granularity, Method
from grainwise.plan.profile import CompressionProfile
from grainwise.plan.target import ProcessorError
from tests.export.candidates import HERE, PLANS, Source, images, quantised, tiny_candidate, tiny_source
from tests.networks import tiny

TARGET = HERE.name
EMPTY = CompressionProfile({})


def save(
    directory: Path,
    source: Source,
    candidate: tuple[nn.Module, ModelProto],
    profile: CompressionProfile = EMPTY,
) -> Path:
    model, file = candidate
    return artefact.save(
        directory,
        model,
        reference=source.network,
        graph=source.graph,
        profile=profile,
        figures={"max_abs_difference": 0.25, "kernels": "4 QLinearConv"},
        card="# a card",
        deployment=Deployment(source.skeleton, file, TARGET, source.example),
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "out", tiny_source(), tiny_candidate("int8"))


def test_a_file_that_would_compute_wrongly_here_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = CompressionProfile({"stem": Entry(precision=quantised(8))}, target="ort-cpu-vnni")
    root = save(tmp_path / "out", tiny_source(), tiny_candidate("int8"), profile)
    (tmp_path / "cpuinfo").write_text("flags\t\t: ssse3 avx2\n")
    monkeypatch.setattr(target, "_CPUINFO", tmp_path / "cpuinfo")
    for runtime in RUNTIMES:
        with pytest.raises(ProcessorError, match="has no VNNI"):
            load(root, runtime=runtime)
    assert load(root, tiny(seed=5)).profile == profile  # PyTorch's sums do not overflow


@pytest.mark.parametrize("plan", PLANS)
def test_all_comes_back_bit_by_bit(plan: str, tmp_path: Path) -> None:
    model, file = tiny_candidate(plan)
    root = save(tmp_path / "out", tiny_source(), (model, file))
    found, deployed = load(root, tiny(seed=5)), load(root)
    (batch,) = images(32, 11)
    with torch.no_grad():
        torch.testing.assert_close(found.forward(found.model, batch), model(batch), rtol=0, atol=0)
    expected = run(open_session(file.SerializeToString()), {"input": batch})
    np.testing.assert_array_equal(deployed(batch), expected)
    np.testing.assert_array_equal(deployed(input=batch.numpy()), expected)
    assert (root / MODEL).stat().st_size == file.ByteSize()
    assert found.weights_bytes == (root / WEIGHTS).stat().st_size


def test_a_new_process_computes_the_same(saved: Path) -> None:
    code = (
        "import numpy, sys, torch, grainwise as gw\n"
        "from tests.networks import tiny, pictures\n"
        "torch.set_num_threads(1)\n"
        "x = pictures(32, 11)[0][0]\n"
        f"numpy.save({str(saved / 'file.npy')!r}, gw.load({str(saved)!r})(x))\n"
        f"found = gw.load({str(saved)!r}, tiny(seed=5))\n"
        f"numpy.save({str(saved / 'module.npy')!r}, found.forward(found.model, x).detach().numpy())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    model, file = tiny_candidate("int8")
    (batch,) = images(32, 11)
    np.testing.assert_array_equal(np.load(saved / "module.npy"), model(batch).numpy())
    expected = run(open_session(file.SerializeToString()), {"input": batch})
    np.testing.assert_array_equal(np.load(saved / "file.npy"), expected)


def test_the_manifest_says_what_there_is(saved: Path) -> None:
    found = load(saved).manifest
    assert found.deployment is not None and found.version == 2
    assert found.deployment.model_dump(mode="json") == {
        "target": TARGET,
        "nest": "tensor",
        "inputs": [{"name": "input", "dtype": "float32", "shape": [3, 8, 8]}],
        "points": ["input_1", "relu", "relu_1", "block_4", "relu_2", "relu_3"],
        "joins": ["add"],
        "folded": ["norm", "block.1", "block.4"],
    }
    assert sorted(found.files) == ["README.md", MODEL, WEIGHTS, "profile.json"]
    assert found.figures == {"max_abs_difference": 0.25, "kernels": "4 QLinearConv"}
    onnx.checker.check_model(str(saved / MODEL), full_check=True)


def test_every_flip_and_cut_of_the_file_is_noticed(saved: Path) -> None:
    chance = random.Random(0)
    good = (saved / MODEL).read_bytes()
    for _ in range(20):
        place = chance.randrange(len(good))
        flipped = bytes([good[place] ^ (1 << chance.randrange(8))])
        for bad in (good[:place] + flipped + good[place + 1 :], good[:place]):
            (saved / MODEL).write_bytes(bad)
            for arguments in ((saved,), (saved, tiny())):
                with pytest.raises(ArtefactError, match=f"{MODEL} is not the file"):
                    load(*arguments)
    (saved / MODEL).unlink()
    with pytest.raises(ArtefactError, match=f"{MODEL} cannot be read"):
        load(saved)


def test_a_full_disk_leaves_the_old_artefact(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    written = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name == MODEL:
            written(path, content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    model, file = tiny_candidate("int8")
    for place in (saved, saved.parent / "new"):
        with pytest.raises(ArtefactError, match=r"No space left on device.*about \d+ bytes are needed.*untouched"):
            save(place, tiny_source(), (model, file))
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(2, 2)), nn.Conv2d(3, 16, 3)])
def test_a_foreign_network_is_refused(saved: Path, model: nn.Module) -> None:
    with pytest.raises(ArtefactError, match="does not fit this network"):
        load(saved, model)


@pytest.mark.parametrize(
    "change",
    [
        {"points": ["nowhere"]},
        {"points": []},
        {"joins": ["nowhere"]},
        {"folded": ["nowhere"]},
        {"nest": "heap"},
        {"inputs": []},
        {"inputs": [{"name": "input", "dtype": "float32", "shape": [5]}]},
        {"inputs": [{"name": "input", "dtype": "os.system", "shape": [3, 8, 8]}]},
        {"inputs": [{"name": "input", "dtype": "float32", "shape": [-1]}]},
    ],
)
def test_a_manifest_that_lies_is_refused(saved: Path, change: dict[str, Any]) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    manifest["deployment"] |= change
    (saved / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError):
        load(saved, tiny())


def test_a_file_that_the_manifest_leaves_out_is_not_run(saved: Path) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    del manifest["files"][MODEL]
    (saved / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError, match=f"{MODEL} is not the file that the manifest describes"):
        load(saved)


class Words(nn.Module):
    """Inputs int64 [B, T]: tokens and their weights; output [B, 6]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(40, 16)
        self.hidden = nn.Linear(16, 32)
        self.norm = nn.LayerNorm(32)
        self.position = nn.Parameter(torch.randn(1, 1, 32))
        self.out = nn.Linear(32, 6)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(torch.relu(self.hidden(self.table(ids))) + self.position)
        weights = mask.unsqueeze(-1).float()
        logits: Tensor = self.out((x * weights).sum(1) / (weights.sum(1) + 1))
        return logits


def _words(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return {
        "ids": torch.randint(0, 40, (count, 7), generator=generator),
        "mask": torch.randint(0, 2, (count, 7), generator=generator),
    }


def _by_name(model: nn.Module, batch: Any) -> Tensor:
    output: Tensor = model(ids=batch["ids"], mask=batch["mask"])
    return output


def _in_order(model: nn.Module, batch: Any) -> Tensor:
    output: Tensor = model(*batch)
    return output


@pytest.mark.parametrize("nest, forward", [("mapping", _by_name), ("sequence", _in_order)])
def test_batches_of_several_tensors_come_back(nest: str, forward: Forward, tmp_path: Path) -> None:
    def shaped(batch: Mapping[str, Tensor]) -> Any:
        return dict(batch) if nest == "mapping" else tuple(batch.values())

    source = Source.of(Words().eval(), [shaped(_words(16))], shaped(_words(2)), forward)
    entries = {
        "table": Entry(precision=quantised(4, Granularity.BLOCK)),
        "hidden": Entry(precision=quantised(8)),
        "out": Entry(Choice(Method.FACTORIZE, Granularity.LAYER, 0.5)),
    }
    model, file = source.candidate(entries)
    root = save(tmp_path / "out", source, (model, file))
    batch = _words(9)
    found = load(root, Words(), forward)
    with torch.no_grad():
        ours = found.forward(found.model, shaped(batch))
        torch.testing.assert_close(ours, model(*batch.values()), rtol=0, atol=0)
    spec = found.manifest.deployment
    assert spec is not None and (spec.nest, [i.shape for i in spec.inputs]) == (nest, [(7,), (7,)])
    deployed = load(root)
    by_order = deployed(*batch.values())
    by_name = deployed(**dict(zip((i.name for i in spec.inputs), batch.values(), strict=True)))
    np.testing.assert_array_equal(by_order, by_name)
    np.testing.assert_allclose(by_order, ours, atol=1e-5)


@pytest.mark.parametrize("example", [(), {"a": torch.zeros(2), "b": 3}, ([torch.zeros(2)],)])
def test_a_batch_of_other_things_is_refused(example: Any, tmp_path: Path) -> None:
    source = tiny_source()
    model, file = tiny_candidate("float")
    with pytest.raises(ArtefactError, match="a batch must be a tensor, or a sequence or mapping"):
        Deployment(source.skeleton, file, TARGET, example).spec(model)
