"""Lock files: `flock`, which goes with the process however it dies.

A lock belongs to the open file, and a forked child inherits open files: the child closes its copies at
once, so that it neither keeps its parent's locks alive nor lets go of them.
"""

from __future__ import annotations

import fcntl
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

__all__ = ["acquire", "after_fork", "held", "release"]


class Forkable(Protocol):
    """An object that must be told when it finds itself in a forked child."""

    def forked(self) -> None:
        """Put aside what belongs to the parent."""


_descriptors: set[int] = set()
_forkable: weakref.WeakSet[Forkable] = weakref.WeakSet()
_guard = threading.Lock()  # no fork falls between opening a lock file and noting it


def acquire(path: Path, *, create: bool = True, wait: bool = True) -> int | None:
    """Lock a file exclusively and return its descriptor, for `release`.

    Returns None if another holds the lock and ``wait`` is false, or if there is no such file and ``create``
    is false. A file that was unlinked while we waited for it is not the one that others lock: we try again.
    """
    while True:
        with _guard:
            try:
                descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
            except FileNotFoundError:
                if create:
                    raise
                return None
            _descriptors.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            _close(descriptor)
            return None
        except BaseException:
            _close(descriptor)
            raise
        if os.fstat(descriptor).st_nlink:
            return descriptor
        _close(descriptor)


def release(descriptor: int) -> None:
    """Let go of a lock; one that a fork has already taken from this process is passed over."""
    if descriptor in _descriptors:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        _close(descriptor)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a lock in a block, waiting for it as long as it takes."""
    descriptor = acquire(path)
    assert descriptor is not None
    try:
        yield
    finally:
        release(descriptor)


def after_fork(forkable: Forkable) -> None:
    """Have an object's `forked` called in every child that is forked while it lives."""
    _forkable.add(forkable)


def _close(descriptor: int) -> None:
    _descriptors.discard(descriptor)
    os.close(descriptor)


def _in_child() -> None:
    for descriptor in list(_descriptors):
        _close(descriptor)
    _guard.release()
    for forkable in list(_forkable):
        forkable.forked()


os.register_at_fork(before=_guard.acquire, after_in_parent=_guard.release, after_in_child=_in_child)
