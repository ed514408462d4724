"""Share compiled statements among the engines of this process: a test compiles no statement that another has compiled.

SQLAlchemy compiles a statement once for each engine and dialect, and each test has at least one engine of its own.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy
from sqlalchemy import Engine
from sqlalchemy.util import LRUCache

from cachedb.index.sqlite import database

_shared: dict[str, Any] = {}  # the dialect of the first engine, and its compiled statements


def share() -> None:
    """Make all databases that this process opens from now on share their statements."""
    database.create_engine = create_engine  # type: ignore[attr-defined]


def create_engine(*arguments: Any, **options: Any) -> Engine:
    """Create an engine with the shared statements."""
    engine = sqlalchemy.create_engine(*arguments, **options)
    if not _shared:
        _shared.update(dialect=engine.dialect, statements=LRUCache(2000))
    # Statements are found by their dialect, too.
    engine.dialect = engine.pool._dialect = _shared["dialect"]
    engine._compiled_cache = _shared["statements"]
    return engine
