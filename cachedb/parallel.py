"""Long work done by several threads at once: it says how far it is, and stops as a whole."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cachedb.errors import CacheError

__all__ = ["Advance", "Progress", "in_threads", "summed"]

T = TypeVar("T")
R = TypeVar("R")

Progress = Callable[[int, int], None]
"""Called with the bytes done so far and the bytes in all; from any thread, one call at a time."""

Advance = Callable[[int], None]
"""Called with the number of bytes done since the last call, from any thread."""


def summed(total: int, progress: Progress | None) -> Advance:
    """Turn the bytes that threads report into one call at a time with their sum."""
    guard, done = threading.Lock(), 0

    def add(count: int) -> None:
        nonlocal done
        if progress is not None:
            with guard:
                done += count
                progress(done, total)

    return add


def in_threads(work: Callable[[T, Advance], R], items: Iterable[T], advance: Advance) -> list[R]:
    """Do work on each item, several at once, and return what it gave, in order.

    When one fails, or an interrupt comes, the others stop where they next say how far they are, and those that have
    not begun do not.

    Args:
        work: is called with an item, and with what it is to tell of the bytes it has done.
        items: begun in this order.
        advance: is told of the bytes that all of them have done.
    """
    stopped = threading.Event()

    def told(count: int) -> None:
        if stopped.is_set():
            raise CacheError("it was stopped, for other work beside it failed")
        advance(count)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            return [future.result() for future in [pool.submit(work, item, told) for item in items]]
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
