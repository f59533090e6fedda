"""What an evaluation gives: a measurement of a realised candidate, or the failure that came instead."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Measurement:
    """Figures of one realised network.

    metric: the user's metric on the search split (accuracy lies in 0..1), higher is better.
    divergence: label-free distance of its outputs from the reference's on the search split, >= 0: Kullback-Leibler
        divergence in nats for logits. The reference has 0.
    size_bytes: bytes of the file that is deployed. macs: multiply-accumulates per sample. latency_ms: of one sample in
        the deployment runtime, 0 where it is not asked for.

    Raises ValueError for a figure that is not finite.
    """

    metric: float
    divergence: float
    size_bytes: int
    macs: int
    latency_ms: float = 0.0

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.metric, self.divergence, self.latency_ms))):
            raise ValueError(
                f"metric {self.metric}, divergence {self.divergence} and latency {self.latency_ms} must be finite"
            )

    def cost(self, name: str) -> float:
        """The figure that a constraint of this name bounds (`size`, `macs` or `latency`)."""
        return float({"size": self.size_bytes, "macs": self.macs, "latency": self.latency_ms}[name])

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a candidate has no measurement: the stage that failed (`build`, `evaluate`) and the reason in words."""

    stage: str
    reason: str


Outcome = Measurement | Failure
