"""What a cache takes on the disk, and for what: true to the byte."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection

from cachedb.database import Database
from cachedb.errors import os_errors
from cachedb.images import count_incomplete

__all__ = ["Share", "Usage", "shares", "usage"]

# Of what images use: in the order of the index of the association, which is that of the blobs.
_USED = """
SELECT
    CASE WHEN images > 1 THEN 'shared' ELSE 'unique' END AS share,
    count(*) AS blobs,
    sum(size) AS size,
    sum(size * (images - 1)) AS saved_size
FROM (SELECT blob_id, count(DISTINCT image_id) AS images FROM image_blobs GROUP BY blob_id) AS uses
CROSS JOIN blobs ON blobs.id = uses.blob_id
WHERE stored_at IS NOT NULL
GROUP BY share
"""
_UNUSED = """
SELECT
    CASE WHEN EXISTS (SELECT 1 FROM leases WHERE leases.digest = blobs.digest) THEN 'held'
        ELSE 'reclaimable' END AS share,
    count(*) AS blobs,
    sum(size) AS size,
    0 AS saved_size
FROM blobs
WHERE stored_at IS NOT NULL AND NOT EXISTS (SELECT 1 FROM image_blobs WHERE image_blobs.blob_id = blobs.id)
GROUP BY share
"""
_FOLDERS = ("backups", "ingest", "quarantine", "trash")


class Share(NamedTuple):
    """Some of the stored blobs."""

    blobs: int
    size: int  # bytes


class Usage(NamedTuple):
    """What a cache takes; every stored blob is in one share."""

    images: int
    incomplete: int  # images that lack a blob
    stored: Share
    unique: Share  # that one image has
    shared: Share  # that several images have
    held: Share  # that no image has, and a hold or a process keeps
    reclaimable: Share  # that no image has and nothing keeps: what a collection would free
    saved_size: int  # bytes that shared blobs would take again, if each image had its own
    index_size: int  # bytes of the index
    folder_sizes: dict[str, int]  # bytes of files in backups, ingest (with downloads that were cut off), quarantine...


def shares(connection: Connection) -> tuple[dict[str, Share], int]:
    """Return the stored blobs, all of them (``stored``) and by who needs them, and the bytes that sharing saves."""
    rows = [row for query in (_USED, _UNUSED) for row in connection.exec_driver_sql(query)]
    found = dict.fromkeys(("unique", "shared", "held", "reclaimable"), Share(0, 0))
    found |= {row.share: Share(row.blobs, row.size) for row in rows}
    found["stored"] = Share(sum(row.blobs for row in rows), sum(row.size for row in rows))
    return found, sum(row.saved_size for row in rows)


def usage(database: Database) -> Usage:
    """Return what a cache takes.

    Raises:
        StorageError: if a folder of it cannot be read.
    """
    with database.read() as connection:
        found, saved_size = shares(connection)
        images = int(connection.exec_driver_sql("SELECT count(*) FROM images").scalar_one())
        incomplete = count_incomplete(connection)
    return Usage(
        images,
        incomplete,
        found["stored"],
        found["unique"],
        found["shared"],
        found["held"],
        found["reclaimable"],
        saved_size,
        sum(map(_size, database.directory.glob("index.db*"))),
        {name: sum(map(_size, _files(database.directory / name))) for name in _FOLDERS},
    )


def _files(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        for name in names:
            yield Path(place, name)


def _size(path: Path) -> int:
    with os_errors("read the cache"):
        try:
            return path.lstat().st_size
        except FileNotFoundError:
            return 0
