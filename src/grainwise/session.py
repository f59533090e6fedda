"""A model prepared for compression: traced, its statistics gathered, its search space and costs known."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from grainwise.evaluate.calibration import Calibration
from grainwise.evaluate.data import Batch, Data, Splits, take
from grainwise.evaluate.deployed import file_metric, first_sample, race, race_figures
from grainwise.evaluate.evaluator import Candidate, Evaluator, Scoring
from grainwise.evaluate.evaluator import other_tensors as packed_tensors
from grainwise.evaluate.fisher import fisher_sensitivity
from grainwise.evaluate.measures import DIVERGENCES, Metric, kl_divergence, resolve_metric
from grainwise.evaluate.sensitivity import measure_sensitivity
from grainwise.evaluate.sharing import EVERYTHING, Sharing
from grainwise.export import artefact
from grainwise.export.graph import ExportError, MarkedGraph, file_bytes, tensor_bytes
from grainwise.export.parity import Bounds, check_parity
from grainwise.export.prices import OnnxPrices, other_tensors
from grainwise.graph.couplings import link
from grainwise.graph.features import controller_features
from grainwise.graph.forward import Forward, default_forward
from grainwise.graph.proof import prove
from grainwise.graph.skeleton import build_skeleton, skeleton_forward
from grainwise.graph.statistics import feature_statistics
from grainwise.graph.trace import eval_mode, trace
from grainwise.methods.distill import PLAIN_STUDENTS, StudentOptions
from grainwise.plan.choices import Entry, Method
from grainwise.plan.cost import CostModel
from grainwise.plan.layers import LayerGraph
from grainwise.plan.prices import COSTS
from grainwise.plan.profile import CompressionProfile
from grainwise.plan.projection import Projection
from grainwise.plan.space import SearchSpace, SpaceKind
from grainwise.plan.target import Target, check_processor, resolve_target
from grainwise.realise.disk import VariantsOnDisk
from grainwise.realise.library import VariantLibrary
from grainwise.realise.reference import Reference, fingerprint
from grainwise.recover.batches import TrainingBatches
from grainwise.recover.checkpoint import Checkpoint
from grainwise.recover.losses import relative_error, softened_divergence
from grainwise.recover.options import STANDARD, RecoverOptions, TrainingBudget, training_budget
from grainwise.recover.recovery import Recovered, Trainee, Watch, recover
from grainwise.recover.shadows import shadows_of
from grainwise.recover.step import Distillation, Student, feature_places
from grainwise.report.card import model_card
from grainwise.study.measurement import Measurement
from grainwise.study.sensitivity import Sensitivity

AIM = 0.97  # of a latency budget: predictions are off by 2 to 3 % (docs/latency.md)
EXAMPLE_SAMPLES = 2  # a batch of one would hide the batch dimension from the trace


@dataclass(frozen=True)
class Session:
    """Everything that is computed once for a model and its data. example: a small batch of its inputs. line: from the
    kernels of a network to its milliseconds, where latency counts.
    """

    splits: Splits
    space: SearchSpace
    cost: CostModel
    evaluator: Evaluator
    model_fingerprint: str
    example: Any
    line: Calibration | None = None

    @staticmethod
    def prepare(
        model: nn.Module,
        data: Data | Splits,
        *,
        metric: str | Metric = "accuracy",
        divergence: str | None = None,
        forward: Forward = default_forward,
        space: SpaceKind | str = SpaceKind.CHAIN,
        methods: Iterable[Method | str] | None = None,
        target: str | Target = "ort-cpu",
        sharing: Sharing = EVERYTHING,
        students: StudentOptions = PLAIN_STUDENTS,
    ) -> Session:
        """divergence: `kl` for logits, `mse` for other outputs; by default `kl` with the metric `accuracy`, else `mse`.
        students: how those of blocks are trained.

        Raises TraceError, DataError, MetricError, ExportError (the network cannot be written as ONNX; the target
        `packed` needs no file), or ValueError for an unknown target.
        """
        where = resolve_target(target)
        splits = data if isinstance(data, Splits) else Splits.read(data)
        kind = divergence or ("kl" if metric == "accuracy" else "mse")
        scoring = Scoring(resolve_metric(metric), DIVERGENCES[kind], forward)
        example = take(splits.calibration, EXAMPLE_SAMPLES)[0].inputs
        graph = trace(model, example, forward)
        marked = None
        if where.runtime == "onnxruntime":
            graph, marked = mark(model, example, forward, graph)
        inputs = [batch.inputs for batch in splits.calibration]
        skeleton = None if marked is None else marked.skeleton
        reference = Reference.gather(model, graph, inputs, forward, where, skeleton)
        legal = SearchSpace.of(graph, space, methods)
        if marked is None:
            cost = CostModel(legal, packed_tensors(reference.model, [layer.name for layer in graph.layers]))
        else:
            cost = CostModel(legal, other_tensors(marked, model), OnnxPrices(marked, legal, where))
        disk = None if sharing.folder is None else VariantsOnDisk(sharing.folder, reference)
        library = VariantLibrary(reference, disk, students=students)
        evaluator = Evaluator(library, splits, cost, scoring, marked, sharing)
        return Session(splits, legal, cost, evaluator, fingerprint(model), example)

    @property
    def reference(self) -> Reference:
        return self.evaluator.library.reference

    def moved(self, model: nn.Module, search: tuple[Batch, ...]) -> Session:
        """The same network with other weights, for a quick look at them while they are trained: its structure, its
        legal entries and their costs stay, all that follows from weights is new. Candidates are ranked on `search`, and
        what they lose is made up for in removed channels alone (`VariantLibrary.quick`). model: is copied.
        """
        before, skeleton = self.reference, self.reference.skeleton
        if skeleton is not None:
            module, state = copy.deepcopy(skeleton.module), model.state_dict()
            module.load_state_dict({name: state.get(name, value) for name, value in module.state_dict().items()})
            skeleton = replace(skeleton, module=module)
        reference = Reference.gather(model, before.graph, before.calibration, before.forward, before.target, skeleton)
        splits = replace(self.splits, search=search)
        ranked = self.evaluator
        sharing = replace(ranked.sharing, folder=None, measurements=False)
        library = VariantLibrary(reference, quick=True)
        evaluator = Evaluator(library, splits, self.cost, ranked.scoring, ranked.marked, sharing)
        return replace(self, splits=splits, evaluator=evaluator, model_fingerprint=fingerprint(model))

    def features(self) -> Tensor:
        """`[L, F]` static inputs of the controller, feature-map statistics included."""
        return controller_features(self.space.graph, self.statistics())

    def statistics(self) -> Tensor:
        """`[L, 3]` mean, variance and entropy (nats) of each layer's output feature map."""
        reference = self.reference
        return feature_statistics(reference.model, reference.graph, reference.calibration, reference.forward)

    def sensitivity(self, progress: Callable[[int, int], None], table: Literal["kl", "fisher"] = "kl") -> Sensitivity:
        """Scores of every choice: measured one by one (`kl`), or estimated from gradients (`fisher`)."""
        evaluator = self.evaluator
        if table == "kl":
            return measure_sensitivity(evaluator, self.space, progress=progress)
        search = self.splits.search
        return fisher_sensitivity(evaluator.library, self.space, search, evaluator.scoring, progress=progress)

    def budgets(self, constraints: Mapping[str, float]) -> dict[str, float]:
        """Absolute budgets from shares of the reference's cost. Raises ValueError for what cannot be a constraint."""
        known = (*COSTS, "accuracy_drop")
        for name, share in constraints.items():
            if name not in known:
                raise ValueError(f"no constraint is called {name!r}; give some of {', '.join(known)}")
            if not 0 < share <= 1:
                raise ValueError(f"the constraint {name} is a share of the uncompressed network in (0, 1], got {share}")
        budgets = {
            name: constraints[name] * self.evaluator.reference.cost(name) for name in COSTS if name in constraints
        }
        if not budgets:
            raise ValueError(f"give a constraint for at least one of {', '.join(COSTS)}, for instance size=0.125")
        return budgets

    def projection(self, budgets: Mapping[str, float], aim: float = AIM) -> Projection:
        """What a search may propose within absolute budgets. Milliseconds are predicted, so it keeps to the share `aim`
        of them; whether a candidate holds its budget is measured when it is built.
        """
        return Projection(self.cost, {n: b * (aim if n == "latency" else 1.0) for n, b in budgets.items()})

    def profile(self, entries: Mapping[str, Entry]) -> CompressionProfile:
        return CompressionProfile(
            {
                layer.name: entries[layer.name]
                for layer in self.space.layers
                if entries.get(layer.name, Entry()) != Entry()
            },
            model=self.model_fingerprint,
            data=self.splits.fingerprint,
            target=self.reference.target.name,
            space=self.space.kind,
        )

    def finish(self, entries: Mapping[str, Entry], trials: int) -> Result:
        """Build the deployable network and measure it, on the test split too."""
        self.space.check(entries)
        return self.result(self.evaluator.finish(entries), entries, trials)

    def result(
        self, candidate: Candidate, entries: Mapping[str, Entry], trials: int, recovery: Recovered | None = None
    ) -> Result:
        """A deployed candidate with all its figures. Raises ParityError for a file that does not pass the gate."""
        evaluator = self.evaluator
        return Result(
            session=self,
            candidate=candidate,
            reference=evaluator.reference,
            test_metric=evaluator.test(candidate.model, evaluator.forward),
            reference_test_metric=evaluator.test(self.reference.model, evaluator.scoring.forward),
            trials=trials,
            entries=dict(entries),
            deployed=self._deployed(candidate, entries),
            recovery=recovery,
        )

    def recover(
        self,
        candidate: Candidate,
        entries: Mapping[str, Entry],
        train: Iterable[Any],
        *,
        budget: TrainingBudget,
        options: RecoverOptions = STANDARD,
        folder: Path | None = None,
        resume: bool = False,
        watch: Watch = lambda done, total, note: None,
    ) -> tuple[Candidate, Recovered]:
        """A copy of the candidate that `entries` gave, trained to compute what the uncompressed network does
        (`recover.recovery.recover`, which says what is raised).
        """
        evaluator, reference = self.evaluator, self.reference
        network, skeleton = copy.deepcopy(candidate.model), reference.skeleton
        layers = [layer.name for layer in self.space.layers if not layer.blocked and not layer.tied_to]
        trained = layers if skeleton is None else list(skeleton.units)
        tied = {layer.tied_to for layer in self.space.layers}
        shadows = shadows_of(network, set(trained) - tied, reference.target.largest_code)
        student = Student(network, evaluator.forward, shadows)
        logits = evaluator.scoring.divergence is kl_divergence
        loss = Distillation(
            student,
            reference.base,
            evaluator.forward,
            partial(softened_divergence, temperature=options.temperature) if logits else relative_error,
            feature_places(self.space.graph, skeleton, network),
            options.feature_weight,
        )
        found = recover(
            Trainee(student, evaluator.forward, skeleton, reference.calibration),
            loss,
            TrainingBatches.of(train, self.splits, options.seed),
            lambda model: evaluator.deployed(model, entries).measurement,
            budget=budget,
            options=options,
            folder=folder,
            resume=resume,
            watch=watch,
        )
        return evaluator.deployed(network, entries), found

    def _deployed(self, candidate: Candidate, entries: Mapping[str, Entry]) -> dict[str, float | int | str | None]:
        """Figures of the candidate's file in its runtime, after the parity gate; none without a file."""
        evaluator, file = self.evaluator, candidate.file
        if file is None or evaluator.marked is None or evaluator.reference_file is None:
            return {}
        check_processor(self.reference.target, entries.values())
        skeleton, batches = evaluator.marked.skeleton, [batch.inputs for batch in self.splits.search]
        bounds = Bounds() if evaluator.scoring.divergence is kl_divergence else Bounds(agreement=None)
        parity = check_parity(file, candidate.model, skeleton, batches, bounds)
        files = {"reference": evaluator.reference_file, "candidate": file}
        found = race({n: f.SerializeToString() for n, f in files.items()}, first_sample(batches[0], skeleton.inputs))
        return {
            "onnx_accuracy": file_metric(file, self.splits.test, skeleton.inputs, evaluator.scoring.metric),
            "onnx_size_bytes": file_bytes(file),
            "onnx_tensor_bytes": tensor_bytes(file),
            **parity.figures(),
            **race_figures(found, "candidate"),
        }


