"""The seal of a stored row: SQLite's own checks see a damaged page, but not a digit that has become another digit."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def seal(values: Any) -> str:
    """SHA-256 of JSON values in their order. It is stored, so it must stay as it is.

    Raises ValueError for a number that is not finite.
    """
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)  # keys keep their order in the row, too
    return hashlib.sha256(text.encode()).hexdigest()
