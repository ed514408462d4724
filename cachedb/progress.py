"""Define the types of progress callbacks, and combine the progress of several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cachedb.errors import mark_callers_errors

__all__ = ["Advance", "BlobProgress", "Progress", "blob_reporter", "sum_progress"]


Progress = Callable[[int, int], None]
"""Called with the bytes done so far and the total bytes; from any thread, one call at a time."""

BlobProgress = Callable[[str, int, int], None]
"""Called with a blob's digest, the bytes of it done so far, and its total bytes."""

Advance = Callable[[int], None]
"""Called from any thread with the number of bytes done since the last call."""


def sum_progress(total: int, progress: Progress | None) -> Advance:
    """Return a function that adds up the bytes of all threads and reports the sum, one call at a time."""
    guard, done = threading.Lock(), 0
    report = progress and mark_callers_errors(progress)

    def add(count: int) -> None:
        nonlocal done
        if report is not None:
            with guard:
                done += count
                report(done, total)

    return add


def blob_reporter(digest: str, total: int, blob_progress: BlobProgress | None, advance: Advance) -> Advance:
    """Return a function that reports the bytes of one blob to ``blob_progress`` and to ``advance``."""
    done = 0
    report = blob_progress and mark_callers_errors(blob_progress)

    def add(count: int) -> None:
        nonlocal done
        done += count
        if report is not None:
            report(digest, done, total)
        advance(count)

    return add
