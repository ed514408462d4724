"""The file of the index: which one has the name, and that it is not replaced while somebody opens it.

The file may be replaced, by a repair or a restored backup, while others have it open. So no connection is used
again before a look at whether its file is still the one that has the name; and none is opened meanwhile, for it would
share the WAL of the one with the other.
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
from cachedb.disk.folders import Folders
from cachedb.disk.layout import has_blobs
from cachedb.disk.waiting import Wait
from cachedb.errors import NotACache, os_errors
from cachedb.index.sqlite.revision import lost
from cachedb.reentry import holding, refuse_reentry

__all__ = ["IndexFile"]

_OLD_RELEASE_SECONDS, _OLD_RELEASE_NAP = 1.0, 0.01
_TICK_NANOSECONDS = 20_000_000  # the time of a file may stand still for so long


class IndexFile:
    """The file that has the name of an index."""

    def __init__(self, path: Path, directory: Path) -> None:
        """Name the file.

        Args:
            path: of the index, or of a backup.
            directory: of the cache.
        """
        self.path = path
        self._name = str(path)
        self._directory = directory
        self._resolved = os.path.realpath(directory)  # by which a thread knows what it holds
        self._write_lock = directory / "locks" / "write.lock"

    @property
    def is_new(self) -> bool:
        """Whether there is no index yet."""
        # An empty file is one that its creator, under the write lock, is about to switch to WAL.
        return not self.path.exists() or not self.path.stat().st_size

    def create(self, folders: Folders) -> None:
        """Make an empty file under the name, unless there is one; under the write lock.

        Raises:
            DamagedIndex: if the cache has blobs, and has lost its index.
        """
        # An existing file is not opened: to close it again would let go of SQLite's locks on it.
        if not self.path.exists():
            if has_blobs(self._directory):
                raise lost(self._directory)
            os.close(folders.make_file(self.path.name))

    def identify(self, *, read_only: bool) -> tuple[int, int, str]:
        """Return what tells ``index.db`` from another file of that name, and how it is to be opened.

        Args:
            read_only: nothing can be written beside it.

        Raises:
            FileNotFoundError: if there is none.
            NotACache: if it is a folder, a FIFO or something else.
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
                wal = _status(f"{self._name}-wal")
                # One at rest, beside which SQLite may not make the files it shares memory by, is read as what
                # cannot change; one with a WAL and no such file has no process either, and is read without locks.
                mode = "mode=ro" if wal and wal.st_size else "mode=ro&immutable=1"
                if mode == "mode=ro" and not os.path.exists(f"{self._name}-shm"):
                    mode = "mode=ro&vfs=unix-none"
                if mode != "mode=ro":
                    mode += f"&changed={_mark(status)}.{_mark(wal)}"  # for us: SQLite passes over it
        return status.st_dev, status.st_ino, mode

    def is_settled(self) -> bool:
        """Return whether a change of the index from now on shows in its time, which goes on in small steps."""
        now = time.time_ns()
        files = (_status(self._name), _status(f"{self._name}-wal"))
        return not any(file and 0 <= now - file.st_mtime_ns < _TICK_NANOSECONDS for file in files)

    @contextmanager
    def unreplaced(self, *, replacing: bool = False) -> Iterator[None]:
        """A block in which nobody replaces the file or, the other way round, opens it.

        Raises:
            Busy: if a process is replacing it, or opening it. Nobody is waited for here.
        """
        opened, replaced = f"{self._resolved} is opened", f"{self._resolved} is replaced"
        refuse_reentry(replaced, f"replacing the index in {str(self._directory)!r}")
        if replacing:
            refuse_reentry(opened, f"opening the index in {str(self._directory)!r}")
        with ExitStack() as stack:
            stack.enter_context(holding(replaced if replacing else opened))
            with os_errors("open the index"), Wait("the index", 0) as wait:
                if self._write_lock.parent.is_dir():  # another program's directory has none, and is not changed
                    stack.enter_context(locks.held_folder(self._write_lock.parent, wait, shared=not replacing))
                stack.enter_context(self._unreplaced_by_old(fcntl.LOCK_EX if replacing else fcntl.LOCK_SH))
            yield

    @contextmanager
    def _unreplaced_by_old(self, operation: int) -> Iterator[None]:
        """The same for releases before 0.2, which lock the directory itself: a block, that does not wait for long.

        Scripts lock the directory as well, with flock(1), and may have begun this process.
        """
        folder = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            end = time.monotonic() + _OLD_RELEASE_SECONDS
            while True:
                try:
                    fcntl.flock(folder, operation | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    # An old release replaces the index under the write lock, where it leaves no name.
                    old = locks.is_held(self._write_lock) and locks.holder_of(self._write_lock) is None
                    if time.monotonic() > end or not (operation == fcntl.LOCK_EX or old):
                        break
                time.sleep(_OLD_RELEASE_NAP)
            yield
        finally:
            os.close(folder)


def _status(path: str) -> os.stat_result | None:
    with os_errors("open the index"), suppress(FileNotFoundError):
        return os.stat(path)
    return None


def _mark(status: os.stat_result | None) -> str:
    return f"{status.st_mtime_ns}.{status.st_size}" if status else ""
