"""Turn SQLite's error codes and texts into our errors."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import IntegrityError

from cachedb import space
from cachedb.disk import lock_holders
from cachedb.disk.reserve import RESERVE_BYTES
from cachedb.errors import Busy, DamagedIndex, NotACache, StorageError, explain
from cachedb.index.sqlite.revision import REBUILD_ADVICE, is_ours

__all__ = ["FAILURES", "explain_path_limit", "missing_row_errors", "sqlite_errors", "translate"]


# SQLite reports some damage without an error code of its own. Then the message begins with one of these texts.
DAMAGED_TEXTS = (
    "no such ",
    "unsupported file format",
    "malformed ",
    "Could not decode to UTF-8",
)
FAILURES = (sqlite3.DatabaseError, UnicodeDecodeError)  # UnicodeDecodeError: SQLite's message quotes damaged text
_PATH_LIMIT = 512 - len("-journal")  # bytes: SQLite's MAX_PATHNAME, less its longest suffix


@contextmanager
def sqlite_errors(path: Path, directory: Path) -> Iterator[None]:
    """Turn SQLite's errors in the block into ours.

    Args:
        path: the path of the index.
        directory: the cache directory.
    """
    try:
        yield
    except FAILURES as error:
        raise translate(error, path, directory) from error


@contextmanager
def missing_row_errors() -> Iterator[None]:
    """Turn a failed foreign key in the block into `DamagedIndex`.

    Programs that delete rows do not check foreign keys unless they ask SQLite to.
    """
    try:
        yield
    except IntegrityError as error:
        if "FOREIGN KEY" not in str(error.orig):
            raise
        raise DamagedIndex(f"the index is damaged: {error.orig}: {REBUILD_ADVICE}") from error


def translate(
    error: sqlite3.DatabaseError | UnicodeDecodeError, path: Path, directory: Path
) -> StorageError | NotACache | Busy:
    """Return our error for an error of SQLite.

    Args:
        error: the error of the driver.
        path: the path of the index.
        directory: the cache directory.
    """
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_BUSY:
        holder = lock_holders.find_index_writer(path)
        return Busy(f"{holder} has locked the index in a transaction: end it, or try again later", holder)
    damaged = code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or str(error).startswith(DAMAGED_TEXTS)
    damaged = damaged or isinstance(error, UnicodeDecodeError)
    if damaged and is_ours(directory):
        return DamagedIndex(f"the index is damaged: {error}: {REBUILD_ADVICE}")
    if code == sqlite3.SQLITE_NOTADB:
        return NotACache("index.db is not an SQLite database: name another directory")
    if code == sqlite3.SQLITE_CANTOPEN and (reason := explain_path_limit(path)):
        return StorageError(reason)
    advice = {
        sqlite3.SQLITE_FULL: "free some space and try again",
        sqlite3.SQLITE_READONLY: "check the owner and mode of the cache directory",
        sqlite3.SQLITE_CANTOPEN: "check the owner and mode of the cache directory, and the limit on open files",
        sqlite3.SQLITE_IOERR: "the disk may be failing: see the kernel's log",
    }.get(code)
    if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_IOERR_NOMEM:
        advice = "there is not enough memory"
    elif getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY_ROLLBACK:
        advice = "another program was killed while it wrote: run `cachedb verify` as a user who may write to the cache"
    elif code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
        sizes = (_size(f"{path}{suffix}") for suffix in ("", "-wal", "-shm"))
        if shortage := space.find_shortage(directory, RESERVE_BYTES, offset=max(sizes)):
            return StorageError(f"the index failed: {error}: {explain(shortage)}", errno=shortage.errno)
    return StorageError(f"the index failed: {error}" + (f": {advice}" if advice else ""))


def explain_path_limit(path: Path) -> str | None:
    """Return why SQLite cannot open a path that is too long; None if the path is short enough."""
    # SQLite follows symbolic links, so the path that they lead to counts too.
    length = max(len(os.fsencode(path)), len(os.fsencode(os.path.realpath(path))))
    if length <= _PATH_LIMIT:
        return None
    return (
        f"the path of the index has {length} bytes, and SQLite takes {_PATH_LIMIT} at most: "
        "choose a cache directory with a shorter path, with --dir or CACHEDB_DIR"
    )


def _size(path: str) -> int:
    """Return the size of a file in bytes, or 0 if it does not exist."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
