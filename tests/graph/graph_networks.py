"""Small networks of the shapes that tracing must understand, each with example inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
)

from examples.resnet20 import ResNet20


class DenseNet(nn.Module):
    """Every layer reads the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grow = nn.ModuleList(nn.Conv2d(8 + 6 * k, 6, 3, padding=1) for k in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 6 * k) for k in range(3))
        self.head = nn.Linear(26, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.grow, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Grouped(nn.Module):
    """A grouped convolution between plain ones, a depthwise one with two filters for each channel, then a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.b = nn.Conv2d(8, 6, 1)
        self.depthwise = nn.Conv2d(6, 12, 3, padding="same", groups=6)
        self.gate = nn.Conv2d(12, 12, 1)
        self.c = nn.Conv2d(12, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(F.relu(self.b(self.grouped(self.a(x)))))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(self.c(x).mean((2, 3)))


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.head = nn.Linear(12, 20)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(tokens)))


class Attention(nn.Module):
    """Attention that reads its output projection without calling it, then a feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.attention(x, x, x)[0])))


class Twice(nn.Module):
    """One layer that runs twice, at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.shared(self.stem(x)))
        return self.head(F.relu(self.shared(F.max_pool2d(x, 2))).mean((2, 3)))


class Halves(nn.Module):
    """A layer whose outputs are gated by their other half, and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Conv2d(3, 16, 1)
        self.up = nn.ConvTranspose2d(8, 10, 2, 2)
        self.norm = nn.BatchNorm2d(10)
        self.slope = nn.PReLU(10)
        self.head = nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.both(x).chunk(2, dim=1)
        return self.head(self.slope(self.norm(self.up(a * torch.sigmoid(b))))).flatten(1)


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 8, 5, padding="same"),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.AvgPool1d(2),
        nn.Conv1d(8, 10, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(10, 3),
    )


def vgg() -> nn.Module:
    """Convolutions whose flattened maps feed a Linear: each channel is several of its inputs."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12 * 4 * 4, 16),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(16, 5),
    )


def mobilenet() -> nn.Module:
    config = MobileNetV2Config(image_size=32, depth_multiplier=0.25, min_depth=8, num_labels=10)
    return MobileNetV2ForImageClassification(config)


def bert() -> nn.Module:
    config = BertConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=100,
        max_position_embeddings=32,
    )
    return BertForSequenceClassification(config)


def _tokens(high: int, length: int) -> Tensor:
    return torch.randint(0, high, (2, length), generator=torch.Generator().manual_seed(1))


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "resnet20": (ResNet20, _noise(2, 3, 32, 32)),
    "mobilenet": (mobilenet, _noise(2, 3, 32, 32)),
    "bert": (bert, {"input_ids": _tokens(100, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}),
    "densenet": (DenseNet, _noise(2, 3, 8, 8)),
    "conv1d": (conv1d, _noise(2, 4, 32)),
    "vgg": (vgg, _noise(2, 3, 16, 16)),
    "grouped": (Grouped, _noise(2, 3, 8, 8)),
    "tied": (Tied, _tokens(20, 6)),
    "attention": (Attention, (_noise(2, 5, 16),)),
    "twice": (Twice, _noise(2, 3, 8, 8)),
    "halves": (Halves, _noise(2, 3, 6, 6)),
}


def build(name: str) -> tuple[nn.Module, Any]:
    """The network with lively weights: no bias is zero and no batch norm is the identity."""
    torch.manual_seed(0)
    factory, inputs = NETWORKS[name]
    model = factory().eval()
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if key.endswith(("bias", "running_mean")):
            tensor.data.normal_(0, 0.3)
        elif key.endswith("running_var"):
            tensor.data.uniform_(0.5, 2)
    return model, inputs
