from __future__ import annotations

import math

import pytest

from grainwise.export.steps import steps, words
from tests.export.candidates import PLANS, images, tiny_candidate, tiny_source, with_fault


@pytest.mark.parametrize("plan", PLANS)
def test_steps_of_a_right_file_are_rounding(plan: str) -> None:
    model, file = tiny_candidate(plan)
    found = steps(file, model, tiny_source().skeleton, images(8, 3))
    assert max(step.share for step in found) < 1e-5
    assert found[-1].place == "the output"


def test_every_layer_and_value_is_compared() -> None:
    places = {
        "float": ["layer stem", "layer block.0", "layer block.3", "layer down", "layer fc", "the output"],
        "int8": [
            *("value input_1", "layer stem", "layer block.0", "layer block.3", "sum add", "layer down"),
            *("the input of layer fc", "layer fc", "the output"),
        ],
    }
    for plan, expected in places.items():
        model, file = tiny_candidate(plan)
        assert [step.place for step in steps(file, model, tiny_source().skeleton, images(8, 3))] == expected


def test_a_fault_stays_where_it_is() -> None:
    model, file = tiny_candidate("int8")
    found = steps(with_fault(file, "block.3.scale", factor=1.25), model, tiny_source().skeleton, images(8, 3))
    assert [step.place for step in found if step.share > 1e-5] == ["layer block.3"]


def test_another_shape_is_as_far_as_can_be() -> None:
    model, file = tiny_candidate("float")[0], tiny_candidate("narrowed")[1]
    found = steps(file, model, tiny_source().skeleton, images(8, 3))
    assert next(step for step in found if step.place == "layer block.0").share == math.inf


def test_words_name_what_a_person_knows() -> None:
    skeleton = tiny_source().skeleton
    assert [
        words(path, skeleton) for path in ("points.relu_2", "points.relu", "block.0.1", "norm", "points.input_1")
    ] == [
        "sum add",
        "layer stem",
        "layer block.0",
        "norm norm",
        "value input_1",
    ]
