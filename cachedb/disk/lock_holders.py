"""Find out which process holds a lock, from the record that it wrote into the lock file.

The record only informs people. A process counts as alive while it holds its lock, which the kernel releases at its end.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "PARENT",
    "RECORD",
    "START",
    "STATE",
    "UNKNOWN",
    "Process",
    "clear_record",
    "find_flock_holder",
    "find_index_writer",
    "read_record",
    "read_stat",
    "this_process",
    "write_record",
]


STATE, PARENT, START = 0, 1, 19
"""The fields of `read_stat`: the state, the parent's pid, and the start in clock ticks since the boot."""

RECORD = 1
"""The offset of the record in a lock file, in bytes: after the mark of `turns.Turn`."""

_RECORD_BYTES = 4096  # a longer record is not read
_MAX_COMMAND_CHARS = 120
_WAL_WRITE_LOCK = (120, 120)  # in -shm, the byte that a SQLite writer locks ("WAL-Index Locking Matrix")
_INDEX_LOCKS = (0x40000000, 0x40000000 + 511)  # the bytes of an index that SQLite locks (its os.h)


class Process(NamedTuple):
    """A process that works with the cache, as its record describes it."""

    pid: int
    command: str  # its name and arguments
    uid: int  # of its user
    start: str  # its start time, because a later process may get the same pid
    namespace: str  # its PID namespace; containers have their own pids

    def __str__(self) -> str:
        place = "" if self.has_our_pids else " in another PID namespace"
        return f"process {self.pid}{place}" + (f" ({self.command})" if self.command else "")

    @property
    def has_our_pids(self) -> bool:
        """Whether the pid leads to the process here; False for a process of another PID namespace."""
        return self.namespace == _read_namespace()

    @property
    def is_gone(self) -> bool:
        """Whether the process has surely ended; False for a process of another PID namespace."""
        if not self.has_our_pids or (start := _read_start(self.pid)) == self.start:
            return False
        return bool(start) or not _exists(self.pid)  # /proc may hide the processes of other users (hidepid)

    def with_our_pid(self) -> Process:
        """Return the process with the pid that it has here.

        It is unchanged if it is not found, as outside our container.
        """
        if self.has_our_pids:
            return self
        with suppress(OSError):
            for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
                if _read_start(pid) == self.start and _read_inner_pid(pid) == self.pid:
                    return self._replace(pid=pid, namespace=_read_namespace())
        return self


UNKNOWN = "another process"
"""The name of a process without a record, such as one of an older release."""


def this_process() -> Process:
    """Return the description of this process."""
    return _this_process(os.getpid())  # a forked child has another pid


@cache
def _this_process(pid: int) -> Process:
    name, *arguments = getattr(sys, "argv", None) or [""]
    path = Path(name)
    name = path.parent.name if path.name == "__main__.py" else path.name
    command = " ".join(["python" if name in ("", "-", "-c", "-m") else name, *arguments])
    command = "".join(char if char.isprintable() else "?" for char in command)
    command = command if len(command) <= _MAX_COMMAND_CHARS else f"{command[:_MAX_COMMAND_CHARS]}..."
    return Process(pid, command, os.geteuid(), _read_start(pid), _read_namespace())


def read_stat(pid: int) -> list[str]:
    """Return the fields of a process's stat file after its command; none if it has ended: see proc(5)."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return []


def _read_start(pid: int) -> str:
    stat = read_stat(pid)
    return stat[START] if stat else ""


def _read_inner_pid(pid: int) -> int | None:
    """Return the pid that a process has in its own PID namespace; None if it has ended."""
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return None


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _read_namespace() -> str:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


@cache
def _format_record_start(process: Process) -> str:
    return json.dumps(process._asdict())[:-1]  # without the last brace: more values may follow


def write_record(file: int, offset: int = RECORD, **more: object) -> None:
    """Write a record of this process and more values into a lock file, over the previous record.

    This is one write without a sync. If it fails, as on a full disk, the lock has no record.

    Args:
        file: descriptor of the lock file.
        offset: of the record, in bytes.
        more: the values, which must be serializable as JSON.
    """
    rest = f", {json.dumps(more)[1:]}" if more else "}"
    with suppress(OSError):
        os.pwrite(file, f"{_format_record_start(this_process())}{rest}\n".encode(), offset)


def clear_record(file: int) -> None:
    """Remove the record from a lock file."""
    with suppress(OSError):
        os.pwrite(file, b"\n", RECORD)


def read_record(file: int, offset: int = RECORD) -> tuple[Process, dict[str, Any]] | None:
    """Return the process and the other values in a lock file's record; None without a valid record."""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        values = json.loads(os.pread(file, _RECORD_BYTES, offset).partition(b"\n")[0])
        process = Process(
            int(values.pop("pid")),
            "".join(char if char.isprintable() else "?" for char in str(values.pop("command"))),
            int(values.pop("uid")),
            str(values.pop("start")),
            str(values.pop("namespace")),
        )
        return process, values
    return None


def find_index_writer(index: Path) -> str:
    """Return the process with a write transaction in an index, or "another program" if it is unknown."""
    # Never open these files: closing them would release SQLite's locks in this process. A process with exclusive
    # access locks the index instead of the -shm file.
    for path, first, last in ((f"{index}-shm", *_WAL_WRITE_LOCK), (str(index), *_INDEX_LOCKS)):
        with suppress(OSError):
            if found := _find_kernel_holder("POSIX", os.stat(path), first, last):
                return str(found)
    return "another program"


def find_flock_holder(file: int) -> Process | None:
    """Return a process that has locked an open file with `flock`; None if the kernel lists none."""
    with suppress(OSError):
        return _find_kernel_holder("FLOCK", os.fstat(file))
    return None


def _find_kernel_holder(kind: str, status: os.stat_result, first: int = 0, last: int = 0) -> Process | None:
    """Return a process with a lock on some bytes of a file; None if the kernel lists none.

    The kernel does not list the processes outside this container.
    """
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/locks").read_text().splitlines():
            _, *fields = line.split()
            if fields[0] != kind or int(fields[4].rpartition(":")[2]) != status.st_ino:
                continue  # this also skips a waiting process: its line has an arrow in this field
            if kind == "POSIX" and fields[2] != "WRITE":
                continue
            pid, begin, end = int(fields[3]), int(fields[5]), fields[6]
            if pid > 0 and begin <= last and (end == "EOF" or int(end) >= first):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                name = " ".join([os.path.basename(words[0]), *words[1:]]).strip()[:_MAX_COMMAND_CHARS]
                name = "".join(char if char.isprintable() else "?" for char in name)
                return Process(pid, name, os.stat(f"/proc/{pid}").st_uid, _read_start(pid), _read_namespace())
    return None
