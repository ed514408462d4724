"""Run read-only SQL queries on an index that is in use, with limits on their time and memory."""

from __future__ import annotations

import marshal
import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from io import FileIO
from tempfile import TemporaryFile
from typing import Any, Final, NamedTuple

from cachedb.callbacks import Callbacks
from cachedb.disk import forks
from cachedb.disk.writer import write_all
from cachedb.errors import CacheError, InvalidQuery, os_errors, query_timeout_error
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.functions import ALLOWED, MAX_VALUE_BYTES, Value, create_functions
from cachedb.index.sqlite.mistakes import find_mistake
from cachedb.text import format_size

__all__ = ["Answer", "is_complete", "run_query"]


_CHECK_OPCODES = 2_000  # opcodes of SQLite's virtual machine between two checks of the time and of signals
_FORK_WAIT_SECONDS = 0.1  # a fork waits this long for a query; then the query stops, and starts again after the fork
_IN_MEMORY_BYTES = 4 * 1024 * 1024  # a larger result goes to a temporary file
_SIZE_BYTES = 8  # the size of a batch, in front of it
_BATCH_BYTES = 64 * 1024  # rows are written to that file in batches of about this size
_TEMPORARY_BYTES = 1024**3  # a query may write so much to that file, and SQLite so much to files of its own
_MEASURE_SECONDS = 0.1  # between two looks at SQLite's files
_OPEN_FILES = "/proc/self/fd"
_STORAGE_CODES = frozenset(
    {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}
)
_ALLOWED_ACTIONS = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE, sqlite3.SQLITE_FUNCTION}
)
# Pragmas that only describe the schema.
_PRAGMAS: Final = frozenset({"table_info", "table_xinfo", "table_list", "index_list", "index_info", "index_xinfo"})
_VIRTUAL_TABLES: Final = ("json_each", "json_tree", *(f"pragma_{name}" for name in sorted(_PRAGMAS)))
# These limits bound the time and memory of a single opcode and of a row, which cannot be checked in between.
_LIMITS: Final = {
    sqlite3.SQLITE_LIMIT_LENGTH: MAX_VALUE_BYTES,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 128,  # bytes; a match takes time in proportion to pattern times text
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 32,  # json_array collects all arguments before it measures its result
    sqlite3.SQLITE_LIMIT_COLUMN: 100,  # of a row, which takes memory as a whole
}
_TOO_MANY_TERMS: Final = ("too many terms in GROUP BY", "too many terms in ORDER BY")  # they have the limit of columns
_CALLS_LIMIT: Final = 200  # function calls in a query; one row may execute all of them
_REFUSAL = re.compile(
    r"not authorized|authorization denied|attempt to write|cannot (?:modify|VACUUM)|.* may not be modified"
)


class Answer(NamedTuple):
    """The result of a query: its columns, and its rows, which can be read once."""

    columns: tuple[str, ...]
    rows: Iterator[tuple[Any, ...]]


def is_complete(text: str) -> bool:
    """Return whether a text ends with the semicolon of a query, and not with one in a string or comment."""
    return sqlite3.complete_statement(text)


@contextmanager
def run_query(
    database: Database,
    query: str,
    parameters: Mapping[str, Value] | None = None,
    timeout: float | None = None,
    *,
    stream: bool = False,
) -> Iterator[Answer]:
    """Run one read-only query on a snapshot of the index; writers do not wait for it.

    All rows are read before the block begins, so a fork does not wait for the block. A large result goes to a
    temporary file.

    SQL has two more functions: ``human(bytes)`` returns text such as ``1.2 MB``, ``ago(time)`` such as ``3 days ago``.

    Args:
        database: the index to query.
        query: one query in SQLite's SQL.
        parameters: the values of the query's ``:name`` parameters.
        timeout: seconds after which the query is stopped, also while its rows are read.
        stream: yield each row as soon as it is found; a fork ends such a query.

    Raises:
        InvalidQuery: if the query is invalid, or would do more than read.
        CacheError: if the query takes too long or too much space, or a fork ended it.
    """
    end = None if timeout is None else time.monotonic() + timeout
    if stream:
        with closing(_Stream(database, query, parameters or {}, end, timeout)) as streamed:
            yield Answer(streamed.columns, streamed.rows())
        return
    fork_wait = _FORK_WAIT_SECONDS
    while True:
        rows = _Rows()
        try:
            columns = _read_rows(database, query, parameters or {}, end, timeout, rows, fork_wait)
            if columns is not None:
                yield Answer(columns, iter(rows))
                return
        finally:
            rows.close()
        fork_wait *= 2  # so that the query ends even in a process that forks all the time


