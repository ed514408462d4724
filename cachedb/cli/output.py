"""Print results: tables for people; JSON, CSV and other formats for programs."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Final

import click

from cachedb.text import format_age, format_count, format_size, printable, shorten_digest

if TYPE_CHECKING:
    from cachedb.content.collect import Collected


__all__ = [
    "ROW_FORMATS",
    "describe_collected",
    "fits",
    "format_json",
    "print_collected",
    "print_json",
    "print_names",
    "print_rows",
    "print_table",
    "to_json",
]


ROW_FORMATS: Final = ("table", "json", "ndjson", "csv", "tsv", "markdown")
"""The formats in which the rows of a query can be printed."""

# A spreadsheet runs a cell that starts with one of these. The last four are full-width forms of the first four.
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_NUMBER: Final = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")  # as the index writes times
_DIGEST: Final = re.compile(r"sha(?:256|512):[0-9a-f]{64,128}")
_PARTS_PER_WRITE: Final = 10_000  # pieces of JSON text that are joined for one write
_UNFOLDED_CHARACTERS: Final = 20  # a cell of at most this width is not folded
_GAP_CHARACTERS: Final = 2  # between two columns


def print_json(value: object) -> None:
    """Print a value as JSON; times have the format of the index."""
    import json

    # Print in parts: the JSON of a hundred thousand images takes more memory than the images.
    parts = json.JSONEncoder(indent=2, default=to_json).iterencode(value)
    while text := "".join(islice(parts, _PARTS_PER_WRITE)):
        sys.stdout.write(text)
    click.echo()


def format_json(value: object) -> str:
    """Return a value as JSON on one line."""
    import json

    return json.dumps(value, default=to_json)


def to_json(value: object) -> object:
    """Convert a value for JSON: a time to text as in the index, bytes to hexadecimal digits."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat().replace("+00:00", "Z") if isinstance(value, datetime) else str(value)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = (), *, header: bool = True
) -> None:
    """Print a table; a table that does not fit on the terminal becomes lines of a name and a value.

    Only texts of several words are folded, between words: a name or a digest must stay whole, to be copied.

    Args:
        columns: the headings.
        rows: the cells.
        right: the columns that are aligned to the right.
        header: whether to print the headings.
    """
    headings = list(map(printable, columns))
    rows = [[printable(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        _print_columns(headings, rows, list(map(printable, right)), header=header)
        return
    widths = _choose_widths(headings, rows)
    if widths is None:
        _print_vertical(headings, rows)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # The gaps are columns of their own: rich before 15 would also pad the outer edges, and fold a table that fits.
    table = Table(box=None, padding=0, header_style="bold", show_header=header)
    for number, (column, heading, width) in enumerate(zip(columns, headings, widths, strict=True)):
        if number:
            table.add_column(width=_GAP_CHARACTERS)
        table.add_column(Text(heading), justify="right" if column in right else "left", overflow="fold", width=width)
    for row in rows:
        table.add_row(*[text for cell in row for text in ("", Text(cell))][1:])
    Console(highlight=False).print(table)


def fits(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> bool:
    """Return whether a table fits on the terminal."""
    return _choose_widths(columns, list(rows)) is not None


def _choose_widths(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int] | None:
    """Return the widths of the columns on the terminal; None if they do not fit."""
    from shutil import get_terminal_size

    cells = list(zip(columns, *rows, strict=True))
    widths = [max(map(len, column)) for column in cells]
    least = [
        width if width <= _UNFOLDED_CHARACTERS else max(len(word) for cell in column for word in ("", *cell.split()))
        for width, column in zip(widths, cells, strict=True)
    ]
    least = [max(size, min(width, _UNFOLDED_CHARACTERS)) for size, width in zip(least, widths, strict=True)]
    room = get_terminal_size().columns - _GAP_CHARACTERS * (len(columns) - 1)
    if sum(least) > room:
        return None
    widths = [min(width, room) for width in widths]
    while sum(widths) > room:
        widest = max(range(len(widths)), key=lambda index: widths[index] - least[index])
        widths[widest] -= 1
    return widths


def _print_columns(columns: Sequence[str], rows: list[Sequence[str]], right: Collection[str], *, header: bool) -> None:
    """Print a table into a pipe or file, one line per row; importing rich would slow `ls` down by a tenth."""
    lines = [columns, *rows] if header else rows
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [str.rjust if column in right else str.ljust for column in columns]
    for row in lines:
        cells = (align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True))
        sys.stdout.write(f"{'  '.join(cells).rstrip()}\n")


def print_rows(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], form: str, *, short: bool = False, header: bool = True
) -> None:
    """Print the rows of a query, each as soon as it arrives; print a table when all rows have arrived.

    Args:
        columns: the names of the columns.
        rows: the rows, with values as SQLite returns them.
        form: one of `ROW_FORMATS`.
        short: in a table, print the columns ``size`` and ``..._size`` like ``1.23 MB``, times like ``2 days ago``, and
            the first digits of digests.
        header: print the names of the columns first, in a table, CSV, TSV or Markdown.
    """
    write = sys.stdout.write
    if form == "table":
        _print_values(columns, list(rows), short=short, header=header)
    elif form in ("json", "ndjson"):
        names = _make_distinct(columns)
        # JSON has no infinity.
        finite = ([None if value in (math.inf, -math.inf) else value for value in row] for row in rows)
        lines = (format_json(dict(zip(names, row, strict=True))) for row in finite)
        if form == "ndjson":
            for line in lines:
                write(f"{line}\n")
            return
        write("[")
        for number, line in enumerate(lines):
            write(f"{',' if number else ''}\n  {line}")
        write("\n]\n")
    elif form == "markdown":
        for row in chain((columns, ["---"] * len(columns)) if header else (), rows):
            write(f"| {' | '.join(map(_escape_markdown, row))} |\n")
    else:
        import csv
        import io

        buffer = io.StringIO(newline="")
        # Before 3.13, Python quotes a carriage return only if the line terminator contains one.
        writer = csv.writer(buffer, delimiter="," if form == "csv" else "\t", lineterminator="\r\n")
        is_terminal = sys.stdout.isatty()
        for row in chain([columns] if header else [], rows):
            writer.writerow([_format_csv_cell(value, is_terminal=is_terminal) for value in row])
            write(buffer.getvalue().removesuffix("\r\n") + "\n")
            buffer.seek(0)
            buffer.truncate()


def _escape_markdown(value: object) -> str:
    """Return a value escaped for Markdown: untrusted text must not become HTML, a link, an image or code."""
    import html

    return html.escape(re.sub(r"([\\|`\[\]])", r"\\\1", _format_value(value)), quote=False)


def _format_csv_cell(value: object, *, is_terminal: bool) -> object:
    """Return a value for CSV; put ``'`` before text that a spreadsheet would run as a formula."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return value
    if value.startswith(_FORMULA) and not _NUMBER.fullmatch(value):
        value = f"'{value}"
    return printable(value) if is_terminal else value


def _make_distinct(columns: Sequence[str]) -> list[str]:
    """Return the column names as distinct keys; a second ``name``, as in a join, becomes ``name_2``."""
    names: list[str] = []
    for column in columns:
        name, number = column, 1
        while name in names:
            number += 1
            name = f"{column}_{number}"
        names.append(name)
    return names


def _print_values(columns: Sequence[str], rows: list[Sequence[Any]], *, short: bool, header: bool) -> None:
    if not rows and sys.stdout.isatty():
        click.echo("no rows", err=True)
    numbers = [name for index, name in enumerate(columns) if all(_is_number(row[index]) for row in rows)]
    format_cell = _format_short if short else _format_named
    cells = [list(map(format_cell, columns, row)) for row in rows]
    print_table(columns, cells, right=numbers, header=header)


def _format_named(_column: str, value: object) -> str:
    return _format_value(value)


def _format_short(column: str, value: object) -> str:
    """Return a value as `ls` prints it, in a column of this name."""
    if isinstance(value, (int, float)) and (column == "size" or column.endswith("_size")):
        return format_size(value)
    if isinstance(value, str) and _TIME.fullmatch(value):
        with suppress(ValueError):  # no such day, as in the text of a label
            return format_age(datetime.fromisoformat(value))
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return shorten_digest(value)
    return _format_value(value)


def _print_vertical(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print each value on its own line, for rows that are too wide for the terminal."""
    width = max(map(len, headings))
    for number, row in enumerate(rows):
        if number:
            click.echo()
        for heading, cell in zip(headings, row, strict=True):
            click.echo(f"{heading:{width}}  {cell}".rstrip())


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, (int, float))


def _format_value(value: object) -> str:
    """Return a value on one line."""
    if isinstance(value, bytes):
        value = value.hex()
    if isinstance(value, float):
        value = round(value, 3)
    return "" if value is None else printable(str(value))


# Results


def print_names(names: Iterable[object]) -> None:
    """Print names, one a line."""
    click.echo("".join(f"{name}\n" for name in names), nl=False)


def describe_collected(freed: Collected) -> dict[str, Any]:
    """Return what was freed, as JSON has it; ``bytes`` is the old name of the size."""
    return {"blobs": freed.blobs, "size": freed.bytes, "bytes": freed.bytes}


def print_collected(freed: Collected, form: str, *, dry_run: bool) -> None:
    """Print how much was freed, or would be freed in a dry run."""
    if form == "json":
        print_json(describe_collected(freed))
    else:
        verb = "would free" if dry_run else "freed"
        click.echo(f"{verb} {format_count(freed.blobs, 'blob')}, {format_size(freed.bytes)}")
