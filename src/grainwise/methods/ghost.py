"""Ghost modules: some output channels are kept, each of the others is regenerated from one of them by a cheap map.

Letters: N samples, O outputs, P primaries, T taps of the cheap map (3, 9, or 1 for a Linear), L positions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from grainwise.methods.problem import LayerProblem, StageProblem, Structure
from grainwise.plan.choices import Choice
from grainwise.plan.layers import Geometry, Kind
from grainwise.plan.shapes import stages

OUTPUTS_AT_ONCE = 1 << 22  # numbers of the output sample: 16 MB, and T times that while one primary is looked at


def ghost(problem: LayerProblem, choice: Choice, inputs: Tensor) -> Structure:
    """`distill/channel`: primaries chosen greedily, source and filter of each ghost by least squares (Han et al. 2020).

    inputs: a sample of the layer's inputs, as its module receives them. At most `OUTPUTS_AT_ONCE` output numbers are
    used: the first samples, or the first rows of a Linear.
    Raises ValueError for Embeddings, grouped layers and a share that leaves no channel to regenerate.
    """
    g = problem.geometry
    plan = stages(g, choice)
    if g.kind is Kind.EMBEDDING or g.groups > 1 or g.outputs - plan[0].geometry.outputs < 1:
        raise ValueError(f"a {g.kind} layer of {g.outputs} outputs in {g.groups} groups has no ghosts")
    outputs = layer_outputs(problem, inputs)
    fit = _GhostFit.of(outputs, g)
    primary = _choose(fit.explained, plan[0].geometry.outputs)
    chosen = torch.zeros(g.outputs, dtype=torch.bool)
    chosen[primary] = True
    primary, others = chosen.nonzero()[:, 0], (~chosen).nonzero()[:, 0]
    source = fit.explained[primary][:, others].argmax(0)
    filters = fit.filters[primary[source], others]  # [ghosts, T]
    bias = None
    if g.bias:
        bias = fit.means[others] - (filters * fit.feature_means[primary[source]]).sum(1)
    cheap = plan[1].geometry
    first = LayerProblem(
        plan[0].geometry,
        problem.weight[primary],
        None if problem.bias is None else problem.bias[primary],
        problem.hessian,
    )
    second = LayerProblem(cheap, filters.reshape(cheap.weight_shape), bias, fit.moments[primary[source]])
    order = torch.cat((primary, others)).argsort()
    return Structure((StageProblem(first, plan[0]), StageProblem(second, plan[1])), source, order)


def layer_outputs(problem: LayerProblem, inputs: Tensor) -> Tensor:
    """The reference layer's outputs `[N, O, *spatial]` (Linear: `[N, O]`) of as many inputs as memory allows."""
    g = problem.geometry
    if not g.kernel:
        rows = inputs.reshape(-1, g.inputs)[: max(1, OUTPUTS_AT_ONCE // g.outputs)]
        return F.linear(rows, problem.weight, problem.bias)
    places = math.prod(inputs.shape[2:]) // math.prod(g.stride)
    sample = inputs[: max(1, OUTPUTS_AT_ONCE // (places * g.outputs))]
    convolve = F.conv1d if g.kind is Kind.CONV1D else F.conv2d
    return convolve(sample, problem.weight, problem.bias, g.stride, g.padding, g.dilation)


class _GhostFit:
    """Least-squares maps from every channel to every channel.

    explained: `[O, O]` energy of channel o that the best map of channel p gives; a channel gives itself wholly.
    filters: `[O, O, T]` those maps. moments: `[O, T, T]` E[f fᵀ] of each channel's neighbourhoods f.
    means: `[O]`, feature_means: `[O, T]`, zero without a bias.
    """

    def __init__(self, moments: Tensor, cross: Tensor, square: Tensor, means: Tensor, feature_means: Tensor) -> None:
        centred = moments - feature_means[:, :, None] * feature_means[:, None]
        cross = cross - feature_means[:, :, None] * means
        ridge = 1e-4 * centred.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-20)
        solvable = centred + torch.diag_embed(ridge[:, None].expand(-1, centred.shape[1]))
        maps = torch.linalg.solve(solvable, cross)  # [O, T, O]
        self.filters = maps.transpose(1, 2)
        self.explained = (maps * cross).sum(1).clamp_min(0)
        self.explained.diagonal().copy_((square - means.square()).clamp_min(0))
        self.moments, self.means, self.feature_means = moments, means, feature_means

    @classmethod
    def of(cls, outputs: Tensor, g: Geometry) -> _GhostFit:
        """Gathers the moments channel by channel from outputs `[N, O, *spatial]`."""
        channels = outputs.transpose(0, 1).flatten(1)  # [O, N L]
        count = channels.shape[1]
        features = [_neighbourhoods(outputs[:, p], len(g.kernel)) for p in range(1)]
        moments = torch.empty(g.outputs, features[0].shape[0], features[0].shape[0])
        cross = torch.empty(g.outputs, features[0].shape[0], g.outputs)
        feature_means = torch.zeros(g.outputs, features[0].shape[0])
        for p in range(g.outputs):
            neighbours = _neighbourhoods(outputs[:, p], len(g.kernel))
            moments[p] = neighbours @ neighbours.T / count
            cross[p] = neighbours @ channels.T / count
            if g.bias:
                feature_means[p] = neighbours.mean(1)
        means = channels.mean(1) if g.bias else torch.zeros(g.outputs)
        return cls(moments, cross, channels.square().mean(1), means, feature_means)


def _neighbourhoods(channel: Tensor, dims: int) -> Tensor:
    """One channel `[N, *spatial]` to `[T, N L]`: what a 3-tap filter with padding 1 sees at every position."""
    if dims == 0:
        return channel.reshape(1, -1)
    image = channel[:, None] if dims == 2 else channel[:, None, None]
    size, padding = ((3, 3), (1, 1)) if dims == 2 else ((1, 3), (0, 1))
    return F.unfold(image, size, padding=padding).transpose(0, 1).flatten(1)


def _choose(explained: Tensor, count: int) -> Tensor:
    """Indices `[count]` that greedily maximise Σ_o max_p explained[p, o] (facility location, Nemhauser et al. 1978)."""
    best = torch.zeros(explained.shape[1])
    chosen: list[int] = []
    for _ in range(count):
        gain = (explained - best).clamp_min(0).sum(1)
        gain[chosen] = -1.0
        chosen.append(int(gain.argmax()))
        best = torch.maximum(best, explained[chosen[-1]])
    return torch.tensor(chosen)
