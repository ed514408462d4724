"""Prepare a cache directory: create or check its marker and folders, and check copies of caches."""

from __future__ import annotations

import os
import re
import sqlite3
from contextlib import closing, suppress
from itertools import filterfalse, islice
from pathlib import Path

from cachedb.disk import locks, marker, turns
from cachedb.disk.durable import sync_folder
from cachedb.disk.existence import exists
from cachedb.disk.file_system import check_features, explain_shared
from cachedb.disk.folders import FOLDERS, Folders
from cachedb.disk.layout import POLICY_FILE, blob_file
from cachedb.disk.listing import list_names
from cachedb.errors import CacheError, DamagedIndex, NotACache, StorageError, os_errors
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.errors import explain_path_limit
from cachedb.index.sqlite.revision import APPLICATION_ID, find_broken_keys, has_backup, has_cache, no_cache_error
from cachedb.oci.digests import Digest

__all__ = ["accept_copy", "has_our_mark", "prepare"]

_TRANSIENT = re.compile(
    rf"{marker.UNFINISHED_MARKER.pattern}|index\.db-test-.*"
)  # files that exist while another process creates the cache


def prepare(database: Database, *, create: bool = True) -> str | None:
    """Create the directory and its folders unless they exist; refuse a directory that is not a cache.

    Args:
        database: the index of the directory.
        create: create a cache if there is none.

    Returns:
        The schema's revision, as `Database.revision` returns it.

    Raises:
        NotACache: if the directory holds other files.
        NotInCache: if there is no cache, and ``create`` is false.
        NotOurs: if the directory belongs to another user, or a folder in it leads out of the cache.
        StorageError: if the directory cannot be created or read.
    """
    if reason := explain_shared(database.directory) or explain_path_limit(database.path):
        raise StorageError(reason)
    if not create and not has_cache(database.directory):
        raise _absence_error(database)
    if database.read_only:
        revision = database.revision()
        with os_errors("use the cache directory"):
            folders = Folders(database.directory)
            folders.mark(new=False)
            if folders.is_copy and revision is not None:
                _check_copy(database, folders)  # at each open, because the result cannot be stored
        return revision
    with os_errors("use the cache directory"):
        missing = [folder for folder in (database.directory, *database.directory.parents) if not exists(folder)]
        with suppress(FileExistsError):
            database.directory.mkdir(mode=0o700, parents=True)
            database.directory.chmod(0o700)  # whatever the umask
        for folder in missing:
            sync_folder(folder.parent)
        _write_marker(database)
        for name in FOLDERS:
            database.folders.make(name)
            with database.folders.open(name):
                pass  # raises if the folder is a link; each change checks this again
        revision = database.revision()
        if revision is None:
            sync_folder(database.directory / "blobs")
            sync_folder(database.directory)
        elif database.folders.is_copy or database.folders.is_overwritten:
            accept_copy(database, check=True)
        elif database.folders.is_outdated:
            _refresh_marker(database)
        return revision


def accept_copy(database: Database, *, check: bool) -> None:
    """Turn a copy that was made file by file into a cache of its own, unless it is one already.

    The copy may have been made over a cache.

    Args:
        database: the index of the copy.
        check: check that the index is sound and its blobs exist.

    Raises:
        DamagedIndex: if the check fails.
    """
    with (
        database.write_wait() as wait,
        os_errors("use the cache directory"),
        turns.hold_in_turn(database.write_lock, wait=wait) as turn,
    ):
        database.folders.mark(new=False)  # another process may have done so meanwhile
        if database.folders.is_copy or database.folders.is_overwritten:
            if check:
                _check_copy(database, database.folders)
            turn.check("the copy was not accepted: try again")
            with suppress(OSError):  # if the disk is full, the next open checks again
                database.folders.accept_copy()


def _refresh_marker(database: Database) -> None:
    """Update the path in the marker; if another process is writing, leave it to a later open."""
    with suppress(OSError):  # if the disk is full, leave it to a later open
        lock = locks.acquire(database.write_lock, wait=False)
        if lock is not None:
            try:
                database.folders.refresh_marker()
            finally:
                locks.release(lock)


