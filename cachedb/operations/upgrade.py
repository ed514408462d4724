"""Change the schema of a cache: prepare, upgrade, downgrade, back up, backfill."""

from __future__ import annotations

from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection, delete, select, update
from sqlalchemy.exc import IntegrityError

from cachedb.arguments import check_functions
from cachedb.content import describe
from cachedb.disk import single_flight
from cachedb.disk.existence import exists
from cachedb.disk.layout import is_inside
from cachedb.errors import (
    CacheError,
    StorageError,
    mark_callers_errors,
    os_errors,
)
from cachedb.index import descriptions
from cachedb.index.schema import (
    BACKFILLS_OF_THIS_RELEASE,
    Progress,
    check_existing,
    find_change,
    migrate,
    pending_backfills,
    report_stage,
)
from cachedb.index.sqlite import backups
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.prepare import prepare as prepare_directory
from cachedb.index.sqlite.revision import schema_error
from cachedb.index.tables import BACKFILLS, IMAGES, REVISION
from cachedb.oci.digests import Digest
from cachedb.oci.names import Name

__all__ = ["Change", "Unread", "back_up", "backfill", "downgrade", "prepare", "upgrade"]


# A batch holds the write lock for a few hundredths of a second.
_BATCH = 50  # images
_BATCH_BYTES = 1024 * 1024  # bytes of configs and indexes


class Unread(NamedTuple):
    """A config or index that the backfill could not read."""

    name: Name  # of the image
    digest: Digest  # of the config or index
    detail: str


class Change(NamedTuple):
    """The result of an upgrade or a downgrade."""

    before: str | None
    after: str
    backup: Path | None  # of the old index; None if nothing was changed
    unread: list[Unread]


def prepare(database: Database, *, create: bool = True, upgrade: bool = False) -> None:
    """Prepare a cache directory: create what is missing, with the newest schema.

    Args:
        database: the index of the directory.
        create: create a cache if there is none.
        upgrade: upgrade an older schema.

    Raises:
        NotACache: if the directory is not a cache and cannot become one.
        NotInCache: if there is no cache, and ``create`` is false.
        DamagedIndex: if it has blobs, but no index or a damaged one.
        SchemaMismatch: if the schema is too new for this release, or older and ``upgrade`` is false.
    """
    revision = prepare_directory(database, create=create)
    if revision == REVISION:
        if upgrade and not database.read_only:
            backfill(database)
        return
    if revision is not None and revision > REVISION:
        with database.read():  # raises if the schema is too new
            return
    if revision is not None and not upgrade:
        raise schema_error(database.directory, revision)

    def find() -> str | None:
        found = database.revision()
        return found if found == REVISION else None

    # One process migrates; the others wait here and not at the write lock, so they delay no writer.
    with single_flight.claim_or_find(database.directory, "schema", find, seconds=database.wait_seconds) as found:
        if found is None:
            migrate(database)
    if upgrade:
        backfill(database)


def upgrade(directory: Path, revision: str = "head", *, progress: Progress | None = None) -> Change:
    """Upgrade a cache to a newer schema; other processes may keep using it.

    The index is backed up first. All migrations are one transaction. Then a backfill reads the configs of existing
    images in batches. An interrupted backfill is continued by the next upgrade.

    Args:
        directory: the directory of an existing cache.
        revision: the new schema; ``head`` is the newest, and ``+1`` the one after the current schema.
        progress: called with the stage, the amount done and the total.

    Raises:
        NotInCache: if there is no cache.
        InvalidRevision: if there is no such revision.
        SchemaMismatch: if the cache has a newer schema.
        StorageError: if the disk is too full, before anything is changed.
    """
    check_functions(progress=progress)
    progress = progress and mark_callers_errors(progress)
    with closing(check_existing(directory)) as database:
        target = find_change(database, revision, is_downgrade=False).after
        before, backup = migrate(database, target, progress)
        return Change(before, target, backup, backfill(database, progress) if target == REVISION else [])


def downgrade(directory: Path, revision: str, *, progress: Progress | None = None) -> Change:
    """Downgrade a cache to the schema of an older release; this release refuses the cache afterwards.

    Args:
        directory: the cache directory.
        revision: the new schema; ``-1`` is the one before the current schema.
        progress: called with the stage, the amount done and the total.

    Raises:
        NotInCache: if there is no cache.
        InvalidRevision: if there is no such revision.
        SchemaMismatch: if the cache has an older schema, or one that this release does not know.
        StorageError: if the disk is too full, before anything is changed.
    """
    check_functions(progress=progress)
    progress = progress and mark_callers_errors(progress)
    with closing(check_existing(directory)) as database:
        target = find_change(database, revision, is_downgrade=True).after
        before, backup = migrate(database, target, progress, down=True)
        return Change(before, target, backup, [])


