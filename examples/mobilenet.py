"""A MobileNetV2 for CIFAR-10 (Sandler et al. 2018, table 2, narrowed to 32 pixels): inverted residuals with ReLU6."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights" / "mobilenet-cifar10.safetensors"
STAGES = (  # expansion, outputs, blocks, stride of the first block
    (1, 16, 1, 1),
    (4, 24, 2, 2),
    (4, 40, 3, 2),
    (4, 80, 3, 2),
)
HEAD = 320


def _convolution(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class Block(nn.Module):
    """Inverted residual: widen by `expansion`, depthwise convolution, narrow; a shortcut where the shape is kept.

    convolution: makes a convolution and its batch norm.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        expansion: int,
        stride: int,
        kernel: int = 3,
        convolution: Callable[..., list[nn.Module]] = _convolution,
    ) -> None:
        super().__init__()
        hidden = inputs * expansion
        widen = [*convolution(inputs, hidden, 1), nn.ReLU6()] if expansion != 1 else []
        self.body = nn.Sequential(
            *widen,
            *convolution(hidden, hidden, kernel, stride=stride, groups=hidden),
            nn.ReLU6(),
            *convolution(hidden, outputs, 1),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.shortcut else y


class MobileNet(nn.Module):
    """Input [B, 3, 32, 32], output [B, 10] logits."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        inputs = 16
        for expansion, outputs, count, first in STAGES:
            for stride in (first, *[1] * (count - 1)):
                blocks.append(Block(inputs, outputs, expansion=expansion, stride=stride))
                inputs = outputs
        self.stem = nn.Sequential(*_convolution(3, 16, 3), nn.ReLU6())
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(*_convolution(inputs, HEAD, 1), nn.ReLU6())
        self.fc = nn.Linear(HEAD, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.blocks(self.stem(x)))
        logits: Tensor = self.fc(y.mean(dim=(2, 3)))
        return logits


def pretrained() -> MobileNet:
    """The network with the weights that ship beside this file (test accuracy in weights/README.md)."""
    model = MobileNet()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()
