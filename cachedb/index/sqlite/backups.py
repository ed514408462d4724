"""Make, list and delete backups of the index: copies in ``backups/`` with increasing numbers."""

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
from cachedb.disk import locks, turns
from cachedb.disk.durable import lock_part, remove_leftovers, sync_file, sync_folder
from cachedb.disk.existence import exists
from cachedb.disk.file_system import explain_shared
from cachedb.disk.folders import Folders, apply_folder_mode
from cachedb.disk.layout import quarantine_path
from cachedb.disk.waiting import Wait
from cachedb.errors import CacheReplaced, StorageError, ignore_os_errors, os_errors
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.replace import replace
from cachedb.reentry import not_reentered
from cachedb.threads import report_in_thread

__all__ = [
    "back_up",
    "back_up_before_change",
    "copy_snapshot",
    "keep_newest",
    "list_backups",
    "measure_change",
    "path_before_change",
    "put_in_place",
    "size_of",
]


KEPT = 3
"""How many backups from before schema changes are kept; backups that a user asked for all stay."""

_PART_PREFIX = ".backup-"  # of an unfinished backup; 32 random digits follow, so no user's file has such a name
_PART = re.compile(re.escape(_PART_PREFIX) + "[0-9a-f]{32}")
_JOURNAL = "-journal"  # the suffix of SQLite's file beside a database that it writes
_UNFINISHED = re.compile(r"\.backup-([a-z0-9_]{8}|[0-9a-f]{32})(-journal)?")
_BEFORE = "-before-"
_BEFORE_CHANGE = re.compile(r"[0-9]{6,}-[0-9]{4}-before-[0-9]{4}\.db")
_REBUILT = re.compile(r"[0-9]{6,}-rebuilt\.db")
_MAX_DIGITS = 18  # of a backup's number
_CHANGE_BYTES = 1024 * 1024  # disk space that a schema change takes, even for an empty index
_OPCODES = 1000  # of SQLite's virtual machine, between two progress reports
_PAGES = 1000  # copied before Python can handle a signal


def list_backups(directory: Path) -> list[Path]:
    """Return a cache's backups, newest first.

    The number in the name decides; a backup without a number comes last.
    """
    found = (path for path in (directory / "backups").glob("*.db") if path.is_file())
    return sorted(found, key=_number, reverse=True)


