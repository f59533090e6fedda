"""Cheap students: a separable convolution fitted to the layer problem, and a narrower block trained on outputs.

Letters: O, I channels, T taps, m depthwise filters per input channel, K = I T.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from grainwise.methods.factorize import low_rank
from grainwise.methods.problem import LayerProblem, StageProblem, Structure, damped
from grainwise.methods.solve import conjugate_gradients
from grainwise.plan.choices import Choice
from grainwise.plan.layers import Kind
from grainwise.plan.shapes import stages

LOSSES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({"squared": torch.square, "absolute": torch.abs})
"""What a student's training sums over the differences of its block's outputs."""

ALTERNATIONS = 8  # of filters and mixing; the error falls by less than 1 % a round after that


def student(problem: LayerProblem, choice: Choice) -> Structure:
    """`distill/layer`: a depthwise layer, then 1x1 (MobileNet, Howard et al. 2017); one tap: a bottleneck.

    Start: SVD of each input channel's kernel, weighted by its own block of H (Guo et al. 2018); then filters and mixing
    are fitted in turn by least squares on the whole H. Raises ValueError for grouped layers and Embeddings.
    """
    g = problem.geometry
    if g.kind is Kind.EMBEDDING or g.groups > 1:
        raise ValueError(f"a {g.kind} layer of {g.groups} groups has no cheap student")
    if g.taps == 1:
        return low_rank(problem, choice)
    plan = stages(g, choice)
    h = damped(problem.hessian)[0]
    image = problem.matrix @ h
    filters = _start(problem, h, plan[0].geometry.outputs // g.inputs)
    mixing = _fit_mixing(image, filters, h)
    for _ in range(ALTERNATIONS):
        filters = _fit_filters(image, mixing, h, filters)
        filters = filters / filters.norm(dim=2, keepdim=True).clamp_min(1e-20)
        mixing = _fit_mixing(image, filters, h)
    # Filters as large as their effect on the output, so that a shared scale rounds each as finely as it matters.
    effect = mixing.norm(dim=0).clamp_min(1e-3 * float(mixing.norm(dim=0).max()) + 1e-20)
    filters, mixing = filters * effect.reshape(g.inputs, -1, 1), mixing / effect
    lift = _lift(filters)
    depthwise = LayerProblem(
        plan[0].geometry, filters.reshape(plan[0].geometry.weight_shape), None, _tap_blocks(problem.hessian[0], g.taps)
    )
    seen = lift @ problem.hessian[0] @ lift.T
    pointwise = LayerProblem(plan[1].geometry, mixing.reshape(plan[1].geometry.weight_shape), problem.bias, seen[None])
    return Structure((StageProblem(depthwise, plan[0]), StageProblem(pointwise, plan[1])))


def _tap_blocks(hessian: Tensor, taps: int) -> Tensor:
    """`[I, T, T]`: the block of H that belongs to each input channel."""
    inputs = hessian.shape[0] // taps
    return hessian.reshape(inputs, taps, inputs, taps).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _lift(filters: Tensor) -> Tensor:
    """Filters `[I, m, T]` as the matrix `[I m, I T]` that takes an unfolded input to the depthwise outputs."""
    inputs, multiplier, taps = filters.shape
    lift = filters.new_zeros(inputs, multiplier, inputs, taps)
    lift[torch.arange(inputs), :, torch.arange(inputs)] = filters
    return lift.reshape(inputs * multiplier, inputs * taps)


def _fit_mixing(image: Tensor, filters: Tensor, hessian: Tensor) -> Tensor:
    """Best mixing `[O, I m]` given the filters, with a ridge: filters of one channel may be nearly parallel."""
    lift = _lift(filters)
    gram = lift @ hessian @ lift.T
    ridge = 1e-5 * gram.diagonal().mean().clamp_min(1e-20)
    mixing: Tensor = torch.linalg.solve(gram + ridge * torch.eye(len(gram)), lift @ image.T).T
    return mixing


def _start(problem: LayerProblem, hessian: Tensor, multiplier: int) -> Tensor:
    """`[I, m, T]`: leading right singular vectors of each channel's kernel `[O, T]` under its block of H."""
    kernels = problem.weight.flatten(2).transpose(0, 1)  # [I, O, T]
    root = torch.linalg.cholesky(_tap_blocks(hessian, problem.geometry.taps))
    modes = torch.linalg.svd(kernels @ root, full_matrices=False).Vh[:, :multiplier]
    # w ≈ (w L V) Vᵀ L⁻¹
    start: Tensor = torch.linalg.solve_triangular(root, modes, upper=False, left=False)
    return start


