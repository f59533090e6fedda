"""What is run, networks with fewer channels, and the tables; the peers themselves run in `python -m bench.peers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import markdown, peers, tables
from examples import resnet20


def test_rows_that_are_there_are_not_made_again() -> None:
    names = ["AIMET AMP", "rl"]
    found = list(peers.orders(names, [0, 1], lambda: {"rl, size 0.125, seed 0"}))
    assert [(name, ask) for name, ask, seed in found if seed == 0] == [
        (name, ask) for ask in peers.ASKED for name in names if (name, ask) != ("rl", ("size", 1 / 8))
    ]
    assert [(name, seed) for name, _, seed in found if seed == 1] == [("rl", 1)] * len(peers.ASKED)
    assert all(peers.named(*order) != "rl, size 0.125, seed 0" for order in found)


def test_a_network_of_fewer_channels_computes_what_is_left() -> None:
    torch.manual_seed(0)
    model, kept = resnet20.pretrained(), [1, 4, 5]
    state = model.state_dict()
    for name in ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"):
        state[f"layer1.0.{name}"] = state[f"layer1.0.{name}"][kept]
    state["layer1.0.conv2.weight"] = state["layer1.0.conv2.weight"][:, kept]
    small = peers.sized(state)
    with torch.no_grad():
        for value in (model.layer1[0].bn1.weight, model.layer1[0].bn1.bias):
            others = [channel for channel in range(16) if channel not in kept]
            value[others] = 0.0
    pictures = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(small(pictures), model(pictures))
    standard = {"a": torch.arange(8.0).reshape(2, 4), "b": torch.ones(2, 2)}
    assert peers.narrowed(standard, {"a": [1, 3]})["a"].tolist() == [[1, 3], [5, 7]]
    assert peers.narrowed(standard, {"a": [1, 3]})["b"] is standard["b"]


def test_a_peer_is_not_asked_for_what_it_does_not_do() -> None:
    with pytest.raises(peers.Missing, match="out of its reach: AMP chooses bits alone"):
        peers.Bench.by_peer(object.__new__(peers.Bench), "AIMET AMP", ("macs", 0.5))


def row(technique: str, share: float, seed: int, **figures: Any) -> dict[str, Any]:
    return {"technique": technique, "cost": "size", "share": share, "seed": seed, **figures}


def test_the_most_accurate_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"size": 0.12, "macs": 1.0, "seconds": 9.6}
    theirs = {"accuracy_as_it_came": 0.5, "versions": {"theirs": "1.0"}}
    body = {
        "rows": [
            row("ours", 0.125, 0, accuracy=0.80, file=0.124, **figures),
            row("theirs", 0.125, 0, accuracy=0.82, **theirs, **figures),
            row("ours", 0.125, 1, accuracy=0.90, file=0.124, **figures),
            row("other", 0.125, 0, failed="out of its reach: why"),
            row("ours", 0.25, 0, accuracy=0.91, file=0.25, **figures),
        ],
        "reference": {"accuracy": 0.911, "counted_bytes": 1000, "macs": 2_000_000},
        "evaluations": 300,
        "machine": "a machine",
    }
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert tables.peers() == "No results yet: `python -m bench.peers`."
    (tmp_path / "peers.json").write_text(json.dumps({"resnet20": body}))
    lines = tables.peers().splitlines()
    assert [line for line in lines if line.startswith("###")] == ["### Size 1/4", "### Size 1/8", "### Versions"]
    ours = "| `ours` | 85.00 ± 7.07 | — | 0.1200 ± 0.0000 | 0.1240 ± 0.0000 | 1.0000 ± 0.0000 | 10 ± 0 |"
    assert lines.index(ours) + 1 == lines.index("| `theirs` | 82.00 | 50.00 | 0.1200 | — | 1.0000 | 10 |")
    assert "- `other`: out of its reach: why" in lines
    assert "| `theirs` | theirs 1.0 |" in lines
    assert "Uncompressed: 91.10 %, 1,000 bytes" in lines[-1]
