"""The index's database: connections, transactions, and all that is particular to SQLite.

One write lock serialises every change of the index and every rename into or out of ``blobs/``. It is a
lock file and not SQLite's own lock, for waiting at the file is fair and bounded, while SQLite's busy
handler starves; and it keeps all our writers and checkpoints apart, which closes the WAL-reset bug of
SQLite 3.7.0 to 3.51.2. Readers take no lock: they see the last commit.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine import ExceptionContext

from cachedb import locks
from cachedb.errors import NotACache, SchemaMismatch, StorageError, os_errors
from cachedb.models import REVISION

__all__ = ["Database", "default_directory", "sync_folder"]

APPLICATION_ID = 0x63616462  # "cadb": marks an index.db as ours (PRAGMA application_id)
FOLDERS = ("blobs", "blobs/sha256", "blobs/sha512", "ingest", "trash", "locks", "backups")
_OURS = {"blobs", "ingest", "trash", "locks", "backups", "quarantine", "lost+found"}
# Our own writers wait at the lock file; this is for a person with a SQL shell, and for recovery after a crash.
_BUSY_TIMEOUT = 60_000  # milliseconds


def default_directory() -> Path:
    """Return the cache directory: ``CACHEDB_DIR``, else the user's cache directory of the platform."""
    if directory := os.environ.get("CACHEDB_DIR"):
        return Path(directory)
    import platformdirs

    return Path(platformdirs.user_cache_dir("cachedb"))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Database:
    """The ``index.db`` of a cache directory. Usable from several threads, and in a forked child.

    SQLite notes in memory which locks its process holds on a file. A child that is forked while a connection
    is open inherits the note and not the locks, and what it commits is lost when its parent closes. So a
    fork waits until no other thread is in a transaction, and all connections are closed before it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "index.db"
        self._engine = self._connect()
        locks.before_fork(self)

    def _connect(self) -> Engine:
        url = URL.create("sqlite", database=str(self.path))
        # As many connections as there are threads: a thread that finds none free must not fail.
        engine = create_engine(url, max_overflow=-1)
        event.listen(engine, "connect", _on_connect)
        event.listen(engine, "begin", _on_begin)
        event.listen(engine, "handle_error", _on_error)
        return engine

    def prepare(self) -> None:
        """Make the directory and its folders, unless they are there; refuse what is not ours.

        Raises:
            NotACache: if the directory holds something else.
            StorageError: if it cannot be made or read.
        """
        with os_errors("use the cache directory"):
            missing = [folder for folder in (self.directory, *self.directory.parents) if not folder.exists()]
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in missing:
                sync_folder(folder.parent)
            if self._is_new():
                strange = {entry.name for entry in self.directory.iterdir()} - _OURS
                strange = {name for name in strange if not name.startswith("index.db")}
                if strange:
                    raise NotACache(
                        f"{str(self.directory)!r} is not a cache, and not empty (it holds {min(strange)!r}): "
                        "name another directory"
                    )
            revision = self.revision()
            for name in FOLDERS:
                (self.directory / name).mkdir(mode=0o700, exist_ok=True)
            if revision is None:
                sync_folder(self.directory / "blobs")
                sync_folder(self.directory)

    def _is_new(self) -> bool:
        # An empty file is one that its creator, under the write lock, is about to switch to WAL.
        return not self.path.exists() or not self.path.stat().st_size

    def revision(self) -> str | None:
        """Return the schema's revision, or None if the database has no schema yet.

        Raises:
            NotACache: if the database is somebody else's.
        """
        if self._is_new():
            return None
        with self.read() as connection:
            mark = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
            if mark != APPLICATION_ID and not (mark == 0 and is_empty(connection)):
                raise NotACache(f"{str(self.path)!r} is another program's database: name another directory")
            return read_revision(connection)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A read transaction: all its statements see the index at one moment."""
        with locks.unforked(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A write transaction under the write lock; committed at the end of the block, rolled back on an error.

        Raises:
            SchemaMismatch: before anything is written, if the schema is not the one this release works with.
            StorageError: if the file system or SQLite fails.
        """
        with self._locked() as connection:
            revision = read_revision(connection)
            if revision != REVISION:
                raise mismatch(self.directory, revision)
            yield connection

    @contextmanager
    def write_schema(self) -> Iterator[Connection]:
        """A write transaction for a migration: whatever the schema, with foreign keys not enforced meanwhile."""
        with self._locked(schema=True) as connection:
            yield connection
            connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")

    @contextmanager
    def _locked(self, *, schema: bool = False) -> Iterator[Connection]:
        with (
            os_errors("write to the cache"),
            locks.unforked(),
            locks.held(self.directory / "locks" / "write.lock"),
            self._engine.connect() as connection,
        ):
            if schema:
                # Neither can be changed in a transaction; the first stays with the file.
                driver = connection.connection.driver_connection
                assert isinstance(driver, sqlite3.Connection)
                with _sqlite_errors():
                    driver.execute("PRAGMA journal_mode = WAL")
                    driver.execute("PRAGMA foreign_keys = OFF")
            try:
                with connection.execution_options(cachedb_begin="BEGIN IMMEDIATE").begin():
                    yield connection
            finally:
                if schema:
                    connection.invalidate()

    def close(self) -> None:
        """Close all connections that are not in use; they are opened again when they are needed."""
        self._engine.dispose()


def mismatch(directory: Path, revision: str | None) -> SchemaMismatch:
    """Return the error for a schema that is older or newer than ours."""
    if revision is None or revision < REVISION:
        return SchemaMismatch(
            f"the index in {str(directory)!r} has schema {revision or 'none'}, and this release needs {REVISION}: "
            "open it with Cache.open(upgrade=True) to upgrade it"
        )
    return SchemaMismatch(
        f"the index in {str(directory)!r} has schema {revision}, and this release knows {REVISION} at most: "
        "use a newer release of cachedb"
    )


def is_empty(connection: Connection) -> bool:
    """Say whether nothing was ever written to this database."""
    return connection.exec_driver_sql("SELECT 1 FROM sqlite_master LIMIT 1").first() is None


def read_revision(connection: Connection) -> str | None:
    """Return the schema's revision, or None if there is none."""
    exists = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'alembic_version'"
    if connection.exec_driver_sql(exists).first() is None:
        return None
    revision = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    return None if revision is None else str(revision)


def _on_connect(connection: Any, _record: object) -> None:  # noqa: ANN401
    connection.isolation_level = None  # the driver begins no transactions of its own: we do, DDL included
    connection.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT}")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _on_begin(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("cachedb_begin", "BEGIN"))


def _on_error(context: ExceptionContext) -> None:
    error = context.original_exception
    if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.IntegrityError):
        raise _translated(error) from error


@contextmanager
def _sqlite_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise _translated(error) from error


def _translated(error: sqlite3.DatabaseError) -> StorageError | NotACache:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_NOTADB:
        return NotACache("index.db is not an SQLite database: name another directory")
    advice = {
        sqlite3.SQLITE_FULL: "free some space and try again",
        sqlite3.SQLITE_READONLY: "check the owner and mode of the cache directory",
        sqlite3.SQLITE_CANTOPEN: "check the owner and mode of the cache directory",
        sqlite3.SQLITE_BUSY: "another program holds the database in a transaction; end it and try again",
        sqlite3.SQLITE_IOERR: "the disk may be full, or failing",
        sqlite3.SQLITE_CORRUPT: "restore it from a backup",
    }.get(code)
    return StorageError(f"the index failed: {error}" + (f"; {advice}" if advice else ""))
