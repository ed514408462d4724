"""Split or wrap lists of values, because SQLite limits the number of values in one statement."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, func, select

__all__ = ["BATCH", "are_among", "split_batches"]

T = TypeVar("T")

BATCH = 500  # values in one statement


def split_batches(items: Iterable[T], size: int = BATCH) -> Iterator[list[T]]:
    """Split items into lists of at most ``size`` items; the default fits into one statement."""
    rest = list(items)
    for start in range(0, len(rest), size):
        yield rest[start : start + size]


def are_among(column: ColumnElement[Any], values: Iterable[object]) -> ColumnElement[bool]:
    """Return the condition that a column has one of the values; there may be any number of them."""
    return column.in_(select(func.json_each(json.dumps(list(values))).table_valued("value").c.value))
