"""Rebuild a lost or damaged index from its readable rows, the newest backup, and the blobs.

The manifests among the blobs list the blobs of each image, but not its name. Names come from the readable rows of the
damaged index, else from the newest backup. An image whose name is lost gets its digest as its name, in the repository
``recovered``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import ColumnClause, Connection, Table, Text, column, func, insert, select, type_coerce
from sqlalchemy import table as lightweight_table
from sqlalchemy.exc import IntegrityError

from cachedb.content import save
from cachedb.disk import layout, reader
from cachedb.disk.existence import exists
from cachedb.errors import (
    CacheError,
    InvalidManifest,
    os_errors,
)
from cachedb.index.sqlite import backups
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.inspect import find_faults
from cachedb.index.tables import BLOBS, IMAGE_BLOBS, IMAGES, METADATA, OLD_NAMES, UtcTime
from cachedb.oci.digests import Digest, parse_digest
from cachedb.oci.manifests import (
    DOCUMENT_LIMIT,
    ROLES,
    Descriptor,
    check_media_type,
    descriptors,
    manifest_media_type,
    root_descriptor,
)
from cachedb.oci.names import Name
from cachedb.operations import upgrade

__all__ = ["insert_rows", "name_unnamed", "read_rows", "rebuild"]


RECOVERED = "recovered"
"""The repository of images whose names are lost."""

_TABLES = ("blobs", "images", "image_blobs", "lasting_holds", "leases")  # the other tables are not salvaged
_LOSSES = {"image_blobs": "blobs attached to images", "lasting_holds": "holds", "leases": "leases of holds"}


class Salvage(NamedTuple):
    """The readable content of an index."""

    images: dict[Name, save.SavedImage]
    rows: dict[str, list[dict[str, Any]]]  # of the tables that are copied unchanged
    has_all_images: bool
    losses: list[str]  # what else may be incomplete


def rebuild(database: Database, folder: Path) -> list[str]:
    """Rebuild the index, unless another process has done so; return a line for each loss.

    This trusts the names of files; the caller must verify their content afterwards. The write lock is held throughout.
    The old index is kept in ``quarantine/``. The new index is first stored as a backup, so that a crash while the old
    one is removed loses nothing.

    Args:
        database: the index of the cache.
        folder: a new folder of a session, for the new index.
    """
    with os_errors("rebuild the index"), database.alone() as write_lock:
        if not find_faults(database):
            return []
        files, _ = layout.list_blob_files(database.directory)
        salvage, notes = _collect_salvage(database)
        with closing(Database(folder)) as new:
            upgrade.prepare(new)
            with new.write() as connection:
                notes += _write_index(connection, database.directory, files, salvage)
        backups.put_in_place(database, write_lock, new.path)
    return notes


def _collect_salvage(database: Database) -> tuple[Salvage, list[str]]:
    """Return the readable content of the index; if images are lost, add that of the newest usable backup."""
    found = _read_index(database)
    notes = []
    if exists(database.path):
        notes = [f"some {what} may be lost: not all of them could be read from the index" for what in found.losses]
    if found.has_all_images:
        return found, notes
    for path in backups.list_backups(database.directory):
        with closing(Database(database.directory, path)) as other:
            backup = _read_index(other)
        if backup.has_all_images:
            note = f"the unreadable part of the index is restored from the backup {path.name}"
            # An extra hold does no harm. The backup of an interrupted rebuild has the leases that were readable then.
            rows = {table: [*found.rows[table], *backup.rows[table]] for table in found.rows}
            return found._replace(images={**backup.images, **found.images}, rows=rows), [*notes, note]
    return found, [*notes, "part of the index is unreadable, and there is no usable backup"]


def _read_index(database: Database) -> Salvage:
    """Return the readable content of an index."""
    found = {name: read_rows(database, METADATA.tables[name]) for name in _TABLES}
    database.close()
    rows, has_all = found["images"]
    stored = {row["id"]: row for row in found["blobs"][0]}
    contents: dict[int, list[Descriptor]] = {}
    saved = {}
    for row in sorted(found["image_blobs"][0], key=lambda row: (str(row["image_id"]), _to_number(row["position"]))):
        with suppress(CacheError, KeyError):
            blob, media_type = stored[row["blob_id"]], check_media_type(row["media_type"], "a blob")
            if row["role"] not in ROLES or type(blob["size"]) is not int or blob["size"] < 0:
                continue  # the new index would refuse this row, and the whole image with it
            descriptor = Descriptor(parse_digest(blob["digest"]), blob["size"], media_type, row["role"])
            contents.setdefault(row["image_id"], []).append(descriptor)
    for row in rows:
        try:
            saved[Name.parse(Name(row["repository"], row["reference"]))] = save.SavedImage(
                parse_digest(stored[row["manifest_id"]]["digest"]),
                row["media_type"],
                datetime.fromisoformat(row["added_at"]),
                datetime.fromisoformat(row["last_used_at"]),
                row.get("some_platforms"),
                contents.get(row["id"], []),
                _parse_time(row.get("pinned_at")),
                _parse_time(row.get("expires_at")),
            )
        except (CacheError, KeyError, TypeError, ValueError):
            has_all = False  # this row is damaged
    # A damaged page may look empty without an error, so compare the number of rows.
    with suppress(CacheError), database.look() as connection:
        has_all = has_all and connection.execute(select(func.count()).select_from(IMAGES)).scalar_one() <= len(rows)
    database.close()
    losses = [what for name, what in _LOSSES.items() if not found[name][1]]
    return Salvage(saved, {name: found[name][0] for name in ("lasting_holds", "leases")}, has_all, losses)


def _parse_time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _to_number(value: object) -> int:
    return value if isinstance(value, int) else 0


def read_rows(database: Database, table: Table) -> tuple[list[dict[str, Any]], bool]:
    """Return the readable rows of a table, and whether these are all rows.

    After damage, the table is also read from its end.
    """
    here = _find_columns(database, table)
    # Read times as text, because a damaged time must not end the read.
    columns = [
        (type_coerce(column, Text) if isinstance(column.type, UtcTime) else column).label(name)
        for name, column in here.items()
    ]
    key = [column.name for column in table.primary_key]
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for order in ([here[name].asc() for name in key], [here[name].desc() for name in key]):
        with suppress(CacheError), database.look() as connection:
            result = connection.execute(select(*columns).order_by(*order)).mappings()
            while (row := result.fetchone()) is not None:
                found[tuple(row[name] for name in key)] = dict(row)
            return list(found.values()), True
    return list(found.values()), False


def _find_columns(database: Database, table: Table) -> dict[str, ColumnClause[Any]]:
    """Return the columns that a table has in an index, by their present names; its schema may be older."""
    with suppress(CacheError), database.look() as connection:
        for name in filter(None, (table.name, OLD_NAMES.get(table.name))):
            names = {row[1] for row in connection.exec_driver_sql(f"PRAGMA table_info({name})")}
            here = {
                known.name: column(there, known.type)
                for known in table.columns
                for there in names & {known.name, OLD_NAMES.get(known.name)}
            }
            if here:
                lightweight_table(name, *here.values())  # each column then names its table
                return here
    return dict(table.columns.items())


def _write_index(connection: Connection, directory: Path, files: dict[Digest, int], salvage: Salvage) -> Iterator[str]:
    """Write the new index; yield a line for each loss."""
    now, has_all = datetime.now(UTC), salvage.has_all_images
    if files:
        rows = [{"digest": digest, "size": size, "stored_at": now} for digest, size in files.items()]
        connection.execute(insert(BLOBS), rows)
    for name, image in salvage.images.items():
        try:
            with connection.begin_nested():
                if image.digest in files:
                    _check_manifest(directory, image.digest, files[image.digest])
                save.restore_image(connection, directory, name, image)
        except (CacheError, IntegrityError) as error:
            has_all = False
            reason = error.orig if isinstance(error, IntegrityError) else error
            yield f"{name} could not be restored: {reason}"
            continue
        if image.digest not in files:
            yield f"{name} has lost its manifest {image.digest}: import or pull it again"
    for table, rows in salvage.rows.items():
        insert_rows(connection, table, rows)
    if has_all:
        return
    for name in name_unnamed(connection, directory, files):
        yield f"the name of an image is lost; it is now {name}: give it a name with `cachedb tag`"


def insert_rows(connection: Connection, table: str, rows: list[dict[str, Any]]) -> None:
    """Insert rows into a table of the new index; skip rows that violate its constraints."""
    for row in rows:
        with suppress(IntegrityError), connection.begin_nested():
            # Times are text, as `read_rows` returns them.
            columns = {column: type_coerce(value, Text) for column, value in row.items() if column.endswith("_at")}
            connection.execute(insert(METADATA.tables[table]).values({**row, **columns}))


def name_unnamed(connection: Connection, directory: Path, files: dict[Digest, int]) -> list[Name]:
    """Name the manifests that have neither an image nor a parent; return the new names.

    Without a name, a collection would delete them.

    Args:
        connection: a connection in a write transaction.
        directory: the cache directory.
        files: the stored blobs to search, with their sizes in bytes.
    """
    now, names = datetime.now(UTC), []
    for digest, media_type in _find_unnamed(connection, directory, files):
        names.append(Name(RECOVERED, digest))
        part = save.find_present_part(connection, directory, root_descriptor(digest, files[digest], media_type))
        saved = save.SavedImage(digest, media_type, now, now, 1 if part else None, part or [])
        save.restore_image(connection, directory, names[-1], saved)
    return names


def _check_manifest(directory: Path, digest: Digest, size: int) -> None:
    """Raise if a blob is intact but is not a manifest, because then the row that references it is damaged.

    Raises:
        InvalidManifest: if the blob is not a manifest.
    """
    data = reader.read_small_blob(directory, digest, size)
    if data is not None:
        descriptors(data, manifest_media_type(data))
    elif size > DOCUMENT_LIMIT:
        raise InvalidManifest(f"{digest} is too large for a manifest")


def _find_unnamed(connection: Connection, directory: Path, files: dict[Digest, int]) -> list[tuple[Digest, str]]:
    """Return the manifests that belong to no image and are not a child of another such manifest."""
    used = set(
        connection.execute(select(BLOBS.c.digest).join(IMAGE_BLOBS, IMAGE_BLOBS.c.blob_id == BLOBS.c.id)).scalars()
    )
    found: dict[Digest, str] = {}
    children: set[Digest] = set()
    for digest, size in files.items():
        if digest in used:
            continue
        data = reader.read_small_blob(directory, digest, size)
        if data is None or not data.lstrip().startswith(b"{"):
            continue
        with suppress(InvalidManifest):
            media_type = manifest_media_type(data)
            children.update(child.digest for child in descriptors(data, media_type))
            found[digest] = media_type
    return [(digest, media_type) for digest, media_type in found.items() if digest not in children]
