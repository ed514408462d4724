"""Replace the index by a backup."""

from __future__ import annotations

from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, delete, func, select, update

from cachedb.content import save
from cachedb.content.session import Session
from cachedb.disk import layout, writer
from cachedb.disk.durable import copy_to_new
from cachedb.disk.existence import exists
from cachedb.disk.folders import FOLDERS, Folders
from cachedb.disk.layout import choose_directory
from cachedb.errors import (
    DamagedIndex,
    NotACache,
    NotInCache,
    SchemaMismatch,
    os_errors,
)
from cachedb.index import blobs, schema
from cachedb.index.drift import find_foreign_objects
from cachedb.index.images import count_incomplete
from cachedb.index.sqlite import backups
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.inspect import find_faults
from cachedb.index.sqlite.prepare import has_our_mark
from cachedb.index.sqlite.revision import APPLICATION_ID, is_compatible, is_ours, read_revision, schema_error
from cachedb.index.tables import BLOBS, HOLDS, IMAGE_BLOBS, IMAGES, LEASES, METADATA, REVISION, TRASH
from cachedb.oci.manifests import DOCUMENT_LIMIT
from cachedb.operations import upgrade
from cachedb.operations.rebuild import insert_rows, read_rows
from cachedb.text import truncate

__all__ = ["Restored", "restore"]


def restore(directory: Path, file: Path) -> Restored:
    """Replace the index by a backup, upgrade its schema, and make it match the blobs on disk.

    This takes the write lock only after it has copied, migrated and checked the backup. Blobs that were stored after
    the backup stay. They belong to no image, unless an image in the backup uses them. The current holds and leases
    stay.

    Args:
        directory: the cache directory; its index may be lost or damaged.
        file: the backup.

    Raises:
        NotACache: if the directory is not a cache, or the file is not a backup or was changed by another program.
        NotInCache: if there is no such file.
        NotOurs: if the folder ``blobs`` leads out of the cache.
        DamagedIndex: if the backup is damaged.
        SchemaMismatch: if the schema of the backup, or of the current index, is too new for this release.
        StorageError: if the backup cannot be read, or the cache cannot be written.
        Busy: if another process holds the write lock for too long.
    """
    with closing(Database(choose_directory(directory))) as database:
        return _restore(database, file)


def _restore(database: Database, file: Path) -> Restored:
    if not is_ours(database.directory) and not has_our_mark(database):
        raise NotACache(
            f"{str(database.directory)!r} is not a cache: restore the backup into the cache that it comes from"
        )
    with os_errors("mark the cache"):
        database.folders.mark(new=True, is_sound=False)
        with database.folders.open("blobs"):
            pass  # raises if it is a link, whose files the restored index would take for blobs
    with os_errors("read the backup"):
        if not file.is_file():
            raise NotInCache(f"there is no backup {str(file)!r}: name a file in the folder backups/ of the cache")
        if exists(database.path) and file.samefile(database.path):
            raise NotACache(f"{str(file)!r} is the index itself: name a backup")
    session = Session(database)
    try:
        with closing(Database(session.new_folder())) as new:
            _copy_backup(new, file)
            with os_errors("restore the index"), database.alone() as write_lock:
                _refuse_newer(database)
                with new.write() as connection:
                    restored = _match_cache(connection, database)
                new.close()
                restored = restored._replace(old=backups.put_in_place(database, write_lock, new.path))
        with suppress(SchemaMismatch):  # another process has changed the schema meanwhile
            restored = restored._replace(unread=upgrade.backfill(database))
        return restored
    finally:
        session.close()


class Restored(NamedTuple):
    """The result of a restore."""

    images: int
    incomplete: int  # images with a missing blob
    unused: int  # stored blobs that no image uses, such as those newer than the backup
    old: Path | None  # a copy of the replaced index, if there was one
    unread: list[upgrade.Unread]  # configs that the backfill of an older backup could not read


