"""What is computed once and read by many candidates, each kind with its switch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Sharing:
    """The shared execution state of one search; figures are the same whatever is switched off."""

    reference: bool = True
    """Outputs of the uncompressed network."""
    variants: bool = True
    """Compressed layers, in memory."""
    folder: Path | None = None
    """Where compressed layers are kept for later searches; None keeps them in memory alone."""
    prefixes: bool = True
    """Activations up to where candidates part."""
    prefix_bytes: int | None = None
    """Memory for them; None for a share of what is free."""
    measurements: bool = True
    """Measurements of the same profile in other studies of the store."""
    latency: bool = True
    """Kernel times of earlier runs on this machine."""


EVERYTHING = Sharing()
"""What can be shared without leaving anything on the disk but kernel times and the store."""
