"""Open only regular files, because another program may have put a link or a pipe in the place."""

from __future__ import annotations

import errno
import os
import stat

__all__ = ["open_regular"]


def open_regular(path: str | os.PathLike[str], flags: int, folder: int | None = None) -> int:
    """Open a regular file and return its descriptor; pass this as `opener` to `open`.

    Args:
        path: of the file.
        flags: of open(2).
        folder: descriptor of the folder that the path is relative to.

    Raises:
        OSError: for symbolic links and other files that are not regular; its errno is EINVAL.
    """
    try:
        # Opening a pipe without a writer would block, perhaps under the write lock.
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.EACCES and not _is_regular(path, folder):
            raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path)) from None
        what = {errno.ELOOP: "a symbolic link", errno.EISDIR: "a folder", errno.ENXIO: "a socket"}
        if error.errno not in what:
            raise
        raise OSError(errno.EINVAL, f"it is {what[error.errno]}, not a regular file", os.fspath(path)) from None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))


def _is_regular(path: str | os.PathLike[str], folder: int | None) -> bool:
    return stat.S_ISREG(os.stat(path, dir_fd=folder, follow_symlinks=False).st_mode)
