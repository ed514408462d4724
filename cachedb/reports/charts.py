"""Fetch the charts and short lists of the HTML page: growth, last use, sharing, platforms, labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import date, datetime, timedelta
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection

from cachedb.reports.image_rows import AgeGroup, ImageRow
from cachedb.reports.words import AGE_DAYS, Row, build_age_expression, fetch_rows

__all__ = [
    "LIST_ROWS",
    "Base",
    "compute_sharing",
    "count_bases",
    "count_platforms",
    "fetch_growth",
    "fetch_label_keys",
    "fetch_uses",
]


LIST_ROWS: Final = 12  # of a short list
_GROWTH_DAYS: Final = 120  # in the chart of growth
_MATRIX_ROWS: Final = 12  # images or repositories in the matrix of sharing


class Base(NamedTuple):
    """An image that other images are built on."""

    base: str
    base_layers: int
    images: int


def fetch_growth(connection: Connection, now: datetime) -> dict[str, Any]:
    """Return the growth of the last days, including days without any, and the bytes stored before them."""
    rows = {row.day: row for row in fetch_rows(connection, "SELECT day, images, blobs, size FROM growth ORDER BY day")}
    today = now.date()
    first = min([*map(date.fromisoformat, list(rows)[:1]), today - timedelta(days=13)])
    first = max(first, today - timedelta(days=_GROWTH_DAYS - 1))
    last = max([*map(date.fromisoformat, list(rows)[-1:]), today])
    last = min(last, first + timedelta(days=_GROWTH_DAYS))  # a wrong clock may have written a date far in the future
    days = [first + timedelta(days=number) for number in range((last - first).days + 1)]
    shown = [(day, rows.get(day.isoformat())) for day in days]
    return {
        "days": shown,
        "most": max((row.size for _, row in shown if row), default=0),
        "added": sum(row.size for _, row in shown if row),
        "added_before": sum(row.size for day, row in rows.items() if day < first.isoformat()),
    }


def fetch_uses(connection: Connection, ages: Sequence[AgeGroup], now: datetime) -> list[dict[str, int]]:
    """Return for each age group its images, its bytes, and what removing it and all older groups frees.

    The age is the time since the last use. A blob of several images has the age of the image that was used last.
    """
    age, limits = build_age_expression("used", now)
    sizes = {
        row.age: row
        for row in fetch_rows(
            connection,
            f"""
            SELECT {age} AS age, sum(size) AS size, sum(CASE WHEN held THEN 0 ELSE size END) AS freed
            FROM (
                SELECT b.size, max(i.last_used_at) AS used,
                    EXISTS (SELECT 1 FROM leases AS l WHERE l.digest = b.digest) AS held
                FROM blobs AS b JOIN image_blobs AS o ON o.blob_id = b.id JOIN images AS i ON i.id = o.image_id
                WHERE b.stored_at IS NOT NULL
                GROUP BY b.id, b.size, b.digest
            ) AS u
            GROUP BY 1
            """,  # noqa: S608
            **limits,
        )
    }
    found = []
    for number in range(len(AGE_DAYS) + 1):
        images = sum(row.images for row in ages if row.age == number)
        size = sizes[number].size if number in sizes else 0
        freed = sum(row.freed for other, row in sizes.items() if other >= number)
        found.append({"images": images, "size": size, "freed": freed})
    return found


def compute_sharing(connection: Connection, repositories: Sequence[Row], rows: Sequence[ImageRow]) -> dict[str, Any]:
    """Return a matrix of the bytes that images share, or repositories if there are many images."""
    if len(rows) <= _MATRIX_ROWS:
        kind, condition = "images", "i.repository = :repository AND i.reference = :reference"
        images = sorted((row for row in rows if row.shared_size), key=lambda row: (-row.shared_size, row.name))
        chosen = {row.name: {"repository": row.repository, "reference": row.reference} for row in images}
    else:
        kind, condition = "repositories", "i.repository = :repository"
        most = sorted(repositories, key=lambda row: -row.shared_size)[:_MATRIX_ROWS]
        chosen = {row.repository: {"repository": row.repository} for row in most if row.shared_size}
    query = f"""
        SELECT DISTINCT b.id, b.size
        FROM images AS i JOIN image_blobs AS o ON o.image_id = i.id JOIN blobs AS b ON b.id = o.blob_id
        WHERE b.stored_at IS NOT NULL AND {condition}
    """  # noqa: S608
    contents = [{row.id: row.size for row in fetch_rows(connection, query, **keys)} for keys in chosen.values()]
    matrix = []
    for name, mine in zip(chosen, contents, strict=True):
        cells = []
        for other in contents:
            common = sum(mine[blob] for blob in mine.keys() & other.keys())
            smaller = min(sum(mine.values()), sum(other.values()))
            cells.append({"size": common, "percent": round(100 * common / max(1, smaller)), "self": other is mine})
        matrix.append({"name": name, "cells": cells})
    return {"kind": kind, "matrix": matrix}


def count_bases(bases: Iterable[Row]) -> list[Base]:
    """Return the bases that the most images are built on.

    Args:
        bases: rows of the view ``image_bases``.
    """
    counted = Counter((row.base, row.base_layers) for row in bases)
    found = [Base(base, layers, images) for (base, layers), images in counted.items()]
    return sorted(found, key=lambda base: (-base.images, base))[:LIST_ROWS]


def count_platforms(platforms: Iterable[Iterable[str]]) -> list[tuple[str, int]]:
    """Return the most frequent platforms, each with its number of images.

    Args:
        platforms: the platforms of each image.
    """
    counted = Counter(platform for those in platforms for platform in those)
    return sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:LIST_ROWS]


def fetch_label_keys(connection: Connection) -> list[dict[str, Any]]:
    """Return the most frequent label keys, each with its most frequent value."""
    found = []
    for row in fetch_rows(
        connection,
        'SELECT "key", count(*) AS images, count(DISTINCT value) AS different FROM labels '
        'GROUP BY "key" ORDER BY images DESC, "key" LIMIT :limit',
        limit=LIST_ROWS,
    ):
        (most,) = fetch_rows(
            connection,
            'SELECT substr(value, 1, 200) AS value, count(*) AS images FROM labels WHERE "key" = :key '
            "GROUP BY labels.value ORDER BY images DESC, labels.value LIMIT 1",
            key=row.key,
        )
        found.append({"key": row.key, "images": row.images, "different": row.different, "most": most})
    return found
