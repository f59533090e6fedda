"""Adaptive compression: the profile of a network is decided anew after each epoch of the user's own training loop."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from grainwise.decision import Decider
from grainwise.evaluate.data import Data, Splits
from grainwise.evaluate.measures import Metric
from grainwise.graph.forward import Forward, default_forward
from grainwise.plan.choices import UNCOMPRESSED, Entry
from grainwise.plan.layers import Layer
from grainwise.plan.prices import COSTS
from grainwise.plan.profile import CompressionProfile, entries_from_json, entries_to_json
from grainwise.plan.target import check_processor, resolve_target
from grainwise.realise.reference import fingerprint
from grainwise.recover.batches import seeded
from grainwise.recover.checkpoint import Checkpoint, part
from grainwise.recover.errors import RecoveryError
from grainwise.recover.forms import METHODS, Dress, Form
from grainwise.recover.nests import flatten, generators, set_generators, unflatten
from grainwise.recover.pressure import STANDARD, AdaptiveOptions, shares
from grainwise.report.timeline import timeline
from grainwise.session import Result, Session

PROFILE, PICTURE = "profile.json", "epochs.svg"


class Stateful(Protocol):
    """An optimiser, a schedule, or anything else that must go on where it stood."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass(frozen=True, slots=True)
class Epoch:
    """What an epoch ended with. entries: in force from now on, of the layers that they change. source: what proposed
    them (`held`: the profile before, tightened where it exceeded the budgets), None where nothing was decided. asked,
    given: shares of the uncompressed network's costs that were allowed, and that the profile has. divergence, metric:
    on some of the search split, when it was decided. seconds: of the decision.
    """

    entries: Mapping[str, Entry]
    source: str | None = None
    asked: Mapping[str, float] = field(default_factory=dict)
    given: Mapping[str, float] = field(default_factory=dict)
    divergence: float = 0.0
    metric: float | None = None
    trials: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "entries": entries_to_json(self.entries)}

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Epoch:
        return Epoch(**{**body, "entries": entries_from_json(body["entries"])})


