"""The packed weights of a compressed network: which tensors are stored, and how many bytes their file has."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from grainwise.realise.norms import norms

# In the order in which the file holds them: safetensors writes the widest alignment first.
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the weights file: each shared tensor once; of a batch norm only what is left when it is
    frozen (one scale and one shift a channel), whether it has been frozen yet or not.
    """
    living: set[str] = set()
    for name, norm in norms(model):
        assert norm.running_mean is not None
        parts = ("running_mean", "running_var", "num_batches_tracked", "weight", "bias")
        living.update(f"{name}.{part}" for part in parts)
        yield f"{name}.weight", norm.running_mean
        yield f"{name}.bias", norm.running_mean
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if name not in living and id(value) not in seen:
            seen.add(id(value))
            yield name, value.detach()


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the safetensors file of these tensors: 8 for the header's length, the header padded to a multiple of 8,
    and the data (format: the safetensors README).
    """
    offset = 0
    header = {}
    place = {dtype: number for number, dtype in enumerate(_DTYPES)}
    for name, value in sorted(tensors.items(), key=lambda item: (place[item[1].dtype], item[0])):
        size = value.numel() * value.element_size()
        header[name] = {
            "dtype": _DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + offset


def weights_bytes(model: nn.Module) -> int:
    """Bytes of the weights file of `model`, without writing it."""
    return file_bytes(dict(stored_tensors(model)))
