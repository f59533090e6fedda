"""Remove units of couplings from a model for real, or silence them where they are read."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from grainwise.plan.layers import Coupling, Slot


def _holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every module and attribute that holds a tensor, by the tensor's id: tied parameters have several."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                holders.setdefault(id(tensor), []).append((module, name))
    return holders


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), attribute)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is no parameter or buffer of {type(model).__name__}")
    return tensor


def _units(coupling: Coupling, units: Iterable[int]) -> set[int]:
    chosen = set(units)
    if not chosen <= set(range(coupling.width)):
        raise ValueError(f"units of {coupling.name} are 0 to {coupling.width - 1}, got {sorted(chosen)}")
    return chosen


def _positions(slot: Slot, units: Iterable[int]) -> list[int]:
    return [position for unit in units for position in slot.indices[unit]]


def _keep_masks(
    model: nn.Module, couplings: Sequence[Coupling], kept: Mapping[str, Sequence[int]]
) -> dict[int, tuple[Tensor, dict[int, Tensor]]]:
    """For each tensor that is cut, by id: the tensor and for each cut dimension what stays, as bool [size]."""
    cuts: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}
    for coupling in couplings:
        if coupling.name not in kept:
            continue
        stay = _units(coupling, kept[coupling.name])
        if not stay:
            raise ValueError(f"at least one unit of {coupling.name} must be kept")
        removed = [unit for unit in range(coupling.width) if unit not in stay]
        for slot in coupling.slots:
            tensor = _tensor(model, slot.parameter)
            masks = cuts.setdefault(id(tensor), (tensor, {}))[1]
            mask = masks.setdefault(slot.dim, torch.ones(tensor.shape[slot.dim], dtype=torch.bool))
            mask[_positions(slot, removed)] = False
    return cuts


def refresh_widths(module: nn.Module) -> None:
    """Bring a module's width attributes in line with its tensors."""
    match module:
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            outputs, group_inputs = module.weight.shape[:2]
            if module.groups > 1 and module.groups == module.in_channels:
                module.groups = outputs // (module.out_channels // module.groups)
            module.out_channels, module.in_channels = outputs, group_inputs * module.groups
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            module.in_channels, module.out_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
        case nn.Linear():
            module.out_features, module.in_features = module.weight.shape
        case nn.Embedding():
            module.embedding_dim = module.weight.shape[1]
        case nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d() | nn.InstanceNorm1d() | nn.InstanceNorm2d():
            per_channel = module.weight if module.weight is not None else module.running_mean
            if per_channel is not None:
                module.num_features = per_channel.shape[0]
        case nn.PReLU():
            module.num_parameters = module.weight.shape[0]
        case _:
            pass


def narrow(model: nn.Module, couplings: Sequence[Coupling], kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """A deep copy in which of each named coupling only the kept units are left; the others stay whole.

    kept: coupling name -> units to keep, in any order; the units keep the order they have. Tied parameters stay tied.
    Raises ValueError for a name without coupling, a unit that does not exist, or an empty list.
    """
    unknown = set(kept) - {coupling.name for coupling in couplings}
    if unknown:
        raise ValueError(f"no coupling is called {', '.join(sorted(unknown))}")
    twin = copy.deepcopy(model)
    holders = _holders(twin)
    touched: list[nn.Module] = []
    for key, (tensor, masks) in _keep_masks(twin, couplings, kept).items():
        cut = tensor.detach()
        for dim, mask in masks.items():
            cut = cut.index_select(dim, mask.nonzero().flatten().to(cut.device))
        fresh = nn.Parameter(cut, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut
        for module, name in holders[key]:
            setattr(module, name, fresh)
            touched.append(module)
    for module in dict.fromkeys(touched):
        refresh_widths(module)
    return twin


def mask(model: nn.Module, couplings: Sequence[Coupling], removed: Mapping[str, Sequence[int]]) -> nn.Module:
    """The masked twin: a deep copy of full width in which nobody reads the removed units, so that it computes what
    `narrow` must compute. removed: coupling name -> units.
    """
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for coupling in couplings:
            units = _units(coupling, removed.get(coupling.name, ()))
            for slot in coupling.slots:
                if units and not slot.produces:
                    tensor = _tensor(twin, slot.parameter)
                    positions = torch.tensor(_positions(slot, units), device=tensor.device)
                    tensor.index_fill_(slot.dim, positions, 0)
    return twin
