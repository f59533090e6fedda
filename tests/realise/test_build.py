"""Building: every legal entry of a small network is realised, weighs what was predicted, and shares what it can."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from grainwise.export.weights import weights_bytes
from grainwise.graph.narrow import mask
from grainwise.plan.choices import PRECISIONS, STRUCTURES, Choice, Entry, Granularity, Method
from grainwise.realise.build import build, kept_units
from grainwise.realise.channels import rank_units
from grainwise.realise.library import VariantLibrary
from grainwise.session import Session
from tests.networks import pictures

PRUNE = Choice(Method.PRUNE, Granularity.CHANNEL, 0.5)
STUDENT = Choice(Method.DISTILL, Granularity.BLOCK, 0.5)
INT4 = Choice(Method.QUANTIZE, Granularity.CHANNEL, 4)


def test_every_legal_entry_is_built_at_the_predicted_cost(session: Session, full: bool) -> None:
    """A structure or a precision alone, and a third of those that are combined; all with --full."""
    library, x = session.evaluator.library, pictures(4, 7)[0][0]
    for index, layer in enumerate(session.space.layers):
        for s, p in np.argwhere(session.space.pairs(index)):
            if s and p and (s + p + index) % 3 and not full:
                continue
            entries = {layer.name: Entry(STRUCTURES[s], PRECISIONS[p])}
            model = build(library, entries)
            assert torch.isfinite(model(x)).all(), entries
            predicted, real = session.cost.total(entries)[0], weights_bytes(model)
            assert real <= predicted <= real * 1.01 + 64, entries


def test_entries_of_all_layers_compose(session: Session) -> None:
    entries = {
        "stem": Entry(Choice(Method.PRUNE, Granularity.CHANNEL, 0.3), INT4),
        "block.0": Entry(STUDENT, INT4),
        "block.3": Entry(precision=INT4),
        "down": Entry(STRUCTURES[3], INT4),
        "fc": Entry(precision=INT4),
    }
    session.space.check(entries)
    model = build(session.evaluator.library, entries)
    assert model.stem.out_channels == 8
    assert model.block[0].out_channels == model.block[3].in_channels == 16
    assert torch.isfinite(model(pictures(4, 7)[0][0])).all()
    assert weights_bytes(model) <= session.cost.total(entries)[0]


def test_pruned_equals_masked_before_the_refit(session: Session) -> None:
    """The channels that are kept are the library's own choice; without re-fit the network equals its masked twin."""
    from grainwise.graph.narrow import narrow

    reference = session.reference
    kept = kept_units(session.evaluator.library, {"block.0": Entry(PRUNE)})
    removed = {"block.0": tuple(sorted(set(range(32)) - set(kept["block.0"])))}
    assert len(kept["block.0"]) == 16
    x = pictures(8, 7)[0][0]
    cut = narrow(reference.model, reference.graph.couplings, kept)
    masked = mask(reference.model, reference.graph.couplings, removed)
    torch.testing.assert_close(cut(x), masked(x), rtol=0, atol=1e-5)


def test_the_refit_lowers_the_error_of_pruning(session: Session) -> None:
    from grainwise.graph.narrow import narrow

    reference, library = session.reference, session.evaluator.library
    entries = {"block.0": Entry(PRUNE)}
    x = torch.cat([batch.inputs for batch in session.splits.calibration])
    wanted = reference.model.block(torch.relu(reference.model.norm(reference.model.stem(x))))

    def error(model: nn.Module) -> float:
        found = model.block(torch.relu(model.norm(model.stem(x))))
        return float((found - wanted).square().mean())

    plain = narrow(reference.model, reference.graph.couplings, kept_units(library, entries))
    assert error(build(library, entries)) < 0.8 * error(plain)


def test_the_most_needed_units_are_kept(session: Session) -> None:
    """A unit that its readers do not read is the first to go."""
    import copy
    from dataclasses import replace

    model = copy.deepcopy(session.reference.model)
    with torch.no_grad():
        model.block[3].weight[:, 5] = 0
    reference = replace(session.reference, model=model)
    coupling = reference.graph.coupling("block.0")
    assert int(rank_units(reference, coupling)[-1]) == 5


def test_variants_are_shared_and_the_reference_is_untouched(session: Session) -> None:
    library = VariantLibrary(session.reference)
    before = {name: value.clone() for name, value in session.reference.model.state_dict().items()}
    entries = {"down": Entry(precision=INT4), "block.0": Entry(STUDENT)}
    first, second = build(library, entries), build(library, entries)
    assert first.down is second.down
    fresh = build(VariantLibrary(session.reference), entries)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, first.state_dict()[name])
    after = session.reference.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_library_within_a_limit_forgets_and_makes_the_same_again(session: Session) -> None:
    entries = [{"block.0": Entry(c)} for c in (PRUNE, STUDENT)]
    entries += [{name: Entry(precision=INT4)} for name in ("down", "block.0", "block.3")]
    whole, small = VariantLibrary(session.reference), VariantLibrary(session.reference, limit_bytes=100_000)
    for asked in entries:
        build(whole, asked), build(small, asked)
        assert small.solved.kept_bytes <= small.solved.limit_bytes
    assert whole.solved.kept_bytes > small.solved.limit_bytes
    for asked in entries:
        kept, again = build(whole, asked).state_dict(), build(small, asked).state_dict()
        assert kept.keys() == again.keys() and all(torch.equal(kept[name], again[name]) for name in kept)


def test_a_trained_student_beats_the_narrowed_block(session: Session) -> None:
    library = session.evaluator.library
    model = session.reference.model
    x = torch.relu(model.norm(model.stem(torch.cat([b.inputs for b in session.splits.calibration]))))
    pruned, student = (build(library, {"block.0": Entry(c)}) for c in (PRUNE, STUDENT))
    errors = [float((m.block(x) - model.block(x)).square().mean()) for m in (pruned, student)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"nowhere": Entry(PRUNE)}, "names layer 'nowhere'"),
        ({"block.3": Entry(PRUNE)}, "follow the decision at stem"),
        ({"fc": Entry(PRUNE)}, "the network's outputs"),
        ({"fc": Entry(Choice(Method.FACTORIZE, Granularity.CHANNEL, 0.5))}, "larger than 1"),
        ({"block.0": Entry(STUDENT), "block.3": Entry(STRUCTURES[3])}, "inside the student block"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(
    session: Session, entries: dict[str, Entry], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        session.space.check(entries)
