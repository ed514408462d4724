"""Lock files, and what a fork does to them.

A `flock` goes with the process however it dies. It belongs to the open file, and a forked child inherits
open files: the child closes its copies at once, so that it neither keeps its parent's locks alive nor lets
go of them.

When a `flock` is released, the kernel wakes all processes that wait for it, and the quickest gets it. Of 64 processes
one waited 4.5 seconds, a hundred times the mean. So `in_turn` has them take numbers first, as at a counter. The
numbers only give the order; the lock alone keeps two processes apart.

A process that waits with a number has a lock on the byte of that number in the queue's file. The kernel releases it
when the process dies, so the others see at once that it is gone. A wait that can be long is a `Wait`: it ends, and it
names the holder. `flock` has no time-out, so we try again after short pauses.
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
from functools import partial
from io import FileIO
from pathlib import Path
from typing import NamedTuple, Protocol

from cachedb.disk import byte_locks, processes
from cachedb.disk.folders import follow
from cachedb.disk.processes import Process
from cachedb.disk.waiting import LOG, Wait
from cachedb.errors import Busy, CacheReplaced

__all__ = [
    "Turn",
    "Waiter",
    "acquire",
    "after_fork",
    "before_fork",
    "find_holder",
    "find_holder_of",
    "held",
    "held_folder",
    "holder",
    "holder_of",
    "in_turn",
    "is_fork_waiting",
    "is_held",
    "leads_to",
    "release",
    "unforked",
    "waiters",
]


class Forkable(Protocol):
    """An object that must be told when it finds itself in a forked child."""

    def forked(self) -> None:
        """Put aside what belongs to the parent."""


class Closable(Protocol):
    """An object that no child may inherit open."""

    def close(self) -> None:
        """Close what is open; it is opened again when it is needed."""


_files: set[FileIO] = set()
_guard = threading.RLock()  # no fork falls between opening a lock file and noting it; a signal's handler may fork
_forkable: weakref.WeakSet[Forkable] = weakref.WeakSet()
_closable: weakref.WeakSet[Closable] = weakref.WeakSet()
_changed = threading.Condition()  # guards the two below, and is held during a fork
_unforked: Counter[int] = Counter()  # threads, by the number of `unforked` blocks that each is in
_forking = False


def acquire(path: Path, *, wait: bool | Wait = True) -> FileIO | None:
    """Lock a file exclusively, creating it if need be, and return it, for `release`.

    Returns None if another holds the lock and ``wait`` is false. A file that was unlinked or renamed while we waited
    for it is not the one that others lock: we try again.

    Args:
        path: of the file.
        wait: how long to wait; True for as long as it takes.

    Raises:
        Busy: if the time to wait is over.
    """
    while True:
        with _guard:
            file = FileIO(path, "r+", opener=_create)
            _files.add(file)
        try:
            _lock(path, file.fileno(), fcntl.LOCK_EX, wait)
        except BlockingIOError:
            _close(file)
            return None
        except BaseException:
            _close(file)
            raise
        if leads_to(path, file.fileno()):
            return file
        _close(file)


def leads_to(path: Path, file: int) -> bool:
    """Return whether a path still leads to an open file; else the file was unlinked, renamed or replaced."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextmanager
def held_folder(path: Path, wait: Wait, *, shared: bool) -> Iterator[None]:
    """Hold the lock of a folder in a block, alone or with all who share it.

    Raises:
        Busy: if the time to wait is over.
    """
    while True:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _lock(path, folder, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, wait)
            if leads_to(path, folder):
                yield
                return
        finally:
            os.close(folder)


