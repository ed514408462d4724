"""Hold images and blobs, so that no process collects them during a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection

from cachedb.content.publish import release_after_error, release_hold
from cachedb.content.session import NO_HOLD, Session
from cachedb.errors import CacheError, NotInCache
from cachedb.index import blobs, holds, images
from cachedb.index.records import BlobInfo, ImageInfo
from cachedb.index.sqlite.database import Database
from cachedb.oci.digests import Digest, parse_digest
from cachedb.oci.names import Name

__all__ = ["find_image_or_digest", "hold_images", "parse_hold_name"]


@contextmanager
def hold_images(
    database: Database, session: Session, *names_or_digests: str | Name
) -> Iterator[list[tuple[ImageInfo, list[BlobInfo]]]]:
    """Hold images and blobs during the block, and yield each image with its blobs.

    The images are those that the names point to now; the names may point to other images before the block ends.
    """
    found: list[tuple[ImageInfo, list[BlobInfo]]] = []
    # A cache that can only be read takes no leases, and none of its blobs are collected.
    read_only = database.read_only
    with database.read() if read_only else database.write() as connection:
        digests: set[Digest] = set()
        for wanted in names_or_digests:
            image_or_digest = find_image_or_digest(connection, wanted)
            if isinstance(image_or_digest, str):
                digests.add(image_or_digest)
                continue
            if not read_only:
                images.touch(connection, image_or_digest)
            info, contents = images.read_image(connection, database.directory, image_or_digest)
            digests.update(blob.digest for blob in contents)
            found.append((info, contents))
        hold = NO_HOLD if read_only else session.lease(connection, digests)
    try:
        yield found
    except BaseException:
        release_after_error(database, session, hold)
        raise
    if not database.ended:  # else the hold ended with the session
        release_hold(database, session, hold)


def find_image_or_digest(connection: Connection, wanted: str | Name) -> int | Digest:
    """Return the id of a named image, or the given digest if its blob is stored.

    Raises:
        NotInCache: if the image or blob is not in the cache.
    """
    if not (isinstance(wanted, str) and (digest := _as_digest(wanted))):
        return images.find(connection, Name.parse(wanted)).id
    if digest not in blobs.read_stored_sizes(connection, [digest]):
        raise NotInCache(f"{digest} is not in the cache", name=digest)
    return digest


def parse_hold_name(wanted: str | Name) -> str:
    """Return the name that a hold is listed under: an id or a digest unchanged, an image name in full."""
    if not isinstance(wanted, str):
        return str(Name.parse(wanted))
    if holds.is_id(wanted):
        return wanted
    return _as_digest(wanted) or str(Name.parse(wanted))


def _as_digest(text: str) -> Digest | None:
    """Return a text as a digest, or None if it is not one."""
    try:
        return parse_digest(text)
    except CacheError:
        return None
