"""Split lists of values, because SQLite limits the number of values in one statement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["BATCH", "split_batches"]

T = TypeVar("T")

BATCH = 500  # values in one statement


def split_batches(items: Iterable[T], size: int = BATCH) -> Iterator[list[T]]:
    """Split items into lists of at most ``size`` items; the default fits into one statement."""
    rest = list(items)
    for start in range(0, len(rest), size):
        yield rest[start : start + size]
