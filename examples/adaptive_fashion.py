"""A training loop of one's own that compresses while it trains, and goes on where it was cut.

python -m examples.adaptive_fashion out/adaptive [--pictures 30000] [--epochs 12]

A small network on Fashion-MNIST to a sixteenth of its bytes and half of its multiplications. Cut it with Ctrl-C or
kill -9 and run it again: it ends with the same profile and the same weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import grainwise as gw
from examples import cache, fashion

BATCH = 128
CONSTRAINTS = {"size": 1 / 16, "macs": 0.5}


def batches(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--pictures", type=int, default=30_000)
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stored = cache.arrays("fashion-mnist.npz", fashion.fetch)
    images, labels = fashion.normalise(stored["train_images"]), torch.from_numpy(stored["train_labels"]).long()
    test = batches(fashion.normalise(stored["test_images"]), torch.from_numpy(stored["test_labels"]).long())
    held_out = batches(images[-1024:], labels[-1024:])

    model = fashion.FashionNet()
    steps = arguments.pictures // BATCH
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, total_steps=arguments.epochs * steps)
    adaptive = gw.AdaptiveCompression(
        model,
        data=gw.Data(calibration=held_out[:4], search=held_out[4:], test=test),
        constraints=CONSTRAINTS,
        epochs=arguments.epochs,
        folder=arguments.out / "run",
        stateful={"optimiser": optimiser, "schedule": schedule},
        resume=(arguments.out / "run" / "checkpoint.safetensors").exists(),
    )
    for _ in range(adaptive.epoch, arguments.epochs):
        model.train()
        for chosen in torch.randperm(arguments.pictures)[: steps * BATCH].split(BATCH):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        ended = adaptive.end_epoch()
        print(f"epoch {adaptive.epoch}: {ended.given}, decided in {ended.seconds:.1f} s", flush=True)
    result = adaptive.result()
    result.export(arguments.out / "artefact")
    figures = result.figures()
    print({name: figures[name] for name in ("onnx_accuracy", "size_bytes", "reference_size_bytes", "macs")})


if __name__ == "__main__":
    main()
