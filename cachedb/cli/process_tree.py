"""End a command of the user together with the processes that it started.

The command stays in the process group of cachedb. So ^C and ^Z of a terminal reach both, the command can read from the
terminal, and whoever kills the group kills both. A signal to cachedb alone is passed on to the command and to its
descendants, which are found in /proc. A daemon, which has left its parent, goes on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress

from cachedb.disk.lock_holders import PARENT, START, STATE, read_stat

__all__ = ["end_with_descendants"]

_PATIENCE_SECONDS = 10.0  # for the processes to end before they are killed
_POLL_SECONDS = 0.02

_Tree = dict[int, str]  # for each process its start time, because a later process may get the same pid


def end_with_descendants(command: subprocess.Popen[bytes]) -> None:
    """Ask a command and its descendants to end; kill the rest after 10 seconds or at an interrupt."""
    tree: _Tree = {}
    try:
        tree |= (new := _find_descendants({command.pid}))
        command.terminate()
        while new:
            _send(new, signal.SIGTERM)
            found = _find_descendants({command.pid, *tree})  # a process may have started another meanwhile
            new = {pid: start for pid, start in found.items() if pid not in tree}
            tree |= new
        end = time.monotonic() + _PATIENCE_SECONDS
        while (command.poll() is None or any(map(_is_running, tree, tree.values()))) and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
    finally:
        command.kill()
        _send(tree, signal.SIGKILL)


def _send(tree: _Tree, number: signal.Signals) -> None:
    for pid, start in tree.items():
        if _is_running(pid, start):
            with suppress(OSError):  # it has ended, or belongs to another user
                os.kill(pid, number)


def _find_descendants(roots: set[int]) -> _Tree:
    """Return the descendants of processes; none without the /proc of our PID namespace.

    Another namespace has other pids for the same processes.
    """
    found: _Tree = {}
    with suppress(OSError):
        if os.readlink("/proc/self") != str(os.getpid()):
            return found
        stats = {int(name): read_stat(int(name)) for name in os.listdir("/proc") if name.isdecimal()}
        parents = roots
        while parents:
            parents = {pid for pid, stat in stats.items() if stat and int(stat[PARENT]) in parents}
            found |= {pid: stats[pid][START] for pid in parents}
    return found


def _is_running(pid: int, start: str) -> bool:
    stat = read_stat(pid)
    return bool(stat) and stat[START] == start and stat[STATE] not in "ZX"
