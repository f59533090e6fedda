"""A small Fashion-MNIST network and a small subset of the data, both shipped: the demo where CIFAR-10 cannot be had.

Xiao et al. 2017, MIT licence. `python -m examples.fashion` fetches the full set (Debian package
`dataset-fashion-mnist`), trains the network and writes the two files anew.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.cache import Unavailable
from grainwise import Data

WEIGHTS = Path(__file__).parent / "weights" / "fashion.safetensors"
SUBSET = Path(__file__).parent / "weights" / "fashion-subset.npz"
SIZES = {"calibration": 256, "search": 512, "test": 1000}


class FashionNet(nn.Module):
    """Input [B, 1, 28, 28], output [B, 10] logits; a residual pair, a depthwise layer and a strided layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(16, 32, 3, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.residual = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
        )
        self.depthwise = nn.Sequential(nn.Conv2d(32, 32, 3, 2, padding=1, groups=32), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.stem(x))
        y = F.relu(y + self.residual(y))
        logits: Tensor = self.classifier(self.wide(self.depthwise(y)).mean(dim=(2, 3)))
        return logits


def normalise(images: np.ndarray) -> Tensor:
    """uint8 [N, 28, 28] to float32 [N, 1, 28, 28] of about zero mean and unit variance."""
    return (torch.from_numpy(images.copy()).float().unsqueeze(1) / 255 - 0.286) / 0.353


def pretrained() -> FashionNet:
    model = FashionNet()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def splits() -> Data:
    """The shipped subset: calibration from the training pictures, search and test from the official test set."""
    with np.load(SUBSET, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}

    def batches(split: str) -> list[tuple[Tensor, Tensor]]:
        images, labels = normalise(arrays[f"{split}_images"]), torch.from_numpy(arrays[f"{split}_labels"]).long()
        return list(zip(images.split(256), labels.split(256), strict=True))

    return Data(calibration=batches("calibration"), search=batches("search"), test=batches("test"))


def fetch() -> dict[str, np.ndarray]:
    """`train_images` uint8 [60000, 28, 28], `train_labels` [60000], and `test_*` of 10000."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            subprocess.run(["apt-get", "download", "dataset-fashion-mnist"], cwd=directory, check=True)
            (package,) = Path(directory).glob("*.deb")
            subprocess.run(["dpkg", "-x", str(package), directory], check=True)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            raise Unavailable(f"Debian's dataset-fashion-mnist could not be fetched: {error}") from error
        root = Path(directory) / "usr/share/datasets/fashion-mnist"
        names = {"train": "train", "test": "t10k"}
        return {
            f"{split}_{what}": _idx(next(root.glob(f"{prefix}-{what}-*")))
            for split, prefix in names.items()
            for what in ("images", "labels")
        }


def _idx(path: Path) -> np.ndarray:
    """IDX: byte 3 is the number of dimensions, then that many big-endian uint32 sizes, then uint8 data."""
    raw = gzip.decompress(path.read_bytes())
    sizes = np.frombuffer(raw, dtype=">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)


def train(data: dict[str, np.ndarray], epochs: int = 6, seed: int = 0) -> FashionNet:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = normalise(data["train_images"]), torch.from_numpy(data["train_labels"].copy()).long()
    model = FashionNet()
    steps = len(images) // 128
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, total_steps=epochs * steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator)[: steps * 128].split(128):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def main() -> None:
    data = fetch()
    model = train(data)
    with torch.inference_mode():
        outputs = torch.cat([model(x) for x in normalise(data["test_images"]).split(500)])
    accuracy = float((outputs.argmax(1).numpy() == data["test_labels"]).mean())
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, WEIGHTS)
    WEIGHTS.with_suffix(".json").write_text(json.dumps({"test_accuracy": accuracy}, indent=2) + "\n")
    arrays = {f"calibration_{what}": data[f"train_{what}"][: SIZES["calibration"]] for what in ("images", "labels")}
    start = SIZES["search"]
    for what in ("images", "labels"):
        arrays[f"search_{what}"] = data[f"test_{what}"][:start]
        arrays[f"test_{what}"] = data[f"test_{what}"][start : start + SIZES["test"]]
    np.savez_compressed(SUBSET, **arrays)  # type: ignore[arg-type]
    print(f"test accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
