"""State dictionaries of optimisers and schedules, and the global generators, as tensors and JSON."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grainwise.recover.errors import RecoveryError


def flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON of a nest of dictionaries, lists, numbers and tensors; its tensors are put into `tensors` under names
    that begin with `name`. Raises RecoveryError for what is none of these.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case Tensor():
            tensors[name] = value.detach().clone()
            return {"tensor": name}
        case Mapping():
            pairs = enumerate(value.items())
            return {"pairs": [[key, flatten(item, f"{name}.{number}", tensors)] for number, (key, item) in pairs]}
        case tuple():
            return {"tuple": [flatten(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]}
        case list():
            return [flatten(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]
        case _:
            raise RecoveryError(
                f"the state of {name.split('.')[1]} holds a {type(value).__name__}, which cannot be kept in a "
                "checkpoint; give objects whose state is made of numbers, texts and tensors"
            )


def unflatten(body: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `flatten`."""
    if isinstance(body, list):
        return [unflatten(item, tensors) for item in body]
    if not isinstance(body, dict):
        return body
    ((kind, inner),) = body.items()
    match kind:
        case "tensor":
            return tensors[inner].clone()
        case "float":
            return float(inner)
        case "tuple":
            return tuple(unflatten(item, tensors) for item in inner)
        case _:
            return {key: unflatten(item, tensors) for key, item in inner}


def generators() -> dict[str, Any]:
    """Where the global generators of torch, numpy and Python stand."""
    kind, key, position, has_gauss, cached = np.random.get_state()
    numpy = [kind, torch.from_numpy(np.asarray(key).astype(np.int64)), position, has_gauss, cached]
    return {"torch": torch.get_rng_state(), "numpy": numpy, "python": random.getstate()}


def set_generators(state: Mapping[str, Any]) -> None:
    """Put them there again."""
    kind, key, position, has_gauss, cached = state["numpy"]
    torch.set_rng_state(state["torch"])
    np.random.set_state((kind, key.numpy().astype(np.uint32), position, has_gauss, cached))
    random.setstate(state["python"])
