"""Read and write the rows of blobs: whether they are stored, and their sizes."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, bindparam, select
from sqlalchemy.dialects.sqlite import Insert, insert

from cachedb.disk.writer import Received
from cachedb.errors import InvalidDigest
from cachedb.index.sqlite.batches import split_batches
from cachedb.index.sqlite.database import Database
from cachedb.index.tables import BLOBS
from cachedb.oci.digests import Digest, parse_digest_prefix
from cachedb.text import shorten

__all__ = ["read_all_stored_sizes", "read_stored_size", "read_stored_sizes", "set_stored", "starts_with"]


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


@cache
def _select_size() -> Select[*tuple[Any, ...]]:
    return select(BLOBS.c.size).where(BLOBS.c.digest == bindparam("digest"), BLOBS.c.stored_at.is_not(None))


@cache
def _select_stored() -> Select[*tuple[Any, ...]]:
    is_wanted = BLOBS.c.digest.in_(bindparam("digests", expanding=True))
    return select(BLOBS.c.digest, BLOBS.c.size).where(is_wanted, BLOBS.c.stored_at.is_not(None))


def starts_with(text: str) -> ColumnElement[bool]:
    """Return the condition that a blob has a digest, or a digest that starts with these 12 hex digits or more.

    Raises:
        InvalidDigest: if the text is neither.
    """
    prefix = parse_digest_prefix(text)
    if prefix is None:
        raise InvalidDigest(f"{shorten(text)} is neither a digest nor its first 12 hexadecimal digits or more")
    return and_(BLOBS.c.digest >= prefix, BLOBS.c.digest < f"{prefix}g")
