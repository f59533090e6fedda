"""The controller's view of the layers."""

from __future__ import annotations

import pytest
import torch

from grainwise.graph.features import FEATURE_NAMES, controller_features, signed_log
from grainwise.graph.statistics import feature_statistics
from tests.graph.conftest import Traced
from tests.graph.graph_networks import NETWORKS


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_finite_and_of_unit_scale(traced: Traced, name: str) -> None:
    model, inputs, graph = traced(name)
    features = controller_features(graph, feature_statistics(model, graph, [inputs]))
    assert features.shape == (len(graph.layers), len(FEATURE_NAMES))
    assert features.dtype == torch.float32
    assert features.isfinite().all() and features.abs().max() < 5
    kinds = [FEATURE_NAMES.index(kind) for kind in ("conv1d", "conv2d", "linear", "embedding")]
    assert (features[:, kinds].sum(1) == 1).all()


def test_shares_add_up_to_one(traced: Traced) -> None:
    graph = traced("resnet20")[2]
    features = controller_features(graph, torch.zeros(len(graph.layers), 3))
    for column in ("parameter_share", "mac_share"):
        assert features[:, FEATURE_NAMES.index(column)].sum().item() == pytest.approx(1)
    assert features[0, FEATURE_NAMES.index("depth")] == 0


def test_the_sign_survives_the_logarithm() -> None:
    assert signed_log(-3.0) == -signed_log(3.0) == pytest.approx(-1.3862943611)


def test_wrong_statistics_are_refused(traced: Traced) -> None:
    graph = traced("vgg")[2]
    with pytest.raises(ValueError, match=r"shape \[4, 3\], got \[4, 2\]"):
        controller_features(graph, torch.zeros(4, 2))
    with pytest.raises(ValueError, match="undefined"):
        controller_features(graph, torch.full((4, 3), float("nan")))
