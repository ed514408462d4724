"""Lock files, and what a fork does to them.

A `flock` goes with the process however it dies. It belongs to the open file, and a forked child inherits
open files: the child closes its copies at once, so that it neither keeps its parent's locks alive nor lets
go of them.
"""

from __future__ import annotations

import fcntl
import os
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Protocol

__all__ = ["acquire", "after_fork", "before_fork", "held", "release", "unforked"]


class Forkable(Protocol):
    """An object that must be told when it finds itself in a forked child."""

    def forked(self) -> None:
        """Put aside what belongs to the parent."""


class Closable(Protocol):
    """An object that no child may inherit open."""

    def close(self) -> None:
        """Close what is open; it is opened again when it is needed."""


_files: set[FileIO] = set()
_guard = threading.Lock()  # no fork falls between opening a lock file and noting it
_forkable: weakref.WeakSet[Forkable] = weakref.WeakSet()
_closable: weakref.WeakSet[Closable] = weakref.WeakSet()
_changed = threading.Condition()  # guards the two below, and is held during a fork
_unforked: Counter[int] = Counter()  # threads, by the number of `unforked` blocks that each is in
_forking = False


def acquire(path: Path, *, wait: bool = True) -> FileIO | None:
    """Lock a file exclusively, creating it if need be, and return it, for `release`.

    Returns None if another holds the lock and ``wait`` is false. A file that was unlinked while we waited for
    it is not the one that others lock: we try again.
    """
    while True:
        with _guard:
            file = FileIO(path, "r+", opener=_create)
            _files.add(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            _close(file)
            return None
        except BaseException:
            _close(file)
            raise
        if os.fstat(file.fileno()).st_nlink:
            return file
        _close(file)


def release(file: FileIO) -> None:
    """Let go of a lock; one that a fork has already taken from this process is passed over."""
    if not file.closed:
        fcntl.flock(file, fcntl.LOCK_UN)
        _close(file)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a lock in a block, waiting for it as long as it takes."""
    file = acquire(path)
    assert file is not None
    try:
        yield
    finally:
        release(file)


@contextmanager
def unforked() -> Iterator[None]:
    """Have the forks of other threads wait until the end of the block; blocks begun meanwhile wait for the fork."""
    thread = threading.get_ident()
    with _changed:
        while _forking and thread not in _unforked:
            _changed.wait()
        _unforked[thread] += 1
    try:
        yield
    finally:
        with _changed:
            _unforked[thread] -= 1
            if not _unforked[thread]:
                del _unforked[thread]
            _changed.notify_all()


def before_fork(closable: Closable) -> None:
    """Have an object's `close` called before every fork while it lives."""
    with _changed:
        _closable.add(closable)


def after_fork(forkable: Forkable) -> None:
    """Have an object's `forked` called in every child that is forked while it lives."""
    _forkable.add(forkable)


def _create(path: str, _flags: int) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def _close(file: FileIO) -> None:
    _files.discard(file)
    file.close()


def _before() -> None:
    global _forking
    _changed.acquire()
    while _unforked.keys() - {threading.get_ident()}:
        _forking = True
        _changed.wait()
    for closable in list(_closable):
        closable.close()
    _guard.acquire()  # last: a thread in an `unforked` block may be waiting for it


def _after() -> None:
    global _forking
    _guard.release()
    _forking = False
    _changed.notify_all()
    _changed.release()


def _in_child() -> None:
    for file in list(_files):
        _close(file)
    _after()
    for forkable in list(_forkable):
        forkable.forked()


os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_in_child)
