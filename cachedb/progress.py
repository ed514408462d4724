"""Types of progress callbacks, and how the progress of several threads becomes one."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cachedb.errors import callers_own

__all__ = ["Advance", "BlobProgress", "Progress", "summed", "told"]


Progress = Callable[[int, int], None]
"""Called with the bytes done so far and the bytes in all; from any thread, one call at a time."""

BlobProgress = Callable[[str, int, int], None]
"""Called with a blob's digest, the bytes of it done so far and those in all."""

Advance = Callable[[int], None]
"""Called with the number of bytes done since the last call, from any thread."""


def summed(total: int, progress: Progress | None) -> Advance:
    """Turn the bytes that threads report into one call at a time with their sum."""
    guard, done = threading.Lock(), 0
    report = progress and callers_own(progress)

    def add(count: int) -> None:
        nonlocal done
        if report is not None:
            with guard:
                done += count
                report(done, total)

    return add


def told(digest: str, total: int, blob_progress: BlobProgress | None, advance: Advance) -> Advance:
    """Turn the bytes that are reported of one blob into calls with their sum, and report them on."""
    done = 0
    report = blob_progress and callers_own(blob_progress)

    def add(count: int) -> None:
        nonlocal done
        done += count
        if report is not None:
            report(digest, done, total)
        advance(count)

    return add
