"""The functions of cachedb's SQL: ours, and those that replace slow ones of SQLite.

SQLite cannot be stopped during a call, so the time of each call must be proportional to the size of its arguments.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import takewhile
from typing import Any, Final

from cachedb.callbacks import Callbacks
from cachedb.text import format_age, format_size

__all__ = ["ALLOWED", "MAX_VALUE_BYTES", "Value", "create_functions"]


Value = str | int | float | None
"""A value of a query's parameter or result."""

MAX_VALUE_BYTES: Final = 5 * 1024 * 1024
"""The limit of a value in a query; values in the index are smaller."""

ALLOWED: Final = frozenset(
    """
    -> ->> abs acos acosh asin asinh atan atan2 atanh avg ceil ceiling changes char coalesce concat concat_ws cos cosh
    count cume_dist current_date current_time current_timestamp date datetime degrees dense_rank exp first_value floor
    format glob group_concat hex if ifnull iif instr json json_array json_array_length json_error_position json_extract
    json_group_array json_group_object json_object json_quote json_remove json_replace json_type json_valid jsonb
    jsonb_array jsonb_extract jsonb_group_array jsonb_group_object jsonb_object jsonb_remove jsonb_replace julianday
    lag last_insert_rowid last_value lead length like likelihood likely ln log log10 log2 lower ltrim max min mod
    nth_value ntile nullif octet_length percent_rank pi pow power printf quote radians random randomblob rank replace
    round row_number rtrim sign sin sinh soundex sqlite_compileoption_get sqlite_compileoption_used sqlite_source_id
    sqlite_version sqrt strftime string_agg substr substring subtype sum tan tanh time timediff total total_changes
    trim trunc typeof unicode unistr unistr_quote unixepoch unlikely upper zeroblob
    ago human
    """.split()  # noqa: SIM905
)
"""The functions that a query may call.

They change nothing, access only the index, and take time proportional to the size of their arguments.
Later releases of SQLite may add unsafe functions, so the list names the allowed ones. These are left out: median, the
percentiles and unhex, which may take the square of that time; json_pretty, whose result may take gigabytes; json_insert
and json_set, which overflow the stack of SQLite 3.40 if a path is long.
"""

_SLOW_CALL: Final = re.compile(r"\b(?:instr|replace|[lr]?trim)\b", re.IGNORECASE)
_QUICK_CALL: Final = re.compile(r"\b(?:instr|[lr]?trim)\([\w.]+, ?'[^']{1,8}'\)")
_FORMAT_CALL: Final = re.compile(r"\b(?:printf|format)\b", re.IGNORECASE)
# The groups are width, precision and type.
_SPECIFIER: Final = re.compile(r"%[-+ #!0,]*(\d+|\*)?(?:\.(\d+|\*)?)?l{0,2}(.?)", re.DOTALL)
_MAX_DIGITS: Final = 9  # a number with more digits exceeds every limit


def create_functions(connection: sqlite3.Connection, query: str, callbacks: Callbacks) -> None:
    """Create ``human`` and ``ago``, and replacements of the slow functions that a query calls."""
    connection.create_function("human", 1, callbacks.function(_human), deterministic=True)
    connection.create_function("ago", 1, callbacks.function(_ago))
    # The time of SQLite's own functions is proportional to the product of both lengths. With a short literal, as in
    # the views, they are faster than ours.
    if _SLOW_CALL.search(_QUICK_CALL.sub("", query)):
        connection.create_function("instr", 2, _instr, deterministic=True)
        connection.create_function("replace", 3, _replace, deterministic=True)
        for name, trim in (("trim", _trim), ("ltrim", _ltrim), ("rtrim", _rtrim)):
            connection.create_function(name, 2, trim, deterministic=True)
    # SQLite's own function writes all characters of a large width or precision, even if the value is then too large.
    if _FORMAT_CALL.search(query):
        for name in ("printf", "format"):
            connection.create_function(name, -1, _Format(), deterministic=True)


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
        return where if isinstance(text, bytes) else text  # as SQLite does
    if len(where) + where.count(old) * (len(new) - len(old)) > MAX_VALUE_BYTES:
        raise OverflowError  # before the result takes memory
    return where.replace(old, new)


def _trim(text: Any, characters: Any) -> str | None:  # noqa: ANN401
    return _ltrim(_rtrim(text, characters), characters)


def _ltrim(text: Any, characters: Any) -> str | None:  # noqa: ANN401
    if text is None or characters is None:
        return None
    whole = _as_text(text)
    return whole[_count_first(whole, characters) :]


def _rtrim(text: Any, characters: Any) -> str | None:  # noqa: ANN401
    if text is None or characters is None:
        return None
    whole = _as_text(text)
    return whole[: len(whole) - _count_first(reversed(whole), characters)]


def _count_first(text: Iterable[str], characters: Any) -> int:  # noqa: ANN401
    """Return how many of the first characters are among these.

    `str.strip` would search a long text for each.
    """
    return sum(1 for _ in takewhile(set(_as_text(characters)).__contains__, text))


class _Format:
    """An SQL function like SQLite's printf that refuses to produce too large values."""

    def __init__(self) -> None:
        self._connection: sqlite3.Connection | None = None

    def __del__(self) -> None:
        if self._connection is not None:  # SQLite drops the function when the query's connection closes
            self._connection.close()

    def __call__(self, *arguments: Value) -> Value:
        if arguments and arguments[0] is not None:
            _check_format(_as_text(arguments[0]), iter(arguments[1:]))
        if self._connection is None:
            self._connection = sqlite3.connect(":memory:", check_same_thread=False)
            self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        placeholders = ", ".join("?" * len(arguments))
        found: Value = self._connection.execute(f"SELECT printf({placeholders})", arguments).fetchone()[0]
        return found


def _check_format(text: str, values: Iterator[Value]) -> None:
    """Raise `OverflowError` if the widths and precisions of a format add up to a value that is too large."""
    size = 0
    for specifier in _SPECIFIER.finditer(text):
        width, precision, kind = specifier.groups()
        for number in (width, precision):
            size += _absolute(next(values, None) if number == "*" else number)
        if size > MAX_VALUE_BYTES:
            raise OverflowError
        if kind not in ("%", "n"):  # these two take no value
            next(values, None)


def _absolute(value: Value) -> int:
    """Return the absolute value as SQLite converts it to an integer.

    The result is at most one more than the limit of a value.
    """
    if isinstance(value, (str, bytes)):
        number = re.match(r"\s*[-+]?0*(\d+)", _as_text(value))
        if number is None:
            return 0
        value = int(number[1]) if len(number[1]) <= _MAX_DIGITS else MAX_VALUE_BYTES + 1
    return 0 if value is None else int(min(abs(value), MAX_VALUE_BYTES + 1))


def _as_text(value: Any) -> str:  # noqa: ANN401
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _human(size: Value) -> str | None:
    return format_size(size) if isinstance(size, (int, float)) else None


def _ago(time: Value) -> str | None:
    try:
        then = datetime.fromisoformat(time) if isinstance(time, str) else None
    except ValueError:
        return None
    return None if then is None else format_age(then if then.tzinfo else then.replace(tzinfo=UTC))
