from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor, nn

import grainwise as gw
from tests.callbacks.contract import CallbackContract
from tests.networks import pictures, tiny, tiny_data

transformers = pytest.importorskip("transformers", reason="pip install grainwise[hf]")
pytest.importorskip("accelerate", reason="pip install grainwise[hf]")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages themselves


class WithLoss(nn.Module):
    """What a Trainer calls: keywords in, a dictionary with the loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.network = tiny()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.network(x)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def as_keywords(batches: list[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
    return [{"x": inputs, "labels": labels} for inputs, labels in batches]


def trained(folder: Path, epochs: int, compressed_for: int) -> gw.AdaptiveCompression:
    from grainwise.callbacks.huggingface import AdaptiveCallback

    model, data = WithLoss(), tiny_data()
    adaptive = gw.AdaptiveCompression(
        model,
        data=gw.Data(*(as_keywords(list(split)) for split in (data.calibration, data.search, data.test))),
        constraints={"size": 0.3},
        epochs=compressed_for,
        target="packed",
        options=gw.AdaptiveOptions(evaluations=4, samples=32),
    )
    ((inputs, labels),) = pictures(96, 7, batch=96)
    rows = [{"x": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]
    settings = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, settings, train_dataset=rows, callbacks=[AdaptiveCallback(adaptive)])
    trainer.train()
    return adaptive


class TestHuggingFace(CallbackContract):
    trained = staticmethod(trained)
