"""The store on PostgreSQL, with a server of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
from sqlalchemy import create_engine, text

from tests.store.postgres import server
from tests.store.store_contract import StoreContract

_NUMBERS = count()


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    pytest.importorskip("psycopg", reason="the package psycopg is not installed: SQLite alone was tested")
    with server() as url:
        yield url


class TestPostgres(StoreContract):
    driver = "postgresql+psycopg"

    @pytest.fixture
    def url(self, postgres: str) -> str:
        name = f"studies{next(_NUMBERS)}"
        engine = create_engine(f"{postgres}/postgres".replace("postgresql:", f"{self.driver}:"))
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        engine.dispose()
        return f"{postgres}/{name}"
