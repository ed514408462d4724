"""Hold images and blobs, so that no process collects them during a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from sqlalchemy import Connection

from cachedb.content.publish import release_hold
from cachedb.content.session import NO_HOLD, Hold, Session
from cachedb.errors import CacheError, NotInCache
from cachedb.index import blobs, holds, images
from cachedb.index.filters import Filters, FoundImage, complete_name, find_images, parse_wanted
from cachedb.index.records import BlobInfo, ImageInfo
from cachedb.index.sqlite.database import Database
from cachedb.oci.digests import Digest, is_digest, parse_digest_prefix
from cachedb.oci.names import Name

__all__ = ["find_hold_name", "find_images_and_digests", "hold_images", "release_from_full_disk"]


@contextmanager
def hold_images(
    database: Database,
    session: Session,
    *names_or_digests: str | Name,
    filters: Filters | None = None,
    ignore_missing: bool = False,
) -> Iterator[list[tuple[ImageInfo, list[BlobInfo]]]]:
    """Hold images and blobs during the block, and yield each image with its blobs.

    The images are those that the names point to now; the names may point to other images before the block ends.
    The arguments are those of `find_images_and_digests`.
    """

    def take() -> tuple[list[tuple[ImageInfo, list[BlobInfo]]], Hold]:
        return _take_hold(database, session, names_or_digests, filters, ignore_missing=ignore_missing)

    found, hold = database.reserve.run(take)  # images can leave a full disk, as in an export
    try:
        yield found
    except BaseException:
        with suppress(CacheError):  # the hold ends with the session
            release_from_full_disk(database, session, hold)
        raise
    if not database.ended:  # else the hold ended with the session
        release_from_full_disk(database, session, hold)


def release_from_full_disk(database: Database, session: Session, hold: Hold) -> None:
    """Release a hold; on a full disk, use the reserve, because what is held keeps `gc` from freeing space."""
    database.reserve.run(lambda: release_hold(database, session, hold))


def _take_hold(
    database: Database,
    session: Session,
    names_or_digests: Iterable[str | Name],
    filters: Filters | None,
    *,
    ignore_missing: bool,
) -> tuple[list[tuple[ImageInfo, list[BlobInfo]]], Hold]:
    """Hold images and blobs; return the images with their blobs, and the hold."""
    found: list[tuple[ImageInfo, list[BlobInfo]]] = []
    # A cache that can only be read takes no leases, and none of its blobs are collected.
    read_only = database.read_only
    with database.read() if read_only else database.write() as connection:
        digests: set[Digest] = set()
        for image in find_images_and_digests(connection, names_or_digests, filters, ignore_missing=ignore_missing):
            if isinstance(image, str):
                digests.add(image)
                continue
            if not read_only:
                images.touch(connection, image.id)
            info, contents = images.read_image(connection, database.directory, image.id)
            digests.update(blob.digest for blob in contents)
            found.append((info, contents))
        return found, NO_HOLD if read_only else session.lease(connection, digests)


def find_images_and_digests(
    connection: Connection,
    wanted: Iterable[str | Name],
    filters: Filters | None = None,
    *,
    ignore_missing: bool = False,
) -> list[FoundImage | Digest]:
    """Return the stored digests among texts, and the images that `find_images` finds for the others.

    Raises:
        NotInCache: if an image or a blob is not in the cache.
    """
    found: dict[FoundImage | Digest, None] = {}
    names: list[str | Name] = []
    for text in wanted:
        digest = _find_digest(connection, text)
        if digest is None and filters is None:
            found |= dict.fromkeys(find_images(connection, parse_wanted([text]), ignore_missing=ignore_missing))
        elif digest is None:
            names.append(text)
        elif digest in blobs.read_stored_sizes(connection, [digest]):
            found[digest] = None
        elif not ignore_missing:
            raise NotInCache(f"{digest} is not in the cache: store it first, or hold an image by its name", name=digest)
    if filters is not None and (names or not found):  # their order and limit apply to all images together
        found |= dict.fromkeys(find_images(connection, parse_wanted(names), filters, ignore_missing=ignore_missing))
    return list(found)


def _find_digest(connection: Connection, text: str | Name) -> Digest | None:
    """Return the digest that a text means; None for other text, or the name of an image."""
    if isinstance(text, Name) or (prefix := parse_digest_prefix(text)) is None:
        return None
    if not is_digest(prefix) and images.look_up(connection, Name.parse(text)):
        return None
    return blobs.find_digest(connection, text)


def find_hold_name(connection: Connection, wanted: str | Name) -> str:
    """Return the text that lists show for a hold: an id unchanged, a digest or a name in full."""
    if isinstance(wanted, str) and holds.is_id(wanted):
        return wanted
    if isinstance(wanted, str) and parse_digest_prefix(wanted):
        return blobs.find_digest(connection, wanted) or str(Name.parse(wanted))
    return str(complete_name(connection, wanted))
