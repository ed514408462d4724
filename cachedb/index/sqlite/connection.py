"""Connections to the file of the index, and copies in memory of one that is read without locks."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path

from cachedb.disk.waiting import Wait
from cachedb.errors import Busy, StorageError

__all__ = ["CacheConnection", "IndexChanged", "connect", "pause_before_retry", "take_snapshot"]

_POLL_SECONDS = 0.02


class IndexChanged(StorageError):
    """Somebody has written to an index that was read without locks."""

    def __init__(self) -> None:
        super().__init__("the index changed while it was read: try again")


class CacheConnection(sqlite3.Connection):
    """A connection that knows which file it is to."""

    file: tuple[int, int, str]
    is_settled: bool


def connect(path: Path, file: tuple[int, int, str], *, is_settled: bool, read_only: bool) -> CacheConnection:
    """Open a connection to the index.

    Args:
        path: of the index.
        file: what `IndexFile.identify` returned.
        is_settled: whether a change from now on shows in the time of the file.
        read_only: open it for reading only.

    Raises:
        sqlite3.Error: if it cannot be opened.
    """
    mode = file[2].replace("mode=rw", "mode=ro") if read_only else file[2]
    connection = sqlite3.connect(
        f"{path.as_uri()}?{mode}",
        uri=True,
        timeout=0,  # we wait ourselves, where no fork waits for us: see `Database.entered`
        check_same_thread=False,
        isolation_level=None,  # the driver begins no transactions of its own: we do, DDL included
        factory=CacheConnection,
    )
    try:
        connection.file, connection.is_settled = file, is_settled
        if "vfs=" in file[2]:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # the WAL's index in our own memory
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA schema_version")  # it opens the WAL, which belongs to this file
    except BaseException:
        connection.close()
        raise
    return connection


def take_snapshot(
    connection: CacheConnection,
    identify: Callable[[], tuple[int, int, str]],
    translated: Callable[[], AbstractContextManager[None]],
) -> CacheConnection:
    """Return a copy in memory of an index that is read without locks, and close the connection to the file.

    A process that begins to write to the file does not see that somebody reads it. So it is read all at once, and
    looked at again after that.

    Args:
        connection: to the file.
        identify: returns what tells the file from what it is after a change.
        translated: a block that raises our errors for those of SQLite.

    Raises:
        IndexChanged: if somebody wrote to the file meanwhile, or that cannot be told.
    """
    copy = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None, factory=CacheConnection)
    copy.file = connection.file
    try:
        with closing(connection), translated():
            connection.backup(copy)
            copy.execute("PRAGMA query_only = ON")
    except BaseException as error:
        copy.close()
        if isinstance(error, StorageError) and identify() != connection.file:
            raise IndexChanged from error  # that is why it looks damaged
        raise
    if identify() != connection.file or not connection.is_settled:
        copy.close()
        raise IndexChanged
    return copy


def pause_before_retry(wait: Wait, error: Exception) -> None:
    """Wait before the index is tried again, until it has been tried for too long."""
    try:
        wait.nap(_POLL_SECONDS, lambda: getattr(error, "holder", None))
    except Busy:
        wait.end()
        if isinstance(error, IndexChanged):
            raise error from None
        raise
