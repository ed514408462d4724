"""Measure the disk usage of a cache, exact to the byte."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, func, select

from cachedb.content import collect
from cachedb.content.collect import Collected
from cachedb.disk.sizes import measure_files
from cachedb.index.filters import Filters, find_images, parse_wanted
from cachedb.index.images import count_incomplete
from cachedb.index.sqlite.database import Database
from cachedb.index.tables import BLOBS, IMAGE_BLOBS, IMAGES
from cachedb.oci.names import Name

__all__ = [
    "ImageUsage",
    "SelectedUsage",
    "Share",
    "Stats",
    "Usage",
    "count_totals",
    "measure_selected",
    "measure_shares",
    "measure_usage",
]


# The inner query reads SQLite's index on `blob_id` in order. The outer one has a single row, so it needs no sort.
_USED_QUERY = """
SELECT
    sum(CASE images WHEN 1 THEN 1 ELSE 0 END) AS unique_blobs,
    sum(CASE images WHEN 1 THEN size ELSE 0 END) AS unique_size,
    count(*) AS blobs,
    sum(size) AS size,
    sum(size * (images - 1)) AS saved_size
FROM (SELECT blob_id, count(DISTINCT image_id) AS images FROM image_blobs GROUP BY blob_id) AS uses
CROSS JOIN blobs ON blobs.id = uses.blob_id
WHERE stored_at IS NOT NULL
"""
_STORED_QUERY = "SELECT count(*) AS blobs, sum(size) AS size FROM blobs WHERE stored_at IS NOT NULL"
_HELD_QUERY = """
SELECT count(*) AS blobs, sum(size) AS size
FROM (SELECT DISTINCT digest FROM leases) AS held
CROSS JOIN blobs ON blobs.digest = held.digest
WHERE stored_at IS NOT NULL AND NOT EXISTS (SELECT 1 FROM image_blobs WHERE image_blobs.blob_id = blobs.id)
"""
_BY_IMAGE_QUERY = """
SELECT name, size, unique_size, shared_size, freed_size, complete, last_used_at
FROM image_usage ORDER BY unique_size DESC, name
"""
_BY_NAME_QUERY = """
SELECT name, size, unique_size, shared_size, freed_size, complete, last_used_at
FROM image_usage WHERE name IN (SELECT value FROM json_each(?)) ORDER BY unique_size DESC, name
"""
_SELECTED_QUERY = """
WITH chosen AS MATERIALIZED (SELECT value AS id FROM json_each(?)),
ours AS (
    SELECT b.size,
        EXISTS (
            SELECT 1 FROM image_blobs AS o
            WHERE o.blob_id = b.id AND o.image_id NOT IN (SELECT id FROM chosen)
        ) AS is_shared,
        EXISTS (SELECT 1 FROM leases AS l WHERE l.digest = b.digest) AS is_held
    FROM blobs AS b
    WHERE b.id IN (SELECT blob_id FROM image_blobs WHERE image_id IN (SELECT id FROM chosen))
        AND b.stored_at IS NOT NULL
)
SELECT
    count(*), sum(size),
    sum(NOT is_shared), sum(size * NOT is_shared),
    sum(is_shared), sum(size * is_shared),
    sum(NOT is_shared AND NOT is_held), sum(size * (NOT is_shared AND NOT is_held))
