"""Questions in SQL, to an index that is in use: only to read, and not for longer than they are given."""

from __future__ import annotations

import difflib
import marshal
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from functools import partial
from tempfile import SpooledTemporaryFile
from typing import Any, Final, NamedTuple

from cachedb.callbacks import Callbacks
from cachedb.disk import locks
from cachedb.errors import CacheError, InvalidQuery, os_errors
from cachedb.index.sqlite.database import Database
from cachedb.text import ago, human

__all__ = ["Answer", "answer"]


Value = str | int | float | None
"""What SQL has as a value."""

_EVERY = 2_000  # steps of SQLite's machine between two looks at the clock, and at signals
_PATIENCE_SECONDS = 0.1  # that a fork waits at first for the end of a query, before the query is begun anew
_IN_MEMORY_BYTES = 4 * 1024 * 1024  # of the rows of an answer
_BATCH_BYTES = 64 * 1024  # of rows that are written together
_NOT_OF_THE_QUERY = frozenset(
    {
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
    }
)
_ALLOWED = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE, sqlite3.SQLITE_FUNCTION})
# What only tells of the schema.
_PRAGMAS: Final = frozenset({"table_info", "table_xinfo", "table_list", "index_list", "index_info", "index_xinfo"})
_TABLES: Final = ("json_each", "json_tree", *(f"pragma_{name}" for name in sorted(_PRAGMAS)))
# What bounds a single step, during which nobody looks at the clock.
_LIMITS: Final = {
    sqlite3.SQLITE_LIMIT_LENGTH: 5 * 1024 * 1024,  # bytes of a value: a label has at most those of a document, 4 MiB
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 128,  # bytes: a step takes this many times the text's
}
_DIGITS: Final = 9  # of a number that is not looked at any further
_CALLS_LIMIT: Final = 200  # of functions that a query names: all of them may be called for one row
_SLOW_CALL: Final = re.compile(r"\b(?:instr|replace|[lr]?trim)\b", re.IGNORECASE)
_FORMAT_CALL: Final = re.compile(r"\b(?:printf|format)\b", re.IGNORECASE)
_SPECIFIER: Final = re.compile(r"%[-+ #!0,]*(\d+|\*)?(?:\.(\d+|\*))?")  # its width and precision
_QUICK_CALL: Final = re.compile(r"\b(?:instr|[lr]?trim)\([\w.]+, ?'[^']{1,8}'\)")
# Those of SQLite that neither change anything, nor reach out of the index, nor take more than time in proportion to
# their arguments; of those that do, `_instr`, `_replace`, `_trim` and `_Format` are in the place. A later release may
# have others.
_FUNCTIONS: Final = frozenset(
    """
    -> ->> abs acos acosh asin asinh atan atan2 atanh avg ceil ceiling changes char coalesce concat concat_ws cos cosh
    count cume_dist current_date current_time current_timestamp date datetime degrees dense_rank exp first_value floor
    format glob group_concat hex if ifnull iif instr json json_array json_array_length json_error_position json_extract
    json_group_array json_group_object json_insert json_object json_pretty json_quote json_remove json_replace json_set
    json_type json_valid jsonb jsonb_array jsonb_extract jsonb_group_array jsonb_group_object jsonb_insert jsonb_object
    jsonb_remove jsonb_replace jsonb_set julianday lag last_insert_rowid last_value lead length like likelihood likely
    ln log log10 log2 lower ltrim max median min mod nth_value ntile nullif octet_length percent_rank percentile
    percentile_cont percentile_disc pi pow power printf quote radians random randomblob rank replace round row_number
    rtrim sign sin sinh soundex sqlite_compileoption_get sqlite_compileoption_used sqlite_source_id sqlite_version sqrt
    strftime string_agg substr substring subtype sum tan tanh time timediff total total_changes trim trunc typeof
    unhex unicode unistr unistr_quote unixepoch unlikely upper zeroblob
    ago human
    """.split()  # noqa: SIM905
)
_REFUSED = re.compile(
    r"not authorized|authorization denied|attempt to write|cannot (?:modify|VACUUM)|.* may not be modified"
)
_NAMED = re.compile(
    r"(?:no such (?:column|table|function|window)|ambiguous column name|unrecognized token|near"
    r"|wrong number of arguments to function|misuse of (?:aggregate|window)(?: function)?)"
    r':? ("?)(.+?)\1(?:$|: syntax|\(\)$)'
)


