"""Look up rows without SQLAlchemy; a look-up takes a twentieth of the time of `Database.read`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

from sqlalchemy import Select
from sqlalchemy.dialects import sqlite

from cachedb.disk import forks
from cachedb.index.sqlite.connection import CacheConnection
from cachedb.index.sqlite.revision import SELECT_REVISION
from cachedb.index.tables import REVISION

__all__ = ["Lookups"]

_MAX_IDLE = 5  # connections to keep open, as many as SQLAlchemy's pool keeps


class Lookups:
    """Idle connections for look-ups; each is used by one thread at a time."""

    def __init__(self, open_: Callable[[], CacheConnection], is_current: Callable[[CacheConnection], bool]) -> None:
        """Take a function that opens a connection, and one that returns whether it has the current files open."""
        self._open, self._is_current = open_, is_current
        self._idle: list[CacheConnection] = []

    def find(self, statement: Select[*tuple[Any, ...]], values: Mapping[str, object]) -> list[tuple[Any, ...]] | None:
        """Return the rows of a statement, read in its own transaction; None if the schema is not ours.

        Raises:
            sqlite3.Error: if SQLite fails.
        """
        with forks.no_fork():
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self._open()
            try:
                if not self._is_current(connection):
                    connection.close()
                    connection = self._open()
                connection.execute("BEGIN")
                is_ours = connection.execute(SELECT_REVISION).fetchone() == (REVISION,)
                text, constants = _compile(statement)
                found = connection.execute(text, {**constants, **values}).fetchall() if is_ours else None
                connection.execute("COMMIT")
            except BaseException:
                connection.close()
                raise
            if len(self._idle) < _MAX_IDLE:
                self._idle.append(connection)
            else:
                connection.close()
            return found

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            with suppress(IndexError):  # another thread may close them too
                self._idle.pop().close()


@cache
def _compile(statement: Select[*tuple[Any, ...]]) -> tuple[str, dict[str, Any]]:
    """Return a statement's SQL, and the parameters that already have a value."""
    compiled = statement.compile(dialect=sqlite.dialect(paramstyle="named"))
    return str(compiled), dict(compiled.params)
