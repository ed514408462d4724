"""Match names with patterns such as ``team/*:1``, and rename what they match."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from sqlalchemy import ColumnElement, case, func, literal

from cachedb.errors import InvalidQuery
from cachedb.index.tables import IMAGES
from cachedb.oci.names import Name
from cachedb.text import shorten

__all__ = ["full_name", "is_like", "is_pattern", "is_repository_like", "rename_all"]


def is_pattern(text: str | Name) -> bool:
    """Return whether a text is a pattern: it has ``*``, ``?`` or a ``[`` outside of an IPv6 address."""
    return isinstance(text, str) and re.search(r"[*?]|\[(?![0-9A-Fa-f]*:[0-9A-Fa-f:]*\])", text) is not None


def is_like(pattern: str) -> ColumnElement[bool]:
    """Return the condition that a pattern matches the whole name of an image."""
    return _matches(full_name(), pattern)


def is_repository_like(pattern: str) -> ColumnElement[bool]:
    """Return the condition that a pattern matches the whole repository of an image."""
    return _matches(IMAGES.c.repository, pattern)


def _matches(column: ColumnElement[str], pattern: str) -> ColumnElement[bool]:
    # SQLite's GLOB negates a set with ^, and its * also matches a slash.
    return column.op("GLOB", is_comparison=True)(pattern.replace("[!", "[^"))


@cache  # building it takes longer than executing it
def full_name() -> ColumnElement[str]:
    """Return the expression of an image's name: ``repository:tag`` or ``repository@digest``."""
    mark = case((func.instr(IMAGES.c.reference, ":") > 0, literal("@")), else_=literal(":"))
    return IMAGES.c.repository + mark + IMAGES.c.reference


def rename_all(names: Sequence[Name], pattern: str, target: str) -> list[Name]:
    """Return a new name for each name: ``*`` in the target is the text that the pattern matched.

    Raises:
        InvalidQuery: if the target has another number of ``*`` than the pattern; or if a result occurs twice, or is
            one of the other names.
        InvalidName: if a result is not a name.
    """
    stars = pattern.count("*")
    if target.count("*") != stars:
        raise InvalidQuery(
            f"{shorten(pattern)} has {stars} '*', but {shorten(target)} has {target.count('*')}: "
            "give both the same number"
        )
    expression = _compile_pattern(pattern) if is_pattern(pattern) else re.compile(".*")
    sources = set(names)
    renamed: dict[Name, None] = {}
    for name in names:
        match = expression.fullmatch(str(name))
        assert match is not None  # the pattern has found the name
        texts = iter(match.groups())
        new = Name.parse("".join(next(texts) if part == "*" else part for part in re.split(r"(\*)", target)))
        if new in renamed:
            raise InvalidQuery(f"{shorten(target)} gives several images the name {new}: select one of them")
        if new != name and new in sources:
            raise InvalidQuery(
                f"{shorten(target)} gives the name {new}, which another selected image has: choose another target"
            )
        renamed[new] = None
    return list(renamed)


def _compile_pattern(pattern: str) -> re.Pattern[str]:
    """Return a pattern as an expression in which each ``*`` is a group."""
    parts = re.split(r"(\*|\?|\[[^\]]+\])", pattern)
    return re.compile("".join({"*": "(.*)", "?": "."}.get(part) or _to_expression(part) for part in parts))


def _to_expression(part: str) -> str:
    is_set = part.startswith("[") and part.endswith("]")
    return part.replace("\\", r"\\").replace("[!", "[^") if is_set else re.escape(part)