FROM ours
"""


class Share(NamedTuple):
    """The number and size of some stored blobs."""

    blobs: int
    size: int  # bytes


class ImageUsage(NamedTuple):
    """The disk usage of one image: a row of the view ``image_usage``."""

    name: str
    size: int  # bytes, as are those below
    unique_size: int
    shared_size: int
    freed_size: int
    complete: bool
    last_used_at: datetime  # UTC


class SelectedUsage(NamedTuple):
    """What some images take together, each blob counted once."""

    images: int
    incomplete: int  # images that lack a blob
    stored: Share  # blobs of these images; unique and shared together
    unique: Share  # used only by these images
    shared: Share  # used by other images too
    freed: Share  # what removing these images would free
    image_usage: list[ImageUsage]  # the most unique bytes first, unless the images are sorted


class Usage(NamedTuple):
    """The disk usage of a cache; every stored blob is unique, shared, held or reclaimable."""

    images: int
    incomplete: int  # images that lack a blob
    stored: Share
    unique: Share  # used by one image
    shared: Share  # used by several images
    held: Share  # used by no image, but kept by a hold or a process
    reclaimable: Share  # used and kept by nothing: a collection would free it
    saved_size: int  # bytes that images would need in addition if they shared no blobs
    file_sizes: dict[str, int]  # bytes of all other files, by kind, such as ``index`` and ``quarantine``
    used_size: int  # bytes of all files of the cache
    image_usage: list[ImageUsage]  # empty unless requested


def measure_shares(connection: Connection) -> tuple[dict[str, Share], int]:
    """Return how many blobs are stored, in all and by use, and the bytes that sharing saves."""
    stored, used, held = (
        connection.exec_driver_sql(query).one() for query in (_STORED_QUERY, _USED_QUERY, _HELD_QUERY)
    )
    found = {
        "stored": _make_share(stored.blobs, stored.size),
        "unique": _make_share(used.unique_blobs, used.unique_size),
        "held": _make_share(held.blobs, held.size),
    }
    in_images = _make_share(used.blobs, used.size)
    found["shared"] = _subtract(in_images, found["unique"])
    found["reclaimable"] = _subtract(_subtract(found["stored"], in_images), found["held"])
    return found, used.saved_size or 0


def _make_share(blobs: int | None, size: int | None) -> Share:
    return Share(blobs or 0, size or 0)  # SQL's sum of no rows is NULL


def _subtract(share: Share, other: Share) -> Share:
    return Share(share.blobs - other.blobs, share.size - other.size)


def measure_usage(database: Database, *, by_image: bool = False) -> Usage:
    """Return the disk usage of a cache.

    Args:
        database: the index of the cache.
        by_image: also return the usage of each image, from the same moment.

    Raises:
        StorageError: if a folder of the cache cannot be read.
    """
    with database.read() as connection:
        found, saved_size = measure_shares(connection)
        images = int(connection.exec_driver_sql("SELECT count(*) FROM images").scalar_one())
        incomplete = count_incomplete(connection)
        listed = [_make_image_usage(row) for row in connection.exec_driver_sql(_BY_IMAGE_QUERY)] if by_image else []
    files = measure_files(database.directory)
    return Usage(
        images,
        incomplete,
        found["stored"],
        found["unique"],
        found["shared"],
        found["held"],
        found["reclaimable"],
        saved_size,
        {**files.kept, **files.freed},
        found["stored"].size + files.total_size,
        listed,
    )


def measure_selected(
    database: Database, wanted: Sequence[str | Name], filters: Filters | None, *, ignore_missing: bool = False
) -> SelectedUsage:
    """Return the disk usage of some images together; the arguments and errors are those of `narrow`."""
    wanted = parse_wanted(wanted)
    with database.read() as connection:
        found = find_images(connection, wanted, filters, ignore_missing=ignore_missing, by_default_all=True)
        places = {str(image.name): place for place, image in enumerate(found)}
        row = connection.exec_driver_sql(_SELECTED_QUERY, (json.dumps([image.id for image in found]),)).one()
        rows = connection.exec_driver_sql(_BY_NAME_QUERY, (json.dumps(list(places)),))
        listed = [_make_image_usage(image) for image in rows]
    if filters is not None and filters.sort is not None:
        listed.sort(key=lambda image: places[image.name])
    incomplete = sum(not image.complete for image in listed)
    stored, unique, shared, freed = (_make_share(*row[index : index + 2]) for index in range(0, 8, 2))
    return SelectedUsage(len(listed), incomplete, stored, unique, shared, freed, listed)


def _make_image_usage(row: Sequence[Any]) -> ImageUsage:
    name, size, unique_size, shared_size, freed_size, complete, last_used_at = row
    used = datetime.fromisoformat(last_used_at)
    return ImageUsage(name, size, unique_size, shared_size, freed_size, bool(complete), used)


class Stats(NamedTuple):
    """Totals of a cache."""

    manifest_count: int  # images: names that each point to a manifest or an index
    blob_count: int  # stored blobs: layers, configs, manifests and indexes
    total_size: int  # bytes of the stored blobs
    incomplete_count: int  # images with a missing blob
    reclaimable_blobs: int  # stored blobs that a collection would free now
    reclaimable_size: int  # bytes of those


def count_totals(database: Database) -> Stats:
    """Return the totals of a cache."""
    with database.read() as connection:
        size = func.sum(BLOBS.c.size).filter(BLOBS.c.stored_at.is_not(None))
        totals = select(func.count(), func.count(BLOBS.c.stored_at), func.coalesce(size, 0)).select_from(BLOBS)
        known, blob_count, total_size = connection.execute(totals).one()
        # Counting incomplete images and unreferenced blobs is slow. These cheap counts show whether there are any.
        used = connection.execute(select(func.count(IMAGE_BLOBS.c.blob_id.distinct()))).scalar_one()
        reclaimable = collect.sum_unreferenced(connection) if used < known else Collected(0, 0)
        return Stats(
            manifest_count=connection.execute(select(func.count()).select_from(IMAGES)).scalar_one(),
            blob_count=blob_count,
            total_size=total_size,
            incomplete_count=count_incomplete(connection) if blob_count < known else 0,
            reclaimable_blobs=reclaimable.blobs,
            reclaimable_size=reclaimable.bytes,
        )
