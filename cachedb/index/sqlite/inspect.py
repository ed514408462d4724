"""Find the faults of a database file: damage, broken references, dropped objects, a lost WAL mode."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice

from sqlalchemy import Connection, select

from cachedb.disk.layout import OLDEST
from cachedb.errors import DamagedIndex, os_errors
from cachedb.index.sqlite.connection import has_locks
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.revision import (
    find_broken_keys,
    is_compatible,
    read_objects,
    read_oldest,
    read_revision,
    read_versions,
    schema_error,
)
from cachedb.index.tables import METADATA, REVISION, VIEWS

__all__ = ["find_faults", "read_journal_mode"]

_IN_WAL_MODE = b"\x02\x02"  # at offset 18 of the file (https://sqlite.org/fileformat2.html, 1.3.3)


def find_faults(database: Database, *, quick: bool = False) -> list[str]:
    """Return the faults of a database file, one line each; at most a hundred of each kind.

    The rows of an index with another schema are not read.

    Args:
        database: the index to check.
        quick: do not compare the indexes with their tables, and do not read all rows.
    """
    if database.file.is_new:
        return ["the index is lost"]
    try:
        database.revision()
        with database.look() as connection:
            revision = read_revision(connection)
            if not revision:
                raise schema_error(database.directory, None)
            check = f"PRAGMA {'quick_check' if quick else 'integrity_check'}(100)"
            found = [str(line) for line in connection.exec_driver_sql(check).scalars() if line != "ok"]
            found.extend(islice(find_broken_keys(connection), 100))
            found += _find_outside_changes(connection)
            for table in METADATA.sorted_tables if is_compatible(connection) else ():
                # Constraints accept text that is not UTF-8 and some invalid times, but reading them fails.
                for _ in connection.execute(select(table).limit(0 if quick else None)):
                    pass
            return found
    except DamagedIndex as error:
        return [str(error)]
    except ValueError as error:
        return [f"a row cannot be read: {error}"]


def _find_outside_changes(connection: Connection) -> Iterator[str]:
    """Yield what other programs have changed in this release's schema, if a rebuild repairs it."""
    versions = read_versions(connection)
    if REVISION not in versions:
        return
    if len(versions) > 1:
        yield f"it has several revisions: {', '.join(sorted(versions))}"
    if (oldest := read_oldest(connection)) != OLDEST:
        yield f"its user_version is {oldest}, and should be {OLDEST}: releases with another schema may write to it"
    indexes = {str(index.name) for table in METADATA.tables.values() for index in table.indexes}
    for name in sorted({*METADATA.tables, *indexes, *VIEWS} - {name for _, name in read_objects(connection)}):
        yield f"another program has dropped {name!r}"


def read_journal_mode(database: Database) -> str:
    """Return the journal mode that is stored in the index: ``wal``, unless an outside program switched it."""
    with database.look() as connection:
        mode = str(connection.exec_driver_sql("PRAGMA journal_mode").scalar_one())
    found = database.identify_file()
    if "changed=" in found[2]:  # SQLite read a copy in memory
        mode = "wal"
        if not has_locks(found):
            with os_errors("read the index"), database.path.open("rb") as file:
                mode = "wal" if os.pread(file.fileno(), 2, 18) == _IN_WAL_MODE else "delete"
    return mode
