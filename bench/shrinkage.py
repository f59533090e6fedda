"""How far a layer's H, gathered on few pictures, is to be trusted: errors on pictures that it was not gathered on.

    python -m bench.shrinkage [--pictures 256 1024]

Layers of EfficientNet-Lite0 are quantised to 4 bits in groups, with an H whose covariances are made smaller by some
shares and by `HessianAccumulator.shrunk`. Writes bench/results/shrinkage.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import cifar10, efficientnet_lite0
from grainwise.evaluate.timing import device_name
from grainwise.graph.trace import trace
from grainwise.methods.hessian import HessianAccumulator
from grainwise.methods.problem import LayerProblem, StageProblem
from grainwise.methods.quantize import quantize
from grainwise.methods.storage import CENTRE, spread_scales
from grainwise.plan.choices import NONE, Choice, Granularity, Method
from grainwise.plan.layers import Geometry
from grainwise.plan.shapes import stages

RESULTS = Path(__file__).parent / "results" / "shrinkage.json"
LAYERS = ("blocks.11.body.7", "blocks.13.body.0", "blocks.15.body.6", "head.0", "fc")
SHARES = (0.0, 0.03, 0.1, 0.3, 0.6)
OTHERS = 1024  # pictures that errors are measured on
FOUR_BITS = Choice(Method.QUANTIZE, Granularity.BLOCK, 4)


def gather(model: nn.Module, geometries: Mapping[str, Geometry], pictures: Tensor) -> dict[str, HessianAccumulator]:
    found = {name: HessianAccumulator(geometry) for name, geometry in geometries.items()}
    for name, accumulator in found.items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, into=accumulator: into.update(inputs[0]))
    with torch.inference_mode():
        for batch in pictures.split(32):
            model(batch)
    for name in found:
        model.get_submodule(name)._forward_pre_hooks.clear()
    return found


def error(layer: Any, geometry: Geometry, fitted_to: Tensor, on: Tensor) -> float:
    """Relative squared error of the outputs under the H `on` when the layer is quantised with the H `fitted_to`."""
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    stage = StageProblem(LayerProblem(geometry, weight, bias, fitted_to), stages(geometry, NONE)[0])
    found = quantize(stage, FOUR_BITS)
    scales = spread_scales(found.scale.float(), geometry, Granularity.BLOCK)
    return LayerProblem(geometry, weight, bias, on).relative_error((found.codes.float() - CENTRE[4]) * scales)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, nargs="+", default=[256, 1024])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = efficientnet_lite0.model()
    parts = cifar10.parts(calibration=max(arguments.pictures), search=OTHERS, test=0)
    size = (efficientnet_lite0.PIXELS,) * 2
    enlarged = {
        name: F.interpolate(efficientnet_lite0.normalise(images), size=size, mode="bilinear", align_corners=False)
        for name, (images, _) in parts.items()
        if len(images)
    }
    graph = trace(model, enlarged["search"][:2])
    geometries = {name: graph.layer(name).geometry for name in LAYERS}
    others = {name: found.hessian() for name, found in gather(model, geometries, enlarged["search"]).items()}
    rows = []
    for count in arguments.pictures:
        for name, found in gather(model, geometries, enlarged["calibration"][:count]).items():
            h, layer, geometry = found.hessian(), model.get_submodule(name), geometries[name]
            covariance = h - (means := found.sums / found.count)[:, :, None] * means[:, None]
            covariance.diagonal(dim1=1, dim2=2).zero_()
            errors = {str(share): error(layer, geometry, h - share * covariance, others[name]) for share in SHARES}
            errors["shrunk"] = error(layer, geometry, found.shrunk(), others[name])
            row = {"layer": name, "inputs": geometry.fan_in, "pictures": count, "rows": found.count, "errors": errors}
            print(json.dumps(row), flush=True)
            rows.append(row)
    command = " ".join(["python -m bench.shrinkage", *sys.argv[1:]])
    body = {"command": command, "machine": f"{device_name()}, torch {torch.__version__}", "rows": rows}
    RESULTS.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
