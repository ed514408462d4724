"""The index's database: connections, transactions, and all that is particular to SQLite.

One write lock serialises every change of the index and every rename into or out of ``blobs/``. It is a
lock file and not SQLite's own lock, for waiting at the file is fair and bounded, while SQLite's busy
handler starves; and it keeps all our writers and checkpoints apart, which closes the WAL-reset bug of
SQLite 3.7.0 to 3.51.2. Readers take no lock: they see the last commit.

The file may be replaced, by a repair or a restored backup, while others have it open. So no connection is used
again before a look at whether its file is still the one that has the name; and none is opened meanwhile, for it would
share the WAL of the one with the other.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from functools import cache
from itertools import filterfalse
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, Select, create_engine, event, select
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DisconnectionError

from cachedb import space
from cachedb.disk import downloads, locks, marker, processes
from cachedb.disk.durable import sync_file, sync_folder
from cachedb.disk.file_system import refuse_shared, refuse_unable
from cachedb.disk.folders import FOLDERS, Folders, follow
from cachedb.disk.layout import blob_file, has_blobs
from cachedb.disk.waiting import Wait, chosen_seconds
from cachedb.errors import (
    Busy,
    CacheError,
    CacheReplaced,
    DamagedIndex,
    NotACache,
    StorageError,
    explain,
    os_errors,
)
from cachedb.index.sqlite.errors import DAMAGED_TEXTS, FAILURES, NO_ROOM, PASSING, is_full
from cachedb.index.sqlite.revision import (
    APPLICATION_ID,
    REBUILD_ADVICE,
    SELECT_REVISION,
    has_backup,
    is_compatible,
    is_empty,
    is_ours,
    lost,
    mismatch,
    read_oldest,
    read_revision,
)
from cachedb.index.tables import METADATA, REVISION
from cachedb.oci.digests import Digest
from cachedb.reentry import holding, is_held, not_reentered, refuse_reentry

__all__ = ["BATCH", "CLOSED", "Database", "batched"]


T = TypeVar("T")

BATCH = 500  # values in one statement, of which SQLite takes so many
_RESERVE = 1024 * 1024  # bytes
# SQLite needs two for index.db-wal and index.db-shm, a session two, and locks the rest.
_RESERVE_INODES = 8
# Our own writers wait at the lock file. For another program that writes we wait without the lock, or all who want to
# write would wait for each other as well.
_POLL_SECONDS = 0.02
_OUTSIDER_NAPS = (0.02, 0.25)  # seconds between two tries: at first, and at most
_OLD_RELEASE_SECONDS, _OLD_RELEASE_NAP = 1.0, 0.01
_TICK_NANOSECONDS = 20_000_000  # the time of a file may stand still for so long
_IDLE = 5  # connections for `rows` that are kept open, as many as the pool keeps
CLOSED = "this cache is closed: open it again with Cache.open"
_READING = 10  # seconds that others may go on reading an index that is to be replaced
_IN_WAL_MODE = b"\x02\x02"  # at offset 18 of the file (https://sqlite.org/fileformat2.html, 1.3.3)
_PATH_LIMIT = 512 - len("-journal")  # bytes: SQLite's MAX_PATHNAME, with the longest name that it makes beside a file


def batched(items: Iterable[T], size: int = BATCH) -> Iterator[list[T]]:
    """Divide items into lists of as many as one statement may name, or as are given."""
    rest = list(items)
    for start in range(0, len(rest), size):
        yield rest[start : start + size]


class Database:
    """The ``index.db`` of a cache directory. Usable from several threads, and in a forked child.

    SQLite notes in memory which locks its process holds on a file. A child that is forked while a connection
    is open inherits the note and not the locks, and what it commits is lost when its parent closes. So a
    fork waits until no other thread is in a transaction, and all connections are closed before it.
    A transaction waits for nobody, so a fork does not either: it waits for other processes before it begins.
    """

    def __init__(
        self, directory: Path, path: Path | None = None, *, trust: bool = False, wait: float | None = None
    ) -> None:
        """Name the index of a cache directory, or another one: a backup.

        Args:
            directory: of the cache.
            path: of the index, unless it is the directory's.
            trust: work with a directory of another user.
            wait: seconds to wait for a lock of another process; unless given, as `chosen_seconds` says.
        """
        self.wait_seconds = chosen_seconds(wait)
        self.directory = directory.absolute()
        self._trust = trust
        self._folders: Folders | None = None
        self.path = (path or directory / "index.db").absolute()
        self._name = str(self.path)
        self.write_lock = self.directory / "locks" / "write.lock"
        with os_errors("use the cache directory"):
            self.read_only = self.path.exists() and not os.access(directory, os.W_OK)
        self._resolved = os.path.realpath(self.directory)  # by which a thread knows what it holds
        self._engine = self._connect()
        self._idle: list[_Connection] = []
        self._shortage: StorageError | None = None
        self._gave_up = False
        self.ended = False  # by `end`
        locks.before_fork(self)

    def _connect(self) -> Engine:
        url = URL.create("sqlite", database=str(self.path))
        # As many connections as there are threads: a thread that finds none free must not fail.
        engine = create_engine(url, max_overflow=-1, creator=self._open)
        event.listen(engine, "checkout", self._check_out)
        event.listen(engine, "checkin", self._check_in)
        event.listen(engine, "begin", _on_begin)
        event.listen(engine, "handle_error", self._on_error)
        return engine

    def _open(self, *, read_only: bool = False) -> _Connection:
        """Open a connection to the file that has the name; it is made in `write_schema` and nowhere else."""
        if self.ended:
            raise CacheError(CLOSED)
        if self._folders is not None:
            self._folders.check()
        with self._unreplaced():
            file = self._file()
            with self._sqlite_errors():
                mode = file[2].replace("mode=rw", "mode=ro") if read_only else file[2]
                connection = sqlite3.connect(
                    f"{self.path.as_uri()}?{mode}",
                    uri=True,
                    timeout=0,  # we wait ourselves, where no fork waits for us: see `_entered`
                    check_same_thread=False,
                    isolation_level=None,  # the driver begins no transactions of its own: we do, DDL included
                    factory=_Connection,
                )
                try:
                    connection.file, connection.is_settled = file, not self.read_only or self._is_settled()
                    if "vfs=" in file[2]:
                        connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # the WAL's index in our own memory
                    connection.execute("PRAGMA synchronous = FULL")
                    connection.execute("PRAGMA foreign_keys = ON")
                    connection.execute("PRAGMA schema_version")  # it opens the WAL, which belongs to this file
                except BaseException:
                    connection.close()
                    raise
            return self._snapshot(connection) if "changed=" in file[2] else connection

    def _snapshot(self, connection: _Connection) -> _Connection:
        """Return a copy in memory of an index that is read without locks, and close the connection to the file.

        A process that begins to write to the file does not see that somebody reads it. So it is read all at once, and
        looked at again after that.

        Raises:
            _Changed: if somebody wrote to the file meanwhile, or that cannot be told.
        """
        copy = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None, factory=_Connection)
        copy.file = connection.file
        try:
            with closing(connection), self._sqlite_errors():
                connection.backup(copy)
                copy.execute("PRAGMA query_only = ON")
        except BaseException as error:
            copy.close()
            if isinstance(error, StorageError) and self._file() != connection.file:
                raise _changed() from error  # that is why it looks damaged
            raise
        if self._file() != connection.file or not connection.is_settled:
            copy.close()
            raise _changed()
        return copy

    @contextmanager
    def _unreplaced(self, *, replacing: bool = False) -> Iterator[None]:
        """A block in which nobody replaces the file or, the other way round, opens it; to be entered by `_entered`.

        Raises:
            Busy: if a process is replacing it, or opening it. Nobody is waited for here.
        """
        if self.read_only:
            yield
            return
        opened, replaced = f"{self._resolved} is opened", f"{self._resolved} is replaced"
        refuse_reentry(replaced, f"replacing the index in {str(self.directory)!r}")
        if replacing:
            refuse_reentry(opened, f"opening the index in {str(self.directory)!r}")
        with ExitStack() as stack:
            stack.enter_context(holding(replaced if replacing else opened))
            with os_errors("open the index"), Wait("the index", 0) as wait:
                if self.write_lock.parent.is_dir():  # another program's directory has none, and is not changed
                    stack.enter_context(locks.held_folder(self.write_lock.parent, wait, shared=not replacing))
                stack.enter_context(self._unreplaced_by_old(fcntl.LOCK_EX if replacing else fcntl.LOCK_SH))
            yield

    @contextmanager
    def _unreplaced_by_old(self, operation: int) -> Iterator[None]:
        """The same for releases before 0.2, which lock the directory itself: a block, that does not wait for long.

        Scripts lock the directory as well, with flock(1), and may have begun this process.
        """
        folder = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            end = time.monotonic() + _OLD_RELEASE_SECONDS
            while True:
                try:
                    fcntl.flock(folder, operation | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    # An old release replaces the index under the write lock, where it leaves no name.
                    old = locks.is_held(self.write_lock) and locks.holder_of(self.write_lock) is None
                    if time.monotonic() > end or not (operation == fcntl.LOCK_EX or old):
                        break
                time.sleep(_OLD_RELEASE_NAP)
            yield
        finally:
            os.close(folder)

    def replace(self, new: Path, old: Path) -> bool:
        """Have another index under the name, which is never without one; under the write lock.

        Args:
            new: the other, in one file.
            old: where to keep a copy of the one that is there.

        Returns:
            Whether there was one.

        Raises:
            StorageError: if somebody has been reading for so long that the old WAL cannot be written back.
        """
        found, wal = self.path.exists(), self.path.with_name("index.db-wal")
        if found:
            with suppress(DamagedIndex, NotACache):
                self._write_back()
        self.close()
        with self._entered(lambda stack: stack.enter_context(self._unreplaced(replacing=True))):
            if found:
                shutil.copyfile(self.path, old)
                old.chmod(0o600)
                sync_file(old)
            # SQLite would apply a WAL that it finds to whatever database lies beside it.
            if wal.exists():
                kept = old.with_name(f"{old.name}-wal")
                wal.rename(kept)
                if not kept.stat().st_size:
                    kept.unlink()
            self.path.with_name("index.db-shm").unlink(missing_ok=True)
            sync_folder(old.parent)
            sync_folder(self.directory)
            new.rename(self.path)
            sync_folder(self.directory)
        return found

    def _write_back(self) -> None:
        """Write the WAL back to the index, which is all there in one file then."""
        end = time.monotonic() + _READING
        while True:
            with self.raw() as connection:
                busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if not busy:
                return
            if time.monotonic() > end:
                raise StorageError(
                    "the index cannot be replaced: another program has been reading it for long; end it and try again"
                )
            time.sleep(_POLL_SECONDS)

    def _file(self) -> tuple[int, int, str]:
        """Return what tells ``index.db`` from another file of that name, and how it is to be opened."""
        with os_errors("open the index"):
            try:
                status = os.stat(self._name)
            except FileNotFoundError:
                if self._folders is not None:
                    self._folders.check()
                raise lost(self.directory) from None
            mode = "mode=rw"
            if self.read_only:
                wal = _status(f"{self._name}-wal")
                # One at rest, beside which SQLite may not make the files it shares memory by, is read as what
                # cannot change; one with a WAL and no such file has no process either, and is read without locks.
                mode = "mode=ro" if wal and wal.st_size else "mode=ro&immutable=1"
                if mode == "mode=ro" and not os.path.exists(f"{self._name}-shm"):
                    mode = "mode=ro&vfs=unix-none"
                if mode != "mode=ro":
                    mode += f"&changed={_mark(status)}.{_mark(wal)}"  # for us: SQLite passes over it
        return status.st_dev, status.st_ino, mode

    def _is_settled(self) -> bool:
        """Return whether a change of the index from now on shows in its time, which goes on in small steps."""
        now = time.time_ns()
        files = (_status(self._name), _status(f"{self._name}-wal"))
        return not any(file and 0 <= now - file.st_mtime_ns < _TICK_NANOSECONDS for file in files)

    def _check_out(self, connection: Any, _record: object, _proxy: object) -> None:  # noqa: ANN401
        if connection.file != self._file():
            raise DisconnectionError  # the pool opens another

    @property
    def folders(self) -> Folders:
        """The open cache directory, to change something in it.

        Raises:
            NotOurs: if it is another user's, and neither shared nor trusted.
            StorageError: if it cannot be opened, or only be read.
        """
        if self.ended and self._folders is None:
            raise CacheError(CLOSED)
        self._check_shortage()
        if self.read_only:
            raise StorageError(
                f"the cache {str(self.directory)!r} can only be read: check the owner and mode of the directory, and "
                "whether its file system is mounted read-only"
            )
        if self._folders is None:
            with os_errors("open the cache directory"):
                folders = Folders(self.directory)
                folders.check_owner(trust=self._trust)
                folders.mark(new=False)
            self._folders = folders
        return self._folders

    def _check_in(self, connection: Any, record: Any) -> None:  # noqa: ANN401
        if self.ended and connection is not None:
            record.close()  # the pool that it goes back to is nobody's

    def prepare(self) -> str | None:
        """Make the directory and its folders, unless they are there; refuse what is not ours.

        Returns:
            The schema's revision, as `revision` does.

        Raises:
            NotACache: if the directory holds something else.
            NotOurs: if it is another user's, or a folder in it leads elsewhere.
            StorageError: if it cannot be made or read.
        """
        if reason := refuse_shared(self.directory) or _too_long(self.path):
            raise StorageError(reason)
        if self.read_only:
            revision = self.revision()
            with os_errors("use the cache directory"):
                folders = Folders(self.directory)
                folders.mark(new=False)
                if folders.is_copy and revision is not None:
                    self._check_copy(folders)  # each time: that it is good cannot be noted
            return revision
        with os_errors("use the cache directory"):
            missing = [folder for folder in (self.directory, *self.directory.parents) if not folder.exists()]
            with suppress(FileExistsError):
                self.directory.mkdir(mode=0o700, parents=True)
                self.directory.chmod(0o700)  # whatever the umask
            for folder in missing:
                sync_folder(folder.parent)
            self._mark()
            for name in FOLDERS:
                self.folders.make(name)
                with self.folders.open(name):
                    pass  # a link to elsewhere is refused now, and again whenever something is changed in it
            revision = self.revision()
            if revision is None:
                sync_folder(self.directory / "blobs")
                sync_folder(self.directory)
            elif self.folders.is_copy:
                self.accept_copy(check=True)
            return revision

    def accept_copy(self, *, check: bool) -> None:
        """Let a cache that was copied file by file be a cache of its own, unless it is one.

        Args:
            check: that the index is sound and has its files.

        Raises:
            DamagedIndex: if it is not, or has not.
        """
        with (
            self._write_wait() as wait,
            os_errors("use the cache directory"),
            locks.in_turn(self.write_lock, wait=wait),
        ):
            self.folders.mark(new=False)  # another process may have done so meanwhile
            if self.folders.is_copy:
                if check:
                    self._check_copy(self.folders)
                with suppress(OSError):  # of a full disk: the next open checks again
                    self.folders.accept_copy()

    def _check_copy(self, folders: Folders) -> None:
        """Refuse a copy whose files are not of one moment: of any schema, for it is not upgraded yet.

        SQLite applies a WAL to whatever index lies beside it, also to one that was copied before a checkpoint. Without
        a marker it may be no copy but an older release's cache, which is of use also if a blob's file is lost.
        """
        with self.look() as connection:
            found = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar()
            faults = [] if found == "ok" else [str(found)]
            for table, row, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check").fetchmany(1):
                faults.append(f"row {row} of {table} refers to a row of {parent} that is not there")
            if not faults and folders.had_marker:
                query = "SELECT digest, size FROM blobs WHERE stored_at IS NOT NULL"
                for digest, size in connection.exec_driver_sql(query):
                    try:
                        is_there = os.stat(blob_file(self.directory, Digest(digest))).st_size == size
                    except FileNotFoundError:
                        is_there = False
                    if not is_there:
                        faults.append(f"{digest} is missing or has another size")
                        break
        if faults:
            raise DamagedIndex(
                f"{str(self.directory)!r} is a damaged copy of a cache ({faults[0]}): copy it again with "
                "`cachedb copy`, or run `cachedb verify --repair` on it"
            )

    def _mark(self) -> None:
        """Make sure that the directory is a cache, or may become one, and has a marker that says so.

        Raises:
            NotACache: if it holds something else.
        """
        if not self.folders.is_marked and not self.has_our_mark() and not has_backup(self.directory):
            strange = set(filterfalse(PASSING.fullmatch, os.listdir(self.folders.root)))
            strange -= {"lost+found"} | ({"index.db"} if self._is_new() else set())
            # Another process may have marked it since we looked.
            if strange and marker.read(self.folders.root) is None:
                self.revision()  # it says so if the index is another program's
                raise NotACache(
                    f"{str(self.directory)!r} has no {marker.MARKER!r} and is not empty (it holds {min(strange)!r}): "
                    "name another directory"
                )
        if self._is_new() and not self.folders.is_marked:
            refuse_unable(self.directory)
        self.folders.mark(new=True, is_sound=self._is_new())

    def has_our_mark(self) -> bool:
        """Return whether the index has our application_id, as those of older releases have, which left no marker."""
        if self._is_new():
            return False
        mark = "PRAGMA application_id"
        with suppress(CacheError), self.look() as connection:
            return bool(connection.exec_driver_sql(mark).scalar_one() == APPLICATION_ID)
        # A damaged one may have its header still. SQLite reads it, for to close the file ourselves would release
        # SQLite's locks on it in this process.
        with (
            suppress(sqlite3.Error),
            closing(sqlite3.connect(f"{self.path.as_uri()}?mode=ro&immutable=1", uri=True)) as damaged,
        ):
            damaged.execute("PRAGMA writable_schema = ON")  # else a file that was cut short is refused
            return bool(damaged.execute(mark).fetchone() == (APPLICATION_ID,))
        return False

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
        with self.look() as connection:
            mark = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
            if mark != APPLICATION_ID and not (mark == 0 and is_empty(connection)):
                if is_ours(self.directory):
                    raise DamagedIndex(f"{str(self.path)!r} has lost its mark; {REBUILD_ADVICE}")
                raise NotACache(f"{str(self.path)!r} is another program's database: name another directory")
            return read_revision(connection)

    def journal_mode(self) -> str:
        """Return the journal mode that is stored in the index: ``wal``, unless an outside program switched it."""
        with self.look() as connection:
            mode = str(connection.exec_driver_sql("PRAGMA journal_mode").scalar_one())
        if "changed=" in self._file()[2]:  # a copy in memory was read; SQLite holds no lock to lose
            with os_errors("read the index"), self.path.open("rb") as file:
                mode = "wal" if os.pread(file.fileno(), 2, 18) == _IN_WAL_MODE else "delete"
        return mode

    def faults(self, *, quick: bool = False) -> list[str]:
        """Return what is wrong with the database itself, a line each; the first hundred at most.

        Args:
            quick: do not compare the indexes with their tables.
        """
        if self._is_new():
            return ["it is lost"]
        try:
            self.revision()
            with self.read() as connection:
                check = f"PRAGMA {'quick_check' if quick else 'integrity_check'}(100)"
                found = [str(line) for line in connection.exec_driver_sql(check).scalars() if line != "ok"]
                for table, row, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check").fetchmany(100):
                    found.append(f"row {row} of {table} refers to a row of {parent} that is not there")
                for table in METADATA.sorted_tables:
                    # Text that is no text, and a time that is none, are within all constraints.
                    for _ in connection.execute(select(table).limit(0 if quick else None)):
                        pass
                return found
        except DamagedIndex as error:
            return [str(error)]
        except ValueError as error:
            return [f"a row cannot be read: {error}"]

    def read(self) -> AbstractContextManager[Connection]:
        """A read transaction: all its statements see the index at one moment.

        Raises:
            SchemaMismatch: if the schema is not one that this release works with.
        """
        return self._reading(self._check_schema)

    def look(self) -> AbstractContextManager[Connection]:
        """A read transaction, whatever the schema."""
        return self._reading(_read_first)

    @contextmanager
    def _reading(self, first: Callable[[Connection], object]) -> Iterator[Connection]:
        """A read transaction that begins with what ``first`` reads. As `_entered`, in half of the time."""
        wait: Wait | None = None
        while True:
            with locks.unforked():
                connection = None
                try:
                    connection = self._engine.connect()
                    transaction = connection.begin()
                    first(connection)
                except BaseException as error:
                    if connection is not None:
                        connection.close()
                    if not isinstance(error, (Busy, _Changed)):
                        raise
                    busy = error
                else:
                    if wait is not None:
                        wait.end()
                    with connection, transaction:
                        yield connection
                    return
            wait = wait or self._index_wait()
            _pause(wait, busy)

    @contextmanager
    def _entered(self, enter: Callable[[ExitStack], T]) -> Iterator[T]:
        """A block in which no other thread forks; while another process has the index locked, wait and enter again.

        Args:
            enter: enters what the block needs, and returns what to give to it. It waits for nobody.

        Raises:
            StorageError: if the index stays locked.
        """
        with self._index_wait() as wait:
            while True:
                with ExitStack() as stack:
                    stack.enter_context(locks.unforked())
                    try:
                        found = enter(stack)
                    except (Busy, _Changed) as error:
                        busy = error
                    else:
                        wait.end()
                        yield found
                        return
                _pause(wait, busy)

    def _index_wait(self) -> Wait:
        return Wait("the index", self.wait_seconds)

    def rows(self, statement: Select[*tuple[Any, ...]], values: Mapping[str, object]) -> list[tuple[Any, ...]]:
        """Return what a statement finds in a read transaction of its own, as SQLite has it: times are text.

        For what is looked up in loops: of the time that `read` takes, SQLite itself has a twentieth.

        Args:
            statement: one object for all its executions, for it is compiled once.
            values: of its parameters, none of which is a list.

        Raises:
            SchemaMismatch: if the schema is not one that this release works with.
        """
        try:
            found = self._rows(statement, values)
        except (Busy, _Changed) as error:
            found = self._rows_after(error, statement, values)
        if found is not None:
            return found
        with self.read() as other:
            return [tuple(row) for row in other.execute(statement, values)]

    def _rows_after(
        self, busy: Exception, statement: Select[*tuple[Any, ...]], values: Mapping[str, object]
    ) -> list[tuple[Any, ...]] | None:
        """Return what `_rows` does, once the index is not locked any more."""
        with self._index_wait() as wait:
            while True:
                _pause(wait, busy)
                try:
                    return self._rows(statement, values)
                except (Busy, _Changed) as error:
                    busy = error

    def _rows(self, statement: Select[*tuple[Any, ...]], values: Mapping[str, object]) -> list[tuple[Any, ...]] | None:
        """Return what `rows` does; None if the schema is not ours."""
        with locks.unforked(), self._sqlite_errors():
            file = self._file()
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self._open()
            try:
                if connection.file != file:
                    connection.close()
                    connection = self._open()
                connection.execute("BEGIN")
                ours = connection.execute(SELECT_REVISION).fetchone() == (REVISION,)
                text, constants = _compiled(statement)
                found = connection.execute(text, {**constants, **values}).fetchall() if ours else None
                connection.execute("COMMIT")
            except BaseException:
                connection.close()
                raise
            if len(self._idle) < _IDLE:
                self._idle.append(connection)
            else:
                connection.close()
            if self.ended:
                self._close_idle()
            return found

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A write transaction under the write lock; committed at the end of the block, rolled back on an error.

        Raises:
            SchemaMismatch: before anything is written, if the schema is not one that this release works with.
            StorageError: if the file system or SQLite fails.
        """
        with self._locked() as connection:
            self._check_schema(connection)
            yield connection

    @contextmanager
    def write_at_once(self) -> Iterator[Connection | None]:
        """A write transaction if the write lock is free; the block gets None if it is not."""
        # This thread may hold the lock, or wait for it, in a call that was interrupted for this one.
        interrupted = is_held(self._resolved)
        with holding(self._resolved), os_errors("write to the cache"):
            file = None if interrupted else locks.acquire(self.write_lock, wait=False)
            if file is None:
                yield None
                return
            try:
                self.folders.check()
                with ExitStack() as stack:
                    try:
                        connection = stack.enter_context(self._writing(locks.Turn(file)))
                    except (Busy, _Changed):
                        yield None  # another program is writing
                        return
                    self._check_schema(connection)
                    yield connection
            finally:
                locks.release(file)

    def _check_schema(self, connection: Connection) -> None:
        # Every transaction begins with this one: by the driver, for which it takes a tenth of SQLAlchemy's time.
        with self._sqlite_errors():
            row = _driver(connection).execute(SELECT_REVISION).fetchone()
        if row != (REVISION,) and not is_compatible(connection):
            raise mismatch(self.directory, row and row[0])

    @contextmanager
    def write_schema(self, before: Callable[[], None] | None = None) -> Iterator[Connection]:
        """A write transaction for a migration: whatever the schema, with foreign keys not enforced meanwhile.

        Args:
            before: is called under the write lock before the transaction begins.
        """
        with self._locked(schema=True, before=before) as connection:
            yield connection
            connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")

    @contextmanager
    def alone(self, wait: Wait | None = None) -> Iterator[locks.Turn]:
        """Hold the write lock, and no transaction.

        Args:
            wait: for the lock; unless given, one as long as this database waits.

        Raises:
            Busy: if the time to wait is over.
        """
        self.folders.check()
        with ExitStack() as stack:
            stack.enter_context(not_reentered(self._resolved, f"writing to the cache in {str(self.directory)!r}"))
            wait = wait or stack.enter_context(self._write_wait())
            stack.enter_context(os_errors("write to the cache"))
            turn = stack.enter_context(locks.in_turn(self.write_lock, wait))
            self.folders.check()  # again, for we may have waited long
            yield turn

    def _write_wait(self) -> Wait:
        return Wait("the write lock", self.wait_seconds)

    @contextmanager
    def without_waiting(self) -> Iterator[None]:
        """A block in which no lock is waited for: what needs one that is held raises `Busy` at once."""
        before, self.wait_seconds = self.wait_seconds, 0.0
        try:
            yield
        finally:
            self.wait_seconds = before

    @contextmanager
    def raw(self, *, read_only: bool = False) -> Iterator[sqlite3.Connection]:
        """The driver's own connection, in no transaction: for what SQLite does in none.

        Args:
            read_only: it is in a read transaction instead, that has begun.
        """
        with self.connected(read_only=read_only) as connection, closing(connection):
            yield connection

    @contextmanager
    def connected(self, *, read_only: bool = False) -> Iterator[sqlite3.Connection]:
        """As `raw`, but the connection stays open after the block: it is to be closed before any fork."""

        def enter(_: ExitStack) -> sqlite3.Connection:
            with ExitStack() as on_error:
                connection = on_error.enter_context(closing(self._open(read_only=read_only)))
                if read_only:
                    with self._sqlite_errors():
                        connection.execute("BEGIN")
                        connection.execute("PRAGMA schema_version")
                on_error.pop_all()
            return connection

        with self._entered(enter) as connection, self._sqlite_errors():
            yield connection

    @contextmanager
    def _locked(self, *, schema: bool = False, before: Callable[[], None] | None = None) -> Iterator[Connection]:
        """A write transaction under the write lock. For another program that is writing we wait without the lock."""
        with self._write_wait() as wait:
            outside = 0.0  # seconds that another program has kept us waiting
            while True:
                with ExitStack() as stack:
                    turn = stack.enter_context(self.alone(wait))
                    if schema:
                        self._create()
                    if before:
                        before()
                        before = None
                    try:
                        connection = stack.enter_context(self._writing(turn, schema=schema))
                    except (Busy, _Changed):
                        pass
                    else:
                        yield connection
                        return
                shortest, longest = _OUTSIDER_NAPS
                nap = min(max(outside / 4, shortest), longest)
                outside += nap
                wait.nap(nap, lambda: processes.index_writer(self.path))

    @contextmanager
    def _writing(self, turn: locks.Turn, *, schema: bool = False) -> Iterator[Connection]:
        """A write transaction, under the write lock.

        Raises:
            Busy: before the block, if another program is writing.
        """
        with ExitStack() as stack:
            stack.enter_context(locks.unforked())
            connection = stack.enter_context(self._engine.connect())
            if schema:
                stack.callback(connection.invalidate)
                # Neither can be changed in a transaction; the first stays with the file.
                driver = _driver(connection)
                with self._sqlite_errors():
                    self._ensure_wal(driver)
                    driver.execute("PRAGMA foreign_keys = OFF")
            stack.enter_context(self._transaction(_immediate(connection), turn))
            yield connection

    @contextmanager
    def _transaction(self, connection: Connection, turn: locks.Turn) -> Iterator[None]:
        """Commit what the block does, or roll it back; and first of all make sure of how the last commit ended.

        Who is killed in a commit, or cannot sync it, may leave all of it in the WAL and yet unseen: when all processes
        are gone, SQLite finds it there. By then we may have taken its files away. A commit of our own puts an end to
        that, for it is written over it.
        """
        self._ensure_wal(_driver(connection))
        if turn.marked:
            with connection.begin():
                # A newer schema is for newer releases to write to.
                if (read_revision(connection) or "") <= REVISION or is_compatible(connection):
                    # It is written even if it is that already.
                    connection.exec_driver_sql(f"PRAGMA user_version = {read_oldest(connection)}")
        transaction = connection.begin()
        try:
            turn.mark()
            yield
        except BaseException:
            transaction.rollback()
            turn.unmark()
            raise
        if turn.is_lost:
            transaction.rollback()
            turn.unmark()
            raise CacheReplaced(
                f"{str(self.write_lock)!r} was removed while it was locked; nothing was written: try again, and keep "
                "cleaners of old files out of the cache"
            )
        if transaction.is_active:
            try:
                transaction.commit()
            except BaseException:
                transaction.rollback()
                raise
        turn.unmark()

    def _ensure_wal(self, driver: sqlite3.Connection) -> None:
        """Put the index back into WAL mode if an outside program switched it off; under the write lock.

        The mode is stored in the file. Without it a reader blocks every writer, and a writer every reader.

        Raises:
            Busy: if another program is reading, which the switch has to wait for.
        """
        with self._sqlite_errors():
            if driver.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                driver.execute("PRAGMA journal_mode = WAL")

    def _create(self) -> None:
        # An existing file is not opened: to close it again would let go of SQLite's locks on it.
        if not self.path.exists():
            if has_blobs(self.directory):
                raise lost(self.directory)
            file = os.open(self.path.name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=self.folders.root)
            try:
                follow(file, self.folders.status)
            finally:
                os.close(file)

    def _on_error(self, context: ExceptionContext) -> None:
        error = context.original_exception
        if isinstance(error, FAILURES) and not isinstance(error, sqlite3.IntegrityError):
            raise self._translated(error) from error

    @contextmanager
    def _sqlite_errors(self) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            raise self._translated(error) from error

    def _translated(self, error: sqlite3.DatabaseError | UnicodeDecodeError) -> StorageError | NotACache | Busy:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_BUSY:
            holder = processes.index_writer(self.path)
            return Busy(f"{holder} has locked the index in a transaction: end it, or try again later", holder)
        damaged = code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or str(error).startswith(DAMAGED_TEXTS)
        damaged = damaged or isinstance(error, UnicodeDecodeError)
        if damaged and is_ours(self.directory):
            return DamagedIndex(f"the index is damaged: {error}; {REBUILD_ADVICE}")
        if code == sqlite3.SQLITE_NOTADB:
            return NotACache("index.db is not an SQLite database: name another directory")
        if code == sqlite3.SQLITE_CANTOPEN and (reason := _too_long(self.path)):
            return StorageError(reason)
        advice = {
            sqlite3.SQLITE_FULL: "free some space and try again",
            sqlite3.SQLITE_READONLY: "check the owner and mode of the cache directory",
            sqlite3.SQLITE_CANTOPEN: "check the owner and mode of the cache directory, and the limit on open files",
            sqlite3.SQLITE_IOERR: "the disk may be failing: see the kernel's log",
        }.get(code)
        if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_IOERR_NOMEM:
            advice = "there is not enough memory"
        elif code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
            sizes = (_size(f"{self._name}{suffix}") for suffix in ("", "-wal", "-shm"))
            if shortage := space.find_shortage(self.directory, _RESERVE, offset=max(sizes)):
                return StorageError(f"the index failed: {error}: {explain(shortage)}", errno=shortage.errno)
        return StorageError(f"the index failed: {error}" + (f"; {advice}" if advice else ""))

    def only_read(self, error: StorageError) -> bool:
        """Read without new files from now on, if an error says that there is no room for any, and there is an index.

        SQLite cannot share memory with other processes then; it is as if the directory could not be written to.

        Returns:
            Whether it is so. It ends with the shortage.
        """
        if error.errno not in NO_ROOM or self._is_new():
            return False
        self.close()
        self.read_only, self._shortage = True, error
        return True

    def _check_shortage(self) -> None:
        """Raise what `only_read` was told while it lasts; else be as if it had not been called."""
        if self._shortage is None:
            return
        if space.find_shortage(self.directory, _RESERVE):
            raise StorageError(str(self._shortage), errno=self._shortage.errno) from self._shortage
        self.read_only, self._shortage = False, None
        self.close()

    def keep_reserve(self) -> None:
        """Set space and inodes aside for `with_reserve`, where some are missing and the disk has them."""
        if self.read_only:
            return
        self._keep_bytes()
        with suppress(OSError, CacheError):
            self._keep_inodes()

    def _keep_inodes(self) -> None:
        if os.path.lexists(self.directory / "reserve.inodes" / str(_RESERVE_INODES)):  # the last that is made
            return
        self.folders.make("reserve.inodes")
        with self.folders.open("reserve.inodes") as folder:
            for number in range(1, _RESERVE_INODES + 1):
                file = os.open(str(number), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=folder)
                try:
                    follow(file, self.folders.status)
                finally:
                    os.close(file)

    def give_up_inodes(self) -> bool:
        """Give the inodes that were set aside back to the file system; return whether there is one now."""
        found = False
        with suppress(OSError, CacheError), self.folders.open("reserve.inodes") as folder:
            for number in range(_RESERVE_INODES, 0, -1):
                with suppress(FileNotFoundError):
                    os.unlink(str(number), dir_fd=folder)
                    found = self._gave_up = True
        # Another process may have given them up just now.
        return found or not space.find_shortage(self.directory, _RESERVE)

    def _keep_bytes(self) -> None:
        path = self.directory / "reserve"
        with suppress(OSError):
            if path.exists() and path.stat().st_size >= _RESERVE:
                return
            descriptor = os.open("reserve", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=self.folders.root)
            try:
                follow(descriptor, self.folders.status)
                os.posix_fallocate(descriptor, 0, _RESERVE)
            except OSError as error:
                # The limit on the size of our files says nothing of the disk.
                if error.errno != errno.EFBIG or not os.fstat(descriptor).st_size:
                    path.unlink()
            finally:
                os.close(descriptor)

    def with_reserve(self, work: Callable[[], T], again: Callable[[], T] | None = None) -> T:
        """Do some work; on a full disk do it again, or other work, in the room that was set aside.

        SQLite cannot even read without some space for its WAL, nor can anything be forgotten without. Inodes are given
        up first, which may be all that it takes; then space, and what is left of downloads as well.
        """
        try:
            return work()
        except StorageError as error:
            if not is_full(error):
                raise
            if self.give_up_inodes():
                try:
                    return again() if again else work()
                except StorageError as still:
                    if not is_full(still):
                        raise
            freed = False
            with suppress(CacheError, OSError):
                freed = downloads.sweep(self.folders, age=0)
            with suppress(OSError):
                os.unlink("reserve", dir_fd=self.folders.root)
                freed = True
            if freed:
                return (again or work)()
            raise

    def close(self) -> None:
        """Close all connections that are not in use; they are opened again when they are needed."""
        with locks.unforked():
            self._engine.dispose()
            self._close_idle()
        if self._gave_up:  # SQLite has given two back just now
            self._gave_up = False
            self.keep_reserve()

    def _close_idle(self) -> None:
        while self._idle:
            with suppress(IndexError):  # another thread closes them, too
                self._idle.pop().close()

    def end(self) -> None:
        """Close all connections, and open no others: those that threads use now are closed when they are done."""
        self.ended = True
        self.close()
        self.keep_reserve()
        self._folders = None  # whoever uses the directory now keeps it open until that is done


