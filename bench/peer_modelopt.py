"""NVIDIA ModelOpt's `auto_quantize` (NVIDIA/Model-Optimizer): number formats by gradient scores and a linear programme.

    python -m bench.peer_modelopt FOLDER     (in its own environment, by `bench.peers`)

Way: how ModelOpt calibrates the scales of weights, `max` or `mse`. Its own formats of integers are 8 bits, and 4 bits
in blocks; those asked for here are custom ones with a scale for each output, as its documentation shows.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.exchange import Format, Made, Task, effective_bits, layers_of, processor_seconds, versions
from examples import resnet20

BATCH = 128


def formats(task: Task) -> list[dict[str, Any]]:
    """Weights alone, symmetric, a scale for each output."""
    return [
        {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}},
            ],
            "algorithm": task.way or "max",
        }
        for bits in task.bits
    ]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = Path(sys.argv[1])
    task, model = Task.read(folder), resnet20.pretrained()
    names = list(model.state_dict())
    start = processor_seconds()

    def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(output, batch[1])

    batches = list(zip(task.calibration.split(BATCH), task.calibration_labels.split(BATCH), strict=True))
    model, _ = mtq.auto_quantize(
        model,
        constraints={"effective_bits": effective_bits(model.state_dict(), task.share)},
        # Without a choice of 16 bits, which it would add: float32 is counted as what it is.
        module_search_spaces=[
            {"module_name_patterns": ["*"], "quantization_formats": formats(task), "allow_no_quant": False}
        ],
        data_loader=batches,
        forward_step=lambda network, batch: network(batch[0]),
        loss_func=loss,
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
    )
    found = {
        name: Format(model.get_submodule(name).weight_quantizer.num_bits, len(weight))
        for name, weight in layers_of({name: model.state_dict()[name] for name in names}).items()
    }
    mtq.fold_weight(model)
    seconds = processor_seconds() - start
    state = {name: model.state_dict()[name] for name in names}
    Made(state, found, seconds, versions(("nvidia-modelopt", "torch"))).write(folder)


if __name__ == "__main__":
    main()
