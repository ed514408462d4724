"""List the views of the index, for `cachedb sql`."""

from __future__ import annotations

import re
from typing import NamedTuple

from cachedb.index.sqlite.database import Database

__all__ = ["View", "list_views"]


class View(NamedTuple):
    """A view of the index that users can query."""

    name: str
    columns: tuple[str, ...]
    description: str
    definition: str  # SQL


def list_views(database: Database) -> list[View]:
    """Return the views sorted by name, each with the description from its SQL."""
    found = []
    with database.read() as connection:
        rows = connection.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE type = 'view' ORDER BY name")
        for name, sql in rows.all():
            comment = re.search(r"^-- (.*)$", sql, re.MULTILINE)
            info = connection.exec_driver_sql("SELECT name FROM pragma_table_info(?)", (name,))
            found.append(View(name, tuple(info.scalars()), comment[1] if comment else "", sql))
    return found
