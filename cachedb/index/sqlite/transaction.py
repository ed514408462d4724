"""A write transaction, under the write lock, and what is to be made sure of before it begins."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Connection

from cachedb.disk import locks
from cachedb.errors import CacheReplaced
from cachedb.index.sqlite.revision import is_compatible, read_oldest, read_revision
from cachedb.index.tables import REVISION

__all__ = ["begin", "driver_of", "ensure_wal", "immediate", "transaction"]


@contextmanager
def transaction(connection: Connection, turn: locks.Turn, check_files: Callable[[], None]) -> Iterator[None]:
    """Commit what the block does, or roll it back; and first of all make sure of how the last commit ended.

    Who is killed in a commit, or cannot sync it, may leave all of it in the WAL and yet unseen: when all processes
    are gone, SQLite finds it there. By then we may have taken its files away. A commit of our own puts an end to
    that, for it is written over it.

    Args:
        connection: to write with.
        turn: the write lock, as it is held.
        check_files: raises before the commit if the index's files were removed.
    """
    if turn.marked:
        with connection.begin():
            # A newer schema is for newer releases to write to.
            if (read_revision(connection) or "") <= REVISION or is_compatible(connection):
                # It is written even if it is that already.
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
    """Put the index back into WAL mode if an outside program switched it off; under the write lock.

    The mode is stored in the file. Without it a reader blocks every writer, and a writer every reader.

    Raises:
        Busy: if another program is reading, which the switch has to wait for.
    """
    if driver.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        driver.execute("PRAGMA journal_mode = WAL")


def driver_of(connection: Connection) -> sqlite3.Connection:
    """Return the driver's own connection."""
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    return driver


def immediate(connection: Connection) -> Connection:
    """Return the connection with transactions that write from their beginning on."""
    return connection.execution_options(cachedb_begin="BEGIN IMMEDIATE")


def begin(connection: Connection) -> None:
    """Begin a transaction, for SQLAlchemy's event of that name."""
    connection.exec_driver_sql(connection.get_execution_options().get("cachedb_begin", "BEGIN"))