def has_our_mark(database: Database) -> bool:
    """Return whether the index has our application_id.

    It identifies caches of older releases, which have no marker.
    """
    if database.file.is_new:
        return False
    mark = "PRAGMA application_id"
    with suppress(CacheError), database.look() as connection:
        return bool(connection.exec_driver_sql(mark).scalar_one() == APPLICATION_ID)
    # A damaged index may still have its header. Let SQLite read it: if this process opened and closed the file itself,
    # SQLite would lose its locks on it.
    with (
        suppress(sqlite3.Error),
        closing(sqlite3.connect(f"{database.path.as_uri()}?mode=ro&immutable=1", uri=True)) as damaged,
    ):
        damaged.execute("PRAGMA writable_schema = ON")  # otherwise SQLite refuses a truncated file
        return bool(damaged.execute(mark).fetchone() == (APPLICATION_ID,))
    return False


def _check_copy(database: Database, folders: Folders) -> None:
    """Raise if the files of a copy were copied at different states of the cache.

    The copy may have any schema, because it is not upgraded yet.

    SQLite applies a WAL to any index beside it, even to one copied before a checkpoint. A directory without a marker
    may be a cache of an older release, which is useful even if a blob is missing; so its blobs are not checked. Nor are
    those of a cache whose marker was changed in its place, because `chown -R` changes it too.
    """
    with database.look() as connection:
        found = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar()
        faults = [] if found == "ok" else [str(found)]
        faults.extend(islice(find_broken_keys(connection), 1))
        if not faults and folders.had_marker and folders.is_copy:
            query = "SELECT digest, size FROM blobs WHERE stored_at IS NOT NULL"
            for digest, size in connection.exec_driver_sql(query):
                try:
                    is_there = os.stat(blob_file(database.directory, Digest(digest))).st_size == size
                except FileNotFoundError:
                    is_there = False
                if not is_there:
                    faults.append(f"{digest} is missing or has another size")
                    break
    if faults:
        raise DamagedIndex(
            f"{str(database.directory)!r} is a damaged copy of a cache ({faults[0]}): copy it again with "
            "`cachedb copy`, or run `cachedb verify --repair` on it"
        )


def _absence_error(database: Database) -> CacheError:
    """Return the error for a directory without a cache, which need not exist."""
    with os_errors("use the cache directory"):
        if database.directory.is_dir() and (found := _find_strange_file(database, database.directory)):
            return _not_a_cache_error(database, found)
        return no_cache_error(database.directory)


def _find_strange_file(database: Database, folder: Path | int) -> str | None:
    """Return the name of a file that keeps a directory from becoming a cache; None without one."""
    names = list_names(folder) if isinstance(folder, int) else os.listdir(folder)
    strange = set(filterfalse(_TRANSIENT.fullmatch, names))
    strange -= {"lost+found", POLICY_FILE} | ({"index.db"} if database.file.is_new else set())
    return min(strange, default=None)


def _not_a_cache_error(database: Database, strange: str) -> NotACache:
    return NotACache(
        f"{str(database.directory)!r} has no {marker.MARKER!r} and is not empty (it holds {strange!r}): "
        "name another directory"
    )


def _write_marker(database: Database) -> None:
    """Check that the directory is a cache or can become one, and write its marker.

    Raises:
        NotACache: if the directory holds other files.
    """
    if not database.folders.is_marked and not has_our_mark(database) and not has_backup(database.directory):
        strange = _find_strange_file(database, database.folders.root)
        # Another process may have written the marker meanwhile.
        if strange and marker.read(database.folders.root) is None:
            database.revision()  # raises if the index belongs to another program
            raise _not_a_cache_error(database, strange)
    if database.file.is_new and not database.folders.is_marked:
        check_features(database.directory)
    database.folders.mark(new=True, is_sound=database.file.is_new)