def _read_rows(
    database: Database,
    query: str,
    parameters: Mapping[str, Value],
    end: float | None,
    timeout: float | None,
    rows: _Rows,
    fork_wait: float,
) -> tuple[str, ...] | None:
    """Read all rows of a query into ``rows``; return its columns, or None if a fork stopped it."""
    fork_began: float | None = None  # since then a fork has been waiting
    stopped = False

    def should_stop() -> bool:
        nonlocal fork_began, stopped
        if forks.is_fork_waiting():
            fork_began = fork_began or time.monotonic()
            stopped = time.monotonic() - fork_began > fork_wait
        return stopped

    with database.raw(read_only=True) as connection:
        try:
            callbacks = Callbacks()
            cursor = _begin_query(connection, query, parameters, end, timeout, callbacks, should_stop)
            with closing(cursor), _translate_errors(connection, query, timeout, callbacks, lambda: stopped):
                for row in cursor:
                    rows.add(row)
        except _Stopped:
            return None
        finally:
            connection.set_progress_handler(None, 0)
    return tuple(column[0] for column in cursor.description)


def _begin_query(
    connection: sqlite3.Connection,
    query: str,
    parameters: Mapping[str, Value],
    end: float | None,
    timeout: float | None,
    callbacks: Callbacks,
    should_stop: Callable[[], bool] = lambda: False,
) -> sqlite3.Cursor:
    """Start the only query that a connection may run; return its cursor, before the first row."""
    connection.execute("PRAGMA query_only = ON")
    for limit, value in _LIMITS.items():
        connection.setlimit(limit, value)
    create_functions(connection, query, callbacks)
    # Python handles signals only when SQLite calls back into Python.
    files = _TemporaryFiles()

    def should_end() -> bool:
        files.check()
        return should_stop() or (end is not None and time.monotonic() > end)

    handler = callbacks.progress_handler(should_end)
    connection.set_progress_handler(handler, _CHECK_OPCODES)
    # SQLite creates these tables at their first use, which the authorizer would refuse.
    for table in _VIRTUAL_TABLES:
        connection.execute(f"SELECT 1 FROM {table} LIMIT 0").close()  # noqa: S608
    connection.set_authorizer(_authorizer())
    if sys.version_info >= (3, 12):  # otherwise SQLite reads an unknown column in double quotes as text
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_DQS_DML, False)
    for name in parameters:
        if not re.search(rf"[:@$]{re.escape(name)}\b", query):
            known = ", ".join(sorted(set(re.findall(r":\w+", query)))) or "none"
            raise InvalidQuery(f"the query has no :{name}: it has {known}")
    with _translate_errors(connection, query, timeout, callbacks, should_stop):
        cursor = connection.execute(query, parameters)
        if cursor.description is None:
            raise InvalidQuery("there is no query: write one that begins with SELECT")
    return cursor


class _TemporaryFiles:
    """SQLite's temporary files for sorts, joins and recursive queries; they have no names."""

    def __init__(self) -> None:
        self._measured = time.monotonic()

    def check(self) -> None:
        """Raise `CacheError` if the files are too large; look at them only now and then."""
        now = time.monotonic()
        if now - self._measured < _MEASURE_SECONDS:
            return
        self._measured, size = now, 0
        with suppress(FileNotFoundError):  # there may be no /proc
            for descriptor in os.listdir(_OPEN_FILES):
                with suppress(FileNotFoundError):  # another thread has closed it
                    if "/etilqs_" in os.readlink(path := f"{_OPEN_FILES}/{descriptor}"):
                        size += os.stat(path).st_size
        if size > _TEMPORARY_BYTES:
            raise CacheError(
                f"SQLite needs over {format_size(_TEMPORARY_BYTES)} of temporary files for the query: "
                "sort, group or join fewer rows"
            )


