"""Put a backup in the place of the index."""

from __future__ import annotations

from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, delete, func, select, update

from cachedb.content import save
from cachedb.content.session import Session
from cachedb.disk import layout, writer
from cachedb.disk.durable import copy_to_new
from cachedb.disk.folders import FOLDERS, Folders
from cachedb.disk.layout import chosen
from cachedb.errors import (
    DamagedIndex,
    NotACache,
    NotInCache,
    SchemaMismatch,
    os_errors,
)
from cachedb.index import blobs, schema
from cachedb.index.drift import foreign_objects
from cachedb.index.images import count_incomplete
from cachedb.index.sqlite import backups
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.inspect import find_faults
from cachedb.index.sqlite.prepare import has_our_mark
from cachedb.index.sqlite.revision import APPLICATION_ID, is_compatible, is_ours, mismatch, read_revision
from cachedb.index.tables import BLOBS, HOLDS, IMAGE_BLOBS, IMAGES, LEASES, METADATA, REVISION, TRASH
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import DOCUMENT_LIMIT
from cachedb.operations import upgrade
from cachedb.operations.rebuild import insert_rows, read_rows
from cachedb.text import cut

__all__ = ["Restored", "restore"]


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
    if not is_ours(database.directory) and not has_our_mark(database):
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
        with closing(Database(session.new_folder())) as new:
            _take(new, file)
            with os_errors("restore the index"), database.alone() as turn:
                _refuse_newer(database)
                with new.write() as connection:
                    restored = _agree(connection, database)
                new.close()
                restored = restored._replace(old=backups.put_in_place(database, turn, new.path))
        with suppress(SchemaMismatch):  # another process has taken it to another schema since
            restored = restored._replace(unread=upgrade.backfill(database))
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
    unread: list[upgrade.Unread]  # configs that could not be read, of a backup that had an older schema


def _take(new: Database, file: Path) -> None:
    """Copy a backup, whatever else its folder has; check that it is one, and bring it to the newest schema."""
    with os_errors("copy the backup"):
        folders = Folders(new.directory)
        folders.mark(new=True)
        for folder in FOLDERS:
            folders.make(folder)
        with file.open("rb") as backup:
            copy_to_new(backup, new.path.name, folders.root)
        # Beside a copy that was made while it was in use lies its WAL.
        with suppress(FileNotFoundError), open(f"{file}-wal", "rb") as wal:
            copy_to_new(wal, f"{new.path.name}-wal", folders.root)
    try:
        with new.raw() as connection:
            (mark,) = connection.execute("PRAGMA application_id").fetchone()
        if mark != APPLICATION_ID:
            raise NotACache(f"{str(file)!r} is no backup of a cache's index")
        _refuse_foreign(new, file)  # before a trigger can take part in a migration
        schema.migrate(new)
        faults = find_faults(new)
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
        foreign = foreign_objects(connection) if read_revision(connection) else []
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
    files, _ = layout.on_disk(directory)
    rows = {
        Digest(digest): size
        for digest, size in connection.execute(
            select(BLOBS.c.digest, BLOBS.c.size).where(BLOBS.c.stored_at.is_not(None))
        )
    }
    gone = [{"gone": digest} for digest, size in rows.items() if files.get(digest) != size]
    if gone:
        connection.execute(update(BLOBS).where(BLOBS.c.digest == bindparam("gone")).values(stored_at=None), gone)
    come = [writer.Received(digest, size, None) for digest, size in files.items() if rows.get(digest) != size]
    blobs.set_stored(connection, come)
    save.associate_waiting(connection, directory, [blob.digest for blob in come if blob.size <= DOCUMENT_LIMIT])
    connection.execute(delete(TRASH))  # what was on its way there is a blob again
    connection.execute(delete(LEASES))
    connection.execute(delete(HOLDS))
    for name in ("holds", "leases"):
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
