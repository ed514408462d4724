"""What a directory has room for: bytes, inodes, and files as large as the process may write."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["file_size_limit", "find_shortage", "has_no_inodes"]

# A file system, or an old kernel, that cannot make a file without a name answers with one of these.
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.ENOSYS)


def has_no_inodes(path: str | os.PathLike[str]) -> bool:
    """Return whether the file system of a path has space, and no inode for another file.

    Args:
        path: a file or folder; of one that does not exist, its folder is looked at.
    """
    for place in (path, os.path.dirname(path) or "."):
        try:
            found = os.statvfs(place)
        except (OSError, ValueError):
            continue
        # A file system without a table of inodes, such as btrfs, says that it has 0 of them.
        return found.f_files > 0 and found.f_favail == 0 and found.f_bavail > 0
    return False


def file_size_limit() -> int | None:
    """Return the largest size in bytes to which this process may write a file (``ulimit -f``); None without a limit."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if limit == resource.RLIM_INFINITY else limit


def find_shortage(directory: Path, size: int, *, offset: int = 0) -> OSError | None:
    """Return why a directory cannot take a new file, or None if it can: space, inodes, quota, limit, a failing disk.

    What SQLite says of that is vague. So a file without a name is made, which is gone again when this returns.

    Args:
        directory: to make the file in.
        size: in bytes, for which there must be room.
        offset: at which they begin; what comes before takes no space.
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


def _check_statistics(directory: Path, size: int, offset: int) -> None:
    """Raise the error that a new file would meet, as far as the file system's numbers tell."""
    found, limit = os.statvfs(directory), file_size_limit()
    if limit is not None and offset + size > limit:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    if found.f_bavail * found.f_frsize < size or (found.f_files > 0 and found.f_favail == 0):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
