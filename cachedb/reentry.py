"""Detect calls that interrupt another call of the same thread.

A signal handler, a finalizer or a callback may make such a call. It must never wait for a lock of the interrupted
call, because the interrupted call continues only after this one returns.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cachedb.errors import ReentrantCall

__all__ = ["holding", "is_held", "not_reentered", "on_behalf_of", "refuse_reentry"]

_held: dict[tuple[int, str], int] = {}  # the number of `holding` blocks, by thread and lock
_principals: dict[int, int] = {}  # for a helper thread, the thread that waits for it
os.register_at_fork(after_in_child=_held.clear)  # the locks belong to the parent


def is_held(lock: str) -> bool:
    """Return whether this thread, or a thread it works for, is in a `holding` block of the lock."""
    thread: int | None = threading.get_ident()
    while thread is not None:
        if _held.get((thread, lock), 0) > 0:
            return True
        thread = _principals.get(thread)
    return False


@contextmanager
def on_behalf_of(thread: int) -> Iterator[None]:
    """Record during this block that this thread works for another one, which waits and may hold locks."""
    _principals[threading.get_ident()] = thread
    try:
        yield
    finally:
        _principals.pop(threading.get_ident(), None)


def refuse_reentry(lock: str, doing: str) -> None:
    """Raise `ReentrantCall` if this thread holds the lock, because waiting for it would deadlock.

    Args:
        lock: the name of the lock in this process.
        doing: the work of the interrupted call, as the error names it: "writing to the cache".
    """
    if is_held(lock):
        raise ReentrantCall(f"this thread is already {doing}: use the cache after that, or from another thread")


@contextmanager
def holding(lock: str) -> Iterator[None]:
    """Record that this thread holds or awaits a lock during this block."""
    key = threading.get_ident(), lock
    before = _held.get(key, 0)
    try:
        _held[key] = before + 1
        yield
    finally:
        # An interrupting call has restored the count before this call continues.
        if before:
            _held[key] = before
        else:
            _held.pop(key, None)


@contextmanager
def not_reentered(lock: str, doing: str) -> Iterator[None]:
    """Record a lock as held during this block; like `refuse_reentry`, raise if this thread holds it."""
    refuse_reentry(lock, doing)
    with holding(lock):
        yield
