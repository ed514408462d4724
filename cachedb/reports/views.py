"""List the views of the index, for `cachedb sql`."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from sqlalchemy import Connection

from cachedb.index.sqlite.database import Database

__all__ = ["BOOLEAN_COLUMNS", "Column", "View", "list_views"]


BOOLEAN_COLUMNS: Final = frozenset({"complete", "held", "pinned", "stored"})
"""The columns of views that are 1 or 0 for yes or no; SQLite has no type for them."""


_COLUMN_LINE = re.compile(r"^    (.+) AS (\w+),? -- (.*)$", re.MULTILINE)
_CAST = re.compile(r"CAST\(.* AS (\w+)\)")
_TYPES = {"BIGINT": "INTEGER", "INT": "INTEGER", "NUM": "NUMERIC"}


class Column(NamedTuple):
    """A column of a view."""

    name: str
    type: str  # INTEGER, REAL or TEXT
    description: str


class View(NamedTuple):
    """A view of the index that users can query."""

    name: str
    columns: tuple[Column, ...]
    description: str
    definition: str  # SQL


def list_views(database: Database) -> list[View]:
    """Return the views sorted by name, each with the description from its SQL."""
    found = []
    with database.read() as connection:
        rows = connection.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE type = 'view' ORDER BY name")
        for name, sql in rows.all():
            comment = re.search(r"^-- (.*)$", sql, re.MULTILINE)
            found.append(View(name, _read_columns(connection, name, sql), comment[1] if comment else "", sql))
    return found


def _read_columns(connection: Connection, view: str, sql: str) -> tuple[Column, ...]:
    """Return the columns of a view, described by lines ``expression AS name, -- description``."""
    described = {name: (expression, text) for expression, name, text in _COLUMN_LINE.findall(sql)}
    columns = []
    for name, declared in connection.exec_driver_sql("SELECT name, type FROM pragma_table_info(?)", (view,)):
        expression, text = described.get(name, ("", ""))
        # Before version 3.41, SQLite does not report the type of a CAST.
        cast = _CAST.fullmatch(expression)
        found = declared or (cast[1] if cast else "")
        columns.append(Column(name, _TYPES.get(found, found), text))
    return tuple(columns)
