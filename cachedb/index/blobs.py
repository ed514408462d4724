"""Read and write the rows of blobs: whether they are stored, and their sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Select, and_, bindparam, func, select
from sqlalchemy.dialects.sqlite import Insert, insert

from cachedb.disk.layout import blob_path
from cachedb.disk.writer import Received
from cachedb.errors import InvalidDigest
from cachedb.index.records import BlobDetails, BlobUse
from cachedb.index.sqlite.batches import split_batches
from cachedb.index.sqlite.database import Database
from cachedb.index.tables import BLOBS, IMAGE_BLOBS, IMAGES, LEASES
from cachedb.oci.digests import Digest, is_digest, parse_digest_prefix
from cachedb.oci.names import Name
from cachedb.text import shorten

__all__ = [
    "Totals",
    "ambiguous_error",
    "find_digest",
    "read_all_stored_sizes",
    "read_blob_details",
    "read_image_names",
    "read_sizes_from",
    "read_stored_size",
    "read_stored_sizes",
    "set_stored",
    "starts_with",
    "sum_sizes",
]

_CANDIDATES = 3  # digests that the error for an ambiguous text lists


class Totals(NamedTuple):
    """The sums of the sizes of all blobs, and the newest row."""

    stored_size: int  # bytes
    all_size: int  # bytes, including blobs that are not stored
    last_id: int  # 0 without rows
    last_digest: str


def set_stored(connection: Connection, blobs: Iterable[Received]) -> None:
    """Mark blobs as stored; their files must be in ``blobs/`` already."""
    now = datetime.now(UTC)
    rows = [{"digest": blob.digest, "size": blob.size, "stored_at": now} for blob in blobs]
    if rows:
        connection.execute(_build_stored_upsert(), rows)


@cache
def _build_stored_upsert() -> Insert:
    new = insert(BLOBS)
    return new.on_conflict_do_update(
        index_elements=[BLOBS.c.digest], set_={"size": new.excluded.size, "stored_at": new.excluded.stored_at}
    )


def read_all_stored_sizes(connection: Connection) -> dict[Digest, int]:
    """Return the size in bytes of each digest that is stored."""
    query = select(BLOBS.c.digest, BLOBS.c.size).where(BLOBS.c.stored_at.is_not(None))
    return {Digest(digest): size for digest, size in connection.execute(query)}


def read_stored_sizes(connection: Connection, digests: Iterable[Digest]) -> dict[Digest, int]:
    """Return the size in bytes of each given digest that is stored."""
    found: dict[Digest, int] = {}
    for part in split_batches(digests):
        found.update((Digest(digest), size) for digest, size in connection.execute(_select_stored(), {"digests": part}))
    return found


def read_stored_size(database: Database, digest: Digest) -> int | None:
    """Return a blob's size in bytes, or None if it is not stored."""
    rows = database.rows(_select_size(), {"digest": digest})
    return rows[0][0] if rows else None


def sum_sizes(connection: Connection) -> Totals:
    """Return the sums of all sizes; with hundreds of thousands of blobs, this takes tenths of a second."""
    is_stored = BLOBS.c.stored_at.is_not(None)
    sums = [func.coalesce(sum_, 0) for sum_ in (func.sum(BLOBS.c.size).filter(is_stored), func.sum(BLOBS.c.size))]
    sizes = connection.execute(select(*sums)).one()
    last = connection.execute(select(BLOBS.c.id, BLOBS.c.digest).order_by(BLOBS.c.id.desc()).limit(1)).first()
    return Totals(sizes[0], sizes[1], *(0, "") if last is None else (last.id, last.digest))


def read_sizes_from(database: Database, row_id: int) -> list[tuple[int, str, int]]:
    """Return the id, the digest and the bytes of all blobs from a row on, stored or not."""
    return [(row[0], row[1], row[2]) for row in database.rows(_select_sizes_from(), {"from": row_id})]


@cache
def _select_sizes_from() -> Select[*tuple[Any, ...]]:
    return select(BLOBS.c.id, BLOBS.c.digest, BLOBS.c.size).where(BLOBS.c.id >= bindparam("from")).order_by(BLOBS.c.id)


