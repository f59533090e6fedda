"""Fixtures of the examples: their networks and data, or the reason why they cannot be had here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from examples.cache import Unavailable

T = TypeVar("T")


def or_skip(make: Callable[[], T]) -> T:
    """What `make` returns; the test is skipped when a package that it needs cannot be fetched."""
    try:
        return make()
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("GRAINWISE_CACHE", str(tmp_path))
    return tmp_path
