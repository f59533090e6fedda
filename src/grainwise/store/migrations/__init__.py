"""How a store came to be as it is, one step a file (Alembic); `HEAD` is the step that the present code reads."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, inspect, text

HEAD = "0002"
STEPS = ("0001", "0002")
_NOT_YET_NUMBERED = "grainwise_schema"  # the table by which version 0.1 knew its databases


class ForeignDatabase(ValueError):
    """The database holds tables, but not grainwise's."""


def step_of(connection: Connection) -> str | None:
    """The last step that a database has been through; None for an empty one. Raises ForeignDatabase."""
    tables = inspect(connection).get_table_names()
    if "alembic_version" in tables:
        return str(connection.execute(text("SELECT version_num FROM alembic_version")).scalar())
    if _NOT_YET_NUMBERED in tables:
        return STEPS[0]
    if tables:
        raise ForeignDatabase("it holds tables of something else")
    return None


def migrate(connection: Connection) -> None:
    """Take a database to `HEAD`, within the transaction that `connection` is in."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    if step_of(connection) == STEPS[0] and "alembic_version" not in inspect(connection).get_table_names():
        command.stamp(config, STEPS[0])
    command.upgrade(config, HEAD)
