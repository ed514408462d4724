"""Check whether a directory has room for a file: free bytes, free inodes, and the limit on file sizes."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["file_size_limit", "find_shortage", "has_no_inodes"]

# The errors of file systems and old kernels that cannot create a file without a name, or cannot reserve space.
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.ENOSYS)


def has_no_inodes(path: str | os.PathLike[str]) -> bool:
    """Return whether the file system of a path has free space but no free inodes.

    Args:
        path: a file or folder; if it does not exist, its folder is checked.
    """
    for place in (path, os.path.dirname(path) or "."):
        try:
            found = os.statvfs(place)
        except (OSError, ValueError):
            continue
        # A file system without an inode table, such as btrfs, reports 0 inodes.
        return found.f_files > 0 and found.f_favail == 0 and found.f_bavail > 0
    return False


def file_size_limit() -> int | None:
    """Return the size of the largest file in bytes that this process may write (``ulimit -f``), or None."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if limit == resource.RLIM_INFINITY else limit


def find_shortage(directory: Path, size: int, *, offset: int = 0) -> OSError | None:
    """Return why a directory has no room for a new file, or None if it has room.

    The error is a lack of space, inodes or quota, a limit on file sizes, or a failing disk. SQLite's own errors do not
    say which. The check creates a file without a name, which does not exist any more when this returns.

    Args:
        directory: the directory to check.
        size: the bytes to write.
        offset: where they start in the file; the bytes before take no space.
    """
    try:
        try:
            file = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            _check_statistics(directory, size, offset)
            return None
        try:
            _check_name(directory, file)
            os.posix_fallocate(file, offset, size)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            _check_statistics(directory, size, offset)
        finally:
            os.close(file)
    except OSError as error:
        return error
    return None


def _check_name(directory: Path, file: int) -> None:
    """Give a file a name for a moment; raise if there is no room for the name.

    On btrfs without space for metadata, there is room for the file only.

    A process that is killed meanwhile leaves an empty file, whose name is that of an unfinished marker.
    """
    folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    name = f".cachedb-{os.urandom(8).hex()}.marker"
    try:
        # With a folder descriptor Python calls linkat(2), which follows the link in /proc.
        os.link(f"/proc/self/fd/{file}", name, dst_dir_fd=folder)
        os.unlink(name, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, error.strerror, os.fspath(directory)) from error
    finally:
        os.close(folder)


def _check_statistics(directory: Path, size: int, offset: int) -> None:
    """Raise the error that a new file would cause, according to the file system's statistics."""
    found, limit = os.statvfs(directory), file_size_limit()
    if limit is not None and offset + size > limit:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    if found.f_bavail * found.f_frsize < size or (found.f_files > 0 and found.f_favail == 0):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
