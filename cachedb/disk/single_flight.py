"""Single flight: if several processes want the same thing, one produces it and the others wait for it.

The producer holds a claim: a locked file. `show_progress` sets the file's modification time, so that other processes
see when the work last made progress. A waiting process may take over a claim that makes no progress, such as that of a
stalled download. To do so, it unlinks the file. If the former holder continues, it sees that its claim is lost.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import NamedTuple, TypeVar
from weakref import WeakValueDictionary

from cachedb.disk import byte_locks, lock_holders, locks
from cachedb.disk.folders import Folders, Leftover, is_shared, set_aside
from cachedb.disk.forks import no_fork
from cachedb.disk.layout import lock_kind
from cachedb.disk.lock_holders import Process
from cachedb.disk.regular import open_regular
from cachedb.disk.waiting import LOG, Wait, choose_wait_seconds
from cachedb.errors import CacheError, explain, ignore_os_errors, os_errors
from cachedb.threads import start

__all__ = [
    "Claim",
    "ClaimLost",
    "check_claim",
    "claim_or_find",
    "list_claims",
    "remove_dead_claims",
    "show_progress",
    "try_claim",
]


T = TypeVar("T")

_CLAIM_SUFFIX = ".producing"
_POLL_SECONDS = 0.02  # between two attempts to take a claim
_PROGRESS_SECONDS = 1.0  # between two updates of the modification time
_STALLED_SECONDS = 30.0  # after so long without progress, a claim may be taken over
_REMOVAL_BYTE = 1 << 40  # the byte that a process locks in a claim's file while it unlinks the file
_REMOVAL_SECONDS = 1.0  # how long to wait for that lock, which is held for a moment
_of_thread = threading.local()
_claims: WeakValueDictionary[Path, FileIO] = WeakValueDictionary()  # the lock files of this process's claims
_progress_noted: dict[Path, float] = {}  # when progress was last noted
_guard = threading.RLock()  # held while a claim's descriptor is used, so that nobody closes it; a signal may interrupt
# A forked child has none of its parent's claims.
os.register_at_fork(after_in_child=_claims.clear)
os.register_at_fork(after_in_child=lambda: _of_thread.__dict__.clear())


class ClaimLost(CacheError):
    """Another process has taken over a claim of this process, which made no progress."""


def _claim_path(directory: Path, key: str) -> Path:
    return directory / "locks" / f"{hashlib.sha256(key.encode()).hexdigest()}{_CLAIM_SUFFIX}"


def _claims_of_thread() -> set[Path]:
    """Return the paths of the claims that this thread holds or is taking."""
    paths: set[Path] = _of_thread.__dict__.setdefault("paths", set())
    return paths


def _take_claim(path: Path, key: str) -> FileIO | None:
    """Take a claim; return its lock, or None if another process or thread has it."""
    try:
        lock = locks.acquire(path, wait=False)
    except OSError as error:
        if not _is_planted(path, error):
            raise
        with Folders(path.parent.parent).open("locks") as folder, suppress(FileNotFoundError):
            set_aside(folder, path.name)
        lock = locks.acquire(path, wait=False)
    if lock is not None:
        lock_holders.write_record(lock.fileno(), key=key, since=time.time())
        _claims[path] = lock
    return lock


def _is_planted(path: Path, error: OSError) -> bool:
    """Return whether another user of a shared cache may have put the file there to block the claim."""
    if error.errno == errno.EACCES and is_shared(os.stat(path.parent)):
        time.sleep(_POLL_SECONDS)  # the user's process may be about to give it the mode of the cache
        return not os.access(path, os.R_OK | os.W_OK)
    return error.errno == errno.EINVAL  # a link, a pipe or a folder


def _release_claim(path: Path, lock: FileIO) -> None:
    try:
        with no_fork(), _guard:  # a file opened after the close may get the descriptor's number
            if _claims.get(path) is lock:
                del _claims[path]
        with ignore_os_errors():  # the next open removes it
            _remove(path, lock)
    finally:
        locks.release(lock)


def _remove(path: Path, lock: FileIO, seconds: float = _REMOVAL_SECONDS) -> bool:
    """Unlink a claim's file, unless its name leads to a newer file; return whether it was unlinked.

    Args:
        path: of the file.
        lock: the open file.
        seconds: to wait for another process that is unlinking the file.
    """
    end = time.monotonic() + seconds
    while not byte_locks.lock_byte(lock.fileno(), _REMOVAL_BYTE):
        if time.monotonic() >= end:
            return False
        time.sleep(_POLL_SECONDS)
    if not locks.leads_to(path, lock.fileno()):
        return False
    path.unlink()
    return True


def show_progress(directory: Path, key: str) -> None:
    """Note that the holder of a claim makes progress; do nothing if this process has no such claim.

    Raises:
        ClaimLost: if another process has taken over the claim.
    """
    path, now = _claim_path(directory, key), time.monotonic()
    if path not in _claims or now - _progress_noted.get(path, 0.0) < _PROGRESS_SECONDS:
        return
    _progress_noted[path] = now
    with no_fork(), _guard:
        check_claim(directory, key)
        if (lock := _claims.get(path)) is not None:
            with suppress(OSError):
                os.utime(lock.fileno())


def check_claim(directory: Path, key: str) -> None:
    """Check that no other process has taken over a claim of this process.

    Raises:
        ClaimLost: if one has.
    """
    path = _claim_path(directory, key)
    lock = _claims.get(path)
    with suppress(OSError, ValueError):
        if lock is not None and not locks.leads_to(path, lock.fileno()):
            raise ClaimLost(f"another process took over {key}, because this one made no progress: try again")


@contextmanager
def _noting_progress(directory: Path, key: str, is_working: Callable[[], bool]) -> Iterator[None]:
    """Note progress every second during the block, from a thread, as long as the work makes progress."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_PROGRESS_SECONDS):
            with suppress(CacheError, OSError):
                if is_working():
                    show_progress(directory, key)

    thread = threading.Thread(target=beat, daemon=True, name="cachedb progress")
    start(thread)  # if no thread can start, as while the interpreter exits, nothing is noted
    try:
        yield
    finally:
        ended.set()


