"""Adaptive compression in a `Trainer` of Lightning: `pip install grainwise[lightning]`."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from grainwise.adaptive import AdaptiveCompression


class AdaptiveCallback(Callback):
    """Decides after each epoch: `Trainer(..., callbacks=[AdaptiveCallback(adaptive)])`, where the module that is fitted
    trains the network of `adaptive`. What `AdaptiveCompression.end_epoch` raises ends the training.
    """

    def __init__(self, adaptive: AdaptiveCompression) -> None:
        self.adaptive = adaptive

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises ValueError where the trainer has other epochs to go than the compression."""
        self.adaptive.expects(trainer.max_epochs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.adaptive.end_epoch()
