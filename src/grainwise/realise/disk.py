"""Solved parts of compressed networks kept in a directory, so that a later search on the same network begins warm."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from grainwise.graph.forward import tensors_in
from grainwise.plan.version import code_version
from grainwise.realise.reference import Reference, fingerprint, tensors_digest

LIMIT_BYTES = 4 * 2**30
_ROOM = 0.9  # of the limit that is left after a removal, so that not every new file removes one
_SOURCES = ("plan", "graph", "methods", "realise")
Contents = tuple[Any, dict[str, Tensor]]
"""JSON-able description and tensors."""


class VariantsOnDisk:
    """What was solved for one reference, one safetensors file a part, its description in the file's metadata.

    A file is found by the SHA-256 of all that decides its contents: weights, calibration data, target, layer, entry,
    kept channels and this library's own code. A file that is damaged, cut short, or of another key counts as missing.
    limit_bytes: of the whole folder; files that were not used for longest are removed beyond it.
    """

    def __init__(self, folder: Path, reference: Reference, limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.hits = self.misses = 0
        self._reference = reference
        self._hessians: dict[str, str] = {}

    def load(self, key: Mapping[str, Any]) -> Contents | None:
        """What `save` kept under the key, verified; None when there is no such file or it is not whole."""
        text = self._text(key)
        path = self._path(text)
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if about["key"] == text and about["sha256"] == _digest(text, about["spec"], tensors):
                os.utime(path)
                self.hits += 1
                return json.loads(about["spec"]), tensors
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
            pass
        self.misses += 1
        return None

    def save(self, key: Mapping[str, Any], spec: Any, tensors: Mapping[str, Tensor]) -> None:
        """Keep a part; the file is there as a whole or not at all. A folder that cannot be written keeps nothing."""
        text, described = self._text(key), json.dumps(spec)
        whole = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
        about = {"key": text, "spec": described, "sha256": _digest(text, described, whole)}
        partial = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=self.folder, suffix=".part")
            os.close(handle)
            save_file(whole, partial, metadata=about)
            size = os.path.getsize(partial)
            Path(partial).replace(self._path(text))
        except (OSError, SafetensorError):
            if partial is not None:
                Path(partial).unlink(missing_ok=True)
            return
        self._used_bytes += size
        if self._used_bytes > self.limit_bytes:
            self._used_bytes = self._make_room()

    @cached_property
    def _used_bytes(self) -> int:
        return sum(size for _, size, _ in self._files())

    def _files(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of every file; other processes may remove some meanwhile."""
        found = []
        for path in self.folder.glob("*.safetensors"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found.append((status.st_mtime, status.st_size, path))
        return found

    def _make_room(self) -> int:
        """Remove what was not used for longest; the bytes that are left."""
        files = sorted(self._files())
        left = sum(size for _, size, _ in files)
        for _, size, path in files:
            if left <= _ROOM * self.limit_bytes:
                break
            path.unlink(missing_ok=True)
            left -= size
        return left

    # -- keys

    def _path(self, text: str) -> Path:
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"

    def _text(self, key: Mapping[str, Any]) -> str:
        name = key.get("layer")
        return json.dumps({**key, "origin": self._origin, "hessian": name and self._hessian(name)}, sort_keys=True)

    def _hessian(self, layer: str) -> str:
        """Of a layer's H: the sums of another processor or number of threads may differ in their last bits."""
        if layer not in self._hessians:
            self._hessians[layer] = tensors_digest([self._reference.hessians[layer]])
        return self._hessians[layer]

    @cached_property
    def _origin(self) -> str:
        reference = self._reference
        facts = [code_version(*_SOURCES), torch.__version__, fingerprint(reference.model), repr(reference.target)]
        facts += [tensors_digest(tensors_in(batch)) for batch in reference.calibration]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _digest(key: str, spec: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over all that a file holds."""
    digest = hashlib.sha256(json.dumps([key, spec]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
