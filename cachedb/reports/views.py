"""The views of the index, as `cachedb sql --tables` lists them."""

from __future__ import annotations

import re
from typing import NamedTuple

from cachedb.index.sqlite.database import Database

__all__ = ["View", "views"]


class View(NamedTuple):
    """A view of the index, for people to ask."""

    name: str
    columns: tuple[str, ...]
    description: str
    definition: str  # SQL


def views(database: Database) -> list[View]:
    """Return the views, in the order of their names, each with what is said of it in its SQL."""
    found = []
    with database.read() as connection:
        rows = connection.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE type = 'view' ORDER BY name")
        for name, sql in rows.all():
            said = re.search(r"^-- (.*)$", sql, re.MULTILINE)
            info = connection.exec_driver_sql("SELECT name FROM pragma_table_info(?)", (name,))
            found.append(View(name, tuple(info.scalars()), said[1] if said else "", sql))
    return found
