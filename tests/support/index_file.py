"""Read and change the index of a cache as another program would, by a connection of its own."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path


def change_index(directory: Path, sql: str) -> None:
    """Execute one statement, without the write lock."""
    with closing(sqlite3.connect(directory / "index.db")) as shell, shell:
        shell.execute(sql)


def list_tables(directory: Path) -> set[str]:
    with closing(sqlite3.connect(directory / "index.db")) as shell:
        return {name for (name,) in shell.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def read_rows(directory: Path) -> dict[str, list[tuple[object, ...]]]:
    """Return all rows of all tables except Alembic's."""
    names = list_tables(directory) - {"alembic_version"}
    with closing(sqlite3.connect(directory / "index.db")) as shell:
        return {name: sorted(shell.execute(f"SELECT * FROM {name}"), key=repr) for name in names}
