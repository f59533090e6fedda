"""The variant library: every compressed layer is solved once and shared by all candidates that ask for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import astuple, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from grainwise.graph.narrow import narrow
from grainwise.methods.activations import EightBit
from grainwise.methods.distill import PLAIN_STUDENTS, StudentOptions, train_block
from grainwise.methods.modules import construct, describe
from grainwise.methods.problem import LayerProblem
from grainwise.methods.structure import Structure, realise, restructure
from grainwise.plan.choices import Choice, Entry, Granularity, Method
from grainwise.plan.layers import Block, Layer
from grainwise.realise.assemble import Narrower
from grainwise.realise.channels import Kept, kept_positions, rank_units
from grainwise.realise.disk import VariantsOnDisk
from grainwise.realise.memory import Recent
from grainwise.realise.reference import Reference, recording

SAMPLES = 64  # reference inputs that a ghost's filters are fitted on

_Made = TypeVar("_Made")

Cut = tuple[tuple[int, ...] | None, tuple[int, ...] | None]
"""(input channels, output channels) of a layer that are left, None where nothing was cut."""


class VariantLibrary:
    """Realised layers of one reference, by layer, entry and the channels its couplings left.

    The modules are shared between candidates: they are in eval mode, without gradients, and must not be written to.
    disk: where layers are kept for later searches too. limit_bytes: of memory for layers and their structures, by
    default a share of what is free; those that were not asked for longest are forgotten, and solved again when needed.
    students: how those of blocks are trained.
    quick: what is lost is made up for where channels are removed and nowhere else, which takes a part of the time: for
    networks that are trained on.
    """

    def __init__(
        self,
        reference: Reference,
        disk: VariantsOnDisk | None = None,
        limit_bytes: int | None = None,
        *,
        students: StudentOptions = PLAIN_STUDENTS,
        quick: bool = False,
    ) -> None:
        self.reference = reference
        self.disk = disk
        self.students = students
        self.quick = quick
        graph = reference.graph
        self._couplings = {c.name: c for c in graph.couplings if c.frozen is None}
        self._related: dict[str, tuple[str, ...]] = {  # couplings that narrow a layer's weight
            la.name: tuple(
                c.name for c in self._couplings.values() if any(s.parameter == f"{la.name}.weight" for s in c.slots)
            )
            for la in graph.layers
        }
        own = {layer.name for layer in graph.layers if not layer.blocked and not layer.tied_to}
        self._narrower = Narrower(graph.couplings, skip=own)
        self._made: dict[Hashable, object] = {}
        self._recorded: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.solved = Recent(_tensors_of, limit_bytes)

    def once(self, key: Hashable, make: Callable[[], _Made]) -> _Made:
        """The value under `key`, made at the first call."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[return-value]  # each key is made by one function

    def kept_units(self, coupling: str, count: int) -> tuple[int, ...]:
        """The `count` units of a coupling that its readers need most, ascending."""
        return self.once(("units", coupling, count), lambda: tuple(sorted(self._ranked(coupling)[:count].tolist())))

    def _ranked(self, coupling: str) -> Tensor:
        def rank() -> Tensor:
            if self.disk is not None and (found := self.disk.load({"ranked": coupling})) is not None:
                return found[1]["order"]
            order = rank_units(self.reference, self._couplings[coupling])
            if self.disk is not None:
                self.disk.save({"ranked": coupling}, None, {"order": order})
            return order

        return self.once(("ranked", coupling), rank)

    def positions(self, layer: Layer, kept: Kept) -> tuple[Tensor | None, Tensor | None]:
        """(input channels, output channels) of `layer` that are left, None where nothing was cut."""
        return self._cut(layer, kept)[0]

    def _cut(self, layer: Layer, kept: Kept) -> tuple[tuple[Tensor | None, Tensor | None], Cut]:
        """`positions`, as tensors and as what a key is made of."""
        relevant = {name: kept[name] for name in self._related[layer.name] if name in kept}

        def find() -> tuple[tuple[Tensor | None, Tensor | None], Cut]:
            inputs, outputs = kept_positions(self._couplings, layer, relevant)
            cut = tuple(None if p is None else tuple(p.tolist()) for p in (inputs, outputs))
            return (inputs, outputs), (cut[0], cut[1])

        return self.once(("cut", layer.name, *relevant.items()), find)

    def narrow(self, tree: nn.Module, kept: Kept) -> None:
        """Cut what stands beside the layers of a `fresh_tree`, in place: norms and the like."""
        self._narrower.narrow(tree, kept, self.once)

    def point(self, name: str) -> EightBit:
        """The one module of all candidates that keep the point `name` in 8 bits."""
        return self.once(("point", name), lambda: EightBit().eval())

    def layer(self, layer: Layer, entry: Entry, kept: Kept, student: tuple[Block, int] | None = None) -> nn.Module:
        """The realised module of `layer` under `entry`, with only the kept channels.

        student: (block, units of its coupling) when the layer belongs to a trained student of these inner units.
        """
        cut = self._cut(layer, kept)[1]
        place = (layer.name, cut, student and (student[0].name, student[1], *astuple(self.students)))

        def solve() -> Structure:
            problem = self._student_problem(layer, kept, *student) if student else self.problem(layer, kept)
            return restructure(problem, entry.structure, self._sample(layer, kept, entry.structure))

        def make() -> nn.Module:
            with torch.no_grad():
                structure = self.solved.once(("structure", *place, entry.structure), solve)
                return realise(structure, entry.precision, self.reference.target).eval().requires_grad_(False)

        def find() -> nn.Module:
            key = {"layer": layer.name, "cut": cut, "student": place[2], "entry": str(entry)}
            return self._kept(key, make, describe, construct)

        return self.solved.once(("layer", *place, entry), find)

    def _kept(
        self,
        key: dict[str, Any],
        make: Callable[[], nn.Module],
        describe: Callable[[nn.Module], Any],
        construct: Callable[[Any], nn.Module],
    ) -> nn.Module:
        """A module from the disk, or made and kept there."""
        if self.disk is None:
            return make()
        if (found := self.disk.load(key)) is not None:
            module = construct(found[0])
            module.load_state_dict(found[1])
        else:
            module = make()
            self.disk.save(key, describe(module), module.state_dict())
        return module.eval().requires_grad_(False)

    def problem(self, layer: Layer, kept: Kept) -> LayerProblem:
        """The problem of `layer` with only the kept channels, re-fitted to them."""
        narrowed = self.reference.problem(layer.name).narrowed(*self.positions(layer, kept))
        return narrowed.uncompensated() if self.quick else narrowed

    def _student_problem(self, layer: Layer, kept: Kept, block: Block, units: int) -> LayerProblem:
        """The problem of a student's layer: its trained weights at the student's inner width, then narrowed further by
        what was cut around the block.
        """
        inner = {block.coupling: self.kept_units(block.coupling, units)}
        trained = self.student(block, units).get_submodule(layer.name.removeprefix(block.name + "."))
        weight, bias = trained.weight, trained.bias
        assert isinstance(weight, Tensor)
        problem = replace(self.problem(layer, inner), weight=weight, bias=bias if isinstance(bias, Tensor) else None)
        pairs = zip(self.positions(layer, inner), self.positions(layer, kept), strict=True)
        return problem.narrowed(*(_within(before, after) for before, after in pairs))

    def _sample(self, layer: Layer, kept: Kept, choice: Choice) -> Tensor | None:
        """Reference inputs of `layer`, its kept channels only, for the one structure that is fitted on them."""
        if (choice.method, choice.granularity) != (Method.DISTILL, Granularity.CHANNEL):
            return None

        def record() -> Tensor:
            pairs: list[tuple[Tensor, Tensor]] = []
            with torch.no_grad(), recording(self.reference.model.get_submodule(layer.name), pairs):
                self.reference.forward(self.reference.model, self.reference.calibration[0])
            return torch.cat([inputs for inputs, _ in pairs])[:SAMPLES].clone()

        sample = self.once(("sample", layer.name), record)
        inputs, _ = self.positions(layer, kept)
        return sample if inputs is None else sample.index_select(1 if layer.geometry.kernel else -1, inputs)

    def student(self, block: Block, units: int, trained: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The twin of `block` with `units` units of its inner coupling, trained on the block's inputs and outputs.

        trained: its state, where another process that has this library has trained it.
        """

        def shape(_: object) -> nn.Module:
            return self._narrowed(block, units).get_submodule(block.name)

        def make() -> nn.Module:
            if trained is None:
                return self._train(block, units)
            twin = shape(None)
            twin.load_state_dict(trained)
            return twin.eval().requires_grad_(False)

        def find() -> nn.Module:
            key = {"block": block.name, "units": units, "training": astuple(self.students)}
            return self._kept(key, make, lambda _: None, shape)

        return self.once(("student", block.name, units), find)

    def _narrowed(self, block: Block, units: int) -> nn.Module:
        """The network with the inner coupling of `block` cut to `units`, nothing re-fitted."""
        kept = {block.coupling: self.kept_units(block.coupling, units)}
        return narrow(self.reference.model, self.reference.graph.couplings, kept)

    def _train(self, block: Block, units: int) -> nn.Module:
        reference = self.reference
        kept = {block.coupling: self.kept_units(block.coupling, units)}
        student = self._narrowed(block, units)
        for layer in reference.graph.layers:  # the closed-form re-fit is where training starts
            if layer.name in block.layers and any(p is not None for p in self.positions(layer, kept)):
                student.set_submodule(layer.name, copy.deepcopy(self.layer(layer, Entry(), kept)))
        twin = student.get_submodule(block.name).requires_grad_(True)
        train_block(twin, self._activations(block), self.students, seed=0)
        return twin.eval().requires_grad_(False)

    def _activations(self, block: Block) -> list[tuple[Tensor, Tensor]]:
        """(inputs, outputs) of a block of the reference; the last one's are kept, for students of other widths."""
        if block.name not in self._recorded:
            reference, pairs = self.reference, list[tuple[Tensor, Tensor]]()
            with torch.no_grad(), recording(reference.model.get_submodule(block.name), pairs):
                for batch in reference.calibration[: self.students.batches]:
                    reference.forward(reference.model, batch)
            self._recorded = {block.name: pairs}
        return self._recorded[block.name]

    def __getstate__(self) -> dict[str, Any]:
        """For other processes: activations stay here."""
        return {**self.__dict__, "_recorded": {}}


def _tensors_of(made: nn.Module | Structure) -> Iterator[Tensor]:
    if isinstance(made, nn.Module):
        yield from made.parameters()
        yield from made.buffers()
        return
    for problem in (*(stage.problem for stage in made.stages), *(() if made.whole is None else (made.whole,))):
        yield from (problem.weight, problem.hessian)


def _within(before: Tensor | None, after: Tensor | None) -> Tensor | None:
    """Where the channels `after` stand among those that `before` kept; None when both are the same."""
    if after is None or before is None:
        return after
    return None if len(before) == len(after) else torch.searchsorted(before, after)
