"""Record when images were last used: a reader notes a use in memory, and the index is updated later.

A reader never waits for the write lock because of a use. A use writes all noted uses if the last write is five minutes
old. Closing the cache writes them too. If the write lock is taken or the disk is full, the uses are lost.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from sqlalchemy import bindparam, select, update

from cachedb.disk import forks
from cachedb.errors import CacheError
from cachedb.index.sqlite.database import Database
from cachedb.index.tables import IMAGES, UtcTime
from cachedb.oci.names import Name

__all__ = ["RESOLUTION_SECONDS", "Uses"]


RESOLUTION_SECONDS = 5 * 60.0
"""The last use in the index may be so many seconds older than the real one."""


class Uses:
    """The uses of images that this process has not written yet; safe for threads and forked children."""

    def __init__(self, database: Database) -> None:
        self._database = database
        forks.reset_after_fork(self)
        self.forked()

    def forked(self) -> None:
        """Start empty in a forked child: the parent process writes its own uses.

        The guard is new, because a thread of the parent may hold the old one.
        """
        self._guard = threading.RLock()  # a signal handler may use the cache while its thread holds this
        self._names: set[Name] = set()
        self._written = time.monotonic()

    def note(self, name: Name) -> None:
        """Note that an image is used now."""
        with self._guard:
            self._names.add(name)
            due = time.monotonic() - self._written > RESOLUTION_SECONDS
        if due:
            self.write()

    def write(self) -> None:
        """Write the noted uses to the index, unless the index has recent ones or the write lock is taken."""
        with self._guard:
            names, self._names, self._written = self._names, set(), time.monotonic()
        if names and not self._database.read_only:
            with suppress(CacheError):
                self._write(names)

    def _write(self, names: Iterable[Name]) -> None:
        now = datetime.now(UTC)
        old = IMAGES.c.last_used_at < now - timedelta(seconds=RESOLUTION_SECONDS)
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
