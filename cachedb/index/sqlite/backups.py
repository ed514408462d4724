"""Backups of the index: copies in ``backups/``, numbered in the order they were made."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from pathlib import Path

from cachedb.callbacks import Callbacks
from cachedb.disk import locks
from cachedb.disk.durable import lock_part, remove_leftovers, sync_file, sync_folder
from cachedb.disk.file_system import refuse_shared
from cachedb.disk.folders import Folders, follow
from cachedb.disk.layout import quarantine_path
from cachedb.disk.waiting import Wait, chosen_seconds
from cachedb.errors import CacheReplaced, StorageError, ignore_os_errors, os_errors
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.replace import replace
from cachedb.reentry import not_reentered
from cachedb.threads import told_beside

__all__ = ["back_up", "before_change", "copy_snapshot", "keep_newest", "newest_first", "put_in_place", "size_of"]


KEPT = 3
"""Backups from before changes of the schema that are kept; those that a person asked for all are."""

_HALF = ".backup-"  # how the name of one that is being written begins; the rest is by chance, and no person's
_HALVES = re.compile(re.escape(_HALF) + "[0-9a-f]{32}")
_JOURNAL = "-journal"  # SQLite's, beside it
_UNFINISHED = re.compile(r"\.backup-([a-z0-9_]{8}|[0-9a-f]{32})(-journal)?")
_BEFORE = "-before-"
_BEFORE_CHANGE = re.compile(r"[0-9]{6,}-[0-9]{4}-before-[0-9]{4}\.db")
_REBUILT = re.compile(r"[0-9]{6,}-rebuilt\.db")
_CHANGE = 1024 * 1024  # bytes that a change of the schema takes, whatever the size of the index
_OPCODES = 1000  # of SQLite's, between two looks at how far it is
_PAGES = 1000  # copied between two looks for an interrupt


def newest_first(directory: Path) -> list[Path]:
    """Return a cache's backups by the numbers in front of their names; those without one are older than all others."""
    return sorted((directory / "backups").glob("*.db"), key=_number, reverse=True)


