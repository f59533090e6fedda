"""What training does for a block's student: its error on pictures that it was not trained on, by steps and loss.

    python -m bench.students

One block of each stage of ResNet-20 at half of its inner width; `block_error` on the search split, each student by
itself. Zero steps: the closed-form re-fit. Writes bench/results/students.json.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from bench.methods import BLOCKS, observed
from examples import cifar10, resnet20
from grainwise.evaluate.timing import device_name
from grainwise.methods.distill import StudentOptions, block_error
from grainwise.plan.choices import Choice, Granularity, Method
from grainwise.plan.space import units_left
from grainwise.realise.library import VariantLibrary
from grainwise.session import Session

RESULTS = Path(__file__).parent / "results" / "students.json"
HALF = Choice(Method.DISTILL, Granularity.BLOCK, 0.5)
TRAININGS = (
    StudentOptions(steps=0),
    *(StudentOptions(steps, loss) for steps in (60, 240, 960) for loss in ("squared", "absolute")),
)


def rows(session: Session, name: str) -> list[dict[str, Any]]:
    """A row for each training of the student of one block."""
    graph = session.reference.graph
    block = next(block for block in graph.blocks if block.name == name)
    units, seen = units_left(graph.coupling(block.coupling), HALF), observed(session, name)
    found = []
    for training in TRAININGS:
        library, start = VariantLibrary(session.reference, students=training), time.process_time()
        student = library.student(block, units)
        seconds = time.process_time() - start
        error = block_error(student, list(zip(*(part.split(64) for part in seen), strict=True)))
        row = {"block": name, "steps": training.steps, "loss": training.loss, "error": error, "seconds": seconds}
        found.append(row)
        print(json.dumps(row), flush=True)
    return found


def main() -> None:
    torch.set_num_threads(1)
    session = Session.prepare(resnet20.pretrained(), cifar10.splits(), target="packed")
    body = {
        "command": "python -m bench.students",
        "machine": f"{device_name()}, torch {torch.__version__}",
        "rows": [row for name in BLOCKS.values() for row in rows(session, name)],
    }
    RESULTS.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
