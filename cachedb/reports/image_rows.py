"""Read the view ``image_usage`` once for the HTML page; in a large cache it has many rows."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection

from cachedb.reports.words import build_age_expression, fetch_rows

__all__ = ["AgeGroup", "ImageRow", "fetch_image_rows", "group_by_age"]


class ImageRow(NamedTuple):
    """A row of the view ``image_usage``, with the age group of the image."""

    name: str
    repository: str
    reference: str
    digest: str
    author: str | None
    created: str | None  # when it was built
    added_at: str  # when its name came here
    last_used_at: str
    complete: int
    size: int  # bytes, as are those below
    missing_size: int
    unique_size: int
    shared_size: int
    age: int  # the number of the age group of its last use


class AgeGroup(NamedTuple):
    """The images of a repository whose last use belongs to one age group."""

    repository: str
    age: int
    images: int
    unique_size: int  # bytes


def fetch_image_rows(connection: Connection, now: datetime) -> list[ImageRow]:
    """Return all images, largest first.

    Args:
        connection: a connection in a read transaction.
        now: the time from which ages count.
    """
    age, limits = build_age_expression("last_used_at", now)
    query = f"""
        SELECT name, repository, reference, digest, substr(author, 1, 200) AS author,
            created, added_at, last_used_at, complete, size, missing_size, unique_size, shared_size, {age} AS age
        FROM image_usage ORDER BY size DESC, name
    """  # noqa: S608
    return [ImageRow(*row) for row in fetch_rows(connection, query, **limits)]


def group_by_age(images: Sequence[ImageRow]) -> list[AgeGroup]:
    """Return the age groups of each repository, the most recent first."""
    found: dict[tuple[int, str], AgeGroup] = {}
    for image in images:
        key = image.age, image.repository
        group = found.get(key) or AgeGroup(image.repository, image.age, 0, 0)
        found[key] = group._replace(images=group.images + 1, unique_size=group.unique_size + image.unique_size)
    return [found[key] for key in sorted(found)]
