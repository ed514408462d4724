"""Named questions: a folder of queries, each a file of SQL that begins with what it says.

Its first lines are comments: a sentence that describes it, and a line for each parameter, ``-- :name`` or
``-- :name default``. There are those of this release, and those of the user, which go before.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cachedb.errors import InvalidQuery, NotInCache, os_errors

__all__ = ["Report", "folder", "load", "reports"]


_OURS = Path(__file__).parent / "sql"
_PARAMETER = re.compile(r"-- :(\w+)(?: (.*))?")


class Report(NamedTuple):
    """A named question."""

    name: str
    description: str
    parameters: dict[str, str | None]  # with their defaults; None where a value must be given
    query: str  # SQL
    path: Path

    def wanted(self) -> list[str]:
        """Return the parameters as they are to be given: ``name``, or ``name=default``."""
        return [name if value is None else f"{name}={value}" for name, value in self.parameters.items()]

    def values(self, given: Mapping[str, str]) -> dict[str, int | float | str]:
        """Return a value for each parameter.

        Args:
            given: values, instead of the defaults.

        Raises:
            InvalidQuery: if one has no value, or there is no such parameter.
        """
        values = {**{key: value for key, value in self.parameters.items() if value is not None}, **given}
        known = ", ".join(self.wanted()) or "none"
        for key in given:
            if key not in self.parameters:
                raise InvalidQuery(f"the report {self.name} has no parameter {key}; it has {known}")
        for key in self.parameters:
            if key not in values:
                raise InvalidQuery(f"the report {self.name} needs a value for {key}: give one with -p {key}=VALUE")
        return {key: number(value) for key, value in values.items()}


def number(text: str) -> int | float | str:
    """Return a text as the number that is written so, or as it is: a tag ``1.10``, ``007`` or ``nan`` is none."""
    for kind in (int, float):
        with suppress(ValueError):
            if repr(found := kind(text)) == text and abs(found) < 1 << 63:  # as SQL has them
                return found
    return text


def folder() -> Path:
    """Return where a user's own are: ``CACHEDB_REPORTS``, else in the user's configuration directory."""
    if named := os.environ.get("CACHEDB_REPORTS"):
        return Path(named)
    import platformdirs

    return Path(platformdirs.user_config_dir("cachedb")) / "reports"


def reports() -> list[Report]:
    """Return all named questions, in the order of their names.

    Raises:
        StorageError: if a file cannot be read.
    """
    paths = {path.stem: path for place in (_OURS, folder()) for path in place.glob("*.sql") if path.is_file()}
    return [_read(paths[name]) for name in sorted(paths)]


def load(name: str) -> Report:
    """Return one named question.

    Raises:
        NotInCache: if there is none of that name.
        StorageError: if its file cannot be read.
    """
    for place in (folder(), _OURS):
        path = place / f"{name}.sql"
        if name and os.sep not in name and path.is_file():
            return _read(path)
    raise NotInCache(f"there is no report {name!r}; `cachedb report --list` lists those there are")


def _read(path: Path) -> Report:
    with os_errors("read a report"):
        query = path.read_text(encoding="utf-8-sig", errors="replace")
    said: list[str] = []
    parameters: dict[str, str | None] = {}
    for line in query.lstrip().splitlines():
        if not line.startswith("--"):
            break
        if found := _PARAMETER.fullmatch(line.rstrip()):
            parameters[found[1]] = found[2]
        else:
            said.append(line.removeprefix("--").strip())
    return Report(path.stem, " ".join(said), parameters, query, path)
