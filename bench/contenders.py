"""What the search is compared with: one recipe for all layers, by ONNX Runtime's own quantiser and by ours."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grainwise.evaluate.calibration import plain_profiles
from grainwise.plan.choices import LEVELS, STRUCTURES, Choice, Entry, Granularity, Method
from grainwise.plan.space import SearchSpace, narrows, units_left


def eight_bit(space: SearchSpace) -> dict[str, Entry]:
    """Every layer that may in 8 bits with a scale for each channel."""
    return plain_profiles(space)["int8"]


def pruned(space: SearchSpace, level: float) -> dict[str, Entry]:
    """`eight_bit`, and the share `level` of channels removed wherever channels may be; widths are multiples of 8, so a
    narrow layer takes the level that leaves as many, and stays as it is where none removes any.
    """
    entries = eight_bit(space)
    wanted = Choice(Method.PRUNE, Granularity.CHANNEL, level)
    for index, layer in enumerate(space.layers):
        coupling = space.led_by(layer.name)
        for number, choice in enumerate(STRUCTURES):
            if coupling is None or not space.structures[index, number] or choice.method is not Method.PRUNE:
                continue
            if narrows(choice) and units_left(coupling, choice) == units_left(coupling, wanted):
                entries[layer.name] = Entry(choice, entries.get(layer.name, Entry()).precision)
    return entries


def pruned_levels(space: SearchSpace) -> Iterator[tuple[float, dict[str, Entry]]]:
    """Each level that removes something and gives another network than the milder ones, with its entries."""
    before = eight_bit(space)
    for level in LEVELS[Method.PRUNE]:
        entries = pruned(space, level)
        if entries != before:
            yield level, entries
        before = entries


def ort_int8(reference: bytes, calibration: Sequence[Mapping[str, Any]], *, reach: int) -> bytes:
    """The file that ONNX Runtime's `quantize_static` makes of `reference`. calibration: arrays by input name.

    Weights are s8 with a scale for each channel, activations u8, ranges by minimum and maximum: every convolution then
    runs as QLinearConv, while s8 activations leave those with a ReLU in float32. reach: the largest code of a weight;
    below 127 (no VNNI) weights take 7 bits (`reduce_range`), as sums of two products overflow 16 bits otherwise.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self.batches = iter(calibration)

        def get_next(self) -> Mapping[str, Any] | None:
            return next(self.batches, None)

    logging.getLogger().setLevel(logging.ERROR)  # it advises to run the very preparation that stands here
    with tempfile.TemporaryDirectory() as folder:
        plain, prepared, quantised = (Path(folder) / f"{name}.onnx" for name in ("plain", "prepared", "quantised"))
        plain.write_bytes(reference)
        quant_pre_process(str(plain), str(prepared))
        quantize_static(
            str(prepared),
            str(quantised),
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=reach < 127,
        )
        return quantised.read_bytes()
