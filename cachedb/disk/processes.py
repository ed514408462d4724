"""Which process holds a lock: it writes its name into the lock file, for others to read.

The name is for people alone. Whether a process lives is said by its lock, which the kernel takes from the dead.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["UNKNOWN", "Process", "flock_holder", "index_writer", "read_record", "this_process", "write_record"]


RECORD = 1
"""Where a lock file has its record: behind the mark of `locks.Turn`."""

_RECORD_BYTES = 4096  # a record that is longer is not read
_COMMAND_LENGTH = 120  # characters
_WAL_WRITE_LOCK = (120, 120)  # the byte of the -shm file that SQLite's writer locks (its "WAL-Index Locking Matrix")
_INDEX_LOCKS = (0x40000000, 0x40000000 + 511)  # the bytes of an index that SQLite locks: its os.h
_START_FIELD = 19  # of /proc/PID/stat behind the command: when the process started, in clock ticks after the boot


class Process(NamedTuple):
    """A process that works with the cache, as it says itself."""

    pid: int
    command: str  # its name and arguments
    uid: int  # of its user
    start: str  # with the pid it tells a process from a later one of that pid
    namespace: str  # of its pid: a container's processes have other pids than the host's

    def __str__(self) -> str:
        return f"process {self.pid}" + (f" ({self.command})" if self.command else "")

    @property
    def is_gone(self) -> bool:
        """Whether there is surely no such process any more: one of another container cannot be told."""
        return self.namespace == _namespace() and self.start != _start(self.pid)


UNKNOWN = "another process"
"""What a process is called that has not said its name: an older release does not."""


def this_process() -> Process:
    """Return what this process says of itself."""
    return _this_process(os.getpid())  # a forked child is another one


@cache
def _this_process(pid: int) -> Process:
    name, *arguments = getattr(sys, "argv", None) or [""]
    path = Path(name)
    name = path.parent.name if path.name == "__main__.py" else path.name
    command = " ".join(["python" if name in ("", "-", "-c", "-m") else name, *arguments])
    command = "".join(char if char.isprintable() else "?" for char in command)
    command = command if len(command) <= _COMMAND_LENGTH else f"{command[:_COMMAND_LENGTH]}..."
    return Process(pid, command, os.geteuid(), _start(pid), _namespace())


def _start(pid: int) -> str:
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[_START_FIELD]
    return ""


def _namespace() -> str:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


@cache
def _record(process: Process) -> str:
    return json.dumps(process._asdict())[:-1]


def write_record(file: int, offset: int = RECORD, **more: object) -> None:
    """Write who we are into a lock file, and more values if there are any; what is there is overwritten.

    It costs one write that is never synced. On a full disk there is none, and we have no name.
    """
    rest = f", {json.dumps(more)[1:]}" if more else "}"
    with suppress(OSError):
        os.pwrite(file, f"{_record(this_process())}{rest}\n".encode(), offset)


def clear_record(file: int) -> None:
    """Take our name out of a lock file."""
    with suppress(OSError):
        os.pwrite(file, b"\n", RECORD)


def read_record(file: int, offset: int = RECORD) -> tuple[Process, dict[str, Any]] | None:
    """Return which process has written itself into a lock file, and what else it says; None if none has."""
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


def index_writer(index: Path) -> str:
    """Return which process has a write transaction in an index, as far as the kernel says."""
    # The files are not opened: to close them would let go of the locks that SQLite has in this process. Who has the
    # index for itself alone locks the index, and no -shm.
    for path, first, last in ((f"{index}-shm", *_WAL_WRITE_LOCK), (str(index), *_INDEX_LOCKS)):
        with suppress(OSError):
            if found := _kernel_holder("POSIX", os.stat(path), first, last):
                return str(found)
    return "another program"


def flock_holder(file: int) -> Process | None:
    """Return which process has locked an open file with `flock`, alone or with others, as far as the kernel says."""
    with suppress(OSError):
        return _kernel_holder("FLOCK", os.fstat(file))
    return None


def _kernel_holder(kind: str, status: os.stat_result, first: int = 0, last: int = 0) -> Process | None:
    """Return which process has a lock on one of some bytes of a file; None if the kernel does not say.

    It says nothing of processes outside of this container.
    """
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/locks").read_text().splitlines():
            _, *fields = line.split()
            if fields[0] != kind or int(fields[4].rpartition(":")[2]) != status.st_ino:
                continue  # so is one that waits, which has an arrow there
            if kind == "POSIX" and fields[2] != "WRITE":
                continue
            pid, begin, end = int(fields[3]), int(fields[5]), fields[6]
            if pid > 0 and begin <= last and (end == "EOF" or int(end) >= first):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                name = " ".join([os.path.basename(words[0]), *words[1:]]).strip()[:_COMMAND_LENGTH]
                name = "".join(char if char.isprintable() else "?" for char in name)
                return Process(pid, name, os.stat(f"/proc/{pid}").st_uid, _start(pid), _namespace())
    return None
