"""Predicted bytes against files that are written, and shared costs against whole profiles."""

from __future__ import annotations

import numpy as np
import pytest

from examples import zoo
from grainwise.export.graph import file_bytes
from grainwise.plan.projection import Projection, Walk
from grainwise.search.draft import Draft
from grainwise.search.walks import sample, uniform
from grainwise.session import Session


@pytest.fixture(scope="module")
def deployed() -> Session:
    return Session.prepare(zoo.conv1d(), zoo.signal_data())


def test_predicted_bytes_are_the_file_s_within_one_percent_and_never_below(deployed: Session) -> None:
    reference = deployed.evaluator.reference.size_bytes
    rng = np.random.default_rng(0)
    profiles = [{}, *sample(Projection(deployed.cost, {}), 6, uniform, rng)]
    profiles += sample(Projection(deployed.cost, {"size": 0.4 * reference}), 4, uniform, rng)
    for entries in profiles:
        file = deployed.evaluator.finish(entries).file
        assert file is not None
        excess = deployed.cost.total(entries)[0] - file_bytes(file)
        assert 0 <= excess <= max(0.01 * file_bytes(file), 250)  # these files have 10 kB


def test_walks_and_drafts_know_the_whole_profile_s_cost(deployed: Session) -> None:
    rng = np.random.default_rng(1)
    for _ in range(5):
        walk = Walk(Projection(deployed.cost, {}))
        while not walk.done:
            walk.take(_random_entry(walk, rng))
        np.testing.assert_allclose(walk.completed, deployed.cost.total(walk.entries), rtol=1e-9)
        draft = Draft(deployed.cost, walk.entries)
        for index in rng.integers(0, len(draft.layers), 10).tolist():
            legal = np.argwhere(np.isfinite(draft.changes(index)[..., 0]))
            draft.replace(index, *(int(n) for n in rng.choice(legal)))
            np.testing.assert_allclose(draft.total, deployed.cost.total(draft.entries()), rtol=1e-9)


def _random_entry(walk: Walk, rng: np.random.Generator):  # type: ignore[no-untyped-def]
    from grainwise.plan.choices import entry_of

    return entry_of(*(int(n) for n in rng.choice(np.argwhere(walk.legal()))))
