from grainwise.search.additive import ThompsonSearcher, additive, greedy
from grainwise.search.searcher import Searcher
from tests.search.searcher_contract import SearcherContract
from tests.search.synthetic import Bed, bed, run


class TestAdditive(SearcherContract):
    def make(self, problem: Bed, seed: int) -> Searcher:
        return additive(problem.projection, problem.sensitivity, seed=seed)


class TestGreedy(SearcherContract):
    def make(self, problem: Bed, seed: int) -> Searcher:
        return greedy(problem.projection, problem.sensitivity, seed=seed)


class TestThompson(SearcherContract):
    def make(self, problem: Bed, seed: int) -> Searcher:
        return ThompsonSearcher(problem.projection, problem.sensitivity, seed=seed)
