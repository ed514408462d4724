"""A lost or damaged index, made anew: from what can still be read of it, the newest backup, and the blobs.

The blobs are what an index is about, and their manifests say what each image needs. What no blob says is the
names; those come from the damaged index itself, as far as it can be read, else from the newest backup.
An image whose name is in neither is kept under a name by its digest, in the repository ``recovered``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Column, Connection, Table, Text, func, insert, select, type_coerce
from sqlalchemy.exc import IntegrityError

from cachedb.content import save
from cachedb.disk import layout, reader
from cachedb.errors import (
    CacheError,
    InvalidManifest,
    os_errors,
)
from cachedb.index.sqlite import backups
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.inspect import find_faults
from cachedb.index.tables import BLOBS, IMAGE_BLOBS, IMAGES, METADATA, UtcTime
from cachedb.oci.digests import Digest, parse_digest
from cachedb.oci.manifests import DOCUMENT_LIMIT, ROLES, Descriptor, check_media_type, descriptors, manifest_media_type
from cachedb.oci.names import Name
from cachedb.operations import upgrade

__all__ = ["insert_rows", "name_unnamed", "read_rows", "rebuild"]


RECOVERED = "recovered"
"""The repository of images whose names are lost."""


_TABLES = ("blobs", "images", "image_blobs", "holds", "leases")  # what else there is the blobs say
_PARTIAL = {"image_blobs": "blobs that were attached to images", "holds": "holds", "leases": "leases of holds"}


class Salvage(NamedTuple):
    """What could be read of an index."""

    images: dict[Name, save.SavedImage]
    rows: dict[str, list[dict[str, Any]]]  # of the tables that are taken over as they are
    whole: bool  # whether no image is lost
    partial: list[str]  # what else is not all there


def rebuild(database: Database, folder: Path) -> list[str]:
    """Make the index anew, unless another process has done so; return what could not be restored, a line each.

    Files are taken for what their names say; a verification that follows looks into them.
    The write lock is held throughout. The old index is kept in ``quarantine/``. The new one is put among the
    backups first, so that a crash after the old one's WAL was taken away loses nothing.

    Args:
        database: of the cache.
        folder: a new one of a session's, to work in.
    """
    with os_errors("rebuild the index"), database.alone() as turn:
        if not find_faults(database):
            return []
        files, _ = layout.on_disk(database.directory)
        salvage, notes = _salvage(database)
        with closing(Database(folder)) as new:
            upgrade.prepare(new)
            with new.write() as connection:
                notes += _fill(connection, database.directory, files, salvage)
        backups.put_in_place(database, turn, new.path)
    return notes


def _salvage(database: Database) -> tuple[Salvage, list[str]]:
    """Read the index as far as it can be read, and for the rest the newest backup whose images can be read."""
    found = _read(database)
    notes = []
    if database.path.exists():
        notes = [f"not all {lost} could be read of the index, and some may be lost" for lost in found.partial]
    if found.whole:
        return found, notes
    for path in backups.newest_first(database.directory):
        with closing(Database(database.directory, path)) as other:
            backup = _read(other)
        if backup.whole:
            note = f"what could not be read of the index is as in the backup {path.name}"
            # A hold too many does no harm; and a rebuilding that was cut off has put its leases there.
            rows = {table: [*found.rows[table], *backup.rows[table]] for table in found.rows}
            return found._replace(images={**backup.images, **found.images}, rows=rows), [*notes, note]
    return found, [*notes, "not all of the index could be read, and there is no backup that can be"]


def _read(database: Database) -> Salvage:
    found = {name: read_rows(database, METADATA.tables[name]) for name in _TABLES}
    database.close()
    rows, whole = found["images"]
    stored = {row["id"]: row for row in found["blobs"][0]}
    contents: dict[int, list[Descriptor]] = {}
    saved = {}
    for row in sorted(found["image_blobs"][0], key=lambda row: (str(row["image_id"]), _as_number(row["position"]))):
        with suppress(CacheError, KeyError):
            blob, media_type = stored[row["blob_id"]], check_media_type(row["media_type"], "a blob")
            if row["role"] not in ROLES or type(blob["size"]) is not int or blob["size"] < 0:
                continue  # its row would be refused, and the image with it
            descriptor = Descriptor(parse_digest(blob["digest"]), blob["size"], media_type, row["role"])
            contents.setdefault(row["image_id"], []).append(descriptor)
    for row in rows:
        try:
            saved[Name.parse(Name(row["repository"], row["reference"]))] = save.SavedImage(
                parse_digest(stored[row["manifest_id"]]["digest"]),
                row["media_type"],
                datetime.fromisoformat(row["created_at"]),
                datetime.fromisoformat(row["last_used_at"]),
                row.get("some_platforms"),
                contents.get(row["id"], []),
            )
        except (CacheError, KeyError, TypeError, ValueError):
            whole = False  # it is this row that is damaged
    # A damaged page may read as one with no rows, and raise nothing.
    with suppress(CacheError), database.look() as connection:
        whole = whole and connection.execute(select(func.count()).select_from(IMAGES)).scalar_one() <= len(rows)
    database.close()
    partial = [what for name, what in _PARTIAL.items() if not found[name][1]]
    return Salvage(saved, {name: found[name][0] for name in ("holds", "leases")}, whole, partial)


def _as_number(value: object) -> int:
    return value if isinstance(value, int) else 0


def read_rows(database: Database, table: Table) -> tuple[list[dict[str, Any]], bool]:
    """Read a table from its beginning, and where that comes to damage, from its end as well."""
    there = _columns(database, table)
    # As text, whatever is there: a damaged time must not cost the row's neighbours.
    columns = [type_coerce(c, Text).label(c.name) if isinstance(c.type, UtcTime) else c for c in there]
    key = list(table.primary_key)
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for order in ([column.asc() for column in key], [column.desc() for column in key]):
        with suppress(CacheError), database.look() as connection:
            result = connection.execute(select(*columns).order_by(*order)).mappings()
            while (row := result.fetchone()) is not None:
                found[tuple(row[column.name] for column in key)] = dict(row)
            return list(found.values()), True
    return list(found.values()), False


def _columns(database: Database, table: Table) -> list[Column[Any]]:
    """Return the columns that a table has in this index, which may have an older schema."""
    with suppress(CacheError), database.look() as connection:
        names = {row[1] for row in connection.exec_driver_sql(f"PRAGMA table_info({table.name})")}
        return [column for column in table.columns if column.name in names] or list(table.columns)
    return list(table.columns)


def _fill(connection: Connection, directory: Path, files: dict[Digest, int], salvage: Salvage) -> Iterator[str]:
    """Write the new index; yield what could not be restored."""
    now, whole = datetime.now(UTC), salvage.whole
    if files:
        rows = [{"digest": digest, "size": size, "stored_at": now} for digest, size in files.items()]
        connection.execute(insert(BLOBS), rows)
    for name, image in salvage.images.items():
        try:
            with connection.begin_nested():
                if image.digest in files:
                    _check_manifest(directory, image.digest, files[image.digest])
                save.restore(connection, directory, name, image)
        except (CacheError, IntegrityError) as error:
            whole = False
            reason = error.orig if isinstance(error, IntegrityError) else error
            yield f"{name} could not be restored: {reason}"
            continue
        if image.digest not in files:
            yield f"{name} has lost its manifest {image.digest}: import or pull it again"
    for table, rows in salvage.rows.items():
        insert_rows(connection, table, rows)
    if whole:
        return
    for name in name_unnamed(connection, directory, files):
        yield f"the name of an image could not be restored: it is {name} now; `cachedb tag` gives it another"


def insert_rows(connection: Connection, table: str, rows: list[dict[str, Any]]) -> None:
    """Insert rows into a table of the new index."""
    for row in rows:
        with suppress(IntegrityError), connection.begin_nested():
            # As they were read: the times are text still.
            columns = {column: type_coerce(value, Text) for column, value in row.items() if column.endswith("_at")}
            connection.execute(insert(METADATA.tables[table]).values({**row, **columns}))


def name_unnamed(connection: Connection, directory: Path, files: dict[Digest, int]) -> list[Name]:
    """Give a name to each manifest that belongs to no image, nor is a child of another: a collection would take it.

    Args:
        connection: to write with.
        directory: of the cache.
        files: where to look: blobs that are stored, with their sizes in bytes.
    """
    now, names = datetime.now(UTC), []
    for digest, media_type in _unnamed(connection, directory, files):
        names.append(Name(RECOVERED, digest))
        save.restore(connection, directory, names[-1], save.SavedImage(digest, media_type, now, now, None, []))
    return names


def _check_manifest(directory: Path, digest: Digest, size: int) -> None:
    """Refuse good content that is no manifest: the row that points to it is damaged.

    Raises:
        InvalidManifest: if it is none.
    """
    data = reader.document(directory, digest, size)
    if data is not None:
        descriptors(data, manifest_media_type(data))
    elif size > DOCUMENT_LIMIT:
        raise InvalidManifest(f"{digest} is too large for a manifest")


def _unnamed(connection: Connection, directory: Path, files: dict[Digest, int]) -> list[tuple[Digest, str]]:
    """Return the manifests that belong to no image, without those that another of them has as a child."""
    used = set(
        connection.execute(select(BLOBS.c.digest).join(IMAGE_BLOBS, IMAGE_BLOBS.c.blob_id == BLOBS.c.id)).scalars()
    )
    found: dict[Digest, str] = {}
    children: set[Digest] = set()
    for digest, size in files.items():
        if digest in used:
            continue
        data = reader.document(directory, digest, size)
        if data is None or not data.lstrip().startswith(b"{"):
            continue
        with suppress(InvalidManifest):
            media_type = manifest_media_type(data)
            children.update(child.digest for child in descriptors(data, media_type))
            found[digest] = media_type
    return [(digest, media_type) for digest, media_type in found.items() if digest not in children]
