from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grainwise.methods.problem import LayerProblem, damped, energy
from grainwise.methods.prune import unit_saliency
from grainwise.methods.structure import restructure
from grainwise.plan.choices import Choice, Granularity, Method
from grainwise.plan.layers import Geometry, Kind
from tests.methods.samples import real, synthetic

LEVELS = (0.1, 0.3, 0.5, 0.7)


def _largest(problem: LayerProblem, kept: int, tile: int) -> Tensor:
    """Magnitude pruning without re-fit, of single weights or of tiles."""
    if not tile:
        return problem.matrix * (problem.matrix.abs() >= problem.matrix.abs().reshape(-1).topk(kept).values.min())
    tiles = problem.matrix.square().reshape(-1, tile, problem.geometry.columns).sum(1)
    mask = torch.zeros_like(tiles)
    mask.scatter_(1, tiles.topk(kept // problem.geometry.rows, dim=1).indices, 1.0)
    return problem.matrix * mask.repeat_interleave(tile, 0)


@pytest.mark.parametrize("granularity", [Granularity.LAYER, Granularity.BLOCK])
@pytest.mark.parametrize("name", ["layer1.1.conv1", "layer2.0.conv1", "layer3.1.conv2"])
def test_beats_magnitude_on_real_layers(name: str, granularity: Granularity) -> None:
    problem, _ = real(name)
    for level in LEVELS:
        (stage,) = restructure(problem, Choice(Method.PRUNE, granularity, level)).stages
        assert stage.stage.kept is not None and stage.support is not None
        assert int(stage.support.sum()) == stage.stage.kept
        assert bool((stage.problem.matrix[~stage.support] == 0).all())
        naive = problem.relative_error(_largest(problem, stage.stage.kept, stage.stage.tile_rows))
        assert problem.relative_error(stage.problem.weight) < 0.7 * naive


def test_tiles_are_whole_and_equal_in_number() -> None:
    problem, _ = real("layer3.1.conv2")
    (stage,) = restructure(problem, Choice(Method.PRUNE, Granularity.BLOCK, 0.7)).stages
    assert stage.support is not None and stage.stage.tile_rows == 16
    tiles = stage.support.reshape(4, 16, -1)
    assert bool((tiles == tiles[:, :1]).all())
    assert len(tiles[:, 0].sum(1).unique()) == 1


def test_correlated_inputs_are_worth_less() -> None:
    # Inputs 0 and 1 are nearly the same, so that one of their large weights can go; magnitude would cut the third.
    h = torch.tensor([[[1.0, 0.999, 0.0, 0.0], [0.999, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]])
    problem = LayerProblem(Geometry(Kind.LINEAR, 4, 1), torch.tensor([[1.0, 1.0, 0.4, 0.4]]), None, h)
    (stage,) = restructure(problem, Choice(Method.PRUNE, Granularity.LAYER, 0.3)).stages
    assert stage.support is not None and stage.support[0, 2:].all() and int(stage.support.sum()) == 3
    assert float(stage.problem.weight.max()) == pytest.approx(2, abs=0.05)


def test_rows_without_tiles_are_refused() -> None:
    problem = LayerProblem(Geometry(Kind.LINEAR, 8, 10), torch.zeros(10, 8), None, torch.eye(8)[None])
    with pytest.raises(ValueError, match="10 rows cannot be cut"):
        restructure(problem, Choice(Method.PRUNE, Granularity.BLOCK, 0.5))


@pytest.mark.parametrize("name", ["layer2.0.conv1", "layer3.1.conv2", "fc"])
def test_unit_saliency_is_the_error_of_removing_the_unit(name: str) -> None:
    problem, _ = real(name)
    g = problem.geometry
    units = torch.arange(g.inputs)[:, None]
    found = unit_saliency(problem, units)
    h = damped(problem.hessian)
    for unit in (0, 3, g.inputs - 1):
        kept = torch.tensor([i for i in range(g.inputs) if i != unit])
        columns = (kept[:, None] * g.taps + torch.arange(g.taps)).reshape(-1)
        error = problem.matrix.index_add(1, columns, problem.narrowed(kept, None).matrix, alpha=-1)
        expected = energy(error, h) / energy(problem.matrix, problem.hessian)
        assert float(found[unit]) == pytest.approx(expected, rel=2e-2)


def test_saliency_picks_better_channels_than_magnitude() -> None:
    problem, _ = real("layer3.1.conv2")
    g = problem.geometry
    units = torch.arange(g.inputs)[:, None]
    norms = problem.weight.square().sum((0, 2, 3))

    def error(scores: Tensor) -> float:
        kept = scores.topk(g.inputs // 2).indices.sort().values
        columns = (kept[:, None] * g.taps + torch.arange(g.taps)).reshape(-1)
        narrow = problem.narrowed(kept, None)
        return problem.relative_error(torch.zeros(g.rows, g.columns).index_copy(1, columns, narrow.matrix))

    assert error(unit_saliency(problem, units)) < error(norms)


def test_units_of_several_positions_and_special_consumers() -> None:
    problem, _ = synthetic("linear")
    pairs = torch.arange(64).reshape(32, 2)
    assert unit_saliency(problem, pairs).shape == (32,)
    assert bool((unit_saliency(synthetic("depthwise")[0], torch.arange(16)[:, None]) == 0).all())
    with pytest.raises(ValueError, match="cannot be removed"):
        unit_saliency(synthetic("grouped")[0], torch.arange(4)[:, None])
    dead = LayerProblem(problem.geometry, torch.zeros_like(problem.weight), problem.bias, problem.hessian)
    assert bool((unit_saliency(dead, pairs) == 0).all())
