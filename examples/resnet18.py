"""ResNet-18 with the stem for pictures of 32 pixels (He et al. 2016), with random weights: a larger network for timing.

11.2 M parameters, 0.56 G multiply-accumulates. The data are CIFAR-10 pictures, the targets the network's own classes.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import agreement, cifar10
from examples.resnet20 import BasicBlock
from grainwise import Data

SEED = 0
NORM_BATCHES = 4
CALIBRATION, SEARCH, TEST = 128, 128, 500


class ResNet18(nn.Module):
    """Input [B, 3, 32, 32], output [B, 10] logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        widths = (64, 64, 128, 256, 512)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(BasicBlock(inputs, outputs, outputs // inputs), BasicBlock(outputs, outputs, 1))
                for inputs, outputs in pairwise(widths)
            )
        )
        self.fc = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stages(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.fc(y.mean(dim=(2, 3)))
        return logits


def _inputs() -> dict[str, Tensor]:
    parts = cifar10.parts(calibration=CALIBRATION, search=SEARCH, test=TEST)
    return {split: cifar10.normalise(images) for split, (images, _) in parts.items()}


@torch.no_grad()
def _settle(network: ResNet18, pictures: Tensor) -> None:
    """Give the batch norms the statistics of `pictures` [N, 3, 32, 32], and the logits a mean of zero over them.

    With the drawn bias two classes would take 97 % of the pictures, and agreement would say little.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over the batches
    network.train()
    logits = torch.cat([network(batch) for batch in pictures.chunk(NORM_BATCHES)])
    network.fc.bias.sub_(logits.mean(0))


def model() -> ResNet18:
    """The network in evaluation mode, always the same. Raises Unavailable when CIFAR-10 cannot be fetched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = ResNet18()
    _settle(network, _inputs()["calibration"])
    return network.eval()


def data() -> Data:
    """Pictures [B, 3, 32, 32], 128 for calibration, 128 for search and 500 for test; targets as in `agreement`."""
    return agreement.labelled(model(), _inputs())
