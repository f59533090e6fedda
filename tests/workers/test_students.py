"""Students that other processes train are those that this one would have trained."""

from __future__ import annotations

import pytest
import torch

from grainwise.methods.distill import StudentOptions
from grainwise.plan.choices import Choice, Entry, Granularity, Method
from grainwise.realise.build import build
from grainwise.realise.library import VariantLibrary
from grainwise.session import Session
from grainwise.workers.students import train_students


def test_they_are_the_same_to_the_bit_and_are_not_trained_again(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = StudentOptions(steps=5)
    here, there = (VariantLibrary(session.reference, students=options) for _ in range(2))
    entries = {"block.0": Entry(Choice(Method.DISTILL, Granularity.BLOCK, 0.5))}
    expected = build(here, entries).state_dict()
    assert train_students(there, 2) == 2 * len(session.reference.graph.blocks)
    monkeypatch.delattr("grainwise.realise.library.train_block")
    found = build(there, entries).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_more_steps_and_another_loss_are_other_students(session: Session) -> None:
    block = session.reference.graph.blocks[0]
    given = StudentOptions(30), StudentOptions(60), StudentOptions(30, "absolute")
    libraries = [VariantLibrary(session.reference, students=options) for options in given]
    weights = [next(library.student(block, 4).parameters()) for library in libraries]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
