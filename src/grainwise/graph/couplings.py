"""From classes of atoms to couplings: which channels of which layers can only be removed together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from grainwise.graph.atoms import Origin
from grainwise.graph.walk import Walked
from grainwise.plan.layers import Coupling, Kind, Layer, Slot

Place = tuple[int, int]
"""(number of the tensor, dimension)."""

_Unit = dict[Place, list[int]]


@dataclass(frozen=True, slots=True)
class _Role:
    layer: str | None
    produces: bool


def output_dim(layer: Layer) -> int:
    """Dimension of the weight that holds the output channels."""
    return 1 if layer.geometry.kind is Kind.EMBEDDING else 0


def input_dim(layer: Layer) -> int | None:
    """Dimension of the weight that holds the input channels; a depthwise layer's are its outputs."""
    if layer.geometry.kind is Kind.EMBEDDING:
        return None
    return 0 if layer.geometry.depthwise else 1


def _roles(name: str, dim: int, layers: dict[str, Layer], *, read: bool) -> list[_Role]:
    """What a parameter's dimension is to the units; a tied weight that is also read elsewhere is both."""
    owner, _, attribute = name.rpartition(".")
    layer = layers.get(owner)
    if layer is None:
        return [_Role(None, not read)]
    if attribute != "weight":
        return [_Role(owner, True)]
    if dim != output_dim(layer):
        return [_Role(owner, False)]
    return [_Role(owner, True)]


def _units(walked: Walked, classes: Sequence[list[int]]) -> list[_Unit]:
    units: list[_Unit] = []
    for atoms in classes:
        unit: _Unit = {}
        origins = [walked.atoms.origin(atom) for atom in atoms]
        for origin in origins:
            if isinstance(origin, Origin):
                unit.setdefault((origin.tensor, origin.dim), []).append(origin.index)
        units.append(unit)
    return units


def _slots(walked: Walked, units: list[_Unit], layers: dict[str, Layer], read: set[Place]) -> tuple[Slot, ...]:
    slots: list[Slot] = []
    for tensor, dim in sorted(units[0]):
        indices = tuple(tuple(sorted(unit[tensor, dim])) for unit in units)
        roles = [
            (name, role)
            for name in walked.names[tensor]
            for role in _roles(name, dim, layers, read=(tensor, dim) in read)
        ]
        if (tensor, dim) in read and all(role.produces for _, role in roles):
            roles.append((walked.names[tensor][0], _Role(None, False)))  # a weight that is read without its module
        slots.extend(Slot(name, dim, indices, role.produces, role.layer) for name, role in roles)
    return tuple(slots)


def _leader(slots: Iterable[Slot], layers: dict[str, Layer]) -> tuple[str, str | None] | None:
    """The first layer that produces the units and can be decided on, and why none can; None without any producer."""
    names = {s.layer for s in slots if s.produces and s.layer and s.dim == output_dim(layers[s.layer])}
    producers = [layer for layer in layers.values() if layer.name in names]
    if not producers:
        return None
    free = [layer for layer in producers if layer.blocked is None and layer.tied_to is None]
    if free:
        return free[0].name, None
    first = producers[0]
    return first.name, f"{first.name}: {first.blocked or 'its weight belongs to ' + str(first.tied_to)}"


def _produced(slot: Slot, layer: Layer) -> bool:
    return slot.produces and slot.parameter == f"{layer.name}.weight" and slot.dim == output_dim(layer)


def _refuse(coupling: Coupling, layers: dict[str, Layer]) -> Coupling:
    """Freeze what a coupling cannot express: part of a layer's outputs, a single unit, units that nobody reads."""
    if coupling.frozen is not None:
        return coupling
    for slot in coupling.slots:
        layer = layers.get(slot.layer or "")
        if layer is None or not _produced(slot, layer):
            continue
        covered = sum(map(len, slot.indices))
        if covered != layer.geometry.outputs:
            reason = f"only {covered} of the {layer.geometry.outputs} outputs of {layer.name} go this way"
            return replace(coupling, frozen=reason)
    if all(slot.produces for slot in coupling.slots):
        return replace(coupling, frozen="nothing reads these channels")
    if coupling.width < 2:
        return replace(coupling, frozen="one unit only")
    return coupling


def _grouped(walked: Walked) -> dict[tuple[frozenset[Place], str | None], list[list[int]]]:
    """Classes with the same members and the same fate, in order of their first atom."""
    groups: dict[tuple[frozenset[Place], bool], list[list[int]]] = {}
    for atoms in walked.atoms.classes():
        origins = [o for atom in atoms if (o := walked.atoms.origin(atom)) is not None]
        places = frozenset((o.tensor, o.dim) for o in origins)
        if places:
            groups.setdefault((places, walked.atoms.reason(atoms) is None), []).append(atoms)
    return {
        (places, None if free else walked.atoms.reason(classes[0])): classes
        for (places, free), classes in groups.items()
    }


def find_couplings(walked: Walked, layers: Sequence[Layer]) -> tuple[Coupling, ...]:
    """Every set of channels that some layer produces, frozen ones too, in the order of their leaders."""
    by_name = {layer.name: layer for layer in layers}
    order = {name: position for position, name in enumerate(by_name)}
    found: list[Coupling] = []
    for (places, frozen), classes in _grouped(walked).items():
        read = {p for p in places if any(walked.atoms.is_read(a) for a in _atoms_at(walked, classes[0], p))}
        slots = _slots(walked, _units(walked, classes), by_name, read)
        leader = _leader(slots, by_name)
        if leader is not None:
            name, refused = leader
            found.append(_refuse(Coupling(name, len(classes), slots, frozen or refused), by_name))
    found.sort(key=lambda coupling: (order[coupling.name], coupling.frozen is not None))
    return _distinct(found)


def _atoms_at(walked: Walked, atoms: list[int], place: Place) -> list[int]:
    origins = ((atom, walked.atoms.origin(atom)) for atom in atoms)
    return [atom for atom, o in origins if o is not None and (o.tensor, o.dim) == place]


def _distinct(couplings: list[Coupling]) -> tuple[Coupling, ...]:
    """Frozen parts of one layer's outputs share a leader: the second is called `name[2]`."""
    seen: dict[str, int] = {}
    result: list[Coupling] = []
    for coupling in couplings:
        seen[coupling.name] = seen.get(coupling.name, 0) + 1
        number = seen[coupling.name]
        result.append(coupling if number == 1 else replace(coupling, name=f"{coupling.name}[{number}]"))
    return tuple(result)


def link(layers: Sequence[Layer], couplings: Sequence[Coupling]) -> tuple[Layer, ...]:
    """The layers with the names of the couplings that may be narrowed at their outputs and inputs."""
    linked: list[Layer] = []
    for layer in layers:
        weight = f"{layer.name}.weight"
        outputs, inputs = [], []
        for coupling in couplings:
            if coupling.frozen is not None:
                continue
            dims = {slot.dim for slot in coupling.slots if slot.parameter == weight and slot.layer == layer.name}
            if output_dim(layer) in dims:
                outputs.append(coupling.name)
            if input_dim(layer) in dims:
                inputs.append(coupling.name)
        linked.append(replace(layer, output_coupling=outputs[0] if outputs else None, input_couplings=tuple(inputs)))
    return tuple(linked)