@contextmanager
def claim_or_find(
    directory: Path,
    key: str,
    find: Callable[[], T | None],
    sleep: Callable[[float], object] = time.sleep,
    *,
    seconds: float | None = None,
    may_take_over: bool = False,
    is_working: Callable[[], bool] | None = lambda: True,
) -> Iterator[T | None]:
    """Yield the result of ``find``; if it is None, hold the claim to produce it during the block.

    Other processes and threads that want the same key wait until the block ends. The kernel releases the claim if the
    process dies.

    Args:
        directory: of the cache.
        key: names the thing that is wanted.
        find: returns the thing, or None if it does not exist yet.
        sleep: called with seconds while another process produces the thing; it may raise to stop the wait.
        seconds: how long to wait for a process without progress; None for the default of `choose_wait_seconds`.
        may_take_over: take the claim from a process that has made no progress for half a minute.
        is_working: called every second, returns whether the block makes progress; None if the block calls
            `show_progress` itself.

    Raises:
        Busy: if the other process makes no progress for that time.
        CacheError: if this thread has the claim already, so that it would wait for itself.
    """
    found = find()
    if found is not None:
        yield found
        return
    path, own_paths = _claim_path(directory, key), _claims_of_thread()
    if path in own_paths:
        raise CacheError(f"this thread is already producing {key!r}: end that block first")
    lock = None
    try:
        own_paths.add(path)  # before the lock, else a signal handler could wait for its own thread
        what = f"make a lock file for {key}"
        with os_errors(what), Wait(key, choose_wait_seconds(seconds), lambda: _read_progress(path)) as wait:
            while (lock := _take_claim(path, key)) is None:
                wait.nap(_POLL_SECONDS, lambda: locks.read_holder_of(path), sleep)
                if may_take_over and wait.stalled_seconds >= _STALLED_SECONDS:
                    _take_over(path, key, wait.seen)
        with ExitStack() as block:
            found = find()
            if found is None:
                if is_working is not None:
                    block.enter_context(_noting_progress(directory, key, is_working))
                yield None
                return
    finally:
        own_paths.discard(path)
        if lock is not None and not lock.closed:  # a fork closes it in the child, and the parent has the claim
            _release_claim(path, lock)
    yield found


def _read_progress(path: Path) -> object:
    """Return a value that changes while the holder of a claim makes progress."""
    with suppress(OSError), FileIO(path, opener=open_regular) as file:
        if lock_holders.read_record(file.fileno()) is None:
            return time.monotonic()  # the holder is an old release, which does not note its progress
        status = os.fstat(file.fileno())
        return status.st_ino, status.st_mtime_ns
    return None


def _take_over(path: Path, key: str, stalled: object) -> None:
    """Unlink the file of a claim without progress, so that another process can take the claim.

    Args:
        path: of the claim's file.
        key: of the claim.
        stalled: the value that `_read_progress` has returned since the last progress.
    """
    with suppress(OSError), FileIO(path, "r+", opener=open_regular) as file:
        status = os.fstat(file.fileno())
        if (status.st_ino, status.st_mtime_ns) == stalled and path.stat().st_ino == status.st_ino:
            holder = locks.read_holder(file.fileno())
            if _remove(path, file, 0):
                LOG.warning("taking over %s from %s, which makes no progress", key, holder or lock_holders.UNKNOWN)


@contextmanager
def try_claim(directory: Path, key: str, *, is_working: Callable[[], bool] | None = None) -> Iterator[bool]:
    """Yield whether this thread got the claim on a key; if it did, it keeps the claim during the block.

    Args:
        directory: of the cache.
        key: names the thing that is wanted.
        is_working: as for `claim_or_find`; None for a block that takes only a moment.
    """
    path, own_paths = _claim_path(directory, key), _claims_of_thread()  # look up now: another thread may end the block
    if path in own_paths:
        yield False
        return
    lock = None
    try:
        own_paths.add(path)
        lock = _take_claim(path, key)
        if lock is None:
            own_paths.discard(path)
        with ExitStack() as block:
            if lock is not None and is_working is not None:
                block.enter_context(_noting_progress(directory, key, is_working))
            yield lock is not None
    finally:
        own_paths.discard(path)
        if lock is not None and not lock.closed:
            _release_claim(path, lock)


class Claim(NamedTuple):
    """A claim that is held."""

    process: Process | None  # its holder; None for a holder of an older release
    key: str
    since: float  # seconds since 1970


def list_claims(directory: Path) -> list[Claim]:
    """Return the claims that are held, the oldest first."""
    found = []
    for name in os.listdir(directory / "locks"):
        path = directory / "locks" / name
        if name.endswith(_CLAIM_SUFFIX) and locks.is_held(path):
            with suppress(OSError, TypeError, ValueError), FileIO(path, opener=open_regular) as file:
                record = lock_holders.read_record(file.fileno())
                if record is None:
                    found.append(Claim(None, "", os.fstat(file.fileno()).st_mtime))
                else:
                    found.append(Claim(record[0], str(record[1].get("key")), float(record[1].get("since", 0))))
    return sorted(found, key=lambda claim: claim.since)


def remove_dead_claims(folders: Folders) -> Iterator[Leftover]:
    """Remove the claims of dead processes; yield the files that cannot be removed."""
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
