"""Lists of values, as long as SQLite takes them in one statement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["BATCH", "batched"]

T = TypeVar("T")

BATCH = 500  # values in one statement


def batched(items: Iterable[T], size: int = BATCH) -> Iterator[list[T]]:
    """Divide items into lists of as many as one statement may name, or as are given."""
    rest = list(items)
    for start in range(0, len(rest), size):
        yield rest[start : start + size]
