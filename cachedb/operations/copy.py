"""Copy a cache as of one moment, even while other processes use it.

All stored blobs are leased first, so that no collection deletes one. The index is copied in one read transaction, which
begins under the write lock. The copied index has the name `UNFINISHED_INDEX` until all blobs are copied. Then it is
renamed to ``index.db``, and the destination is a cache. The next attempt deletes the leftovers of an interrupted one.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import delete, func, select

from cachedb.content.held import release_from_full_disk
from cachedb.content.session import Hold, Session
from cachedb.disk import layout, locks, writer
from cachedb.disk.durable import clone_content, copy_to_new, sync_file, sync_folder
from cachedb.disk.existence import exists
from cachedb.disk.file_system import explain_shared
from cachedb.disk.folders import BLOB_FOLDERS
from cachedb.disk.layout import POLICY_FILE, UNFINISHED_INDEX, blob_file
from cachedb.disk.regular import open_regular
from cachedb.disk.writer import Readable
from cachedb.errors import CacheError, DamagedIndex, DigestMismatch, NotACache, StorageError, os_errors
from cachedb.index.blobs import read_all_stored_sizes, read_stored_sizes
from cachedb.index.sqlite import backups
from cachedb.index.sqlite.batches import split_batches
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.inspect import find_faults
from cachedb.index.tables import HOLDS, IMAGES, LEASES, TRASH
from cachedb.oci.digests import Digest
from cachedb.progress import Advance, Progress, sum_progress
from cachedb.threads import in_threads

__all__ = ["Copied", "copy"]


_SUFFIXES = ("wal", "shm", "journal")  # of the files that SQLite creates beside an index
_LEASES_PER_WRITE = 5000  # more would hold the write lock for too long
_ADVICE = "run `cachedb verify --repair` and copy again"
_NOT_LINKABLE = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP)


class Copied(NamedTuple):
    """The result of a copy."""

    directory: Path  # the new cache
    images: int
    blobs: int
    bytes: int  # of the blobs
    reflinks: int  # blobs that share disk space with the source until either is changed
    hard_links: int  # blobs that are the same file as in the source


def copy(
    database: Database, session: Session, directory: Path, *, verify: bool = True, progress: Progress | None = None
) -> Copied:
    """Copy a cache into a new or empty directory, as `Cache.copy` does.

    Args:
        database: the index of the cache.
        session: the session that leases the blobs.
        directory: the new directory.
        verify: compute the digests of reflinks and hard links too.
        progress: called with the bytes of blobs done and the total.

    Raises:
        CacheError: if another process copies into the directory.
        NotACache: if the directory is not empty, or is inside the cache.
        DamagedIndex: if the index is damaged.
        DigestMismatch: if the content of a blob does not match its digest.
        StorageError: if a blob's file is missing or has another size, or the copy cannot be written.
    """
    with os_errors("copy the cache"), _prepare_destination(directory, database.directory) as staged:
        leased = list[Hold]()
        try:
            if not database.read_only:  # a read-only cache has no leases
                database.reserve.run(lambda: _lease_stored(database, session, leased))
            database.reserve.check(staged)
            _copy_index(database, session, staged, leased)
            wanted, image_count = _clean_index(Database(directory, staged))
            how = _copy_blobs(database.directory, directory, wanted, progress, verify=verify)
            _copy_policy(database.directory, directory)
        finally:
            for hold in leased:
                with suppress(CacheError):  # the hold ends with the session
                    release_from_full_disk(database, session, hold)
        for folder in (*BLOB_FOLDERS, ""):
            sync_folder(directory / folder)
        staged.rename(directory / "index.db")
        sync_folder(directory)
    return Copied(
        directory, image_count, len(wanted), sum(wanted.values()), reflinks=how["reflink"], hard_links=how["hard link"]
    )


@contextmanager
def _prepare_destination(directory: Path, source: Path) -> Iterator[Path]:
    """Yield an empty file for the index in a new or empty directory; undo all changes if the block fails."""
    if layout.is_inside(source, directory):
        raise NotACache(f"{str(directory)!r} is inside the cache: name a directory elsewhere")
    if reason := explain_shared(directory):
        raise StorageError(reason)
    new_folders = [folder for folder in (directory, *directory.parents) if not exists(folder)]
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in new_folders:
        sync_folder(folder.parent)
    _check_destination(directory)
    staged = directory / UNFINISHED_INDEX
    lock = locks.acquire(directory.resolve() / UNFINISHED_INDEX, wait=False)  # the directory may be a link
    if lock is None:
        raise CacheError(f"another process is copying into {str(directory)!r}: wait for it, or name another directory")
    try:
        try:
            _check_destination(directory)  # again: another process may have finished meanwhile
        except NotACache:
            if exists(directory / "index.db"):
                staged.unlink()
            raise
        try:
            _delete_leftovers(directory)
            for name in BLOB_FOLDERS:
                (directory / name).mkdir(mode=0o700)
            sync_folder(directory)
            yield staged
        except BaseException:
            with suppress(OSError, CacheError):
                if exists(staged):  # else the copy is complete, and only a sync failed
                    _delete_leftovers(directory)
                    staged.unlink()
                    for folder in new_folders:
                        folder.rmdir()
            raise
    finally:
        locks.release(lock)


def _check_destination(directory: Path) -> None:
    """Raise if a directory holds anything but the leftovers of an interrupted copy.

    Raises:
        NotACache: if it holds anything else.
    """
    entries = {entry.name: entry for entry in os.scandir(directory)}
    if "index.db" in entries:
        raise NotACache(f"{str(directory)!r} is a cache already: name a new or empty directory")
    unknown = set(entries)
    if UNFINISHED_INDEX in entries and _is_leftover(directory / UNFINISHED_INDEX):
        unknown -= {UNFINISHED_INDEX, *(f"{UNFINISHED_INDEX}-{suffix}" for suffix in _SUFFIXES)}
        unknown -= {POLICY_FILE} if _is_leftover(directory / POLICY_FILE) else set()
        if "blobs" in entries and entries["blobs"].is_dir(follow_symlinks=False):
            unknown.remove("blobs")
    if unknown:
        raise NotACache(f"{str(directory)!r} is not empty (it holds {min(unknown)!r}): name a new or empty directory")


def _is_leftover(path: Path) -> bool:
    try:
        return _is_ours(path.lstat())
    except FileNotFoundError:
        return False  # another process has finished meanwhile


def _is_ours(status: os.stat_result) -> bool:
    """Return whether a copy may have created a file: it is regular, ours, and has one name."""
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1


def _delete_leftovers(directory: Path) -> None:
    """Delete the leftovers of an interrupted copy.

    Raises:
        NotACache: if there is a file that no copy creates.
    """
    _empty_index(directory / UNFINISHED_INDEX)
    for suffix in _SUFFIXES:
        (directory / f"{UNFINISHED_INDEX}-{suffix}").unlink(missing_ok=True)
    (directory / POLICY_FILE).unlink(missing_ok=True)
    if exists(directory / "blobs"):
        found, strays = layout.list_blob_files(directory)
        if strays:
            raise NotACache(f"{str(strays[0])!r} is not a blob: name a new or empty directory")
        for digest in found:
            os.unlink(blob_file(directory, digest))
    for name in reversed(BLOB_FOLDERS):
        with suppress(FileNotFoundError):
            (directory / name).rmdir()


def _empty_index(staged: Path) -> None:
    """Empty the index that an interrupted copy left.

    Raises:
        NotACache: if another program has replaced it.
    """
    file = os.open(staged, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not _is_ours(os.fstat(file)):
            raise NotACache(f"{str(staged)!r} is not from a copy by this user: name a new or empty directory")
        os.ftruncate(file, 0)
    finally:
        os.close(file)


def _lease_stored(database: Database, session: Session, leased: list[Hold]) -> None:
    """Lease the blobs that are stored now, in short transactions.

    Then `_copy_index` has few blobs left to lease while it holds the write lock.
    """
    with database.read() as connection:
        found = read_all_stored_sizes(connection)
    for part in split_batches(found.keys() - _leased_digests(leased), _LEASES_PER_WRITE):
        with database.write() as connection:
            leased.append(session.lease(connection, read_stored_sizes(connection, part)))


def _leased_digests(leased: list[Hold]) -> set[Digest]:
    return {digest for hold in leased for digest in hold.digests}


def _copy_index(database: Database, session: Session, staged: Path, leased: list[Hold]) -> None:
    """Copy the index as of one moment, with leases on all blobs that are stored at that moment."""
    with ExitStack() as stack:
        if database.read_only:
            reader = stack.enter_context(database.raw(read_only=True))
        else:
            with database.write() as connection:
                leased.append(
                    session.lease(connection, read_all_stored_sizes(connection).keys() - _leased_digests(leased))
                )
                reader = stack.enter_context(database.raw(read_only=True))  # it begins to read before others can write
        backups.copy_snapshot(reader, staged)


def _clean_index(copied: Database) -> tuple[dict[Digest, int], int]:
    """Check a copied index and delete rows that apply only to the source.

    Returns:
        The stored blobs with their sizes in bytes, and the number of images.
    """
    try:
        if faults := find_faults(copied, quick=True):
            raise DamagedIndex(f"the index is damaged: {faults[0]}: run `cachedb verify --repair` and copy again")
        with copied.look() as connection:  # no other process uses this index: it needs no write lock
            # Leases of the source's sessions do not apply to the copy, but those of holds do.
            connection.execute(delete(LEASES).where(LEASES.c.session.not_in(select(HOLDS.c.id))))
            connection.execute(delete(TRASH))
            wanted = read_all_stored_sizes(connection)
            image_count = connection.execute(select(func.count()).select_from(IMAGES)).scalar_one()
    finally:
        copied.close()
    if exists(copied.path.with_name(f"{UNFINISHED_INDEX}-wal")):
        raise StorageError(f"{str(copied.path)!r} is in use by another program: close it and copy again")
    sync_file(copied.path)
    return wanted, image_count


def _copy_policy(source: Path, target: Path) -> None:
    folder = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(FileNotFoundError), open(source / POLICY_FILE, "rb", opener=open_regular) as file:
            copy_to_new(file, POLICY_FILE, folder)
    finally:
        os.close(folder)


def _copy_blobs(
    source: Path, target: Path, wanted: dict[Digest, int], progress: Progress | None, *, verify: bool
) -> Counter[str]:
    """Copy blobs in several threads; return the number of reflinks, hard links and copies."""
    guard, how, can_clone = threading.Lock(), Counter[str](), True

    def copy_one(digest: Digest, advance: Advance) -> None:
        nonlocal can_clone
        path, size = blob_file(target, digest), wanted[digest]
        method = _copy_blob(blob_file(source, digest), path, digest, size, can_clone, advance)
        if method == "copy":
            pass  # it was verified while it was copied
        elif verify:
            with open(path, "rb", buffering=0) as file:
                _receive(file, None, digest, size, advance)
        else:
            advance(size)
        with guard:
            can_clone = can_clone and method == "reflink"
            how[method] += 1

    # Large blobs first, so that all threads finish at about the same time.
    order = sorted(wanted, key=lambda digest: -wanted[digest])
    in_threads(copy_one, order, sum_progress(sum(wanted.values()), progress))
    return how


def _copy_blob(source: str, target: str, digest: Digest, size: int, can_clone: bool, advance: Advance) -> str:
    """Copy a blob; return how: as a ``reflink``, a ``hard link`` or a verified ``copy``."""
    try:
        file = open_regular(source, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise StorageError(f"the file of {digest} is missing: {_ADVICE}") from None
    with open(file, "rb", buffering=0) as opened:
        status = os.fstat(file)
        if status.st_size != size:
            raise StorageError(f"the file of {digest} has {status.st_size} bytes and should have {size}: {_ADVICE}")
        if can_clone and _clone(file, target):
            return "reflink"
        # Never share a file that others can write to: they could change the copy through its name in the source.
        is_private = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if is_private and _link(source, target, status):
            return "hard link"
        _receive(opened, Path(target), digest, size, advance)
        return "copy"


def _receive(source: Readable, target: Path | None, digest: Digest, size: int, advance: Advance) -> None:
    """Verify a blob, and write it to a new file if there is a target."""
    try:
        writer.receive(source, target, digest=digest, size=size, progress=advance, what=f"the file of {digest}")
    except DigestMismatch as error:
        raise DigestMismatch(f"{error}: {_ADVICE}") from error


def _clone(file: int, target: str) -> bool:
    """Create a reflink to an open file; return whether the file systems support it."""
    clone, is_cloned = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), False
    try:
        try:
            is_cloned = clone_content(file, clone)
        finally:
            if not is_cloned:
                os.unlink(target)
        if is_cloned:
            os.fchmod(clone, 0o444)
            os.fsync(clone)
        return is_cloned
    finally:
        os.close(clone)


def _link(source: str, target: str, status: os.stat_result) -> bool:
    """Create a hard link to an open file; return whether the file systems allow it."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno in _NOT_LINKABLE:
            return False
        raise
    if os.lstat(target).st_ino != status.st_ino:  # another file has the source's name by now
        os.unlink(target)
        return False
    return True
