"""Torch-Pruning (VainF/Torch-Pruning): channels by the importance of whole groups.

    python -m bench.peer_torch_pruning FOLDER     (in its own environment, by `bench.peers`)

Way: its importance, `magnitude` or `taylor` (of the loss on calibration pictures), of each group the same ratio as is
its default, or `global`: the least important of all. It takes a ratio of channels and searches nothing; here channels
are removed in steps of one percent until the share is met.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

from bench.exchange import Made, Task, counted_bytes, processor_seconds, versions
from examples import resnet20

STEPS, GRADIENT_PICTURES = 100, 128


def channels_kept(before: nn.Module, after: nn.Module) -> dict[str, list[int]]:
    """By batch norm; a channel is known by its running mean, which pruning only copies."""
    kept = {}
    for name, norm in after.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            old, new = (model.state_dict()[f"{name}.running_mean"].tolist() for model in (before, after))
            assert len(set(old)) == len(old)
            kept[name] = [old.index(value) for value in new]
    return kept


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = Path(sys.argv[1])
    task, model = Task.read(folder), resnet20.pretrained()
    start = processor_seconds()
    example = task.calibration[:1]
    importance, _, scope = task.way.partition(" ")
    importances = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=importances[importance](),
        global_pruning=scope == "global",
        pruning_ratio=0.98,
        iterative_steps=STEPS,
        ignored_layers=[model.fc],
    )

    def cost() -> float:
        if task.cost == "size":
            return counted_bytes(model.state_dict(), {})
        return float(tp.utils.count_ops_and_params(model, example)[0])

    budget = task.share * cost()
    while cost() > budget and pruner.current_step < STEPS:
        if importance == "taylor":  # gradients have the shapes of the channels that are left
            model.zero_grad()
            pictures, labels = task.calibration[:GRADIENT_PICTURES], task.calibration_labels[:GRADIENT_PICTURES]
            F.cross_entropy(model(pictures), labels).backward()
        pruner.step()
    if cost() > budget:
        sys.exit(f"out of its reach: no ratio of channels gives {task.share:.3f} of {task.cost}")
    seconds = processor_seconds() - start
    kept = channels_kept(resnet20.pretrained(), model)
    Made(model.state_dict(), {}, seconds, versions(("torch-pruning", "torch")), kept).write(folder)


if __name__ == "__main__":
    main()
