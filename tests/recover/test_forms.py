from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from grainwise.plan.choices import Choice, Entry, Granularity, Method
from grainwise.realise.build import build
from grainwise.realise.library import VariantLibrary
from grainwise.recover.forms import Dress, Form, begin, forms_of
from tests.export.candidates import quantised
from tests.networks import pictures, tiny
from tests.recover.candidates import library

CHANNELS = Choice(Method.PRUNE, Granularity.CHANNEL, 0.5)
ENTRIES = {
    "stem": Entry(CHANNELS, quantised(8)),
    "block.0": Entry(CHANNELS, quantised(4, Granularity.BLOCK)),
    "block.3": Entry(Choice(Method.PRUNE, Granularity.LAYER, 0.5), quantised(4)),
    "down": Entry(Choice(Method.PRUNE, Granularity.BLOCK, 0.5)),
    "fc": Entry(precision=quantised(2, Granularity.LAYER)),
}


@pytest.fixture(scope="module")
def quick() -> VariantLibrary:
    return VariantLibrary(library().reference, quick=True)


def images() -> Tensor:
    return pictures(32, 5)[0][0]


def dressed(quick: VariantLibrary) -> tuple[nn.Module, Dress]:
    network = tiny()
    dress = Dress(network)
    dress.wear(begin(network, quick, ENTRIES))
    return network, dress


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: network.get_submodule(name).weight.detach().clone() for name in ENTRIES}


def test_a_dressed_layer_computes_what_its_variant_holds(quick: VariantLibrary) -> None:
    network, dress = dressed(quick)
    kept = quick.kept_units("stem", 8), quick.kept_units("block.0", 16)
    found = dress.forms["block.0"](network.block[0].weight)
    variant = build(quick, ENTRIES).get_submodule("block.0").weight
    assert torch.allclose(found[list(kept[1])][:, list(kept[0])], variant, atol=1e-6)
    gone = sorted(set(range(16)) - set(kept[0]))
    assert not found[:, gone].any()
    pruned = dress.forms["block.3"](network.block[3].weight)
    assert torch.equal(
        (pruned[list(kept[0])][:, list(kept[1])] != 0).flatten(1),
        build(quick, ENTRIES).get_submodule("block.3").weight.flatten(1) != 0,
    )


def test_the_whole_network_computes_what_the_candidate_does(quick: VariantLibrary) -> None:
    """Norms aside, which `build` leaves as they were."""
    network, _ = dressed(quick)
    candidate = VariantLibrary(quick.reference, quick=True)
    plain = copy.deepcopy(build(candidate, {name: Entry(e.structure) for name, e in ENTRIES.items()}))
    dress = Dress(tiny())
    dress.wear(begin(dress.network, quick, {name: Entry(e.structure) for name, e in ENTRIES.items()}))
    with torch.no_grad():
        found, expected = dress.network(images()), plain(images())
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    with torch.no_grad():
        assert not torch.allclose(network(images()), expected, atol=1e-4)  # rounding is seen


def test_gradients_pass_the_rounding_and_end_at_what_is_dead(quick: VariantLibrary) -> None:
    network, dress = dressed(quick)
    network.train()
    network(images()).square().sum().backward()
    for name in ("block.0", "block.3", "down"):
        gradient, dead = network.get_submodule(name).weight.grad, dress.forms[name].dead
        assert gradient is not None and dead is not None
        assert not gradient[dead].any()
        assert gradient[~dead].any()
    assert network.fc.weight.grad is not None and network.fc.weight.grad.abs().gt(0).float().mean() > 0.9


def test_settled_weights_are_solved_to_the_same_ones(quick: VariantLibrary) -> None:
    """After steps of training, whoever compresses the settled network with the same entries finds what was trained."""
    network, dress = dressed(quick)
    network.train()
    optimiser = torch.optim.SGD(network.parameters(), 1e-3, momentum=0.9)
    for inputs, labels in pictures(96, 8):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(inputs), labels).backward()
        optimiser.step()
    before = weights(network)
    network.eval()
    with torch.no_grad():
        worn = network(images())
        dress.settle()
        assert torch.equal(network(images()), worn)
    assert any(not torch.equal(value, before[name]) for name, value in weights(network).items())
    reference = library().reference
    full = VariantLibrary(
        type(reference).gather(
            network, reference.graph, reference.calibration, reference.forward, reference.target, None
        )
    )
    forms = forms_of(full, ENTRIES)
    for name, value in weights(network).items():
        again = forms[name](value)
        assert torch.allclose(again, value, rtol=1e-3, atol=1e-6), name


def test_copies_and_the_state_dict_are_dense(quick: VariantLibrary) -> None:
    network, dress = dressed(quick)
    twin = copy.deepcopy(network).eval()
    assert list(network.state_dict()) == list(tiny().state_dict())
    with torch.no_grad():
        worn, dense = network.eval()(images()), twin(images())
        assert not torch.equal(worn, dense)
        dress.wear({})
        assert torch.equal(network(images()), dense)


def test_a_failing_forward_leaves_the_layer_as_it_was(quick: VariantLibrary) -> None:
    network, _ = dressed(quick)
    with pytest.raises(RuntimeError):
        network(torch.zeros(2, 5, 8, 8))
    assert all("weight" not in network.get_submodule(name).__dict__ for name in ENTRIES)


def test_a_form_survives_its_own_state(quick: VariantLibrary) -> None:
    network, dress = dressed(quick)
    for name, form in dress.forms.items():
        weight = network.get_submodule(name).weight
        tensors, body = form.state()
        assert torch.equal(Form.of(tensors, body)(weight), form(weight))


def test_methods_without_a_form_are_refused(quick: VariantLibrary) -> None:
    with pytest.raises(ValueError, match="'down' cannot take factorize/layer/0.5 while it trains"):
        forms_of(quick, {"down": Entry(Choice(Method.FACTORIZE, Granularity.LAYER, 0.5))})
