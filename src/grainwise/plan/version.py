"""The version of the library's own code: what was computed by other code is never taken for the present one's."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

_ROOT = Path(__file__).parents[1]


@cache
def code_version(*packages: str) -> str:
    """SHA-256 over the source files of these packages of the library."""
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted((_ROOT / package).glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
