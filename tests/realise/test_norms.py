from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from grainwise.graph.forward import default_forward
from grainwise.graph.trace import trace
from grainwise.plan.choices import Choice, Entry, Granularity, Method
from grainwise.realise.build import build, kept_units, standards_of
from grainwise.realise.library import VariantLibrary
from grainwise.realise.norms import NormWatch, Standard, freeze_norms, matched_norms, reestimate_norms
from grainwise.realise.reference import Reference
from tests.networks import pictures, tiny

STRANGE = [inputs * 3 + 1 for inputs, _ in pictures(64, seed=5)]  # unlike what the norms were fitted to


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
    torch.testing.assert_close(model[0].running_var, torch.tensor([1.0, 2.0]))


def network() -> nn.Module:
    """The tiny network with norms that have something to say."""
    model = tiny()
    with torch.no_grad():
        for norm in (model.norm, model.block[1], model.block[4]):
            norm.weight.copy_(torch.linspace(0.5, 1.5, len(norm.weight)))
            norm.bias.copy_(torch.linspace(-0.5, 0.5, len(norm.bias)))
    return model


def standards(model: nn.Module) -> list[Standard]:
    found = []
    with torch.no_grad(), NormWatch(model) as watch:
        for batch in STRANGE:
            model(batch)
            found.append(watch.standard())
    return found


def test_matching_leaves_no_trace() -> None:
    model = network()
    before, plain = copy.deepcopy(model.state_dict()), model(STRANGE[0])
    with matched_norms(model, {}):
        inside = model(STRANGE[0])
    assert not torch.allclose(plain, inside)
    torch.testing.assert_close(model(STRANGE[0]), plain)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_unchanged_network_stays_as_it_is_on_data_unlike_its_own() -> None:
    model = network()
    wanted, known = [model(batch) for batch in STRANGE], standards(model)
    for batch, output, standard in zip(STRANGE, wanted, known, strict=True):
        with matched_norms(model, standard):
            torch.testing.assert_close(model(batch), output, rtol=1e-4, atol=1e-4)
    reestimate_norms(model, STRANGE, default_forward, known)
    torch.testing.assert_close(torch.cat([model(b) for b in STRANGE]), torch.cat(wanted), rtol=1e-4, atol=1e-4)


def test_matching_undoes_what_a_norm_can_undo() -> None:
    """Weights that are scaled and outputs that are shifted change nothing that reaches the next layer."""
    model = network()
    wanted, known = torch.cat([model(batch) for batch in STRANGE]), standards(model)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.stem.weight.mul_(torch.linspace(0.5, 2, 16)[:, None, None, None])
        changed.block[0].bias = nn.Parameter(torch.linspace(-1, 1, 32))
    assert not torch.allclose(torch.cat([changed(b) for b in STRANGE]), wanted, rtol=0.1)
    reestimate_norms(changed, STRANGE, default_forward, known)
    torch.testing.assert_close(torch.cat([changed(b) for b in STRANGE]), wanted, rtol=1e-3, atol=1e-3)


def library() -> VariantLibrary:
    model = network()
    graph = trace(model, STRANGE[0][:2])
    return VariantLibrary(Reference.gather(model, graph, STRANGE, default_forward))


def test_kept_channels_match_their_own_moments() -> None:
    found = library()
    entries = {"block.0": Entry(Choice(Method.PRUNE, Granularity.CHANNEL, 0.5))}
    units = list(kept_units(found, entries)["block.0"])
    model, reference = copy.deepcopy(build(found, entries)), found.reference
    outputs: dict[nn.Module, list[Tensor]] = {}
    for norm in (model.block[1], reference.model.block[1]):
        norm.register_forward_hook(lambda norm, _, y: outputs.setdefault(norm, []).append(y))
    reestimate_norms(model, STRANGE, default_forward, standards_of(found, entries, reference.standards))
    outputs.clear()
    for batch in STRANGE:
        model(batch)
        reference.model(batch)
    ours, theirs = torch.cat(outputs[model.block[1]]), torch.cat(outputs[reference.model.block[1]])[:, units]
    torch.testing.assert_close(ours.mean((0, 2, 3)), theirs.mean((0, 2, 3)), rtol=0.02, atol=0.02)
    torch.testing.assert_close(ours.std((0, 2, 3)), theirs.std((0, 2, 3)), rtol=0.05, atol=0.02)


def test_students_match_nothing_and_repeated_norms_have_no_moments() -> None:
    found = library()
    entries = {"block.0": Entry(Choice(Method.DISTILL, Granularity.BLOCK, 0.5))}
    (first, *_) = standards_of(found, entries, found.reference.standards)
    assert set(first) == {"norm"} and set(found.reference.standards[0]) == {"norm", "block.1", "block.4"}

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.norm(x) + 1)

    with NormWatch(model := Twice().eval()) as watch:
        model(torch.randn(8, 2))
    assert watch.standard() == {}


@pytest.mark.parametrize("affine", [True, False])
def test_norms_without_weights_match_too(affine: bool) -> None:
    norm = nn.Sequential(nn.BatchNorm1d(2, affine=affine)).eval()
    with torch.no_grad(), NormWatch(norm) as watch:
        wanted = norm(x := torch.tensor([[1.0, 5.0], [3.0, 5.5], [4.0, 9.0]]))
        standard = watch.standard()
    with matched_norms(norm, standard):
        torch.testing.assert_close(norm(x * 2 - 1), wanted, rtol=1e-4, atol=1e-4)
