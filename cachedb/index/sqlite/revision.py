"""Read the application_id, the revision and the objects of a database file; find broken keys."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from cachedb.disk import marker
from cachedb.disk.existence import exists
from cachedb.errors import CacheError, DamagedIndex, NotACache, NotInCache, SchemaMismatch, StorageError, os_errors
from cachedb.index.tables import REVISION

__all__ = [
    "APPLICATION_ID",
    "REBUILD_ADVICE",
    "SELECT_REVISION",
    "explain_refusal",
    "find_broken_keys",
    "has_backup",
    "has_cache",
    "is_compatible",
    "is_empty",
    "is_ours",
    "lost_index_error",
    "no_cache_error",
    "read_objects",
    "read_oldest",
    "read_own_revision",
    "read_revision",
    "read_versions",
    "revision_of",
    "schema_error",
]


_IN_THE_WAY = re.compile(r"error in (index|trigger|view) (.+?)(?: after [a-z ]+)?: (.+)")


def read_objects(connection: Connection) -> dict[tuple[str, str], str]:
    """Return the objects of a database by kind and name, each as its SQL without layout."""
    # SQLite creates an index for a constraint, and `ANALYZE` creates statistics. Include all other names that begin
    # with `sqlite_`: they are forged, which `PRAGMA writable_schema` allows.
    query = """SELECT type, name, sql FROM sqlite_master WHERE NOT (type = 'index' AND sql IS NULL)
        AND NOT (type = 'table' AND name IN ('sqlite_sequence', 'sqlite_stat1', 'sqlite_stat3', 'sqlite_stat4'))"""
    return {(kind, name): " ".join(str(sql).split()) for kind, name, sql in connection.exec_driver_sql(query)}


def explain_refusal(error: BaseException) -> str | None:
    """Explain why SQLite refuses a migration because of a row or an object of another program; else None."""
    if isinstance(error, IntegrityError):
        return f"SQLite refused a row: {error.orig}"
    if isinstance(error, StorageError) and (found := _IN_THE_WAY.fullmatch(str(error.__cause__))):
        kind, name, reason = found.groups()
        return f"the {kind} {name!r} uses what the change removes ({reason}): drop it first"
    return None


def find_broken_keys(connection: Connection) -> Iterator[str]:
    """Yield a sentence for each row that refers to a row that does not exist."""
    for table, number, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
        row = "a row" if number is None else f"row {number}"  # a table WITHOUT ROWID does not number its rows
        yield f"{row} of {table} refers to a row of {parent} that does not exist"


def revision_of(connection: sqlite3.Connection) -> str | None:
    """Return the revision that a database file states; None if it states none."""
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone() is None:
        return None
    row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return row and str(row[0])


def read_versions(connection: Connection) -> set[str]:
    """Return the revisions in Alembic's table, which should be one."""
    return set(map(str, connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars()))


APPLICATION_ID = 0x63616462  # "cadb": marks an index.db as ours (PRAGMA application_id)
FILE_MARK = 68  # where an SQLite file has its application_id: https://sqlite.org/fileformat.html#application_id
SELECT_REVISION = "SELECT version_num FROM alembic_version"
REBUILD_ADVICE = "`cachedb verify --repair` rebuilds it from the newest backup and from the blobs"


def lost_index_error(directory: Path) -> DamagedIndex:
    """Return the error for a cache that has blobs but no index."""
    return DamagedIndex(f"{str(directory)!r} has lost its index.db, but not its blobs: {REBUILD_ADVICE}")


def is_ours(directory: Path) -> bool:
    """Return whether a directory is a cache, even if its index is lost or damaged."""
    with suppress(CacheError, OSError):
        return marker.read(directory) is not None or has_backup(directory)
    return False


def has_cache(directory: Path) -> bool:
    """Return whether there is a cache in a directory, even a damaged one.

    Raises:
        StorageError: if the directory cannot be read.
    """
    with os_errors("use the cache directory"):
        path = directory / "index.db"
        # A process that creates the cache, or was killed meanwhile, leaves an empty file.
        return (exists(path) and path.stat().st_size > 0) or is_ours(directory)


def no_cache_error(directory: Path) -> NotInCache:
    """Return the error for a directory without a cache, which need not exist."""
    return NotInCache(
        f"there is no cache in {str(directory)!r}: check --dir and CACHEDB_DIR; `cachedb init` creates one"
    )


def read_own_revision(connection: Connection, path: Path, directory: Path) -> str | None:
    """Return the schema's revision, or None if the database has no schema yet.

    Args:
        connection: to the database.
        path: of the database.
        directory: of the cache.

    Raises:
        DamagedIndex: if the database has lost its application_id.
        NotACache: if the database belongs to another program.
    """
    mark = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
    if mark == APPLICATION_ID or (mark == 0 and is_empty(connection)):
        return read_revision(connection)
    if is_ours(directory):
        raise DamagedIndex(f"{str(path)!r} has lost its application_id: {REBUILD_ADVICE}")
    raise NotACache(f"{str(path)!r} is another program's database: name another directory")


def has_backup(directory: Path) -> bool:
    """Return whether a directory has a backup with our application_id: older releases left no marker."""
    # The index itself is not opened, because closing it here would release SQLite's locks on it in this process.
    for path in (directory / "backups").glob("*.db"):
        with suppress(OSError):
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if os.pread(file, 4, FILE_MARK) == APPLICATION_ID.to_bytes(4, "big"):
                    return True
            finally:
                os.close(file)
    return False


def schema_error(directory: Path, revision: str | None) -> SchemaMismatch | DamagedIndex:
    """Return the error for a schema that is older or newer than ours, or lost."""
    if not revision:
        return DamagedIndex(f"the index in {str(directory)!r} has lost its schema: {REBUILD_ADVICE}")
    if revision < REVISION:
        return SchemaMismatch(
            f"the index in {str(directory)!r} has schema {revision}, and this release needs {REVISION}: "
            "run `cachedb db upgrade`, set CACHEDB_AUTO_UPGRADE=1, or call Cache.open(upgrade=True)"
        )
    return SchemaMismatch(
        f"the index in {str(directory)!r} has schema {revision}, and this release knows {REVISION} at most: "
        "use a newer release of cachedb"
    )


def is_empty(connection: Connection) -> bool:
    """Return whether nothing was ever written to this database."""
    return connection.exec_driver_sql("SELECT 1 FROM sqlite_master LIMIT 1").first() is None


def read_revision(connection: Connection) -> str | None:
    """Return the schema's revision, or None if there is none."""
    exists = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'alembic_version'"
    if connection.exec_driver_sql(exists).first() is None:
        return None
    revision = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    return None if revision is None else str(revision)


def read_oldest(connection: Connection) -> int:
    """Return the oldest schema whose releases can still use this index; 0 if no migration set it.

    A migration writes it to SQLite's ``user_version``, which is free for programs, as the ``application_id`` is.
    """
    return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())


def is_compatible(connection: Connection) -> bool:
    """Return whether this release can use the schema: its own, or a newer one that allows it."""
    revision = read_revision(connection) or ""
    return revision == REVISION or (revision > REVISION and 0 < read_oldest(connection) <= int(REVISION))
