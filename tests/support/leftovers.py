"""Clean up after a test run however it ends, also after SIGKILL, when no fixture is torn down.

A run makes its mounts in a mount namespace of its own, so the kernel unmounts them when the last process of the run
ends. A watcher waits for the end of the run and then kills the processes that the run has left. It finds a process
that runs another program by a mark in the environment, and a fork by an inherited descriptor of the run's pipe.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import select
import signal
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from tests.support.processes import is_alive, open_process

MARK = "CACHEDB_TEST_RUNS"
"""The environment variable with the marks of the runs that a process belongs to, separated by colons."""

QUIET_SEARCHES = 3  # searches in a row that find nothing, before the watcher ends: a process may just have forked
SEARCH_SECONDS = 0.02  # the pause between two searches
LIMIT_SECONDS = 60  # the time after which the watcher gives up on a process that does not die

_CLONE_NEWNS = 0x20000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000


@cache
def isolate_mounts() -> bool:
    """Once, give this process its own mount namespace; return False if that is not permitted: it takes root."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        return False
    return bool(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) == 0)


def start_watcher() -> None:
    """Start a watcher that kills the processes started from now on, once this process has ended."""
    mark = secrets.token_hex(8)
    # Without the mark, so that the watcher does not kill itself.
    before = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    os.environ[MARK] = ":".join(filter(None, (os.environ.get(MARK), mark)))
    pipe, _ = os.pipe()  # both stay open until the end, in this process and in its forks
    command = [sys.executable, "-m", "tests.support.leftovers", str(os.getpid()), mark, str(os.fstat(pipe).st_ino)]
    null = [(os.POSIX_SPAWN_OPEN, file, os.devnull, os.O_RDWR, 0) for file in (0, 1, 2)]
    # In its own process group, so an interrupt of the run does not end the watcher. Not Popen: nobody waits for it.
    os.posix_spawn(sys.executable, command, before, file_actions=null, setpgroup=0)


def find_leftovers(mark: str, pipe: int) -> list[int]:
    """Return the IDs of the processes of a run that are alive.

    Args:
        mark: the run's mark.
        pipe: the inode of the run's pipe.
    """
    return [int(name) for name in os.listdir("/proc") if name.isdecimal() and _belongs(Path("/proc", name), mark, pipe)]


def _belongs(process: Path, mark: str, pipe: int) -> bool:
    if int(process.name) == os.getpid():
        return False
    with suppress(OSError):  # the process has ended, or belongs to another user
        for value in process.joinpath("environ").read_bytes().split(b"\0"):
            name, _, marks = value.decode(errors="replace").partition("=")
            if name == MARK and mark in marks.split(":"):
                return is_alive(int(process.name))
        for file in os.listdir(process / "fd"):
            with suppress(OSError):
                if os.readlink(process / "fd" / file) == f"pipe:[{pipe}]":
                    return is_alive(int(process.name))
    return False


def main() -> None:
    """Wait for the end of a run and kill the processes that it has left."""
    run, mark, pipe = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    with suppress(ProcessLookupError):
        descriptor = open_process(run)
        if os.getppid() == run:  # otherwise the run has ended, and its ID may belong to another process
            select.select([descriptor], [], [])
    end, quiet = time.monotonic() + LIMIT_SECONDS, 0
    while quiet < QUIET_SEARCHES and time.monotonic() < end:
        found = find_leftovers(mark, pipe)
        for process in found:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        quiet = 0 if found else quiet + 1
        time.sleep(SEARCH_SECONDS)


if __name__ == "__main__":
    main()
