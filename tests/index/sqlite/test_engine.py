"""Engines: statements that all databases share, and databases that can be forgotten."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import literal, select
from sqlalchemy.sql.compiler import SQLCompiler

from cachedb import Cache
from cachedb.index.sqlite.database import Database


def test_a_statement_is_compiled_once_for_all_databases_of_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[object] = []
    visit_select: Callable[..., str] = SQLCompiler.visit_select

    def count(*arguments: object, **options: object) -> str:
        compiled.append(arguments)
        return visit_select(*arguments, **options)

    monkeypatch.setattr(SQLCompiler, "visit_select", count)
    for name in ("one", "two"):
        with Cache.open(tmp_path / name) as cache:
            database = Database(cache.directory)
            with database.read() as connection:
                compiled.clear()
                query = select(literal(7).label("only_here"), literal(name).label("name"))
                assert tuple(connection.execute(query).one()) == (7, name)
                assert len(compiled) == (1 if name == "one" else 0)
            database.end()


def test_a_compiled_statement_does_not_keep_its_database(directory: Path) -> None:
    with Cache.open(directory):
        database = Database(directory)
        with database.read() as connection:
            connection.execute(select(literal(8).label("in_a_database_to_forget")))
        database.end()
        found = weakref.ref(database)
        del database, connection
        gc.collect()
        assert found() is None
