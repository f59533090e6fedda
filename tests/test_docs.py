"""Documents are executed: README's example runs, links resolve, tables are those of the committed results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bench import tables
from tests.networks import pictures, tiny, tiny_training

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    loaders = {f"{name}_loader": pictures(64, seed) for seed, name in enumerate(("calib", "search", "test"), 1)}
    names: dict[str, object] = {"model": tiny(), "train_loader": tiny_training(), **loaders}
    exec(code.replace("budget=200", "budget=16"), names)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "resnet20.profile.json").exists()


def test_the_example_of_a_training_loop_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adaptive.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model = tiny().train()
    optimiser = torch.optim.SGD(model.parameters(), 0.01)
    names: dict[str, object] = {f"{n}_loader": pictures(64, k) for k, n in enumerate(("calib", "search", "test"), 1)}
    names |= {"model": model, "train_loader": tiny_training(), "criterion": torch.nn.CrossEntropyLoss()}
    names |= {"optimiser": optimiser, "schedule": torch.optim.lr_scheduler.StepLR(optimiser, 1)}
    exec(code.replace("12", "2").replace("1 / 16", "0.5").replace("0.5}", "0.9}"), names)
    assert (tmp_path / "out" / "artefact" / "model.onnx").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_tables_are_those_of_the_results() -> None:
    for name, (file, make) in tables.TABLES.items():
        text = (ROOT / file).read_text()
        begin, end = f"<!-- {name}: made by bench.tables -->\n", f"\n<!-- end {name} -->"
        assert text.partition(begin)[2].partition(end)[0] == make(), f"run python -m bench.tables: {file}"