@cache
def _select_size() -> Select[*tuple[Any, ...]]:
    return select(BLOBS.c.size).where(BLOBS.c.digest == bindparam("digest"), BLOBS.c.stored_at.is_not(None))


@cache
def _select_stored() -> Select[*tuple[Any, ...]]:
    is_wanted = BLOBS.c.digest.in_(bindparam("digests", expanding=True))
    return select(BLOBS.c.digest, BLOBS.c.size).where(is_wanted, BLOBS.c.stored_at.is_not(None))


def read_image_names(connection: Connection, digests: Iterable[Digest]) -> dict[str, list[Name]]:
    """Return the sorted names of the images that have each digest; without digests that no image has."""
    found: dict[str, list[Name]] = {}
    query = (
        select(BLOBS.c.digest, IMAGES.c.repository, IMAGES.c.reference)
        .join(IMAGE_BLOBS, IMAGE_BLOBS.c.blob_id == BLOBS.c.id)
        .join(IMAGES, IMAGES.c.id == IMAGE_BLOBS.c.image_id)
        .distinct()
        .order_by(IMAGES.c.repository, IMAGES.c.reference)
    )
    for part in split_batches(digests):
        for digest, repository, reference in connection.execute(query.where(BLOBS.c.digest.in_(part))):
            found.setdefault(digest, []).append(Name(repository, reference))
    return found


def find_digest(connection: Connection, text: str) -> Digest | None:
    """Return a digest, or the only one in the index that starts with a text; None if none does.

    Args:
        connection: to the index.
        text: a digest, or its first 12 hexadecimal digits or more, with or without the algorithm.

    Raises:
        InvalidDigest: if the text is neither, or several digests start with it.
    """
    prefix = parse_digest_prefix(text)
    if prefix is not None and is_digest(prefix):
        return Digest(prefix)
    query = select(BLOBS.c.digest).where(starts_with(text)).order_by(BLOBS.c.digest).limit(_CANDIDATES + 1)
    found = [Digest(digest) for digest in connection.execute(query).scalars()]
    if len(found) > 1:
        raise ambiguous_error(text, found)
    return found[0] if found else None


def ambiguous_error(text: str, found: Sequence[Digest]) -> InvalidDigest:
    """Return the error for a text if several digests start with it."""
    candidates = ", ".join(found[:_CANDIDATES]) + (", ..." if len(found) > _CANDIDATES else "")
    return InvalidDigest(f"{shorten(text)} is ambiguous: give more digits of {candidates}")


def starts_with(text: str) -> ColumnElement[bool]:
    """Return the condition that a blob's digest is, or starts with, a text of at least 12 hex digits.

    Raises:
        InvalidDigest: if the text is neither.
    """
    prefix = parse_digest_prefix(text)
    if prefix is None:
        raise InvalidDigest(f"{shorten(text)} is neither a digest nor its first 12 hexadecimal digits or more")
    return and_(BLOBS.c.digest >= prefix, BLOBS.c.digest < f"{prefix}g")


def read_blob_details(connection: Connection, directory: Path, digest: Digest) -> BlobDetails | None:
    """Return the details of a blob, stored or not; None if the index does not have it."""
    blob = connection.execute(select(BLOBS).where(BLOBS.c.digest == digest)).first()
    if blob is None:
        return None
    is_held = connection.execute(select(LEASES.c.digest).where(LEASES.c.digest == digest).limit(1)).first() is not None
    query = (
        select(
            IMAGES.c.repository,
            IMAGES.c.reference,
            IMAGE_BLOBS.c.role,
            IMAGE_BLOBS.c.media_type,
            IMAGE_BLOBS.c.position,
        )
        .join(IMAGES, IMAGES.c.id == IMAGE_BLOBS.c.image_id)
        .where(IMAGE_BLOBS.c.blob_id == blob.id)
        .order_by(IMAGES.c.repository, IMAGES.c.reference, IMAGE_BLOBS.c.position)
    )
    uses = [
        BlobUse(Name(row.repository, row.reference), row.role, row.media_type, row.position)
        for row in connection.execute(query)
    ]
    path = blob_path(directory, digest) if blob.stored_at else None
    return BlobDetails(digest, blob.size, blob.stored_at, path, is_held, uses)