class AdaptiveCompression:
    """Compresses a network while it is trained by a loop of the user's own.

    The layers of `model` compute with compressed weights; its parameters stay dense, and are what the user's optimiser
    trains. After an epoch `end_epoch` reads the feature maps, asks the controller for profiles within the present
    budgets, measures them, and puts the best one on. Budgets fall from the whole network to the constraints; for the
    last third of the epochs (`options.settle`) the profile stays. `result` then really removes, packs and measures.

        adaptive = gw.AdaptiveCompression(model, data=data, constraints={"size": 1 / 16}, epochs=12, folder="out/run")
        for epoch in range(adaptive.epoch, 12):
            for x, y in loader:
                criterion(model(x), y).backward(); optimiser.step(); optimiser.zero_grad()
            adaptive.end_epoch()
        adaptive.result().export("out/artefact")
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        data: Data,
        constraints: Mapping[str, float],
        epochs: int,
        metric: str | Metric = "accuracy",
        forward: Forward = default_forward,
        target: str = "ort-cpu",
        profile: CompressionProfile | None = None,
        folder: str | Path | None = None,
        stateful: Mapping[str, Stateful] = MappingProxyType({}),
        resume: bool = False,
        options: AdaptiveOptions = STANDARD,
    ) -> None:
        """constraints: `size` and `macs`, as for `compress`; with none the network trains as it would by itself.
        epochs: of the whole training. profile: one that is kept from the start, in place of deciding; masks and scales
        follow the weights. folder: where profile, plot and a checkpoint are kept after each epoch. stateful: what a
        checkpoint holds beside the network, by name: optimiser and schedule. resume: go on from the checkpoint that is
        in the folder.

        Raises what `Session.prepare` raises, ValueError for a constraint or number of epochs out of its range,
        RecoveryError when there is nothing to resume, or when there is and it was not asked for.
        """
        if epochs < 1:
            raise ValueError(f"give at least 1 epoch, got {epochs}")
        if refused := sorted(set(constraints) - {"size", "macs"}):
            raise ValueError(f"{refused[0]!r} cannot be a constraint while a network trains; give size, macs or both")
        check_processor(target)
        self.epochs, self.epoch = epochs, 0
        self.history: list[Epoch] = []
        self._model, self._splits, self._target = model, Splits.read(data), resolve_target(target).name
        self._prepare = partial(
            Session.prepare, model, self._splits, metric=metric, forward=forward, methods=METHODS, target=target
        )
        self._constraints, self._options, self._stateful = dict(constraints), options, dict(stateful)
        self._folder = None if folder is None else Path(folder)
        self._dress, self._shapes, self._seen = Dress(model), _shapes(model), Counter[str]()
        self._fixed = None if profile is None else dict(profile.entries)
        self._session, self._decider = None, None
        with seeded(options.seed):
            if constraints or self._fixed:
                self._session = self._checked_session()
                self._decider = Decider(self._session, options)
            found = self._folder is not None and Checkpoint.exists(self._folder)
            if resume:
                self._restore()
            elif found:
                raise RecoveryError(f"{folder} has a checkpoint of a training that was cut: resume it, or delete it")
            elif self._decider is not None and self._fixed is not None:
                self._decider.keep(self._dress, self._fixed)
        if resume:
            set_generators(self._generators)
        self._handle = model.register_forward_pre_hook(_counter(model, self._seen))

    def _checked_session(self) -> Session:
        session = self._prepare()
        if self._constraints:
            session.projection(session.budgets(self._constraints))  # refused at once where nothing can meet them
        session.space.check(self._fixed or {})
        return session

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The profile in force, by layer."""
        return self.history[-1].entries if self.history else self._fixed or {}

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What is decided about, in the order in which it runs; empty where nothing is."""
        return () if self._session is None else self._session.space.layers

    @property
    def profile(self) -> CompressionProfile:
        """The profile in force, for the weights as they are."""
        return CompressionProfile(self.entries, fingerprint(self._model), self._splits.fingerprint, self._target)

    def expects(self, epochs: float | None) -> None:
        """Raises ValueError where a trainer is to go for another number of epochs than is left here."""
        if epochs != self.epochs - self.epoch:
            raise ValueError(f"the trainer is set to {epochs} epochs, the compression to {self.epochs - self.epoch}")

    def end_epoch(self) -> Epoch:
        """To be called after each epoch of training: decides, and keeps a checkpoint in the folder.

        Raises RecoveryError when the weights are not finite, no batch was seen, or the network has other layers than at
        the start; the folder then holds the epoch before.
        """
        self._check()
        decided = self._decide(self.epoch + 1)
        self.history.append(decided)
        self.epoch += 1
        self._seen.clear()
        if self._folder is not None:
            self._keep(self._folder)
        return decided

    def result(self) -> Result:
        """The network really compressed, as its last profile says, and measured, on the test split too. The weights of
        the user's model become what its layers computed with: it is the uncompressed network of the result, and the one
        to give to `gw.load`.

        Raises RecoveryError before the last epoch; ParityError for a file that does not pass the gate.
        """
        if self.epoch < self.epochs:
            raise RecoveryError(f"the result is there after {self.epochs} epochs; {self.epoch} are done")
        entries, trials = self.entries, sum(epoch.trials for epoch in self.history)
        self._dress.settle()
        self._handle.remove()
        with seeded(self._options.seed):
            return self._prepare().finish(entries, trials)

    def plot(self) -> str:
        """What was decided for each layer after each epoch, as an SVG document."""
        return timeline([layer.name for layer in self.layers], [epoch.entries for epoch in self.history])

    # -- deciding

    def _decide(self, number: int) -> Epoch:
        session, decider = self._session, self._decider
        if session is None or decider is None:
            return Epoch({})
        ends = self._options.ends(self.epochs)
        if number not in ends:
            return Epoch(self.entries, given=_given(session, self.entries))
        start = time.monotonic()
        with seeded(self._options.seed):
            if self._fixed is not None:
                decider.keep(self._dress, self._fixed)
                return Epoch(self._fixed, given=_given(session, self._fixed), seconds=time.monotonic() - start)
            asked = shares(self._constraints, ends.index(number) + 1, len(ends))
            found = decider.choose(self._dress, self.entries, session.budgets(asked))
        return Epoch(
            {name: entry for name, entry in found.entries.items() if entry != UNCOMPRESSED},
            source=found.source,
            asked=asked,
            given=_given(session, found.entries),
            divergence=found.measurement.divergence,
            metric=found.measurement.metric,
            trials=found.trials,
            seconds=time.monotonic() - start,
        )

    def _check(self) -> None:
        where = "" if self._folder is None else f"; {self._folder} holds epoch {self.epoch}"
        if self.epoch == self.epochs:
            raise RecoveryError(f"all {self.epochs} epochs are done; ask for the result")
        if changed := sorted(set(self._shapes.items()) ^ set(_shapes(self._model).items())):
            raise RecoveryError(
                f"the network has changed since training began, first at {changed[0][0]!r}: its layers must stay those "
                f"that it was given with{where}"
            )
        for name, value in self._model.state_dict().items():
            if not bool(torch.isfinite(value).all()):
                raise RecoveryError(
                    f"{name!r} holds NaN or infinity after epoch {self.epoch + 1}: the loss diverged; lower the "
                    f"learning rate or look for NaN in the training data{where}"
                )
        if not self._seen["batches"]:
            raise RecoveryError(
                f"no batch went through the network in epoch {self.epoch + 1}: the training data ran dry; give a "
                f"loader that can be read anew for each epoch{where}"
            )

    # -- checkpoints

    def _keep(self, folder: Path) -> None:
        tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in self._model.state_dict().items()}
        facts: dict[str, Any] = {"settings": self._settings(), "history": [epoch.to_json() for epoch in self.history]}
        facts["stateful"] = {
            name: flatten(thing.state_dict(), f"stateful.{name}", tensors) for name, thing in self._stateful.items()
        }
        facts["generators"] = flatten(generators(), "stateful.generators", tensors)
        facts["forms"] = {}
        for name, form in self._dress.forms.items():
            parts, facts["forms"][name] = form.state()
            tensors |= {f"form.{name}.{part}": value for part, value in parts.items()}
        if self._decider is not None:
            policy, facts["decider"] = self._decider.state()
            tensors |= {f"decider.{name}": value for name, value in policy.items()}
        Checkpoint(tensors, facts).save(folder)
        self.profile.save(folder / PROFILE)
        (folder / PICTURE).write_text(self.plot(), encoding="utf-8")

    def _settings(self) -> dict[str, Any]:
        return {
            "epochs": self.epochs,
            "constraints": self._constraints,
            "options": asdict(self._options),
            "data": self._splits.fingerprint,
            "target": self._target,
            "profile": None if self._fixed is None else entries_to_json(self._fixed),
            "stateful": sorted(self._stateful),
        }

    def _restore(self) -> None:
        if self._folder is None:
            raise RecoveryError("there is no folder to resume from; give the one that the checkpoint is in")
        kept = Checkpoint.load(self._folder)
        for name, value in self._settings().items():
            if kept.facts["settings"].get(name) != value:
                raise RecoveryError(
                    f"the checkpoint in {self._folder} is of another {name}: {kept.facts['settings'].get(name)}, not "
                    f"{value}; delete it to begin anew"
                )
        self._model.load_state_dict(part(kept.tensors, "model."))
        for name, thing in self._stateful.items():
            thing.load_state_dict(unflatten(kept.facts["stateful"][name], kept.tensors))
        self._generators = unflatten(kept.facts["generators"], kept.tensors)
        forms = kept.facts["forms"].items()
        self._dress.wear({name: Form.of(part(kept.tensors, f"form.{name}."), body) for name, body in forms})
        if self._decider is not None:
            self._decider.restore(part(kept.tensors, "decider."), kept.facts["decider"])
        self.history = [Epoch.from_json(body) for body in kept.facts["history"]]
        self.epoch = len(self.history)


def _given(session: Session, entries: Mapping[str, Entry]) -> dict[str, float]:
    """Shares of the uncompressed network's costs."""
    full, found = session.cost.total({}), session.cost.total(entries)
    return {name: float(found[k] / full[k]) for k, name in enumerate(COSTS) if full[k]}


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _counter(model: nn.Module, seen: Counter[str]) -> Any:
    """A hook that counts the batches a network is trained on; its copies are not counted."""

    def hook(module: nn.Module, inputs: Any) -> None:
        if module is model and module.training:
            seen["batches"] += 1

    return hook
