import builtins
import json

import pytest

from grainwise.search.local import reduced
from grainwise.search.optuna import OptunaSearcher
from grainwise.search.prior import finite_scores
from grainwise.search.searcher import Searcher
from tests.search.searcher_contract import SearcherContract
from tests.search.synthetic import Bed, bed, run

pytest.importorskip("optuna")


class TestTpe(SearcherContract):
    projected = False

    def make(self, problem: Bed, seed: int) -> Searcher:
        return OptunaSearcher(problem.projection, "tpe", seed=seed)


class TestNsgaii(SearcherContract):
    projected = False

    def make(self, problem: Bed, seed: int) -> Searcher:
        return OptunaSearcher(problem.projection, "nsgaii", seed=seed)
