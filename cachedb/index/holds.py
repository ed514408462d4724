"""Add, list and release holds, which outlive their process until they expire or are released.

The leases of a hold have its id in place of a session. Expiry depends only on the host's clock: setting the clock back
makes a hold last longer, and setting it forward makes it expire earlier.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, delete, func, insert, or_, select

from cachedb.arguments import LONGEST_SECONDS
from cachedb.errors import CacheError, NotInCache
from cachedb.index.sqlite.batches import split_batches
from cachedb.index.tables import BLOBS, HOLDS, LEASES
from cachedb.oci.digests import Digest
from cachedb.text import shorten

__all__ = ["HoldInfo", "add", "forget", "is_id", "read_holds", "read_lapsed", "release"]


class HoldInfo(NamedTuple):
    """A hold that outlives its process."""

    id: str
    name: str  # the held image or digest
    blobs: int
    size: int  # bytes of the blobs
    created_at: datetime  # UTC
    expires_at: datetime | None  # UTC; None for a hold that lasts until released


def add(connection: Connection, name: str, digests: Iterable[Digest], seconds: float | None) -> str:
    """Hold digests for some seconds, or until released; return the hold's id.

    Raises:
        CacheError: if ``seconds`` is not positive, or more than a hundred years.
    """
    now = datetime.now(UTC)
    # Compare numbers, because the largest float does not fit into a timedelta.
    if seconds is not None and not 0 < seconds <= LONGEST_SECONDS:
        raise CacheError(
            f"cannot hold for {seconds:g} seconds: use a time above 0 and up to 100 years, or leave it out "
            "to hold until released"
        )
    expires_at = None if seconds is None else now + timedelta(seconds=seconds)
    hold = f"hold-{secrets.token_hex(6)}"
    connection.execute(insert(HOLDS).values(id=hold, name=name, created_at=now, expires_at=expires_at))
    rows = [{"digest": digest, "session": hold, "hold": 0} for digest in digests]
    if rows:
        connection.execute(insert(LEASES), rows)
    return hold


def is_id(text: str) -> bool:
    """Return whether a text has the form of a hold's id."""
    return re.fullmatch("hold-[0-9a-f]{12}", text) is not None


def read_holds(connection: Connection) -> list[HoldInfo]:
    """Return the holds that have not expired, oldest first."""
    query = (
        select(
            HOLDS.c.id,
            HOLDS.c.name,
            func.count(LEASES.c.digest),
            func.coalesce(func.sum(BLOBS.c.size), 0),
            HOLDS.c.created_at,
            HOLDS.c.expires_at,
        )
        .outerjoin(LEASES, LEASES.c.session == HOLDS.c.id)
        .outerjoin(BLOBS, BLOBS.c.digest == LEASES.c.digest)
        .where(_is_unexpired())
        .group_by(HOLDS.c.id)
        .order_by(HOLDS.c.created_at, HOLDS.c.id)
    )
    return [HoldInfo(*row) for row in connection.execute(query)]


def release(connection: Connection, *wanted: str) -> int:
    """Release holds by id, or all holds of a name or digest; return their number.

    Raises:
        NotInCache: if there is no hold for one of the ids, names or digests.
    """
    found: set[str] = set()
    for text in wanted:
        column = HOLDS.c.id if is_id(text) else HOLDS.c.name
        ids = set(connection.execute(select(HOLDS.c.id).where(_is_unexpired(), column == text)).scalars())
        if not ids:
            raise NotInCache(f"{shorten(text)} is neither a hold nor held: `cachedb holds` lists all holds")
        found |= ids
    forget(connection, found)
    return len(found)


def read_lapsed(connection: Connection) -> set[str]:
    """Return the sessions (alive or not) and expired holds that have leases."""
    lasting = select(HOLDS.c.id).where(HOLDS.c.id == LEASES.c.session, _is_unexpired()).exists()
    return set(connection.execute(select(LEASES.c.session).where(~lasting).distinct()).scalars())


def forget(connection: Connection, sessions: Iterable[str]) -> None:
    """Delete the leases of sessions and holds, and the holds themselves."""
    for part in split_batches(sessions):
        connection.execute(delete(LEASES).where(LEASES.c.session.in_(part)))
        connection.execute(delete(HOLDS).where(HOLDS.c.id.in_(part)))


def _is_unexpired() -> ColumnElement[bool]:
    return or_(HOLDS.c.expires_at.is_(None), HOLDS.c.expires_at > datetime.now(UTC))
