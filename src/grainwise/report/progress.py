"""Live progress of a search or a recovery: stage, ETA, best so far, evaluations per second."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from grainwise.study.trial import Trial

STAGES = {
    "trace": "tracing",
    "latency": "timing kernels",
    "students": "training students",
    "sensitivity": "scoring choices",
    "search": "searching",
    "recover": "recovering",
    "finish": "finishing",
    "accuracy": "running the test split",
}


class LiveProgress:
    """A context in which stages and trials are shown on standard error as they come.

    trials: how many the search will have, when that is known.
    """

    def __init__(self, trials: int | None) -> None:
        self._trials = trials
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._task: TaskID | None = None
        self._seconds = 0.0
        self._done = 0

    def __enter__(self) -> LiveProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage(self, name: str) -> None:
        if self._task is not None:
            self._progress.stop_task(self._task)
        total = self._trials if name == "search" else None
        self._task = self._progress.add_task(STAGES[name], total=total, note="")

    def progress(self, done: int, total: int) -> None:
        assert self._task is not None
        self._progress.update(self._task, completed=done, total=total)

    def step(self, done: int, total: int, note: str) -> None:
        """total: 0 while it is not known."""
        assert self._task is not None
        self._progress.update(self._task, completed=done, total=total or None, note=note)

    def trial(self, trial: Trial, leader: Trial | None) -> None:
        assert self._task is not None
        self._seconds += trial.seconds
        self._done += 1
        rate = f"{self._done / self._seconds:.1f}/s" if self._seconds else ""
        note = f"{rate}, none within the budgets yet"
        if leader is not None and leader.measurement is not None:
            found = leader.measurement
            note = (
                f"{rate}, best #{leader.number}: metric {found.metric:.4f}, divergence {found.divergence:.4f}, "
                f"{found.size_bytes:,} B, {found.macs / 1e6:.3g} M MACs"
                + (f", {found.latency_ms:.3g} ms" if found.latency_ms else "")
            )
        self._progress.update(self._task, completed=trial.number + 1, note=note)
