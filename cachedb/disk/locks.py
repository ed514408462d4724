"""Lock files. The kernel releases a `flock` when its process dies.

A wait that can be long is a `Wait`: it ends, and it names the holder. `flock` has no time-out, so `acquire` tries again
after short pauses.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from cachedb.disk import lock_holders
from cachedb.disk.folders import apply_folder_mode, is_shared
from cachedb.disk.forks import OwnFile, close_own, open_own
from cachedb.disk.lock_holders import Process
from cachedb.disk.regular import open_regular
from cachedb.disk.waiting import Wait

__all__ = [
    "acquire",
    "find_holder",
    "find_holder_at",
    "hold_folder_lock",
    "hold_lock",
    "is_held",
    "leads_to",
    "read_holder",
    "read_holder_of",
    "release",
]


_NAPS_PER_WAIT = 32  # a nap is 1/32 of the wait so far
_MIN_NAP_SECONDS, _MAX_NAP_SECONDS = 0.0002, 0.02


def acquire(path: Path, *, wait: bool | Wait = True) -> FileIO | None:
    """Lock a file exclusively and return it open, for `release`; create it if it is missing.

    If the file is unlinked or renamed during the wait, other processes lock a new file. Then this locks the new file.

    Args:
        path: of the file.
        wait: False to return None if another process holds the lock; True to wait without limit; a `Wait` ends.

    Raises:
        Busy: if the time to wait is over.
    """
    while True:
        file = open_own(lambda: _LockFile(path, "r+", opener=_open_or_create))
        try:
            _lock(path, file.fileno(), fcntl.LOCK_EX, wait)
            if leads_to(path, file.fileno()):
                return file
        except BlockingIOError:
            close_own(file)
            return None
        except BaseException:
            close_own(file)
            raise
        close_own(file)


def leads_to(path: Path, file: int) -> bool:
    """Return whether a path still leads to an open file, which was not unlinked, renamed or replaced."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextmanager
def hold_folder_lock(path: Path, wait: Wait, *, shared: bool) -> Iterator[None]:
    """Hold the lock of a folder in a block: exclusively, or shared with other processes.

    Raises:
        Busy: if the time to wait is over.
    """
    while True:
        folder = open_own(lambda: _LockFolder(path))
        try:
            _lock(path, folder.fileno(), fcntl.LOCK_SH if shared else fcntl.LOCK_EX, wait)
            if leads_to(path, folder.fileno()):
                yield
                return
        finally:
            release(folder)


class _LockFile(FileIO):
    """An open lock file; if an interrupt loses it, it is closed without a warning."""

    def __del__(self) -> None:
        self.close()


class _LockFolder:
    """An open folder, which `FileIO` refuses."""

    closed = True  # also if the constructor fails

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.closed = False

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def close(self) -> None:
        """Close the folder."""
        if not self.closed:
            self.closed = True
            os.close(self._descriptor)

    __del__ = close


def _lock(path: Path, file: int, operation: int, wait: bool | Wait) -> None:
    """Lock an open file; return without the lock if the file loses its path meanwhile."""
    if not isinstance(wait, Wait):
        fcntl.flock(file, operation | (0 if wait else fcntl.LOCK_NB))
        return
    began = time.monotonic()
    while True:
        try:
            fcntl.flock(file, operation | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not leads_to(path, file):
                return
        # Naps grow with the wait, so the last one adds little to it.
        nap = min(max((time.monotonic() - began) / _NAPS_PER_WAIT, _MIN_NAP_SECONDS), _MAX_NAP_SECONDS)
        wait.nap(nap, lambda: find_holder(file))


def read_holder(file: int) -> Process | None:
    """Return the process whose record is in a lock file, or None if that process is gone."""
    record = lock_holders.read_record(file)
    return None if record is None or record[0].is_gone else record[0].with_our_pid()


def find_holder(file: int) -> Process | None:
    """Return which process holds a lock, from its record in the file or from the kernel."""
    return read_holder(file) or lock_holders.find_flock_holder(file)


def is_held(path: Path) -> bool:
    """Return whether a process holds the exclusive lock on a file; False if it is not a regular file."""
    try:
        file = open_regular(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL):
            return False
        raise
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(file, fcntl.LOCK_UN)  # a child forked just now may have a copy of the descriptor
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def release(file: OwnFile) -> None:
    """Release a lock and close its file, unless a fork has closed the file in this child."""
    if not file.closed:
        fcntl.flock(file, fcntl.LOCK_UN)
        close_own(file)


@contextmanager
def hold_lock(path: Path, wait: bool | Wait = True) -> Iterator[FileIO]:
    """Hold a lock in a block, with a record of this process in its file.

    Raises:
        Busy: if the time to wait is over.
    """
    file = acquire(path, wait=wait)
    assert file is not None
    try:
        lock_holders.write_record(file.fileno())
        yield file
    finally:
        try:
            if not file.closed:  # in a forked child it is closed, and the record belongs to the parent
                lock_holders.clear_record(file.fileno())
        finally:
            release(file)


def read_holder_of(path: Path) -> Process | None:
    """Return the process whose record is in the lock file at a path, as `read_holder` does."""
    with suppress(OSError), FileIO(path, opener=open_regular) as file:
        return read_holder(file.fileno())
    return None


def find_holder_at(path: Path) -> Process | None:
    """Return which process holds the lock at a path, as `find_holder` does."""
    with suppress(OSError), FileIO(path, opener=open_regular) as file:
        return find_holder(file.fileno())
    return None


def _open_or_create(path: str, _flags: int) -> int:
    """Open a lock file for reading and writing, or create it.

    Raises:
        OSError: if it is not a regular file, or its folder is a link, which could lead to files of other programs.
    """
    parent, name = os.path.split(path)
    try:
        folder = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError:
        what = "a symbolic link" if os.path.islink(parent) else "not a folder"
        raise NotADirectoryError(errno.ENOTDIR, f"it is {what}: put a folder back in its place", parent) from None
    try:
        return _open_or_create_in(folder, name)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        os.close(folder)


def _open_or_create_in(folder: int, name: str) -> int:
    while True:
        with suppress(FileNotFoundError):
            file, is_new = open_regular(name, os.O_RDWR, folder), False
            break
        with suppress(FileExistsError):
            if (shared := _create_shared(folder, name)) is not None:
                return shared
            file, is_new = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder), True
            break
    try:
        if os.fstat(file).st_nlink > 1:
            why = "the lock file is a hard link to another file, which it would overwrite: delete the lock file"
            raise OSError(errno.EINVAL, why)
        if is_new:
            apply_folder_mode(file, os.fstat(folder))
    except BaseException:
        os.close(file)
        raise
    return file


def _create_shared(folder: int, name: str) -> int | None:
    """Create a lock file with its mode before it gets its name, so that no member is ever refused.

    Returns:
        The descriptor; None if the folder is not shared, or the file system cannot do this.

    Raises:
        FileExistsError: if there is a file.
    """
    if not is_shared(found := os.fstat(folder)):
        return None
    try:
        file = os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=folder)
        try:
            apply_folder_mode(file, found)
            # With a folder descriptor Python calls linkat(2), which follows the link in /proc.
            os.link(f"/proc/self/fd/{file}", name, dst_dir_fd=folder)
        except BaseException:
            os.close(file)
            raise
    except FileExistsError:
        raise
    except OSError:
        return None
    return file
