"""Find the place of a mistake in a query, and suggest the name that was probably meant."""

from __future__ import annotations

import difflib
import re
import sqlite3
from collections.abc import Iterable

__all__ = ["find_mistake"]

Place = tuple[int, int]
"""The start and the end of a part of a query, in characters."""

_NAMING_ERROR = re.compile(
    r"(?:no such (?:column|table|function|window)|ambiguous column name|unrecognized token|near"
    r"|wrong number of arguments to function|misuse of (?:aggregate|window)(?: function)?)"
    r':? ("?)(.+?)\1(?:$|: syntax|\(\)$)'
)
_UNKNOWN_NAME = re.compile(r'no such (column|table): "?(?:\w+\.)??(?:(\w+)\.)?(\w+)(?![\w.])')
_MAX_NAMES = 10  # similar names that are tried in the query
_MAX_PLACES = 10  # places at which they are tried
_MAX_VIEWS = 3  # that a hint names; a column of more views is too common for a hint


def find_mistake(connection: sqlite3.Connection, query: str, message: str) -> tuple[Place | None, str]:
    """Return the place of the mistake that a message of SQLite means, if known, and a hint to add.

    Args:
        connection: a connection that only reads, and that has no authorizer.
        query: the query that SQLite refuses.
        message: SQLite's message.
    """
    unknown = _UNKNOWN_NAME.match(message)
    if unknown is None:
        return _find_place(connection, query, message), ""
    kind, qualifier, word = unknown.groups()
    bare = _blank_texts(query)
    columns = _read_columns(connection)
    written = {*columns, *re.findall(r"[^\W\d]\w*", bare)}  # tables, and the query's own names
    names = written if kind == "table" else written.union(*columns.values())
    before = rf"(?<!\w){qualifier}\s*\.\s*" if qualifier else r"(?<![\w.])"
    places = [match.span(1) for match in re.finditer(rf"{before}({word})(?!\w)", bare, re.IGNORECASE)]
    if found := _try_names(connection, query, message, word, names, places):
        return found[0], f": did you mean {found[1]}?"
    if qualifier:
        places = [match.span(1) for match in re.finditer(rf"(?<!\w)({qualifier})\s*\.", bare, re.IGNORECASE)]
        if found := _try_names(connection, query, message, qualifier, written, places):
            return found[0], f": did you mean {found[1]}.{word}?"
    elif kind == "column":
        views = [view for view, its_columns in columns.items() if word.lower() in its_columns]
        if 0 < len(views) <= _MAX_VIEWS:
            return _find_place(connection, query, message), f": it is a column of {', '.join(views)}"
    return _find_place(connection, query, message), ""


def _read_columns(connection: sqlite3.Connection) -> dict[str, set[str]]:
    """Return the columns of each table and view; the views come first."""
    query = """
        SELECT m.name, c.name FROM sqlite_master AS m, pragma_table_info(m.name) AS c
        WHERE m.type IN ('view', 'table') ORDER BY m.type = 'table', m.name
    """
    found: dict[str, set[str]] = {}
    for table, column in connection.execute(query):
        found.setdefault(table, set()).add(column)
    return found


def _try_names(
    connection: sqlite3.Connection, query: str, message: str, word: str, names: Iterable[str], places: list[Place]
) -> tuple[Place, str] | None:
    """Return the most similar name that SQLite accepts instead of a word, and its place.

    SQLite knows which names are in scope at a place.
    """
    for name in difflib.get_close_matches(word.lower(), sorted(set(names) - {word}), _MAX_NAMES):
        for start, stop in places[:_MAX_PLACES]:
            changed = _explain(connection, query[:start] + name + query[stop:])
            # If SQLite now complains about another unknown name, it has accepted this one.
            if changed is None or (changed.startswith("no such ") and changed != message and name not in changed):
                return (start, stop), name
    return None


def _explain(connection: sqlite3.Connection, query: str) -> str | None:
    """Return the message with which SQLite refuses to compile a query, or None."""
    try:
        connection.execute(query if re.match(r"\s*explain\b", query, re.IGNORECASE) else f"EXPLAIN {query}").close()
    except sqlite3.ProgrammingError:  # SQLite has compiled the query, and lacks values for its parameters
        return None
    except sqlite3.Error as error:
        return str(error)
    return None


def _blank_texts(query: str) -> str:
    """Return the query with spaces in place of strings and comments, which contain no names."""
    return re.sub(r"'[^']*'|--.*|/\*(?s:.*?)\*/", lambda match: " " * len(match[0]), query)


def _find_place(connection: sqlite3.Connection, query: str, message: str) -> Place | None:
    named = _NAMING_ERROR.match(message)
    if named is None:
        return (len(query.rstrip()), len(query.rstrip())) if message == "incomplete input" else None
    word = named[2].rpartition(".")[2]
    bare = _blank_texts(query)
    found = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", bare, re.IGNORECASE)]
    if not found:
        found = [match.span() for match in re.finditer(re.escape(word), query)]
    if message.startswith("near"):
        # SQLite does not say which occurrence it means. Cut the query after each: the first with the same error is it.
        for start, stop in found:
            if _explain(connection, query[:stop]) == message:
                return start, stop
    return found[0] if found else None
