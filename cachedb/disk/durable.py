"""Files that appear under their names when they are whole, and what killed processes leave of such files.

Where the file system can, a file has no name before it is whole, so that nothing is left. Elsewhere it has a name of
`part_path`, and is locked while its process lives: `remove_leftovers` removes those that nobody has locked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from cachedb.errors import ignore_os_errors

__all__ = [
    "PART",
    "atomic_file",
    "copy_to_new",
    "lock_part",
    "part_path",
    "remove_leftovers",
    "sync_file",
    "sync_folder",
]


PART = re.compile(r"\.cachedb-[0-9a-f]{32}\.part")
"""The names of `part_path`. Earlier releases had names of half that length, which they did not lock."""

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS)


def part_path(folder: Path) -> Path:
    """Return a new path for a file that is not whole yet."""
    return folder / f".cachedb-{secrets.token_hex(16)}.part"


def lock_part(file: int) -> None:
    """Say that a file's process lives, until the file is closed; where the file system has no locks, do nothing."""
    with ignore_os_errors():
        fcntl.flock(file, fcntl.LOCK_SH)


@contextmanager
def atomic_file(path: Path) -> Iterator[FileIO]:
    """Open a file for writing that appears under its name, whole and on disk, at the end of the block.

    An existing file is replaced; after an error it is as it was. The caller syncs the folder.
    """
    part = part_path(path.parent)
    file, unnamed = _new_file(part)
    try:
        with file:
            yield file
            os.fsync(file.fileno())
            if unnamed:
                _name(file, part)
            part.rename(path)  # while it is locked
    finally:
        with ignore_os_errors():  # it would hide the error that came first
            part.unlink(missing_ok=True)


def _new_file(part: Path) -> tuple[FileIO, bool]:
    """Return a new file, and whether it has no name; else it has that of the part."""
    try:
        # Without /proc it could not be given a name.
        unnamed = os.open(part.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return _new_part(part), False
    if not os.path.exists(f"/proc/self/fd/{unnamed}"):
        os.close(unnamed)
        return _new_part(part), False
    file = FileIO(unnamed, "rb+")
    lock_part(unnamed)
    return file, True


def _new_part(part: Path) -> FileIO:
    while True:
        file = FileIO(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "rb+")
        lock_part(file.fileno())
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # somebody removed it as a leftover before it was locked


def _name(file: FileIO, part: Path) -> None:
    """Give a name to a file that has none."""
    folder = os.open(part.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # With a folder's descriptor it is linkat(2), which follows the link in /proc.
        os.link(f"/proc/self/fd/{file.fileno()}", part.name, dst_dir_fd=folder)
    except OSError:  # of a file system that can have such files, and not name them
        with _new_part(part) as copy:
            file.seek(0)
            shutil.copyfileobj(file, copy, 1024 * 1024)
            os.fsync(copy.fileno())
    finally:
        os.close(folder)


def remove_leftovers(folder: Path, names: re.Pattern[str] = PART, *, beside: str = "") -> None:
    """Remove from a folder what processes that were killed have left: our own user's files that nobody has locked.

    What cannot be removed, or proven to be of nobody alive, stays.

    Args:
        folder: to look in.
        names: of such files.
        beside: a file of the same name with this suffix goes as well.
    """
    with ignore_os_errors():
        for name in filter(names.fullmatch, os.listdir(folder)):
            with ignore_os_errors():
                _remove_leftover(f"{folder}/{name}", beside)


def _remove_leftover(path: str, beside: str) -> None:
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.lstat(path)  # it may have got its own name before we had the lock
        if (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino):
            if beside:
                with ignore_os_errors():
                    os.unlink(path + beside)
            os.unlink(path)
    finally:
        os.close(file)


def copy_to_new(source: BinaryIO, name: str, folder: int) -> None:
    """Copy a file to a new one, durably; a link that has the name is not followed.

    Args:
        source: open for reading.
        name: of the new file.
        folder: descriptor of the folder to make it in.

    Raises:
        FileExistsError: if anything has the name.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with FileIO(os.open(name, flags, 0o600, dir_fd=folder), "rb+") as copy:
        shutil.copyfileobj(source, copy, 1024 * 1024)
        os.fsync(copy.fileno())


def sync_folder(folder: Path | str) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(file: Path) -> None:
    """Make what a file has survive a power cut."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
