"""Render a cache as one HTML page: disk usage, sharing, growth, and images that are no longer used.

The figures come from the views. The page is complete without JavaScript, which only sorts, searches and zooms. The
page loads no font, script or picture. The template escapes untrusted text (names, labels, commands, authors). A
Content-Security-Policy keeps the browser from running any other script.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection, text

from cachedb.reports import usage
from cachedb.reports.treemap import lay_out_treemap
from cachedb.reports.words import (
    AGE_DAYS,
    Row,
    build_age_expression,
    clean_text,
    fetch_rows,
    format_count,
    format_platform,
)
from cachedb.text import format_size, shorten_digest

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["render"]


# These limits keep the page to a few MB and a few seconds, even for a large cache.
_TABLE_ROWS: Final = 1000  # of a table
_GROWTH_DAYS: Final = 120  # in the chart of growth
_MATRIX_ROWS: Final = 12  # images or repositories in the matrix of sharing
_LIST_ROWS: Final = 12  # of a short list
_IMAGE_LABELS: Final = 5  # shown for an image


def render(connection: Connection, directory: Path) -> str:
    """Return the HTML page of a cache.

    Args:
        connection: a connection in a read transaction, so that all figures are from one moment.
        directory: the cache directory, for the title.
    """
    now = datetime.now(UTC)
    repositories = fetch_rows(connection, "SELECT * FROM repository_usage ORDER BY size DESC, repository")
    age, limits = build_age_expression("last_used_at", now)
    ages = fetch_rows(
        connection,
        f"""
        SELECT repository, {age} AS age, count(*) AS images, sum(unique_size) AS unique_size,
            sum(CASE WHEN complete THEN 0 ELSE 1 END) AS incomplete
        FROM image_usage GROUP BY repository, {age} ORDER BY age
        """,  # noqa: S608
        **limits,
    )
    totals = _fetch_totals(connection, repositories, ages)
    return _load_template().render(
        directory=str(directory),
        now=now,
        ages=AGE_DAYS,
        rows=_TABLE_ROWS,
        totals=totals,
        tiles=lay_out_treemap(connection, totals, repositories, ages, now),
        growth=_fetch_growth(connection, now),
        uses=_fetch_uses(connection, ages, now),
        sharing=_compute_sharing(connection, totals, repositories),
        bases=fetch_rows(
            connection,
            "SELECT base, base_layers, count(*) AS images FROM image_bases GROUP BY base, base_layers "
            "ORDER BY images DESC, base LIMIT :limit",
            limit=_LIST_ROWS,
        ),
        shared_layers=fetch_rows(
            connection,
            "SELECT digest, size, images, saved_size, substr(created_by, 1, 200) AS created_by FROM shared_layers "
            "ORDER BY saved_size DESC, digest LIMIT :limit",
            limit=_LIST_ROWS,
        ),
        platforms=fetch_rows(
            connection,
            "SELECT os, architecture, variant, count(*) AS images FROM images "
            "GROUP BY os, architecture, variant ORDER BY images DESC, os, architecture, variant LIMIT :limit",
            limit=_LIST_ROWS,
        ),
        labels=_fetch_label_keys(connection),
        images=_fetch_images(connection),
        layers=fetch_rows(
            connection,
            "SELECT digest, size, stored, images, substr(created_by, 1, 200) AS created_by FROM layers "
            "ORDER BY size DESC, digest LIMIT :limit",
            limit=_TABLE_ROWS,
        ),
        repositories=repositories[:_TABLE_ROWS],
    )


def _load_template() -> Template:
    from jinja2 import Environment, StrictUndefined  # imported here, because only this function needs it

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters.update(
        clean=clean_text,
        count=format_count,
        exact=lambda size: f"{size:,} bytes",
        grouped=lambda number: f"{number:,}",
        format_size=format_size,
        platform=format_platform,
        policy=_make_policy,
        shorten_digest=shorten_digest,
    )
    return environment.from_string(Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8"))


def _fetch_totals(connection: Connection, repositories: Sequence[Row], ages: Sequence[Row]) -> dict[str, int]:
    """Return the totals; each stored blob is unique, shared, held or garbage."""
    found, saved = usage.measure_shares(connection)
    totals = {
        "repositories": len(repositories),
        "images": sum(row.images for row in ages),
        "incomplete": sum(row.incomplete for row in ages),
        "blobs": found["stored"].blobs,
        "stored": found["stored"].size,
        "unique": found["unique"].size,
        "shared_blobs": found["shared"].blobs,
        "shared": found["shared"].size,
        "saved": saved,
        "held_blobs": found["held"].blobs,
        "held": found["held"].size,
        "garbage_blobs": found["reclaimable"].blobs,
        "garbage": found["reclaimable"].size,
    }
    for query in (
        "SELECT count(*) AS missing_blobs, coalesce(sum(size), 0) AS missing "
        "FROM (SELECT DISTINCT digest, size FROM missing_blobs) AS m",
        "SELECT coalesce(sum(saved_size), 0) AS saved_by_layers FROM shared_layers",
        "SELECT count(DISTINCT blob_id) AS layers FROM image_blobs WHERE role = 'layer'",  # as in the view
    ):
        totals.update(connection.execute(text(query)).mappings().one())
    return totals


# Charts and lists


def _fetch_growth(connection: Connection, now: datetime) -> dict[str, Any]:
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


def _fetch_uses(connection: Connection, ages: Sequence[Row], now: datetime) -> list[dict[str, int]]:
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


def _compute_sharing(connection: Connection, totals: dict[str, int], repositories: Sequence[Row]) -> dict[str, Any]:
    """Return a matrix of the bytes that images share, or repositories if there are many images."""
    if totals["images"] <= _MATRIX_ROWS:
        kind, condition = "images", "i.repository = :repository AND i.reference = :reference"
        images = fetch_rows(
            connection,
            "SELECT name, repository, reference FROM image_usage WHERE shared_size > 0 ORDER BY shared_size DESC, name",
        )
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


def _fetch_label_keys(connection: Connection) -> list[dict[str, Any]]:
    """Return the most frequent label keys, each with its most frequent value."""
    found = []
    for row in fetch_rows(
        connection,
        'SELECT "key", count(*) AS images, count(DISTINCT value) AS different FROM labels '
        'GROUP BY "key" ORDER BY images DESC, "key" LIMIT :limit',
        limit=_LIST_ROWS,
    ):
        (most,) = fetch_rows(
            connection,
            'SELECT substr(value, 1, 200) AS value, count(*) AS images FROM labels WHERE "key" = :key '
            "GROUP BY labels.value ORDER BY images DESC, labels.value LIMIT 1",
            key=row.key,
        )
        found.append({"key": row.key, "images": row.images, "different": row.different, "most": most})
    return found


def _fetch_images(connection: Connection) -> list[dict[str, Any]]:
    """Return the largest images, each with its first labels."""
    images = fetch_rows(
        connection,
        """
        SELECT name, repository, reference, digest, os, architecture, variant, substr(author, 1, 200) AS author,
            created, created_at, last_used_at, complete, size, missing_size, unique_size, shared_size
        FROM image_usage ORDER BY size DESC, name LIMIT :limit
        """,
        limit=_TABLE_ROWS,
    )
    found = []
    for image in images:
        labels = fetch_rows(
            connection,
            """
            SELECT substr(l."key", 1, 200) AS "key", substr(l.value, 1, 200) AS value
            FROM image_labels AS l JOIN images AS i ON i.id = l.image_id
            WHERE i.repository = :repository AND i.reference = :reference ORDER BY l."key"
            """,
            repository=image.repository,
            reference=image.reference,
        )
        found.append({"usage": image, "labels": labels[:_IMAGE_LABELS], "more": max(0, len(labels) - _IMAGE_LABELS)})
    return found


def _make_policy(script: str) -> str:
    """Return a Content-Security-Policy that allows a page to run only this script."""
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{hashed}'; base-uri 'none'"
