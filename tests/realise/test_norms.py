from __future__ import annotations

import copy

import torch
from torch import nn

from grainwise.graph.forward import default_forward
from grainwise.realise.norms import batch_statistics, freeze_norms, reestimate_norms
from tests.networks import pictures, tiny


def test_frozen_norm_computes_what_batch_norm_does() -> None:
    model = tiny()
    frozen = copy.deepcopy(model)
    freeze_norms(frozen)
    x = pictures(16, 5)[0][0]
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())


def test_reestimation_is_the_plain_average_over_batches() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    batches = [torch.tensor([[0.0, 0.0], [2.0, 4.0]]), torch.tensor([[4.0, 0.0], [6.0, 0.0]])]
    reestimate_norms(model, batches, default_forward)
    torch.testing.assert_close(model[0].running_mean, torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(model[0].running_var, torch.tensor([2.0, 4.0]))
    assert not model[0].training
    assert model[0].momentum == 0.1


def test_batch_statistics_leave_no_trace() -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    x = pictures(16, 5)[0][0] * 3 + 1
    plain = model(x)
    with batch_statistics(model):
        inside = model(x)
    assert not torch.allclose(plain, inside)
    torch.testing.assert_close(model(x), plain)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
