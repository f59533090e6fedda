from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn

from grainwise.export.weights import _DTYPES, file_bytes, stored_tensors, weights_bytes
from grainwise.realise.norms import freeze_norms
from tests.networks import tiny

SHAPES = st.lists(st.integers(1, 40), max_size=4)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=30), st.tuples(SHAPES, st.sampled_from(list(_DTYPES))), max_size=20
)


@given(TENSORS)
def test_bytes_are_those_of_the_file(described: dict[str, tuple[list[int], torch.dtype]]) -> None:
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in described.items()}
    if "__metadata__" not in tensors:
        assert file_bytes(tensors) == len(save(tensors))


def test_norms_count_as_frozen_before_and_after(tmp_path: Path) -> None:
    model = tiny()
    before = weights_bytes(model)
    freeze_norms(model)
    save_file(dict(stored_tensors(model)), tmp_path / "x.safetensors")
    assert before == weights_bytes(model) == (tmp_path / "x.safetensors").stat().st_size


def test_a_shared_tensor_is_stored_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert [name for name, _ in stored_tensors(model)] == ["0.weight"]