def back_up(
    database: Database,
    label: str,
    *,
    path: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Copy an index durably; the copy gets its name when it is complete.

    Backups in ``backups/`` are made one at a time.

    Args:
        database: the index to copy.
        label: the part of the backup's name after its number.
        path: the path of the backup, instead of a numbered one in ``backups/``.
        progress: called with the bytes copied so far and the total bytes.

    Returns:
        The path of the backup.

    Raises:
        StorageError: if the backup cannot be written.
    """
    folder, is_lockable = database.directory / "backups", False
    with os_errors("make a backup of the index"), ExitStack() as stack:
        if path is None or path.parent.resolve() == folder.resolve():
            folders = Folders(database.directory)
            with folders.open("backups"):
                pass  # before the lock file is created: raises if the folder is a link
            lock = folder / ".lock"
            stack.enter_context(not_reentered(os.path.realpath(lock), "making a backup of the index"))
            wait = Wait("the lock of backups", database.wait_seconds, lambda: _read_part_times(folder))
            stack.enter_context(wait)
            stack.enter_context(locks.hold_lock(lock, wait))
            wait.end()
            with folders.open("backups") as opened:
                # Killed processes left these unfinished backups and journals.
                for name in filter(_UNFINISHED.fullmatch, os.listdir(opened)):
                    with ignore_os_errors():  # somebody may have made a folder of that name
                        os.unlink(name, dir_fd=opened)
        elif is_lockable := not explain_shared(path.parent):
            remove_leftovers(path.parent, _PART, beside=_JOURNAL)
        path = path or _next_path(database.directory, label)
        part, file = _create_part(path)
        stack.callback(os.close, file)  # last, because closing it earlier would release SQLite's locks
        if is_lockable:
            lock_part(file)
        try:
            with report_in_thread(progress) as report, database.raw() as connection:
                _copy_index(connection, part, report)
            if path.parent == folder:
                apply_folder_mode(file, os.stat(database.directory))
            part.rename(path)
            sync_folder(path.parent)
        except BaseException:
            for made in (part, part.with_name(part.name + _JOURNAL)):
                with ignore_os_errors():
                    made.unlink()
            raise
    return path


def _create_part(path: Path) -> tuple[Path, int]:
    """Create the empty file that SQLite writes a backup to; return its path and descriptor."""
    part = path.with_name(f"{_PART_PREFIX}{secrets.token_hex(16)}")
    try:
        return part, os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # name the path that the caller asked for


def _copy_index(connection: sqlite3.Connection, part: Path, progress: Callable[[int, int], None] | None) -> None:
    size, callbacks = size_of(connection), Callbacks()

    def report() -> bool:
        if progress is not None:
            progress(min(part.stat().st_size, size), size)
        return False

    connection.set_progress_handler(callbacks.progress_handler(report), _OPCODES)
    try:
        connection.execute("PRAGMA query_only = OFF")  # it is on for a copy in memory, see `take_snapshot`
        # A URI, because a path may contain bytes that are not text.
        connection.execute("VACUUM INTO ?", (part.as_uri(),))
    except sqlite3.OperationalError:
        callbacks.raise_again()
        raise
    finally:
        connection.set_progress_handler(None, 0)
    callbacks.raise_again()
    sync_file(part)


def _read_part_times(folder: Path) -> list[tuple[str, int]]:
    """Return the unfinished backups with their modification times, which change while SQLite writes them."""
    found = []
    for part in folder.glob(f"{_PART_PREFIX}*"):
        with suppress(FileNotFoundError):
            found.append((part.name, part.stat().st_mtime_ns))
    return found


def copy_snapshot(connection: sqlite3.Connection, path: Path) -> None:
    """Copy an index, as the connection's transaction sees it, into an empty file."""
    with closing(sqlite3.connect(path.as_uri(), uri=True, isolation_level=None)) as target:
        # Python raises an interrupt only while Python code runs: in this callback.
        connection.backup(target, pages=_PAGES, progress=lambda _status, _left, _total: None)


def back_up_before_change(
    database: Database,
    old: str,
    new: str,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Back up the index before a schema change, if the disk has space for the backup and the change.

    Raises:
        StorageError: if the disk has too little free space, or the backup cannot be written.
    """
    needed = measure_change(database)
    free = shutil.disk_usage(database.directory).free
    if free < needed:
        raise StorageError(
            f"the schema was not changed: a backup of the index and the change take up to {needed} bytes of disk, "
            f"and {free} are free: free some space (`cachedb gc` may help) and try again"
        )
    path = back_up(database, _label_before(old, new), progress=progress)
    keep_newest(database.directory, KEPT + 1)  # keep the earlier ones until the change succeeds
    return path


def measure_change(database: Database) -> int:
    """Return the most bytes of disk that a schema change takes, with its backup."""
    # SQLite writes the change to the WAL first, and to the index later.
    with database.raw() as connection:
        return 2 * size_of(connection) + _CHANGE_BYTES


def path_before_change(directory: Path, old: str, new: str) -> Path:
    """Return the path that `back_up_before_change` would give a backup now."""
    return _next_path(directory, _label_before(old, new))


def _label_before(old: str, new: str) -> str:
    return f"{old}{_BEFORE}{new}"


def keep_newest(directory: Path, count: int = KEPT) -> None:
    """Delete old backups from before schema changes; keep the newest ``count``."""
    with os_errors("delete an old backup"):
        folders = Folders(directory)
        for path in [path for path in list_backups(directory) if _BEFORE_CHANGE.fullmatch(path.name)][count:]:
            folders.remove(f"backups/{path.name}")


def size_of(connection: sqlite3.Connection) -> int:
    """Return the size of an index in bytes."""
    (pages,), (size,) = (connection.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size"))
    return int(pages) * int(size)


def put_in_place(database: Database, turn: turns.Turn, new: Path) -> Path | None:
    """Replace the index by a new one. The caller holds the write lock.

    The new index moves to ``backups/`` first, so a crash after the old WAL was moved away loses nothing.

    Args:
        database: the index to replace.
        turn: the write lock that the caller holds.
        new: the new index, a closed database in a single file.

    Returns:
        The path of a copy of the old index, or None if there was none.

    Raises:
        CacheReplaced: if the write lock is lost; the old index stays.
        StorageError: if the new index still has a WAL, because SQLite could not write it back.
    """
    if exists(new.with_name(f"{new.name}-wal")):
        raise StorageError("the new index is incomplete, because its WAL could not be written back: try again")
    staged = _next_path(database.directory, "rebuilt")
    source_folder = new.parent.relative_to(database.directory)
    with database.folders.open(str(source_folder)) as source, database.folders.open("backups") as target:
        file = os.open(new.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source)
        try:
            apply_folder_mode(file, database.folders.status)
        finally:
            os.close(file)
        os.rename(new.name, staged.name, src_dir_fd=source, dst_dir_fd=target)
        os.fsync(target)
    old = quarantine_path(database.directory, "index.db", beside=("-wal",))
    try:
        found = replace(database, turn, staged, old)
    except CacheReplaced:
        staged.unlink(missing_ok=True)  # it may lack rows that another process has written since
        old.unlink(missing_ok=True)
        raise
    # Interrupted calls of this function left these.
    for name in filter(_REBUILT.fullmatch, os.listdir(staged.parent)):
        with ignore_os_errors():
            database.folders.remove(f"backups/{name}")
    return old if found else None


def _next_path(directory: Path, label: str) -> Path:
    """Return the path of the next backup; it is numbered, because a clock may be set back."""
    folder = directory / "backups"
    number = 1 + max((_number(path)[0] for path in folder.glob("*-*.db")), default=0)
    return folder / f"{number:06}-{label}.db"


def _number(path: Path) -> tuple[int, str]:
    number = path.name.partition("-")[0]
    # With a longer number, the name of the next backup could be too long.
    return int(number) if number.isdecimal() and len(number) <= _MAX_DIGITS else 0, path.name