class Answer(NamedTuple):
    """What a query gives."""

    columns: tuple[str, ...]
    rows: Iterator[tuple[Any, ...]]


@contextmanager
def answer(
    database: Database,
    query: str,
    parameters: Mapping[str, Value] | None = None,
    timeout: float | None = None,
    *,
    stream: bool = False,
) -> Iterator[Answer]:
    """Ask one question, of the index as it is at one moment; writers are not held up by it.

    All rows are read before the block begins, so that no fork waits for the block. Many rows lie in a temporary file.

    SQL has two functions more: ``human(bytes)``, as ``1.2 MB``, and ``ago(time)``, as ``3 days ago``.

    Args:
        database: to ask.
        query: in SQLite's SQL.
        parameters: for what the query has as ``:name``.
        timeout: seconds after which it is stopped, also while its rows are read.
        stream: give each row as soon as it is found. A fork ends such an answer.

    Raises:
        InvalidQuery: if it is no query, or would do something else than read.
        CacheError: if it takes too long, or a fork has ended it.
    """
    end = None if timeout is None else time.monotonic() + timeout
    if stream:
        with closing(_Stream(database, query, parameters or {}, end, timeout)) as streamed:
            yield Answer(streamed.columns, streamed.rows())
        return
    patience = _PATIENCE_SECONDS
    while True:
        rows = _Rows()
        try:
            columns = _read(database, query, parameters or {}, end, timeout, rows, patience)
            if columns is not None:
                yield Answer(columns, iter(rows))
                return
        finally:
            rows.close()
        patience *= 2  # or a process that forks all the time would never get its answer


def _read(
    database: Database,
    query: str,
    parameters: Mapping[str, Value],
    end: float | None,
    timeout: float | None,
    rows: _Rows,
    patience: float,
) -> tuple[str, ...] | None:
    """Read an answer to its end; return its columns, or None if it was stopped for a fork."""
    waiting: float | None = None  # since when a fork has been
    stopped = False

    def gives_way() -> bool:
        nonlocal waiting, stopped
        if locks.is_fork_waiting():
            waiting = waiting or time.monotonic()
            stopped = time.monotonic() - waiting > patience
        return stopped

    with database.raw(read_only=True) as connection:
        try:
            callbacks = Callbacks()
            cursor = _begin(connection, query, parameters, end, timeout, callbacks, gives_way)
            with closing(cursor), _errors(connection, query, timeout, callbacks, lambda: stopped):
                for row in cursor:
                    rows.add(row)
        except _Stopped:
            return None
        finally:
            connection.set_progress_handler(None, 0)
    return tuple(column[0] for column in cursor.description)


