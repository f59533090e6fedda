"""What each method x granularity x level does to real layers: bytes, and output error with and without H.

    python -m bench.methods

Relative squared error of the layer's output on the search split of CIFAR-10 (not what H was gathered on), on layers of
ResNet-20. `plain` is the same solver with the identity in the place of H: round to nearest, magnitude, plain SVD.
Writes bench/results/methods.json; `python -m bench.tables` makes the table in docs/methods.md from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples import cifar10, resnet20
from grainwise.evaluate.evaluator import outputs_of
from grainwise.methods.problem import LayerProblem
from grainwise.methods.structure import realise, restructure
from grainwise.plan.choices import NONE, PRECISIONS, STRUCTURES, Entry, Granularity, Method
from grainwise.plan.space import narrows, stored_bytes
from grainwise.realise.reference import Reference, recording
from grainwise.session import Session

RESULTS = Path(__file__).parent / "results" / "methods.json"
LAYERS = ("layer1.1.conv1", "layer2.1.conv1", "layer3.1.conv1", "fc")
BLOCKS = {"layer1.1.conv1": "layer1.1", "layer2.1.conv1": "layer2.1", "layer3.1.conv1": "layer3.1"}


def observed(session: Session, module: str) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of a module of the reference on the search split."""
    pairs: list[tuple[Tensor, Tensor]] = []
    model = session.reference.model
    with recording(model.get_submodule(module), pairs):
        outputs_of(model, session.splits.search, session.evaluator.scoring.forward)
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def error(module: nn.Module, inputs: Tensor, outputs: Tensor) -> float:
    with torch.inference_mode():
        found = torch.cat([module(x) for x in inputs.split(64)])
        return float((found - outputs).square().sum() / outputs.square().sum())


def without_h(problem: LayerProblem) -> LayerProblem:
    """The same problem with weights counted alike: H is the identity."""
    size = problem.hessian.shape[-1]
    return replace(problem, hessian=torch.eye(size).expand_as(problem.hessian).clone())


def layer_rows(session: Session, reference: Reference, name: str) -> Iterator[dict[str, Any]]:
    """One row for each legal cell that stays inside the layer."""
    index = [layer.name for layer in session.space.layers].index(name)
    problem, (inputs, outputs) = reference.problem(name), observed(session, name)
    choices = [c for s, c in enumerate(STRUCTURES) if s and session.space.structures[index, s] and not narrows(c)]
    choices += [c for p, c in enumerate(PRECISIONS) if p and session.space.precisions[index, p]]
    for choice in choices:
        structure, precision = (NONE, choice) if choice.method is Method.QUANTIZE else (choice, NONE)
        errors = []
        for posed in (problem, without_h(problem)):
            with torch.no_grad():
                module = realise(restructure(posed, structure, inputs[:64]), precision)
            errors.append(error(module, inputs, outputs))
        ghost = (choice.method, choice.granularity) == (Method.DISTILL, Granularity.CHANNEL)
        yield {
            "layer": name,
            "choice": str(choice),
            "bytes": stored_bytes(problem.geometry, structure, precision),
            "full_bytes": stored_bytes(problem.geometry, NONE, NONE),
            "error": errors[0],
            "plain_error": None if ghost else errors[1],  # a ghost is fitted on outputs: there is no H to leave out
        }


def block_rows(session: Session, leader: str, block: str) -> Iterator[dict[str, Any]]:
    """Channel pruning and block students at the block's output; plain: the same channels cut, nothing re-fitted."""
    from grainwise.graph.narrow import narrow
    from grainwise.realise.build import build, kept_units

    library, reference = session.evaluator.library, session.reference
    index = [layer.name for layer in session.space.layers].index(leader)
    inputs, outputs = observed(session, block)
    for s, choice in enumerate(STRUCTURES):
        if not (session.space.structures[index, s] and narrows(choice)):
            continue
        entries = {leader: Entry(choice)}
        plain = narrow(reference.model, reference.graph.couplings, kept_units(library, entries))
        yield {
            "layer": block,
            "choice": str(choice),
            "bytes": _weights(build(library, entries).get_submodule(block)),
            "full_bytes": _weights(reference.model.get_submodule(block)),
            "error": error(build(library, entries).get_submodule(block), inputs, outputs),
            "plain_error": error(plain.get_submodule(block), inputs, outputs),
        }


def _weights(block: nn.Module) -> int:
    return sum(4 * m.weight.numel() for m in block.modules() if isinstance(m, nn.Conv2d))


def main() -> None:
    torch.set_num_threads(1)
    session = Session.prepare(resnet20.pretrained(), cifar10.splits(), target="packed")
    rows = [row for name in LAYERS for row in layer_rows(session, session.reference, name)]
    rows += [row for leader, block in BLOCKS.items() for row in block_rows(session, leader, block)]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"command": "python -m bench.methods", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
