"""How much each choice alone is expected to hurt: the scores that a search starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Expected divergence, in nats, when one layer takes one choice and all else stays as it is.

    structures: `[L, S]` over plan.STRUCTURES, precisions: `[L, P]` over plan.PRECISIONS; infinite where the choice is
    illegal, 0 for none. Scores of a layer's structure and precision are added, and layers are added (a first-order
    model: exact for small perturbations that do not interact).
    """

    structures: NDArray[np.float64]
    precisions: NDArray[np.float64]

    def __post_init__(self) -> None:
        for table in (self.structures, self.precisions):
            if np.isnan(table).any() or (table < 0).any():
                raise ValueError("sensitivity scores must be numbers >= 0")

    def pairs(self, index: int) -> NDArray[np.float64]:
        """`[S, P]` scores of the entries of layer `index`."""
        return np.asarray(self.structures[index][:, None] + self.precisions[index][None, :])

    def to_json(self) -> dict[str, list[list[float | None]]]:
        """Rows of both tables; infinity, which JSON does not have, becomes null."""
        tables = {"structures": self.structures, "precisions": self.precisions}
        return {
            name: [[float(v) if np.isfinite(v) else None for v in row] for row in table]
            for name, table in tables.items()
        }

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Sensitivity:
        """Inverse of `to_json`."""
        structures, precisions = (
            np.array([[np.inf if v is None else v for v in row] for row in body[name]], dtype=np.float64)
            for name in ("structures", "precisions")
        )
        return Sensitivity(structures, precisions)
