"""A lost or damaged index, made anew: from what can still be read of it, the newest backup, and the blobs.

The blobs are what an index is about, and their manifests say what each image needs. What no blob says is the
names; those come from the damaged index itself, as far as it can be read, else from the newest backup.
An image whose name is in neither is kept under a name by its digest, in the repository ``recovered``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Column, Connection, Table, Text, bindparam, delete, func, insert, select, type_coerce, update
from sqlalchemy.exc import IntegrityError

from cachedb.content import publish, save
from cachedb.content.session import Session
from cachedb.disk import reader
from cachedb.disk.folders import FOLDERS, Folders
from cachedb.disk.layout import chosen
from cachedb.errors import (
    CacheError,
    DamagedIndex,
    InvalidManifest,
    NotACache,
    NotInCache,
    SchemaMismatch,
    os_errors,
)
from cachedb.index import schema
from cachedb.index.sqlite import backups
from cachedb.index.sqlite.database import APPLICATION_ID, Database, is_compatible, is_ours, mismatch, read_revision
from cachedb.index.tables import BLOBS, HOLDS, IMAGE_BLOBS, IMAGES, LEASES, METADATA, REVISION, TRASH, UtcTime
from cachedb.oci.manifests import DOCUMENT_LIMIT, ROLES, Descriptor, check_media_type, descriptors, manifest_media_type
from cachedb.oci.names import Digest, Name, parse_digest
from cachedb.text import cut

__all__ = ["Restored", "name_unnamed", "rebuild", "restore"]


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
    with os_errors("rebuild the index"), database.alone():
        if not database.faults():
            return []
        files, _ = publish.on_disk(database.directory)
        salvage, notes = _salvage(database)
        with closing(Database(folder)) as new:
            schema.prepare(new)
            with new.write() as connection:
                notes += _fill(connection, database.directory, files, salvage)
        backups.put_in_place(database, new.path)
    return notes


def restore(directory: Path, file: Path) -> Restored:
    """Put a backup in the place of the index, at the newest schema, and have it agree with the blobs there are now.

    The write lock is held from the moment the backup has been copied. What has come since the backup was made, and
    belongs to no image in it, are blobs that no image uses. Holds and the leases of live processes stay.

    Args:
        directory: of the cache; its index may be lost or damaged.
        file: the backup.

    Raises:
        NotACache: if the directory, or the file, is something else.
        DamagedIndex: if the backup is damaged.
        SchemaMismatch: if it has a schema that is too new for this release.
        StorageError: if it cannot be read, or nothing can be written.
    """
    database = Database(chosen(directory))
    if not is_ours(database.directory) and not database.has_our_mark():
        raise NotACache(f"{str(directory)!r} is not a cache: restore a backup into the directory it was made of")
    with os_errors("mark the cache"):
        database.folders.mark(new=True, is_sound=False)
    with os_errors("read the backup"):
        if not file.is_file():
            raise NotInCache(f"there is no backup {str(file)!r}; `ls` the folder `backups` of the cache")
        if database.path.exists() and file.samefile(database.path):
            raise NotACache(f"{str(file)!r} is the index itself: name a backup")
    session = Session(database)
    try:
        with closing(Database(session.new_path())) as new:
            _take(new, file)
            with os_errors("restore the index"), database.alone():
                _refuse_newer(database)
                with new.write() as connection:
                    restored = _agree(connection, database)
                new.close()
                restored = restored._replace(old=backups.put_in_place(database, new.path))
        with suppress(SchemaMismatch):  # another process has taken it to another schema since
            restored = restored._replace(unread=schema.backfill(database))
        return restored
    finally:
        session.close()
        database.close()


class Restored(NamedTuple):
    """What a backup brought back."""

    images: int
    incomplete: int  # images of which a blob is gone
    unused: int  # blobs that no image uses: they came after the backup
    old: Path | None  # where a copy of the index is that was there before
    unread: list[schema.Unread]  # configs that could not be read, of a backup that had an older schema


def _take(new: Database, file: Path) -> None:
    """Copy a backup, whatever else its folder has; check that it is one, and bring it to the newest schema."""
    with os_errors("copy the backup"):
        new.directory.mkdir(mode=0o700)
        folders = Folders(new.directory)
        folders.mark(new=True)
        for folder in FOLDERS:
            folders.make(folder)
        shutil.copyfile(file, new.path)
        new.path.chmod(0o600)
        with suppress(FileNotFoundError):  # of a copy that was made while it was in use
            shutil.copyfile(f"{file}-wal", f"{new.path}-wal")
    try:
        with new.raw() as connection:
            (mark,) = connection.execute("PRAGMA application_id").fetchone()
        if mark != APPLICATION_ID:
            raise NotACache(f"{str(file)!r} is no backup of a cache's index")
        _refuse_foreign(new, file)  # before a trigger can take part in a migration
        schema.migrate(new)
        faults = new.faults()
    except DamagedIndex as error:
        faults = [str(error.__cause__ or "it has lost its schema")]
    except SchemaMismatch as error:
        raise SchemaMismatch(f"{str(file)!r} is for newer releases: use a newer release of cachedb") from error
    if faults:
        raise DamagedIndex(f"{str(file)!r} is damaged, and was not restored: {faults[0]}")


def _refuse_foreign(new: Database, file: Path) -> None:
    """Refuse a backup with a trigger, view, table or index that no migration makes.

    A trigger would change what cachedb writes from then on.
    """
    with new.look() as connection:
        foreign = schema.foreign_objects(connection) if read_revision(connection) else []
    if foreign:
        found = ", ".join(f"{kind} {name!r}: {detail}" for kind, name, detail in foreign)
        advice = "drop it from a copy of the backup" if {schema.UNKNOWN} == {drift.detail for drift in foreign} else ""
        raise NotACache(
            f"{str(file)!r} was changed by another program, and was not restored: {cut(found, 300)}: "
            + (advice or "restore another backup")
        )


def _refuse_newer(database: Database) -> None:
    """An index that a newer release has taken over is for newer releases to replace."""
    with suppress(DamagedIndex), database.look() as connection:
        revision = read_revision(connection) or ""
        if revision > REVISION and not is_compatible(connection):
            raise mismatch(database.directory, revision)


def _agree(connection: Connection, database: Database) -> Restored:
    """Have a restored index say what is on disk."""
    directory = database.directory
    files, _ = publish.on_disk(directory)
    rows = {
        Digest(digest): size
        for digest, size in connection.execute(
            select(BLOBS.c.digest, BLOBS.c.size).where(BLOBS.c.stored_at.is_not(None))
        )
    }
    gone = [{"gone": digest} for digest, size in rows.items() if files.get(digest) != size]
    if gone:
        connection.execute(update(BLOBS).where(BLOBS.c.digest == bindparam("gone")).values(stored_at=None), gone)
    come = [publish.Received(digest, size, None) for digest, size in files.items() if rows.get(digest) != size]
    publish.set_stored(connection, come)
    save.associate_waiting(connection, directory, [blob.digest for blob in come if blob.size <= DOCUMENT_LIMIT])
    connection.execute(delete(TRASH))  # what was on its way there is a blob again
    connection.execute(delete(LEASES))
    connection.execute(delete(HOLDS))
    for name in ("holds", "leases"):
        found, _ = _rows(database, METADATA.tables[name])
        _insert(connection, name, found)
    database.close()
    used = select(IMAGE_BLOBS.c.blob_id).where(IMAGE_BLOBS.c.blob_id == BLOBS.c.id).exists()
    unused = select(func.count()).select_from(BLOBS).where(BLOBS.c.stored_at.is_not(None), ~used)
    return Restored(
        images=connection.execute(select(func.count()).select_from(IMAGES)).scalar_one(),
        incomplete=save.count_incomplete(connection),
        unused=connection.execute(unused).scalar_one(),
        old=None,
        unread=[],
    )


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
    found = {name: _rows(database, METADATA.tables[name]) for name in _TABLES}
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


def _rows(database: Database, table: Table) -> tuple[list[dict[str, Any]], bool]:
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
        _insert(connection, table, rows)
    if whole:
        return
    for name in name_unnamed(connection, directory, files):
        yield f"the name of an image could not be restored: it is {name} now; `cachedb tag` gives it another"


def _insert(connection: Connection, table: str, rows: list[dict[str, Any]]) -> None:
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
