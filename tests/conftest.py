"""Fixtures for all tests; one thread, so that two test processes do not fight over two cores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

from grainwise.session import Session
from tests.networks import tiny, tiny_data

torch.set_num_threads(1)
settings.register_profile("grainwise", deadline=None)  # the machine is shared: no time is a fault
settings.load_profile("grainwise")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="as many cases as were asked for, where a part of them is run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
        items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


@pytest.fixture(autouse=True)
def short_races(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests ask whether files are timed, and not which one is faster."""
    monkeypatch.setattr("grainwise.evaluate.deployed.SECONDS", 0.2)


@pytest.fixture(scope="session")
def session() -> Session:
    """The tiny residual network, prepared; shared, so tests must not change it."""
    return Session.prepare(tiny(), tiny_data(), target="packed")


@pytest.fixture(scope="session")
def onnx_session() -> Session:
    """The same for the target whose files run on this processor."""
    return Session.prepare(tiny(), tiny_data(), target="ort-cpu")
