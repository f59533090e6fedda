"""Small networks and data that tests of several packages share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from grainwise import Data
from grainwise.graph.forward import default_forward
from grainwise.realise.norms import reestimate_norms


class TinyResidual(nn.Module):
    """Input [B, 3, 8, 8], output [B, 4]: a stem, a residual block, a strided convolution and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.block = nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
        )
        self.down = nn.Conv2d(16, 32, 3, 2, padding=1)
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(y + self.block(y))
        logits: Tensor = self.fc(torch.relu(self.down(y)).mean(dim=(2, 3)))
        return logits


def tiny(seed: int = 0) -> TinyResidual:
    """A network whose norms know its data and whose logits are spread enough to be worth keeping."""
    torch.manual_seed(seed)
    model = TinyResidual()
    model.eval()
    reestimate_norms(model, [inputs for inputs, _ in pictures(128, seed=99)], default_forward)
    with torch.no_grad():
        model.fc.weight.mul_(8)
    return model


def pictures(count: int, seed: int, batch: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Smooth random pictures, labelled by the network that `tiny(0)` is before its norms saw data: any labels do."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    images = nn.functional.interpolate(coarse, size=8, mode="bilinear", align_corners=False)
    labels = torch.randint(0, 4, (count,), generator=generator)
    return list(zip(images.split(batch), labels.split(batch), strict=True))


def tiny_training() -> list[tuple[Tensor, Tensor]]:
    """Of no split of `tiny_data`."""
    return pictures(128, 7)


def tiny_data() -> Data:
    return Data(calibration=pictures(64, 1), search=pictures(64, 2), test=pictures(64, 3))
