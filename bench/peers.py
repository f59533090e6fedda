"""ResNet-20/CIFAR-10 beside other compression tools, each in an environment of its own, given the same recalibration.

    python -m bench.peers [NAME ...] [--seeds 0] [--evaluations 300]

NAME is one of PEERS or of the searchers OURS. A peer's environment is made on the first run in out/bench-peers. Rows
that bench/results/peers.json has are not made again, so a run that was cut goes on (delete one to have it made anew);
`python -m bench.tables` makes the tables in docs/peers.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.exchange import FLOAT, Made, Task, check_levels, counted_bytes, processor_seconds
from bench.workshop import Kept, Row
from examples import cifar10, resnet20
from grainwise.api import SearchOptions, make_judge, make_searcher
from grainwise.evaluate.data import Data, Splits
from grainwise.evaluate.evaluator import outputs_of, targets_of
from grainwise.evaluate.measures import accuracy
from grainwise.evaluate.timing import device_name
from grainwise.export.graph import file_bytes, tensor_bytes
from grainwise.graph.forward import default_forward
from grainwise.graph.recording import record
from grainwise.leaders import Infeasible, choose
from grainwise.plan.projection import Unreachable
from grainwise.realise.norms import NormWatch, Standard, reestimate_norms
from grainwise.realise.reference import channels_last
from grainwise.search.driver import Budget, search
from grainwise.search.registry import technique
from grainwise.session import Session
from grainwise.store.studies import Store

RESULTS = Path(__file__).parent / "results" / "peers.json"
FOLDER = Path("out/bench-peers")
PART = "resnet20"
TARGET = "ort-cpu-float"  # weights alone are quantised, as the peers are asked to
INSTALL_SECONDS, RUN_SECONDS = 1800, 3600
COMMON = ("torch==2.13.0", "safetensors==0.8.0")

Ask = tuple[str, float]
"""(cost, share of the uncompressed network's)."""
ASKED: tuple[Ask, ...] = (("size", 1 / 4), ("size", 1 / 8), ("size", 1 / 12), ("macs", 0.5))
OURS = ("additive", "rl")
BITS = (8, 4, 2)


@dataclass(frozen=True, slots=True)
class Peer:
    """A tool, its script in this folder, and what its environment has. bits, way: see `exchange.Task`.
    costs: that it can be asked for; why_not: one sentence on the others.
    """

    script: str
    packages: tuple[str, ...]
    costs: tuple[str, ...]
    why_not: str = ""
    bits: tuple[int, ...] = BITS
    way: str = ""


_MODELOPT = Peer(
    "peer_modelopt",
    ("nvidia-modelopt==0.47.0", "requests==2.34.2", "huggingface_hub==2.4.0"),  # it imports the two without asking
    ("size",),
    "`auto_quantize` chooses number formats alone",
)
_PRUNING = Peer("peer_torch_pruning", ("torch-pruning==1.6.1",), ("size", "macs"), way="magnitude")
PEERS: dict[str, Peer] = {
    "ModelOpt auto_quantize": _MODELOPT,
    "ModelOpt auto_quantize, mse": replace(_MODELOPT, way="mse"),
    "MCT mixed precision": Peer(
        "peer_mct",
        ("model-compression-toolkit==2.6.1", "torchvision==0.28.0"),
        ("size",),
        "its mixed precision chooses bits alone",
    ),
    "AIMET AMP": Peer("peer_aimet", ("aimet-torch==2.42.0",), ("size",), "AMP chooses bits alone"),
    "Torch-Pruning, magnitude": _PRUNING,
    "Torch-Pruning, taylor": replace(_PRUNING, way="taylor"),
    "Torch-Pruning, magnitude, global": replace(_PRUNING, way="magnitude global"),
    "Torch-Pruning, taylor, global": replace(_PRUNING, way="taylor global"),
}


class Missing(RuntimeError):
    """A peer cannot do this here; the message says why."""


def environment(peer: Peer) -> Path:
    """The Python of the peer's own environment, made when it is not there or was not finished. Raises Missing."""
    packages = (*COMMON, *peer.packages)
    folder = FOLDER / peer.script.removeprefix("peer_")
    python, finished = folder / "bin" / "python", folder / "finished"
    if not finished.exists() or finished.read_text(encoding="utf-8").split() != list(packages):
        venv.create(folder, clear=True, with_pip=True)
        ran([str(python), "-m", "pip", "install", "--quiet", *packages], INSTALL_SECONDS)
        finished.write_text("\n".join(packages), encoding="utf-8")
    return python.absolute()


def ran(command: Sequence[str], seconds: int) -> None:
    """Runs a command of a peer's environment: of ours it sees `bench` and `examples` alone. Raises Missing."""
    settings = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds, env=settings)
    except subprocess.CalledProcessError as error:
        print(error.stderr, file=sys.stderr)
        raise Missing(next(iter(error.stderr.strip().splitlines()[-1:]), "no message")) from error
    except subprocess.TimeoutExpired as error:
        raise Missing(f"not done after {seconds} seconds") from error


