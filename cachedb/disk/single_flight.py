"""Single flight: if several processes want the same thing, one produces it and the others wait for it.

The producer has a claim: a lock file that it holds. `show_progress` sets the file's modification time, which says when
the work last made progress. A waiting process may take over a claim without progress, such as a download that
trickles. It unlinks the file, and the former owner, if it continues, sees that its claim is lost.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import NamedTuple, TypeVar

from cachedb.disk import byte_locks, locks, processes
from cachedb.disk.folders import Folders, Leftover
from cachedb.disk.layout import lock_kind
from cachedb.disk.processes import Process
from cachedb.disk.waiting import LOG, Wait, chosen_seconds
from cachedb.errors import CacheError, explain, ignore_os_errors, os_errors
from cachedb.threads import start

__all__ = ["Claim", "ClaimLost", "check_claim", "claims", "once", "show_progress", "sweep", "unless_made"]


T = TypeVar("T")

_SUFFIX = ".producing"
_NAP = 0.02  # seconds between two looks
_PROGRESS_SECONDS = 1.0  # between two notes of progress
_STALLED_SECONDS = 30.0  # without progress, after which a claim may be taken over
_REMOVING = 1 << 40  # the byte of a claim's file that is locked while it is unlinked
_REMOVAL_SECONDS = 1.0  # to wait for that lock, which is held for a moment
_mine = threading.local()
_claims: dict[Path, FileIO] = {}  # of this process
_noted: dict[Path, float] = {}  # when progress was last noted
# What its parent makes is not a child's own.
os.register_at_fork(after_in_child=_claims.clear)
os.register_at_fork(after_in_child=lambda: _mine.__dict__.clear())


class ClaimLost(CacheError):
    """Another process has taken over a claim of this one, because it made no progress."""


def _path(directory: Path, key: str) -> Path:
    return directory / "locks" / f"{hashlib.sha256(key.encode()).hexdigest()}{_SUFFIX}"


def _making() -> set[Path]:
    """Return the paths of the claims that this thread has."""
    making: set[Path] = _mine.__dict__.setdefault("making", set())
    return making


def _claim(path: Path, key: str) -> FileIO | None:
    """Take a claim; return its lock, or None if another has it."""
    lock = locks.acquire(path, wait=False)
    if lock is not None:
        processes.write_record(lock.fileno(), key=key, since=time.time())
        _claims[path] = lock
    return lock


def _let_go(path: Path, lock: FileIO) -> None:
    if _claims.get(path) is lock:
        del _claims[path]
    try:
        with ignore_os_errors():  # the next open removes it
            _remove(path, lock)
    finally:
        locks.release(lock)


def _remove(path: Path, lock: FileIO, seconds: float = _REMOVAL_SECONDS) -> bool:
    """Unlink a claim's file, unless another one has the name by now; return whether it was unlinked.

    Args:
        path: of the file.
        lock: the file, open.
        seconds: to wait for another process that unlinks it at this moment.
    """
    end = time.monotonic() + seconds
    while not byte_locks.lock_byte(lock.fileno(), _REMOVING):
        if time.monotonic() >= end:
            return False
        time.sleep(_NAP)
    if not locks.leads_to(path, lock.fileno()):
        return False
    path.unlink()
    return True


def show_progress(directory: Path, key: str) -> None:
    """Note that a claim of this process makes progress; do nothing without a claim.

    Raises:
        ClaimLost: if another process has taken it over.
    """
    path = _path(directory, key)
    lock, now = _claims.get(path), time.monotonic()
    if lock is None or now - _noted.get(path, 0.0) < _PROGRESS_SECONDS:
        return
    _noted[path] = now
    check_claim(directory, key)
    with suppress(OSError, ValueError):  # it has been closed by another thread since
        os.utime(lock.fileno())


def check_claim(directory: Path, key: str) -> None:
    """Check that a claim of this process, if it has one, was not taken over.

    Raises:
        ClaimLost: if it was.
    """
    path = _path(directory, key)
    lock = _claims.get(path)
    with suppress(OSError, ValueError):
        if lock is not None and not locks.leads_to(path, lock.fileno()):
            raise ClaimLost(f"{key} was taken over by another process: it made no progress here")


@contextmanager
def _beating(directory: Path, key: str, is_working: Callable[[], bool]) -> Iterator[None]:
    """Note progress in the block every second, from a thread, while the work goes on."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_PROGRESS_SECONDS):
            with suppress(CacheError, OSError):
                if is_working():
                    show_progress(directory, key)

    thread = threading.Thread(target=beat, daemon=True, name="cachedb progress")
    start(thread)  # where none can be, as while the interpreter exits, no progress is noted
    try:
        yield
    finally:
        ended.set()


