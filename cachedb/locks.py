"""Lock files, and what a fork does to them.

A `flock` goes with the process however it dies. It belongs to the open file, and a forked child inherits
open files: the child closes its copies at once, so that it neither keeps its parent's locks alive nor lets
go of them.

Of many who wait for a `flock` the kernel wakes all, and whoever is quickest has it: with 64 processes one was seen
to wait 4.5 seconds, a hundred times the mean. `in_turn` has them take numbers first, as at a counter. The numbers
are for order alone; what keeps two apart is the lock, whatever becomes of those who wait.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 - its lock is one of those that come after ours, below
import fcntl
import logging  # noqa: F401 - as is this one's
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Protocol

from cachedb.folders import follow

__all__ = ["Turn", "acquire", "after_fork", "before_fork", "held", "in_turn", "release", "unforked"]


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
def held(path: Path) -> Iterator[FileIO]:
    """Hold a lock in a block, waiting for it as long as it takes."""
    file = acquire(path)
    assert file is not None
    try:
        yield file
    finally:
        release(file)


class Turn:
    """A lock that is held in turn, and a mark in its file that outlives whoever dies with it."""

    def __init__(self, file: FileIO) -> None:
        self._file = file

    @property
    def is_lost(self) -> bool:
        """Whether the lock's file was removed, so that others lock another one."""
        return os.fstat(self._file.fileno()).st_nlink == 0

    @property
    def marked(self) -> bool:
        """Whether the last to hold the lock left its mark."""
        return os.pread(self._file.fileno(), 1, 0) == b"!"

    def mark(self) -> None:
        """Say that something has begun that must not be taken for finished."""
        os.pwrite(self._file.fileno(), b"!", 0)

    def unmark(self) -> None:
        """Say that it is finished."""
        os.pwrite(self._file.fileno(), b".", 0)


@contextmanager
def in_turn(path: Path) -> Iterator[Turn]:
    """Hold a lock in a block, in the order of asking; to be called in an `unforked` block."""
    queue = acquire(path.with_suffix(".queue"))
    assert queue is not None
    try:
        last, served = _read(queue, _LAST), _read(queue, _SERVED)
        if not 0 <= last - served <= _WAITING or last > _NUMBERS:
            # Nobody has written that: a power cut may have left it. Who waits sees that numbers begin anew.
            last = 0
            _write(queue, _SERVED, 0)
        number = last + 1
        _write(queue, _LAST, number)
        fcntl.flock(queue, fcntl.LOCK_UN)
        _await_turn(queue, path, number)
        with held(path) as file:
            _write(queue, _SERVED, max(number, _read(queue, _SERVED)))
            yield Turn(file)
    finally:
        _close(queue)


_LAST, _SERVED = 0, 8  # where a queue's file has the last number that was taken, and the number whose turn it is
_PATIENCE = 0.01  # seconds that a lock may be free before whose turn it is has lost it
_NAP = 0.0005  # seconds, for each of those before us
_WAITING = 100_000  # more do not wait
_NUMBERS = 1 << 62  # more are not taken


def _await_turn(queue: FileIO, path: Path, number: int) -> None:
    """Wait until nobody with a lower number is waiting, but for the one who has the lock."""
    served, since, free = -1, 0.0, False
    while (ahead := number - 1 - (now_served := _read(queue, _SERVED))) > 0:
        if number > _read(queue, _LAST):
            return  # the numbers have begun anew, or are lost
        now = time.monotonic()
        if now_served != served:
            served, since, free = now_served, now, False
        elif now - since > _PATIENCE / 2:
            # Is it that the lock is held for long, or has the next one died, or been stopped?
            lock = acquire(path, wait=False)
            if lock is not None:
                # At two looks: before the first it may have been let go of, and the next one not be awake yet.
                if free and _read(queue, _SERVED) == served:
                    _write(queue, _SERVED, served + 1)
                release(lock)
            since, free = now, lock is not None
        time.sleep(min(ahead * _NAP, _PATIENCE))


def _read(queue: FileIO, place: int) -> int:
    return int.from_bytes(os.pread(queue.fileno(), 8, place), "little")


def _write(queue: FileIO, place: int, number: int) -> None:
    os.pwrite(queue.fileno(), number.to_bytes(8, "little"), place)


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
    try:
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CREAT, 0o600)
    follow(file, os.stat(os.path.dirname(path)))
    return file


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
        with suppress(Exception):  # whatever it is, the fork must come to its end
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


# For a fork, the locks of `logging` and of pools of threads are taken as well: by what was registered last first, and
# whoever we wait for may be waiting for them. So both modules are imported above, and what is ours is registered later.
os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_in_child)
