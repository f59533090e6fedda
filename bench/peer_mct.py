"""Sony's Model Compression Toolkit (SonySemiconductorSolutions/mct-model-optimization): bits by an integer programme.

    python -m bench.peer_mct FOLDER     (in its own environment, by `bench.peers`)

Its default target (IMX500 v1.0: 8, 4 or 2 bits, a scale for each output) with activations left in float32. It folds
batch norms into the layers before it quantises; what it gives is taken apart again, so that it can be recalibrated:
each output's weights divided by the factor that its norm scales by, which their scale takes back.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import exchange
from bench.exchange import Format, Made, Task, effective_bits, layers_of, processor_seconds, versions
from examples import resnet20

OPERATORS = exchange.allow_torchvision()
import model_compression_toolkit as mct  # noqa: E402
from model_compression_toolkit.target_platform_capabilities.tpc_models.imx500_tpc.v1_0 import tpc  # noqa: E402

BATCH = 128


def norm_of(layer: str) -> str:
    """The batch norm that follows a convolution of `examples.resnet20`."""
    return "shortcut.1".join(layer.rsplit("shortcut.0", 1)) if "shortcut" in layer else layer.replace("conv", "bn")


def unfolded(model: nn.Module, weights: dict[str, Tensor], biases: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of `model` with folded `weights` and `biases`, its batch norms' statistics as they are."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for layer, weight in weights.items():
        state[f"{layer}.weight"] = weight
        if f"{layer}.bias" in state:
            state[f"{layer}.bias"] = biases[layer]
            continue
        norm = model.get_submodule(norm_of(layer))
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        state[f"{layer}.weight"] = weight / factor[:, None, None, None]
        state[f"{norm_of(layer)}.bias"] = biases[layer] + factor * norm.running_mean
    return {name: value.detach() for name, value in state.items()}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = Path(sys.argv[1])
    task, model = Task.read(folder), resnet20.pretrained()
    start = processor_seconds()

    def pictures() -> Iterator[list[Tensor]]:
        yield from ([batch] for batch in task.calibration.split(BATCH))

    base, mixed, default = tpc.get_op_quantization_configs()
    float_inputs = {"enable_activation_quantization": False}
    layers = layers_of(model.state_dict())
    bits = effective_bits(model.state_dict(), task.share)
    quantised, _ = mct.ptq.pytorch_post_training_quantization(
        model,
        pictures,
        target_resource_utilization=mct.core.ResourceUtilization(
            weights_memory=bits * sum(weight.numel() for weight in layers.values()) / 8
        ),
        core_config=mct.core.CoreConfig(mixed_precision_config=mct.core.MixedPrecisionQuantizationConfig()),
        target_platform_capabilities=tpc.generate_tpc(
            default_config=default.clone_and_edit(**float_inputs),
            base_config=base.clone_and_edit(**float_inputs),
            mixed_precision_cfg_list=[one.clone_and_edit(**float_inputs) for one in mixed],
            name="weights_only",
        ),
    )
    seconds = processor_seconds() - start
    found = {name: module for name, module in quantised.named_modules() if hasattr(module, "weights_quantizers")}
    formats, weights, biases = {}, {}, {}
    for layer, weight in layers.items():
        stem = layer.replace(".", "_")
        (wrapper,) = (module for name, module in found.items() if name.removesuffix("_bn") == stem)
        quantizer = wrapper.weights_quantizers["weight"]
        formats[layer] = Format(quantizer.num_bits, len(weight))
        weights[layer] = wrapper.get_quantized_weights()["weight"].detach()
        biases[layer] = wrapper.layer.bias.detach()
    state = unfolded(model, weights, biases)
    ours = resnet20.ResNet20().eval()
    ours.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(ours(task.search), quantised(task.search), atol=1e-3, rtol=1e-3)
    Made(state, formats, seconds, versions(("model-compression-toolkit", "mct-quantizers", "torch"))).write(folder)


if __name__ == "__main__":
    main()
