"""The pool of Ray actors on a cluster of two nodes on this machine: the contract, lost workers, lost nodes, tokens."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from grainwise.study.measurement import Failure
from grainwise.workers.pool import Evaluate, Pool
from tests.workers.evaluations import PROFILES, Slow, Troubled, all_of, by_text, never, nobody, unknown
from tests.workers.pool_contract import PoolContract

# Read when ray is imported. The last one: Ray ends workers when the whole machine is short of memory, tests or not.
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_memory_monitor_refresh_ms": "0"}
os.environ |= TOKEN
ray = pytest.importorskip("ray", reason="the package ray is not installed: no test of clusters was run")

from grainwise.api import batch_of  # noqa: E402
from grainwise.workers.cluster import Cluster, workers_of  # noqa: E402

TRUTH = {number: by_text(entries) for number, entries in PROFILES.items()}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Two nodes of one processor each."""
    from ray.cluster_utils import Cluster as Nodes

    made = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


class TestCluster(PoolContract):
    @pytest.fixture(autouse=True)
    def address(self, nodes: Any) -> None:
        self.nodes = nodes

    def make(self, evaluate: Evaluate) -> Pool:
        return Cluster(evaluate, address=self.nodes.address)

    def test_each_node_has_a_worker(self) -> None:
        with closing(Cluster(by_text, address=self.nodes.address)) as pool:
            assert len(set(pool.processes())) == 2
            assert len(ray.nodes()) >= 2

    def test_a_study_has_batches_of_the_clusters_size(self, monkeypatch: pytest.MonkeyPatch) -> None:
        try:
            assert workers_of(self.nodes.address) == 2
            assert batch_of("ray", None, self.nodes.address) == batch_of(None, None, None) == 16
            monkeypatch.setattr("grainwise.workers.cluster._processors", lambda: 40)
            assert batch_of("ray", None, self.nodes.address) == 40
        finally:
            ray.shutdown()

    def test_a_profile_whose_worker_is_lost_is_given_to_another(self, tmp_path: Path) -> None:
        troubled = Troubled(tmp_path, "dies", times=1)
        with closing(Cluster(troubled, address=self.nodes.address)) as pool:
            assert {j.number: j.outcome for j in all_of(pool, PROFILES)} == TRUTH
        assert troubled.evaluations(3) == 2
        assert all(troubled.evaluations(number) == 1 for number in PROFILES if number != 3)

    def test_what_hangs_every_worker_fails_with_the_reason(self, tmp_path: Path) -> None:
        with closing(Cluster(Troubled(tmp_path, "hangs", times=9), None, 1.0, self.nodes.address)) as pool:
            found = {j.number: j.outcome for j in all_of(pool, PROFILES)}
        assert found == {**TRUTH, 3: Failure("worker", "it took longer than 1 s, 3 times")}

    def test_a_lost_node_costs_its_running_trial_alone(self, tmp_path: Path) -> None:
        """Twice the second node is lost and another one joins; every profile is judged once."""
        slow = Slow(tmp_path, 0.3)
        found: list[int] = []
        with closing(Cluster(slow, address=self.nodes.address)) as pool:
            pool.processes()
            for ended in pool.run(PROFILES, unknown, nobody, never):
                found += [judged.number for judged in ended]
                if len(self.nodes.worker_nodes) == 1 and self.lost < 2:
                    self.nodes.remove_node(next(iter(self.nodes.worker_nodes)), allow_graceful=False)
                    self.nodes.add_node(num_cpus=1)
                    self.lost += 1
        assert self.lost == 2 and sorted(found) == list(PROFILES)
        assert len(PROFILES) <= slow.evaluations() <= len(PROFILES) + 2

    lost = 0


def test_a_cluster_without_a_token_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("", "disabled"):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        with pytest.raises(RuntimeError, match="joins only a Ray cluster that asks for a token"):
            Cluster(by_text, 1, address="auto")


def test_a_cluster_that_is_not_there_is_told_in_one_sentence() -> None:
    with pytest.raises(RuntimeError, match="cannot be joined: ") as caught:
        Cluster(by_text, 1, address="127.0.0.1:1")
    assert "\n" not in str(caught.value)


def test_nothing_is_told_to_the_makers_of_ray() -> None:
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