@contextmanager
def once(
    directory: Path,
    key: str,
    find: Callable[[], T | None],
    sleep: Callable[[float], object] = time.sleep,
    *,
    seconds: float | None = None,
    may_take_over: bool = False,
    is_working: Callable[[], bool] | None = lambda: True,
) -> Iterator[T | None]:
    """Yield what ``find`` returns, or None and the claim to produce it; others that want it wait for the block.

    The claim is a lock, which the kernel releases when the process dies.

    Args:
        directory: of the cache.
        key: names what is wanted.
        find: returns it, or None if it is not there.
        sleep: called with seconds while another process produces it; it may raise to stop the wait.
        seconds: to wait for a process that makes no progress; the default is that of `chosen_seconds`.
        may_take_over: take the claim from a process that has made no progress for half a minute.
        is_working: called every second, returns whether the block makes progress; None if the block calls
            `show_progress` itself.

    Raises:
        Busy: if the other process makes no progress for that time.
        CacheError: if this thread has the claim already: it would wait for itself.
    """
    found = find()
    if found is not None:
        yield found
        return
    path, making = _path(directory, key), _making()
    if path in making:
        raise CacheError(f"{key} is being made by this thread already, which would wait for itself")
    lock = None
    try:
        making.add(path)  # before the lock: a signal handler that asks for it meanwhile would wait for its own thread
        what = f"make a lock file for {key}"
        with os_errors(what), Wait(key, chosen_seconds(seconds), lambda: _progress(path)) as wait:
            while (lock := _claim(path, key)) is None:
                wait.nap(_NAP, lambda: locks.holder_of(path), sleep)
                if may_take_over and wait.stalled_seconds >= _STALLED_SECONDS:
                    _take_over(path, key, wait.seen)
        with ExitStack() as block:
            found = find()
            if found is None:
                if is_working is not None:
                    block.enter_context(_beating(directory, key, is_working))
                yield None
                return
    finally:
        making.discard(path)
        if lock is not None and not lock.closed:  # in a forked child it is, and the right is its parent's
            _let_go(path, lock)
    yield found


def _progress(path: Path) -> object:
    """Return a value that changes while the owner of a claim makes progress."""
    with suppress(OSError), FileIO(path) as file:
        if processes.read_record(file.fileno()) is None:
            return time.monotonic()  # an old release has the claim, and it notes no progress
        status = os.fstat(file.fileno())
        return status.st_ino, status.st_mtime_ns
    return None


def _take_over(path: Path, key: str, stalled: object) -> None:
    """Unlink a claim without progress, so that the first who asks gets it.

    Args:
        path: of the claim's file.
        key: what is claimed.
        stalled: the value that `_progress` has returned all the time.
    """
    with suppress(OSError), FileIO(path, "r+") as file:
        status = os.fstat(file.fileno())
        if (status.st_ino, status.st_mtime_ns) == stalled and path.stat().st_ino == status.st_ino:
            holder = locks.holder(file.fileno())
            if _remove(path, file, 0):
                LOG.warning("taking over %s from %s, which makes no progress", key, holder or processes.UNKNOWN)


@contextmanager
def unless_made(directory: Path, key: str) -> Iterator[bool]:
    """Yield whether this thread got the claim on a key; if so, nobody else gets it during the block."""
    path, making = _path(directory, key), _making()  # of this thread, whichever ends the block
    if path in making:
        yield False
        return
    lock = None
    try:
        making.add(path)
        lock = _claim(path, key)
        if lock is None:
            making.discard(path)
        yield lock is not None
    finally:
        making.discard(path)
        if lock is not None and not lock.closed:
            _let_go(path, lock)


class Claim(NamedTuple):
    """A claim that is held."""

    process: Process | None  # its holder; None for a holder of an older release
    key: str
    since: float  # seconds since 1970


def claims(directory: Path) -> list[Claim]:
    """Return the claims that are held, the oldest first."""
    found = []
    for name in os.listdir(directory / "locks"):
        path = directory / "locks" / name
        if name.endswith(_SUFFIX) and locks.is_held(path):
            with suppress(OSError, TypeError, ValueError), FileIO(path) as file:
                record = processes.read_record(file.fileno())
                if record is None:
                    found.append(Claim(None, "", os.fstat(file.fileno()).st_mtime))
                else:
                    found.append(Claim(record[0], str(record[1].get("key")), float(record[1].get("since", 0))))
    return sorted(found, key=lambda claim: claim.since)


def sweep(folders: Folders) -> Iterator[Leftover]:
    """Remove the lock files of killed producers; yield those that cannot be removed."""
    with folders.open("locks") as folder:
        for name in os.listdir(folder):
            if lock_kind(name) != "producing":
                continue
            path = folders.directory / "locks" / name
            try:
                lock = locks.acquire(path, wait=False)
                if lock is not None:
                    with suppress(FileNotFoundError):
                        _remove(path, lock)
                    locks.release(lock)
            except OSError as error:
                yield Leftover(path, explain(error))
