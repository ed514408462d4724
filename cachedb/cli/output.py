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

from cachedb.text import format_age, format_size, printable, shorten_digest

if TYPE_CHECKING:
    from cachedb.content.collect import Collected
    from cachedb.index.records import ImageInfo


__all__ = ["ROW_FORMATS", "print_collected", "print_images", "print_json", "print_rows", "print_table"]


ROW_FORMATS: Final = ("table", "json", "ndjson", "csv", "tsv", "markdown")
"""The formats in which the rows of a query can be printed."""

# A spreadsheet runs a cell that starts with one of these. The last four are full-width forms of the first four.
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_NUMBER: Final = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")  # as the index writes times
_DIGEST: Final = re.compile(r"sha(?:256|512):[0-9a-f]{64,128}")
_PARTS_PER_WRITE: Final = 10_000  # pieces of JSON text that are joined for one write
_MIN_COLUMN_CHARACTERS: Final = 10  # a narrower column is unreadable on a terminal


def print_json(value: object) -> None:
    """Print a value as JSON; times have the format of the index."""
    import json

    # Print in parts: the JSON of a hundred thousand images takes more memory than the images.
    parts = json.JSONEncoder(indent=2, default=_to_json).iterencode(value)
    while text := "".join(islice(parts, _PARTS_PER_WRITE)):
        sys.stdout.write(text)
    click.echo()


def _to_json(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat().replace("+00:00", "Z") if isinstance(value, datetime) else str(value)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = (), *, header: bool = True
) -> None:
    """Print a table, without headings unless ``header``; the columns in ``right`` are aligned to the right."""
    headings = list(map(printable, columns))
    rows = [[printable(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        _print_columns(headings, rows, list(map(printable, right)), header=header)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", show_header=header)
    for column, heading in zip(columns, headings, strict=True):
        table.add_column(Text(heading), justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)


def _print_columns(columns: Sequence[str], rows: list[Sequence[str]], right: Collection[str], *, header: bool) -> None:
    """Print a table into a pipe or file, one line per row; importing rich would slow `ls` down by a tenth."""
    lines = [columns, *rows] if header else rows
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for row in lines:
        cells = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        )
        click.echo("  ".join(cells).rstrip())


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
        import json

        names = _make_distinct(columns)
        # JSON has no infinity.
        finite = ([None if value in (math.inf, -math.inf) else value for value in row] for row in rows)
        lines = (json.dumps(dict(zip(names, row, strict=True)), default=_to_json) for row in finite)
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
    if rows and sys.stdout.isatty() and not _fits(columns, cells):
        _print_vertical(columns, cells)
    else:
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


def _fits(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> bool:
    """Return whether the columns fit on the terminal if long cells are folded."""
    from shutil import get_terminal_size

    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    return sum(min(width, _MIN_COLUMN_CHARACTERS) + 2 for width in widths) <= get_terminal_size().columns


def _print_vertical(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print each value on its own line, for rows that are too wide for the terminal."""
    headings = list(map(printable, columns))
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


# Printing


def print_images(found: list[ImageInfo], form: str, *, quiet: bool) -> None:
    """Print images as a table or as JSON, or only their names if ``quiet``."""
    if quiet:
        for image in found:
            click.echo(str(image.name))
    elif form == "json":
        print_json([image._asdict() for image in found])
    else:
        rows = (
            (
                str(image.name),
                shorten_digest(image.digest),
                format_size(image.size),
                format_age(image.added_at),
                "complete" if image.complete else "incomplete",
            )
            for image in found
        )
        print_table(("NAME", "DIGEST", "SIZE", "ADDED", "STATE"), rows, right=("SIZE",))


def print_collected(freed: Collected, form: str, *, dry_run: bool) -> None:
    """Print how much was freed, or would be freed in a dry run."""
    if form == "json":
        print_json(freed._asdict())
    else:
        blobs = f"{freed.blobs} blob{'' if freed.blobs == 1 else 's'}"
        click.echo(f"{'would free' if dry_run else 'freed'} {blobs}, {format_size(freed.bytes)}")
