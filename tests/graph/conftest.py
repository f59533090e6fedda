"""Each network is traced once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from torch import nn

from grainwise.graph.trace import trace
from grainwise.plan.layers import LayerGraph
from tests.graph.graph_networks import build

Traced = Callable[[str], tuple[nn.Module, Any, LayerGraph]]


@cache
def _traced(name: str) -> tuple[nn.Module, Any, LayerGraph]:
    model, inputs = build(name)
    return model, inputs, trace(model, inputs)


@pytest.fixture
def traced() -> Traced:
    return _traced
