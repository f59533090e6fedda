"""What every search technique is: it is asked for profiles and told what they gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from grainwise.plan.choices import Entry
from grainwise.study.trial import Trial

State = tuple[dict[str, Tensor], dict[str, Any]]
"""What a searcher needs to go on later: tensors for safetensors, and a body for JSON."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A profile to try. entries: by layer name, every layer named. source: what proposed it, for the trial."""

    entries: Mapping[str, Entry]
    source: str


class Searcher(Protocol):
    """A search technique; it sees profiles and trials, never the model, the data or the store."""

    def ask(self, count: int) -> list[Proposal]:
        """`count` profiles to try next. May repeat a profile only when the space has nothing new to offer."""
        ...

    def tell(self, trials: Sequence[Trial]) -> None:
        """What the profiles of the last `ask` gave, in the order asked; failures among them."""
        ...

    def state(self) -> State:
        """Everything that decides later proposals. Taken between a `tell` and the next `ask`."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], body: Mapping[str, Any]) -> None:
        """Go on from `state()`: the same proposals follow as without the interruption."""
        ...
