"""Change the times of images in the index of a cache."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cachedb import Cache


def age(cache: Cache, column: str, name: str, **ago: float) -> None:
    """Set a time of an image to some time ago, as for `timedelta`; negative numbers are in the future."""
    set_time(cache, column, name, datetime.now(UTC) - timedelta(**ago))


def set_time(cache: Cache, column: str, name: str, time: datetime | None) -> None:
    """Set a time of an image, or remove it."""
    text = None if time is None else f"{time.replace(tzinfo=None).isoformat(timespec='microseconds')}Z"
    repository, _, reference = name.rpartition(":")
    with closing(sqlite3.connect(cache.directory / "index.db")) as index, index:
        done = index.execute(
            f"UPDATE images SET {column} = ? WHERE repository = ? AND reference = ?", (text, repository, reference)
        )
        assert done.rowcount == 1