def mark(model: nn.Module, example: Any, forward: Forward, graph: LayerGraph) -> tuple[LayerGraph, MarkedGraph]:
    """The ONNX graph of the network, and its layers with what ONNX does not let through refused."""
    try:
        with eval_mode(model):
            skeleton = build_skeleton(model, example, forward, graph)
    except Exception as error:  # torch.export has no common error class
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExportError(f"torch.export cannot show this network as a graph ({first}); use target='packed'") from error
    layers = tuple(replace(layer, blocked=layer.blocked or skeleton.missing.get(layer.name)) for layer in graph.layers)
    couplings = prove(skeleton.module, example, skeleton_forward, graph.couplings)
    frozen = {coupling.name for coupling in couplings if coupling.frozen}
    blocks = tuple(block for block in graph.blocks if block.coupling not in frozen)
    graph = replace(graph, layers=link(layers, couplings), couplings=couplings, blocks=blocks)
    return graph, MarkedGraph.export(skeleton, graph, example)


def reference_file(model: nn.Module, example: Any, forward: Forward) -> tuple[bytes, tuple[str, ...]]:
    """The ONNX file of the uncompressed network and the names of its inputs. Raises TraceError or ExportError."""
    _, marked = mark(model, example, forward, trace(model, example, forward))
    return marked.write_reference().SerializeToString(), marked.skeleton.inputs


