"""How a batch of inputs is given to a model, and which tensor of what it returns is its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], Tensor]
"""(model, one batch of inputs) -> the output tensor [B, ...]."""


def default_forward(model: nn.Module, inputs: Any) -> Tensor:
    """Call `model(x)` for a tensor, `model(**x)` for a mapping, `model(*x)` for a tuple or list.

    The output is the tensor itself, `.logits`, `["logits"]`, `.last_hidden_state`, or the first tensor of a tuple.
    Raises TypeError when the model returns none of these.
    """
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    elif isinstance(inputs, tuple | list):
        output = model(*inputs)
    else:
        output = model(inputs)
    return _output_tensor(output)


def _output_tensor(output: Any) -> Tensor:
    named = output.get("logits") if isinstance(output, Mapping) else None
    listed = output if isinstance(output, tuple | list) else ()
    candidates = (
        output,
        getattr(output, "logits", None),
        named,
        getattr(output, "last_hidden_state", None),
        *listed,
    )
    for candidate in candidates:
        if isinstance(candidate, Tensor):
            return candidate
    raise TypeError(f"the model returned {type(output).__name__}, in which no output tensor is found: pass forward=")


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in a nest of mappings, tuples and lists, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors_in(item)]
    if isinstance(value, tuple | list):
        return [t for item in value for t in tensors_in(item)]
    return []


def batch_size(inputs: Any) -> int:
    """Samples in a batch: the first dimension of its first tensor, 1 when there is none."""
    return next((t.shape[0] for t in tensors_in(inputs) if t.ndim), 1)
