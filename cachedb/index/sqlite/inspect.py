"""What is wrong with a database file itself: damage, broken references, and a switched journal mode."""

from __future__ import annotations

import os

from sqlalchemy import select

from cachedb.errors import DamagedIndex, os_errors
from cachedb.index.sqlite.database import Database
from cachedb.index.tables import METADATA

__all__ = ["find_faults", "read_journal_mode"]

_IN_WAL_MODE = b"\x02\x02"  # at offset 18 of the file (https://sqlite.org/fileformat2.html, 1.3.3)


def find_faults(database: Database, *, quick: bool = False) -> list[str]:
    """Return what is wrong with the database itself, a line each; the first hundred at most.

    Args:
        quick: do not compare the indexes with their tables.
    """
    if database.file.is_new:
        return ["it is lost"]
    try:
        database.revision()
        with database.read() as connection:
            check = f"PRAGMA {'quick_check' if quick else 'integrity_check'}(100)"
            found = [str(line) for line in connection.exec_driver_sql(check).scalars() if line != "ok"]
            for table, row, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check").fetchmany(100):
                found.append(f"row {row} of {table} refers to a row of {parent} that is not there")
            for table in METADATA.sorted_tables:
                # Text that is no text, and a time that is none, are within all constraints.
                for _ in connection.execute(select(table).limit(0 if quick else None)):
                    pass
            return found
    except DamagedIndex as error:
        return [str(error)]
    except ValueError as error:
        return [f"a row cannot be read: {error}"]


def read_journal_mode(database: Database) -> str:
    """Return the journal mode that is stored in the index: ``wal``, unless an outside program switched it."""
    with database.look() as connection:
        mode = str(connection.exec_driver_sql("PRAGMA journal_mode").scalar_one())
    if "changed=" in database.identify_file()[2]:  # a copy in memory was read; SQLite holds no lock to lose
        with os_errors("read the index"), database.path.open("rb") as file:
            mode = "wal" if os.pread(file.fileno(), 2, 18) == _IN_WAL_MODE else "delete"
    return mode
