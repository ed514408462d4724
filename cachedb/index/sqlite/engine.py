"""Make SQLAlchemy's engines, which share their compiled statements.

To compile a statement takes ten times as long as to execute it. So a process compiles each once for all caches that it
opens.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.util import LRUCache

from cachedb.index.sqlite.connection import CacheConnection
from cachedb.index.sqlite.errors import FAILURES, translate
from cachedb.index.sqlite.transaction import begin

__all__ = ["SharedDialect", "make_engine"]


_STATEMENTS: Final = LRUCache[object, object](500)


class SharedDialect(SQLiteDialect_pysqlite):
    """The dialect of all indexes.

    All instances are equal, because SQLAlchemy finds a compiled statement by its dialect.
    """

    supports_statement_cache = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SharedDialect)

    def __hash__(self) -> int:
        return hash(SharedDialect)


registry.register("sqlite.cachedb", __name__, SharedDialect.__name__)


def make_engine(path: Path, directory: Path, open_: Callable[[], CacheConnection]) -> Engine:
    """Return an engine that raises the errors of `cachedb.errors`.

    Args:
        path: of the index.
        directory: of the cache.
        open_: opens a connection.
    """
    url = URL.create("sqlite+cachedb", database=str(path))
    engine = create_engine(
        url,
        max_overflow=-1,  # no limit, so that each thread can get a connection
        creator=open_,
        query_cache_size=0,
        execution_options={"compiled_cache": _STATEMENTS},
    )
    event.listen(engine, "begin", begin)
    # A compiled statement refers to its dialect, and that to this listener. So the listener must not refer to the
    # database.
    event.listen(engine, "handle_error", partial(_raise_ours, path, directory))
    return engine


def _raise_ours(path: Path, directory: Path, context: ExceptionContext) -> None:
    error = context.original_exception
    if isinstance(error, FAILURES) and not isinstance(error, sqlite3.IntegrityError):
        raise translate(error, path, directory) from error
    if isinstance(error, Exception) and not isinstance(error, sqlite3.Error):
        raise error  # from a signal handler: SQLAlchemy would wrap it as an error of the statement
