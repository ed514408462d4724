"""Load named reports; each is an SQL file that starts with its description.

The first lines of a file are comments: a sentence that describes the report, then a line ``-- :name`` or
``-- :name default`` for each parameter. A user's report replaces a built-in one of the same name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cachedb.errors import InvalidQuery, NotInCache, os_errors

__all__ = [
    "Report",
    "find_report_folder",
    "list_reports",
    "load_built_in",
    "load_report",
    "parse_number",
]


_BUILT_IN_FOLDER = Path(__file__).parent / "sql"
_PARAMETER_LINE = re.compile(r"-- :(\w+)(?: (.*))?")


class Report(NamedTuple):
    """A named report."""

    name: str
    description: str
    parameters: dict[str, str | None]  # names and defaults; None if a value is required
    query: str  # SQL
    path: Path

    def list_parameters(self) -> list[str]:
        """Return the parameters as ``name`` or ``name=default``."""
        return [name if value is None else f"{name}={value}" for name, value in self.parameters.items()]

    def fill_parameters(self, given: Mapping[str, str]) -> dict[str, int | float | str]:
        """Return a value for each parameter.

        Args:
            given: values that replace the defaults.

        Raises:
            InvalidQuery: if a parameter has no value, or a given parameter does not exist.
        """
        values = {**{key: value for key, value in self.parameters.items() if value is not None}, **given}
        known = ", ".join(self.list_parameters()) or "none"
        for key in given:
            if key not in self.parameters:
                raise InvalidQuery(f"the report {self.name!r} has no parameter {key!r}: it has {known}")
        for key in self.parameters:
            if key not in values:
                raise InvalidQuery(f"the report {self.name!r} needs a value for {key!r}: give one with -p {key}=VALUE")
        return {key: parse_number(value) for key, value in values.items()}


def parse_number(text: str) -> int | float | str:
    """Convert a text to a number if that keeps its exact form; ``1.10``, ``007`` and ``nan`` stay text."""
    for kind in (int, float):
        with suppress(ValueError):
            if repr(found := kind(text)) == text and abs(found) < 1 << 63:  # SQL integers have 64 bits
                return found
    return text


def find_report_folder() -> Path:
    """Return the folder of the user's reports: ``CACHEDB_REPORTS``, else a default folder."""
    if named := os.environ.get("CACHEDB_REPORTS"):
        return Path(named)
    import platformdirs

    return Path(platformdirs.user_config_dir("cachedb")) / "reports"


def list_reports() -> list[Report]:
    """Return all named reports, sorted by name.

    Raises:
        StorageError: if a file cannot be read.
    """
    paths = {
        path.stem: path
        for directory in (_BUILT_IN_FOLDER, find_report_folder())
        for path in directory.glob("*.sql")
        if path.is_file()
    }
    return [_read_report(paths[name]) for name in sorted(paths)]


def load_report(name: str) -> Report:
    """Return the report of this name.

    Raises:
        NotInCache: if there is no such report.
        StorageError: if its file cannot be read.
    """
    for directory in (find_report_folder(), _BUILT_IN_FOLDER):
        path = directory / f"{name}.sql"
        if name and os.sep not in name and path.is_file():
            return _read_report(path)
    raise NotInCache(f"there is no report {name!r}: `cachedb report --list` lists all reports")


def load_built_in(name: str) -> Report:
    """Return a built-in report, even if the user has one of the same name."""
    return _read_report(_BUILT_IN_FOLDER / f"{name}.sql")


def _read_report(path: Path) -> Report:
    with os_errors("read a report"):
        query = path.read_text(encoding="utf-8-sig", errors="replace")
    description: list[str] = []
    parameters: dict[str, str | None] = {}
    for line in query.lstrip().splitlines():
        if not line.startswith("--"):
            break
        if found := _PARAMETER_LINE.fullmatch(line.rstrip()):
            parameters[found[1]] = found[2]
        else:
            description.append(line.removeprefix("--").strip())
    return Report(path.stem, " ".join(description), parameters, query, path)