def back_up(directory: Path, file: Path | None = None, *, progress: Progress | None = None) -> Path:
    """Back up the index as of one moment; other processes may keep writing.

    Args:
        directory: the cache directory.
        file: the new file; the default is one in ``backups/``, which is never deleted automatically.
        progress: called with the stage, the bytes done and the total.

    Returns:
        The path of the backup.

    Raises:
        NotInCache: if there is no cache.
        CacheError: if the file exists, its folder does not, or it is inside the cache but not in ``backups/``.
        StorageError: if the file cannot be written.
    """
    check_functions(progress=progress)
    progress = progress and mark_callers_errors(progress)
    with closing(check_existing(directory)) as database:
        if file is not None:
            file = file.absolute()
            _check_place(database.directory, file)
        revision = str(database.revision())
        return backups.back_up(database, revision, path=file, progress=report_stage("backing up", progress))


def _check_place(directory: Path, file: Path) -> None:
    with os_errors("make a backup of the index"):
        with suppress(FileNotFoundError):
            file.lstat()
            raise CacheError(f"{str(file)!r} already exists: name another file")
        if not exists(file.parent):
            raise CacheError(f"there is no folder for {str(file)!r}: make {str(file.parent)!r} first")
        if is_inside(directory, file.parent) and not file.parent.samefile(directory / "backups"):
            raise CacheError(f"{str(file)!r} is inside the cache: name a file elsewhere, or in its folder backups/")


def backfill(database: Database, progress: Progress | None = None) -> list[Unread]:
    """Run the pending backfill; return the configs that could not be read."""
    try:
        return _read_configs(database, progress)
    except IntegrityError as error:
        raise StorageError(
            f"the schema is {REVISION}, but the backfill stopped because SQLite refused a row: {error.orig}: "
            "continue it with `cachedb db upgrade`"
        ) from error


def _read_configs(database: Database, progress: Progress | None) -> list[Unread]:
    """Backfill images from their configs and indexes in batches, starting where the last backfill stopped.

    The documents are read without the write lock. Under the lock, each image is looked up again.
    """
    unread: list[Unread] = []
    with database.read() as connection:
        total = pending_backfills(connection)
    done, finished = 0, False
    while not finished:
        with database.read() as connection:
            begin = descriptions.read_backfill(connection)
            if begin is None:
                break  # another process may have finished it
            last, documents = _select_batch(connection, begin)
        known = describe.read_documents(database.directory, documents)
        with database.write() as connection:
            if descriptions.read_backfill(connection) != begin:
                continue  # another process has done this batch
            query = select(IMAGES.c.id, IMAGES.c.repository, IMAGES.c.reference).where(
                IMAGES.c.id > begin, IMAGES.c.id <= last
            )
            rows = connection.execute(query.order_by(IMAGES.c.id)).all()
            for image_id, repository, reference in rows:
                for digest, detail in describe.describe(connection, database.directory, image_id, known):
                    unread.append(Unread(Name(repository, reference), digest, detail))
            connection.execute(update(BACKFILLS).where(BACKFILLS_OF_THIS_RELEASE).values(image_id=last))
            finished = last == begin and not pending_backfills(connection)
            if finished:
                connection.execute(delete(BACKFILLS).where(BACKFILLS_OF_THIS_RELEASE))
        done += len(rows)
        if progress:
            progress("reading configs", done, max(done, total))
    return unread


def _select_batch(connection: Connection, begin: int) -> tuple[int, list[descriptions.Association]]:
    """Return the last image id of the next batch, or ``begin``, and its configs and indexes."""
    query = select(IMAGES.c.id).where(IMAGES.c.id > begin).order_by(IMAGES.c.id).limit(_BATCH)
    last, documents, size = begin, dict[Digest, descriptions.Association](), 0
    for image_id in connection.execute(query).scalars().all():
        found = {blob.digest: blob for blob in describe.find_stored_documents(connection, image_id)}
        size += sum(blob.size for blob in found.values())
        if size > _BATCH_BYTES and last > begin:
            break
        last = image_id
        documents.update(found)
    return last, list(documents.values())