def _lock(path: Path, file: int, operation: int, wait: bool | Wait) -> None:
    """Lock an open file; a file that loses its path meanwhile may be left without its lock."""
    if not isinstance(wait, Wait):
        fcntl.flock(file, operation | (0 if wait else fcntl.LOCK_NB))
        return
    began = time.monotonic()
    while True:
        try:
            fcntl.flock(file, operation | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not leads_to(path, file):
                return
        # The longer it takes, the less a nap that is too long adds to it.
        nap = min(max((time.monotonic() - began) / _NAPS, _SHORTEST_NAP), _LONGEST_NAP)
        wait.nap(nap, lambda: find_holder(file))


def holder(file: int) -> Process | None:
    """Return which process has written its name into a lock file, unless it is gone."""
    record = processes.read_record(file)
    return None if record is None or record[0].is_gone else record[0]


def find_holder(file: int) -> Process | None:
    """Return which process holds a lock: by its name in the file, else as the kernel says."""
    return holder(file) or processes.flock_holder(file)


def is_held(path: Path) -> bool:
    """Return whether anybody holds a lock; the lock is not taken by that."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def release(file: FileIO) -> None:
    """Let go of a lock; one that a fork has already taken from this process is passed over."""
    if not file.closed:
        fcntl.flock(file, fcntl.LOCK_UN)
        _close(file)


@contextmanager
def held(path: Path, wait: bool | Wait = True) -> Iterator[FileIO]:
    """Hold a lock in a block, under the name of this process.

    Raises:
        Busy: if the time to wait is over.
    """
    file = acquire(path, wait=wait)
    assert file is not None
    try:
        processes.write_record(file.fileno())
        yield file
    finally:
        if not file.closed:  # in a forked child it is, and the record is its parent's
            processes.clear_record(file.fileno())
        release(file)


class Turn:
    """A lock that is held in turn, and a mark in its file that outlives whoever dies with it."""

    def __init__(self, file: FileIO, path: Path) -> None:
        self._file, self._path = file, path

    @property
    def is_lost(self) -> bool:
        """Whether the lock's file was removed or renamed, so that others lock another one."""
        return not leads_to(self._path, self._file.fileno())

    def check(self, consequence: str) -> None:
        """Make sure that others still wait for this lock.

        Args:
            consequence: what follows if they do not, for the error.

        Raises:
            CacheReplaced: if the lock is lost.
        """
        if self.is_lost:
            raise CacheReplaced(
                f"{str(self._path)!r} was removed or renamed while it was locked; {consequence}, and keep cleaners of "
                "old files out of the cache"
            )

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


class Waiter(NamedTuple):
    """A process that waits for its turn."""

    process: Process
    since: float  # seconds since 1970


@contextmanager
def in_turn(path: Path, wait: bool | Wait = True) -> Iterator[Turn]:
    """Hold a lock in a block, in the order of asking. Forks need not wait: a child closes its copies of the files.

    Raises:
        Busy: if the time to wait is over.
    """
    queue = _take_number(path)
    try:
        if queue is not None:
            if isinstance(wait, Wait):
                wait.on_begin = partial(_sign, *queue)
            _await_turn(queue[0], path, queue[1], wait)
        with held(path, wait) as file:
            if queue is not None:
                _write(queue[0], _SERVED, max(queue[1], _read(queue[0], _SERVED)))
            yield Turn(file, path)
    finally:
        if isinstance(wait, Wait):
            wait.on_begin = None
        if queue is not None:
            release(queue[0])  # a child that is forked now may have a copy still, which would keep the lock


_LAST, _SERVED = 0, 8  # where a queue's file has the last number that was taken, and the number whose turn it is
_PATIENCE = 0.01  # seconds that a lock may be free before whose turn it is has lost it
_NAP = 0.0005  # seconds, for each of those before us
_WAITING = 100_000  # more do not wait
_NUMBERS = 1 << 62  # more are not taken
_NOTICE = 0.1  # seconds after which a fork looks again, if a signal's handler has ended the thread that was to tell it
_COUNTER_SECONDS = 1.0  # for the queue's file, which is locked for a moment: who is stopped in it holds nobody up
_RECORDS, _RECORD_SIZE, _RECORD_COUNT = 4096, 512, 1024  # where a queue's file has who waits: place, bytes, number
_NAPS = 32  # that are in the time waited for a lock so far
_SHORTEST_NAP, _LONGEST_NAP = 0.0002, 0.02  # seconds


def _take_number(path: Path) -> tuple[FileIO, int] | None:
    """Return a lock's queue and a number in it, with the lock on that number; None if the queue cannot be had."""
    try:
        queue = acquire(path.with_suffix(".queue"), wait=Wait("a number", _COUNTER_SECONDS))
    except Busy as error:
        LOG.info("not in turn: the queue of the write lock is locked by %s", error.holder)
        return None
    assert queue is not None
    try:
        last, served = _read(queue, _LAST), _read(queue, _SERVED)
        if not 0 <= last - served <= _WAITING or last > _NUMBERS:
            # Nobody has written that: a power cut may have left it. Who waits sees that numbers begin anew.
            last = 0
            _write(queue, _SERVED, 0)
        number = last + 1
        byte_locks.lock_byte(queue.fileno(), number)
        _write(queue, _LAST, number)
        fcntl.flock(queue, fcntl.LOCK_UN)
    except BaseException:
        release(queue)  # a child that is forked now may have a copy still
        raise
    return queue, number


def _await_turn(queue: FileIO, path: Path, number: int, wait: bool | Wait) -> None:
    """Wait until nobody with a lower number is waiting, but for the one who has the lock."""
    served, since, free = -1, 0.0, False
    while number - 1 - (now_served := _read(queue, _SERVED)) > 0:
        if number > _read(queue, _LAST):
            return  # the numbers have begun anew, or are lost
        # If the kernel cannot tell, this is the next number, which is waited for until `_PATIENCE` is over.
        first = byte_locks.find_first_locked(queue.fileno(), now_served + 1, number - 1)
        if first is None:
            return  # those before us have died
        now, now_served = time.monotonic(), first - 1
        if now_served != served:
            served, since, free = now_served, now, False
        elif now - since > _PATIENCE / 2:
            # Is it that the lock is held for long, or has the next one been stopped?
            lock = acquire(path, wait=False)
            if lock is not None:
                # At two looks: before the first it may have been let go of, and the next one not be awake yet.
                if free and _read(queue, _SERVED) <= served:
                    _write(queue, _SERVED, served + 1)
                release(lock)
            since, free = now, lock is not None
        nap = min((number - first) * _NAP, _PATIENCE)
        if isinstance(wait, Wait):
            wait.nap(nap, lambda: find_holder_of(path))
        else:
            time.sleep(nap)


def holder_of(path: Path) -> Process | None:
    """Return which process holds a lock, if it has written its name into the file."""
    with suppress(OSError), FileIO(path) as file:
        return holder(file.fileno())
    return None


def find_holder_of(path: Path) -> Process | None:
    """Return which process holds a lock, as `find_holder` does."""
    with suppress(OSError), FileIO(path) as file:
        return find_holder(file.fileno())
    return None


def _sign(queue: FileIO, number: int) -> None:
    place = _RECORDS + number % _RECORD_COUNT * _RECORD_SIZE
    processes.write_record(queue.fileno(), place, number=number, since=time.time())


def waiters(path: Path) -> list[Waiter]:
    """Return who waits for a lock, in the order of their turns."""
    found = []
    with suppress(FileNotFoundError), FileIO(path.with_suffix(".queue")) as queue:
        first, last = _read(queue, _SERVED) + 1, _read(queue, _LAST)
        while first <= last and (number := byte_locks.find_first_locked(queue.fileno(), first, last)) is not None:
            record = processes.read_record(queue.fileno(), _RECORDS + number % _RECORD_COUNT * _RECORD_SIZE)
            if record is not None and record[1].get("number") == number:
                with suppress(TypeError, ValueError):
                    found.append(Waiter(record[0], float(record[1].get("since", 0))))
            first = number + 1
    return found


def _read(queue: FileIO, place: int) -> int:
    return int.from_bytes(os.pread(queue.fileno(), 8, place), "little")


def _write(queue: FileIO, place: int, number: int) -> None:
    os.pwrite(queue.fileno(), number.to_bytes(8, "little"), place)


@contextmanager
def unforked() -> Iterator[None]:
    """Have the forks of other threads wait until the end of the block; blocks begun meanwhile wait for the fork.

    The block is for work of our own that comes to its end whatever others do: it calls no function of a caller, and
    waits neither for another process nor for another thread.
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
            # Before anything that a signal's handler could end: a fork would wait for ever.
            _unforked[thread] -= 1
            with _changed:
                if not _unforked[thread]:
                    del _unforked[thread]
                _changed.notify_all()


def is_fork_waiting() -> bool:
    """Return whether a fork of another thread waits for the end of an `unforked` block."""
    return _forking


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
    thread = threading.get_ident()
    raised: BaseException | None = None
    while any(count for other, count in _unforked.items() if other != thread):
        _forking = True
        try:
            _changed.wait(_NOTICE)
        except BaseException as error:  # of a signal's handler: Python forks nevertheless, and prints it
            raised = error
    _unforked[thread] += 1  # they may use `unforked` blocks
    for closable in list(_closable):
        with suppress(Exception):  # whatever it is, the fork must come to its end
            closable.close()
    _unforked[thread] -= 1
    if not _unforked[thread]:
        del _unforked[thread]
    _guard.acquire()  # last: a thread in an `unforked` block may be waiting for it
    if raised:
        raise raised


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
