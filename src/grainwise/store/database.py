"""A database by URL, SQLite or PostgreSQL: its connections, and what its errors mean for people."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

_WAIT_SECONDS = 120.0  # for another process's transaction; each takes milliseconds
_WRITES = "grainwise_writes"
_DAMAGE = ("malformed", "not a database", "Could not decode", "corrupt")
_FULL = ("disk is full", "disk I/O error", "No space left")


class StoreError(RuntimeError):
    """The store cannot be used; the message names its URL, what is wrong and what to do."""


def connect(url: str) -> Engine:
    """Raises StoreError for a URL that is none, and one whose driver is not installed."""
    try:
        where = make_url(url)
        if where.drivername == "postgresql":
            where = where.set(drivername="postgresql+psycopg")
        if where.get_backend_name() not in ("sqlite", "postgresql"):
            raise StoreError(
                f"the store {named(where)} is of no kind that grainwise knows; give sqlite:/// or postgresql://"
            )
        # NaN is no JSON; a profile of 500 layers has 7 kB of blanks otherwise
        options: dict[str, Any] = {"json_serializer": partial(json.dumps, allow_nan=False, separators=(",", ":"))}
        if where.get_backend_name() == "sqlite":
            options["connect_args"] = {"timeout": _WAIT_SECONDS}
        else:
            options["pool_pre_ping"] = True  # a server may have restarted during a trial of an hour
        engine = create_engine(where, **options)
    except (ArgumentError, NoSuchModuleError) as error:
        raise StoreError(f"the store {url!r} is no URL; give one such as sqlite:///grainwise.db") from error
    except ModuleNotFoundError as error:
        raise StoreError(
            "a store in PostgreSQL needs the package psycopg: pip install 'grainwise[postgres]'"
        ) from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _durable)
        event.listen(engine, "begin", _begin)
    return engine


def writing(engine: Engine) -> Engine:
    """The same engine for transactions that write: on SQLite they take their place in the queue when they begin, since
    one that has read first and is overtaken would be refused ("database is locked").
    """
    return engine.execution_options(**{_WRITES: True})


def named(url: URL) -> str:
    """The URL for people, without its password."""
    return url.render_as_string(hide_password=True)


def path_of(url: URL) -> Path | None:
    """The file of an SQLite database; None for any other."""
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


def alone(connection: Connection) -> None:
    """Keep others from making the tables at the same time, until the transaction ends."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(7143623)"))  # any number that is always the same


def damage(connection: Connection) -> str | None:
    """What SQLite's own check finds wrong with its file, in one line."""
    if connection.dialect.name != "sqlite":
        return None  # a server checks its pages itself
    found = str(connection.execute(text("PRAGMA integrity_check(1)")).scalar())
    return None if found == "ok" else " ".join(found.split())


def advice(error: Exception, url: URL) -> str:
    """The first line of an error and, where there is something that can be done, what."""
    reason, file = next(iter(str(error).splitlines()), type(error).__name__), path_of(url)
    if any(sign in reason for sign in _DAMAGE):
        return f"{reason}; {recovery(url)}"
    if file is not None and any(sign in reason for sign in _FULL):
        free = shutil.disk_usage(file.parent).free
        return f"{reason}; {file.resolve().parent} has {free:,} bytes free: make room, then resume"
    return reason


def recovery(url: URL) -> str:
    return f"save what can be read with: grainwise db recover --store {named(url)} --out NEW.db"


def _durable(connection: Any, _: Any) -> None:
    """Write-ahead log, every commit forced to the disk, and transactions that begin when `_begin` says so."""
    connection.isolation_level = None
    cursor = connection.cursor()
    if cursor.execute("PRAGMA journal_mode").fetchone()[0] == "delete":  # else it is so already, or in memory
        cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
