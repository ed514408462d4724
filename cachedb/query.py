"""Questions in SQL, to an index that is in use: only to read, and not for longer than they are given."""

from __future__ import annotations

import difflib
import re
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from cachedb.database import Database
from cachedb.errors import CacheError, InvalidQuery
from cachedb.units import ago, human

__all__ = ["Answer", "View", "answer", "views"]

Value = str | int | float | None
"""What SQL has as a value."""

_EVERY = 20_000  # steps of SQLite's machine between two looks at the clock, and at signals: a few milliseconds
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
_REFUSED = re.compile(r"not authorized|authorization denied|attempt to write|cannot modify|.* may not be modified")
_NAMED = re.compile(
    r"(?:no such (?:column|table|function|window)|ambiguous column name|unrecognized token|near"
    r"|wrong number of arguments to function|misuse of (?:aggregate|window)(?: function)?)"
    r':? ("?)(.+?)\1(?:$|: syntax|\(\)$)'
)


class Answer(NamedTuple):
    """What a query gives."""

    columns: tuple[str, ...]
    rows: Iterator[tuple[Any, ...]]  # as they are found


class View(NamedTuple):
    """A view of the index, for people to ask."""

    name: str
    columns: tuple[str, ...]
    description: str
    definition: str  # SQL


@contextmanager
def answer(
    database: Database, query: str, parameters: Mapping[str, Value] | None = None, timeout: float | None = None
) -> Iterator[Answer]:
    """Ask one question, of the index as it is at one moment; writers are not held up by it.

    SQL has two functions more: ``human(bytes)``, as ``1.2 MB``, and ``ago(time)``, as ``3 days ago``.

    Args:
        database: to ask.
        query: in SQLite's SQL.
        parameters: for what the query has as ``:name``.
        timeout: seconds after which it is stopped, also while its rows are read.

    Raises:
        InvalidQuery: if it is no query, or would do something else than read.
        CacheError: if it takes too long.
    """
    with database.raw(read_only=True) as connection:
        connection.execute("PRAGMA query_only = ON")
        connection.create_function("human", 1, _human, deterministic=True)
        connection.create_function("ago", 1, _ago)
        end = None if timeout is None else time.monotonic() + timeout
        # A call into Python is also when a signal is looked at.
        connection.set_progress_handler(lambda: end is not None and time.monotonic() > end, _EVERY)
        for table in _TABLES:  # SQLite makes them at their first use, which the next line would refuse
            connection.execute(f"SELECT 1 FROM {table} LIMIT 0").close()  # noqa: S608
        connection.set_authorizer(_authorize)

        def rows(cursor: sqlite3.Cursor) -> Iterator[tuple[Any, ...]]:
            with _errors(connection, query, end, timeout):
                for row in cursor:  # noqa: UP028 - `yield from` would close the cursor of a connection that is closed
                    yield row

        if sys.version_info >= (3, 12):  # a column that there is not is no text in double quotes
            connection.setconfig(sqlite3.SQLITE_DBCONFIG_DQS_DML, False)
        for name in parameters or {}:
            if not re.search(rf"[:@$]{re.escape(name)}\b", query):
                known = ", ".join(sorted(set(re.findall(r":\w+", query)))) or "none"
                raise InvalidQuery(f"the query has no :{name}; it has {known}")
        with _errors(connection, query, end, timeout):
            cursor = connection.execute(query, parameters or {})
            if cursor.description is None:
                raise InvalidQuery("there is no query: write one that begins with SELECT")
        try:
            yield Answer(tuple(column[0] for column in cursor.description), rows(cursor))
        finally:
            connection.set_progress_handler(None, 0)
            cursor.close()


@contextmanager
def _errors(connection: sqlite3.Connection, query: str, end: float | None, timeout: float | None) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, sqlite3.Warning, UnicodeError, OverflowError, ValueError) as error:
        message = str(error)
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_INTERRUPT:
            if end is None or time.monotonic() < end:
                raise KeyboardInterrupt from None  # what a signal raised in the handler, SQLite has swallowed
            raise CacheError(f"the query took over {timeout:g} s: narrow it, or give it more time") from None
        if code in _NOT_OF_THE_QUERY:
            raise
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


def _authorize(action: int, first: str | None, second: str | None, *_: object) -> int:
    if action in _ALLOWED and not (action == sqlite3.SQLITE_FUNCTION and second == "load_extension"):
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_PRAGMA and (first or "").lower() in _PRAGMAS:
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


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


def views(database: Database) -> list[View]:
    """Return the views, in the order of their names, each with what is said of it in its SQL."""
    found = []
    with database.read() as connection:
        rows = connection.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE type = 'view' ORDER BY name")
        for name, sql in rows.all():
            said = re.search(r"^-- (.*)$", sql, re.MULTILINE)
            info = connection.exec_driver_sql("SELECT name FROM pragma_table_info(?)", (name,))
            found.append(View(name, tuple(info.scalars()), said[1] if said else "", sql))
    return found
