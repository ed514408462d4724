"""Define the parameters of named reports: their types, and how a text becomes a value.

A line ``-- :name:type default`` in a report's file declares a parameter. Without a default, a value is required.
Without a type, as in ``-- :name default``, any text is a value, and a text that has the form of a number is a number.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from sqlalchemy import select

from cachedb.errors import InvalidQuery, NotInCache
from cachedb.index.filters import narrow, parse_wanted
from cachedb.index.patterns import is_pattern
from cachedb.index.sqlite.database import Database
from cachedb.index.tables import IMAGES
from cachedb.oci.names import Name
from cachedb.oci.platforms import PLATFORM_PART
from cachedb.text import parse_size, shorten

__all__ = ["Parameter", "convert_value", "parse_declaration", "parse_number"]

Value = int | float | str


class Parameter(NamedTuple):
    """A parameter of a report."""

    name: str
    kind: str | None  # its type, one of `_KINDS`; None if the report declares none
    default: str | None  # None if a value is required

    def __str__(self) -> str:
        """Return ``name=default``, ``name:type`` or ``name``."""
        if self.default is not None:
            return f"{self.name}={self.default}"
        return f"{self.name}:{self.kind}" if self.kind else self.name


def parse_number(text: str) -> Value:
    """Convert a text to a number if that keeps its exact form; ``1.10``, ``007`` and ``nan`` stay text."""
    for kind in (int, float):
        with suppress(ValueError):
            if repr(found := kind(text)) == text and abs(found) < 1 << 63:  # SQL integers have 64 bits
                return found
    return text


def _parse_count(text: str) -> int | None:
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def _parse_days(text: str) -> float | None:
    with suppress(ValueError):
        if 0 <= (days := float(text)) < math.inf:
            return days
    return None


def _parse_platform(text: str) -> str | None:
    parts = text.lower().split("/")
    return "/".join(parts) if len(parts) in (2, 3) and all(map(PLATFORM_PART.fullmatch, parts)) and all(parts) else None


_KINDS: dict[str, tuple[Callable[[str], Value | None], str]] = {
    "count": (_parse_count, "a whole number such as 20"),
    "days": (_parse_days, "a number of days such as 30 or 0.5"),
    "size": (parse_size, "a size such as 500MB or 64GiB"),
    "platform": (_parse_platform, "a platform such as linux/arm64 or linux/arm/v7"),
    "label": (lambda text: text or None, "the key of a label"),
    "text": (str, ""),
    # These two are looked up in the cache.
    "image": (str, ""),
    "images": (str, ""),
}
"""The types of parameters: how a text is parsed, and a description of a valid text."""

_DECLARATION = re.compile(rf"-- :(\w+)(?::({'|'.join(_KINDS)}))?(?: (.*))?")


def parse_declaration(line: str) -> Parameter | None:
    """Return the parameter that a line of a report declares, or None."""
    found = _DECLARATION.fullmatch(line)
    return Parameter(*found.groups()) if found else None


def convert_value(parameter: Parameter, text: str, database: Database) -> Value:
    """Return the value that a text stands for.

    An image is its full name, ``repository:tag`` or ``repository@digest``. Several images are a JSON array of names.

    Args:
        parameter: the parameter that gets the value.
        text: the value as a user writes it.
        database: the index in which images are looked up.

    Raises:
        InvalidName: if the text is not a valid name of an image.
        InvalidQuery: if the text is not of the parameter's type, or an image is not in the cache.
    """
    if parameter.kind is None:
        return parse_number(text)
    if parameter.kind in ("image", "images"):
        try:
            if parameter.kind == "images":
                return json.dumps(_find_names(database, parse_wanted(text.split())))
            (name,) = _find_names(database, [Name.parse(text)] if is_pattern(text) else parse_wanted([text]))
            return name
        except NotInCache as error:
            raise InvalidQuery(f"invalid value of {parameter.name!r}: {error}") from error
    parse, description = _KINDS[parameter.kind]
    value = parse(text)
    if value is None:
        raise InvalidQuery(f"{shorten(text)} is not a valid value of {parameter.name!r}: give {description}")
    return value


def _find_names(database: Database, wanted: Sequence[str | Name]) -> list[str]:
    """Return the names of the images that names and patterns stand for, sorted.

    Raises:
        NotInCache: if one of them matches no image.
    """
    if not wanted:
        return []
    with database.read() as connection:
        query = narrow(connection, select(IMAGES.c.repository, IMAGES.c.reference), wanted)
        return [str(Name(*row)) for row in connection.execute(query)]
