"""When images were last used: noted in memory by those who read, and written down by the way.

Nobody who reads waits for a writer because of it. What is noted is written when the cache is closed, and after some
minutes, if the write lock is free; if it is not, or the disk is full, an image looks unused for a little longer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from sqlalchemy import bindparam, select, update

from cachedb.disk import locks
from cachedb.errors import CacheError
from cachedb.index.sqlite.database import Database
from cachedb.index.tables import IMAGES, UtcTime
from cachedb.oci.names import Name

__all__ = ["RESOLUTION", "Uses"]


RESOLUTION = 5 * 60.0
"""Seconds by which a last use may be older than it is in the index."""


class Uses:
    """The uses of images that this process has noted, and not written yet. For several threads, and forked children."""

    def __init__(self, database: Database) -> None:
        self._database = database
        locks.after_fork(self)
        self.forked()

    def forked(self) -> None:
        """Have nothing noted, for a parent process writes what it has; and no guard that a thread of it holds."""
        self._guard = threading.RLock()  # a signal handler may use the cache while its thread has it
        self._names: set[Name] = set()
        self._written = time.monotonic()

    def note(self, name: Name) -> None:
        """Note that an image is used now."""
        with self._guard:
            self._names.add(name)
            due = time.monotonic() - self._written > RESOLUTION
        if due:
            self.write()

    def write(self) -> None:
        """Write what is noted to the index, if that is news to it and the write lock is free."""
        with self._guard:
            names, self._names, self._written = self._names, set(), time.monotonic()
        if names and not self._database.read_only:
            with suppress(CacheError):
                self._write(names)

    def _write(self, names: Iterable[Name]) -> None:
        now = datetime.now(UTC)
        old = IMAGES.c.last_used_at < now - timedelta(seconds=RESOLUTION)
        one = select(IMAGES.c.id).where(
            IMAGES.c.repository == bindparam("repository"), IMAGES.c.reference == bindparam("reference"), old
        )
        with self._database.read() as connection:
            found = [connection.execute(one, name._asdict()).scalar() for name in names]
        rows = [{"of": image_id} for image_id in found if image_id is not None]
        if rows:
            values = {"last_used_at": bindparam("now", now, UtcTime)}
            with self._database.write_at_once() as writing:
                if writing:
                    writing.execute(update(IMAGES).where(IMAGES.c.id == bindparam("of"), old).values(values), rows)
