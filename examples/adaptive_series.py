"""A fully convolutional network over time series that is compressed while it trains: Conv1d.

python -m examples.adaptive_series [--epochs 60] [--uncompressed]

JapaneseVowels (Kudo et al. 1999; UEA archive): 12 coefficients over 25 steps, 9 speakers, 270 series to learn from and
370 to test. The network is that of Wang et al. 2017.
"""

from __future__ import annotations

import argparse
import zipfile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grainwise as gw
from examples.cache import wheel

SERIES = wheel(
    "aeon==1.6.0",
    "aeon-1.6.0-py3-none-any.whl",
    "d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409",
)
BATCH = 16
CONSTRAINTS = {"size": 1 / 8, "macs": 0.5}


class SeriesNet(nn.Module):
    """Input [B, channels, steps], output [B, classes] logits."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        widths, kernels = (channels, 64, 128, 64), (8, 5, 3)
        layers: list[nn.Module] = []
        for inputs, outputs, kernel in zip(widths, widths[1:], kernels, strict=False):
            layers += [nn.Conv1d(inputs, outputs, kernel, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.body(x).mean(2))
        return logits


def load(part: str) -> tuple[Tensor, Tensor]:
    """Series [N, 12, steps] and classes [N] of `TRAIN` or `TEST`, in a random order that is always the same."""
    with zipfile.ZipFile(SERIES.fetch()) as package:
        text = package.read(f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_eq_{part}.ts").decode()
    lines = [line.split(":") for line in text.partition("@data")[2].split()]
    series = torch.tensor([[[float(value) for value in row.split(",")] for row in rows] for *rows, _ in lines])
    classes = torch.tensor([int(line[-1]) - 1 for line in lines])
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0))
    return series[order], classes[order]


def batches(series: Tensor, classes: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(series.split(BATCH), classes.split(BATCH), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--uncompressed", action="store_true", help="train as it would be by itself")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    learnt, test = load("TRAIN"), load("TEST")
    calibration, search, training = ([part[a:b] for part in learnt] for a, b in ((0, 32), (32, 96), (96, 270)))
    model = SeriesNet(12, 9)
    adaptive = gw.AdaptiveCompression(
        model,
        data=gw.Data(calibration=batches(*calibration), search=batches(*search), test=batches(*test)),
        constraints={} if arguments.uncompressed else CONSTRAINTS,
        epochs=arguments.epochs,
    )
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, arguments.epochs)
    for _ in range(arguments.epochs):
        model.train()
        for chosen in torch.randperm(len(training[0])).split(BATCH):
            loss = F.cross_entropy(model(training[0][chosen]), training[1][chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
        adaptive.end_epoch()
    result = adaptive.result()
    figures = result.figures()
    print({name: figures[name] for name in ("onnx_accuracy", "size_bytes", "reference_size_bytes", "macs")})
    print({name: str(entry) for name, entry in result.entries.items()})


if __name__ == "__main__":
    main()
