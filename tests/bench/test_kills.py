"""Kill -9 in small, and that the bench sees a store that acknowledges too early."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import kills
from bench.kills import Bench
from grainwise.search.rl import ControllerSearcher
from grainwise.store.studies import Store
from grainwise.study.trial import Trial


@pytest.fixture(scope="module")
def prepared() -> Bench:
    """Measured once; `at` gives the same with another store."""
    bench = Bench("", 24, 0)
    assert bench.scores is not None
    return bench


def at(prepared: Bench, folder: Path, trials: int) -> Bench:
    bench = Bench(f"sqlite:///{folder / 'kills.db'}", trials, 0)
    bench.__dict__.update(session=prepared.session, scores=prepared.scores)
    return bench


def test_nothing_that_was_acknowledged_is_lost(prepared: Bench, tmp_path: Path) -> None:
    seen = kills.killed(at(prepared, tmp_path, 36), 9, np.random.default_rng(0))
    assert (seen.kills, seen.lost, seen.duplicates, seen.unsound, seen.worse) == (9, 0, 0, 0, 0)
    assert seen.told > 9 and seen.resumed > 5


def test_a_search_that_is_killed_goes_through_the_same_profiles(prepared: Bench, tmp_path: Path) -> None:
    assert kills.cut(at(prepared, tmp_path, 36), 2, np.random.default_rng(1)) == 2


def test_a_store_that_acknowledges_too_early_is_seen(
    prepared: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each trial is written when two more have come."""
    waiting: list[Trial] = []
    add = Store.add

    def late(store: Store, name: str, *trials: Trial, keys: Mapping[int, str]) -> None:
        waiting.extend(trials)
        while len(waiting) > 2:
            add(store, name, waiting.pop(0))

    monkeypatch.setattr(Store, "add", late)
    bench = at(prepared, tmp_path, 16)
    told = bench.life("s", 3, 0.0)
    assert set(told) - {(t.number, t.measurement.divergence) for t in bench.trials_of("s") if t.measurement}


def test_a_searcher_that_forgets_its_randomness_is_seen(
    prepared: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = ControllerSearcher.restore

    def forgetful(searcher: Any, tensors: Any, body: Any) -> None:
        rng = searcher._rng.bit_generator.state
        restore(searcher, tensors, {**body, "rng": rng})

    monkeypatch.setattr(ControllerSearcher, "restore", forgetful)
    bench = at(prepared, tmp_path, 36)
    bench.life("cut", 18, 0.0)  # 16 in the first batch; those stored of the second are not the ones asked for again
    with pytest.raises(RuntimeError, match="was another profile"):
        bench.search("cut")
