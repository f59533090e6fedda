from __future__ import annotations

from grainwise.workers.pool import Evaluate, Inline, Pool
from tests.workers.evaluations import PROFILES, by_text, never, nobody, unknown
from tests.workers.pool_contract import PoolContract


class TestInline(PoolContract):
    def make(self, evaluate: Evaluate) -> Pool:
        return Inline(evaluate)


def test_the_next_begins_when_the_last_was_taken() -> None:
    begun: list[object] = []
    pool = Inline(lambda entries: begun.append(entries) or by_text(entries))  # type: ignore[func-returns-value]
    for taken, _ in enumerate(pool.run(PROFILES, unknown, nobody, never), 1):
        assert len(begun) == taken
