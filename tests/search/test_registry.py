from importlib.machinery import ModuleSpec

import pytest
import torch

from grainwise.api import SearchOptions
from grainwise.search import registry
from grainwise.search.registry import TECHNIQUES, Given, technique
from grainwise.search.rl import ControllerConfig
from tests.search.synthetic import bed


@pytest.mark.parametrize("name", TECHNIQUES)
def test_every_name_makes_a_searcher(name: str) -> None:
    problem = bed(2, macs=None, blocks=1)
    features = torch.tensor(problem.features, dtype=torch.float32)
    scores = problem.sensitivity if technique(name).table else None
    found = technique(name).make(Given(problem.projection, lambda: features, scores, 0, ControllerConfig()))
    for proposal in found.ask(2):
        problem.projection.space.check(proposal.entries)


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no searcher is called 'best'; give one of rl, random, .*optuna:nsgaii"):
        SearchOptions(searcher="best")


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr(registry, "find_spec", find)
    with pytest.raises(RuntimeError, match=r"optuna:tpe needs the package optuna, .*pip install 'grainwise\[optuna\]'"):
        SearchOptions(searcher="optuna:tpe")
    SearchOptions(searcher="additive")


def test_scores_cannot_be_left_out_where_the_searcher_is_made_of_them() -> None:
    with pytest.raises(ValueError, match="additive is made of sensitivity scores"):
        SearchOptions(searcher="additive", prior=False)
    SearchOptions(searcher="evolution", prior=False)
