"""A model prepared for compression: traced, its statistics gathered, its search space and costs known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from grainwise.evaluate.data import Data, Splits, take
from grainwise.evaluate.evaluator import Evaluator, Scoring, other_tensors
from grainwise.evaluate.measures import DIVERGENCES, Metric, resolve_metric
from grainwise.evaluate.sensitivity import measure_sensitivity
from grainwise.export import artefact
from grainwise.graph.features import controller_features
from grainwise.graph.forward import Forward, default_forward
from grainwise.graph.statistics import feature_statistics
from grainwise.graph.trace import trace
from grainwise.plan.choices import Entry, Method
from grainwise.plan.cost import COSTS, CostModel
from grainwise.plan.profile import CompressionProfile
from grainwise.plan.space import SearchSpace, SpaceKind
from grainwise.realise.library import VariantLibrary
from grainwise.realise.reference import Reference, fingerprint
from grainwise.report.card import model_card
from grainwise.study.measurement import Measurement
from grainwise.study.sensitivity import Sensitivity

EXAMPLE_SAMPLES = 2  # a batch of one would hide the batch dimension from the trace


@dataclass(frozen=True)
class Session:
    """Everything that is computed once for a model and its data."""

    splits: Splits
    space: SearchSpace
    cost: CostModel
    evaluator: Evaluator
    model_fingerprint: str

    @staticmethod
    def prepare(
        model: nn.Module,
        data: Data,
        *,
        metric: str | Metric = "accuracy",
        divergence: str | None = None,
        forward: Forward = default_forward,
        space: SpaceKind | str = SpaceKind.CHAIN,
        methods: Iterable[Method | str] | None = None,
    ) -> Session:
        """divergence: `kl` for logits, `mse` for other outputs; by default `kl` with the metric `accuracy`, else `mse`.

        Raises TraceError, DataError or MetricError when model, data or metric cannot be used.
        """
        splits = Splits.read(data)
        kind = divergence or ("kl" if metric == "accuracy" else "mse")
        scoring = Scoring(resolve_metric(metric), DIVERGENCES[kind], forward)
        example = take(splits.calibration, EXAMPLE_SAMPLES)[0].inputs
        graph = trace(model, example, forward)
        inputs = [batch.inputs for batch in splits.calibration]
        reference = Reference.gather(model, graph, inputs, forward)
        legal = SearchSpace.of(graph, space, methods)
        cost = CostModel(legal, other_tensors(reference.model, [layer.name for layer in graph.layers]))
        evaluator = Evaluator(VariantLibrary(reference), splits, cost, scoring)
        return Session(splits, legal, cost, evaluator, fingerprint(model))

    @property
    def reference(self) -> Reference:
        return self.evaluator.library.reference

    def features(self) -> Tensor:
        """`[L, F]` static inputs of the controller, feature-map statistics included."""
        return controller_features(self.space.graph, self.statistics())

    def statistics(self) -> Tensor:
        """`[L, 3]` mean, variance and entropy (nats) of each layer's output feature map."""
        reference = self.reference
        return feature_statistics(reference.model, reference.graph, reference.calibration, reference.forward)

    def sensitivity(self, progress: Callable[[int, int], None]) -> Sensitivity:
        scoring = self.evaluator.scoring
        return measure_sensitivity(
            self.evaluator.library, self.space, self.splits.calibration, scoring, progress=progress
        )

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

    def profile(self, entries: Mapping[str, Entry]) -> CompressionProfile:
        return CompressionProfile(
            {
                layer.name: entries[layer.name]
                for layer in self.space.layers
                if entries.get(layer.name, Entry()) != Entry()
            },
            model=self.model_fingerprint,
            data=self.splits.fingerprint,
            space=self.space.kind,
        )

    def finish(self, entries: Mapping[str, Entry], trials: int) -> Result:
        """Build the deployable network and measure it, on the test split too."""
        self.space.check(entries)
        model, measurement = self.evaluator.finish(entries)
        return Result(
            session=self,
            model=model,
            measurement=measurement,
            reference=self.evaluator.reference,
            test_metric=self.evaluator.test(model),
            reference_test_metric=self.evaluator.test(self.reference.model),
            trials=trials,
            entries=dict(entries),
        )


@dataclass(frozen=True)
class Result:
    """A compressed network and its figures.

    model: really smaller, in eval mode. measurement, reference: on the search split. test_metric,
    reference_test_metric: on the test split, read once.
    """

    session: Session
    model: nn.Module
    measurement: Measurement
    reference: Measurement
    test_metric: float
    reference_test_metric: float
    trials: int
    entries: Mapping[str, Entry]

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
        }

    @property
    def profile(self) -> CompressionProfile:
        metrics = {name: float(value) for name, value in self.figures().items() if isinstance(value, int | float)}
        return self.session.profile(self.entries).with_metrics(metrics)

    def export(self, directory: str | Path) -> Path:
        """Write the artefact: packed weights, profile, model card, manifest. Raises ArtefactError."""
        return artefact.save(
            directory,
            self.model,
            reference=self.session.reference.model,
            graph=self.session.space.graph,
            profile=self.profile,
            figures=self.figures(),
            card=model_card(self.session.space, self.entries, self.figures()),
        )
