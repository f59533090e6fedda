"""Compressing while training against training, searching and recovering, and against one profile from the start.

    python -m bench.adaptive [TASK ...] [--seeds N] [--techniques NAME ...]

All techniques see the same training pictures for the same number of epochs, and meet the same constraints; the test
split is read once, for what each gives in the end. Rows are written to bench/results/adaptive.json as they are made, so
a run that was cut goes on where it was. `python -m bench.tables` makes the tables and plots of docs/adaptive.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grainwise as gw
from bench.workshop import Kept
from examples import cache, cifar10, fashion, resnet20
from grainwise.decision import Decider
from grainwise.evaluate.timing import device_name
from grainwise.plan.profile import CompressionProfile, entries_to_json
from grainwise.recover.forms import METHODS, Dress
from grainwise.report.timeline import changed_share

RESULTS = Path(__file__).parent / "results" / "adaptive.json"
BATCH = 128
EVALUATIONS = 100  # of the search between training and recovery
TRAINED = 2 / 3  # of its epochs that are training, the others recovery

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """model: untrained. data: splits. training: batches, anew each time they are read. rate: peak of the schedule."""

    title: str
    model: Callable[[], nn.Module]
    data: Callable[[], gw.Data]
    training: Callable[[], Any]
    constraints: Mapping[str, float]
    epochs: int
    rate: float


@dataclass(frozen=True)
class FashionPictures:
    """The first `count` of Fashion-MNIST's training split, shuffled anew each time they are read."""

    count: int

    def __len__(self) -> int:
        return self.count // BATCH

    @cached_property
    def arrays(self) -> dict[str, Tensor]:
        stored = cache.arrays("fashion-mnist.npz", fashion.fetch)
        images = {f"{name}_images": fashion.normalise(stored[f"{name}_images"]) for name in ("train", "test")}
        return images | {f"{n}_labels": torch.from_numpy(stored[f"{n}_labels"]).long() for n in ("train", "test")}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.arrays["train_images"], self.arrays["train_labels"]
        for chosen in torch.randperm(self.count)[: len(self) * BATCH].split(BATCH):
            yield images[chosen], labels[chosen]

    def splits(self) -> gw.Data:
        """Calibration and search: training pictures that are not trained on. Test: the official one."""

        def batches(part: str, first: int, last: int) -> list[tuple[Tensor, Tensor]]:
            columns = (self.arrays[f"{part}_{what}"][first:last].split(BATCH) for what in ("images", "labels"))
            return list(zip(*columns, strict=True))

        calibration, search = batches("train", 57_600, 58_112), batches("train", 58_112, 58_624)
        return gw.Data(calibration=calibration, search=search, test=batches("test", 0, 10_000))


def tasks() -> dict[str, Task]:
    hard = {"size": 1 / 16, "macs": 0.5}

    def small(count: int, epochs: int) -> Task:
        title, pictures = f"A small network on {count:,} pictures of Fashion-MNIST", FashionPictures(count)
        return Task(title, fashion.FashionNet, pictures.splits, lambda: pictures, hard, epochs, 6e-3)

    title = "ResNet-20 on CIFAR-10"
    return {
        "fashion": small(20_000, 9),
        "overhead": small(57_600, 3),
        "resnet20": Task(title, resnet20.ResNet20, cifar10.splits, cifar10.Training, hard, 9, 6e-3),
    }


