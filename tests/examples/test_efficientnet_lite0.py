"""EfficientNet-Lite0: the packaged weights fit, classify ImageNet pictures, and the network exports."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from examples import efficientnet_lite0
from examples.cache import wheel
from grainwise.evaluate.data import Splits
from tests.examples.conftest import or_skip

PICTURES = wheel(
    "foolbox==3.3.4",
    "foolbox-3.3.4-py3-none-any.whl",
    "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return or_skip(efficientnet_lite0.model)


def centre(picture: Image.Image) -> np.ndarray:
    """uint8 [3, 224, 224]: the shorter side made 256, then the middle."""
    scale = 256 / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    left, top = (width - 224) // 2, (height - 224) // 2
    resized = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + 224, top + 224))).transpose(2, 0, 1)


def imagenet() -> tuple[Tensor, Tensor]:
    """The 20 pictures of foolbox, [20, 3, 224, 224], and their labels [20], which end their names."""
    with zipfile.ZipFile(PICTURES.fetch()) as package:
        names = [name for name in package.namelist() if "/imagenet_" in name]
        pictures = [centre(Image.open(io.BytesIO(package.read(name)))) for name in names]
    labels = [int(name.rpartition("_")[2].partition(".")[0]) for name in names]
    return efficientnet_lite0.normalise(np.stack(pictures)), torch.tensor(labels)


def test_it_has_the_published_size() -> None:
    network = efficientnet_lite0.EfficientNetLite0()
    assert sum(p.numel() for p in network.parameters()) == 4_652_008
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == 49


@pytest.mark.parametrize("kernel", [3, 5])
def test_padding_is_that_of_same(kernel: int) -> None:
    """SAME on 8 pixels with stride 2 pads kernel - 2 in all, the smaller half first: window i starts there."""
    padded, convolution, _ = efficientnet_lite0._convolution(1, 1, kernel, stride=2)
    nn.init.zeros_(convolution.weight)
    convolution.weight.data[0, 0, 0, 0] = 1  # gives the first value of each window
    before = (kernel - 2) // 2
    positions = torch.arange(8.0).add(1).expand(1, 1, 8, 8)
    expected = [max(0, 2 * i - before + 1) for i in range(4)]
    assert convolution(padded(positions))[0, 0, -1].tolist() == expected


def test_imagenet_pictures_are_classified(network: nn.Module) -> None:
    inputs, labels = or_skip(imagenet)
    with torch.inference_mode():
        assert int((network(inputs).argmax(1) == labels).sum()) >= 18


def test_it_exports_with_any_batch() -> None:
    network = efficientnet_lite0.EfficientNetLite0().eval()
    program = torch.export.export(
        network, (torch.zeros(2, 3, 64, 64),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
    )
    x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(program.module()(x), network(x))


def test_its_data_are_disjoint_and_labelled() -> None:
    splits = Splits.read(or_skip(efficientnet_lite0.data))
    sizes = [sum(len(batch.inputs) for batch in part) for part in (splits.calibration, splits.search, splits.test)]
    assert sizes == [1024, 256, 2000]
    assert splits.test[0].inputs.shape == (32, 3, 128, 128)
    assert len(torch.cat([batch.targets for batch in splits.test]).unique()) > 100
