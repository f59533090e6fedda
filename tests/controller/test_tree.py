import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grainwise.controller.tree import PRECISION_TREE, STRUCTURE_TREE, Tree, tree_log_probs
from grainwise.plan.choices import PRECISIONS, STRUCTURES

TREES = [(STRUCTURE_TREE, len(STRUCTURES)), (PRECISION_TREE, len(PRECISIONS))]


def _case(tree: Tree, actions: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(3, tree.logits, generator=generator)
    prior = torch.randn(3, actions, generator=generator) * 3
    mask = torch.rand(3, actions, generator=generator) < 0.4
    mask[:, seed % actions] = True
    return outputs, prior, mask


@pytest.mark.parametrize(("tree", "actions"), TREES)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_a_distribution_over_the_mask(tree: Tree, actions: int, seed: int) -> None:
    outputs, prior, mask = _case(tree, actions, seed)
    outputs.requires_grad_()
    log_probs = tree_log_probs(tree, *tree.split(outputs), prior, mask)
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(3), atol=1e-5)
    assert (log_probs[~mask] == -torch.inf).all() and log_probs[mask].isfinite().all()
    log_probs[mask].sum().backward()
    assert outputs.grad is not None and outputs.grad.isfinite().all()


@pytest.mark.parametrize(("tree", "actions"), TREES)
def test_zero_heads_give_the_prior(tree: Tree, actions: int) -> None:
    _, prior, mask = _case(tree, actions, 5)
    log_probs = tree_log_probs(tree, *tree.split(torch.zeros(3, tree.logits)), prior, mask)
    expected = torch.where(mask, prior, torch.tensor(-torch.inf)).log_softmax(-1)
    assert torch.allclose(log_probs[mask], expected[mask], atol=1e-5)


def test_a_method_logit_moves_its_whole_branch() -> None:
    """With no prior, 1 + 9 precisions: doubling the odds of quantize gives it 18 / 19."""
    outputs = torch.zeros(PRECISION_TREE.logits)
    outputs[1] = np.log(2)
    log_probs = tree_log_probs(
        PRECISION_TREE, *PRECISION_TREE.split(outputs), torch.zeros(10), torch.ones(10, dtype=torch.bool)
    )
    assert torch.allclose(log_probs.exp(), torch.tensor([1 / 19] + [2 / 19] * 9))
