"""Keep locks, connections and open files correct when the process forks.

A forked child inherits open files, and with them the locks that belong to them. The child closes its copies at once, so
it neither keeps its parent's locks nor releases them. Other objects close before a fork, or drop their state in the
child. A `no_fork` block delays the forks of other threads.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 - it must register its fork hooks before ours, see below
import logging  # noqa: F401 - as above
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

__all__ = [
    "OwnFile",
    "close_before_fork",
    "close_own",
    "is_fork_waiting",
    "no_fork",
    "open_own",
    "reset_after_fork",
]


_FORK_POLL_SECONDS = 0.1  # a fork polls, because a signal handler may end the thread that would notify it


class Forkable(Protocol):
    """An object that drops the state of its parent process in a forked child."""

    def forked(self) -> None:
        """Drop the state that belongs to the parent."""


class OwnFile(Protocol):
    """An open file or folder that a forked child closes."""

    @property
    def closed(self) -> bool:
        """Whether it is closed."""

    def fileno(self) -> int:
        """Return the descriptor."""

    def close(self) -> None:
        """Close it."""


class Closable(Protocol):
    """An object that must be closed before a fork, so that no child inherits its files."""

    def close(self) -> None:
        """Close all files; the object opens them again when it needs them."""


F = TypeVar("F", bound=OwnFile)

_open_files: weakref.WeakSet[OwnFile] = weakref.WeakSet()  # weak: a file that an interrupt loses is closed
_guard = threading.RLock()  # held while a file is opened, so that no fork misses it; reentrant for signal handlers
_forkable: weakref.WeakSet[Forkable] = weakref.WeakSet()
_closable: weakref.WeakSet[Closable] = weakref.WeakSet()
_changed = threading.Condition()  # guards the next two variables; held during a fork
_unforked: Counter[int] = Counter()  # for each thread, the number of its open `no_fork` blocks
_forking = False  # whether a fork waits for `no_fork` blocks


def open_own(open_file: Callable[[], F]) -> F:
    """Open a file that forked children close at once; close it with `close_own`."""
    with _guard:
        file = open_file()
        _open_files.add(file)
    return file


def close_own(file: OwnFile) -> None:
    """Close a file that `open_own` opened."""
    file.close()
    _open_files.discard(file)


@contextmanager
def no_fork() -> Iterator[None]:
    """Block `os.fork` in other threads during this block; a block that begins during a fork waits for it.

    The block must end by itself. So it must not call a function of a caller, nor wait for another process or thread.
    """
    thread, counted = threading.get_ident(), False
    try:
        with _changed:
            while _forking and not _unforked.get(thread):
                _changed.wait()
            _unforked[thread] += 1
            counted = True
        yield
    finally:
        if counted:
            # Do this first: if a signal handler raised an error before this line, forks would wait forever.
            _unforked[thread] -= 1
            with _changed:
                if not _unforked[thread]:
                    _unforked.pop(thread, None)  # a signal handler may have removed it
                _changed.notify_all()


def is_fork_waiting() -> bool:
    """Return whether a fork waits for the end of a `no_fork` block in another thread."""
    return _forking


def close_before_fork(closable: Closable) -> None:
    """Register an object whose `close` is called before every fork while the object lives."""
    with _changed:
        _closable.add(closable)


def reset_after_fork(forkable: Forkable) -> None:
    """Register an object whose `forked` is called in every forked child while the object lives."""
    _forkable.add(forkable)


def _prepare_fork() -> None:
    global _forking
    _changed.acquire()
    thread = threading.get_ident()
    raised: BaseException | None = None
    while any(count for other, count in _unforked.items() if other != thread):
        _forking = True
        try:
            _changed.wait(_FORK_POLL_SECONDS)
        except BaseException as error:  # from a signal handler; Python prints it and forks nevertheless
            raised = error
    _unforked[thread] += 1  # `close` may use `no_fork` blocks
    for closable in list(_closable):
        with suppress(Exception):  # the fork must go on
            closable.close()
    _unforked[thread] -= 1
    if not _unforked[thread]:
        _unforked.pop(thread, None)
    _guard.acquire()  # last, because a thread in a `no_fork` block may wait for it
    if raised:
        raise raised


def _finish_fork() -> None:
    global _forking
    _guard.release()
    _forking = False
    _changed.notify_all()
    _changed.release()


def _finish_fork_in_child() -> None:
    for file in list(_open_files):
        close_own(file)
    _finish_fork()
    for forkable in list(_forkable):
        forkable.forked()


# `logging` and thread pools take locks before a fork too, in hooks of their own. A thread that this module's hook waits
# for may need those locks, so this hook must run first. The hook that is registered last runs first. So both modules
# are imported above.
os.register_at_fork(before=_prepare_fork, after_in_parent=_finish_fork, after_in_child=_finish_fork_in_child)