def back_up(
    database: Database,
    label: str,
    *,
    path: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Copy an index, durably; the copy has its name when all of it is there. In ``backups/``, one is made at a time.

    Args:
        database: of the cache.
        label: what to call it, after its number.
        path: of the copy, instead of a numbered one in ``backups/``.
        progress: is told how far it is, in bytes.

    Returns:
        Where it is.

    Raises:
        StorageError: if it cannot be written.
    """
    folder, lockable = database.directory / "backups", False
    with os_errors("make a backup of the index"), ExitStack() as stack:
        if path is None or path.parent.resolve() == folder.resolve():
            folders = Folders(database.directory)
            with folders.open("backups"):
                pass  # before the lock file is made: a link is refused
            lock = folder / ".lock"
            stack.enter_context(not_reentered(os.path.realpath(lock), "making a backup of the index"))
            wait = stack.enter_context(Wait("the lock of backups", chosen_seconds(), lambda: _halves(folder)))
            stack.enter_context(locks.held(lock, wait))
            with folders.open("backups") as opened:
                for name in filter(_UNFINISHED.fullmatch, os.listdir(opened)):
                    os.unlink(name, dir_fd=opened)  # of one that was killed, as is its journal
        elif lockable := not refuse_shared(path.parent):
            remove_leftovers(path.parent, _HALVES, beside=_JOURNAL)
        path = path or _free(database.directory, label)
        half, file = _new_half(path)
        stack.callback(os.close, file)  # after SQLite's own is closed, or SQLite would lose its locks
        if lockable:
            lock_part(file)
        try:
            with told_beside(progress) as told, database.raw() as connection:
                _copy(connection, half, told)
            if path.parent == folder:
                follow(file, os.stat(database.directory))
            half.rename(path)
            sync_folder(path.parent)
        except BaseException:
            for made in (half, half.with_name(half.name + _JOURNAL)):
                with ignore_os_errors():
                    made.unlink()
            raise
    return path


def _new_half(path: Path) -> tuple[Path, int]:
    """Make the empty file that is to become a backup, which SQLite writes into as into none; return it opened."""
    half = path.with_name(f"{_HALF}{secrets.token_hex(16)}")
    try:
        return half, os.open(half, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # by the name that somebody has asked for


def _copy(connection: sqlite3.Connection, half: Path, progress: Callable[[int, int], None] | None) -> None:
    size, callbacks = size_of(connection), Callbacks()

    def report() -> bool:
        if progress is not None:
            progress(min(half.stat().st_size, size), size)
        return False

    connection.set_progress_handler(callbacks.progress_handler(report), _OPCODES)
    try:
        connection.execute("PRAGMA query_only = OFF")  # what is read without locks is a copy in memory, to be read only
        # As a URI, for a path need not be text.
        connection.execute("VACUUM INTO ?", (half.as_uri(),))
    except sqlite3.OperationalError:
        callbacks.raise_again()
        raise
    finally:
        connection.set_progress_handler(None, 0)
    callbacks.raise_again()
    sync_file(half)


def _halves(folder: Path) -> list[tuple[str, int]]:
    """Return the copies that are being written, with what changes while they are."""
    found = []
    for half in folder.glob(f"{_HALF}*"):
        with suppress(FileNotFoundError):
            found.append((half.name, half.stat().st_mtime_ns))
    return found


def copy_snapshot(connection: sqlite3.Connection, path: Path) -> None:
    """Copy an index into an empty file as the connection's transaction sees it."""
    with closing(sqlite3.connect(path.as_uri(), uri=True, isolation_level=None)) as target:
        # An interrupt is raised where Python runs: in the callback.
        connection.backup(target, pages=_PAGES, progress=lambda _status, _left, _total: None)


def before_change(
    database: Database,
    old: str,
    new: str,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Make the backup from before the schema is changed, as `back_up` does, if there is space for both.

    Raises:
        StorageError: if the disk has too little space left, or the backup cannot be written.
    """
    # The change is in the WAL before it is in the index.
    with database.raw() as connection:
        needed = 2 * size_of(connection) + _CHANGE
    free = shutil.disk_usage(database.directory).free
    if free < needed:
        raise StorageError(
            f"the schema was not changed: a backup of the index and the change take up to {needed} bytes of disk, "
            f"and {free} are free; free some space (`cachedb gc` may help) and try again"
        )
    path = back_up(database, f"{old}{_BEFORE}{new}", progress=progress)
    keep_newest(database.directory, KEPT + 1)  # those there were, until the change is made
    return path


def keep_newest(directory: Path, count: int = KEPT) -> None:
    """Delete all but the newest of the backups from before changes of the schema."""
    with os_errors("delete an old backup"):
        folders = Folders(directory)
        for path in [path for path in newest_first(directory) if _BEFORE_CHANGE.fullmatch(path.name)][count:]:
            folders.remove(f"backups/{path.name}")


def size_of(connection: sqlite3.Connection) -> int:
    """Return the size in bytes of an index."""
    (pages,), (size,) = (connection.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size"))
    return int(pages) * int(size)


def put_in_place(database: Database, turn: locks.Turn, new: Path) -> Path | None:
    """Put a new index in the place of the old one, under the write lock.

    It is put among the backups first, so that a crash after the old one's WAL was taken away loses nothing.

    Args:
        database: whose index it is to be.
        turn: the write lock, as it is held.
        new: a closed one, in one file.

    Returns:
        Where a copy of the old one is, if there was one.

    Raises:
        CacheReplaced: if the write lock is lost; the old index stays.
        StorageError: if the new one has a WAL still, for it could not be written back.
    """
    if new.with_name(f"{new.name}-wal").exists():
        raise StorageError("the new index is not whole: its WAL could not be written back to it; try again")
    waiting = _free(database.directory, "rebuilt")
    made_in = new.parent.relative_to(database.directory)
    with database.folders.open(str(made_in)) as source, database.folders.open("backups") as target:
        file = os.open(new.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source)
        try:
            follow(file, database.folders.status)
        finally:
            os.close(file)
        os.rename(new.name, waiting.name, src_dir_fd=source, dst_dir_fd=target)
        os.fsync(target)
    old = quarantine_path(database.directory, "index.db", beside=("-wal",))
    try:
        found = replace(database, turn, waiting, old)
    except CacheReplaced:
        waiting.unlink(missing_ok=True)  # it may lack what another process has written since
        old.unlink(missing_ok=True)
        raise
    for name in filter(_REBUILT.fullmatch, os.listdir(waiting.parent)):
        database.folders.remove(f"backups/{name}")  # of one that was cut off, from which this one began
    return old if found else None


def _free(directory: Path, label: str) -> Path:
    """Return a path with the next number: a clock that is set back must not make an old backup the newest."""
    folder = directory / "backups"
    number = 1 + max((_number(path)[0] for path in folder.glob("*-*.db")), default=0)
    return folder / f"{number:06}-{label}.db"


def _number(path: Path) -> tuple[int, str]:
    number = path.name.partition("-")[0]
    return int(number) if number.isdecimal() else 0, path.name
