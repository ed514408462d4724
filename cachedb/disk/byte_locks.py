"""Lock single bytes of an open file.

The kernel releases such a lock when the file is closed or its process ends. Like a `flock`, it belongs to the open
file. The two kinds of locks do not conflict. Some sandboxes do not support locks of bytes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

__all__ = ["find_first_locked", "lock_byte", "lock_bytes"]

# The module fcntl lacks these numbers if Python was built with an old C library, as the Pythons that uv installs are.
_F_OFD_GETLK = 36
_F_OFD_SETLK = 37
_FLOCK = struct.Struct("hhqqi0q")  # struct flock on Linux: type, whence, start, length, pid


def lock_bytes(file: int, kind: int, first: int, size: int) -> None:
    """Lock a range of bytes until the file is closed.

    Args:
        file: descriptor of the file.
        kind: ``fcntl.F_RDLCK`` for a shared lock, or ``fcntl.F_WRLCK`` for an exclusive one.
        first: the first byte; it may be after the end of the file.
        size: in bytes; 0 for all bytes from the first.

    Raises:
        OSError: if another open file has locked one of the bytes, or such locks are not supported.
    """
    fcntl.fcntl(file, _F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, first, size, 0))


def lock_byte(file: int, place: int) -> bool:
    """Lock one byte until the file is closed; return False if another open file has locked it.

    If such locks are not supported, return True.
    """
    try:
        lock_bytes(file, fcntl.F_WRLCK, place, 1)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def find_first_locked(file: int, first: int, last: int) -> int | None:
    """Return the lowest byte of a range that another open file has locked, or None if no byte is locked.

    If such locks are not supported, return the first byte of the range.
    """
    found = None
    while first <= last:
        try:
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, first, last - first + 1, 0)
            kind, _, start, _, _ = _FLOCK.unpack(fcntl.fcntl(file, _F_OFD_GETLK, asked))
        except OSError:
            return first
        if kind == fcntl.F_UNLCK:
            break
        found, last = start, start - 1  # the kernel does not return the lowest lock first
    return found
