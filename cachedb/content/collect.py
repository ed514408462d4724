"""Collection: what nothing refers to leaves the index, then ``blobs/``, then the disk; in that order.

A blob is forgotten and noted in ``trash`` by one transaction. Its file is renamed into ``trash/`` by a
second, which looks again whether the blob was stored anew meanwhile, and unlinked after that. So a crash
at any point leaves something that `recover` can finish, and never a stored row without its file.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
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
from cachedb.content.session import dead_sessions, locked_sessions, remove_folder
from cachedb.disk import downloads, single_flight
from cachedb.disk.folders import Folders, Leftover
from cachedb.disk.layout import trash_digest, trash_name
from cachedb.disk.waiting import LOG
from cachedb.errors import Busy, CacheError, StorageError, explain, os_errors
from cachedb.index import holds
from cachedb.index.blobs import stored
from cachedb.index.sqlite.batches import BATCH, batched
from cachedb.index.sqlite.database import Database
from cachedb.index.tables import BLOBS, IMAGE_BLOBS, LEASES, TRASH
from cachedb.oci.digests import Digest, is_digest, split_digest
from cachedb.threads import start

__all__ = ["Collected", "collect", "empty_trash", "forget", "recover", "recover_at_once", "unreferenced"]


SMALL_BATCH = 16  # blobs, where there is little space to work in
_LARGE_BATCH = 250  # more are forgotten in a time that a writer who waits would notice
_FEW = 64  # files that are unlinked sooner than threads have begun
_RECOVERY_SECONDS = 1.0  # at most, when a cache is opened
_UNLINKING = 2  # threads
_HOLD = 0.03  # seconds of renaming after which the write lock is let go of


class Collected(NamedTuple):
    """What was taken from the disk, or would be: a number of blobs, and their bytes."""

    blobs: int
    bytes: int


# The reference count is zero, and no session works with it.
_UNREFERENCED = (
    ~select(IMAGE_BLOBS.c.blob_id).where(IMAGE_BLOBS.c.blob_id == BLOBS.c.id).exists(),
    ~select(LEASES.c.digest).where(LEASES.c.digest == BLOBS.c.digest).exists(),
)


# To put a statement together takes longer than to execute it.


@cache
def _forgotten() -> ReturningDelete[*tuple[Any, ...]]:
    these = BLOBS.c.id.in_(bindparam("ids", expanding=True))
    return delete(BLOBS).where(*_UNREFERENCED, these).returning(BLOBS.c.digest, BLOBS.c.size, BLOBS.c.stored_at)


@cache
def _new_trash() -> Insert:
    return insert(TRASH)


@cache
def _some_trash() -> Select[*tuple[Any, ...]]:
    return select(TRASH.c.digest).limit(bindparam("most"))


@cache
def _candidates() -> CompoundSelect[int]:
    # What `_UNREFERENCED` says, for all blobs at once: in the order of the ids, in which both indexes are, SQLite
    # goes through each of them once, and looks nothing up.
    used = select(IMAGE_BLOBS.c.blob_id)
    leased = select(BLOBS.c.id).where(BLOBS.c.digest.in_(select(LEASES.c.digest)))
    return except_(select(BLOBS.c.id), used, leased).order_by("id")


@cache
def _without_trash() -> Delete:
    return delete(TRASH).where(TRASH.c.digest.in_(bindparam("digests", expanding=True)))


def unreferenced(connection: Connection) -> Collected:
    """Return what a full collection would free now."""
    totals = select(func.count(), func.coalesce(func.sum(BLOBS.c.size), 0)).where(
        *_UNREFERENCED, BLOBS.c.stored_at.is_not(None)
    )
    return Collected(*connection.execute(totals).one())


def forget(connection: Connection, blob_ids: Iterable[int]) -> Collected:
    """Forget those of the blobs that nothing refers to, and note their files for the trash."""
    blobs = size = 0
    for part in batched(sorted(blob_ids)):
        rows = connection.execute(_forgotten(), {"ids": part}).all()
        files = [row for row in rows if row.stored_at is not None and is_digest(row.digest)]
        if files:
            connection.execute(_without_trash(), {"digests": [row.digest for row in files]})
            connection.execute(_new_trash(), [{"digest": row.digest, "size": row.size} for row in files])
        blobs += len(files)
        size += sum(row.size for row in files)
    return Collected(blobs, size)


def collect(database: Database, *, batch: int = _LARGE_BATCH) -> Iterator[Collected]:
    """Take everything unreferenced from the index and from the disk, so many blobs at a time; yield what was taken.

    The candidates are found without the lock; each is looked at again under it, by the same condition.

    Raises:
        StorageError: when all else is done, if a file cannot be unlinked.
    """
    recover(database)
    downloads.sweep(database.folders)
    with database.read() as connection:
        candidates = connection.execute(_candidates()).scalars().all()
    left: list[Leftover] = []
    with _unlinking(database.folders, left) as unlink:
        for blob_ids in batched(candidates, batch):
            with database.write() as connection:
                part = forget(connection, blob_ids)
            yield part
            _move_out(database)
            unlink()  # now, so that a large collection gives back space as it goes
        unlink()
    if left:
        path, reason = left[0]
        raise StorageError(f"all was collected, but {str(path)!r} cannot be unlinked: {reason}")


def empty_trash(database: Database) -> list[Leftover]:
    """Move the files of forgotten blobs out of ``blobs/`` and unlink them; return what cannot be unlinked."""
    _move_out(database)
    left: list[Leftover] = []
    with _unlinking(database.folders, left) as unlink:
        unlink()
    return left


def _move_out(database: Database) -> None:
    """Rename the files of forgotten blobs into ``trash/``."""
    while database.rows(_some_trash(), {"most": 1}):
        with database.write() as connection:
            begun = time.monotonic()
            digests = [Digest(row) for row in connection.execute(_some_trash(), {"most": BATCH}).scalars()]
            again = stored(connection, digests)
            done = []
            with ExitStack() as opened:
                trash = opened.enter_context(database.folders.open("trash"))
                sources: dict[str, int] = {}
                for digest in digests:
                    done.append(digest)
                    # An index from elsewhere may name a path here, that leads out of the cache.
                    if digest in again or not is_digest(digest):
                        continue
                    algorithm, name = split_digest(digest)
                    if algorithm not in sources:
                        sources[algorithm] = opened.enter_context(database.folders.open(f"blobs/{algorithm}"))
                    with suppress(FileNotFoundError):  # moved before a crash that undid the rest
                        os.rename(name, trash_name(digest), src_dir_fd=sources[algorithm], dst_dir_fd=trash)
                    if time.monotonic() - begun > _HOLD:
                        break
                for folder in sources.values():
                    os.fsync(folder)
            connection.execute(_without_trash(), {"digests": done})
        if len(done) == len(digests) < BATCH:
            break


@contextmanager
def _unlinking(folders: Folders, left: list[Leftover]) -> Iterator[Callable[[], None]]:
    """Give a block what begins to unlink the blobs in ``trash/``; it is done at the block's end.

    Where others sync, each unlinking waits for the file system's journal: several wait together, and beside the block.

    Args:
        folders: of the cache.
        left: gets what cannot be unlinked.
    """
    begun: list[threading.Thread] = []
    failures: list[BaseException] = []

    def unlink(names: list[str]) -> None:
        for name in names:
            try:
                os.unlink(name, dir_fd=trash)
            except FileNotFoundError:
                pass
            except OSError as error:
                left.append(Leftover(folders.directory / "trash" / name, explain(error)))

    def unlink_in_thread(names: list[str]) -> None:
        try:
            unlink(names)
        except BaseException as error:
            failures.append(error)

    def join() -> None:
        while begun:
            with suppress(RuntimeError):  # an interrupt came before it was begun
                begun[-1].join()
            begun.pop()

    def finish() -> None:
        join()
        if failures:
            raise failures.pop()

    def begin() -> None:
        finish()
        left.clear()  # what is still there is found again
        names = [name for name in os.listdir(trash) if trash_digest(name)]
        if len(names) <= _FEW:
            unlink(names)
            return
        for first in range(_UNLINKING):
            some = names[first::_UNLINKING]
            begun.append(threading.Thread(target=unlink_in_thread, args=(some,)))
            if not start(begun[-1]):
                begun.pop()
                unlink(some)

    with os_errors("empty the trash"), folders.open("trash") as trash:
        try:
            yield begin
            finish()
        finally:
            join()


def recover(database: Database, *, seconds: float = math.inf) -> list[Leftover]:
    """Clean up what is over: what dead sessions received, their leases, holds past their time, half-done trash.

    What cannot be cleaned up is passed over, for it must not keep anybody from working.

    Args:
        database: of the cache.
        seconds: after which no further session is cleaned up.

    Returns:
        What is left.

    Raises:
        Busy: if another process has the write lock for longer than the database waits.
    """
    with database.read() as connection:
        leased = holds.lapsed(connection)
    folders, left, end = database.folders, list[Leftover](), time.monotonic() + seconds
    with os_errors("clean up after a dead session"):
        left += single_flight.sweep(folders)
        for session in dead_sessions(folders, left):
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
        # A session has its lock file before its first lease, and until its last is gone.
        gone = leased - locked_sessions(database.directory)
    if gone:
        with database.write() as connection:
            holds.forget(connection, gone)
    return left + empty_trash(database)


def recover_at_once(database: Database) -> list[Leftover]:
    """Clean up after dead processes, as far as that can be done at once; what is left is for the next to open.

    The command that opens the cache has no need of it.

    Returns:
        What cannot be cleaned up.
    """
    try:
        with database.without_waiting():
            return recover(database, seconds=_RECOVERY_SECONDS)
    except Busy as error:
        LOG.info("left the cleaning up to the next who opens the cache: %s", error)
        return []
