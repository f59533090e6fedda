"""Fetched files are checksummed, nothing half written stays, and what cannot be fetched is said in words."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from examples.cache import Package, Unavailable, arrays, made, npm, wheel

DIGEST = hashlib.sha256(b"body").hexdigest()


def test_a_file_is_made_once(empty_cache: Path) -> None:
    assert made("a.txt", lambda path: path.write_text("first")).read_text() == "first"
    assert made("a.txt", lambda path: path.write_text("second")).read_text() == "first"
    assert [path.name for path in empty_cache.iterdir()] == ["a.txt"]


def test_a_file_that_fails_half_way_is_not_kept(empty_cache: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError

    with pytest.raises(OSError):
        made("a.txt", fail)
    assert not list(empty_cache.iterdir())


@pytest.mark.usefixtures("empty_cache")
def test_arrays_come_back_as_they_were() -> None:
    first = arrays("a.npz", lambda: {"x": np.arange(3)})
    second = arrays("a.npz", dict)
    np.testing.assert_array_equal(first["x"], second["x"])


def test_a_package_is_fetched_and_checked(empty_cache: Path) -> None:
    package = Package((sys.executable, "-c", "open('a.whl', 'w').write('body')"), "a.whl", DIGEST)
    assert package.fetch() == empty_cache / "a.whl"
    with pytest.raises(Unavailable, match=f"has SHA-256 {DIGEST}, expected 0"):
        Package(package.command, "a.whl", "0").fetch()


def test_a_package_supplied_by_hand_is_taken(empty_cache: Path) -> None:
    (empty_cache / "a.whl").write_bytes(b"body")
    assert wheel("a==1", "a.whl", DIGEST).fetch() == empty_cache / "a.whl"


@pytest.mark.parametrize("package", [wheel("gensim==4.4.0", "a.whl", DIGEST), npm("a@1", "a.tgz", DIGEST)])
def test_what_cannot_be_fetched_is_named(package: Package, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PATH": ""}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Unavailable, match=rf"{package.file} could not be fetched with .* put it into .* by hand"):
        package.fetch()
    assert not list(empty_cache.iterdir())
