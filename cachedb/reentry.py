"""Calls in the middle of another call of the same thread: by a signal handler, a finalizer, or a callback.

Such a call must never wait for what the interrupted call holds: that goes on only when this one returns.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cachedb.errors import ReentrantCall

__all__ = ["holding", "is_held", "not_reentered", "on_behalf_of", "refuse_reentry"]

_held: dict[tuple[int, str], int] = {}  # blocks that a thread is in, by thread and lock
_principals: dict[int, int] = {}  # threads that work for another one, which waits for them
os.register_at_fork(after_in_child=_held.clear)  # the locks are the parent's


def is_held(lock: str) -> bool:
    """Return whether this thread, or one that it works for, is in a block of `holding` for the lock."""
    thread: int | None = threading.get_ident()
    while thread is not None:
        if _held.get((thread, lock), 0) > 0:
            return True
        thread = _principals.get(thread)
    return False


@contextmanager
def on_behalf_of(thread: int) -> Iterator[None]:
    """Note that this thread works for another one until the end of the block; that one waits for it with its locks."""
    _principals[threading.get_ident()] = thread
    try:
        yield
    finally:
        _principals.pop(threading.get_ident(), None)


def refuse_reentry(lock: str, doing: str) -> None:
    """Raise `ReentrantCall` if this thread holds the lock: it would wait for itself.

    Args:
        lock: names the lock in this process.
        doing: what the interrupted call is doing, for the error.
    """
    if is_held(lock):
        raise ReentrantCall(f"this thread is already {doing}: use the cache after that, or from another thread")


@contextmanager
def holding(lock: str) -> Iterator[None]:
    """Note that this thread holds a lock, or waits for it, until the end of the block."""
    key = threading.get_ident(), lock
    before = _held.get(key, 0)
    try:
        _held[key] = before + 1
        yield
    finally:
        # A call that interrupts this one has put its own count back by the time that this one goes on.
        if before:
            _held[key] = before
        else:
            _held.pop(key, None)


@contextmanager
def not_reentered(lock: str, doing: str) -> Iterator[None]:
    """Hold a lock in a block, unless this thread holds it already; see `refuse_reentry`."""
    refuse_reentry(lock, doing)
    with holding(lock):
        yield
