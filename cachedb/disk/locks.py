"""Lock files, turns at the write lock, and safe forks.

The kernel releases a `flock` when its process dies. The lock belongs to the open file, and a forked child inherits open
files. The child closes its copies at once, so it neither keeps its parent's locks nor releases them.

When a `flock` is released, the kernel wakes all waiting processes, and the quickest gets the lock. Of 64 processes one
waited 4.5 seconds, a hundred times the mean. So in `hold_in_turn` each process takes a number first. The numbers only
give the order; the lock alone keeps two processes apart.

A waiting process locks the byte of its number in the queue's file. The kernel releases that lock when the process
dies, so the others notice at once. A wait that can be long is a `Wait`: it ends, and it names the holder. `flock` has
no time-out, so we try again after short pauses.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 - it must register its fork hooks before ours, see below
import errno
import fcntl
import logging  # noqa: F401 - as above
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
from cachedb.disk.folders import apply_folder_mode
from cachedb.disk.processes import Process
from cachedb.disk.waiting import LOG, Wait
from cachedb.errors import Busy, CacheReplaced

__all__ = [
    "Turn",
    "Waiter",
    "acquire",
    "close_before_fork",
    "find_holder",
    "find_holder_at",
    "find_waiters",
    "hold_folder_lock",
    "hold_in_turn",
    "hold_lock",
    "is_fork_waiting",
    "is_held",
    "leads_to",
    "no_fork",
    "read_holder",
    "read_holder_of",
    "release",
    "reset_after_fork",
]


class Forkable(Protocol):
    """An object that drops the state of its parent process in a forked child."""

    def forked(self) -> None:
        """Drop the state that belongs to the parent."""


class Closable(Protocol):
    """An object that must be closed before a fork, so that no child inherits its files."""

    def close(self) -> None:
        """Close all files; the object opens them again when it needs them."""


_open_files: set[FileIO] = set()
_guard = threading.RLock()  # held while a lock file is opened, so that no fork misses it; a signal handler may fork
_forkable: weakref.WeakSet[Forkable] = weakref.WeakSet()
_closable: weakref.WeakSet[Closable] = weakref.WeakSet()
_changed = threading.Condition()  # guards the next two variables; held during a fork
_unforked: Counter[int] = Counter()  # for each thread, the number of its open `no_fork` blocks
_forking = False  # whether a fork waits for `no_fork` blocks


def acquire(path: Path, *, wait: bool | Wait = True) -> FileIO | None:
    """Lock a file exclusively and return it open, for `release`; create it if it is missing.

    If the file is unlinked or renamed while we wait, other processes lock a new file. So we try again.

    Args:
        path: of the file.
        wait: False to return None if another process holds the lock; True to wait without limit.

    Raises:
        Busy: if the time to wait is over.
    """
    while True:
        with _guard:
            file = FileIO(path, "r+", opener=_open_or_create)
            _open_files.add(file)
        try:
            _lock(path, file.fileno(), fcntl.LOCK_EX, wait)
        except BlockingIOError:
            _close_file(file)
            return None
        except BaseException:
            _close_file(file)
            raise
        if leads_to(path, file.fileno()):
            return file
        _close_file(file)


def leads_to(path: Path, file: int) -> bool:
    """Return whether a path still leads to an open file, which was not unlinked, renamed or replaced."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextmanager
