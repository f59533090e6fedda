"""What deployed files are worth: found profiles beside uniform recipes, in one race, on several networks.

    python -m bench.deploy [PART ...] [--evaluations N] [--seconds 30]

Each row is a file in out/bench-deploy/ and is kept in bench/results/deploy.json as soon as it is made; a run that was
cut, or is repeated, skips what is there. Every run ends with a race of all files of a network, in turn, in one process
on one thread: the times of a table are of one such race. `python -m bench.tables` makes the tables in docs/deploy.md.

Any file of another tool, out/bench-deploy/contenders/NAME.onnx, joins the race of ResNet-20 under its name, run by ONNX
Runtime with all of its optimisations.

What each network is asked was written down before any test data were read. So that they take minutes, the search of
EfficientNet-Lite0 is of quantisation and low rank, and that of MiniLM of quantisation alone, on fewer samples than the
example has.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from bench import contenders
from bench.workshop import SEED, Kept, Order, Part, Workshop, digest
from examples import cifar10, efficientnet_lite0, minilm, resnet18, resnet20
from grainwise.bench import Contest
from grainwise.evaluate.data import Data
from grainwise.evaluate.deployed import feed
from grainwise.evaluate.timing import device_name
from grainwise.plan.choices import Method
from grainwise.session import AIM

RESULTS = Path(__file__).parent / "results" / "deploy.json"
FILES = Path("out") / "bench-deploy"
FRONTIER = (*({"latency": share} for share in (0.8, 0.7, 0.6, 0.5)), *({"size": share} for share in (0.2, 0.125)))
RIVALS = 2  # uniform files that a search must beat: int8, and int8 with the fewest channels pruned; others fall too far
SMALLER = (0.85, 0.7)  # of a uniform file's bytes: what a search is asked that may take as long as that file
BATCHES = (1, 32)


def _resnet20(shop: Workshop) -> Iterator[Order]:
    yield shop.uncompressed()
    yield _quantize_static(shop)
    for path in sorted((shop.folder.parent / "contenders").glob("*.onnx")):
        yield _foreign(path)
    uniform = [shop.uniform("int8", contenders.eight_bit(shop.session.space))]
    for level, entries in contenders.pruned_levels(shop.session.space):
        uniform.append(shop.uniform(f"int8, {level:.0%} of channels pruned", entries))
    yield from uniform
    for asked in FRONTIER:
        ((cost, share),) = asked.items()
        yield shop.searched(f"search, {cost} {share}", asked)
    for order in uniform[:RIVALS]:
        row = shop.kept.rows(shop.part.name)[order.name]
        for smaller in SMALLER:
            asked = {"latency": round(row["made_at_ratio"] / AIM, 3), "size": round(smaller * row["size_ratio"], 4)}
            yield shop.searched(f"search, as fast as {order.name}, x {smaller} of its size", asked)


def _quantize_static(shop: Workshop) -> Order:
    session = shop.session
    assert session.evaluator.marked is not None
    inputs, reach = session.evaluator.marked.skeleton.inputs, session.reference.target.reach

    def make() -> tuple[bytes, dict[str, Any]]:
        batches = [feed(batch.inputs, inputs) for batch in session.splits.calibration]
        arrays = [{name: tensor.numpy() for name, tensor in batch.items()} for batch in batches]
        return contenders.ort_int8(shop.reference, arrays, reach=reach), {}

    settings = {**shop.settings, "onnxruntime": onnxruntime.__version__, "reduce_range": reach < 127}
    return Order("int8 by ONNX Runtime's quantize_static", "foreign", settings, make)


def _foreign(path: Path) -> Order:
    content = path.read_bytes()
    return Order(path.stem, "foreign", {"sha256": digest(content)}, lambda: (content, {}))


def _resnet18(shop: Workshop) -> Iterator[Order]:
    yield shop.uncompressed()
    yield shop.uniform("int8", contenders.eight_bit(shop.session.space))
    yield shop.uniform("int8, 50% of channels pruned", contenders.pruned(shop.session.space, 0.5))


def _a_fifth(shop: Workshop) -> Iterator[Order]:
    yield shop.uncompressed()
    yield shop.uniform("int8", contenders.eight_bit(shop.session.space))
    yield shop.searched("search, size 0.2", {"size": 0.2})


def _a_fifth_in_float(shop: Workshop) -> Iterator[Order]:
    yield shop.uncompressed()
    yield shop.uniform("8-bit weights", contenders.eight_bit(shop.session.space))
    yield shop.searched("search, size 0.2", {"size": 0.2})


def _first_of_test(contest: Contest, batches: tuple[int, ...] = BATCHES) -> Iterator[Mapping[str, Any]]:
    yield from map(contest.sample, batches)


def _text(contest: Contest) -> Iterator[Mapping[str, Any]]:
    """A text of 128 tokens; the test split's words have 8."""
    yield {name: tensor.numpy() for name, tensor in feed(minilm.tokens(), contest.inputs).items()}


