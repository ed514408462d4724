"""Read the state of other processes from /proc."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_PIDFD_OPEN = 434  # the number of the system call; os.pidfd_open is missing from the Pythons that uv installs
_STATE, _TIMES = 0, slice(11, 13)  # proc(5) counts from the ID: these are its fields 3, and 14 and 15


def read_state(process: int) -> str:
    """Return the letter of a process's state, as in proc(5): "T" is stopped, "Z" a zombie, "X" has ended."""
    try:
        return _read_stat(process)[_STATE]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def is_alive(process: int) -> bool:
    """Return whether a process has not ended; a zombie, which its parent may reap late, has ended."""
    return read_state(process) not in ("Z", "X")


def open_process(process: int) -> int:
    """Return a descriptor that becomes readable when a process ends.

    Raises:
        ProcessLookupError: if it has ended.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if (descriptor := library.syscall(_PIDFD_OPEN, process, 0)) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(descriptor)


def cpu_seconds(process: int) -> float:
    """Return the seconds of processor time that a process has used."""
    return sum(map(int, _read_stat(process)[_TIMES])) / os.sysconf("SC_CLK_TCK")


def _read_stat(process: int) -> list[str]:
    """Return the fields of a process's stat file after its name, which may contain spaces and parentheses."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
