from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from grainwise.graph.forward import default_forward
from grainwise.graph.skeleton import skeleton_forward
from grainwise.recover.losses import relative_error
from grainwise.recover.shadows import shadows_of
from grainwise.recover.step import Distillation, NotFinite, Student, feature_places, train_step
from tests.export.candidates import PLANS
from tests.networks import tiny_training
from tests.recover.candidates import Case, library, splits, teacher


def test_one_step_by_hand() -> None:
    """Adam's first step is the learning rate against the sign of the gradient, whatever its size."""
    value = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimiser = torch.optim.Adam([value], lr=123.0)
    loss = lambda inputs: (value * inputs).sum()
    assert train_step(loss, torch.tensor([3.0, -5.0]), optimiser, 0.25) == -7.0
    torch.testing.assert_close(value.detach(), torch.tensor([0.75, 2.25]))


@pytest.mark.parametrize(
    ("power", "message"), [(torch.nan, "the loss is nan"), (0.5, "a gradient is not finite")], ids=["loss", "gradient"]
)
def test_nothing_moves_where_something_is_not_finite(power: float, message: str) -> None:
    value = nn.Parameter(torch.zeros(2))
    optimiser = torch.optim.Adam([value], lr=1.0)
    with pytest.raises(NotFinite, match=message):
        train_step(lambda inputs: (value**inputs).sum(), power, optimiser, 1.0)
    assert not value.detach().any() and not optimiser.state


def test_features_are_taken_at_sums_or_else_at_layers() -> None:
    reference = library().reference
    (join,) = reference.skeleton.joins
    assert feature_places(reference.graph, reference.skeleton, teacher()) == (f"points.{join.result}",)
    packed = nn.Sequential(nn.Conv2d(1, 1, 1))
    names = feature_places(reference.graph, None, packed)
    assert names == ("stem", "block.0", "block.3", "down", "fc")


def test_features_pull_where_outputs_cannot() -> None:
    """The classifier is cut off by zeros, so that outputs say nothing of what is before it."""
    case = Case.of(PLANS["int2"])
    x = splits().search[0].inputs
    with torch.no_grad():
        (shadow,) = [s for s in case.trainee.student.shadows if s.path == "fc"]
        case.loss.student.store()
        shadow.values.start.zero_()
    stem = next(s for s in case.trainee.student.shadows if s.path == "stem")
    case.loss(x).backward()
    assert stem.values.change.grad.any()
    stem.values.change.grad = None
    Distillation(**{**_fields(case.loss), "feature_weight": 0.0})(x).backward()
    assert stem.values.change.grad is None or float(stem.values.change.grad.abs().max()) < 1e-3


def _fields(loss: Distillation) -> dict[str, object]:
    return {name: getattr(loss, name) for name in loss.__dataclass_fields__}


def test_a_network_of_the_users_own_is_trained_on_its_own_forward() -> None:
    """No skeleton, a batch as a dict, outputs that are no logits."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, values: Tensor) -> dict[str, Tensor]:
            return {"logits": self.second(self.first(values).relu())}

    torch.manual_seed(0)
    wanted, network = Named().eval(), Named().eval()
    student = Student(network, default_forward, shadows_of(network, {"first", "second"}, lambda how, bits: 7.0))
    loss = Distillation(student, wanted, default_forward, relative_error, ("first",))
    optimiser = torch.optim.Adam(student.parameters())
    batch = {"values": torch.randn(64, 4)}
    losses = [train_step(loss, batch, optimiser, 0.05) for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]
    before = network.first.weight.clone()
    student.store()
    assert not torch.equal(network.first.weight, before)
    assert not list(network.first._forward_hooks.values())


def test_the_teacher_gets_no_gradient() -> None:
    case = Case.of(PLANS["int8"])
    case.loss(tiny_training()[0][0]).backward()
    assert all(parameter.grad is None for parameter in case.loss.teacher.parameters())
    assert torch.equal(
        skeleton_forward(case.network, splits().search[0].inputs), case.trainee.student(splits().search[0].inputs)
    )
