from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from grainwise.recover.errors import RecoveryError
from grainwise.recover.nests import flatten, generators, set_generators, unflatten


def through_json(value: object) -> object:
    tensors: dict[str, Tensor] = {}
    body = json.loads(json.dumps(flatten(value, "state.x", tensors), allow_nan=False))
    return unflatten(body, tensors)


def test_a_nest_comes_back_as_it_was() -> None:
    nest = {"a": [1, 2.5, None, True, "x"], 3: {"inner": (1, (2,))}, "worst": math.inf, "empty": {}}
    assert through_json(nest) == nest


def test_an_optimiser_goes_on_where_it_was() -> None:
    def run(cut: bool) -> Tensor:
        weight = torch.nn.Parameter(torch.ones(3))
        optimiser = torch.optim.Adam([weight], 0.1)
        for step in range(6):
            if cut and step == 3:
                state = through_json(optimiser.state_dict())
                optimiser = torch.optim.Adam([weight], 0.5)
                optimiser.load_state_dict(state)  # type: ignore[arg-type]
            optimiser.zero_grad()
            (weight * torch.tensor([1.0, -2.0, step])).square().sum().backward()
            optimiser.step()
        return weight.detach()

    assert torch.equal(run(cut=True), run(cut=False))


def test_generators_go_on_where_they_were() -> None:
    def drawn() -> list[float]:
        return [float(torch.rand(())), float(np.random.rand()), random.random()]

    state = through_json(generators())
    expected = drawn()
    drawn()
    set_generators(state)  # type: ignore[arg-type]
    assert drawn() == expected


def test_what_cannot_be_kept_is_named() -> None:
    with pytest.raises(RecoveryError, match="the state of schedule holds a function"):
        flatten({"rule": lambda epoch: epoch}, "stateful.schedule", {})
