"""The MobileNetV2 for CIFAR-10: the shipped weights are those that the record beside them speaks of."""

from __future__ import annotations

import json

import torch

from examples import cifar10, mobilenet
from examples.train_cifar10 import accuracy
from tests.examples.conftest import or_skip


def test_it_is_as_accurate_as_its_record_says() -> None:
    network = mobilenet.pretrained()
    assert sum(p.numel() for p in network.parameters()) == 209_594
    data = or_skip(cifar10.load)
    images, labels = cifar10.normalise(data["test_images"]), torch.from_numpy(data["test_labels"]).long()
    (cycle,) = json.loads(mobilenet.WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))
    assert abs(accuracy(network, images, labels) - cycle["test_accuracy"]) < 0.001
