"""Sizes by hand, and what a peer says of its weights against the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.exchange import Format, Made, Task, check_levels, counted_bytes, effective_bits

STATE = {"conv.weight": torch.zeros(4, 3, 3, 3), "bn.weight": torch.ones(4), "fc.weight": torch.zeros(2, 5)}


def test_counted_bytes_by_hand() -> None:
    biases = 4 * (4 + 2)  # a norm counts as the bias of the layer before it
    assert counted_bytes(STATE, {}) == 4 * (108 + 10) + biases
    assert counted_bytes(STATE, {"conv": Format(4, 4)}) == (54 + 2 * 4) + 4 * 10 + biases
    assert counted_bytes(STATE, {"fc": Format(3, 2)}) == 4 * 108 + (4 + 2 * 2) + biases  # 30 bits are four bytes
    assert counted_bytes(STATE, {"fc": Format(4, 2, zero_points=True)}) == 4 * 108 + (5 + 2 * 2 + 1) + biases


@pytest.mark.parametrize(("bits", "scales"), [(0, 1), (33, 1), (4, 0)])
def test_formats_that_cannot_be(bits: int, scales: int) -> None:
    with pytest.raises(ValueError, match=f"{bits} bits"):
        Format(bits, scales)


def test_effective_bits_fill_the_share() -> None:
    formats = {"conv": Format(8, 4), "fc": Format(8, 2)}
    share = counted_bytes(STATE, formats) / counted_bytes(STATE, {})
    assert effective_bits(STATE, share) == pytest.approx(8)
    assert effective_bits(STATE, share / 2) < 4  # scales and biases do not halve


def test_more_levels_than_bits_are_refused() -> None:
    weight = torch.arange(12.0).remainder(4).reshape(2, 6)
    state = {"fc.weight": torch.stack([weight[0], 10 + weight[1]])}  # four levels in each output, eight in both
    check_levels(state, {"fc": Format(2, 2)})
    state["fc.weight"][1, 0] = -1
    with pytest.raises(ValueError, match="fc is said to have 2 bits, but 5"):
        check_levels(state, {"fc": Format(2, 2)})


def test_what_is_handed_over_comes_back(tmp_path: Path) -> None:
    made = Made(STATE, {"conv": Format(4, 4, zero_points=True)}, 1.5, {"a package": "1.0"}, {"bn": [0, 2]})
    made.write(tmp_path)
    back = Made.read(tmp_path)
    assert (back.formats, back.seconds, back.versions, back.kept) == (
        made.formats,
        made.seconds,
        made.versions,
        made.kept,
    )
    assert all(torch.equal(back.state[name], value) for name, value in STATE.items())
    pictures = torch.rand(2, 3, 4, 4)
    Task("size", 0.125, (8, 4), "mse", pictures, torch.tensor([1, 2]), pictures + 1, torch.tensor([3, 4])).write(
        tmp_path
    )
    task = Task.read(tmp_path)
    assert (task.cost, task.share, task.bits, task.way) == ("size", 0.125, (8, 4), "mse")
    assert torch.equal(task.search, pictures + 1) and task.calibration_labels.tolist() == [1, 2]
