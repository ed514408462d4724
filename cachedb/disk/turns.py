"""A lock that processes get in the order in which they ask.

When a `flock` is released, the kernel wakes all waiting processes, and the quickest gets the lock. In a test with 64
processes, one waited 4.5 seconds, a hundred times the mean. So in `hold_in_turn` each process takes a number first. The
numbers only give the order. The lock alone excludes other processes.

A waiting process locks the byte of its number in the queue's file. The kernel releases that lock when the process
dies, so the others notice at once.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from cachedb.disk import byte_locks, lock_holders, locks
from cachedb.disk.lock_holders import Process
from cachedb.disk.regular import open_regular
from cachedb.disk.waiting import LOG, Wait
from cachedb.errors import Busy, CacheReplaced

__all__ = ["Turn", "Waiter", "find_waiters", "hold_in_turn"]


_LAST_OFFSET, _SERVED_OFFSET = 0, 8  # bytes; the places of the last number taken, and of the last one served
_PATIENCE_SECONDS = 0.01  # how long the lock may be free before the next process loses its turn
_NAP_SECONDS = 0.0005  # for each number before ours
_MAX_WAITING = 100_000  # a longer queue is damaged
_MAX_NUMBER = 1 << 62  # a higher number is damaged
_QUEUE_LOCK_SECONDS = 1.0  # the queue is locked for a moment only; a stopped process must not block the others
_RECORDS_OFFSET, _RECORD_BYTES, _RECORD_COUNT = 4096, 512, 1024  # the records of waiting processes in a queue's file


class Turn:
    """A lock that is held in turn; its file can have a mark that stays if the holder dies."""

    def __init__(self, file: FileIO, path: Path) -> None:
        self._file, self._path = file, path

    @property
    def is_lost(self) -> bool:
        """Whether the lock's file was removed or renamed, so that other processes lock another file."""
        return not locks.leads_to(self._path, self._file.fileno())

    def check(self, consequence: str) -> None:
        """Check that the lock still keeps other processes out.

        Args:
            consequence: for the error: what happened because the lock was lost, and what to do.

        Raises:
            CacheReplaced: if the lock is lost.
        """
        if self.is_lost:
            raise CacheReplaced(
                f"{str(self._path)!r} was removed or renamed while it was locked; {consequence}, and keep cleaners of "
                "old files out of the cache"
            )

    @property
    def is_marked(self) -> bool:
        """Whether the last holder of the lock left its mark."""
        return os.pread(self._file.fileno(), 1, 0) == b"!"

    def mark(self) -> None:
        """Mark that work has begun; the mark stays if this process dies before `unmark`."""
        os.pwrite(self._file.fileno(), b"!", 0)

    def unmark(self) -> None:
        """Remove the mark, because the work is finished; do nothing if an interrupt has lost the file already."""
        if not self._file.closed:
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
        with locks.hold_lock(path, wait) as file:
            if queue is not None:
                _write_number(queue[0], _SERVED_OFFSET, max(queue[1], _read_number(queue[0], _SERVED_OFFSET)))
            yield Turn(file, path)
    finally:
        if isinstance(wait, Wait):
            wait.on_begin = None
        if queue is not None:
            locks.release(queue[0])


def _take_number(path: Path) -> tuple[FileIO, int] | None:
    """Take a number in a lock's queue; return the queue and the number, or None if the queue is locked."""
    try:
        queue = locks.acquire(path.with_suffix(".queue"), wait=Wait("a number", _QUEUE_LOCK_SECONDS))
    except Busy as error:
        LOG.info("waiting without a turn: %s has locked the queue of the write lock", error.holder)
        return None
    assert queue is not None
    try:
        last, served = _read_number(queue, _LAST_OFFSET), _read_number(queue, _SERVED_OFFSET)
        if not 0 <= last - served <= _MAX_WAITING or last > _MAX_NUMBER:
            # The file is damaged, perhaps by a power cut. Start the numbers again; waiting processes notice it.
            last = 0
            _write_number(queue, _SERVED_OFFSET, 0)
        number = last + 1
        byte_locks.lock_byte(queue.fileno(), number)
        _write_number(queue, _LAST_OFFSET, number)
        fcntl.flock(queue, fcntl.LOCK_UN)
    except BaseException:
        locks.release(queue)  # unlock, and not only close: a child that is forked now may have a copy
        raise
    return queue, number


def _await_turn(queue: FileIO, path: Path, number: int, wait: bool | Wait) -> None:
    """Wait until no process with a lower number waits, except the holder of the lock."""
    served, since, free = -1, 0.0, False
    while number - 1 - (now_served := _read_number(queue, _SERVED_OFFSET)) > 0:
        if number > _read_number(queue, _LAST_OFFSET):
            return  # the numbers have started again
        # If byte locks are not supported, this is the next number, which gets `_PATIENCE_SECONDS`.
        first = byte_locks.find_first_locked(queue.fileno(), now_served + 1, number - 1)
        if first is None:
            return  # the processes before us died
        now, now_served = time.monotonic(), first - 1
        if now_served != served:
            served, since, free = now_served, now, False
        elif now - since > _PATIENCE_SECONDS / 2:
            # Either the lock is held for a long time, or the next process is stopped.
            lock = locks.acquire(path, wait=False)
            if lock is not None:
                # Skip the next process only if the lock is free twice, because it may be about to wake up.
                if free and _read_number(queue, _SERVED_OFFSET) <= served:
                    _write_number(queue, _SERVED_OFFSET, served + 1)
                locks.release(lock)
            since, free = now, lock is not None
        nap = min((number - first) * _NAP_SECONDS, _PATIENCE_SECONDS)
        if isinstance(wait, Wait):
            wait.nap(nap, lambda: locks.find_holder_at(path))
        else:
            time.sleep(nap)


def _write_waiter(queue: FileIO, number: int) -> None:
    place = _RECORDS_OFFSET + number % _RECORD_COUNT * _RECORD_BYTES
    lock_holders.write_record(queue.fileno(), place, number=number, since=time.time())


def find_waiters(path: Path) -> list[Waiter]:
    """Return the processes that wait for a lock, in the order of their turns."""
    found = []
    with suppress(OSError), FileIO(path.with_suffix(".queue"), opener=open_regular) as queue:
        first, last = _read_number(queue, _SERVED_OFFSET) + 1, _read_number(queue, _LAST_OFFSET)
        while first <= last and (number := byte_locks.find_first_locked(queue.fileno(), first, last)) is not None:
            record = lock_holders.read_record(queue.fileno(), _RECORDS_OFFSET + number % _RECORD_COUNT * _RECORD_BYTES)
            if record is not None and record[1].get("number") == number:
                with suppress(TypeError, ValueError):
                    found.append(Waiter(record[0], float(record[1].get("since", 0))))
            first = number + 1
    return found


def _read_number(queue: FileIO, place: int) -> int:
    return int.from_bytes(os.pread(queue.fileno(), 8, place), "little")


def _write_number(queue: FileIO, place: int, number: int) -> None:
    os.pwrite(queue.fileno(), number.to_bytes(8, "little"), place)
