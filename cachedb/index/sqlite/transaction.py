"""Run write transactions under the write lock, and check the files before a commit."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Connection

from cachedb.disk import turns
from cachedb.errors import CacheReplaced
from cachedb.index.sqlite.revision import is_compatible, read_oldest, read_revision
from cachedb.index.tables import REVISION

__all__ = ["begin", "driver_of", "ensure_wal", "immediate", "read_first", "transaction"]


@contextmanager
def transaction(connection: Connection, turn: turns.Turn, check_files: Callable[[], None]) -> Iterator[None]:
    """Commit the changes of the block, or roll them back on an error.

    A process that is killed during a commit, or cannot sync it, may leave a complete commit in the WAL that no process
    sees. SQLite would apply it later, after all processes have closed the index. Its blobs may be deleted by then. So
    this first overwrites it with another commit.

    Args:
        connection: the connection to write with.
        turn: the write lock that the caller holds.
        check_files: called before the commit; raises if the -shm was removed or replaced.
    """
    if turn.is_marked:
        with connection.begin():
            # Only newer releases may write to a newer schema.
            if (read_revision(connection) or "") <= REVISION or is_compatible(connection):
                # SQLite writes the value even if it does not change.
                connection.exec_driver_sql(f"PRAGMA user_version = {read_oldest(connection)}")
    transaction = connection.begin()
    try:
        turn.mark()
        yield
    except BaseException:
        transaction.rollback()
        turn.unmark()
        raise
    try:
        turn.check("nothing was written: try again")
        check_files()
    except CacheReplaced:
        transaction.rollback()
        turn.unmark()
        raise
    if transaction.is_active:
        try:
            transaction.commit()
        except BaseException:
            transaction.rollback()
            raise
    turn.unmark()


def ensure_wal(driver: sqlite3.Connection) -> None:
    """Put the index back into WAL mode if another program switched it off.

    The caller holds the write lock. The mode is stored in the file. Without it, readers and writers block each other.

    Raises:
        Busy: if another program is reading the index.
    """
    if driver.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        driver.execute("PRAGMA journal_mode = WAL")


def driver_of(connection: Connection) -> sqlite3.Connection:
    """Return the driver's own connection."""
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    return driver


def immediate(connection: Connection) -> Connection:
    """Return the connection, set to begin its transactions with ``BEGIN IMMEDIATE``."""
    return connection.execution_options(cachedb_begin="BEGIN IMMEDIATE")


def begin(connection: Connection) -> None:
    """Begin a transaction; the handler of SQLAlchemy's ``begin`` event."""
    connection.exec_driver_sql(connection.get_execution_options().get("cachedb_begin", "BEGIN"))


def read_first(connection: Connection) -> None:
    """Begin a read transaction with a read that any schema allows; raise `Busy` if the index is locked."""
    connection.exec_driver_sql("PRAGMA schema_version")