def _begin(
    connection: sqlite3.Connection,
    query: str,
    parameters: Mapping[str, Value],
    end: float | None,
    timeout: float | None,
    callbacks: Callbacks,
    stops: Callable[[], bool] = lambda: False,
) -> sqlite3.Cursor:
    """Have a connection answer one question, and do nothing else; return the cursor, which is before the first row."""
    connection.execute("PRAGMA query_only = ON")
    connection.create_function("human", 1, callbacks.function(_human), deterministic=True)
    connection.create_function("ago", 1, callbacks.function(_ago))
    _bound(connection, query)
    # A call into Python is also when a signal is looked at.
    over = callbacks.progress_handler(lambda: stops() or (end is not None and time.monotonic() > end))
    connection.set_progress_handler(over, _EVERY)
    for table in _TABLES:  # SQLite makes them at their first use, which the next line would refuse
        connection.execute(f"SELECT 1 FROM {table} LIMIT 0").close()  # noqa: S608
    connection.set_authorizer(_authorizer())
    if sys.version_info >= (3, 12):  # a column that there is not is no text in double quotes
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_DQS_DML, False)
    for name in parameters:
        if not re.search(rf"[:@$]{re.escape(name)}\b", query):
            known = ", ".join(sorted(set(re.findall(r":\w+", query)))) or "none"
            raise InvalidQuery(f"the query has no :{name}; it has {known}")
    with _errors(connection, query, timeout, callbacks, stops):
        cursor = connection.execute(query, parameters)
        if cursor.description is None:
            raise InvalidQuery("there is no query: write one that begins with SELECT")
    return cursor


