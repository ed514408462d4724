"""Locks on the bytes of an open file.

The kernel releases them when the file is closed, however its process ends. They belong to the open file, as `flock`s
do, and do not conflict with those. Some sandboxes have none.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

__all__ = ["find_first_locked", "lock_byte", "lock_bytes"]

_FLOCK = struct.Struct("hhqqi0q")  # struct flock, the C library's on Linux: type, whence, start, length, pid


def lock_bytes(file: int, kind: int, first: int, size: int) -> None:
    """Lock a range of bytes until the file is closed.

    Args:
        file: open.
        kind: ``fcntl.F_RDLCK``, which many may have, or ``fcntl.F_WRLCK``.
        first: the first byte; the file may be shorter.
        size: in bytes; 0 for all that follow.

    Raises:
        OSError: if another open file has one of them locked, or there are no such locks.
    """
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, first, size, 0))


def lock_byte(file: int, place: int) -> bool:
    """Lock one byte until the file is closed; return False if another open file has it locked.

    Where there are no such locks, it is as if nobody else had one.
    """
    try:
        lock_bytes(file, fcntl.F_WRLCK, place, 1)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def find_first_locked(file: int, first: int, last: int) -> int | None:
    """Return the lowest byte of a range that another open file has locked, or None if there is none.

    Where that cannot be told, it is the first of the range.
    """
    found = None
    while first <= last:
        try:
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, first, last - first + 1, 0)
            kind, _, start, _, _ = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))
        except OSError:
            return first
        if kind == fcntl.F_UNLCK:
            break
        found, last = start, start - 1  # the kernel's first is not the lowest
    return found
