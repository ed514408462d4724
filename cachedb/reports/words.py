"""Turn values of the index into words for the HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection, text

from cachedb.text import cut, printable

__all__ = [
    "AGES",
    "Row",
    "clean_text",
    "fetch_rows",
    "find_age",
    "format_age",
    "format_command",
    "format_count",
    "format_platform",
]


_TEXT: Final = 160  # characters of a text that a stranger wrote, of which 200 are read
AGES: Final = (7, 30, 90, 180)  # days without use, between the colours

Row = Any  # of a view: SQLAlchemy's, by the names of its columns


def fetch_rows(connection: Connection, query: str, **parameters: object) -> Sequence[Row]:
    """Return the rows of a query."""
    return connection.execute(text(query), parameters).all()


# Words


def format_count(number: int, noun: str, nouns: str = "") -> str:
    """Return a number with its noun, in the singular or the plural."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def clean_text(words: str, length: int = _TEXT) -> str:
    """Cut a text that a stranger wrote, and write out what could change the direction or the order of what is read."""
    return printable(cut(words, length))


def format_command(created_by: str | None) -> str:
    """Return what is particular to a command: what follows the words that builders put before all of them."""
    words = created_by or ""
    for prefix in ("RUN ", "/bin/sh -c ", "#(nop) "):
        words = words.removeprefix(prefix)
    return clean_text(words.removesuffix("# buildkit").strip(), 80)


def format_platform(row: Row) -> str:
    """Return what an image is for, as `docker pull --platform` takes it."""
    return clean_text("/".join(filter(None, (row.os, row.architecture, row.variant)))) or "none, or several"


def format_age(last_used_at: str, now: datetime) -> int:
    """Return how long ago that was, as a place in the scale of colours."""
    return sum(last_used_at < _time(now - timedelta(days=days)) for days in AGES)


def find_age(column: str, now: datetime) -> tuple[str, dict[str, str]]:
    """Return the same in SQL, with its parameters."""
    cases = " ".join(f"WHEN {column} >= :limit{age} THEN {age}" for age in range(len(AGES)))
    limits = {f"limit{age}": _time(now - timedelta(days=days)) for age, days in enumerate(AGES)}
    return f"CASE {cases} ELSE {len(AGES)} END", limits


def _time(time: datetime) -> str:
    """Return a time as the index has it."""
    return f"{time.replace(tzinfo=None).isoformat(timespec='microseconds')}Z"
