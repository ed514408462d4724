"""The index file: its identity, and a lock that keeps it from being replaced while a process opens it.

A repair or a restored backup may replace the file while other processes have it open. So each connection is checked
before it is used again: its file must still be the one at the path. No connection is opened during a replacement,
because it could combine the old index with the new WAL.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cachedb.disk import locks
from cachedb.disk.existence import exists
from cachedb.disk.folders import Folders
from cachedb.disk.layout import has_blobs
from cachedb.disk.waiting import Wait
from cachedb.errors import Busy, NotACache, NotOurs, os_errors
from cachedb.index.sqlite.connection import CacheConnection
from cachedb.index.sqlite.revision import lost_index_error
from cachedb.reentry import holding, is_held, refuse_reentry

__all__ = ["IndexFile"]

_OLD_RELEASE_SECONDS, _OLD_RELEASE_POLL_SECONDS = 1.0, 0.01
_TICK_NANOSECONDS = 20_000_000  # two changes within this time may give a file the same modification time


class IndexFile:
    """The file at the path of an index."""

    def __init__(self, path: Path, directory: Path) -> None:
        """Take the paths; nothing is opened yet.

        Args:
            path: the path of the index, or of a backup.
            directory: the cache directory.
        """
        self.path = path
        self._name = str(path)
        self._directory = directory
        self.reentry_key = os.path.realpath(directory)  # names the locks of this cache for `reentry`
        self.write_lock = directory / "locks" / "write.lock"

    @property
    def is_new(self) -> bool:
        """Whether there is no index yet."""
        # An empty file is being created by another process, which holds the write lock.
        with os_errors("open the index"):
            return not exists(self.path) or not self.path.stat().st_size

    def create(self, folders: Folders) -> None:
        """Create an empty index file, unless there is one; the caller holds the write lock.

        Raises:
            DamagedIndex: if there is no index file but the cache has blobs.
        """
        # An existing file is not opened: closing it would release SQLite's locks on it.
        if not exists(self.path):
            if has_blobs(self._directory):
                raise lost_index_error(self._directory)
            os.close(folders.make_file(self.path.name))

    def identify(self, *, read_only: bool) -> tuple[int, int, str]:
        """Return the device, the inode and the URI parameters to open ``index.db`` with.

        Args:
            read_only: whether no file can be created beside the index.

        Raises:
            FileNotFoundError: if there is no index.
            NotACache: if the path does not lead to a regular file.
        """
        status = os.stat(self._name)
        if not stat.S_ISREG(status.st_mode):
            raise NotACache(
                f"{self._name!r} is not a regular file: move it away, and run `cachedb verify --repair` if the "
                "directory is a cache"
            )
        with os_errors("open the index"):
            mode = "mode=rw"
            if read_only:
                wal, journal = _status(f"{self._name}-wal"), _status(f"{self._name}-journal")
                # SQLite cannot create an -shm here. An index without a WAL is opened as immutable. One with a WAL and
                # no -shm is not open in any process, and is read without locks.
                mode = "mode=ro" if wal and wal.st_size else "mode=ro&immutable=1"
                if mode == "mode=ro" and not os.path.exists(f"{self._name}-shm"):
                    mode = "mode=ro&vfs=unix-none"
                if journal and journal.st_size:
                    # Another program switched WAL mode off. The index may have half of its transaction, so SQLite must
                    # look at the journal and take locks.
                    mode = "mode=ro"
                if mode != "mode=ro":
                    mode += f"&changed={_version(status)}.{_version(wal)}"  # our own parameter: SQLite ignores it
        return status.st_dev, status.st_ino, mode

    def check_beside(self, *, read_only: bool) -> None:
        """Check that SQLite cannot reach another file through a link beside the index.

        Args:
            read_only: whether the index is only read, as in a copy by hard links.

        Raises:
            NotOurs: if the -journal, -wal or -shm is a link, or not a regular file.
        """
        for suffix in ("-journal", "-wal", "-shm"):
            with os_errors("open the index"), suppress(FileNotFoundError):
                found = os.lstat(self._name + suffix)
                what = "not a regular file"
                if stat.S_ISLNK(found.st_mode):
                    what = "a symbolic link"
                elif stat.S_ISREG(found.st_mode):
                    if read_only or found.st_nlink == 1:
                        continue
                    what = "a hard link to another file"
                raise NotOurs(f"{self._name + suffix!r} is {what}, which another program made: move it away")

    def is_settled(self) -> bool:
        """Return whether every later change of the index alters its modification time."""
        # Modification times have a limited resolution.
        now = time.time_ns()
        files = (_status(self._name), _status(f"{self._name}-wal"))
        return not any(file and 0 <= now - file.st_mtime_ns < _TICK_NANOSECONDS for file in files)

    @contextmanager
    def no_replacement(self, *, replacing: bool = False) -> Iterator[None]:
        """Keep other processes from replacing the file in this block; with ``replacing``, from opening it.

        Raises:
            Busy: at once, if another process is replacing or opening it.
        """
        opened, replaced = f"{self.reentry_key} is opened", f"{self.reentry_key} is replaced"
        refuse_reentry(replaced, f"replacing the index in {str(self._directory)!r}")
        if replacing:
            refuse_reentry(opened, f"opening the index in {str(self._directory)!r}")
        with ExitStack() as stack:
            stack.enter_context(holding(replaced if replacing else opened))
            with os_errors("open the index"), Wait("the index", 0) as wait:
                if self.write_lock.parent.is_dir():  # another program's directory has no such folder
                    stack.enter_context(locks.hold_folder_lock(self.write_lock.parent, wait, shared=not replacing))
                stack.enter_context(self._no_replacement_by_old_releases(fcntl.LOCK_EX if replacing else fcntl.LOCK_SH))
            yield

    def save_commits(self, connection: CacheConnection) -> None:
        """Save the commits that are only in a removed WAL, unless there is a new WAL.

        Args:
            connection: a connection that has the removed WAL open.
        """
        with ExitStack() as stack, suppress(Busy, OSError):
            if not is_held(self.reentry_key):
                lock = locks.acquire(self.write_lock, wait=False)
                if lock is None:
                    return  # the holder of the lock finds the loss too
                stack.callback(locks.release, lock)
            stack.enter_context(self.no_replacement(replacing=True))
            connection.save_commits()

    @contextmanager
    def _no_replacement_by_old_releases(self, operation: int) -> Iterator[None]:
        """Do as `no_replacement` for releases before 0.2, which lock the cache directory itself.

        This waits for a second at most. Then the block runs without the lock, because a script may have locked the
        directory with flock(1) and started this process.
        """
        folder = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            end = time.monotonic() + _OLD_RELEASE_SECONDS
            while True:
                try:
                    fcntl.flock(folder, operation | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    # An old release replaces the index under the write lock, and writes no record into the lock file.
                    old = locks.is_held(self.write_lock) and locks.read_holder_of(self.write_lock) is None
                    if time.monotonic() > end or not (operation == fcntl.LOCK_EX or old):
                        break
                time.sleep(_OLD_RELEASE_POLL_SECONDS)
            yield
        finally:
            os.close(folder)


def _status(path: str) -> os.stat_result | None:
    with os_errors("open the index"), suppress(FileNotFoundError):
        return os.stat(path)
    return None


def _version(status: os.stat_result | None) -> str:
    return f"{status.st_mtime_ns}.{status.st_size}" if status else ""