def hold_folder_lock(path: Path, wait: Wait, *, shared: bool) -> Iterator[None]:
    """Hold the lock of a folder in a block: exclusively, or shared with other processes.

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
    """Lock an open file; return without the lock if the file loses its path meanwhile."""
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
        # Naps grow with the wait, so the last one adds little to it.
        nap = min(max((time.monotonic() - began) / _NAPS_PER_WAIT, _MIN_NAP_SECONDS), _MAX_NAP_SECONDS)
        wait.nap(nap, lambda: find_holder(file))


def read_holder(file: int) -> Process | None:
    """Return the process whose record is in a lock file, or None if that process is gone."""
    record = processes.read_record(file)
    return None if record is None or record[0].is_gone else record[0]


def find_holder(file: int) -> Process | None:
    """Return which process holds a lock, from its record in the file or from the kernel."""
    return read_holder(file) or processes.flock_holder(file)


def is_held(path: Path) -> bool:
    """Return whether a process holds the exclusive lock on a file."""
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
    """Release a lock and close its file, unless a fork has closed the file in this child."""
    if not file.closed:
        fcntl.flock(file, fcntl.LOCK_UN)
        _close_file(file)


@contextmanager
def hold_lock(path: Path, wait: bool | Wait = True) -> Iterator[FileIO]:
    """Hold a lock in a block, with a record of this process in its file.

    Raises:
        Busy: if the time to wait is over.
    """
    file = acquire(path, wait=wait)
    assert file is not None
    try:
        processes.write_record(file.fileno())
        yield file
    finally:
        if not file.closed:  # a fork closes it in the child, and the record belongs to the parent
            processes.clear_record(file.fileno())
        release(file)


class Turn:
    """A lock that is held in turn; its file can have a mark that stays if the holder dies."""

    def __init__(self, file: FileIO, path: Path) -> None:
        self._file, self._path = file, path

    @property
    def is_lost(self) -> bool:
        """Whether the lock's file was removed or renamed, so that other processes lock another file."""
        return not leads_to(self._path, self._file.fileno())

    def check(self, consequence: str) -> None:
        """Check that the lock still keeps other processes out.

        Args:
            consequence: what happened if it does not, and what to do, for the error.

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
        """Whether the last holder of the lock left its mark."""
        return os.pread(self._file.fileno(), 1, 0) == b"!"

    def mark(self) -> None:
        """Mark that work has begun; the mark stays if this process dies before `unmark`."""
        os.pwrite(self._file.fileno(), b"!", 0)

    def unmark(self) -> None:
        """Remove the mark, because the work is finished."""
        os.pwrite(self._file.fileno(), b".", 0)


class Waiter(NamedTuple):
    """A process that waits for its turn."""

    process: Process
    since: float  # seconds since 1970


@contextmanager
def hold_in_turn(path: Path, wait: bool | Wait = True) -> Iterator[Turn]:
    """Hold a lock in a block; processes get it in the order in which they ask.

    A fork need not wait for the block: the child closes its copies of the files.

    Raises:
        Busy: if the time to wait is over.
    """
    queue = _take_number(path)
    try:
        if queue is not None:
            if isinstance(wait, Wait):
                wait.on_begin = partial(_write_waiter, *queue)
            _await_turn(queue[0], path, queue[1], wait)
        with hold_lock(path, wait) as file:
            if queue is not None:
                _write_number(queue[0], _SERVED_OFFSET, max(queue[1], _read_number(queue[0], _SERVED_OFFSET)))
            yield Turn(file, path)
    finally:
        if isinstance(wait, Wait):
            wait.on_begin = None
        if queue is not None:
            release(queue[0])


_LAST_OFFSET, _SERVED_OFFSET = 0, 8  # bytes; a queue's file has there the last number taken and the last one served
_PATIENCE_SECONDS = 0.01  # how long the lock may be free before the next process loses its turn
_NAP_SECONDS = 0.0005  # for each number before ours
_MAX_WAITING = 100_000  # a longer queue is damaged
_MAX_NUMBER = 1 << 62  # a higher number is damaged
_FORK_POLL_SECONDS = 0.1  # a signal handler may end the thread that would notify the fork
_QUEUE_LOCK_SECONDS = 1.0  # the queue is locked for a moment only; a stopped process must not block the others
_RECORDS_OFFSET, _RECORD_BYTES, _RECORD_COUNT = 4096, 512, 1024  # the records of waiting processes in a queue's file
_NAPS_PER_WAIT = 32  # a nap is 1/32 of the wait so far
_MIN_NAP_SECONDS, _MAX_NAP_SECONDS = 0.0002, 0.02


def _take_number(path: Path) -> tuple[FileIO, int] | None:
    """Take a number in a lock's queue; return the queue and the number, or None if the queue is locked."""
    try:
        queue = acquire(path.with_suffix(".queue"), wait=Wait("a number", _QUEUE_LOCK_SECONDS))
    except Busy as error:
        LOG.info("waiting without a turn: %s has locked the queue of the write lock", error.holder)
        return None
    assert queue is not None
    try:
        last, served = _read_number(queue, _LAST_OFFSET), _read_number(queue, _SERVED_OFFSET)
        if not 0 <= last - served <= _MAX_WAITING or last > _MAX_NUMBER:
            # The file is damaged, perhaps by a power cut. Numbers start again, and waiting processes notice it.
            last = 0
            _write_number(queue, _SERVED_OFFSET, 0)
        number = last + 1
        byte_locks.lock_byte(queue.fileno(), number)
        _write_number(queue, _LAST_OFFSET, number)
        fcntl.flock(queue, fcntl.LOCK_UN)
    except BaseException:
        release(queue)  # unlocks it too, because a child forked now may still have a copy
        raise
    return queue, number