def _fit_filters(image: Tensor, mixing: Tensor, hessian: Tensor, start: Tensor) -> Tensor:
    """Best filters `[I, m, T]` given the mixing `[O, I m]`; `image` is W H `[O, K]`."""
    outputs, inputs = mixing.shape[0], start.shape[0]
    mix = mixing.reshape(outputs, inputs, -1)

    def project(rows: Tensor) -> Tensor:
        return torch.einsum("oim,oit->imt", mix, rows.reshape(outputs, inputs, -1))

    def apply(filters: Tensor) -> Tensor:
        return project(torch.einsum("oim,imt->oit", mix, filters).reshape(outputs, -1) @ hessian)

    curvature = hessian.diagonal().reshape(inputs, 1, -1)
    scale = (mix.square().sum(0)[:, :, None] * curvature).clamp_min(1e-30).reciprocal()
    return conjugate_gradients(apply, project(image), start, scale, dims=(0, 1, 2), iterations=15)


@dataclass(frozen=True, slots=True)
class StudentOptions:
    """How the student of a block is trained (`distill/block`).

    steps: of Adam, a batch each; 0 keeps the closed-form re-fit. loss: `squared` or `absolute` differences of the
    block's outputs, which heed outliers less. learning_rate: of the first step, falling to zero by a cosine. batches:
    of the calibration split, whose activations it is trained on.

    Raises ValueError for an unknown loss or what is not above 0.
    """

    steps: int = 60
    loss: str = "squared"
    learning_rate: float = 3e-3
    batches: int = 4

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"no loss of a student is called {self.loss!r}; give one of {', '.join(LOSSES)}")
        if self.steps < 0 or self.batches < 1 or not self.learning_rate > 0:
            raise ValueError(f"a student needs steps of at least 0, batches and a learning rate above 0, got {self}")


PLAIN_STUDENTS = StudentOptions()


def block_error(student_block: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Squared error of a block's outputs over their variance (around each channel's mean), in its present mode.

    pairs: (inputs, reference outputs) batches; outputs `[B, O, ...]`.
    """
    error = variance = 0.0
    with torch.no_grad():
        for inputs, outputs in pairs:
            error += float((student_block(inputs) - outputs).square().sum())
            variance += _spread(outputs)
    return error / max(variance, torch.finfo(torch.float32).tiny)


def _spread(outputs: Tensor, of: Callable[[Tensor], Tensor] = torch.square) -> float:
    dims = [d for d in range(outputs.dim()) if d != 1] if outputs.dim() != 3 else [0, 1]
    return float(of(outputs - outputs.mean(dims, keepdim=True)).sum())


def train_block(
    student_block: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]], options: StudentOptions, *, seed: int
) -> float:
    """Trains a block in place on (inputs, reference outputs) and returns its relative error afterwards (`block_error`).

    Adam with cosine decay on the loss, over that of the channels' means; batch norm normalises by its batch meanwhile;
    evaluation mode afterwards. Steps whose loss or gradient is not finite are left out; when the result is no better
    than the start, the start is restored. Deterministic for a seed, which orders the batches.
    """
    student_block.eval()
    before, start = block_error(student_block, pairs), copy.deepcopy(student_block.state_dict())
    parameters = [p for p in student_block.parameters() if p.requires_grad]
    if not parameters or not pairs or options.steps < 1:
        return before
    order = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)  # for dropout inside the block
        _train(student_block.train(), parameters, pairs, order, options)
    student_block.eval()
    after = block_error(student_block, pairs)
    if not after < before:
        student_block.load_state_dict(start)
        return before
    return after


def _train(
    block: nn.Module,
    parameters: list[nn.Parameter],
    pairs: Sequence[tuple[Tensor, Tensor]],
    order: torch.Generator,
    options: StudentOptions,
) -> None:
    optimiser = torch.optim.Adam(parameters, lr=options.learning_rate)
    of = LOSSES[options.loss]
    spreads = [max(_spread(outputs, of), 1e-12) for _, outputs in pairs]
    queue: list[int] = []
    for step in range(options.steps):
        queue = queue or torch.randperm(len(pairs), generator=order).tolist()
        at = queue.pop()
        inputs, outputs = pairs[at]
        for group in optimiser.param_groups:
            group["lr"] = options.learning_rate * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        optimiser.zero_grad()
        loss: Tensor = of(block(inputs) - outputs).sum() / spreads[at]
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if bool(torch.isfinite(loss)) and bool(torch.isfinite(norm)):
            optimiser.step()
