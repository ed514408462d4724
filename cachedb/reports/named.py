"""Load named reports; each is an SQL file that starts with its description.

The first lines of a file are comments: a sentence that describes the report, then a line for each parameter, as
`parameters` describes it. A user's report replaces a built-in one of the same name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cachedb.errors import InvalidQuery, NotInCache, os_errors
from cachedb.index.sqlite.database import Database
from cachedb.reports.parameters import Parameter, convert_value, parse_declaration
from cachedb.text import shorten

__all__ = ["Report", "find_report_folder", "list_reports", "load_built_in", "load_report"]


_BUILT_IN_FOLDER = Path(__file__).parent / "sql"


class Report(NamedTuple):
    """A named report."""

    name: str
    description: str
    parameters: tuple[Parameter, ...]
    query: str  # SQL
    path: Path

    def assign_values(self, values: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
        """Assign values without a name to parameters, in order; return all values by parameter.

        Args:
            values: values without a name; if the last parameter is for images, it takes all the rest.
            given: values by name.

        Raises:
            InvalidQuery: if there are more values than parameters.
        """
        free = [parameter for parameter in self.parameters if parameter.name not in given]
        if len(values) > len(free):
            if not free or free[-1].kind != "images":
                raise InvalidQuery(
                    f"too many values for the report {self.name!r}: it has {self._describe_parameters()}"
                )
            last = len(free) - 1
            values = [*values[:last], " ".join(values[last:])]
        return {**given, **{parameter.name: value for parameter, value in zip(free, values, strict=False)}}

    def fill_parameters(self, given: Mapping[str, str], database: Database) -> dict[str, int | float | str]:
        """Return a value for each parameter.

        Args:
            given: values that replace the defaults.
            database: the index in which images are looked up.

        Raises:
            InvalidName: if a value for an image is not a valid name.
            InvalidQuery: if a parameter has no value or one of a wrong type, if an image is not in the cache, or if a
                given parameter does not exist.
        """
        names = {parameter.name for parameter in self.parameters}
        for name in given:
            if name not in names:
                raise InvalidQuery(
                    f"the report {self.name!r} has no parameter {name!r}: it has {self._describe_parameters()}"
                )
        values = {}
        for parameter in self.parameters:
            text = given.get(parameter.name, parameter.default)
            if text is None:
                raise InvalidQuery(
                    f"the report {self.name!r} needs a value for {parameter.name!r}: "
                    f"give one with -p {parameter.name}=VALUE"
                )
            values[parameter.name] = convert_value(parameter, text, database)
        return values

    def _describe_parameters(self) -> str:
        return ", ".join(map(str, self.parameters)) or "none"


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
        if name and os.sep not in name and os.path.isfile(path):  # False also for a name that is too long
            return _read_report(path)
    raise NotInCache(f"there is no report {shorten(name)}: `cachedb report --list` lists all reports")


def load_built_in(name: str) -> Report:
    """Return a built-in report, even if the user has one of the same name."""
    return _read_report(_BUILT_IN_FOLDER / f"{name}.sql")


def _read_report(path: Path) -> Report:
    with os_errors("read a report"):
        query = path.read_text(encoding="utf-8-sig", errors="replace")
    description: list[str] = []
    parameters: dict[str, Parameter] = {}
    for line in query.lstrip().splitlines():
        if not line.startswith("--"):
            break
        if found := parse_declaration(line.rstrip()):
            parameters[found.name] = found
        else:
            description.append(line.removeprefix("--").strip())
    return Report(path.stem, " ".join(description), tuple(parameters.values()), query, path)
