"""Networks of other kinds, with random weights, to see that inspection and search run on them.

grainwise search --model examples.zoo:bert --data examples.zoo:bert_data --size 0.3 --budget 20 --study bert
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grainwise import Data

CLASSES = 10


class DenseNet(nn.Module):
    """Input [B, 3, 32, 32]: three layers whose outputs are concatenated to all that came before (Huang et al. 2017)."""

    def __init__(self, growth: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2 * growth, 3, 2, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d((2 + i) * growth) for i in range(3))
        self.layers = nn.ModuleList(nn.Conv2d((2 + i) * growth, growth, 3, padding=1, bias=False) for i in range(3))
        self.fc = nn.Linear(5 * growth, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            y = torch.cat([y, layer(F.relu(norm(y)))], dim=1)
        logits: Tensor = self.fc(F.relu(y).mean(dim=(2, 3)))
        return logits


class TimeSeriesNet(nn.Module):
    """Input [B, 4, 64] signals: a fully convolutional classifier (Wang et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(4, 32, 7, padding=3),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Conv1d(32, 64, 5, 2, padding=2),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.Conv1d(64, 32, 3, padding=1, groups=2),
            nn.BatchNorm1d(32),
            nn.ReLU(),
        )
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.body(x).mean(dim=2))
        return logits


def densenet() -> nn.Module:
    torch.manual_seed(0)
    return DenseNet().eval()


def conv1d() -> nn.Module:
    torch.manual_seed(0)
    return TimeSeriesNet().eval()


def mobilenet_v2() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    torch.manual_seed(0)
    config = MobileNetV2Config(image_size=32, depth_multiplier=0.5)
    config.num_labels = CLASSES
    model: nn.Module = MobileNetV2ForImageClassification(config)
    return model.eval()


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
    )
    config.num_labels = CLASSES
    model: nn.Module = BertForSequenceClassification(config)
    return model.eval()


def _smooth(count: int, channels: int, size: tuple[int, ...], seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, *(max(2, s // 4) for s in size), generator=generator)
    mode = "bilinear" if len(size) == 2 else "linear"
    inputs = F.interpolate(coarse, size=size, mode=mode, align_corners=False)
    targets = torch.randint(0, CLASSES, (count,), generator=generator)
    return list(zip(inputs.split(32), targets.split(32), strict=True))


def _data(channels: int, size: tuple[int, ...]) -> Data:
    return Data(*(_smooth(64, channels, size, seed) for seed in (1, 2, 3)))


def picture_data() -> Data:
    return _data(3, (32, 32))


def signal_data() -> Data:
    return _data(4, (64,))


def bert_data() -> Data:
    def batches(seed: int) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, 1000, (64, 16), generator=generator)
        labels = torch.randint(0, CLASSES, (64,), generator=generator)
        return [
            {"input_ids": t, "attention_mask": torch.ones_like(t), "labels": y}
            for t, y in zip(tokens.split(32), labels.split(32), strict=True)
        ]

    return Data(batches(1), batches(2), batches(3))
