"""Collect garbage: remove unreferenced blobs from the index, then from ``blobs/``, then from the disk.

The first transaction deletes a blob's row and notes the blob in the table ``trash``. The second checks that no process
has stored the blob again, and renames its file into ``trash/``. Then the file is unlinked. A crash at any point leaves
work that `recover` can finish, and never a stored row without its file.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from typing import Any, NamedTuple

from sqlalchemy import (
    CompoundSelect,
    Connection,
    Delete,
    Insert,
    Select,
    bindparam,
    delete,
    except_,
    func,
    insert,
    select,
)
from sqlalchemy.sql.dml import ReturningDelete

from cachedb.content.publish import retract
from cachedb.content.session import list_sessions_with_locks, lock_dead_sessions, remove_folder
from cachedb.disk import downloads, single_flight
from cachedb.disk.failures import sweep_failures
from cachedb.disk.folders import Folders, Leftover, rename_over, set_aside
from cachedb.disk.layout import blob_path, trash_digest, trash_name
from cachedb.disk.listing import list_names
from cachedb.disk.reserve import NO_ROOM_ERRNOS
from cachedb.disk.waiting import LOG
from cachedb.errors import Busy, CacheError, StorageError, explain, is_callers, os_errors
from cachedb.index import holds
from cachedb.index.blobs import read_stored_sizes
from cachedb.index.sqlite.batches import BATCH, are_among, split_batches
from cachedb.index.sqlite.database import Database
from cachedb.index.tables import BLOBS, IMAGE_BLOBS, LEASES, TRASH
from cachedb.oci.digests import Digest, is_digest, split_digest
from cachedb.oci.names import Name
from cachedb.threads import ThreadGroup

__all__ = [
    "Collected",
    "Removed",
    "collect",
    "collect_all",
    "delete_unreferenced",
    "empty_trash",
    "recover",
    "recover_without_waiting",
    "sum_freed",
    "sum_unreferenced",
]


_SMALL_BATCH_BLOBS = 16  # blobs to collect at a time on a full disk
_LARGE_BATCH_BLOBS = 250  # blobs; a larger batch holds the write lock for too long
_FEW_FILES = 64  # for so few files, starting threads takes longer than unlinking
_RECOVERY_SECONDS = 1.0  # the longest recovery when a cache is opened
_UNLINK_THREADS = 2
_RENAME_SECONDS = 0.03  # the longest time to rename files under one write lock


class Collected(NamedTuple):
    """The number of collected blobs, or of blobs that a collection would free, and their bytes."""

    blobs: int
    bytes: int


class Removed(Collected):
    """The images that were removed, or would be removed, and what that freed."""

    images: list[Name]

    def __new__(cls, freed: Collected, images: list[Name]) -> Removed:  # noqa: D102
        removed = super().__new__(cls, *freed)
        removed.images = images
        return removed


# No session has a lease on the blob.
_UNLEASED = ~select(LEASES.c.digest).where(LEASES.c.digest == BLOBS.c.digest).exists()

# No image is associated with the blob, and no session has a lease on it.
_UNREFERENCED = (
    ~select(IMAGE_BLOBS.c.blob_id).where(IMAGE_BLOBS.c.blob_id == BLOBS.c.id).exists(),
    _UNLEASED,
)


# Building a statement takes longer than executing it, so each is built once.


@cache
def _build_unreferenced_delete() -> ReturningDelete[*tuple[Any, ...]]:
    these = BLOBS.c.id.in_(bindparam("ids", expanding=True))
    return delete(BLOBS).where(*_UNREFERENCED, these).returning(BLOBS.c.digest, BLOBS.c.size, BLOBS.c.stored_at)


@cache
def _build_trash_insert() -> Insert:
    return insert(TRASH)


@cache
def _select_trash() -> Select[*tuple[Any, ...]]:
    digest = TRASH.c.digest
    return select(digest).where(digest > bindparam("after")).order_by(digest).limit(bindparam("most"))


@cache
def _select_candidates() -> CompoundSelect[int]:
    # The same condition as `_UNREFERENCED`, for all blobs at once. Both indexes are ordered by id, so SQLite reads
    # each of them once from end to end, without look-ups.
    used = select(IMAGE_BLOBS.c.blob_id)
    leased = select(BLOBS.c.id).where(BLOBS.c.digest.in_(select(LEASES.c.digest)))
    return except_(select(BLOBS.c.id), used, leased).order_by("id")


@cache
def _build_trash_delete() -> Delete:
    return delete(TRASH).where(TRASH.c.digest.in_(bindparam("digests", expanding=True)))


def sum_unreferenced(connection: Connection) -> Collected:
    """Return how many blobs and bytes a full collection would free now."""
    unreferenced = _select_candidates().subquery()
    totals = (
        select(func.count(), func.coalesce(func.sum(BLOBS.c.size), 0))
        .select_from(unreferenced.join(BLOBS, BLOBS.c.id == unreferenced.c.id))
        .where(BLOBS.c.stored_at.is_not(None))
    )
    return Collected(*connection.execute(totals).one())


def sum_freed(connection: Connection, image_ids: Iterable[int]) -> Collected:
    """Return how many blobs and bytes the removal of images would free now."""
    removed = are_among(IMAGE_BLOBS.c.image_id, list(image_ids))
    theirs = select(IMAGE_BLOBS.c.blob_id).where(removed)
    others = select(IMAGE_BLOBS.c.blob_id).where(IMAGE_BLOBS.c.blob_id == BLOBS.c.id, ~removed)
    totals = select(func.count(), func.coalesce(func.sum(BLOBS.c.size), 0)).where(
        BLOBS.c.id.in_(theirs), ~others.exists(), _UNLEASED, BLOBS.c.stored_at.is_not(None)
    )
    return Collected(*connection.execute(totals).one())


def delete_unreferenced(connection: Connection, blob_ids: Iterable[int]) -> Collected:
    """Delete the rows of the blobs that nothing references, and note their files for the trash."""
    blobs = size = 0
    for part in split_batches(sorted(blob_ids)):
        rows = connection.execute(_build_unreferenced_delete(), {"ids": part}).all()
        files = [row for row in rows if row.stored_at is not None and is_digest(row.digest)]
        if files:
            connection.execute(_build_trash_delete(), {"digests": [row.digest for row in files]})
            connection.execute(_build_trash_insert(), [{"digest": row.digest, "size": row.size} for row in files])
        blobs += len(files)
        size += sum(row.size for row in files)
    return Collected(blobs, size)


def collect(database: Database, *, batch: int = _LARGE_BATCH_BLOBS) -> Iterator[Collected]:
    """Remove all unreferenced blobs from the index and the disk in batches; yield each batch's total.

    The candidates are found without the write lock. Under the lock, each is checked again with the same condition.

    Args:
        database: of the cache.
        batch: the largest number of blobs in a batch.

    Raises:
        StorageError: at the end, if a file cannot be unlinked.
    """
    recover(database)
    downloads.remove_stale_downloads(database.folders)
    with database.read() as connection:
        candidates = connection.execute(_select_candidates()).scalars().all()
    left: list[Leftover] = []
    with _unlinking(database.folders, left) as unlink:
        for blob_ids in split_batches(candidates, batch):
            with database.write() as connection:
                part = delete_unreferenced(connection, blob_ids)
            yield part
            _move_out(database)
            unlink()  # in each round, so that a large collection frees space from the start
        unlink()
    left += _move_out(database)
    if left:
        path, reason = left[0]
        raise StorageError(f"collected all garbage, but cannot unlink {str(path)!r}: {reason}")


def collect_all(database: Database) -> Collected:
    """Remove all unreferenced blobs; return the total. On a full disk, remove them in small batches.

    Raises:
        StorageError: at the end, if a file cannot be unlinked.
    """
    freed: list[Collected] = []
    database.reserve.run(
        lambda: freed.extend(collect(database)),
        lambda: freed.extend(collect(database, batch=_SMALL_BATCH_BLOBS)),
    )
    return Collected(sum(part.blobs for part in freed), sum(part.bytes for part in freed))


def empty_trash(database: Database) -> list[Leftover]:
    """Move the files of deleted rows to ``trash/`` and unlink them; return those that stay."""
    immovable = _move_out(database)
    left: list[Leftover] = []
    with _unlinking(database.folders, left) as unlink:
        unlink()
    return immovable + left


def _move_out(database: Database) -> list[Leftover]:
    """Rename the files of deleted rows into ``trash/``; return those that cannot be renamed.

    The row of such a file stays in the table ``trash``, so the next call tries again.
    """
    left: list[Leftover] = []
    after = ""  # the last digest that was tried
    while database.rows(_select_trash(), {"after": after, "most": 1}):
        with database.write() as connection:
            start_time = time.monotonic()
            found = connection.execute(_select_trash(), {"after": after, "most": BATCH}).scalars()
            digests = [Digest(row) for row in found]
            stored_again = read_stored_sizes(connection, digests)
            done = []
            with ExitStack() as opened:
                trash = opened.enter_context(database.folders.open("trash"))
                sources: dict[str, int] = {}
                for digest in digests:
                    after = digest
                    done.append(digest)
                    # A forged index may have a path here that leads out of the cache.
                    if digest in stored_again or not is_digest(digest):
                        continue
                    algorithm, name = split_digest(digest)
                    if algorithm not in sources:
                        sources[algorithm] = opened.enter_context(database.folders.open(f"blobs/{algorithm}"))
                    try:
                        with suppress(FileNotFoundError):  # a process renamed it, then crashed before its commit
                            _move(name, sources[algorithm], trash_name(digest), trash)
                    except OSError as error:  # it may be immutable, or belong to another user in a sticky folder
                        if error.errno in NO_ROOM_ERRNOS or is_callers(error):
                            raise
                        done.pop()
                        left.append(Leftover(blob_path(database.directory, digest), explain(error)))
                    if time.monotonic() - start_time > _RENAME_SECONDS:
                        break
                for folder in sources.values():
                    os.fsync(folder)
            connection.execute(_build_trash_delete(), {"digests": done})
        if not digests or (after == digests[-1] and len(digests) < BATCH):
            break
    return left


def _move(name: str, folder: int, new_name: str, trash: int) -> None:
    """Rename a file into ``trash/``; unlink it if the disk is too full for a rename, as btrfs can be."""
    try:
        rename_over(name, folder, new_name, trash)
    except OSError as error:
        if error.errno not in NO_ROOM_ERRNOS:
            raise
        os.unlink(name, dir_fd=folder)


@contextmanager
def _unlinking(folders: Folders, left: list[Leftover]) -> Iterator[Callable[[], None]]:
    """Yield a function that starts to unlink the files in ``trash/``; wait at the end of the block.

    While other processes sync, each unlink waits for the file system's journal. Threads let several unlinks wait
    at the same time, and the block continues meanwhile.

    Args:
        folders: of the cache.
        left: gets the files that cannot be unlinked.
    """
    group = ThreadGroup()

    def unlink(names: list[str]) -> None:
        for name in names:
            if group.stopped.is_set():
                return
            try:
                os.unlink(name, dir_fd=trash)
            except FileNotFoundError:
                pass
            except IsADirectoryError:
                set_aside(trash, name)
            except OSError as error:
                left.append(Leftover(folders.directory / "trash" / name, explain(error)))

    def start_unlinking() -> None:
        group.wait()
        left.clear()  # the listing below finds them again
        names = [name for name in list_names(trash) if trash_digest(name)]
        if len(names) <= _FEW_FILES:
            unlink(names)
            return
        for first in range(_UNLINK_THREADS):
            share = names[first::_UNLINK_THREADS]
            if not group.start(partial(unlink, share)):
                unlink(share)

    with os_errors("empty the trash"), folders.open("trash") as trash, group:
        yield start_unlinking
        group.wait()


def recover(database: Database, *, seconds: float = math.inf) -> list[Leftover]:
    """Remove the files and leases of dead sessions, expired holds, and the files in the trash.

    A file that cannot be removed is skipped, because it must not keep the cache from opening.

    Args:
        database: of the cache.
        seconds: after which no further session is cleaned up.

    Returns:
        The files that are left.

    Raises:
        Busy: if another process holds the write lock for longer than the database waits.
    """
    with database.read() as connection:
        leased = holds.read_lapsed(connection)
    folders, left, end = database.folders, list[Leftover](), time.monotonic() + seconds
    with os_errors("clean up after a dead session"):
        left += single_flight.remove_dead_claims(folders)
        left += sweep_failures(folders)
        for session in lock_dead_sessions(folders, left):
            if time.monotonic() > end:
                break
            folder = database.directory / "ingest" / session
            if os.path.lexists(folder):
                try:
                    with folders.open(f"ingest/{session}") as descriptor:
                        retract(database, descriptor, os.listdir(descriptor))
                    remove_folder(folders, session)
                except Busy:
                    raise
                except (OSError, CacheError) as error:
                    left.append(Leftover(folder, explain(error) if isinstance(error, OSError) else str(error)))
        # A session's lock file exists before its first lease, and until its last lease is deleted.
        gone = leased - list_sessions_with_locks(database.directory)
    if gone:
        with database.write() as connection:
            holds.forget(connection, gone)
    return left + empty_trash(database)


def recover_without_waiting(database: Database) -> list[Leftover]:
    """Clean up after dead processes without waiting; the next open of the cache does the rest.

    The command that opens the cache also works without this.

    Returns:
        The files that cannot be removed.
    """
    try:
        with database.without_waiting():
            return recover(database, seconds=_RECOVERY_SECONDS)
    except Busy as error:
        LOG.info("the next process that opens the cache cleans up: %s", error)
        return []
