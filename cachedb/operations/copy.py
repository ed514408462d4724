"""Copy a cache into another directory as it is at one moment, also while other processes use it.

All stored blobs are leased first, so that no collection takes one. The index is copied from one read transaction, which
begins under the write lock. Until all blobs are there it has the name `UNFINISHED` in the destination, which becomes a
cache when it is renamed to ``index.db``. The next attempt deletes what an interrupted one left.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection, delete, func, select

from cachedb.content import publish
from cachedb.content.session import Hold, Session
from cachedb.disk import layout, locks, writer
from cachedb.disk.durable import sync_file, sync_folder
from cachedb.disk.file_system import refuse_shared
from cachedb.disk.folders import BLOB_FOLDERS
from cachedb.disk.layout import UNFINISHED, blob_file
from cachedb.disk.writer import Readable
from cachedb.errors import CacheError, DamagedIndex, DigestMismatch, NotACache, StorageError, os_errors
from cachedb.index.blobs import stored
from cachedb.index.sqlite import backups
from cachedb.index.sqlite.batches import batched
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.inspect import find_faults
from cachedb.index.tables import BLOBS, HOLDS, IMAGES, LEASES, TRASH
from cachedb.oci.digests import Digest
from cachedb.progress import Advance, Progress, summed
from cachedb.threads import in_threads

__all__ = ["Copied", "copy"]


_SUFFIXES = ("wal", "shm", "journal")  # of files that SQLite makes beside the index
_LEASED_TOGETHER = 5000  # blobs: more would keep the write lock for longer than others notice
_FICLONE = 0x40049409  # ioctl_ficlone(2)
_ADVICE = "run `cachedb verify --repair` and copy again"
_NOT_LINKABLE = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP)


class Copied(NamedTuple):
    """What a copy of a cache has."""

    directory: Path  # of the copy
    images: int
    blobs: int
    bytes: int  # of the blobs
    reflinks: int  # blobs that share their disk space with the source, until one of them is changed
    hard_links: int  # blobs that are one file with the source's


def copy(
    database: Database, session: Session, directory: Path, *, verify: bool = True, progress: Progress | None = None
) -> Copied:
    """Copy a cache into a new or empty directory; see `Cache.copy`.

    Args:
        database: of the cache.
        session: to lease the blobs with.
        directory: of the copy.
        verify: compute the digests of reflinks and hard links too.
        progress: is told how far it is, in bytes of blobs.

    Raises:
        NotACache: if the directory is not empty, or is inside the cache.
        DigestMismatch: if a blob's content is not what its name says.
        StorageError: if a blob's file is missing or has another size, or the copy cannot be written.
    """
    with os_errors("copy the cache"), _destination(directory, database.directory) as staged:
        leased = list[Hold]()
        try:
            if not database.read_only:  # where nothing can be written nothing can be leased
                database.reserve.run(lambda: _lease(database, session, leased))
            _copy_index(database, session, staged, leased)
            wanted, image_count = _take_over(Database(directory, staged))
            how = _copy_blobs(database.directory, directory, wanted, progress, verify=verify)
        finally:
            for hold in leased:
                publish.release_after_error(database, session, hold)
        for folder in (*BLOB_FOLDERS, ""):
            sync_folder(directory / folder)
        staged.rename(directory / "index.db")
        sync_folder(directory)
    return Copied(
        directory, image_count, len(wanted), sum(wanted.values()), reflinks=how["reflink"], hard_links=how["hard link"]
    )


@contextmanager
def _destination(directory: Path, source: Path) -> Iterator[Path]:
    """A block that fills a new or empty directory, which is as it was before if the block fails.

    The block gets an empty file, to make the index of and to rename in the end.
    """
    if directory.resolve().is_relative_to(source.resolve()):
        raise NotACache(f"{str(directory)!r} is inside the cache: name a directory elsewhere")
    if reason := refuse_shared(directory):
        raise StorageError(reason)
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in made:
        sync_folder(folder.parent)
    _check_left(directory)
    staged = directory / UNFINISHED
    lock = locks.acquire(staged, wait=False)
    if lock is None:
        raise CacheError(f"another process is copying into {str(directory)!r}: wait for it or name another directory")
    try:
        try:
            _check_left(directory)  # again: another process may have come to its end meanwhile
        except NotACache:
            if (directory / "index.db").exists():
                staged.unlink()
            raise
        try:
            _delete_left(directory)
            for name in BLOB_FOLDERS:
                (directory / name).mkdir(mode=0o700)
            sync_folder(directory)
            yield staged
        except BaseException:
            with suppress(OSError, CacheError):
                if staged.exists():  # else the copy is complete, and only a sync failed
                    _delete_left(directory)
                    staged.unlink()
                    for folder in made:
                        folder.rmdir()
            raise
    finally:
        locks.release(lock)


def _check_left(directory: Path) -> None:
    """Refuse a directory that holds anything but what an interrupted copy leaves.

    Raises:
        NotACache: if there is anything else.
    """
    there = {entry.name: entry for entry in os.scandir(directory)}
    if "index.db" in there:
        raise NotACache(f"{str(directory)!r} is a cache already: name a new or empty directory")
    strange = set(there)
    if UNFINISHED in there and _is_left(directory / UNFINISHED):
        strange -= {UNFINISHED, *(f"{UNFINISHED}-{suffix}" for suffix in _SUFFIXES)}
        if "blobs" in there and there["blobs"].is_dir(follow_symlinks=False):
            strange.remove("blobs")
    if strange:
        raise NotACache(f"{str(directory)!r} is not empty (it holds {min(strange)!r}): name a new or empty directory")


def _is_left(path: Path) -> bool:
    try:
        return _is_ours(path.lstat())
    except FileNotFoundError:
        return False  # another process has come to its end meanwhile


def _is_ours(found: os.stat_result) -> bool:
    """Return whether a copy can have made this: a regular file of our user that has no second name."""
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1


def _delete_left(directory: Path) -> None:
    """Delete what an interrupted copy left, and nothing else.

    Raises:
        NotACache: if there is something among it that no copy makes.
    """
    _truncate(directory / UNFINISHED)
    for suffix in _SUFFIXES:
        (directory / f"{UNFINISHED}-{suffix}").unlink(missing_ok=True)
    if (directory / "blobs").exists():
        found, strays = layout.on_disk(directory)
        if strays:
            raise NotACache(f"{str(strays[0])!r} is no blob: name a new or empty directory")
        for digest in found:
            os.unlink(blob_file(directory, digest))
    for name in reversed(BLOB_FOLDERS):
        with suppress(FileNotFoundError):
            (directory / name).rmdir()


def _truncate(staged: Path) -> None:
    """Empty what an interrupted copy has left of an index.

    Raises:
        NotACache: if it is another file by now.
    """
    file = os.open(staged, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not _is_ours(os.fstat(file)):
            raise NotACache(f"{str(staged)!r} is another program's: name a new or empty directory")
        os.ftruncate(file, 0)
    finally:
        os.close(file)


def _stored(connection: Connection) -> dict[Digest, int]:
    query = select(BLOBS.c.digest, BLOBS.c.size).where(BLOBS.c.stored_at.is_not(None))
    return {Digest(digest): size for digest, size in connection.execute(query)}


def _lease(database: Database, session: Session, leased: list[Hold]) -> None:
    """Lease the blobs that are stored now, in parts: while others wait for the write lock few are left to lease."""
    with database.read() as connection:
        found = _stored(connection)
    for part in batched(found.keys() - _digests(leased), _LEASED_TOGETHER):
        with database.write() as connection:
            leased.append(session.lease(connection, stored(connection, part)))


def _digests(leased: list[Hold]) -> set[Digest]:
    return {digest for hold in leased for digest in hold.digests}


def _copy_index(database: Database, session: Session, staged: Path, leased: list[Hold]) -> None:
    """Copy the index as it is at one moment, from which on all blobs are leased that it calls stored."""
    with ExitStack() as stack:
        if database.read_only:
            reader = stack.enter_context(database.raw(read_only=True))
        else:
            with database.write() as connection:
                leased.append(session.lease(connection, _stored(connection).keys() - _digests(leased)))
                reader = stack.enter_context(database.raw(read_only=True))  # it begins to read before others may write
        backups.copy_snapshot(reader, staged)


def _take_over(copied: Database) -> tuple[dict[Digest, int], int]:
    """Check the copied index and delete what belongs to the source alone; return its stored blobs and image count."""
    try:
        if faults := find_faults(copied, quick=True):
            raise DamagedIndex(f"the index is damaged: {faults[0]}: run `cachedb verify --repair` and copy again")
        with copied.look() as connection:  # nobody else knows this index: it needs no write lock
            # The source's processes do not work with the copy. The leases of holds have no process.
            connection.execute(delete(LEASES).where(LEASES.c.session.not_in(select(HOLDS.c.id))))
            connection.execute(delete(TRASH))
            wanted = _stored(connection)
            image_count = connection.execute(select(func.count()).select_from(IMAGES)).scalar_one()
    finally:
        copied.close()
    if copied.path.with_name(f"{UNFINISHED}-wal").exists():
        raise StorageError(f"{str(copied.path)!r} is in use by another program: end it and copy again")
    sync_file(copied.path)
    return wanted, image_count


def _copy_blobs(
    source: Path, target: Path, wanted: dict[Digest, int], progress: Progress | None, *, verify: bool
) -> Counter[str]:
    """Bring blobs over; return how many came how."""
    guard, how, can_clone = threading.Lock(), Counter[str](), True

    def bring(digest: Digest, add: Advance) -> None:
        nonlocal can_clone
        path, size = blob_file(target, digest), wanted[digest]
        done = _copy_blob(blob_file(source, digest), path, digest, size, can_clone, add)
        if done == "copy":
            pass  # it was verified while it was copied
        elif verify:
            with open(path, "rb", buffering=0) as made:
                _receive(made, None, digest, size, add)
        else:
            add(size)
        with guard:
            can_clone = can_clone and done == "reflink"
            how[done] += 1

    # The large ones first, so that all threads come to their end together.
    order = sorted(wanted, key=lambda digest: -wanted[digest])
    in_threads(bring, order, summed(sum(wanted.values()), progress))
    return how


def _copy_blob(source: str, target: str, digest: Digest, size: int, can_clone: bool, add: Advance) -> str:
    """Bring one blob over; return whether as a ``reflink``, a ``hard link`` or a verified ``copy``."""
    try:
        file = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise StorageError(f"the file of {digest} is missing: {_ADVICE}") from None
    with open(file, "rb", buffering=0) as opened:
        status = os.fstat(file)
        if status.st_size != size:
            raise StorageError(f"the file of {digest} has {status.st_size} bytes and should have {size}: {_ADVICE}")
        if can_clone and _clone(file, target):
            return "reflink"
        # Another user, or the group, could write to the copy's file through their own name of it.
        ours = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if ours and _link(source, target, status):
            return "hard link"
        _receive(opened, Path(target), digest, size, add)
        return "copy"


def _receive(source: Readable, target: Path | None, digest: Digest, size: int, add: Advance) -> None:
    """Verify a blob, and write it to a new file if there is one."""
    try:
        writer.receive(source, target, digest=digest, size=size, progress=add, what=f"the file of {digest}")
    except DigestMismatch as error:
        raise DigestMismatch(f"{error}: {_ADVICE}") from error


def _clone(file: int, target: str) -> bool:
    """Make a reflink to an open file; return whether the file systems can."""
    made = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.ioctl(made, _FICLONE, file)
        except OSError as error:
            os.unlink(target)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            return False
        os.fchmod(made, 0o444)
        os.fsync(made)
        return True
    finally:
        os.close(made)


def _link(source: str, target: str, status: os.stat_result) -> bool:
    """Make a hard link to a file that is open; return whether the file systems can."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno in _NOT_LINKABLE:
            return False
        raise
    if os.lstat(target).st_ino != status.st_ino:  # another file got the name meanwhile
        os.unlink(target)
        return False
    return True
