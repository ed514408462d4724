"""Write files durably: a file gets its name only when it is whole.

On most file systems an unfinished file has no name, so a killed process leaves nothing. On others it has a name from
`part_path`, and its process holds a lock on it. `remove_leftovers` removes such files that are not locked.
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

from cachedb.disk.folders import apply_folder_mode
from cachedb.errors import ignore_os_errors, is_callers

__all__ = [
    "PART_NAME",
    "atomic_file",
    "clone_content",
    "copy_to_new",
    "lock_part",
    "part_path",
    "remove_leftovers",
    "sync_file",
    "sync_folder",
]


PART_NAME = re.compile(r"\.cachedb-[0-9a-f]{32}\.part")
"""Matches the names of `part_path`. Old releases used names of half that length, without locks."""

_UNSUPPORTED_ERRNOS = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS)
_FICLONE = 0x40049409  # ioctl_ficlone(2)


def part_path(folder: Path) -> Path:
    """Return a new path for a file that is not whole yet."""
    return folder / f".cachedb-{secrets.token_hex(16)}.part"


def lock_part(file: int) -> None:
    """Lock a file, to show that its process lives; do nothing if the file system has no locks."""
    with ignore_os_errors():
        fcntl.flock(file, fcntl.LOCK_SH)


@contextmanager
def atomic_file(path: Path) -> Iterator[FileIO]:
    """Yield a new file that gets its name, whole and synced, at the end of the block.

    It replaces an existing file; after an error that file stays. The caller syncs the folder.
    """
    part = part_path(path.parent)
    file, unnamed = _make_file(part)
    try:
        with file:
            yield file
            os.fsync(file.fileno())
            if unnamed:
                _link_part(file, part)
            part.rename(path)  # the file is still locked here
    finally:
        with ignore_os_errors():  # an error here would hide the first one
            part.unlink(missing_ok=True)


def _make_file(part: Path) -> tuple[FileIO, bool]:
    """Return a new file, and whether it has no name; otherwise its name is ``part``."""
    try:
        unnamed = os.open(part.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in _UNSUPPORTED_ERRNOS:
            raise
        return _make_part(part), False
    if not os.path.exists(f"/proc/self/fd/{unnamed}"):  # `_link_part` needs /proc
        os.close(unnamed)
        return _make_part(part), False
    file = FileIO(unnamed, "rb+")
    lock_part(unnamed)
    return file, True


def _make_part(part: Path) -> FileIO:
    while True:
        file = FileIO(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "rb+")
        lock_part(file.fileno())
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another process removed it as a leftover before we locked it


def _link_part(file: FileIO, part: Path) -> None:
    """Give a file without a name the name of the part."""
    folder = os.open(part.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # With a folder descriptor Python calls linkat(2), which follows the link in /proc.
        os.link(f"/proc/self/fd/{file.fileno()}", part.name, dst_dir_fd=folder)
    except OSError:  # some file systems create files without names, but cannot link them
        with _make_part(part) as copy:
            file.seek(0)
            shutil.copyfileobj(file, copy, 1024 * 1024)
            os.fsync(copy.fileno())
    finally:
        os.close(folder)


def remove_leftovers(folder: Path, names: re.Pattern[str] = PART_NAME, *, beside: str = "") -> None:
    """Remove the files of killed processes from a folder: files of our user that are not locked.

    A file stays if it cannot be removed, or if its process may be alive.

    Args:
        folder: to clean up.
        names: matches the names of such files.
        beside: also remove the file with the same name and this suffix.
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
        found = os.lstat(path)  # before we had the lock, its process may have renamed it
        if (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino):
            if beside:
                with ignore_os_errors():
                    os.unlink(path + beside)
            os.unlink(path)
    finally:
        os.close(file)


def copy_to_new(source: BinaryIO, name: str, folder: int) -> None:
    """Copy an open file durably to a new file, which gets the mode of its folder.

    Args:
        source: open for reading.
        name: of the new file.
        folder: descriptor of the folder of the new file.

    Raises:
        FileExistsError: if the name exists, even as a link.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with FileIO(os.open(name, flags, 0o600, dir_fd=folder), "rb+") as copy:
        shutil.copyfileobj(source, copy, 1024 * 1024)
        apply_folder_mode(copy.fileno(), os.fstat(folder))
        os.fsync(copy.fileno())


def clone_content(source: int, target: int) -> bool:
    """Make an empty file a reflink to another file; return False if a file system does not support it.

    Args:
        source: descriptor of the file with the bytes.
        target: descriptor of the empty file.

    Raises:
        OSError: if the disk is full or fails.
    """
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if is_callers(error) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        return False
    return True


def sync_folder(folder: Path | str) -> None:
    """Sync a folder, so that its names survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(file: Path) -> None:
    """Sync a file, so that its content survives a power cut."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
