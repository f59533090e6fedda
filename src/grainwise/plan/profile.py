"""The compression profile: layer by layer what is done to a network, as versioned JSON that people can read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from grainwise.plan.choices import LEVELS, NONE, UNCOMPRESSED, Choice, Entry, Granularity, Method
from grainwise.plan.space import SpaceKind

SCHEMA_VERSION = 1
MAX_BYTES = 64 * 2**20


class ProfileError(ValueError):
    """A profile cannot be read; the message is one sentence with the JSON path of what is wrong."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _ChoiceJson(_Strict):
    method: Method
    granularity: Granularity
    level: Annotated[FiniteFloat, Field(gt=0, strict=True)]

    @model_validator(mode="after")
    def _in_vocabulary(self) -> _ChoiceJson:
        Choice(self.method, self.granularity, self.level)
        return self


class _EntryJson(_Strict):
    structure: _ChoiceJson | None = None
    precision: _ChoiceJson | None = None

    @model_validator(mode="after")
    def _in_place(self) -> _EntryJson:
        _entry(self)
        return self


class _ProfileJson(_Strict):
    """A grainwise compression profile: what is done to each layer; layers that are not named stay as they are."""

    format: Literal["grainwise.profile"]
    version: Literal[1]
    model: Annotated[str, Field(description="SHA-256 of the reference weights")]
    data: Annotated[str, Field(description="SHA-256 of the calibration data")]
    target: str
    space: SpaceKind
    layers: dict[str, _EntryJson]
    metrics: dict[str, FiniteFloat] = {}


_Read = TypeVar("_Read", bound=_Strict)


def _choice(read: _ChoiceJson | None) -> Choice:
    if read is None:
        return NONE
    level = next((known for known in LEVELS[read.method] if known == read.level), read.level)  # 8, not 8.0
    return Choice(read.method, read.granularity, level)


def _entry(read: _EntryJson) -> Entry:
    return Entry(_choice(read.structure), _choice(read.precision))


@dataclass(frozen=True, slots=True)
class CompressionProfile:
    """What is done to each layer of one network.

    entries: by layer name; a layer that is not named stays as it is.
    model, data: fingerprints of the reference weights and of the calibration data that the profile was found with.
    metrics: figures of the compressed network, for people; nothing is decided by them.
    """

    entries: Mapping[str, Entry]
    model: str = ""
    data: str = ""
    target: str = "packed"
    space: SpaceKind = SpaceKind.CHAIN
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, layer: str) -> Entry:
        return self.entries.get(layer, UNCOMPRESSED)

    def with_metrics(self, metrics: Mapping[str, float]) -> CompressionProfile:
        return replace(self, metrics=dict(metrics))

    def to_json(self) -> str:
        """Canonical text: equal profiles give equal bytes. Raises ValueError for a metric that is not finite."""
        body = {
            "format": "grainwise.profile",
            "version": SCHEMA_VERSION,
            "model": self.model,
            "data": self.data,
            "target": self.target,
            "space": str(self.space),
            "layers": entries_to_json(self.entries),
            "metrics": dict(self.metrics),
        }
        return json.dumps(body, indent=2, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> CompressionProfile:
        """Inverse of `to_json`. Raises ProfileError with one sentence and the JSON path."""
        read = _validated(_ProfileJson, _parse(text))
        entries = {name: entry for name, body in read.layers.items() if (entry := _entry(body)) != UNCOMPRESSED}
        return CompressionProfile(entries, read.model, read.data, read.target, read.space, dict(read.metrics))

    def save(self, path: str | Path) -> None:
        """Write the file: on a full disk, or when it is cut, there is the old one or the new one, never a half."""
        file = Path(path)
        part = file.with_name(f"{file.name}.part")
        try:
            with part.open("w", encoding="utf-8") as handle:
                handle.write(self.to_json())
                handle.flush()
                os.fsync(handle.fileno())
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | Path) -> CompressionProfile:
        """Raises ProfileError naming the file when it is missing, too large, or not a profile."""
        file = Path(path)
        try:
            if file.stat().st_size > MAX_BYTES:
                raise ProfileError(f"it has {file.stat().st_size} bytes, more than the {MAX_BYTES} a profile may have")
            return CompressionProfile.from_json(file.read_text(encoding="utf-8"))
        except ProfileError as error:
            raise ProfileError(f"{file} is not a profile that can be used: {error}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(f"{file} cannot be read: {error}") from error


def _choice_to_json(choice: Choice) -> dict[str, Any]:
    return {"method": str(choice.method), "granularity": str(choice.granularity), "level": choice.level}


def entries_to_json(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The `layers` part of a profile; also what the store keeps of a trial."""
    layers: dict[str, Any] = {}
    for name, entry in entries.items():
        parts = {"structure": entry.structure, "precision": entry.precision}
        if body := {slot: _choice_to_json(choice) for slot, choice in parts.items() if choice != NONE}:
            layers[name] = body
    return layers


def entries_from_json(layers: Mapping[str, Any]) -> dict[str, Entry]:
    """Inverse of `entries_to_json`. Raises ProfileError."""
    return {name: _entry_of(json.dumps(body)) for name, body in layers.items()}


@lru_cache(maxsize=4096)
def _entry_of(text: str) -> Entry:
    """Few entries occur in many layers of many trials, and checking one takes as long as reading twenty."""
    return _entry(_validated(_EntryJson, json.loads(text)))


def json_schema() -> dict[str, Any]:
    """JSON Schema of the profile file, as published in docs/profile.schema.json."""
    schema = _ProfileJson.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "grainwise profile"}


def _refuse_constant(token: str) -> NoReturn:
    raise ProfileError(f"$: {token} is not JSON")


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ProfileError(f"$: the key {repeated!r} stands twice in one object")
    return found


def _parse(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeats)
    except json.JSONDecodeError as error:
        raise ProfileError(f"$: not JSON ({error.msg} at line {error.lineno})") from error
    except RecursionError as error:
        raise ProfileError("$: nested too deeply") from error


def _validated(schema: type[_Read], body: Any) -> _Read:
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        path = "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        raise ProfileError(f"{path}: {first['msg'].removeprefix('Value error, ')}") from error
