"""What searches that were killed have left behind: half-written files, and trials in the hands of nobody."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from grainwise.store.studies import Store

_OLD_SECONDS = 3600.0  # of a half-written file: nobody writes one for an hour


@dataclass(frozen=True, slots=True)
class Litter:
    """files: half-written ones. studies: names of those whose unfinished trials are in dead hands of this machine."""

    files: tuple[Path, ...]
    studies: tuple[str, ...]


def find(folder: Path, store: Store | None) -> Litter:
    """In the folder of solved layers, and in a store if there is one. Hands of other machines are left alone."""
    files = [path for path in sorted(folder.glob("*.part")) if time.time() - path.stat().st_mtime > _OLD_SECONDS]
    names = store.studies() if store is not None else ()
    return Litter(tuple(files), tuple(name for name in names if store is not None and _abandoned(store, name)))


def remove(litter: Litter, store: Store | None) -> None:
    """A search that goes on asks for the trials again, so nothing is lost."""
    for path in litter.files:
        path.unlink(missing_ok=True)
    for name in litter.studies:
        if store is not None:
            store.queue(name, [])


def _abandoned(store: Store, name: str) -> bool:
    running = store.study(name).running
    return bool(running) and all(_dead(trial.worker) for trial in running)


def _dead(worker: str) -> bool:
    """worker: `host:process` or, of a pool, `host:process/seat`."""
    host, _, process = worker.partition("/")[0].rpartition(":")
    if host != socket.gethostname() or not process.isdecimal():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False
