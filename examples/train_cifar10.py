"""Train a network on CIFAR-10 on two CPU cores: one-cycle SGD (Smith & Topin 2018), flip and crop, label smoothing.

    python -m examples.train_cifar10 resnet20 --epochs 32
    python -m examples.train_cifar10 resnet20 --epochs 14 --peak-rate 0.12 --label-smoothing 0 --seed 1 --warm-start
    python -m examples.train_cifar10 mobilenet --epochs 10 --peak-rate 0.2 --label-smoothing 0

The last 2,500 training pictures are held out: they are the search split of the demo, so that a search never ranks
candidates by pictures that the network was trained on. bfloat16 is used for the convolutions where the CPU has it.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from examples import cifar10, mobilenet, resnet20

NETWORKS = {
    "resnet20": (resnet20.ResNet20, resnet20.pretrained, resnet20.WEIGHTS),
    "mobilenet": (mobilenet.MobileNet, mobilenet.pretrained, mobilenet.WEIGHTS),
}


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of pictures classified correctly, 0 to 1, in float32."""
    model.eval()
    found = torch.cat([model(batch).argmax(1) for batch in images.split(500)])
    return float((found == labels).float().mean())


def train(
    *, network: str, epochs: int, batch: int, peak_rate: float, label_smoothing: float, seed: int, warm_start: bool
) -> dict[str, float | int]:
    """Train and save the weights; `warm_start` runs another cycle from the saved ones (SGDR, Loshchilov 2017)."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data = cifar10.load()
    images, labels = cifar10.normalise(data["train_images"]), torch.from_numpy(data["train_labels"]).long()
    images, labels = images[: -cifar10.HELD_OUT], labels[: -cifar10.HELD_OUT]
    fresh, pretrained, weights = NETWORKS[network]
    model: nn.Module = pretrained() if warm_start else fresh()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.SGD(model.parameters(), peak_rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, peak_rate, total_steps=epochs * steps, pct_start=0.2, anneal_strategy="linear", final_div_factor=1e3
    )
    bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    start = time.monotonic()
    for epoch in range(epochs):
        model.train()
        order, total = torch.randperm(len(images), generator=generator), 0.0
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            x = cifar10.augment(images[chosen], generator).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = F.cross_entropy(model(x).float(), labels[chosen], label_smoothing=label_smoothing)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs}  loss {total / steps:.4f}  {time.monotonic() - start:.0f} s", flush=True)
    test = cifar10.normalise(data["test_images"]), torch.from_numpy(data["test_labels"]).long()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, weights)
    return {
        "test_accuracy": accuracy(model, *test),
        "epochs": epochs,
        "seed": seed,
        "minutes": (time.monotonic() - start) / 60,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--epochs", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--peak-rate", type=float, default=0.3)
    parser.add_argument("--label-smoothing", type=float, default=0.05)
    parser.add_argument("--warm-start", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    record = NETWORKS[arguments.network][2].with_suffix(".json")
    cycles = json.loads(record.read_text()) if arguments.warm_start else []
    cycles.append(train(**vars(arguments)))
    record.write_text(json.dumps(cycles, indent=2) + "\n")
    print(json.dumps(cycles))


if __name__ == "__main__":
    main()
