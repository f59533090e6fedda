from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import grainwise as gw
from tests.networks import tiny, tiny_data, tiny_training

pytestmark = pytest.mark.filterwarnings("ignore")  # of the package itself
lightning = pytest.importorskip("lightning.pytorch", reason="pip install grainwise[lightning]")


def trained(folder: Path, epochs: int, compressed_for: int) -> gw.AdaptiveCompression:
    from grainwise.callbacks.lightning import AdaptiveCallback

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = tiny().train()  # Lightning leaves the mode as it is

        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.02)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Module()
    adaptive = gw.AdaptiveCompression(
        module.network,
        data=tiny_data(),
        constraints={"size": 0.3},
        epochs=compressed_for,
        target="packed",
        options=gw.AdaptiveOptions(evaluations=4, samples=32),
    )
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[AdaptiveCallback(adaptive)],
    )
    trainer.fit(module, DataLoader(tiny_training(), batch_size=None))
    return adaptive


def test_a_trainer_compresses_while_it_trains(tmp_path: Path) -> None:
    adaptive = trained(tmp_path, 3, 3)
    assert [epoch.source is None for epoch in adaptive.history] == [False, False, True]
    result = adaptive.result()
    assert result.measurement.size_bytes <= 0.3 * result.reference.size_bytes


def test_a_trainer_of_other_epochs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the trainer is set to 2 epochs, the compression to 3"):
        trained(tmp_path, 2, 3)
