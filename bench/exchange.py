"""What `bench.peers` and the scripts that run in the peers' own environments hand each other: files in one folder.

Needs torch and safetensors alone: a peer's environment has no grainwise. To a peer go task.json and
pictures.safetensors; back come weights.safetensors, the network's state under the names of `examples.resnet20`, and
result.json: how each layer's weights may be stored, the kept channels, seconds and versions.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from math import ceil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SCALE_BYTES, FLOAT_BYTES = 2, 4


@dataclass(frozen=True, slots=True)
class Format:
    """How the weights of one layer may be stored. bits: of each weight; 32 is float32, which needs no scales.
    scales: how many float16 scales they share. zero_points: whether each scale has a zero point of `bits` bits too.
    """

    bits: int
    scales: int = 0
    zero_points: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 32 or self.scales < (self.bits < 32):
            raise ValueError(f"{self.bits} bits with {self.scales} scales: give 1 to 32 bits, and scales below 32")

    def stored_bytes(self, weights: int) -> int:
        points = ceil(self.scales * self.bits / 8) if self.zero_points else 0
        return ceil(weights * self.bits / 8) + SCALE_BYTES * self.scales + points


FLOAT = Format(32)


def layers_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of convolutions and linear layers, by layer."""
    return {name.removesuffix(".weight"): value for name, value in state.items() if value.dim() > 1}


def counted_bytes(state: Mapping[str, Tensor], formats: Mapping[str, Format]) -> int:
    """The size of a network by the one rule that serves for all: packed codes, their scales, and a float32 bias for
    each output of every layer, which holds what its batch norm shifts by (what that scales by is in the scales).
    Neither graph nor header counts. formats: by layer; FLOAT where a layer is not named.
    """
    return sum(
        formats.get(name, FLOAT).stored_bytes(weight.numel()) + FLOAT_BYTES * weight.shape[0]
        for name, weight in layers_of(state).items()
    )


def effective_bits(state: Mapping[str, Tensor], share: float) -> float:
    """Bits that each weight may take on average when `counted_bytes` may be `share` of float32's and every output of a
    layer has a scale of its own.
    """
    layers = layers_of(state).values()
    beside = sum((FLOAT_BYTES + SCALE_BYTES) * weight.shape[0] for weight in layers)
    return 8 * (share * counted_bytes(state, {}) - beside) / sum(weight.numel() for weight in layers)


def check_levels(state: Mapping[str, Tensor], formats: Mapping[str, Format]) -> None:
    """Raises ValueError when an output of a layer has more distinct weights than its bits can tell apart."""
    for name, form in formats.items():
        most = max(len(row.unique()) for row in state[f"{name}.weight"].flatten(1))
        if form.bits < 32 and most > 2**form.bits:
            raise ValueError(f"{name} is said to have {form.bits} bits, but {most} distinct weights in one output")


@dataclass(frozen=True, slots=True)
class Task:
    """What a peer is asked for: `share` of the uncompressed network's `cost`, `size` (by `counted_bytes`) or `macs`.

    bits: of the formats that it may choose from. way: which of its own ways it takes, by the peer's words.
    calibration, search: pictures `[N, 3, 32, 32]`, float32 and normalised; their labels `[N]`.
    """

    cost: str
    share: float
    bits: tuple[int, ...]
    way: str
    calibration: Tensor
    calibration_labels: Tensor
    search: Tensor
    search_labels: Tensor

    def write(self, folder: Path) -> None:
        facts = {"cost": self.cost, "share": self.share, "bits": self.bits, "way": self.way}
        (folder / "task.json").write_text(json.dumps(facts), encoding="utf-8")
        names = ("calibration", "calibration_labels", "search", "search_labels")
        save_file({name: getattr(self, name).contiguous() for name in names}, folder / "pictures.safetensors")

    @staticmethod
    def read(folder: Path) -> Task:
        facts = json.loads((folder / "task.json").read_text(encoding="utf-8"))
        pictures = load_file(folder / "pictures.safetensors")
        return Task(facts["cost"], facts["share"], tuple(facts["bits"]), facts["way"], **pictures)


@dataclass(frozen=True, slots=True)
class Made:
    """What a peer made. state: of the network, values as they are after quantisation, in float32.

    formats: by layer. kept: by batch norm the numbers of the channels that are left, ascending; empty when all are.
    seconds: of processor time, from the loaded network to the result. versions: by package.
    """

    state: Mapping[str, Tensor]
    formats: Mapping[str, Format]
    seconds: float
    versions: Mapping[str, str]
    kept: Mapping[str, list[int]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        state = {name: value.detach().contiguous() for name, value in self.state.items()}
        save_file(state, folder / "weights.safetensors")
        facts = {
            "formats": {name: asdict(form) for name, form in self.formats.items()},
            "seconds": self.seconds,
            "versions": dict(self.versions),
            "kept": dict(self.kept),
        }
        (folder / "result.json").write_text(json.dumps(facts), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Made:
        facts = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        formats = {name: Format(**form) for name, form in facts.pop("formats").items()}
        return Made(state=load_file(folder / "weights.safetensors"), formats=formats, **facts)


def processor_seconds() -> float:
    """Processor time of this process and its ended children: other work on the machine does not count."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def allow_torchvision() -> torch.library.Library:
    """Lets torchvision be imported beside a torch for processors alone: its compiled operators, which no script here
    runs, do not load there, and it stops at the two that it names on import. Keep what is returned.
    """
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return operators


def versions(packages: Iterable[str]) -> dict[str, str]:
    return {name: version(name) for name in packages}
