from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grainwise.plan.choices import PRECISIONS, STRUCTURES, Entry
from grainwise.plan.profile import (
    CompressionProfile,
    ProfileError,
    entries_from_json,
    entries_to_json,
    json_schema,
)

ENTRIES = st.builds(Entry, st.sampled_from(STRUCTURES), st.sampled_from(PRECISIONS))
GOOD: dict[str, Any] = json.loads(CompressionProfile({"a": Entry(STRUCTURES[3], PRECISIONS[2])}).to_json())


@given(st.dictionaries(st.text(max_size=20), ENTRIES, max_size=5))
def test_round_trip(entries: dict[str, Entry]) -> None:
    profile = CompressionProfile({n: e for n, e in entries.items() if e != Entry()}, "m", "d", metrics={"x": 0.5})
    text = profile.to_json()
    assert CompressionProfile.from_json(text) == profile
    assert CompressionProfile.from_json(text).to_json() == text
    jsonschema.validate(json.loads(text), json_schema())


@given(st.dictionaries(st.text(max_size=20), ENTRIES, max_size=5))
def test_entries_round_trip(entries: dict[str, Entry]) -> None:
    kept = {n: e for n, e in entries.items() if e != Entry()}
    assert entries_from_json(entries_to_json(entries)) == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"\$\.version"),
        ({"format": "other"}, r"\$\.format"),
        ({"extra": 1}, r"\$\.extra"),
        ({"layers": {"a": {"structure": {"method": "prune", "granularity": "layer", "level": 0.4}}}}, r"\$\.layers\.a"),
        ({"layers": {"a": {"structure": {"method": "prune", "granularity": "layer", "level": True}}}}, r"level"),
        ({"layers": {"a": {"structure": {"method": "quantize", "granularity": "layer", "level": 8}}}}, "a precision"),
        ({"layers": {"a": {"structure": {"method": "melt", "granularity": "layer", "level": 8}}}}, "method"),
        ({"layers": []}, r"\$\.layers"),
        ({"metrics": {"x": "much"}}, r"\$\.metrics\.x"),
    ],
)
def test_what_is_wrong_is_refused_with_its_path(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError, match=message) as caught:
        CompressionProfile.from_json(json.dumps({**GOOD, **change}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, "NaN", '{"a": Infinity}', '{"version": 1, "version": 1}', "null", "[]", '"x"', "1e400"],
)
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(ProfileError, match=r"^\$"):
        CompressionProfile.from_json(text)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="missing.json cannot be read"):
        CompressionProfile.load(tmp_path / "missing.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match="bytes.json cannot be read"):
        CompressionProfile.load(tmp_path / "bytes.json")


def test_metrics_must_be_finite() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        CompressionProfile({}, metrics={"x": math.nan}).to_json()


def test_the_published_schema_is_the_one_in_force() -> None:
    published = Path(__file__).parents[2] / "docs" / "profile.schema.json"
    assert json.loads(published.read_text()) == json_schema()
