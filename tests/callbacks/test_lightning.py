from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import grainwise as gw
from tests.callbacks.contract import CallbackContract
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


class TestLightning(CallbackContract):
    trained = staticmethod(trained)
