"""Find what can be cleaned up, for the HTML page: images to remove, holds, duplicates, outdated bases."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, bindparam, text

from cachedb.errors import InvalidName
from cachedb.index.holds import HoldInfo, read_holds
from cachedb.index.tables import format_time
from cachedb.oci.names import Name
from cachedb.reports.image_rows import ImageRow
from cachedb.reports.named import load_built_in
from cachedb.reports.words import Row, fetch_rows

__all__ = [
    "UNUSED_DAYS",
    "OutdatedBase",
    "Removal",
    "count_outdated_bases",
    "fetch_holds",
    "find_duplicates",
    "find_incomplete",
    "format_command_line",
    "propose_removal",
]


UNUSED_DAYS: Final = 30  # an image whose last use is more recent is not proposed
_PROPOSED_IMAGES: Final = 500  # the most images that one command removes


class Removal(NamedTuple):
    """Images to remove together, and what that frees."""

    names: list[str]  # least recently used first
    freed_size: int  # bytes
    candidates: int  # images that were not used for `UNUSED_DAYS`, and that nothing holds


class OutdatedBase(NamedTuple):
    """A base image that has a newer build in the cache."""

    base: str
    newer: str
    images: int  # images that are built on the base


def propose_removal(connection: Connection, now: datetime) -> Removal:
    """Choose images that were not used for a long time and are neither pinned nor held.

    Args:
        connection: a connection in a read transaction.
        now: the time from which the age counts.
    """
    candidates = fetch_rows(
        connection,
        """
        SELECT i.id, i.repository, i.reference
        FROM images AS i JOIN blobs AS m ON m.id = i.manifest_id
        WHERE i.last_used_at < :before AND i.pinned_at IS NULL
            AND NOT EXISTS (SELECT 1 FROM leases AS l WHERE l.digest = m.digest)
        ORDER BY i.last_used_at, i.repository, i.reference
        """,
        before=format_time(now - timedelta(days=UNUSED_DAYS)),
    )
    named = ((row.id, name) for row in candidates if (name := _parse_name(row)))
    chosen = dict(islice(named, _PROPOSED_IMAGES))
    # A blob is freed if only chosen images use it.
    query = text(
        """
        SELECT DISTINCT o.image_id, b.id AS blob_id, b.size
        FROM image_blobs AS o JOIN blobs AS b ON b.id = o.blob_id
        WHERE o.image_id IN :chosen AND b.stored_at IS NOT NULL
            AND NOT EXISTS (SELECT 1 FROM image_blobs AS p WHERE p.blob_id = b.id AND p.image_id NOT IN :chosen)
            AND NOT EXISTS (SELECT 1 FROM leases AS l WHERE l.digest = b.digest)
        """
    ).bindparams(bindparam("chosen", expanding=True))
    rows = connection.execute(query, {"chosen": list(chosen)}).all()
    useful = {row.image_id for row in rows}  # removing any other image frees nothing
    freed_size = sum({row.blob_id: row.size for row in rows}.values())
    return Removal([name for image, name in chosen.items() if image in useful], freed_size, len(candidates))


def _parse_name(row: Row) -> str:
    """Return the name of an image; empty if it is invalid, because another program wrote it."""
    name = str(Name(row.repository, row.reference))
    try:
        return name if str(Name.parse(name)) == name else ""
    except InvalidName:
        return ""


def find_incomplete(images: Iterable[ImageRow], limit: int) -> list[ImageRow]:
    """Return the incomplete images that lack the most bytes."""
    found = (image for image in images if not image.complete)
    return sorted(found, key=lambda image: (-image.missing_size, image.name))[:limit]


def fetch_holds(connection: Connection) -> list[HoldInfo]:
    """Return the holds that have not expired, largest first."""
    return sorted(read_holds(connection), key=lambda hold: (-hold.size, hold.id))


def count_outdated_bases(connection: Connection) -> tuple[list[OutdatedBase], set[str]]:
    """Return the bases that have a newer build, and the names of all images on them.

    The base of the most images comes first.
    """
    rows = connection.exec_driver_sql(load_built_in("outdated-bases").query).all()
    images: dict[tuple[str, str], int] = {}
    for row in rows:
        images[row.base, row.newer] = images.get((row.base, row.newer), 0) + 1
    found = [OutdatedBase(base, newer, count) for (base, newer), count in images.items()]
    return sorted(found, key=lambda base: (-base.images, base)), {row.name for row in rows}


def format_command_line(directory: Path, command: str, names: Sequence[str]) -> str:
    """Return a command for the shell, a line for each name; empty if it cannot be shown exactly.

    Args:
        directory: the cache directory.
        command: the command of cachedb, such as ``rm``.
        names: its arguments.
    """
    words = ["cachedb", "--dir", str(directory), command, *names]
    if not all(word.isprintable() for word in words):
        return ""  # escaping a control character would change the word
    first = " ".join(map(shlex.quote, words[:4]))
    separator = " " if len(names) < 2 else " \\\n  "
    return separator.join([first, *map(shlex.quote, names)])


def find_duplicates(names: Mapping[str, list[str]]) -> list[dict[str, Any]]:
    """Return the manifests that have several names, those with most names first.

    Args:
        names: the names of each manifest, by digest.
    """
    found = [{"digest": digest, "names": sorted(those)} for digest, those in names.items() if len(those) > 1]
    return sorted(found, key=lambda manifest: (-len(manifest["names"]), manifest["names"]))
