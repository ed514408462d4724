"""Read the index without SQLAlchemy, because its import takes longer than the start of a push."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from cachedb.disk import forks
from cachedb.errors import StorageError, os_errors

__all__ = ["CONTENTS", "REPOSITORIES", "query_index"]


CONTENTS = """
SELECT root.digest, root.size, images.media_type, blobs.digest, blobs.stored_at IS NOT NULL
FROM images JOIN blobs AS root ON root.id = images.manifest_id
JOIN image_blobs ON image_blobs.image_id = images.id JOIN blobs ON blobs.id = image_blobs.blob_id
WHERE images.repository = ? AND images.reference = ? AND ? = (SELECT version_num FROM alembic_version)
"""
REPOSITORIES = """
SELECT DISTINCT images.repository FROM blobs
JOIN image_blobs ON image_blobs.blob_id = blobs.id JOIN images ON images.id = image_blobs.image_id
WHERE blobs.digest = ?
"""


def query_index(directory: Path, query: str, *values: str) -> list[tuple[Any, ...]]:
    """Return the rows of a query on the index of a cache; the connection cannot write to the index.

    Raises:
        StorageError: if the index cannot be read, or changed while it was read.
    """
    index = (directory / "index.db").absolute()
    with forks.no_fork(), os_errors("read the index"):
        # Opening an idle index would leave -shm and -wal files behind, so open it as immutable.
        before = _state(index)
        immutable = "" if before.has_wal else "&immutable=1"
        uri = f"{index.as_uri()}?mode=ro{immutable}"
        try:
            with closing(sqlite3.connect(uri, uri=True, timeout=0)) as connection:
                found = connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise StorageError(f"the index cannot be read: {error}") from error
        if immutable and _state(index) != before:
            raise StorageError("the index changed while it was read: try again")
        return found


class _State(NamedTuple):
    """The attributes that change when a process writes to an index."""

    modified: int  # nanoseconds
    size: int  # bytes
    has_wal: bool


def _state(index: Path) -> _State:
    status = index.stat()
    return _State(status.st_mtime_ns, status.st_size, index.with_name("index.db-wal").exists())
