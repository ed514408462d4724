"""Holds that outlive the process that takes them: until their time is over, or until they are released.

The leases of such a hold have its id where others have their session. Nothing but the clock of the host says
when it is over: one that is set back keeps the blobs longer, one that is set forward less long.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, delete, func, insert, or_, select

from cachedb.errors import CacheError, NotInCache
from cachedb.index.sqlite.batches import batched
from cachedb.index.tables import BLOBS, HOLDS, LEASES
from cachedb.oci.digests import Digest
from cachedb.text import shorten

__all__ = ["HoldInfo", "add", "forget", "holds", "is_id", "lapsed", "release"]


_LIMIT = timedelta(days=36_525)


class HoldInfo(NamedTuple):
    """A hold that outlives the process that took it."""

    id: str
    name: str  # the image or digest that was named
    blobs: int
    size: int  # bytes of the blobs
    created_at: datetime  # UTC
    expires_at: datetime | None  # UTC; None for one that lasts until it is released


def add(connection: Connection, name: str, digests: Iterable[Digest], seconds: float | None) -> str:
    """Hold digests for a number of seconds, or until they are released; return the hold's id.

    Raises:
        CacheError: if the time is over at once, or more than a hundred years.
    """
    now = datetime.now(UTC)
    # Compared as a number: a timedelta of the largest float there is cannot be made.
    if seconds is not None and not 0 < seconds <= _LIMIT.total_seconds():
        raise CacheError(f"{seconds:g} seconds is no time to hold anything for: leave it out to hold until released")
    expires_at = None if seconds is None else now + timedelta(seconds=seconds)
    hold = f"hold-{secrets.token_hex(6)}"
    connection.execute(insert(HOLDS).values(id=hold, name=name, created_at=now, expires_at=expires_at))
    rows = [{"digest": digest, "session": hold, "hold": 0} for digest in digests]
    if rows:
        connection.execute(insert(LEASES), rows)
    return hold


def is_id(text: str) -> bool:
    """Say whether a text has the form of a hold's id."""
    return re.fullmatch("hold-[0-9a-f]{12}", text) is not None


def holds(connection: Connection) -> list[HoldInfo]:
    """Return the holds that last, the oldest first."""
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
        .where(_lasts())
        .group_by(HOLDS.c.id)
        .order_by(HOLDS.c.created_at, HOLDS.c.id)
    )
    return [HoldInfo(*row) for row in connection.execute(query)]


def release(connection: Connection, *wanted: str) -> int:
    """End holds by their ids, or all holds of names; return how many there were.

    Raises:
        NotInCache: if there is none of an id or a name.
    """
    found: set[str] = set()
    for text in wanted:
        column = HOLDS.c.id if is_id(text) else HOLDS.c.name
        ids = set(connection.execute(select(HOLDS.c.id).where(_lasts(), column == text)).scalars())
        if not ids:
            raise NotInCache(f"{shorten(text)} is neither a hold nor held; `cachedb holds` lists what is")
        found |= ids
    forget(connection, found)
    return len(found)


def lapsed(connection: Connection) -> set[str]:
    """Return what has leases and is no hold that lasts: sessions, alive or not, and holds whose time is over."""
    lasting = select(HOLDS.c.id).where(HOLDS.c.id == LEASES.c.session, _lasts()).exists()
    return set(connection.execute(select(LEASES.c.session).where(~lasting).distinct()).scalars())


def forget(connection: Connection, sessions: Iterable[str]) -> None:
    """Delete the leases of sessions and holds, and the holds."""
    for part in batched(sessions):
        connection.execute(delete(LEASES).where(LEASES.c.session.in_(part)))
        connection.execute(delete(HOLDS).where(HOLDS.c.id.in_(part)))


def _lasts() -> ColumnElement[bool]:
    return or_(HOLDS.c.expires_at.is_(None), HOLDS.c.expires_at > datetime.now(UTC))
