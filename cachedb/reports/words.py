"""Fetch values from the index, and format them for the HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection, text

from cachedb.index.tables import format_time
from cachedb.oci.platforms import join_platform
from cachedb.text import printable, truncate

__all__ = [
    "AGE_DAYS",
    "UNKNOWN_PLATFORM",
    "Row",
    "build_age_expression",
    "clean_text",
    "fetch_rows",
    "format_age_group",
    "format_command",
    "format_count",
    "format_platform",
    "shorten_path",
]


_TEXT_CHARACTERS: Final = 160  # the shown part of an untrusted text; queries read 200 characters
AGE_DAYS: Final = (7, 30, 90, 180)  # days since the last use, where one age group ends and the next begins

UNKNOWN_PLATFORM: Final = "unknown"

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


def shorten_path(name: str, letters: int) -> str:
    """Shorten a name to a number of letters: drop its first path parts, then the middle of the last.

    Names in a cache often begin alike, so their ends distinguish them.
    """
    if len(name) <= letters:
        return name
    parts = name.split("/")
    for first in range(1, len(parts)):
        if len(rest := "/".join(parts[first:])) + 2 <= letters:
            return f"…/{rest}"
    last = parts[-1]
    if len(last) <= letters:
        return last
    return f"{last[: letters // 2]}…{last[len(last) - (letters - 1) // 2 :]}"


def format_command(created_by: str | None) -> str:
    """Return a layer's command without the prefixes that builders add to every command."""
    words = created_by or ""
    for prefix in ("RUN ", "/bin/sh -c ", "#(nop) "):
        words = words.removeprefix(prefix)
    return clean_text(words.removesuffix("# buildkit").strip(), 80)


def format_platform(row: Row) -> str:
    """Format a platform as `docker pull --platform` expects it."""
    words = clean_text(join_platform(row.os, row.architecture, row.variant))
    return words.replace(" ", "_") or UNKNOWN_PLATFORM  # a space would end a word of the page's search


def format_age_group(number: int) -> str:
    """Return a word for an age group, which the search of the page finds: ``7-30d``."""
    if number == 0:
        return f"0-{AGE_DAYS[0]}d"
    if number == len(AGE_DAYS):
        return f"{AGE_DAYS[-1]}d+"
    return f"{AGE_DAYS[number - 1]}-{AGE_DAYS[number]}d"


def build_age_expression(column: str, now: datetime) -> tuple[str, dict[str, str]]:
    """Return an SQL expression that computes the age group of a column, and its parameters."""
    cases = " ".join(f"WHEN {column} >= :limit{age} THEN {age}" for age in range(len(AGE_DAYS)))
    limits = {f"limit{age}": format_time(now - timedelta(days=days)) for age, days in enumerate(AGE_DAYS)}
    return f"CASE {cases} ELSE {len(AGE_DAYS)} END", limits