class Run:
    """One seed of one task: what all techniques have in common."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed
        self.data, self.loader = task.data(), task.training()

    def fresh(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return self.task.model()

    def train(self, model: nn.Module, epochs: int, after: Callable[[], None] = lambda: None) -> float:
        """Ordinary training, one cycle of the learning rate; `after` is called after each epoch. Processor seconds
        without it.
        """
        optimiser = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, self.task.rate, total_steps=epochs * len(self.loader))
        seconds = 0.0
        for _ in range(epochs):
            start = time.process_time()
            model.train()
            for inputs, labels in self.loader:
                loss = F.cross_entropy(model(inputs), labels)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
            seconds += time.process_time() - start
            after()
        return seconds

    def adaptive(self, profile: CompressionProfile | None = None) -> Row:
        task, model, start = self.task, self.fresh(), time.process_time()
        adaptive = gw.AdaptiveCompression(
            model,
            data=self.data,
            constraints=task.constraints,
            epochs=task.epochs,
            profile=profile,
            options=gw.AdaptiveOptions(seed=self.seed),
        )
        hook = [time.process_time() - start]

        def end() -> None:
            begun = time.process_time()
            ended = adaptive.end_epoch()
            hook.append(time.process_time() - begun)
            print(adaptive.epoch, ended.source, ended.given, ended.seconds, flush=True)

        trained = self.train(model, task.epochs, end)
        row = _figures(adaptive.result())
        layers = [layer.name for layer in adaptive.layers]
        entries = [epoch.entries for epoch in adaptive.history]
        return row | {
            "train_seconds": trained,
            "prepare_seconds": hook[0],
            "hook_seconds": sum(hook[1:]),
            "changed_after_third": changed_share(layers, entries, max(1, task.epochs // 3)),
            "layers": layers,
            "epochs": [epoch.to_json() for epoch in adaptive.history],
        }

    def fixed(self) -> Row:
        """One profile for all epochs, that the same controller finds for the network before it is trained."""
        model = self.fresh()
        session = gw.Session.prepare(model, self.data, methods=METHODS)
        decider = Decider(session, gw.AdaptiveOptions(seed=self.seed))
        found = decider.choose(Dress(model), {}, session.budgets(self.task.constraints))
        return self.adaptive(CompressionProfile(found.entries))

    def hindsight(self, row: Row) -> Row:
        """One profile for all epochs: the last one of the adaptive run `row`."""
        last = CompressionProfile.from_json(json.dumps(row["profile"]))
        return self.adaptive(CompressionProfile(last.entries))

    def plain(self) -> Row:
        """Training alone, uncompressed."""
        model = self.fresh()
        trained = self.train(model, self.task.epochs)
        session = gw.Session.prepare(model.eval(), self.data)
        return _figures(session.finish({}, 0)) | {"train_seconds": trained}

    def recovered(self) -> Row:
        """Training, then a search of all methods, then recovery."""
        model, task = self.fresh(), self.task
        before = round(TRAINED * task.epochs)
        trained, start = self.train(model, before), time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            found = gw.compress(
                model.eval(),
                data=self.data,
                constraints=task.constraints,
                budget=EVALUATIONS,
                store=f"sqlite:///{folder}/study.db",
                options=gw.SearchOptions(seed=self.seed),
            )
        searched, start = time.process_time() - start, time.process_time()
        result = found.recover(self.loader, epochs=task.epochs - before, options=gw.RecoverOptions(seed=self.seed))
        return _figures(result) | {
            "unrecovered_accuracy": found.figures()["onnx_accuracy"],
            "train_seconds": trained,
            "search_seconds": searched,
            "recover_seconds": time.process_time() - start,
        }


def _figures(result: gw.Result) -> Row:
    figures = result.figures()
    return {
        "accuracy": figures["onnx_accuracy"],
        "size": figures["size_bytes"] / figures["reference_size_bytes"],
        "macs": figures["macs"] / figures["reference_macs"],
        "size_bytes": figures["size_bytes"],
        "profile": json.loads(result.session.profile(result.entries).to_json()),
        "entries": entries_to_json(result.entries),
    }


TECHNIQUES = ("adaptive", "recovered", "fixed", "hindsight", "plain")


def main() -> None:
    parser = argparse.ArgumentParser()
    known = tasks()
    parser.add_argument("tasks", nargs="*", default=["fashion"], metavar="TASK", help=f"of {', '.join(known)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--techniques", nargs="+", choices=TECHNIQUES, default=TECHNIQUES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = Kept(arguments.out)
    for name in arguments.tasks:
        task = known[name]
        for seed in range(arguments.seeds):
            run = Run(task, seed)
            for technique in arguments.techniques:
                rows = kept.rows(name)
                if (label := f"{technique} {seed}") in rows:
                    continue
                make = getattr(run, technique)
                found = make(rows[f"adaptive {seed}"]) if technique == "hindsight" else make()
                row = {"name": label, "technique": technique, "seed": seed, **found}
                print(json.dumps({k: row[k] for k in ("name", "accuracy", "size", "macs")}), flush=True)
                kept.update(
                    name,
                    title=task.title,
                    constraints=dict(task.constraints),
                    epochs=task.epochs,
                    evaluations=EVALUATIONS,
                    command=" ".join(["python -m bench.adaptive", *sys.argv[1:]]),
                    machine=f"{device_name()}, torch {torch.__version__}",
                    rows=[*rows.values(), row],
                )


if __name__ == "__main__":
    main()