def some_data() -> Data:
    """The splits with one batch, 128 pictures, to search on: a search takes minutes."""
    data: Data = cifar10.splits()
    return replace(data, search=list(islice(data.search, 1)))


def sized(state: Mapping[str, Tensor]) -> nn.Module:
    """ResNet-20 with this state, whose layers may have fewer channels."""
    model = resnet20.ResNet20()
    for name, module in model.named_modules():
        if not list(module.parameters(recurse=False)):
            continue
        for key in module.state_dict():
            value = state[f"{name}.{key}"].clone()
            own = getattr(module, key)
            setattr(module, key, nn.Parameter(value) if isinstance(own, nn.Parameter) else value)
        if isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = module.weight.shape[:2]
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features = len(module.weight)
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
    return channels_last(model.eval().requires_grad_(False))


def narrowed(standard: Standard, kept: Mapping[str, list[int]]) -> Standard:
    """The standards `[2, C]` of the channels that are left."""
    return {name: value[:, kept[name]] if name in kept else value for name, value in standard.items()}


class Bench:
    """The network, its data, and the figures of all that is made of it, by one evaluation for all."""

    def __init__(self, evaluations: int) -> None:
        self.evaluations = evaluations
        self.splits = Splits.read(some_data())
        self.model = sized(resnet20.pretrained().state_dict())
        self.calibration = [batch.inputs for batch in self.splits.calibration]
        self.macs = self._macs(self.model)
        self.counted = counted_bytes(self.model.state_dict(), {})

    def _macs(self, model: nn.Module) -> int:
        return record(model, self.calibration[0][:2], default_forward).macs

    def accuracy(self, model: nn.Module) -> float:
        return accuracy(outputs_of(model, self.splits.test, default_forward), targets_of(self.splits.test))

    @cached_property
    def standards(self) -> list[Standard]:
        """What the uncompressed network's batch norms give out on each calibration batch."""
        found = []
        with torch.inference_mode(), NormWatch(self.model) as watch:
            for inputs in self.calibration:
                self.model(inputs)
                found.append(watch.standard())
        return found

    def reference(self) -> Row:
        return {"accuracy": self.accuracy(self.model), "counted_bytes": self.counted, "macs": self.macs}

    def judged(self, made: Made) -> Row:
        """Figures of what a peer made: as it came, and with its batch norms estimated anew as grainwise does it."""
        check_levels(made.state, made.formats)
        model = sized(made.state)
        plain = self.accuracy(model)
        norms = resnet20.pretrained().state_dict()
        with (
            torch.no_grad()
        ):  # a peer that folds its norms gives their effect as a bias; the standards are the network's
            for name, value in model.named_parameters():
                norm = name.rpartition(".")[0]
                if norm in self.standards[0]:
                    value.copy_(norms[name][made.kept[norm]] if norm in made.kept else norms[name])
        reestimate_norms(
            model, self.calibration, default_forward, [narrowed(standard, made.kept) for standard in self.standards]
        )
        bits = sorted({made.formats.get(name, FLOAT).bits for name, _ in model.named_modules() if name in made.formats})
        return {
            "accuracy": self.accuracy(model),
            "accuracy_as_it_came": plain,
            "size": counted_bytes(made.state, made.formats) / self.counted,
            "macs": self._macs(model) / self.macs,
            "seconds": made.seconds,
            "bits": bits,
            "versions": dict(made.versions),
        }

    def by_peer(self, name: str, ask: Ask) -> Row:
        """Raises Missing."""
        peer, (cost, share) = PEERS[name], ask
        if cost not in peer.costs:
            raise Missing(f"out of its reach: {peer.why_not}")
        python = environment(peer)
        folder = FOLDER / "made" / f"{name}, {cost} {share:.3f}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        parts = {
            "calibration": torch.cat(self.calibration),
            "calibration_labels": targets_of(self.splits.calibration),
            "search": torch.cat([batch.inputs for batch in self.splits.search]),
            "search_labels": targets_of(self.splits.search),
        }
        Task(cost, share, peer.bits, peer.way, **parts).write(folder)
        ran([str(python), "-m", f"bench.{peer.script}", str(folder.absolute())], RUN_SECONDS)
        return self.judged(Made.read(folder))

    def by_us(self, searcher: str, ask: Ask, seed: int) -> Row:
        """As `compress` does, everything anew. Raises Missing."""
        constraints, options = dict([ask]), SearchOptions(searcher=searcher, seed=seed)
        start = processor_seconds()
        session = Session.prepare(resnet20.pretrained(), some_data(), target=TARGET)
        budgets = session.budgets(constraints)
        table = technique(searcher).table
        store = Store("sqlite://")
        try:
            sensitivity = session.sensitivity(lambda done, total: None, table) if table else None
            store.create("peers", {"constraints": constraints})
            trials = search(
                searcher=make_searcher(session, session.projection(budgets), sensitivity, options, self.evaluations),
                judge=make_judge(session, budgets, options),
                store=store,
                study="peers",
                budget=Budget(evaluations=self.evaluations),
            )
            found = session.evaluator.finish(choose(session, trials, budgets))
        except (Infeasible, Unreachable) as error:
            raise Missing(str(error)) from error
        finally:
            store.close()
        seconds = processor_seconds() - start
        reference, evaluator = session.evaluator.reference_file, session.evaluator
        assert found.file is not None and reference is not None
        return {
            "accuracy": evaluator.test(found.model, evaluator.forward),
            "size": tensor_bytes(found.file) / self.counted,
            "file": file_bytes(found.file) / file_bytes(reference),
            "macs": found.measurement.macs / self.macs,
            "seconds": seconds,
        }

    def row(self, name: str, ask: Ask, seed: int) -> Row:
        facts = {"technique": name, "cost": ask[0], "share": ask[1], "seed": seed}
        try:
            found = self.by_us(name, ask, seed) if name in OURS else self.by_peer(name, ask)
        except Missing as error:
            found = {"failed": str(error)}
        return {"name": named(name, ask, seed), **facts, **found}