def _few(data: Data, calibration: int, search: int) -> Data:
    """The first so many batches of 32 for calibration and search, all of the test split."""
    return replace(
        data, calibration=list(islice(data.calibration, calibration)), search=list(islice(data.search, search))
    )


def _texts() -> Data:
    """16 texts of 128 tokens for calibration, 128 pairs of words for search, WordSim353 for test."""
    data = _few(minilm.data(), 1, 8)
    return replace(data, calibration=[{name: t[:16] for name, t in batch.items()} for batch in data.calibration])


PARTS = {
    part.name: part
    for part in (
        Part(
            name="resnet20",
            title="ResNet-20, CIFAR-10",
            model=resnet20.pretrained,
            data=cifar10.splits,
            orders=_resnet20,
            samples=_first_of_test,
            minutes=60,
        ),
        Part(
            name="resnet18",
            title="ResNet-18 with random weights, 32 pixels; metric: agreement with its own float32 classes",
            model=resnet18.model,
            data=resnet18.data,
            orders=_resnet18,
            samples=_first_of_test,
            minutes=6,
        ),
        Part(
            name="efficientnet_lite0",
            title="EfficientNet-Lite0, CIFAR-10 pictures at 128 pixels; metric: agreement with its own float32 classes",
            model=efficientnet_lite0.model,
            data=efficientnet_lite0.data,
            orders=_a_fifth,
            samples=partial(_first_of_test, batches=(1,)),
            minutes=10,
            methods=(Method.QUANTIZE, Method.FACTORIZE),
            evaluations=150,
        ),
        Part(
            name="efficientnet_lite0_float",
            title="EfficientNet-Lite0 as above, for the target ort-cpu-float: activations stay float32",
            model=efficientnet_lite0.model,
            data=efficientnet_lite0.data,
            orders=_a_fifth_in_float,
            samples=partial(_first_of_test, batches=(1,)),
            minutes=10,
            methods=(Method.QUANTIZE, Method.FACTORIZE),
            evaluations=150,
            target="ort-cpu-float",
        ),
        Part(
            name="minilm",
            title="all-MiniLM-L6-v2; metric: Spearman correlation with WordSim353; timed on 128 tokens",
            model=minilm.model,
            data=_texts,
            orders=_a_fifth,
            samples=_text,
            minutes=10,
            metric=minilm.metric,
            methods=(Method.QUANTIZE,),
            evaluations=100,
        ),
    )
}


def run(part: Part, folder: Path, kept: Kept, evaluations: int, seconds: float, command: str) -> None:
    """Make the rows that are not there, then the race."""
    print(f"{part.name}: about {part.minutes} minutes on one thread when nothing is there yet", flush=True)
    shop = Workshop(part, folder, kept, evaluations)
    rows = [shop.run(order) for order in part.orders(shop)]
    machine = f"{device_name()}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    kept.update(
        part.name,
        title=part.title,
        command=command,
        machine=machine,
        seed=SEED,
        evaluations=evaluations,
        rows=rows,
        races=shop.race(rows, seconds),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--evaluations", type=int, help="of each search; the part's own number otherwise")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each race")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--files", type=Path, default=FILES)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.parts if name not in PARTS]:
        parser.error(f"no part is called {unknown[0]}; give some of {', '.join(PARTS)}")
    torch.set_num_threads(1)
    kept = Kept(arguments.out)
    command = " ".join(["python -m bench.deploy", *sys.argv[1:]])
    for name in arguments.parts:
        part = PARTS[name]
        run(part, arguments.files, kept, arguments.evaluations or part.evaluations, arguments.seconds, command)


if __name__ == "__main__":
    main()