class _Rows:
    """The rows of an answer: some in memory, many in a temporary file."""

    def __init__(self) -> None:
        self._file = SpooledTemporaryFile(_IN_MEMORY_BYTES)  # noqa: SIM115 - `close` closes it
        self._batch: list[tuple[Any, ...]] = []
        self._most = 1  # rows in a batch: as many as take about so many bytes

    def add(self, row: tuple[Any, ...]) -> None:
        """Add a row at the end."""
        self._batch.append(row)
        if len(self._batch) >= self._most:
            self._write()

    def _write(self) -> None:
        data = marshal.dumps(self._batch)
        with os_errors("keep the rows of an answer in a temporary file"):
            self._file.write(len(data).to_bytes(8, "little"))
            self._file.write(data)
        self._most = max(1, min(2 * self._most, _BATCH_BYTES * len(self._batch) // len(data)))
        self._batch = []

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        with os_errors("read the rows of an answer from a temporary file"):
            self._file.seek(0)
            while size := self._file.read(8):
                yield from marshal.loads(self._file.read(int.from_bytes(size, "little")))  # noqa: S302 - it is our own
        yield from self._batch

    def close(self) -> None:
        """Delete the file; there are no more rows then."""
        self._file.close()


class _Stream:
    """The rows of an answer, one by one as they are found. A fork closes it: no child may inherit its connection."""

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
            locks.before_fork(self)
            try:
                self._cursor = _begin(connection, query, parameters, end, timeout, self._callbacks)
            except BaseException:
                self.close()
                raise
        self.columns = tuple(column[0] for column in self._cursor.description)

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Yield the rows."""
        while True:
            with locks.unforked():
                if self._connection is None:
                    raise CacheError("a fork has ended the answer: ask again, and read all rows before the fork")
                self._is_reading = True
                try:
                    with _errors(self._connection, self._query, self._timeout, self._callbacks):
                        row = next(self._cursor, None)
                finally:
                    self._is_reading = False
            if row is None:
                return
            yield row

    def close(self) -> None:
        """Close the connection, unless SQLite is in it: then a signal's handler forks."""
        with locks.unforked():
            if self._connection and not self._is_reading:
                self._connection.set_progress_handler(None, 0)
                self._connection.close()
                self._connection = None


class _Stopped(Exception):
    """A query has been stopped for a fork."""


@contextmanager
def _errors(
    connection: sqlite3.Connection,
    query: str,
    timeout: float | None,
    callbacks: Callbacks,
    stops: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, sqlite3.Warning, UnicodeError, OverflowError, ValueError) as error:
        callbacks.raise_again()
        message = str(error)
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_INTERRUPT:
            if stops():
                raise _Stopped from None
            raise CacheError(f"the query took over {timeout:g} s: narrow it, or give it more time") from None
        if code in _NOT_OF_THE_QUERY:
            raise
        if function := re.match("not authorized to use function: (.+)", message):
            if function[1] in _FUNCTIONS:
                raise InvalidQuery(f"the query has over {_CALLS_LIMIT} calls of functions: make it shorter") from None
            raise InvalidQuery(f"the function {function[1]!r} is not allowed in a query: leave it out") from None
        if code == sqlite3.SQLITE_TOOBIG and message.startswith("string or blob"):
            most = human(_LIMITS[sqlite3.SQLITE_LIMIT_LENGTH])
            raise InvalidQuery(f"a value in the query is over {most}: split it into rows") from None
        if message.startswith("LIKE or GLOB pattern"):
            limit = _LIMITS[sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH]
            raise InvalidQuery(f"a pattern of LIKE or GLOB is over {limit} bytes: shorten it, or use instr()") from None
        if _REFUSED.match(message):
            raise InvalidQuery("it would do something else than read: only questions can be asked") from None
        missing = re.search(r"not supply a value for binding parameter :?(\w+)", message)
        if missing and f"?{missing[1]}" not in query:
            raise InvalidQuery(f"there is no value for :{missing[1]}: give one with -p {missing[1]}=VALUE") from None
        if missing or message.startswith("Binding "):
            raise InvalidQuery("a ? has no name: write :NAME instead, and give it a value with -p NAME=VALUE") from None
        if message.startswith("You can only execute one statement"):
            raise InvalidQuery("only one question can be asked at a time") from None
        connection.set_authorizer(None)
        place = _place(connection, query, message)
        raise InvalidQuery(message + _suggestion(connection, query, message), place) from None


def _bound(connection: sqlite3.Connection, query: str) -> None:
    """See that no single step of a query takes long, for it could not be stopped."""
    for limit, value in _LIMITS.items():
        connection.setlimit(limit, value)
    # SQLite's own take time in proportion to the product of both arguments' lengths; the views call them with short
    # ones, and where those are enough they are quicker.
    if _SLOW_CALL.search(_QUICK_CALL.sub("", query)):
        connection.create_function("instr", 2, _instr, deterministic=True)
        connection.create_function("replace", 3, _replace, deterministic=True)
        for name, strip in (("trim", str.strip), ("ltrim", str.lstrip), ("rtrim", str.rstrip)):
            connection.create_function(name, 2, partial(_trim, strip), deterministic=True)
    # SQLite's own goes on for as many characters as a precision asks for, long after the value is too large.
    if _FORMAT_CALL.search(query):
        for name in ("printf", "format"):
            connection.create_function(name, -1, _Format(), deterministic=True)


def _authorizer() -> Callable[..., int]:
    """Return what allows one query to read, and to call so many functions that are harmless."""
    calls = 0

    def authorize(action: int, first: str | None, second: str | None, *_: object) -> int:
        nonlocal calls
        if action == sqlite3.SQLITE_FUNCTION:
            calls += 1
            return sqlite3.SQLITE_OK if second in _FUNCTIONS and calls <= _CALLS_LIMIT else sqlite3.SQLITE_DENY
        if action in _ALLOWED or (action == sqlite3.SQLITE_PRAGMA and (first or "").lower() in _PRAGMAS):
            return sqlite3.SQLITE_OK
        return sqlite3.SQLITE_DENY

    return authorize


def _instr(text: Any, part: Any) -> int | None:  # noqa: ANN401
    if text is None or part is None:
        return None
    if not (isinstance(text, bytes) and isinstance(part, bytes)):
        text, part = _as_text(text), _as_text(part)
    return int(text.find(part)) + 1


def _replace(text: Any, old: Any, new: Any) -> Any:  # noqa: ANN401
    if text is None or old is None or new is None:
        return None
    where, old, new = _as_text(text), _as_text(old), _as_text(new)
    if not old:
        return where if isinstance(text, bytes) else text  # as SQLite has it
    if len(where) + where.count(old) * (len(new) - len(old)) > _LIMITS[sqlite3.SQLITE_LIMIT_LENGTH]:
        raise OverflowError  # before it takes the memory
    return where.replace(old, new)


def _trim(strip: Callable[[str, str], str], text: Any, characters: Any) -> str | None:  # noqa: ANN401
    if text is None or characters is None:
        return None
    # Of each character of a string, `str.strip` looks at all.
    return strip(_as_text(text), "".join(set(_as_text(characters))))


class _Format:
    """SQLite's printf, for values that are not too large."""

    def __init__(self) -> None:
        self._connection: sqlite3.Connection | None = None

    def __del__(self) -> None:
        if self._connection is not None:  # SQLite gives the function up when it closes the connection of the query
            self._connection.close()

    def __call__(self, *arguments: Value) -> Value:
        if arguments and arguments[0] is not None:
            limit = _LIMITS[sqlite3.SQLITE_LIMIT_LENGTH]
            asked = [part for found in _SPECIFIER.findall(_as_text(arguments[0])) for part in found if part]
            numbers = [len(part) for part in asked if part != "*"]
            if any(size > _DIGITS for size in numbers) or any(part != "*" and int(part) > limit for part in asked):
                raise OverflowError
            if "*" in asked and any(_too_large(value, limit) for value in arguments[1:]):
                raise OverflowError
        if self._connection is None:
            self._connection = sqlite3.connect(":memory:", check_same_thread=False)
        places = ", ".join("?" * len(arguments))
        found: Value = self._connection.execute(f"SELECT printf({places})", arguments).fetchone()[0]
        return found


def _too_large(value: Value, limit: int) -> bool:
    """Return whether a value, as SQLite takes it for a whole number, is beyond a limit on either side of zero."""
    if isinstance(value, (str, bytes)):
        number = re.match(r"\s*[-+]?(\d+)", _as_text(value))
        return number is not None and (len(number[1].lstrip("0")) > _DIGITS or int(number[1]) > limit)
    return value is not None and not abs(value) <= limit


def _as_text(value: Any) -> str:  # noqa: ANN401
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _place(connection: sqlite3.Connection, query: str, message: str) -> tuple[int, int] | None:
    """Return where in a query the error is: from one character to another; None if that cannot be told."""
    named = _NAMED.match(message)
    if named is None:
        return (len(query.rstrip()), len(query.rstrip())) if message == "incomplete input" else None
    word = named[2].rpartition(".")[2]
    bare = re.sub(r"'[^']*'|--.*|/\*(?s:.*?)\*/", lambda match: " " * len(match[0]), query)  # no names are in those
    found = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", bare, re.IGNORECASE)]
    if not found:
        found = [match.span() for match in re.finditer(re.escape(word), query)]
    if message.startswith("near"):
        # SQLite does not say which it is: it is the one up to which the query is as wrong as all of it.
        for start, stop in found:
            try:
                connection.execute(f"EXPLAIN {query[:stop]}").close()
            except sqlite3.Error as error:
                if str(error) == message:
                    return start, stop
    return found[0] if found else None


def _human(size: Value) -> str | None:
    return human(size) if isinstance(size, (int, float)) else None


def _ago(time: Value) -> str | None:
    try:
        then = datetime.fromisoformat(time) if isinstance(time, str) else None
    except ValueError:
        return None
    return None if then is None else ago(then if then.tzinfo else then.replace(tzinfo=UTC))


def _suggestion(connection: sqlite3.Connection, query: str, message: str) -> str:
    """Say what may be meant by a name that there is not."""
    named = re.match(r"no such (column|table): (?:\w+\.)?(\w+)", message)
    if named is None:
        return ""
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type IN ('view', 'table')")]
    if named[1] == "column":
        columns = "SELECT name FROM pragma_table_info(?)"
        asked = [name for name in tables if re.search(rf"\b{re.escape(name)}\b", query, re.IGNORECASE)]
        known = {column for name in asked for (column,) in connection.execute(columns, (name,))}
    else:
        known = set(tables)
    near = difflib.get_close_matches(named[2].lower(), sorted(known), 1)
    return f"; did you mean {near[0]}?" if near else ""