def _too_long(path: Path) -> str | None:
    """Return what to say of a path that is too long for SQLite, which follows its symbolic links; None for others."""
    length = max(len(os.fsencode(path)), len(os.fsencode(os.path.realpath(path))))
    if length <= _PATH_LIMIT:
        return None
    return (
        f"the path of the index has {length} bytes, and SQLite takes {_PATH_LIMIT} at most: "
        "choose a cache directory with a shorter path, by --dir or CACHEDB_DIR"
    )


def _size(path: str) -> int:
    """Return the size of a file in bytes, 0 if there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


@cache
def _compiled(statement: Select[*tuple[Any, ...]]) -> tuple[str, dict[str, Any]]:
    """Return a statement as SQLite has it, and its parameters that have a value already."""
    compiled = statement.compile(dialect=sqlite.dialect(paramstyle="named"))
    return str(compiled), dict(compiled.params)


def _driver(connection: Connection) -> sqlite3.Connection:
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    return driver


class _Connection(sqlite3.Connection):
    """A connection that knows which file it is to."""

    file: tuple[int, int, str]
    is_settled: bool


class _Changed(StorageError):
    """Somebody has written to an index that was read without locks."""


def _changed() -> _Changed:
    return _Changed("the index changed while it was read: try again")


def _status(path: str) -> os.stat_result | None:
    with os_errors("open the index"), suppress(FileNotFoundError):
        return os.stat(path)
    return None


def _mark(status: os.stat_result | None) -> str:
    return f"{status.st_mtime_ns}.{status.st_size}" if status else ""


def _pause(wait: Wait, error: Exception) -> None:
    """Wait before the index is tried again, until it has been tried for too long."""
    try:
        wait.nap(_POLL_SECONDS, lambda: getattr(error, "holder", None))
    except Busy:
        wait.end()
        if isinstance(error, _Changed):
            raise error from None
        raise


def _read_first(connection: Connection) -> None:
    connection.exec_driver_sql("PRAGMA schema_version")  # here a transaction begins, or finds the index locked


def _immediate(connection: Connection) -> Connection:
    return connection.execution_options(cachedb_begin="BEGIN IMMEDIATE")


def _on_begin(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("cachedb_begin", "BEGIN"))
