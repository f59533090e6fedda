"""How atoms move through ATen operators that only rearrange a tensor: views, permutations, slices, concatenations."""

from __future__ import annotations

import math

import numpy as np

from grainwise.graph.atoms import AtomArray, Atoms, Dims, Tagged
from grainwise.graph.call import Call

HEADS = "reshaped into heads or groups, which need all of their channels"


def _factor(source: list[int], target: list[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dimensions of two shapes with equal products; neither shape holds a 1."""
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(source) and j < len(target):
        start_i, start_j = i, j
        a, b = source[i], target[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a, i = a * source[i], i + 1
            else:
                b, j = b * target[j], j + 1
        runs.append((list(range(start_i, i)), list(range(start_j, j))))
    return runs


def _merge(atoms: Atoms, arrays: list[AtomArray | None], sizes: list[int]) -> AtomArray | None:
    """Atoms of the dimension that several dimensions are flattened into: each atom is repeated over the free ones."""
    carriers = [k for k, array in enumerate(arrays) if array is not None]
    if len(carriers) != 1:
        for k in carriers:
            atoms.freeze(arrays[k], "flattened together with another removable dimension")
        return None
    (k,) = carriers
    carried = arrays[k]
    assert carried is not None
    along = [1] * len(sizes)
    along[k] = sizes[k]
    return np.ascontiguousarray(np.broadcast_to(carried.reshape(along), sizes)).reshape(-1)


def _split(atoms: Atoms, merged: AtomArray | None, sizes: list[int]) -> list[AtomArray | None]:
    """Undo a merge: the atoms may vary along one of the new dimensions only, else they are frozen."""
    result: list[AtomArray | None] = [None] * len(sizes)
    if merged is None:
        return result
    grid = merged.reshape(sizes)
    varying = [k for k in range(len(sizes)) if (grid != np.take(grid, [0], axis=k)).any()]
    if len(varying) == 1:
        (k,) = varying
        result[k] = np.ascontiguousarray(np.moveaxis(grid, k, 0).reshape(sizes[k], -1)[:, 0])
    else:
        atoms.freeze(merged, HEADS)
    return result


def reshape(call: Call) -> list[Dims]:
    """view, reshape, flatten, unflatten, squeeze, unsqueeze: dimensions of size 1 come and go freely."""
    x, shape = call.tensor("self"), call.shapes[0]
    kept = [d for d, size in enumerate(x.shape) if size > 1]
    wanted = [d for d, size in enumerate(shape) if size > 1]
    for d, size in enumerate(x.shape):
        if size == 1:
            call.atoms.freeze(x.dims[d], "a single channel is reshaped")
    dims: list[AtomArray | None] = [None] * len(shape)
    if math.prod(shape) == 0:
        call.freeze_all("empty tensor")
        return [tuple(dims)]
    for run_in, run_out in _factor([x.shape[d] for d in kept], [shape[d] for d in wanted]):
        arrays, sizes = [x.dims[kept[k]] for k in run_in], [x.shape[kept[k]] for k in run_in]
        merged = arrays[0] if len(arrays) == 1 else _merge(call.atoms, arrays, sizes)
        parts = [merged] if len(run_out) == 1 else _split(call.atoms, merged, [shape[wanted[k]] for k in run_out])
        for k, part in zip(run_out, parts, strict=True):
            dims[wanted[k]] = part
    return [tuple(dims)]


def permute(call: Call) -> list[Dims]:
    x = call.tensor("self")
    return [tuple(x.dims[d] for d in call.dims_of("dims", x))]


def transpose(call: Call) -> list[Dims]:
    """transpose(dim0, dim1), and t, which swaps the last two."""
    x = call.tensor("self")
    first, second = (call.dim("dim0", x), call.dim("dim1", x)) if "dim0" in call.args else (-2, -1)
    dims = list(x.dims)
    if len(dims) > 1:
        dims[first], dims[second] = dims[second], dims[first]
    return [tuple(dims)]


def expand(call: Call) -> list[Dims]:
    """expand and expand_as: new dimensions in front are free; a dimension of size 1 that grows loses its atom."""
    x, shape = call.tensor("self"), call.shapes[0]
    dims: list[AtomArray | None] = [None] * (len(shape) - len(x.shape))
    for array, old, new in zip(x.dims, x.shape, shape[len(dims) :], strict=True):
        if old != new:
            call.atoms.freeze(array, "a single channel is broadcast")
        dims.append(array if old == new else None)
    return [tuple(dims)]


def slice_(call: Call) -> list[Dims]:
    """slice(dim, start, end, step): the atoms of the indices that are left."""
    x = call.tensor("self")
    d = call.dim("dim", x)
    array = x.dims[d]
    cut = None if array is None else array[slice(call.args["start"], call.args["end"], call.args["step"])]
    return [(*x.dims[:d], cut, *x.dims[d + 1 :])]


def narrow(call: Call) -> list[Dims]:
    """narrow(dim, start, length)."""
    x = call.tensor("self")
    d = call.dim("dim", x)
    array, start = x.dims[d], int(call.args["start"])
    cut = None if array is None else array[start : start + int(call.args["length"])]
    return [(*x.dims[:d], cut, *x.dims[d + 1 :])]


def split(call: Call) -> list[Dims]:
    """split, split_with_sizes, chunk: consecutive parts, whose sizes are read from the outputs."""
    x = call.tensor("self")
    d = call.dim("dim", x)
    array, start, results = x.dims[d], 0, []
    for shape in call.shapes:
        part = None if array is None else array[start : start + shape[d]]
        results.append((*x.dims[:d], part, *x.dims[d + 1 :]))
        start += shape[d]
    return results


def select(call: Call) -> list[Dims]:
    """select and unbind drop a dimension; picking single channels by number freezes them."""
    x = call.tensor("self")
    d = call.dim("dim", x)
    call.atoms.freeze(x.dims[d], "single channels are picked by number")
    return [(*x.dims[:d], *x.dims[d + 1 :])] * len(call.shapes)


def _joined(call: Call, parts: list[Tagged], d: int) -> AtomArray | None:
    if all(part.dims[d] is None for part in parts):
        return None
    arrays = []
    for part in parts:
        array = part.dims[d]
        arrays.append(call.atoms.constants(part.shape[d], "channels of fixed width") if array is None else array)
    return np.concatenate(arrays)


def cat(call: Call) -> list[Dims]:
    """cat: arrays are chained along the dimension and joined along all others."""
    parts = [part for part in call.args["tensors"] if part.shape != (0,)]
    d = call.dim("dim", parts[0])
    dims: list[AtomArray | None] = []
    for k, size in enumerate(call.shapes[0]):
        if k == d:
            dims.append(_joined(call, parts, k))
        else:
            dims.append(call.join([part.dims[k] for part in parts], size))
    return [tuple(dims)]


def stack(call: Call) -> list[Dims]:
    """stack: a new free dimension; all others are joined."""
    parts = call.args["tensors"]
    d = int(call.args["dim"]) % len(call.shapes[0])
    dims = [call.join([part.dims[k] for part in parts], size) for k, size in enumerate(parts[0].shape)]
    return [(*dims[:d], None, *dims[d:])]
