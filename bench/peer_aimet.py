"""Qualcomm's AIMET, automatic mixed precision (quic/aimet): bits by a greedy walk along measured sensitivities.

    python -m bench.peer_aimet FOLDER     (in its own environment, by `bench.peers`)

Weights alone: activation quantisers are taken away before the search. AMP is asked for its whole list, from all layers
at the most bits to all at the fewest, and the first point of the list that is small enough is taken. Its score is the
ratio of signal to noise on the search pictures (its `EvalCallbackFactory`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bench import exchange
from bench.exchange import Format, Made, Task, counted_bytes, layers_of, processor_seconds, versions
from examples import resnet20

OPERATORS = exchange.allow_torchvision()
from aimet_torch.amp.mixed_precision_algo import EvalCallbackFactory  # noqa: E402
from aimet_torch.common.amp.utils import AMPSearchAlgo  # noqa: E402
from aimet_torch.common.defs import CallbackFunc, QuantizationDataType  # noqa: E402
from aimet_torch.mixed_precision import choose_mixed_precision  # noqa: E402
from aimet_torch.quantsim import QuantizationSimModel  # noqa: E402

INT = QuantizationDataType.int


def weights_only(model: nn.Module, example: Tensor, bits: int) -> QuantizationSimModel:
    """A simulation in which the weights of convolutions and linear layers are quantised and nothing else."""
    sim = QuantizationSimModel(model, example, default_output_bw=8, default_param_bw=bits)
    for module in sim.model.modules():
        for quantisers in ("input_quantizers", "output_quantizers"):
            held: Any = getattr(module, quantisers, None) or []
            for number in range(len(held)):
                held[number] = None
        held = getattr(module, "param_quantizers", None) or {}
        for name in list(held.keys()):
            if name != "weight" or module.weight.dim() == 1:
                held[name] = None
    return sim


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = Path(sys.argv[1])
    task, model = Task.read(folder), resnet20.pretrained()
    start = processor_seconds()
    example = task.calibration[:2]  # no range of activations is wanted, so no more are run to find encodings
    layers = layers_of(model.state_dict())

    def run(network: nn.Module, _: object = None) -> None:
        with torch.no_grad():
            network(example)

    # By accuracy on a few pictures 4 bits may come out above 8, and AMP would begin there.
    pictures: Any = task.search  # a tensor serves as a data set
    score = EvalCallbackFactory(DataLoader(pictures, batch_size=128)).sqnr()
    points = choose_mixed_precision(
        weights_only(model, example, max(task.bits)),
        example,
        [((8, INT), (bits, INT)) for bits in task.bits],
        eval_callback_for_phase1=score,
        eval_callback_for_phase2=score,
        allowed_accuracy_drop=None,
        results_dir=str(folder / "amp"),
        clean_start=True,
        forward_pass_callback=CallbackFunc(run),
        use_all_amp_candidates=True,
        amp_search_algo=AMPSearchAlgo.BruteForce,
    )
    formats = {name: Format(max(task.bits), len(weight)) for name, weight in layers.items()}
    budget = task.share * counted_bytes(model.state_dict(), {})
    for _, _, group, candidate in points:
        if counted_bytes(model.state_dict(), formats) <= budget:
            break
        for quantiser in group.parameter_quantizers:
            name = quantiser.removesuffix(".weight")
            formats[name] = Format(min(candidate[1][0], formats[name].bits), len(layers[name]))
    if counted_bytes(model.state_dict(), formats) > budget:
        sys.exit(f"out of its reach: no point of its list has {task.share:.3f} of the size")
    sim = weights_only(model, example, max(task.bits))
    state = model.state_dict()
    for name, form in formats.items():
        sim.model.get_submodule(name).param_quantizers["weight"].bitwidth = form.bits
    sim.compute_encodings(run, None)
    for name in formats:
        layer = sim.model.get_submodule(name)
        state[f"{name}.weight"] = layer.param_quantizers["weight"](layer.weight).as_subclass(Tensor).detach()
    Made(state, formats, processor_seconds() - start, versions(("aimet-torch", "torch"))).write(folder)


if __name__ == "__main__":
    main()
