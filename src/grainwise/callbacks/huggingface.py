"""Adaptive compression in a `Trainer` of Hugging Face's transformers: `pip install grainwise[hf]`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grainwise.adaptive import AdaptiveCompression


class AdaptiveCallback(TrainerCallback):
    """Decides after each epoch: `Trainer(model, ..., callbacks=[AdaptiveCallback(adaptive)])`, where `adaptive` has the
    same network. What `AdaptiveCompression.end_epoch` raises ends the training.
    """

    def __init__(self, adaptive: AdaptiveCompression) -> None:
        self.adaptive = adaptive

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises ValueError where the trainer has other epochs to go than the compression."""
        self.adaptive.expects(args.num_train_epochs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.adaptive.end_epoch()
