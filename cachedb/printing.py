"""What the command line prints: tables for people, and JSON, CSV and the like for programs."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

import click

from cachedb.units import human, printable

__all__ = ["ROW_FORMATS", "print_json", "print_rows", "print_table"]

ROW_FORMATS: Final = ("table", "json", "ndjson", "csv", "tsv", "markdown")
"""How the rows of a query can be printed."""


def print_json(value: object) -> None:
    """Print a value as JSON; times as they are in the index."""
    import json

    click.echo(json.dumps(value, indent=2, default=_plain))


def _plain(value: object) -> str:
    from datetime import datetime

    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat().replace("+00:00", "Z") if isinstance(value, datetime) else str(value)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = ()) -> None:
    """Print a table, with those columns to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        _print_columns(columns, rows, right)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
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

        lines = (json.dumps(dict(zip(columns, row, strict=True)), default=_plain) for row in rows)
        if form == "ndjson":
            for line in lines:
                write(f"{line}\n")
            return
        write("[")
        for number, line in enumerate(lines):
            write(f"{',' if number else ''}\n  {line}")
        write("\n]\n")
    elif form == "markdown":
        for row in (columns, ["---"] * len(columns), *rows):
            cells = (_text(value).replace("\\", "\\\\").replace("|", "\\|") for value in row)
            write(f"| {' | '.join(cells)} |\n")
    else:
        import csv

        writer = csv.writer(sys.stdout, delimiter="," if form == "csv" else "\t", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def _print_values(columns: Sequence[str], rows: list[Sequence[Any]], *, sizes: bool) -> None:
    if not rows and sys.stdout.isatty():
        click.echo("no rows", err=True)
    numbers = [name for place, name in enumerate(columns) if all(_is_number(row[place]) for row in rows)]
    for_people = [sizes and (name == "size" or name.endswith("_size")) for name in columns]

    def cell(value: object, size: bool) -> str:
        return human(value) if size and isinstance(value, (int, float)) else _text(value)

    cells = [list(map(cell, row, for_people)) for row in rows]
    print_table(columns, cells, right=numbers)


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, (int, float))


def _text(value: object) -> str:
    """Return a value on one line."""
    if isinstance(value, float):
        value = round(value, 3)
    return "" if value is None else printable(str(value))
