"""The same files in OpenVINO and in ONNX Runtime: uniform and random profiles of ResNet-20 and MiniLM.

    python -m bench.openvino [--networks resnet20 minilm]

Prints what `grainwise verify --runtime openvino` reports of each, on the test split (decision 0010).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from examples import cifar10, minilm, resnet20
from grainwise.evaluate.calibration import random_profile
from grainwise.evaluate.deployed import file_metric, openvino_figures
from grainwise.plan.choices import Choice, Entry, Granularity, Method
from grainwise.plan.space import SearchSpace
from grainwise.session import Session

SEED, RANDOM = 0, 3

NETWORKS: dict[str, Callable[[], Session]] = {
    "resnet20": lambda: Session.prepare(resnet20.pretrained(), cifar10.splits()),
    "minilm": lambda: Session.prepare(minilm.model(), minilm.data(), metric=minilm.metric),
}


def profiles(space: SearchSpace) -> Iterator[tuple[str, Mapping[str, Entry]]]:
    yield "float32", {}
    for bits in (8, 4, 2):
        entry = Entry(precision=Choice(Method.QUANTIZE, Granularity.CHANNEL, bits))
        yield f"{bits} bits everywhere", {layer.name: entry for layer in space.layers if not layer.tied_to}
    generator = np.random.default_rng(SEED)
    for number in range(RANDOM):
        yield f"random profile {number}", random_profile(space, generator)


def study(session: Session) -> Iterator[tuple[str, dict[str, Any]]]:
    evaluator = session.evaluator
    assert evaluator.marked is not None
    names, metric, test = evaluator.marked.skeleton.inputs, evaluator.scoring.metric, session.splits.test
    for label, entries in profiles(session.space):
        file = evaluator.finish(entries).file if entries else evaluator.reference_file
        assert file is not None
        content = file.SerializeToString()
        figures = openvino_figures(content, test, names, metric)
        yield label, {"onnx_accuracy": file_metric(content, test, names, metric), **figures}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.networks:
        for label, figures in study(NETWORKS[name]()):
            print(json.dumps({"network": name, "profile": label, **figures}), flush=True)


if __name__ == "__main__":
    main()
