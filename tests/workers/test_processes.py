"""The pool of processes: the contract, lost and hung workers, one copy of the tensors."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from grainwise.study.measurement import Failure, Measurement, Outcome
from grainwise.workers.pool import Evaluate, Pool
from grainwise.workers.processes import Processes
from tests.workers.evaluations import (
    PROFILES,
    Growing,
    Slow,
    Troubled,
    Unreadable,
    Watched,
    all_of,
    broken,
    by_text,
    never,
    nobody,
    own_kilobytes,
    unknown,
)
from tests.workers.pool_contract import PoolContract


class TestProcesses(PoolContract):
    def make(self, evaluate: Evaluate) -> Pool:
        return Processes(evaluate, 2)


def judged(troubled: Troubled, limit: float | None = None) -> dict[int, Outcome]:
    with closing(Processes(troubled, 2, limit)) as pool:
        found = all_of(pool, PROFILES)
    assert len(found) == len(PROFILES)
    return {each.number: each.outcome for each in found}


def own_memory() -> int:
    """kB of this process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


TRUTH = {number: by_text(entries) for number, entries in PROFILES.items()}


@pytest.mark.parametrize(("trouble", "limit"), [("dies", None), ("stops", 1.0)])
def test_a_profile_whose_worker_is_lost_is_given_to_another(tmp_path: Path, trouble: str, limit: float | None) -> None:
    troubled = Troubled(tmp_path, trouble, times=1)
    assert judged(troubled, limit) == TRUTH
    assert troubled.evaluations(3) == 2
    assert all(troubled.evaluations(number) == 1 for number in PROFILES if number != 3)


def test_what_loses_every_worker_fails_with_the_reason(tmp_path: Path) -> None:
    troubled = Troubled(tmp_path, "dies", times=9)
    assert judged(troubled) == {**TRUTH, 3: Failure("worker", "its worker was lost, 3 times")}
    assert troubled.evaluations(3) == 3


def test_workers_map_one_copy_and_write_to_their_own_pages() -> None:
    watched = Watched()
    assert own_kilobytes(watched.weights.data_ptr()) > 60_000  # what a copy would have
    with closing(Processes(watched, 1)) as pool:
        for judged in all_of(pool, PROFILES):
            assert isinstance(judged.outcome, Measurement) and judged.outcome.size_bytes < 100
    assert float(watched.weights[0]) == 1.0


def test_a_worker_that_keeps_what_it_needs_again_is_not_taken_for_one_that_leaks() -> None:
    with closing(Processes(Growing(), 1)) as pool:
        found = [judged.outcome for judged in all_of(pool, PROFILES)]
    assert [each.size_bytes for each in found if isinstance(each, Measurement)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_killed_search_leaves_no_workers(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        pool = Processes(Troubled(tmp_path, "hangs", times=9), 1)
        all_of(pool, {3: PROFILES[3]})
        os._exit(0)
    while not (tmp_path / "3").exists() or not (tmp_path / "3").read_text().endswith("\n"):
        time.sleep(0.05)
    worker = int((tmp_path / "3").read_text())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for _ in range(200):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    raise AssertionError("the worker still runs 10 s after its search was killed")


def test_faults_are_told() -> None:
    with closing(Processes(broken, 1)) as pool, pytest.raises(KeyError, match="a fault of the evaluation itself"):
        all_of(pool, PROFILES)
    with pytest.raises(ValueError, match="at least one worker, got 0"):
        Processes(by_text, 0)
    with pytest.raises(ValueError, match="above 0, got -1"):
        Processes(by_text, 1, -1)


def test_a_worker_that_does_not_start_is_told() -> None:
    with closing(Processes(Unreadable(), 1)) as pool, pytest.raises(RuntimeError, match="does not start"):
        all_of(pool, PROFILES)


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield
    for _ in range(100):
        if not [t for t in threading.enumerate() if "QueueManager" in t.name or "ExecutorManager" in t.name]:
            return
        time.sleep(0.1)
    raise AssertionError(f"left: {threading.enumerate()}")


def test_a_worker_that_runs_out_of_memory_costs_its_own_trial_alone(tmp_path: Path) -> None:
    """Profile 3 asks for more than its process may have; the next one runs in a worker as before."""
    before = own_memory()
    found = judged(Troubled(tmp_path, "swells", times=9))
    assert found == {**TRUTH, 3: Failure("evaluate", "out of memory")}
    assert own_memory() < before + 50_000


def test_many_kills_leave_each_trial_in_one_state(tmp_path: Path) -> None:
    """Workers are killed in turn, 3 times in 14 profiles, while they evaluate; each kill costs one evaluation."""
    slow, kills, found = Slow(tmp_path, 0.15), 0, list[int]()
    profiles = {number: PROFILES[number % 7] for number in range(14)}
    with closing(Processes(slow, 2)) as pool:
        pool.processes()
        for ended in pool.run(profiles, unknown, nobody, never):
            found += [each.number for each in ended if each.outcome == TRUTH[each.number % 7]]
            if len(found) // 4 > kills and kills < 3:
                os.kill(int((tmp_path / "log").read_text().split()[-1]), signal.SIGKILL)
                kills += 1
    assert kills == 3 and sorted(found) == list(profiles)
    assert slow.evaluations() <= len(profiles) + kills