def _copy_backup(new: Database, file: Path) -> None:
    """Copy a backup to a new index, check it, and migrate it to the newest schema."""
    with os_errors("copy the backup"):
        folders = Folders(new.directory)
        folders.mark(new=True)
        for folder in FOLDERS:
            folders.make(folder)
        with file.open("rb") as backup:
            copy_to_new(backup, new.path.name, folders.root)
        # A plain file copy of an index in use may have a WAL beside it; copy the WAL too.
        with suppress(FileNotFoundError), open(f"{file}-wal", "rb") as wal:
            copy_to_new(wal, f"{new.path.name}-wal", folders.root)
    try:
        with new.raw() as connection:
            (mark,) = connection.execute("PRAGMA application_id").fetchone()
        if mark != APPLICATION_ID:
            raise NotACache(f"{str(file)!r} is not a backup of an index: name another file")
        _refuse_foreign_objects(new, file)  # before a migration can run a trigger
        schema.migrate(new)
        faults = find_faults(new)
    except DamagedIndex as error:
        faults = [str(error.__cause__ or "it has lost its schema")]
    except SchemaMismatch as error:
        raise SchemaMismatch(f"{str(file)!r} is for newer releases: use a newer release of cachedb") from error
    if faults:
        raise DamagedIndex(f"{str(file)!r} is damaged, and was not restored: {faults[0]}")


def _refuse_foreign_objects(new: Database, file: Path) -> None:
    """Raise if a backup's tables, views, indexes or triggers differ from what the migrations create.

    For a newer schema only triggers are checked, because they could change what cachedb writes.
    """
    with new.look() as connection:
        foreign = find_foreign_objects(connection) if read_revision(connection) else []
    if foreign:
        found = ", ".join(f"{kind} {name!r}: {detail}" for kind, name, detail in foreign)
        can_drop = {schema.UNKNOWN} == {drift.detail for drift in foreign}
        advice = (
            "drop these objects from a copy of the backup and restore that copy"
            if can_drop
            else "restore another backup"
        )
        raise NotACache(
            f"{str(file)!r} was changed by another program, and was not restored: {truncate(found, 300)}: {advice}"
        )


def _refuse_newer(database: Database) -> None:
    """Raise if the current index has a newer schema that this release cannot use."""
    with suppress(DamagedIndex), database.look() as connection:
        revision = read_revision(connection) or ""
        if revision > REVISION and not is_compatible(connection):
            raise schema_error(database.directory, revision)


def _match_cache(connection: Connection, database: Database) -> Restored:
    """Make a restored index match the blobs on disk and the current holds and leases; return the counts."""
    directory = database.directory
    files, _ = layout.list_blob_files(directory)
    rows = blobs.read_all_stored_sizes(connection)
    missing = [{"missing": digest} for digest, size in rows.items() if files.get(digest) != size]
    if missing:
        connection.execute(update(BLOBS).where(BLOBS.c.digest == bindparam("missing")).values(stored_at=None), missing)
    new = [writer.Received(digest, size, None) for digest, size in files.items() if rows.get(digest) != size]
    blobs.set_stored(connection, new)
    save.associate_waiting(connection, directory, [blob.digest for blob in new if blob.size <= DOCUMENT_LIMIT])
    # The backup lists files to delete; those still in `blobs/` are now stored blobs again.
    connection.execute(delete(TRASH))
    connection.execute(delete(LEASES))
    connection.execute(delete(HOLDS))
    for name in ("lasting_holds", "leases"):
        found, _ = read_rows(database, METADATA.tables[name])
        insert_rows(connection, name, found)
    database.close()
    used = select(IMAGE_BLOBS.c.blob_id).where(IMAGE_BLOBS.c.blob_id == BLOBS.c.id).exists()
    unused = select(func.count()).select_from(BLOBS).where(BLOBS.c.stored_at.is_not(None), ~used)
    return Restored(
        images=connection.execute(select(func.count()).select_from(IMAGES)).scalar_one(),
        incomplete=count_incomplete(connection),
        unused=connection.execute(unused).scalar_one(),
        old=None,
        unread=[],
    )
