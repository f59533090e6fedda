"""The command line and everything that only reads results start without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import grainwise


@pytest.mark.parametrize(
    "module",
    [
        "grainwise",
        "grainwise.cli",
        "grainwise.plan.profile",
        "grainwise.store.studies",
        "grainwise.report.comparison",
        "grainwise.report.plot",
        "grainwise.report.tables",
    ],
)
def test_loads_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_resolve() -> None:
    for name in grainwise.__all__:
        assert getattr(grainwise, name).__doc__
    with pytest.raises(AttributeError, match="it has"):
        grainwise.nonsense  # noqa: B018
