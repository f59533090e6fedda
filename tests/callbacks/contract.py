"""What every trainer's callback does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import grainwise as gw


class CallbackContract:
    """trained: (folder, epochs, compressed for) -> the compression after a training of so many epochs, by a trainer
    whose callback compresses for so many.
    """

    trained: Callable[[Path, int, int], gw.AdaptiveCompression]

    def test_a_trainer_compresses_while_it_trains(self, tmp_path: Path) -> None:
        adaptive = self.trained(tmp_path, 3, 3)
        assert [epoch.source is None for epoch in adaptive.history] == [False, False, True]
        result = adaptive.result()
        assert result.measurement.size_bytes <= 0.3 * result.reference.size_bytes
        assert all(torch.isfinite(value).all() for value in result.model.state_dict().values())

    def test_a_trainer_of_other_epochs_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="the trainer is set to 2 epochs, the compression to 3"):
            self.trained(tmp_path, 2, 3)
