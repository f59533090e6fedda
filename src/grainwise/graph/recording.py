"""One eager run of a model, watched by hooks: which modules run, in which order, at how many positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from grainwise.graph.forward import Forward, batch_size, tensors_in
from grainwise.graph.walk import plain_attention

LAYER_TYPES = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.Embedding)


class TraceError(ValueError):
    """The model could not be run on the example inputs."""


@dataclass(slots=True)
class Recording:
    """macs: multiply-accumulates per sample of everything. positions: of each layer that ran, in the order of first
    runs: places per sample at its input and at its output, summed over its runs. one_in_one_out: for each module that
    ran, one bool per run: its first argument was the only tensor it got, and its result a tensor or a tuple that
        begins with one.
    """

    macs: int = 0
    positions: dict[str, tuple[int, int]] = field(default_factory=dict)
    one_in_one_out: dict[str, list[bool]] = field(default_factory=dict)


def _positions(tensor: Tensor, width: int, batch: int) -> int:
    """Places per sample; tensors that all samples share (position numbers) have a leading dimension of 1."""
    places = tensor.numel() // width
    shared = tensor.ndim > 0 and tensor.shape[0] == 1
    return places if shared or places % batch else places // batch


def _widths(module: nn.Module) -> tuple[int, int]:
    match module:
        case nn.Conv1d() | nn.Conv2d():
            return module.in_channels, module.out_channels
        case nn.Linear():
            return module.in_features, module.out_features
        case nn.Embedding():
            return 1, module.embedding_dim
        case _:
            raise TypeError(f"{type(module).__name__} is no layer")


def _first_tensor(value: Any) -> Tensor | None:
    first = value[0] if isinstance(value, tuple | list) and value else value
    return first if isinstance(first, Tensor) else None


def _only_tensor(arguments: Sequence[Any]) -> Tensor | None:
    found = [tensor for argument in arguments for tensor in tensors_in(argument)]
    return found[0] if len(found) == 1 else None


def _watch(recording: Recording, name: str, module: nn.Module, batch: int) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        result = _first_tensor(output)
        fits = bool(args) and result is not None and args[0] is _only_tensor((*args, *kwargs.values()))
        recording.one_in_one_out.setdefault(name, []).append(fits)
        source = _first_tensor(args or tuple(kwargs.values()))
        if isinstance(module, LAYER_TYPES) and source is not None and result is not None:
            inputs, outputs = _widths(module)
            before = recording.positions.get(name, (0, 0))
            recording.positions[name] = (
                before[0] + _positions(source, inputs, batch),
                before[1] + _positions(result, outputs, batch),
            )

    return module.register_forward_hook(hook, with_kwargs=True)


def record(model: nn.Module, inputs: Any, forward: Forward) -> Recording:
    """Run the model once on the inputs, without gradients. Raises TraceError when the run fails."""
    recording, batch = Recording(), max(1, batch_size(inputs))
    handles = [_watch(recording, name, module, batch) for name, module in model.named_modules()]
    counter = FlopCounterMode(display=False)
    try:
        # The plain attention kernels are made of products that the counter knows.
        with torch.no_grad(), plain_attention(), sdpa_kernel(SDPBackend.MATH), counter:
            forward(model, inputs)
    except Exception as error:
        raise TraceError(
            f"running {type(model).__name__} on the example inputs failed with {type(error).__name__}: {error}; "
            "pass forward= to say how the model is called, or other example inputs"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    recording.macs = counter.get_total_flops() // 2 // batch
    return recording
