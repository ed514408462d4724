"""Single flight: of all on this host who want the same thing made, one makes it and the others wait for it."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TypeVar

from cachedb import locks
from cachedb.directory import lock_kind
from cachedb.errors import CacheError, explain, os_errors
from cachedb.folders import Folders, Leftover

__all__ = ["once", "sweep", "unless_made"]

T = TypeVar("T")

_SUFFIX = ".producing"
_NAP = 0.02  # seconds between two looks
_mine = threading.local()
os.register_at_fork(after_in_child=lambda: _mine.__dict__.clear())  # what its parent makes is not its own


def _path(directory: Path, key: str) -> Path:
    return directory / "locks" / f"{hashlib.sha256(key.encode()).hexdigest()}{_SUFFIX}"


def _making() -> set[Path]:
    """Return what this thread has the right to make."""
    making: set[Path] = _mine.__dict__.setdefault("making", set())
    return making


def _let_go(path: Path, lock: FileIO) -> None:
    try:
        with suppress(OSError):  # the next open removes it
            path.unlink()
    finally:
        locks.release(lock)


@contextmanager
def once(
    directory: Path, key: str, find: Callable[[], T | None], waiting: Callable[[float], object] | None = None
) -> Iterator[T | None]:
    """Give the block what ``find`` returns, or None and the right to make it; who else wants it waits for the block.

    The right is a lock, which the kernel takes from a process that dies.

    Args:
        directory: of the cache.
        key: what is wanted.
        find: returns it, or None if it is not there.
        waiting: is called while another makes it, to wait for so many seconds; it may raise, to wait no more.

    Raises:
        CacheError: if this thread has the right already: it would wait for itself.
    """
    found = find()
    if found is not None:
        yield found
        return
    path, making = _path(directory, key), _making()
    if path in making:
        raise CacheError(f"{key} is being made by this thread already, which would wait for itself")
    with os_errors(f"make a lock file for {key}"):
        while (lock := locks.acquire(path, wait=waiting is None)) is None:
            if waiting:
                waiting(_NAP)
    try:
        found = find()
        if found is None:
            making.add(path)
            yield None
            return
    finally:
        making.discard(path)
        if not lock.closed:  # in a forked child it is, and the right is its parent's
            _let_go(path, lock)
    yield found


@contextmanager
def unless_made(directory: Path, key: str) -> Iterator[bool]:
    """Give the block whether nobody is making something; nobody begins to in the block then."""
    path, making = _path(directory, key), _making()  # of this thread, whichever ends the block
    lock = locks.acquire(path, wait=False)
    try:
        if lock is not None:
            making.add(path)
        yield lock is not None
    finally:
        if lock is not None:
            making.discard(path)
            _let_go(path, lock)


def sweep(folders: Folders) -> Iterator[Leftover]:
    """Remove what processes that were killed while they made something have left; yield what cannot be removed."""
    with folders.open("locks") as folder:
        for name in os.listdir(folder):
            if lock_kind(name) != "producing":
                continue
            path = folders.directory / "locks" / name
            try:
                lock = locks.acquire(path, wait=False)
                if lock is not None:
                    with suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=folder)
                    locks.release(lock)
            except OSError as error:
                yield Leftover(path, explain(error))
