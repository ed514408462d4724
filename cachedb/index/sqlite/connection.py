"""Open connections to the index file, and copy an index that is read without locks into memory.

SQLite shares memory with other processes through ``index.db-shm``, and commits to ``index.db-wal``. If one of the two
is removed while a process has it open, other processes create a new one. Then neither side sees the commits of the
other. So a connection knows which files it has open, and is not used after they were replaced.
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
from cachedb.errors import Busy, CacheReplaced, StorageError, os_errors

__all__ = [
    "CacheConnection",
    "IndexChanged",
    "connect",
    "has_locks",
    "lost_files_error",
    "pause_before_retry",
    "take_snapshot",
]

_POLL_SECONDS = 0.02
_SUFFIXES = ("-wal", "-shm")
_SHARED_FIRST, _SHARED_SIZE = 0x40000002, 510  # the bytes that SQLite locks to read an index (os.h)

_FileId = tuple[int, int] | None
_connections: weakref.WeakSet[CacheConnection] = weakref.WeakSet()  # of this process, to files that are shared
_guard = threading.RLock()  # for `_connections` and `_pinned`; a fork waits while a connection is opened
_pinned: dict[tuple[int, int], int] = {}  # for each index that is locked until this process ends, a descriptor


class IndexChanged(StorageError):
    """Another process wrote to an index while it was read without locks."""

    def __init__(self) -> None:
        super().__init__("the index changed while it was read: try again")


class CacheConnection(sqlite3.Connection):
    """A connection that knows which files it has open."""

    file: tuple[int, int, str]
    is_settled: bool
    path = ""
    beside: tuple[_FileId, ...] = ()
    """The identities of the open -wal and -shm; empty if other processes do not share them."""

    def has_lost_files(self) -> bool:
        """Return whether the -wal or -shm of this connection was removed or replaced."""
        return bool(self.beside) and _is_lost(self.beside, _identify_beside(self.path))

    def is_outdated(self) -> bool:
        """Return whether the -wal or -shm differs from that of this connection."""
        return bool(self.beside) and self.beside != _identify_beside(self.path)

    def find_swap(self, found: tuple[int, int, str]) -> CacheReplaced | None:
        """Return an error if another program has replaced the index, but not the WAL of this connection.

        SQLite would apply this WAL to the new index, and damage it. cachedb itself removes the WAL before it replaces
        the index.

        Args:
            found: the identity of the index that is there now.
        """
        if self.file[:2] == found[:2] or not self.beside or self.beside[0] is None:
            return None
        if self.beside[0] != _identify(f"{self.path}-wal"):
            return None
        return CacheReplaced(f"{self.path!r} was replaced by another program while it was open: open the cache again")

    def check_memory(self) -> None:
        """Check, before a commit, that other processes still share memory with this connection.

        Raises:
            CacheReplaced: if the -shm was removed or replaced.
        """
        if self.beside and self.beside[1] is not None and self.beside[1] != _identify(f"{self.path}-shm"):
            raise lost_files_error(self.path)

    def save_commits(self) -> None:
        """Write the commits of a removed WAL back to the index, unless there is a new WAL.

        The caller holds the write lock, and no process may open the index meanwhile.
        """
        found = _identify_beside(self.path)
        if all(new in (None, old) for new, old in zip(found, self.beside, strict=True)):
            with suppress(sqlite3.Error):
                self.execute("PRAGMA wal_checkpoint(FULL)").close()

    def close(self) -> None:
        """Close the connection, without deleting a -wal or -shm that another process has created."""
        if self.beside:
            _pin_if_lost(self)
            with _guard:
                _connections.discard(self)
            self.beside = ()
        super().close()


def lost_files_error(path: str) -> CacheReplaced:
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
    except OSError:
        with os_errors("open the index"):
            raise
    return status.st_dev, status.st_ino


def _identify_beside(path: str) -> tuple[_FileId, ...]:
    return tuple(_identify(path + suffix) for suffix in _SUFFIXES)


def _is_lost(known: tuple[_FileId, ...], found: tuple[_FileId, ...]) -> bool:
    return any(old not in (None, new) for old, new in zip(known, found, strict=True))


def _pin_if_lost(connection: CacheConnection) -> None:
    """Keep SQLite from a checkpoint when it closes a connection whose -wal or -shm was replaced.

    The checkpoint would write the old WAL over newer commits, and delete the new WAL. It needs a lock on the whole
    index. So this process opens the index once more, and locks a part of it. The file stays open, because closing it
    would release all locks that SQLite has on the index.
    """
    with suppress(OSError, StorageError):  # whoever cannot look at the files must still close them
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


def _register(connection: CacheConnection, path: str) -> None:
    """Record which files a new connection has open.

    Raises:
        CacheReplaced: if another connection of this process has removed files open, because SQLite would share them.
    """
    found = _identify_beside(path)
    with _guard:
        others = [other for other in _connections if other.file[:2] == connection.file[:2]]
        if any(_is_lost(other.beside, found) for other in others):
            raise lost_files_error(path)
        connection.path, connection.beside = path, found
        _connections.add(connection)


def has_locks(file: tuple[int, int, str]) -> bool:
    """Return whether this process has an index and its WAL open, so that SQLite may hold locks for it.

    Closing the file would release them, and a writer may then overwrite what an open query still reads. SQLite itself
    takes care of that, except with ``vfs=unix-none``.

    Args:
        file: the identity of the index, from `IndexFile.identify`.
    """
    with _guard:
        return any(other.file[:2] == file[:2] and any(other.beside) for other in _connections)


def connect(path: Path, file: tuple[int, int, str], *, is_settled: bool, read_only: bool) -> CacheConnection:
    """Open a connection to the index.

    Args:
        path: the path of the index.
        file: the identity of the index, from `IndexFile.identify`.
        is_settled: whether every later change alters the file's modification time.
        read_only: open the index for reading only.

    Raises:
        sqlite3.Error: if the index cannot be opened.
        CacheReplaced: if the -wal or -shm was removed while this process had it open.
    """
    if "vfs=" in file[2] and has_locks(file):
        raise lost_files_error(str(path))  # the -shm was removed meanwhile
    mode = file[2].replace("mode=rw", "mode=ro") if read_only else file[2]
    connection = sqlite3.connect(
        f"{path.as_uri()}?{mode}",
        uri=True,
        timeout=0,  # `Database.entered` waits instead, outside the blocks that forks wait for
        check_same_thread=False,
        isolation_level=None,  # the driver begins no transactions; `transaction` begins them, also for DDL
        factory=CacheConnection,
    )
    try:
        connection.file, connection.is_settled = file, is_settled
        if "vfs=" in file[2]:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # creates no -shm: the WAL's index is in our memory
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA schema_version")  # opens the WAL now, while it belongs to this file
        if "vfs=" not in file[2] and "immutable=" not in file[2]:
            _register(connection, str(path))
    except BaseException:
        connection.close()
        raise
    return connection


def take_snapshot(
    connection: CacheConnection,
    identify: Callable[[], tuple[int, int, str]],
    translated: Callable[[], AbstractContextManager[None]],
) -> CacheConnection:
    """Copy an index that is read without locks into memory, and close the connection to the file.

    Other processes do not see this read and may write to the file. So the whole file is read at once, and this
    function checks afterwards whether the file changed.

    Args:
        connection: a connection to the file.
        identify: returns a value that every change of the file alters.
        translated: returns a block that turns SQLite's errors into ours.

    Raises:
        IndexChanged: if the file changed meanwhile, or may have changed.
    """
    # With URIs, which a backup of this copy needs: not every SQLite understands them by default.
    copy = sqlite3.connect(
        "file::memory:", uri=True, check_same_thread=False, isolation_level=None, factory=CacheConnection
    )
    copy.file = connection.file
    try:
        with closing(connection), translated():
            connection.backup(copy)
            copy.execute("PRAGMA query_only = ON")
    except BaseException as error:
        copy.close()
        if isinstance(error, StorageError) and identify() != connection.file:
            raise IndexChanged from error  # the file only looks damaged, because it changed during the read
        raise
    if identify() != connection.file or not connection.is_settled:
        copy.close()
        raise IndexChanged
    return copy


def pause_before_retry(wait: Wait, error: Exception) -> None:
    """Sleep before the next try to use the index; raise if the time to wait is over."""
    try:
        wait.nap(_POLL_SECONDS, lambda: getattr(error, "holder", None))
    except Busy:
        wait.end()
        if isinstance(error, IndexChanged):
            raise error from None
        raise