@dataclass(frozen=True)
class Result:
    """A compressed network and its figures.

    candidate: the network, really smaller and in eval mode, its file, and its measurement on the search split.
    reference: the uncompressed network's measurement. test_metric, reference_test_metric: on the test split, read once.
    deployed: figures of the file in its runtime; empty for the packed target. recovery: how it was fine-tuned, if so.
    """

    session: Session
    candidate: Candidate
    reference: Measurement
    test_metric: float
    reference_test_metric: float
    trials: int
    entries: Mapping[str, Entry]
    deployed: Mapping[str, float | int | str | None]
    recovery: Recovered | None = None

    @property
    def model(self) -> nn.Module:
        return self.candidate.model

    @property
    def measurement(self) -> Measurement:
        return self.candidate.measurement

    def figures(self) -> dict[str, float | int | str | None]:
        """The figures of the result by name: `accuracy` is the metric on the test split."""
        return {
            "accuracy": self.test_metric,
            "reference_accuracy": self.reference_test_metric,
            "search_accuracy": self.measurement.metric,
            "reference_search_accuracy": self.reference.metric,
            "divergence": self.measurement.divergence,
            "size_bytes": self.measurement.size_bytes,
            "reference_size_bytes": self.reference.size_bytes,
            "macs": self.measurement.macs,
            "reference_macs": self.reference.macs,
            "trials": self.trials,
            **self.deployed,
            **({} if self.recovery is None else self.recovery.figures()),
        }

    @property
    def profile(self) -> CompressionProfile:
        metrics = {name: float(value) for name, value in self.figures().items() if isinstance(value, int | float)}
        return self.session.profile(self.entries).with_metrics(metrics)

    def recover(
        self,
        train: Iterable[Any],
        *,
        epochs: int | None = None,
        minutes: float | None = None,
        options: RecoverOptions = STANDARD,
        folder: str | Path | None = None,
        resume: bool = False,
        watch: Watch = lambda done, total, note: None,
    ) -> Result:
        """Fine-tune the network, by distillation from the uncompressed one, on exactly the numerics that are deployed;
        bytes, kernels and the profile stay what they are. The state of lowest divergence on the search split is the
        result: after one of the epochs, or this one.

        train: batches as those of `Data`, disjoint from its splits, that can be read anew each epoch; labels are not
        read. epochs or minutes: how long, 3 epochs unless given. folder: where checkpoints are kept meanwhile; resume:
        go on from the one that is there.

        Raises RecoveryError, DataError, ParityError; Stopped on Ctrl-C or SIGTERM.
        """
        where = None if folder is None else Path(folder)
        candidate, found = self.session.recover(
            self.candidate,
            self.entries,
            train,
            budget=training_budget(epochs, minutes),
            options=options,
            folder=where,
            resume=resume,
            watch=watch,
        )
        result = self.session.result(candidate, self.entries, self.trials, found)
        if where is not None:
            Checkpoint.remove(where)
        return result

    def export(self, directory: str | Path) -> Path:
        """Write the artefact: ONNX file, packed weights, profile, model card, manifest. Raises ArtefactError."""
        session, marked, file = self.session, self.session.evaluator.marked, self.candidate.file
        deployment = None
        if marked is not None and file is not None:
            target = session.reference.target.name
            deployment = artefact.Deployment(marked.skeleton, file, target, session.example)
        return artefact.save(
            directory,
            self.model,
            reference=session.reference.model,
            graph=session.space.graph,
            profile=self.profile,
            figures=self.figures(),
            card=model_card(session.space, self.entries, self.figures(), session.reference.target),
            deployment=deployment,
        )