def named(name: str, ask: Ask, seed: int) -> str:
    return f"{name}, {ask[0]} {ask[1]:.3f}, seed {seed}"


def orders(
    names: Sequence[str], seeds: Sequence[int], made: Callable[[], Collection[str]]
) -> Iterator[tuple[str, Ask, int]]:
    """Technique, what it is asked for, and seed of each row that is not there yet; peers have the first seed alone.
    made: names of the rows that are there, asked anew each time, because several processes may share the work.
    """
    for seed in seeds:
        for ask in ASKED:
            for name in names:
                if (name in OURS or seed == seeds[0]) and named(name, ask, seed) not in made():
                    yield name, ask, seed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=[*PEERS, *OURS], metavar="NAME", help=", ".join([*PEERS, *OURS]))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of our searches; peers have the first")
    parser.add_argument("--evaluations", type=int, default=300, help="of each of our searches")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(arguments.evaluations)
    for order in orders(arguments.names, arguments.seeds, lambda: Kept(RESULTS).rows(PART)):
        row = bench.row(*order)
        Kept(RESULTS).keep(PART, row)
        print(json.dumps(row), flush=True)
    facts = {"evaluations": arguments.evaluations, "machine": f"{device_name()}, torch {torch.__version__}"}
    Kept(RESULTS).update(PART, reference=bench.reference(), **facts)


if __name__ == "__main__":
    main()
