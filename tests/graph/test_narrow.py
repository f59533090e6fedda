"""Units that are really removed give what silenced units give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grainwise.graph.forward import default_forward
from grainwise.graph.narrow import mask, narrow
from tests.graph.conftest import Traced
from tests.graph.graph_networks import NETWORKS


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_removed_equals_masked(traced: Traced, name: str, seed: int) -> None:
    model, inputs, graph = traced(name)
    rng = np.random.default_rng(seed)
    free = [c for c in graph.couplings if c.frozen is None]
    assert free
    kept = {c.name: rng.permutation(c.width)[: rng.integers(1, c.width + 1)].tolist() for c in free}
    removed = {c.name: sorted(set(range(c.width)) - set(kept[c.name])) for c in free}
    small, silent = narrow(model, free, kept), mask(model, free, removed)
    with torch.no_grad():
        full = default_forward(model, inputs)
        expected, found = default_forward(silent, inputs), default_forward(small, inputs)
    scale = max(1.0, expected.abs().max().item())
    assert (expected - found).abs().max() <= 1e-5 * scale
    assert (expected - full).abs().max() > 1e-4 * scale  # the removed units did matter
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_attributes_follow_the_tensors(traced: Traced) -> None:
    model, _, graph = traced("grouped")
    small = narrow(model, graph.couplings, {"b": [4, 0, 5]})
    assert (small.depthwise.in_channels, small.depthwise.out_channels, small.depthwise.groups) == (3, 6, 3)
    assert (small.b.out_channels, small.gate.in_channels, small.gate.out_channels) == (3, 6, 6)
    assert torch.equal(small.b.weight, model.b.weight[[0, 4, 5]])
    assert model.b.out_channels == 6


def test_tied_weights_stay_tied(traced: Traced) -> None:
    model, _, graph = traced("tied")
    small = narrow(model, graph.couplings, {"embed": range(5)})
    assert small.embed.weight is small.head.weight
    assert (small.embed.embedding_dim, small.head.in_features) == (5, 5)


def test_couplings_that_share_a_dimension_combine(traced: Traced) -> None:
    model, _, graph = traced("densenet")
    small = narrow(model, graph.couplings, {"stem": range(4), "grow.0": [1], "grow.2": [0, 5]})
    assert small.head.in_features == 4 + 1 + 6 + 2
    assert small.norms[2].num_features == 4 + 1 + 6
    assert torch.equal(small.head.weight[:, -2:], model.head.weight[:, [20, 25]])


def test_impossible_requests_are_refused(traced: Traced) -> None:
    model, _, graph = traced("vgg")
    with pytest.raises(ValueError, match="no coupling is called nothing"):
        narrow(model, graph.couplings, {"nothing": [0]})
    with pytest.raises(ValueError, match="units of 0 are 0 to 7"):
        narrow(model, graph.couplings, {"0": [8]})
    with pytest.raises(ValueError, match="at least one unit"):
        narrow(model, graph.couplings, {"0": []})
