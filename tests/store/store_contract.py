"""What a store must do on every database: subclass `StoreContract` and supply `url`."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, make_url, text

from grainwise.plan.choices import PRECISIONS, STRUCTURES, Entry
from grainwise.store.schema import Base
from grainwise.store.studies import Checkpoint, Store, StoreError, UnderWay
from grainwise.study.measurement import Failure, Measurement
from grainwise.study.trial import State, Task, Trial

ENTRIES = {"b": Entry(STRUCTURES[5], PRECISIONS[3]), "a": Entry(STRUCTURES[2])}
MEASURED = Measurement(0.5, 0.1, 10, 20)
DONE = Trial(0, ENTRIES, MEASURED, 0.9, "controller", 0.25, (0.2, 0.9), 0, "host:1", 1.75e9)
FAILED = Trial(1, ENTRIES, Failure("build", "why"), None, "controller", 0.5, (), 0, "host:1", 1.75e9)
TASKS = [Task(number, ENTRIES, "random", 0) for number in range(3)]


def trial(number: int, worker: str = "host:1") -> Trial:
    return replace(DONE, number=number, worker=worker)


def fill(url: str, first: int, count: int, layers: int, begin: Any, told: Any) -> None:
    """A process that queues, starts and adds trials of its own numbers, as the driver does; tells when it is done."""
    store = Store(url)
    entries = {f"layer{index}": Entry(STRUCTURES[5], PRECISIONS[3]) for index in range(layers)}
    begin.wait()
    try:
        for number in range(first, first + count):
            store.start("s", {number: f"host:{first}"}, 1.75e9)
            store.add("s", replace(trial(number, f"host:{first}"), entries=entries), keys={number: f"key {number % 7}"})
        told.put("done")
    except StoreError as error:
        told.put(str(error))
    store.close()


def fill_together(url: str, processes: int, count: int, layers: int) -> list[str]:
    """What `processes` processes tell, that fill one study with `count` trials each at the same time."""
    store = Store(url)
    store.create("s", {})
    entries = {f"layer{index}": Entry(STRUCTURES[5], PRECISIONS[3]) for index in range(layers)}
    store.queue("s", [Task(number, entries, "random", 0) for number in range(processes * count)])
    store.close()
    fork = multiprocessing.get_context("fork")
    begin, told = fork.Event(), fork.Queue()
    arguments = [(url, place * count, count, layers, begin, told) for place in range(processes)]
    running = [fork.Process(target=fill, args=given) for given in arguments]
    for process in running:
        process.start()
    begin.set()
    found = [told.get(timeout=300) for _ in running]
    for process in running:
        process.join()
    return found


class StoreContract:
    """`url` names a database that is there and empty, or can be made."""

    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def store(self, url: str) -> Iterator[Store]:
        opened = Store(url)
        opened.create("s", {"seed": 1})
        yield opened
        opened.close()

    def test_trials_and_checkpoint_survive_reopening(self, store: Store, url: str) -> None:
        for given in (FAILED, DONE):
            store.add("s", given)
        store.save_checkpoint("s", Checkpoint(1, {"a": 1}, b"x"))
        store.save_checkpoint("s", Checkpoint(2, {"a": 2, "7": {"10": 1, "9": 2}}, b"\x00y"))
        store.close()
        again = Store(url, create=False)
        assert again.trials("s") == (DONE, FAILED)
        assert list(again.trials("s")[0].entries) == list(ENTRIES)
        assert again.checkpoint("s") == Checkpoint(2, {"a": 2, "7": {"10": 1, "9": 2}}, b"\x00y")
        assert again.settings("s") == {"seed": 1}
        assert again.studies() == ("s",)
        again.close()

    def test_a_trial_goes_from_the_queue_through_a_workers_hands_to_its_end(self, store: Store) -> None:
        store.queue("s", TASKS)
        assert store.study("s").counts == {State.PENDING: 3}
        store.start("s", {1: "host:1", 2: "host:1"}, 5.5)
        assert store.study("s").running == (UnderWay(1, "host:1", 5.5), UnderWay(2, "host:1", 5.5))
        store.add("s", FAILED)
        store.start("s", {2: "host:2"}, 6.5)  # given to another worker, since the first was lost
        store.add("s", trial(2, "host:2"))
        assert store.study("s").counts == {State.PENDING: 1, State.FAILED: 1, State.DONE: 1}
        assert store.trials("s") == (FAILED, trial(2, "host:2"))
        store.queue("s", [])
        assert State.PENDING not in store.study("s").counts
        assert len(store.trials("s")) == 2

    def test_late_answers_of_others_are_refused(self, store: Store) -> None:
        store.queue("s", TASKS)
        store.start("s", {0: "host:1"}, 5.5)
        store.queue("s", TASKS)  # a second process resumes the study
        for late in (trial(0), trial(3, "host:9")):
            if late.number == 0:
                with pytest.raises(StoreError, match="trial 0 of study 's' .* another process searches this study"):
                    store.add("s", late)
            else:
                store.add("s", late)  # of no queue: nobody else has it
        store.start("s", {0: "host:2"}, 6.5)
        store.add("s", trial(0, "host:2"))
        with pytest.raises(StoreError, match="finished"):
            store.add("s", trial(0, "host:2"))
        with pytest.raises(StoreError, match="finished"):
            store.start("s", {1: "host:1", 0: "host:1"}, 7.5)
        assert store.study("s").counts[State.PENDING] == 2  # all or none were started

    @pytest.mark.parametrize(
        "entries",
        [
            {**ENTRIES, "a": Entry(STRUCTURES[3])},
            {**ENTRIES, "b": Entry(STRUCTURES[5])},
            {"a": ENTRIES["a"]},
            {**ENTRIES, "c": Entry(STRUCTURES[2])},
        ],
    )
    def test_an_answer_for_another_profile_is_refused(self, store: Store, entries: dict[str, Entry]) -> None:
        store.queue("s", TASKS)
        store.start("s", {0: "host:1"}, 5.5)
        with pytest.raises(StoreError, match="trial 0 of study 's' .* another process searches this study"):
            store.add("s", replace(trial(0), entries=entries))
        store.add("s", replace(trial(0), entries={**ENTRIES, "c": Entry()}))  # no entry is the same as an empty one

    def test_measurements_serve_other_studies_and_failures_do_not(self, store: Store, url: str) -> None:
        store.create("other", {})
        store.add("s", DONE, keys={0: "k"})
        store.add("s", FAILED, keys={1: "f"})
        store.add("other", DONE, keys={0: "k"})
        store.add("other", FAILED)
        assert store.measurement("f") is None
        assert store.measurement("") is None
        store.close()
        again = Store(url)
        assert again.measurement("k") == DONE.outcome
        again.close()

    def test_names_are_checked(self, store: Store) -> None:
        with pytest.raises(StoreError, match="already"):
            store.create("s", {})
        with pytest.raises(StoreError, match="has no study 'other'; it has 's'"):
            store.trials("other")
        assert store.checkpoint("s") is None

    def test_what_is_not_finite_is_never_written(self, store: Store) -> None:
        for checkpoint in (Checkpoint(1, {"a": math.nan}, b""), Checkpoint(1, {"a": [math.inf]}, b"")):
            with pytest.raises(StoreError, match="JSON"):
                store.save_checkpoint("s", checkpoint)
        with pytest.raises(StoreError, match="JSON"):
            store.create("n", {"aim": math.nan})
        with pytest.raises(StoreError, match="JSON"):
            store.add("s", replace(DONE, reward=math.nan))
        assert store.checkpoint("s") is None and store.studies() == ("s",) and not store.trials("s")

    def test_a_newer_database_is_refused_in_words(self, store: Store, url: str) -> None:
        store.close()
        self.change(url, "UPDATE alembic_version SET version_num = '0099'")
        for upgrade in (False, True):
            with pytest.raises(StoreError, match="newer version of grainwise .*0099.* there is no way back"):
                Store(url, upgrade=upgrade)

    def test_a_row_that_was_changed_is_seen(self, store: Store, url: str) -> None:
        store.add("s", DONE, keys={0: "k"})
        store.save_checkpoint("s", Checkpoint(1, {"a": 1}, b"x"))
        changes = {
            "UPDATE trials SET reward = 0.8": lambda: store.trials("s"),
            "UPDATE measurements SET body = '{\"metric\": 0.6}'": lambda: store.measurement("k"),
            "UPDATE checkpoints SET trials = 0": lambda: store.checkpoint("s"),
            "UPDATE checkpoints SET trials = 2": lambda: store.trials("s"),  # one of two was lost
            "UPDATE studies SET settings = '{\"seed\": 2}'": lambda: store.settings("s"),
        }
        for change, read in changes.items():
            self.change(url, change)
            with pytest.raises(StoreError, match="is damaged .*db recover"):
                read()

    def test_the_tables_are_those_that_the_code_knows(self, store: Store, url: str) -> None:
        engine = create_engine(make_url(url).set(drivername=store._engine.url.drivername))
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            found = compare_metadata(context, Base.metadata)
        engine.dispose()
        assert [change[1].name for change in found if isinstance(change, tuple)] == ["grainwise_schema"]
        assert all(isinstance(change, tuple) for change in found)

    def test_processes_that_open_and_fill_one_study_do_not_hinder_each_other(self, url: str) -> None:
        assert fill_together(url, processes=4, count=25, layers=20) == ["done"] * 4
        store = Store(url)
        assert [t.number for t in store.trials("s")] == list(range(100))
        store.close()

    def change(self, url: str, statement: str) -> None:
        """Do to the database what no code of ours does."""
        engine = create_engine(make_url(url).set(drivername=self.driver))
        with engine.begin() as connection:
            connection.execute(text(statement.replace(":", "\\:")))
        engine.dispose()

    driver = "sqlite"
