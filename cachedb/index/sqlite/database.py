"""The index's database: connections and transactions.

One write lock serialises every change of the index and every rename into or out of ``blobs/``. It is a lock file,
because a wait for it is fair and bounded. SQLite's own lock is not fair: a waiting writer may starve. The write lock
also keeps writers and checkpoints apart, which avoids the WAL-reset bug of SQLite 3.7.0 to 3.51.2. Readers take no
lock: they see the last commit.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Select, event
from sqlalchemy.exc import DisconnectionError

from cachedb.disk import forks, lock_holders, locks, turns
from cachedb.disk.access import Access
from cachedb.disk.folders import Folders
from cachedb.disk.reserve import NO_ROOM_ERRNOS, Reserve
from cachedb.disk.waiting import Wait, choose_wait_seconds
from cachedb.errors import Busy, CacheError, CacheReplaced, StorageError, os_errors
from cachedb.index.sqlite.connection import (
    CacheConnection,
    IndexChanged,
    connect,
    lost_files_error,
    pause_before_retry,
    take_snapshot,
)
from cachedb.index.sqlite.engine import make_engine
from cachedb.index.sqlite.errors import missing_row_errors, sqlite_errors
from cachedb.index.sqlite.file import IndexFile
from cachedb.index.sqlite.lookups import Lookups
from cachedb.index.sqlite.revision import (
    APPLICATION_ID,
    SELECT_REVISION,
    is_compatible,
    lost_index_error,
    read_own_revision,
    schema_error,
)
from cachedb.index.sqlite.transaction import driver_of, ensure_wal, immediate, read_first, transaction
from cachedb.index.tables import REVISION
from cachedb.reentry import holding, is_held, not_reentered

__all__ = ["CLOSED", "Database"]

T = TypeVar("T")

# Processes of cachedb wait for the lock file. While another program writes, they wait without the lock file, so that
# they do not also wait for each other.
_OUTSIDER_NAPS = (0.02, 0.25)  # seconds between two tries: at first, and at most
CLOSED = "this cache is closed: open it again with Cache.open"


class Database:
    """The ``index.db`` of a cache directory. Usable from several threads, and in a forked child.

    SQLite records in memory which locks its process holds on a file. A child that is forked while a connection is open
    inherits the record, but not the locks. It would lose its commits when its parent closes the connection. So a fork
    waits until no other thread is in a transaction, and closes all connections first. A transaction waits for other
    processes only before it begins, so a fork never waits for another process.
    """

    def __init__(
        self, directory: Path, path: Path | None = None, *, trust: bool = False, wait: float | None = None
    ) -> None:
        """Name the index; nothing is opened yet.

        Args:
            directory: of the cache.
            path: of another index, such as a backup; the default is ``index.db``.
            trust: work with a directory of another user.
            wait: seconds to wait for a lock of another process; the default is that of `choose_wait_seconds`.
        """
        self.wait_seconds = choose_wait_seconds(wait)
        self.directory = directory.absolute()
        self.path = (path or directory / "index.db").absolute()
        self.file = IndexFile(self.path, self.directory)
        self.write_lock = self.file.write_lock
        self.access = Access(self.directory, self.path, trust=trust, search_links=path is None)
        self._engine = make_engine(self.path, self.directory, self._open)
        event.listen(self._engine, "checkout", self._check_out)
        event.listen(self._engine, "checkin", self._check_in)
        self._lookups = Lookups(self._open, self._is_current)
        self.reserve = Reserve(self.directory, lambda: self.folders)
        self.ended = False  # by `end`
        forks.close_before_fork(self)

    def identify_file(self) -> tuple[int, int, str]:
        """Return the identity of ``index.db``, as `IndexFile.identify` does."""
        try:
            return self.file.identify(read_only=self.read_only)
        except FileNotFoundError:
            self.access.check()
            raise lost_index_error(self.directory) from None
        except OSError:
            with os_errors("open the index"):  # only here, because each look-up identifies the file
                raise

    def no_replacement(self) -> AbstractContextManager[None]:
        """Keep other processes from replacing the index in this block; a read-only cache has no such lock."""
        return nullcontext() if self.read_only else self.file.no_replacement()

    def _open(self, *, read_only: bool = False) -> CacheConnection:
        """Open a connection to the index file; only `write_schema` creates that file."""
        if self.ended:
            raise CacheError(CLOSED)
        self.access.check()
        with self.no_replacement():
            file = self.identify_file()
            self.file.check_beside(read_only=self.read_only)
            settled = not self.read_only or self.file.is_settled()
            try:
                with sqlite_errors(self.path, self.directory):
                    opened = connect(self.path, file, is_settled=settled, read_only=read_only)
            except StorageError as error:
                if self.read_only and isinstance(error, CacheReplaced):
                    self._close_idle()
                elif self.read_only and self.identify_file() != file:
                    raise IndexChanged from error  # its last writer has just removed the -wal and -shm
                raise
            if "changed=" not in file[2]:
                return opened
            return take_snapshot(opened, self.identify_file, lambda: sqlite_errors(self.path, self.directory))

    def _check_out(self, connection: Any, _record: object, _proxy: object) -> None:  # noqa: ANN401
        if not self._is_current(connection):
            raise DisconnectionError  # the pool opens another

    def _is_current(self, connection: CacheConnection) -> bool:
        """Return whether a connection has the current files of the index open.

        Raises:
            CacheReplaced: if the -wal or -shm was removed while it was open, or another program replaced the index.
        """
        if connection.file != (found := self.identify_file()):
            self.access.replaced = self.access.replaced or connection.find_swap(found)
            self.access.check()
            return False
        if not connection.is_outdated():
            return True
        with self.no_replacement():
            # A replacement of the index removes its WAL first.
            is_lost = connection.file == self.identify_file() and connection.has_lost_files()
        if not is_lost:
            return False
        if not self.read_only:
            self.file.save_commits(connection)
        self._close_idle()
        raise lost_files_error(str(self.path))

    def _close_idle(self) -> None:
        self._engine.dispose()  # while an old connection is open, SQLite shares its files with new ones
        self._lookups.close()

    @property
    def read_only(self) -> bool:
        """Whether the cache is read-only for this process."""
        return self.access.read_only

    @property
    def folders(self) -> Folders:
        """The open cache directory, for changes; raises as `Access.folders`."""
        if self.ended and not self.access.is_open:
            raise CacheError(CLOSED)
        if self.access.end_shortage():
            self.close()
        return self.access.folders

    def _check_in(self, connection: Any, record: Any) -> None:  # noqa: ANN401
        if self.ended and connection is not None:
            record.close()  # the pool was closed meanwhile

    def revision(self) -> str | None:
        """Return the schema's revision, or None if the database has no schema yet.

        Raises:
            DamagedIndex: if the database has lost its application_id.
            NotACache: if the database belongs to another program.
        """
        if self.file.is_new:
            return None
        with self.look() as connection:
            return read_own_revision(connection, self.path, self.directory)

    def read(self) -> AbstractContextManager[Connection]:
        """Begin a read transaction: all its statements see the index at one moment.

        Raises:
            SchemaMismatch: if the schema is not one that this release works with.
        """
        return self._reading(self._check_schema)

    def look(self) -> AbstractContextManager[Connection]:
        """Begin a read transaction, whatever the schema."""
        return self._reading(read_first)

    @contextmanager
    def _reading(self, first: Callable[[Connection], object]) -> Iterator[Connection]:
        """Begin a read transaction whose first read is ``first``; this takes half the time of `entered`."""
        wait: Wait | None = None
        while True:
            with forks.no_fork():
                connection = None
                try:
                    connection = self._engine.connect()
                    transaction = connection.begin()
                    first(connection)
                except BaseException as error:
                    if connection is not None:
                        connection.close()
                    if not isinstance(error, (Busy, IndexChanged)):
                        raise
                    busy = error
                else:
                    if wait is not None:
                        wait.end()
                    with connection, transaction:
                        yield connection
                    return
            wait = wait or self._index_wait()
            pause_before_retry(wait, busy)

    @contextmanager
    def entered(self, enter: Callable[[ExitStack], T]) -> Iterator[T]:
        """Enter contexts for a block without forks; if the index is locked, wait and try again.

        Args:
            enter: enters the contexts of the block, and returns the value to yield. It must not wait.

        Raises:
            StorageError: if the index stays locked.
        """
        with self._index_wait() as wait:
            while True:
                with ExitStack() as stack:
                    stack.enter_context(forks.no_fork())
                    try:
                        found = enter(stack)
                    except (Busy, IndexChanged) as error:
                        busy = error
                    else:
                        wait.end()
                        yield found
                        return
                pause_before_retry(wait, busy)

    def _index_wait(self) -> Wait:
        return Wait("the index", self.wait_seconds)

    def rows(self, statement: Select[*tuple[Any, ...]], values: Mapping[str, object]) -> list[tuple[Any, ...]]:
        """Return the rows of a statement, read in a transaction of its own; times are text.

        Use it in loops, because it takes a twentieth of the time of `read`.

        Args:
            statement: the same object for all executions, as it is compiled once.
            values: of its parameters; none may be a list.

        Raises:
            SchemaMismatch: if the schema is not one that this release works with.
        """
        try:
            found = self._look_up(statement, values)
        except (Busy, IndexChanged) as error:
            found = self._look_up_after(error, statement, values)
        if found is not None:
            return found
        with self.read() as other:
            return [tuple(row) for row in other.execute(statement, values)]

    def _look_up_after(
        self, busy: Exception, statement: Select[*tuple[Any, ...]], values: Mapping[str, object]
    ) -> list[tuple[Any, ...]] | None:
        """Wait until the index is not locked, and return what `_look_up` returns."""
        with self._index_wait() as wait:
            while True:
                pause_before_retry(wait, busy)
                try:
                    return self._look_up(statement, values)
                except (Busy, IndexChanged) as error:
                    busy = error

    def _look_up(
        self, statement: Select[*tuple[Any, ...]], values: Mapping[str, object]
    ) -> list[tuple[Any, ...]] | None:
        """Return the rows of a statement; None if the schema is not ours."""
        with sqlite_errors(self.path, self.directory):
            found = self._lookups.find(statement, values)
        if self.ended:
            self._lookups.close()
        return found

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Begin a write transaction under the write lock; commit it after the block, or roll back on an error.

        Raises:
            SchemaMismatch: before anything is written, if the schema is not one that this release works with.
            DamagedIndex: if another program has deleted a row that others refer to.
            StorageError: if the file system or SQLite fails.
        """
        with self._locked() as connection, missing_row_errors():
            self._check_schema(connection)
            yield connection

    @contextmanager
    def write_at_once(self) -> Iterator[Connection | None]:
        """Begin a write transaction if the write lock is free; yield None if it is not."""
        # A signal handler may call this while its thread holds the lock, or waits for it.
        interrupted = is_held(self.file.reentry_key)
        with holding(self.file.reentry_key), os_errors("write to the cache"):
            file = None if interrupted else locks.acquire(self.write_lock, wait=False)
            if file is None:
                yield None
                return
            try:
                self.folders.check()
                with ExitStack() as stack:
                    try:
                        connection = stack.enter_context(self._writing(turns.Turn(file, self.write_lock)))
                    except (Busy, IndexChanged):
                        yield None  # another program is writing
                        return
                    self._check_schema(connection)
                    yield connection
            finally:
                locks.release(file)

    def _check_schema(self, connection: Connection) -> None:
        # Every transaction begins with this query, so it goes to the driver, in a tenth of SQLAlchemy's time.
        with sqlite_errors(self.path, self.directory):
            row = driver_of(connection).execute(SELECT_REVISION).fetchone()
        if row != (REVISION,) and not is_compatible(connection):
            raise schema_error(self.directory, row and row[0])

    @contextmanager
    def write_schema(self, before: Callable[[], None] | None = None) -> Iterator[Connection]:
        """Begin a write transaction for a migration, on any schema and without foreign key checks.

        Args:
            before: called under the write lock before the transaction begins.
        """
        with self._locked(schema=True, before=before) as connection:
            yield connection
            connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")

    @contextmanager
    def alone(self, wait: Wait | None = None) -> Iterator[turns.Turn]:
        """Hold the write lock without a transaction.

        Args:
            wait: for the lock; the default is `write_wait`.

        Raises:
            Busy: if the time to wait is over.
            CacheReplaced: at the end of the block, if another process could get the lock meanwhile.
        """
        with self._under_lock(wait) as turn:
            yield turn
            turn.check("another process may have written meanwhile: run `cachedb verify`")

    @contextmanager
    def _under_lock(self, wait: Wait | None) -> Iterator[turns.Turn]:
        """Hold the write lock; the block must check itself whether the lock was lost."""
        self.folders.check()
        # No `ExitStack`: it keeps an interrupt in a cycle of references, and with it the lock.
        with (
            not_reentered(self.file.reentry_key, f"writing to the cache in {str(self.directory)!r}"),
            nullcontext(wait) if wait else self.write_wait() as begun,
            os_errors("write to the cache"),
            turns.hold_in_turn(self.write_lock, begun) as turn,
        ):
            self.folders.check()  # again: the wait may have been long
            yield turn

    def write_wait(self) -> Wait:
        """Return a wait for the write lock, of `wait_seconds`."""
        return Wait("the write lock", self.wait_seconds)

    @contextmanager
    def without_waiting(self) -> Iterator[None]:
        """Wait for no lock in this block: a lock that another process holds raises `Busy` at once."""
        before, self.wait_seconds = self.wait_seconds, 0.0
        try:
            yield
        finally:
            self.wait_seconds = before

    @contextmanager
    def raw(self, *, read_only: bool = False) -> Iterator[sqlite3.Connection]:
        """Open the driver's own connection outside a transaction, for commands that SQLite refuses in one.

        Args:
            read_only: begin a read transaction instead.
        """
        with self.connected(read_only=read_only) as connection, closing(connection):
            yield connection

    @contextmanager
    def connected(self, *, read_only: bool = False) -> Iterator[sqlite3.Connection]:
        """Open a connection as `raw` does, but leave it open after the block.

        The caller must close it before a fork.
        """

        def enter(_: ExitStack) -> sqlite3.Connection:
            with ExitStack() as on_error:
                connection = on_error.enter_context(closing(self._open(read_only=read_only)))
                if read_only:
                    with sqlite_errors(self.path, self.directory):
                        connection.execute("BEGIN")
                        connection.execute("PRAGMA schema_version")
                on_error.pop_all()
            return connection

        with self.entered(enter) as connection, sqlite_errors(self.path, self.directory):
            yield connection

    @contextmanager
    def _locked(self, *, schema: bool = False, before: Callable[[], None] | None = None) -> Iterator[Connection]:
        """Begin a write transaction under the write lock; release the lock while another program is writing."""
        with self.write_wait() as wait:
            outside = 0.0  # seconds waited for another program
            while True:
                may_retry = False
                try:
                    with self._under_lock(wait) as turn:
                        if schema:
                            self.file.create(self.folders)
                        if before:
                            before()
                            before = None
                        may_retry = True
                        with self._writing(turn, schema=schema) as connection:
                            may_retry = False
                            yield connection
                            return
                except (Busy, IndexChanged):
                    if not may_retry:
                        raise
                shortest, longest = _OUTSIDER_NAPS
                nap = min(max(outside / 4, shortest), longest)
                outside += nap
                wait.nap(nap, lambda: lock_holders.find_index_writer(self.path))

    @contextmanager
    def _writing(self, turn: turns.Turn, *, schema: bool = False) -> Iterator[Connection]:
        """Begin a write transaction; the caller holds the write lock.

        Raises:
            Busy: before the block, if another program is writing.
        """
        with forks.no_fork(), self._engine.connect() as connection:
            driver = driver_of(connection)
            assert isinstance(driver, CacheConnection)
            try:
                with sqlite_errors(self.path, self.directory):
                    # Neither can be changed in a transaction; the WAL mode is stored in the file.
                    ensure_wal(driver)
                    if schema:
                        driver.execute("PRAGMA foreign_keys = OFF")
                with transaction(immediate(connection), turn, driver.check_memory):
                    yield connection
            finally:
                if schema:
                    connection.invalidate()

    def make_read_only(self, error: StorageError) -> bool:
        """Make the cache read-only if the error is a full disk and there is an index.

        SQLite cannot create its -shm on a full disk. So the index is read as in a directory that cannot be written to.

        Returns:
            Whether the cache is read-only now, until the disk has space again.
        """
        if error.errno not in NO_ROOM_ERRNOS or self.file.is_new:
            return False
        self.close()
        self.access.make_read_only(error)
        return True

    def close(self) -> None:
        """Close the idle connections; later calls open new ones."""
        with forks.no_fork():
            self._close_idle()
        self.reserve.refill()  # SQLite has just released two inodes

    def end(self) -> None:
        """Close all connections for good; a connection that a thread uses is closed when it is returned."""
        self.ended = True
        self.close()
        if not self.read_only:
            self.reserve.keep()
        self.access.close()
