"""One copy of an object's tensors for many processes: they lie in memory once, each process maps them, and what one
writes to is its own from then on.

The bytes go from a search to its own workers and are never kept: stored files hold no pickle.
"""

from __future__ import annotations

import io
import mmap
import os
import warnings
from typing import Any

import cloudpickle
import numpy as np
import torch
from torch import Tensor, nn

from grainwise.workers.reducers import told

_ALIGNED = 64  # bytes: as torch aligns its own


class Packed:
    """An object as bytes: where its tensors end, the tensors, and what is pickled of the rest.

    tensor_bytes: of the tensors; bytes: of all.
    """

    def __init__(self, value: Any) -> None:
        self._rest = io.BytesIO()
        self._packer = _Packer(self._rest)
        self._packer.dump(value)
        self.tensor_bytes = self._packer.bytes
        self.bytes = self.tensor_bytes + self._rest.tell()

    def write(self, target: memoryview) -> None:
        """Into `bytes` bytes, for `unpack`."""
        target[:_ALIGNED] = self.tensor_bytes.to_bytes(_ALIGNED, "little")
        for storage, place in self._packer.storages:
            content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            target[place : place + len(content)] = content.data
        target[self.tensor_bytes :] = self._rest.getbuffer()


class Shared:
    """An object in anonymous memory that lasts as long as this process and those that have mapped it, kill -9 included.

    path: for `unpack_from`, while this is open. bytes: of its tensors. Raises RuntimeError where the system has no such
    memory (it is not Linux).
    """

    def __init__(self, value: Any) -> None:
        if not hasattr(os, "memfd_create"):
            raise RuntimeError("worker processes share their memory as Linux does it: use --workers 1 here")
        packed = Packed(value)
        self._file = os.fdopen(os.memfd_create("grainwise"), "r+b")
        self._file.truncate(packed.bytes)
        with mmap.mmap(self._file.fileno(), packed.bytes) as mapped, memoryview(mapped) as target:
            packed.write(target)
        self.bytes = packed.tensor_bytes
        self.path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"

    def close(self) -> None:
        self._file.close()


def unpack_from(path: str) -> Any:
    """The object of a `Shared`, its tensors mapped and not read."""
    with open(path, "rb") as file:
        return unpack(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def unpack(buffer: Any) -> Any:
    """The object that `Packed.write` wrote into a buffer; its tensors lie in that buffer."""
    end = int.from_bytes(bytes(buffer[:_ALIGNED]), "little")
    return _Unpacker(io.BytesIO(bytes(buffer[end:])), buffer).load()


class _Packer(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """Tensors are told by their place. storages: (storage, place in bytes) of each; bytes: to the end of the last."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.storages: list[tuple[torch.UntypedStorage, int]] = []
        self.bytes = _ALIGNED
        self._places: dict[int, int] = {}

    def persistent_id(self, value: Any) -> tuple[int, int] | None:
        """(place, bytes) of a storage."""
        if not isinstance(value, torch.UntypedStorage):
            return None
        if value.data_ptr() not in self._places:
            self._places[value.data_ptr()] = self.bytes
            self.storages.append((value, self.bytes))
            self.bytes += -(-value.nbytes() // _ALIGNED) * _ALIGNED
        return self._places[value.data_ptr()], value.nbytes()

    def reducer_override(self, value: Any) -> Any:
        if type(value) in (Tensor, nn.Parameter) and value.device.type == "cpu" and value.layout == torch.strided:
            form = value.dtype, value.storage_offset(), tuple(value.shape), value.stride()
            return _tensor, (value.untyped_storage(), form, value.requires_grad, type(value) is nn.Parameter)
        return told(value) or super().reducer_override(value)


class _Unpacker(cloudpickle.pickle.Unpickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO, buffer: Any) -> None:
        super().__init__(file)
        self._buffer = buffer
        self._storages: dict[int, torch.UntypedStorage] = {}

    def persistent_load(self, place: tuple[int, int]) -> torch.UntypedStorage:
        start, count = place
        if start not in self._storages:
            found = np.frombuffer(self._buffer, np.uint8, count, start) if count else np.empty(0, np.uint8)
            with warnings.catch_warnings():  # that Ray's memory cannot be written to: who tries ends its own process
                warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
                self._storages[start] = torch.from_numpy(found).untyped_storage()
        return self._storages[start]


def _tensor(storage: torch.UntypedStorage, form: tuple[Any, ...], requires_grad: bool, parameter: bool) -> Tensor:
    dtype, offset, shape, stride = form
    found = torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)
    return nn.Parameter(found, requires_grad) if parameter else found.requires_grad_(requires_grad)
