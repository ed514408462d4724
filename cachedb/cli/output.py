"""What the command line prints: tables for people, and JSON, CSV and the like for programs."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Final

import click

from cachedb.text import ago, human, printable, short

if TYPE_CHECKING:
    from cachedb.content.collect import Collected
    from cachedb.index.images import ImageInfo


__all__ = ["ROW_FORMATS", "print_collected", "print_images", "print_json", "print_rows", "print_table"]


ROW_FORMATS: Final = ("table", "json", "ndjson", "csv", "tsv", "markdown")
"""How the rows of a query can be printed."""

# How a cell begins that a spreadsheet executes; the last four are what East Asian ones take for the first.
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_NUMBER: Final = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_PARTS: Final = 10_000  # of a JSON text that are put together
_LEAST: Final = 10  # characters that a column of a terminal must have room for, to be read


def print_json(value: object) -> None:
    """Print a value as JSON; times as they are in the index."""
    import json

    # Not as one text: of a hundred thousand images that takes more memory than they do.
    parts = json.JSONEncoder(indent=2, default=_plain).iterencode(value)
    while text := "".join(islice(parts, _PARTS)):
        sys.stdout.write(text)
    click.echo()


def _plain(value: object) -> str:
    from datetime import datetime

    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat().replace("+00:00", "Z") if isinstance(value, datetime) else str(value)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = ()) -> None:
    """Print a table, with those columns to the right."""
    headings = list(map(printable, columns))
    rows = [[printable(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        _print_columns(headings, rows, list(map(printable, right)))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, heading in zip(columns, headings, strict=True):
        table.add_column(Text(heading), justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)


def _print_columns(columns: Sequence[str], rows: list[Sequence[str]], right: Collection[str]) -> None:
    """Print a table into a pipe or a file: a line a row, however long. rich would cost `ls` a tenth of its time."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        )
        click.echo("  ".join(cells).rstrip())


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[Any]], form: str, *, sizes: bool = False) -> None:
    """Print the rows of a query as they come; a table when all of them have.

    Args:
        columns: their names.
        rows: of values as SQL has them.
        form: one of `ROW_FORMATS`.
        sizes: whether sizes are for people in a table: the columns ``size`` and ``..._size``.
    """
    write = sys.stdout.write
    if form == "table":
        _print_values(columns, list(rows), sizes=sizes)
    elif form in ("json", "ndjson"):
        import json

        names = _distinct(columns)
        # JSON has no number for infinity.
        finite = ([None if value in (math.inf, -math.inf) else value for value in row] for row in rows)
        lines = (json.dumps(dict(zip(names, row, strict=True)), default=_plain) for row in finite)
        if form == "ndjson":
            for line in lines:
                write(f"{line}\n")
            return
        write("[")
        for number, line in enumerate(lines):
            write(f"{',' if number else ''}\n  {line}")
        write("\n]\n")
    elif form == "markdown":
        for row in chain((columns, ["---"] * len(columns)), rows):
            write(f"| {' | '.join(map(_markdown, row))} |\n")
    else:
        import csv
        import io

        written = io.StringIO(newline="")
        # Before Python 3.13 a carriage return, which readers take for the end of a line, is quoted only if it ends one.
        writer = csv.writer(written, delimiter="," if form == "csv" else "\t", lineterminator="\r\n")
        is_terminal = sys.stdout.isatty()
        for row in chain([columns], rows):
            writer.writerow([_cell(value, is_terminal=is_terminal) for value in row])
            write(written.getvalue().removesuffix("\r\n") + "\n")
            written.seek(0)
            written.truncate()


def _markdown(value: object) -> str:
    """Return a value as Markdown shows it: what a stranger named is neither HTML, nor a link, an image or code."""
    import html

    return html.escape(re.sub(r"([\\|`\[\]])", r"\\\1", _text(value)), quote=False)


def _cell(value: object, *, is_terminal: bool) -> object:
    """Return a value for CSV; a text that a spreadsheet takes for a formula gets a ``'`` in front."""
    if isinstance(value, bytes):
        return value.hex()
    if not isinstance(value, str):
        return value
    if value.startswith(_FORMULA) and not _NUMBER.fullmatch(value):
        value = f"'{value}"
    return printable(value) if is_terminal else value


def _distinct(columns: Sequence[str]) -> list[str]:
    """Return names as keys: a join may have a column twice, and then the second is ``name_2``."""
    names: list[str] = []
    for column in columns:
        name, number = column, 1
        while name in names:
            number += 1
            name = f"{column}_{number}"
        names.append(name)
    return names


def _print_values(columns: Sequence[str], rows: list[Sequence[Any]], *, sizes: bool) -> None:
    if not rows and sys.stdout.isatty():
        click.echo("no rows", err=True)
    numbers = [name for place, name in enumerate(columns) if all(_is_number(row[place]) for row in rows)]
    for_people = [sizes and (name == "size" or name.endswith("_size")) for name in columns]

    def cell(value: object, size: bool) -> str:
        return human(value) if size and isinstance(value, (int, float)) else _text(value)

    cells = [list(map(cell, row, for_people)) for row in rows]
    if rows and sys.stdout.isatty() and not _fits(columns, cells):
        _print_upright(columns, cells)
    else:
        print_table(columns, cells, right=numbers)


def _fits(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> bool:
    """Tell whether a terminal has room for these columns, folded as they may be."""
    from shutil import get_terminal_size

    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    return sum(min(width, _LEAST) + 2 for width in widths) <= get_terminal_size().columns


def _print_upright(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a line for each value, as there is no room for a row to be one."""
    headings = list(map(printable, columns))
    width = max(map(len, headings))
    for number, row in enumerate(rows):
        if number:
            click.echo()
        for heading, cell in zip(headings, row, strict=True):
            click.echo(f"{heading:{width}}  {cell}".rstrip())


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, (int, float))


def _text(value: object) -> str:
    """Return a value on one line."""
    if isinstance(value, bytes):
        value = value.hex()
    if isinstance(value, float):
        value = round(value, 3)
    return "" if value is None else printable(str(value))


# Printing


def print_images(found: list[ImageInfo], form: str, *, quiet: bool) -> None:
    """Print images as a table, as JSON, or their names alone."""
    if quiet:
        for image in found:
            click.echo(str(image.name))
    elif form == "json":
        print_json([image._asdict() for image in found])
    else:
        rows = (
            (
                str(image.name),
                short(image.digest),
                human(image.size),
                ago(image.created_at),
                "complete" if image.complete else "incomplete",
            )
            for image in found
        )
        print_table(("NAME", "DIGEST", "SIZE", "CREATED", "STATE"), rows, right=("SIZE",))


def print_collected(freed: Collected, form: str, *, dry_run: bool) -> None:
    """Print what was freed, or would be."""
    if form == "json":
        print_json(freed._asdict())
    else:
        blobs = f"{freed.blobs} blob{'' if freed.blobs == 1 else 's'}"
        click.echo(f"{'would free' if dry_run else 'freed'} {blobs}, {human(freed.bytes)}")
