"""Download a blob, or wait for another process that downloads it.

Of several processes that want one blob, one has the claim to download it. If it makes no progress, another takes over.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from cachedb.content import publish
from cachedb.content.session import Hold, Session
from cachedb.disk import downloads, single_flight
from cachedb.disk.layout import partial_path
from cachedb.disk.waiting import LOG
from cachedb.errors import CacheError, ignore_os_errors
from cachedb.index.sqlite.database import Database
from cachedb.oci.manifests import Descriptor
from cachedb.progress import Advance
from cachedb.transports.registry.source import Source

__all__ = ["fetch_blob"]


def fetch_blob(
    database: Database, session: Session, source: Source, blob: Descriptor, holds: list[Hold], advance: Advance
) -> None:
    """Store a blob of an image, and hold it.

    Args:
        database: the index of the cache.
        session: the session that receives the blob, and holds it.
        source: where the blob comes from.
        blob: what to download.
        holds: gets the hold as soon as it exists, so that the caller can release it after any error.
        advance: called with the bytes that this process, or the other one, has downloaded; negative if they are lost.
    """
    while True:
        try:
            _fetch_once(database, session, source, blob, holds, advance)
        except single_flight.ClaimLost as error:
            LOG.warning("%s", error)  # another process took over: wait for it
        else:
            return


def _fetch_once(
    database: Database, session: Session, source: Source, blob: Descriptor, holds: list[Hold], advance: Advance
) -> None:
    """Download a blob, or wait for another process that downloads it, and hold it.

    Raises:
        ClaimLost: if another process has taken over the download.
    """
    directory = database.directory
    path = partial_path(directory, blob.digest)
    seen = done = 0

    def find() -> Hold | None:
        hold = publish.hold_stored(database, session, [blob.digest])
        return hold if hold.digests else None

    def sleep(seconds: float) -> None:
        nonlocal seen
        time.sleep(seconds)
        downloaded = _measure_partial(path, blob.size)
        advance(downloaded - seen)
        seen = downloaded

    def count(new: int) -> None:
        nonlocal done
        done += new
        advance(new)

    key = downloads.claim_key(blob.digest)
    with single_flight.claim_or_find(
        directory, key, find, sleep, seconds=database.wait_seconds, may_take_over=True, is_working=None
    ) as held:
        advance(-seen)
        if held is not None:
            holds.append(held)
            advance(blob.size)
            return
        database.reserve.check()
        content = source.download(blob, count)
        try:
            single_flight.check_claim(directory, key)
            received = publish.receive_download(session, path, content)
        except single_flight.ClaimLost:
            advance(-done)
            raise
        with publish.publish(database, session, [received]) as connection:
            holds.append(session.lease(connection, [blob.digest]))
        with suppress(CacheError), ignore_os_errors():  # the blob is stored already
            database.folders.remove(f"ingest/partial/{path.name}")


def _measure_partial(path: Path, size: int) -> int:
    """Return the bytes of a partial download, at most those of the blob; 0 if there is none."""
    with ignore_os_errors():
        return min(path.lstat().st_size, size)
    return 0
