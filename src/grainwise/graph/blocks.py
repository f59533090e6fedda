"""Blocks: modules with one tensor in and one out that wholly enclose a coupling."""

from __future__ import annotations

from collections.abc import Sequence

from grainwise.graph.recording import Recording
from grainwise.plan.layers import Block, Coupling, Layer


def _enclosing(coupling: Coupling, recording: Recording) -> str:
    """The deepest module that runs and holds every slot; "" is the network itself.

    Containers that never run (ModuleList) are passed over in favour of the module that holds them.
    """
    paths = [slot.parameter.split(".")[:-1] for slot in coupling.slots]
    depth = 0
    while all(depth < len(path) and path[depth] == paths[0][depth] for path in paths):
        depth += 1
    path = paths[0][:depth]
    while path and ".".join(path) not in recording.one_in_one_out:
        path = path[:-1]
    return ".".join(path)


def find_blocks(couplings: Sequence[Coupling], layers: Sequence[Layer], recording: Recording) -> tuple[Block, ...]:
    """One block for each module that encloses a coupling, runs exactly once and maps one tensor to one tensor."""
    blocks: dict[str, Block] = {}
    bare = {layer.name for layer in layers}
    for coupling in couplings:
        if coupling.frozen is not None or not coupling.producers() or not coupling.consumers():
            continue
        name = _enclosing(coupling, recording)
        if not name or name in bare or recording.one_in_one_out[name] != [True]:
            continue
        inside = tuple(layer.name for layer in layers if layer.name.startswith(f"{name}."))
        blocks.setdefault(name, Block(name, coupling.name, inside))
    return tuple(blocks.values())