class _Rows:
    """The rows of a query: a few in memory, many in a temporary file.

    A forked child shares the position of an inherited file. So the rows are read at offsets, without a position.
    """

    def __init__(self) -> None:
        self._memory = bytearray()  # batches, each after its size; empty if there is a file
        self._file: FileIO | None = None
        self._size = 0  # bytes in memory or in the file
        self._closed = False
        self._batch: list[tuple[Any, ...]] = []
        self._batch_rows = 1  # adapted, so that a batch takes about `_BATCH_BYTES`

    def add(self, row: tuple[Any, ...]) -> None:
        """Add a row at the end."""
        self._batch.append(row)
        if len(self._batch) >= self._batch_rows:
            self._write()

    def _write(self) -> None:
        data = marshal.dumps(self._batch)
        self._memory += len(data).to_bytes(_SIZE_BYTES, "little") + data
        self._size += _SIZE_BYTES + len(data)
        if self._file or len(self._memory) > _IN_MEMORY_BYTES:
            try:
                self._file = self._file or TemporaryFile(buffering=0)  # noqa: SIM115 - `close` closes it
                write_all(self._file, self._memory)
            except OSError as error:
                # Without an errno: a full folder of temporary files must not cost the cache its reserve.
                raise CacheError(
                    f"cannot write the rows of the query to a temporary file: {error.strerror or error}: "
                    "name a folder with enough space in TMPDIR"
                ) from error
            self._memory = bytearray()
        if self._size > _TEMPORARY_BYTES:
            raise CacheError(
                f"the rows of the query take over {format_size(_TEMPORARY_BYTES)}: select fewer, or use stream=True"
            )
        self._batch_rows = max(1, min(2 * self._batch_rows, _BATCH_BYTES * len(self._batch) // len(data)))
        self._batch = []

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        offset = 0
        while offset < self._size:
            size = int.from_bytes(self._read(offset, _SIZE_BYTES), "little")
            yield from marshal.loads(self._read(offset + _SIZE_BYTES, size))  # noqa: S302 - our own data
            offset += _SIZE_BYTES + size
        self._check_open()
        yield from self._batch

    def _read(self, offset: int, size: int) -> bytes:
        self._check_open()
        if self._file is None:
            return bytes(self._memory[offset : offset + size])
        with os_errors("read the rows of the query from a temporary file"):
            return os.pread(self._file.fileno(), size, offset)

    def _check_open(self) -> None:
        if self._closed:
            raise CacheError("the block of the query has ended: read its rows inside the block")

    def close(self) -> None:
        """Delete the temporary file; the rows can no longer be read."""
        self._closed = True
        if self._file:
            self._file.close()


class _Stream:
    """A query whose rows are read one by one; a fork closes it, so that no child inherits it."""

    def __init__(
        self,
        database: Database,
        query: str,
        parameters: Mapping[str, Value],
        end: float | None,
        timeout: float | None,
    ) -> None:
        self._query, self._timeout, self._callbacks = query, timeout, Callbacks()
        self._connection: sqlite3.Connection | None = None
        self._is_reading = False
        with database.connected(read_only=True) as connection:
            self._connection = connection
            forks.close_before_fork(self)
            try:
                self._cursor = _begin_query(connection, query, parameters, end, timeout, self._callbacks)
            except BaseException:
                self.close()
                raise
        self.columns = tuple(column[0] for column in self._cursor.description)

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Yield the rows."""
        while True:
            with forks.no_fork():
                if self._connection is None:
                    raise CacheError("a fork ended the query: run it again, and read all rows before the fork")
                self._is_reading = True
                try:
                    with _translate_errors(self._connection, self._query, self._timeout, self._callbacks):
                        row = next(self._cursor, None)
                finally:
                    self._is_reading = False
            if row is None:
                return
            yield row

    def close(self) -> None:
        """Close the connection, unless this call interrupts a read, as a fork in a signal handler may."""
        with forks.no_fork():
            if self._connection and not self._is_reading:
                self._connection.set_progress_handler(None, 0)
                self._connection.close()
                self._connection = None


class _Stopped(Exception):
    """A query was stopped for a fork."""


@contextmanager
def _translate_errors(
    connection: sqlite3.Connection,
    query: str,
    timeout: float | None,
    callbacks: Callbacks,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Turn SQLite's errors in the block into ours; errors of the storage pass unchanged."""
    try:
        yield
    except (sqlite3.Error, sqlite3.Warning, UnicodeError, OverflowError, ValueError) as error:
        callbacks.raise_again()
        message = str(error)
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_INTERRUPT:
            if should_stop():
                raise _Stopped from None
            assert timeout is not None
            raise query_timeout_error(timeout) from None
        if code == sqlite3.SQLITE_FULL:  # a query writes nothing else
            raise CacheError(
                "there is no space for SQLite's temporary files: name a folder with enough space in SQLITE_TMPDIR"
            ) from None
        if code in _STORAGE_CODES:
            raise
        if function := re.match("not authorized to use function: (.+)", message):
            if function[1] in ALLOWED:
                raise InvalidQuery(f"the query has over {_CALLS_LIMIT} function calls: make it shorter") from None
            raise InvalidQuery(f"the function {function[1]!r} is not allowed in a query: leave it out") from None
        if code == sqlite3.SQLITE_TOOBIG and message.startswith("string or blob"):
            most = format_size(MAX_VALUE_BYTES)
            raise InvalidQuery(f"a value in the query is over {most}: split it into rows") from None
        if message.startswith("LIKE or GLOB pattern"):
            limit = _LIMITS[sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH]
            raise InvalidQuery(f"a pattern of LIKE or GLOB is over {limit} bytes: shorten it, or use instr()") from None
        if message.startswith(("too many arguments on function", "too many columns in ", *_TOO_MANY_TERMS)):
            kind = sqlite3.SQLITE_LIMIT_FUNCTION_ARG if "arguments" in message else sqlite3.SQLITE_LIMIT_COLUMN
            raise InvalidQuery(f"{message}: use at most {_LIMITS[kind]}") from None
        if _REFUSAL.match(message):
            raise InvalidQuery("only read-only queries are allowed: use SELECT") from None
        missing = re.search(r"not supply a value for binding parameter :?(\w+)", message)
        if missing and f"?{missing[1]}" not in query:
            raise InvalidQuery(f"there is no value for :{missing[1]}: give one with -p {missing[1]}=VALUE") from None
        if missing or message.startswith("Binding "):
            raise InvalidQuery("a ? has no name: write :NAME instead, and give it a value with -p NAME=VALUE") from None
        if message.startswith("You can only execute one statement"):
            raise InvalidQuery("only one query is allowed at a time: run the others separately") from None
        connection.set_authorizer(None)
        place, hint = find_mistake(connection, query, message)
        raise InvalidQuery(message + hint, place) from None


def _authorizer() -> Callable[..., int]:
    """Return an authorizer that allows one query to read, and to call up to `_CALLS_LIMIT` safe functions."""
    calls = 0

    def authorize(action: int, first: str | None, second: str | None, *_: object) -> int:
        nonlocal calls
        if action == sqlite3.SQLITE_FUNCTION:
            calls += 1
            return sqlite3.SQLITE_OK if second in ALLOWED and calls <= _CALLS_LIMIT else sqlite3.SQLITE_DENY
        if action in _ALLOWED_ACTIONS or (action == sqlite3.SQLITE_PRAGMA and (first or "").lower() in _PRAGMAS):
            return sqlite3.SQLITE_OK
        return sqlite3.SQLITE_DENY

    return authorize