def _await_turn(queue: FileIO, path: Path, number: int, wait: bool | Wait) -> None:
    """Wait until no process with a lower number waits, except the holder of the lock."""
    served, since, free = -1, 0.0, False
    while number - 1 - (now_served := _read_number(queue, _SERVED_OFFSET)) > 0:
        if number > _read_number(queue, _LAST_OFFSET):
            return  # the numbers have started again
        # If the kernel cannot tell, this is the next number; we wait for it until its patience is over.
        first = byte_locks.find_first_locked(queue.fileno(), now_served + 1, number - 1)
        if first is None:
            return  # the processes before us died
        now, now_served = time.monotonic(), first - 1
        if now_served != served:
            served, since, free = now_served, now, False
        elif now - since > _PATIENCE_SECONDS / 2:
            # Either the lock is held for long, or the next process is stopped.
            lock = acquire(path, wait=False)
            if lock is not None:
                # Skip the next process only if the lock is free twice: it may be about to wake up.
                if free and _read_number(queue, _SERVED_OFFSET) <= served:
                    _write_number(queue, _SERVED_OFFSET, served + 1)
                release(lock)
            since, free = now, lock is not None
        nap = min((number - first) * _NAP_SECONDS, _PATIENCE_SECONDS)
        if isinstance(wait, Wait):
            wait.nap(nap, lambda: find_holder_at(path))
        else:
            time.sleep(nap)


def read_holder_of(path: Path) -> Process | None:
    """Return the process whose record is in the lock file at a path, as `read_holder` does."""
    with suppress(OSError), FileIO(path) as file:
        return read_holder(file.fileno())
    return None


def find_holder_at(path: Path) -> Process | None:
    """Return which process holds the lock at a path, as `find_holder` does."""
    with suppress(OSError), FileIO(path) as file:
        return find_holder(file.fileno())
    return None


def _write_waiter(queue: FileIO, number: int) -> None:
    place = _RECORDS_OFFSET + number % _RECORD_COUNT * _RECORD_BYTES
    processes.write_record(queue.fileno(), place, number=number, since=time.time())


def find_waiters(path: Path) -> list[Waiter]:
    """Return the processes that wait for a lock, in the order of their turns."""
    found = []
    with suppress(FileNotFoundError), FileIO(path.with_suffix(".queue")) as queue:
        first, last = _read_number(queue, _SERVED_OFFSET) + 1, _read_number(queue, _LAST_OFFSET)
        while first <= last and (number := byte_locks.find_first_locked(queue.fileno(), first, last)) is not None:
            record = processes.read_record(queue.fileno(), _RECORDS_OFFSET + number % _RECORD_COUNT * _RECORD_BYTES)
            if record is not None and record[1].get("number") == number:
                with suppress(TypeError, ValueError):
                    found.append(Waiter(record[0], float(record[1].get("since", 0))))
            first = number + 1
    return found


def _read_number(queue: FileIO, place: int) -> int:
    return int.from_bytes(os.pread(queue.fileno(), 8, place), "little")


def _write_number(queue: FileIO, place: int, number: int) -> None:
    os.pwrite(queue.fileno(), number.to_bytes(8, "little"), place)


@contextmanager
def no_fork() -> Iterator[None]:
    """Block `os.fork` in other threads during this block; a block that begins during a fork waits for it.

    The block must end whatever others do. So it calls no function of a caller, and waits for no other process or
    thread.
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
            # First of all: an error from a signal handler before this line would let a fork wait for ever.
            _unforked[thread] -= 1
            with _changed:
                if not _unforked[thread]:
                    del _unforked[thread]
                _changed.notify_all()


def is_fork_waiting() -> bool:
    """Return whether a fork waits for the end of an `no_fork` block in another thread."""
    return _forking


def close_before_fork(closable: Closable) -> None:
    """Register an object whose `close` is called before every fork while the object lives."""
    with _changed:
        _closable.add(closable)


def reset_after_fork(forkable: Forkable) -> None:
    """Register an object whose `forked` is called in every forked child while the object lives."""
    _forkable.add(forkable)


def _open_or_create(path: str, _flags: int) -> int:
    try:
        file, is_new = os.open(path, os.O_RDWR | os.O_NOFOLLOW), False
    except FileNotFoundError:
        file, is_new = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CREAT, 0o600), True
    if os.fstat(file).st_nlink > 1:
        os.close(file)
        raise OSError(errno.EINVAL, "it is a second name of another file, which the lock would change: delete it", path)
    if is_new:
        apply_folder_mode(file, os.stat(os.path.dirname(path)))
    return file


def _close_file(file: FileIO) -> None:
    _open_files.discard(file)
    file.close()


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
        del _unforked[thread]
    _guard.acquire()  # last, because a thread in an `no_fork` block may wait for it
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
        _close_file(file)
    _finish_fork()
    for forkable in list(_forkable):
        forkable.forked()


# `logging` and thread pools take their locks before a fork too. The hook that is registered last runs first. A thread
# that our hook waits for may need those locks. So both modules are imported above, and our hook is registered last.
os.register_at_fork(before=_prepare_fork, after_in_parent=_finish_fork, after_in_child=_finish_fork_in_child)
