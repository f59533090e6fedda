"""Uniform recipes on the small residual network: entries by hand, and the file of ONNX Runtime's quantiser."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from bench import contenders
from grainwise.export.kernels import found_kernels
from grainwise.export.runtime import optimised
from grainwise.session import Session
from tests.export.candidates import tiny_candidate
from tests.networks import tiny_data


def test_the_same_level_for_all_widths(onnx_session: Session) -> None:
    """Channels: 16 of the stem and the sum, 32 in the block, 32 after it; the classifier's four are the answers."""
    found = {
        level: {name: str(entry.structure) for name, entry in entries.items()}
        for level, entries in contenders.pruned_levels(onnx_session.space)
    }
    plain = {"block.3": "none", "fc": "none"}  # its channels follow the stem's
    halved = {**plain, "stem": "prune/channel/0.3"}  # 16 channels can only lose 8, and 0.3 is the first level that does
    assert found == {
        0.3: {**halved, "block.0": "prune/channel/0.3", "down": "prune/channel/0.3"},
        0.5: {**halved, "block.0": "prune/channel/0.5", "down": "prune/channel/0.5"},
        0.7: {**halved, "block.0": "prune/channel/0.7", "down": "prune/channel/0.7"},
    }
    for _, entries in contenders.pruned_levels(onnx_session.space):
        onnx_session.space.check(entries)
        assert {str(entry.precision) for entry in entries.values()} == {"quantize/channel/8"}


@pytest.mark.parametrize(("reach", "least", "most"), [(127, 100, 127), (63, 50, 64)])
def test_the_runtime_quantises_every_convolution(reach: int, least: int, most: int) -> None:
    reference = tiny_candidate("float")[1].SerializeToString()
    file = contenders.ort_int8(reference, [{"input": x.numpy()} for x, _ in tiny_data().calibration], reach=reach)
    assert found_kernels(optimised(file, disabled=()).graph)["QLinearConv"] == 4
    weights = [
        numpy_helper.to_array(t).astype(int)
        for t in onnx.load_from_string(file).graph.initializer
        if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4
    ]
    assert len(weights) == 4
    assert least <= max(np.abs(w).max() for w in weights) <= most
