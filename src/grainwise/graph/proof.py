"""See each coupling work before it is offered: really removed must equal masked, on the example inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from grainwise.graph.forward import Forward
from grainwise.graph.narrow import mask, narrow
from grainwise.graph.walk import plain_attention
from grainwise.plan.layers import Coupling

TOLERANCE = 1e-5
"""Largest difference, relative to max(1, largest output)."""


def _run(model: nn.Module, inputs: Any, forward: Forward) -> Tensor:
    # Networks that draw random numbers must draw the same ones in both runs.
    with torch.no_grad(), torch.random.fork_rng(), plain_attention():
        torch.manual_seed(0)
        return forward(model, inputs)


def fault(model: nn.Module, inputs: Any, forward: Forward, couplings: Sequence[Coupling]) -> str | None:
    """Why removing every second unit of all these couplings at once goes wrong, or None when it works."""
    kept = {c.name: range(0, c.width, 2) for c in couplings}
    removed = {c.name: range(1, c.width, 2) for c in couplings}
    try:
        expected = _run(mask(model, couplings, removed), inputs, forward)
        found = _run(narrow(model, couplings, kept), inputs, forward)
    except Exception as error:  # whatever the network's code raises on a width it does not expect
        return f"the network's code needs the full width: {type(error).__name__}: {_first_line(error)}"
    if found.shape != expected.shape:
        return (
            f"the network's code needs the full width: its output changes from {[*expected.shape]} to {[*found.shape]}"
        )
    difference = (found - expected).abs().max().item() if found.numel() else 0.0
    if not difference <= TOLERANCE * max(1.0, expected.abs().max().item() if found.numel() else 0.0):
        return f"removed and masked outputs differ by {difference:.2g}"
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


def prove(model: nn.Module, inputs: Any, forward: Forward, couplings: Sequence[Coupling]) -> tuple[Coupling, ...]:
    """The couplings, those that fail frozen with the reason. The model must be in eval mode.

    All are tried together first, for that is one pair of runs; only when that fails each is tried on its own, and
    those that work alone are added one by one, so that the ones left also work together.
    """
    free = [c for c in couplings if c.frozen is None]
    if not free or fault(model, inputs, forward, free) is None:
        return tuple(couplings)
    reasons = {c.name: fault(model, inputs, forward, [c]) for c in free}
    together = [c for c in free if reasons[c.name] is None]
    if together and fault(model, inputs, forward, together) is not None:
        accepted: list[Coupling] = []
        for coupling in together:
            reasons[coupling.name] = fault(model, inputs, forward, [*accepted, coupling])
            if reasons[coupling.name] is None:
                accepted.append(coupling)
    return tuple(replace(c, frozen=c.frozen or reasons.get(c.name)) for c in couplings)
