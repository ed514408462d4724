"""Collection: what nothing refers to leaves the index, then ``blobs/``, then the disk; in that order.

A blob is forgotten and noted in ``trash`` by one transaction. Its file is renamed into ``trash/`` by a
second, which looks again whether the blob was stored anew meanwhile, and unlinked after that. So a crash
at any point leaves something that `recover` can finish, and never a stored row without its file.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
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

from cachedb import holds, partial, producing
from cachedb.blobs import retract, stored
from cachedb.database import BATCH, Database, batched, sync_folder
from cachedb.directory import blob_file
from cachedb.errors import os_errors
from cachedb.parallel import start
from cachedb.reference import Digest
from cachedb.sessions import dead_sessions, locked_sessions
from cachedb.tables import BLOBS, IMAGE_BLOBS, LEASES, TRASH

__all__ = ["Collected", "collect", "empty_trash", "forget", "recover", "unreferenced"]


SMALL_BATCH = 16  # blobs, where there is little space to work in
_LARGE_BATCH = 250  # more are forgotten in a time that a writer who waits would notice
_FEW = 64  # files that are unlinked sooner than threads have begun
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
        files = [row for row in rows if row.stored_at is not None]
        if files:
            connection.execute(_without_trash(), {"digests": [row.digest for row in files]})
            connection.execute(_new_trash(), [{"digest": row.digest, "size": row.size} for row in files])
        blobs += len(files)
        size += sum(row.size for row in files)
    return Collected(blobs, size)


def collect(database: Database, *, batch: int = _LARGE_BATCH) -> Iterator[Collected]:
    """Take everything unreferenced from the index and from the disk, so many blobs at a time; yield what was taken.

    The candidates are found without the lock; each is looked at again under it, by the same condition.
    """
    recover(database)
    partial.sweep(database.directory)
    with database.read() as connection:
        candidates = connection.execute(_candidates()).scalars().all()
    with _unlinking(database.directory) as unlink:
        for blob_ids in batched(candidates, batch):
            with database.write() as connection:
                part = forget(connection, blob_ids)
            yield part
            _move_out(database)
            unlink()  # now, so that a large collection gives back space as it goes


def empty_trash(database: Database) -> None:
    """Move the files of forgotten blobs out of ``blobs/`` and unlink them."""
    _move_out(database)
    with _unlinking(database.directory) as unlink:
        unlink()


def _move_out(database: Database) -> None:
    """Rename the files of forgotten blobs into ``trash/``."""
    trash = f"{database.directory}/trash"
    while database.rows(_some_trash(), {"most": 1}):
        with database.write() as connection:
            begun = time.monotonic()
            digests = [Digest(row) for row in connection.execute(_some_trash(), {"most": BATCH}).scalars()]
            again = stored(connection, digests)
            done, folders = [], set()
            for digest in digests:
                done.append(digest)
                if digest in again:
                    continue
                path = blob_file(database.directory, digest)
                folders.add(os.path.dirname(path))
                with suppress(FileNotFoundError):  # moved before a crash that undid the rest
                    os.rename(path, f"{trash}/{digest.replace(':', '-')}")  # as text, as `blob_file` has it
                if time.monotonic() - begun > _HOLD:
                    break
            for folder in folders:
                sync_folder(Path(folder))
            connection.execute(_without_trash(), {"digests": done})
        if len(done) == len(digests) < BATCH:
            break


@contextmanager
def _unlinking(directory: Path) -> Iterator[Callable[[], None]]:
    """Give a block what begins to unlink all that is in ``trash/``; it is done at the block's end.

    Where others sync, each unlinking waits for the file system's journal: several wait together, and beside the block.
    """
    trash = f"{directory}/trash"
    begun: list[threading.Thread] = []
    failures: list[BaseException] = []

    def unlink(names: list[str]) -> None:
        with os_errors("empty the trash"):
            for name in names:
                with suppress(FileNotFoundError):
                    os.unlink(f"{trash}/{name}")

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
        with os_errors("empty the trash"):
            names = os.listdir(trash)
        if len(names) <= _FEW:
            unlink(names)
            return
        for first in range(_UNLINKING):
            some = names[first::_UNLINKING]
            begun.append(threading.Thread(target=unlink_in_thread, args=(some,)))
            if not start(begun[-1]):
                begun.pop()
                unlink(some)

    try:
        yield begin
        finish()
    finally:
        join()


def recover(database: Database) -> None:
    """Clean up what is over: what dead sessions received, their leases, holds past their time, half-done trash."""
    with database.read() as connection:
        leased = holds.lapsed(connection)
    with os_errors("clean up after a dead session"):
        producing.sweep(database.directory)
        for session in dead_sessions(database.directory):
            folder = database.directory / "ingest" / session
            if folder.is_dir():
                retract(database, folder, os.listdir(folder))
                shutil.rmtree(folder, ignore_errors=True)
        # A session has its lock file before its first lease, and until its last is gone.
        gone = leased - locked_sessions(database.directory)
    if gone:
        with database.write() as connection:
            holds.forget(connection, gone)
    empty_trash(database)
