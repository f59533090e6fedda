"""A PostgreSQL server for the tests: Debian's binaries, a directory of its own, on loopback, gone with the tests."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

DEBIAN = Path("/usr/lib/postgresql")  # where its packages put the server's programs, by version


def _programs() -> Path:
    """The folder of the newest server. Skips the test, saying so, where there is none."""
    found = sorted(DEBIAN.glob("*/bin"), key=lambda folder: int(folder.parent.name))
    if not found:
        pytest.skip("no PostgreSQL server is installed here (Debian's package postgresql): SQLite alone was tested")
    return found[-1]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(durable: bool = False) -> Iterator[str]:
    """The URL of a running server, without a database. The server refuses to run as root, so root lends it a user.

    durable: force what is written to the disk; else not, since what is on it goes with the tests.
    """
    programs, port = _programs(), _free_port()
    user = "postgres" if os.getuid() == 0 else None
    folder = tempfile.mkdtemp(prefix="grainwise-postgres-")
    if user:
        shutil.chown(folder, user)
    try:
        made = [
            programs / "initdb",
            "-D",
            f"{folder}/data",
            "-U",
            "grainwise",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-sync",
        ]
        subprocess.run([str(word) for word in made], check=True, capture_output=True, user=user, cwd=folder)
        given = [*([] if durable else ["-F"]), "-D", f"{folder}/data", "-k", folder, "-h", "127.0.0.1", "-p", str(port)]
        with open(f"{folder}/log", "wb") as log:
            process = subprocess.Popen([programs / "postgres", *given], user=user, cwd=folder, stdout=log, stderr=log)
        try:
            _wait(programs, port, Path(folder))
            yield f"postgresql://grainwise@127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)  # "fast": clients are cut off, data is written
            process.wait(30)
    finally:
        shutil.rmtree(folder)


def _wait(programs: Path, port: int, folder: Path) -> None:
    for _ in range(300):
        ready = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
        if subprocess.run([str(word) for word in ready], check=False).returncode == 0:
            return
        time.sleep(0.1)
    raise RuntimeError(f"PostgreSQL did not start in 30 s:\n{(folder / 'log').read_text()}")
