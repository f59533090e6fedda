"""Data whose targets are the network's own classes: `accuracy` is then agreement with the uncompressed network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from examples.cache import arrays
from grainwise import Data
from grainwise.realise.reference import fingerprint

BATCH = 32


def labelled(model: nn.Module, inputs: Mapping[str, Tensor]) -> Data:
    """Batches of 32 `(inputs, targets)`; inputs: those of the `calibration`, `search` and `test` split, [N, 3, H, W].

    targets: int64 [N], the class of the largest logit that `model` gives in float32. They are found once and kept in
    the cache, under a name made of the weights and the inputs, so that targets of other ones are never read.
    """
    digest = hashlib.sha256(fingerprint(model).encode())
    for tensor in inputs.values():
        digest.update(tensor.contiguous().numpy().tobytes())
    targets = arrays(
        f"targets-{digest.hexdigest()[:32]}.npz", lambda: {k: _classes(model, x) for k, x in inputs.items()}
    )

    def batches(split: str) -> list[tuple[Tensor, Tensor]]:
        return list(zip(inputs[split].split(BATCH), torch.from_numpy(targets[split]).split(BATCH), strict=True))

    return Data(calibration=batches("calibration"), search=batches("search"), test=batches("test"))


@torch.inference_mode()
def _classes(model: nn.Module, inputs: Tensor) -> np.ndarray:
    return torch.cat([model(batch).argmax(1) for batch in inputs.split(BATCH)]).numpy()
