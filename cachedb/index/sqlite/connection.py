"""Connections to the file of the index, and copies in memory of one that is read without locks.

SQLite shares memory with other processes through ``index.db-shm``, and commits to ``index.db-wal``. If one of them is
removed under a live process, others make new ones, and neither side sees what the other commits. So a connection knows
which files it has open, and is not used once others have their names.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path

from cachedb.disk.byte_locks import lock_bytes
from cachedb.disk.waiting import Wait
from cachedb.errors import Busy, CacheReplaced, StorageError

__all__ = ["CacheConnection", "IndexChanged", "connect", "files_lost", "pause_before_retry", "take_snapshot"]

_POLL_SECONDS = 0.02
_SUFFIXES = ("-wal", "-shm")
_SHARED_FIRST, _SHARED_SIZE = 0x40000002, 510  # the bytes of an index that SQLite locks: its os.h

_FileId = tuple[int, int] | None
_connections: weakref.WeakSet[CacheConnection] = weakref.WeakSet()  # of this process, that share files with others
_guard = threading.RLock()  # of the above; connections are opened where no fork can come
_pinned: dict[tuple[int, int], int] = {}  # indexes that are locked until this process ends, and their descriptors


class IndexChanged(StorageError):
    """Somebody has written to an index that was read without locks."""

    def __init__(self) -> None:
        super().__init__("the index changed while it was read: try again")


class CacheConnection(sqlite3.Connection):
    """A connection that knows which file it is to."""

    file: tuple[int, int, str]
    is_settled: bool
    path = ""
    beside: tuple[_FileId, ...] = ()
    """Which -wal and -shm it has open; empty if it shares none."""

    def has_lost_files(self) -> bool:
        """Return whether the -wal or -shm that this connection has open has lost its name."""
        return bool(self.beside) and _is_lost(self.beside, _identify_beside(self.path))

    def is_outdated(self) -> bool:
        """Return whether a -wal or -shm is there that this connection does not have open."""
        return bool(self.beside) and self.beside != _identify_beside(self.path)

    def check_memory(self) -> None:
        """Make sure, before a commit, that other processes still share memory with this connection.

        Raises:
            CacheReplaced: if they do not.
        """
        if self.beside and self.beside[1] is not None and self.beside[1] != _identify(f"{self.path}-shm"):
            raise files_lost(self.path)

    def save_commits(self) -> None:
        """Write all commits of a WAL that has lost its name back to the index, unless there is another WAL by now.

        The caller holds the write lock, and nobody may open the index meanwhile.
        """
        found = _identify_beside(self.path)
        if all(new in (None, old) for new, old in zip(found, self.beside, strict=True)):
            with suppress(sqlite3.Error):
                self.execute("PRAGMA wal_checkpoint(FULL)").close()

    def close(self) -> None:
        """Close the connection; SQLite does not delete a -wal or -shm that others have made meanwhile."""
        if self.beside:
            _pin_if_lost(self)
            with _guard:
                _connections.discard(self)
            self.beside = ()
        super().close()


def files_lost(path: str) -> CacheReplaced:
    """Return the error for files beside an index that were removed while it was in use."""
    return CacheReplaced(
        f"'{path}-wal' or its -shm was removed or replaced while the index was open; nothing was written: "
        "try again, and keep cleaners of old files out of the cache"
    )


def _identify(path: str) -> _FileId:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _identify_beside(path: str) -> tuple[_FileId, ...]:
    return tuple(_identify(path + suffix) for suffix in _SUFFIXES)


def _is_lost(known: tuple[_FileId, ...], found: tuple[_FileId, ...]) -> bool:
    return any(old not in (None, new) for old, new in zip(known, found, strict=True))


def _pin_if_lost(connection: CacheConnection) -> None:
    """Keep SQLite from a checkpoint at the closing of a connection, if others have made new files beside the index.

    It would write an old WAL over what they have committed, and delete theirs. It does neither unless it gets a lock
    on the whole index, which another open file of this process can deny. That file stays open: to close it would
    release all locks that SQLite has on the index.
    """
    with suppress(OSError):
        found = _identify_beside(connection.path)
        if not _is_lost(connection.beside, found) or not any(
            new not in (None, old) for new, old in zip(found, connection.beside, strict=True)
        ):
            return
        index = connection.file[:2]
        with _guard:
            if index in _pinned or _identify(connection.path) != index:
                return  # SQLite leaves all files alone if the index itself was replaced
            _pinned[index] = os.open(connection.path, os.O_RDONLY | os.O_CLOEXEC)
        lock_bytes(_pinned[index], fcntl.F_RDLCK, _SHARED_FIRST, _SHARED_SIZE)


def _note(connection: CacheConnection, path: str) -> None:
    """Note which files a new connection has open.

    Raises:
        CacheReplaced: if another connection of this process has others: SQLite would have this one use them.
    """
    found = _identify_beside(path)
    with _guard:
        others = [other for other in _connections if other.file[:2] == connection.file[:2]]
        if any(_is_lost(other.beside, found) for other in others):
            raise files_lost(path)
        connection.path, connection.beside = path, found
        _connections.add(connection)


def connect(path: Path, file: tuple[int, int, str], *, is_settled: bool, read_only: bool) -> CacheConnection:
    """Open a connection to the index.

    Args:
        path: of the index.
        file: what `IndexFile.identify` returned.
        is_settled: whether a change from now on shows in the time of the file.
        read_only: open it for reading only.

    Raises:
        sqlite3.Error: if it cannot be opened.
        CacheReplaced: if the files beside it were removed while this process had them open.
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
        if "vfs=" not in file[2] and "immutable=" not in file[2]:
            _note(connection, str(path))
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
