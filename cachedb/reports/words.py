"""Fetch values from the index, and format them for the HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection, text

from cachedb.text import printable, truncate

__all__ = [
    "AGE_DAYS",
    "Row",
    "build_age_expression",
    "clean_text",
    "fetch_rows",
    "find_age_group",
    "format_command",
    "format_count",
    "format_platform",
]


_TEXT_CHARACTERS: Final = 160  # the shown part of an untrusted text; queries read 200 characters
AGE_DAYS: Final = (7, 30, 90, 180)  # days since the last use, where one age group ends and the next begins

Row = Any  # a row of SQLAlchemy, with the columns of a view as attributes


def fetch_rows(connection: Connection, query: str, **parameters: object) -> Sequence[Row]:
    """Run a query and return all its rows."""
    return connection.execute(text(query), parameters).all()


def format_count(number: int, noun: str, nouns: str = "") -> str:
    """Format a number with its noun in the singular or plural."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def clean_text(words: str, length: int = _TEXT_CHARACTERS) -> str:
    """Shorten an untrusted text and escape its control characters, which could reorder the displayed text."""
    return printable(truncate(words, length))


def format_command(created_by: str | None) -> str:
    """Return a layer's command without the prefixes that builders add to every command."""
    words = created_by or ""
    for prefix in ("RUN ", "/bin/sh -c ", "#(nop) "):
        words = words.removeprefix(prefix)
    return clean_text(words.removesuffix("# buildkit").strip(), 80)


def format_platform(row: Row) -> str:
    """Format an image's platform as `docker pull --platform` expects it."""
    return clean_text("/".join(filter(None, (row.os, row.architecture, row.variant)))) or "unknown, or several"


def find_age_group(last_used_at: str, now: datetime) -> int:
    """Return the number of the age group that a time belongs to; 0 is the most recent."""
    return sum(last_used_at < _format_time(now - timedelta(days=days)) for days in AGE_DAYS)


def build_age_expression(column: str, now: datetime) -> tuple[str, dict[str, str]]:
    """Return an SQL expression that computes the age group of a column, and its parameters."""
    cases = " ".join(f"WHEN {column} >= :limit{age} THEN {age}" for age in range(len(AGE_DAYS)))
    limits = {f"limit{age}": _format_time(now - timedelta(days=days)) for age, days in enumerate(AGE_DAYS)}
    return f"CASE {cases} ELSE {len(AGE_DAYS)} END", limits


def _format_time(time: datetime) -> str:
    """Format a time as in the index."""
    return f"{time.replace(tzinfo=None).isoformat(timespec='microseconds')}Z"
