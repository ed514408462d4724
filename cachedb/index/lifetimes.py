"""Pin names, which a prune never removes, and let names expire, which it removes first.

Like the expiry of a hold, that of a name depends only on the host's clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from sqlalchemy import ColumnElement, Connection, update

from cachedb.index.sqlite.batches import split_batches
from cachedb.index.tables import IMAGES

__all__ = ["add_seconds", "is_expired", "is_pinned", "pin", "set_lifetime", "unpin"]


def is_pinned() -> ColumnElement[bool]:
    """Return the condition that the name of an image is pinned."""
    return IMAGES.c.pinned_at.is_not(None)


def is_expired() -> ColumnElement[bool]:
    """Return the condition that the lifetime of an image has ended."""
    return IMAGES.c.expires_at.is_not(None) & (IMAGES.c.expires_at <= datetime.now(UTC))


def pin(connection: Connection, image_ids: Iterable[int]) -> None:
    """Pin images; an existing pin stays as it is."""
    for part in split_batches(image_ids):
        chosen = IMAGES.c.id.in_(part) & ~is_pinned()
        connection.execute(update(IMAGES).where(chosen).values(pinned_at=datetime.now(UTC)))


def unpin(connection: Connection, image_ids: Iterable[int]) -> None:
    """Remove the pins of images."""
    for part in split_batches(image_ids):
        connection.execute(update(IMAGES).where(IMAGES.c.id.in_(part)).values(pinned_at=None))


def set_lifetime(connection: Connection, image_id: int, ttl: float | None) -> None:
    """Let an image expire after ``ttl`` seconds; None means never.

    This counts as a use of the image, so that no earlier plan removes it.
    """
    now = datetime.now(UTC)
    values = {"expires_at": add_seconds(now, ttl), "last_used_at": now}
    connection.execute(update(IMAGES).where(IMAGES.c.id == image_id).values(values))


def add_seconds(time: datetime, ttl: float | None) -> datetime | None:
    """Return when a lifetime of ``ttl`` seconds ends; None if it never ends."""
    return None if ttl is None else time + timedelta(seconds=ttl)
