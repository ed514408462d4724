"""Decide quickly whether a cache exceeds its limits, even if it has many blobs.

To sum the sizes of 600,000 blobs takes a sixth of a second, 40 times as long as to store one blob. So a gauge remembers
an upper bound of the sum, and adds the sizes of new rows to it.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from cachedb.disk.sizes import measure_file_system, measure_files
from cachedb.index import blobs
from cachedb.index.sqlite.database import Database
from cachedb.operations.policy import Limits

__all__ = ["Gauge"]


_BOUND_SECONDS = 60.0  # then the sum is computed again, because the size of an old row may have changed


class _Bound(NamedTuple):
    """An upper bound of the bytes of all blobs up to a row."""

    size: int
    last_id: int  # of the row
    last_digest: str  # of the row; if it changes, the row was deleted and its id is used again
    made: float  # when, in seconds of the monotonic clock


class Gauge:
    """The fill level of a cache; safe for threads."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._bound: _Bound | None = None

    def may_be_short(self, limits: Limits, incoming_size: int = 0) -> bool:
        """Return False only if incoming bytes surely fit into the limits; this takes under a millisecond.

        Args:
            limits: of the cache.
            incoming_size: bytes that will be stored.
        """
        return self.is_disk_short(limits, incoming_size) or (
            limits.max_size is not None and self._may_exceed(limits.max_size - incoming_size)
        )

    def is_short(self, limits: Limits, incoming_size: int = 0) -> bool:
        """Return whether incoming bytes do not fit into the limits; the arguments are those of `may_be_short`."""
        return self.may_be_short(limits, incoming_size) and (
            self.is_disk_short(limits, incoming_size)
            or (limits.max_size is not None and self._measure() > limits.max_size - incoming_size)
        )

    def is_disk_short(self, limits: Limits, incoming_size: int = 0) -> bool:
        """Return whether incoming bytes leave less of the file system free than the limits say."""
        found = measure_file_system(self._database.directory)
        return found.free - incoming_size < limits.choose_free_size(found.size)

    def _measure(self) -> int:
        """Return the bytes of all files of the cache, and remember a bound."""
        made = time.monotonic()
        with self._database.read() as connection:
            totals = blobs.sum_sizes(connection)
        # A missing file may come back without a new row. So the bound includes blobs without a file.
        self._bound = _Bound(totals.all_size, totals.last_id, totals.last_digest, made)
        return totals.stored_size + measure_files(self._database.directory).total_size

    def _may_exceed(self, size: int) -> bool:
        """Return whether the files of the cache may have more bytes than a size."""
        bound = self._bound
        if bound is None or time.monotonic() - bound.made > _BOUND_SECONDS:
            return True
        rows = blobs.read_sizes_from(self._database, bound.last_id)
        if bound.last_id:
            if not rows or rows[0][1] != bound.last_digest:
                return True
            del rows[0]
        if rows:
            bound_size = bound.size + sum(row_size for _, _, row_size in rows)
            self._bound = bound = _Bound(bound_size, *rows[-1][:2], bound.made)
        return bound.size + measure_files(self._database.directory).total_size > size
