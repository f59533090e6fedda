from grainwise.search.baselines import EvolutionConfig, EvolutionSearcher, RandomSearcher
from grainwise.search.prior import Prior
from grainwise.search.searcher import Searcher
from tests.search.searcher_contract import SearcherContract
from tests.search.synthetic import Bed, bed, best_divergence, run

_SMALL = EvolutionConfig(population=8, tournament=3)


class TestRandom(SearcherContract):
    def make(self, problem: Bed, seed: int) -> Searcher:
        return RandomSearcher(problem.projection, seed=seed)


class TestRandomUnprojected(SearcherContract):
    projected = False

    def make(self, problem: Bed, seed: int) -> Searcher:
        return RandomSearcher(problem.projection, seed=seed, projected=False)


class TestEvolution(SearcherContract):
    def make(self, problem: Bed, seed: int) -> Searcher:
        return EvolutionSearcher(problem.projection, seed=seed, config=_SMALL)


class TestEvolutionUnprojected(SearcherContract):
    projected = False

    def make(self, problem: Bed, seed: int) -> Searcher:
        return EvolutionSearcher(problem.projection, seed=seed, projected=False, config=_SMALL)


class TestEvolutionWithPrior(SearcherContract):
    def make(self, problem: Bed, seed: int) -> Searcher:
        prior = Prior(problem.projection, problem.sensitivity)
        return EvolutionSearcher(problem.projection, seed=seed, prior=prior, config=_SMALL)


def test_evolution_improves_on_random() -> None:
    problem = bed(0, blocks=1)
    random = best_divergence(problem, run(problem, RandomSearcher(problem.projection), 100))
    evolved = best_divergence(problem, run(problem, EvolutionSearcher(problem.projection, config=_SMALL), 100))
    assert evolved < random


def test_members_die_of_age_not_of_weakness() -> None:
    problem = bed(0, blocks=1)
    searcher = EvolutionSearcher(problem.projection, config=EvolutionConfig(population=4, tournament=2))
    run(problem, searcher, 12, 4)
    _, body = searcher.state()
    assert len(body["population"]) == 4
