"""Questions in SQL: sql, report."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from cachedb.cli.context import open_cache
from cachedb.cli.options import format_examples, read_values, row_format_option, timeout_option
from cachedb.cli.output import print_rows, print_table
from cachedb.cli.signals import received_signals
from cachedb.cli.streams import closed_streams, get_stdout
from cachedb.errors import (
    InvalidQuery,
    explain,
)
from cachedb.text import printable

__all__ = []


@click.command(
    epilog=format_examples(
        "cachedb sql",
        "cachedb sql 'SELECT name, human(unique_size) FROM image_usage ORDER BY unique_size DESC LIMIT 5'",
        "cachedb sql --format csv -p days=30 'SELECT name FROM image_ages WHERE unused_days > :days'",
    )
)
@click.argument("query", required=False)
@click.option("--file", type=click.Path(), help="Read the query from a file, or - for stdin.")
@click.option("--schema", is_flag=True, help="Print the SQL of the tables, indexes and views.")
@read_values
@row_format_option
@timeout_option
def sql(
    query: str | None, file: str | None, schema: bool, parameters: dict[str, str], form: str, seconds: int | None
) -> None:
    """Ask the index a question in SQL; without one, list the views that there are to ask.

    QUERY is SQLite's SQL, with the functions human(bytes) and ago(time) besides; - reads it from stdin. Nothing can be
    changed by it, no writer waits for it, and it runs at the lowest priority. The columns of each view
    are in the README's SQL reference.
    """
    from cachedb.reports.named import number

    if sum(map(bool, (query, file, schema))) > 1:
        raise click.UsageError("give a query, or --file, or --schema")
    if schema:
        query = "SELECT sql || ';' AS sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY type <> 'table', name"
        with open_cache(existing=True) as cache, cache.sql(query) as found:
            for (definition,) in found.rows:
                click.echo(definition)
        return
    if query == "-" or file is not None:
        query = _text_of("-" if file is None else file)
    if query is None:
        with open_cache(existing=True) as cache:
            views = cache.list_views()
        if form == "table":
            print_table(("VIEW", "WHAT IT HAS"), [(view.name, view.description) for view in views])
        else:
            rows = [(view.name, view.description, " ".join(view.columns)) for view in views]
            print_rows(("view", "description", "columns"), rows, form)
        return
    _ask(query, {name: number(value) for name, value in parameters.items()}, form, seconds)


def _text_of(file: str) -> str:
    if file == "-" and "stdin" in closed_streams:
        raise click.UsageError("stdin is closed: send the query to it, or name a file")
    try:
        with open(0 if file == "-" else file, encoding="utf-8-sig") as opened:  # editors may begin it with a mark
            return opened.read()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise click.UsageError(f"cannot read {file!r}: {reason}") from error


@contextmanager
def _giving_way() -> Iterator[None]:
    """A block that runs when those who work with the cache leave a processor free.

    It is for what reads, in a cache that is open: opening it may take the write lock, and who has that must not wait.
    """
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:
        os.nice(19)
    try:
        yield
    finally:
        # The last to close an index writes its WAL back, under a lock. Not everybody may have the priority back.
        with suppress(OSError):
            os.sched_setscheduler(0, policy, parameter)


def _ask(query: str, parameters: dict[str, Any], form: str, seconds: int | None, *, sizes: bool = False) -> None:
    try:
        with (
            open_cache(existing=True) as cache,
            _giving_way(),
            cache.sql(query, parameters, timeout=seconds, stream=True) as found,
        ):
            print_rows(found.columns, found.rows, form, sizes=sizes)
            sys.stdout.flush()
    except InvalidQuery as error:
        if received_signals:  # SQLite makes an error of its own of what a signal raises in `human` or `ago`
            raise KeyboardInterrupt from None
        if error.place is None:
            raise
        start, stop = error.place
        line = query.count("\n", 0, start)
        text = query.splitlines()[line] if query else ""
        column = start - (query.rfind("\n", 0, start) + 1)
        marked = f"  {printable(text)}\n  {' ' * len(printable(text[:column]))}{'^' * max(stop - start, 1)}"
        print(f"cachedb: {printable(str(error))}, in line {line + 1}:\n{marked}", file=sys.stderr)
        click.get_current_context().exit(2)


@click.command(
    epilog=format_examples(
        "cachedb report --list",
        "cachedb report --html cache.html",
        "cachedb report largest-unique",
        "cachedb report not-used -p days=90 --format json",
        "cachedb report freed-by -p names='app:1 app:2'",
    )
)
@click.argument("name", required=False)
@click.option("--list", "list_", is_flag=True, help="List the reports, with their parameters.")
@click.option("--html", "file", metavar="FILE", type=click.Path(), help="Write a page that shows the whole cache.")
@read_values
@row_format_option
@timeout_option
def report(
    name: str | None, list_: bool, file: str | None, parameters: dict[str, str], form: str, seconds: int | None
) -> None:
    """Answer a question that has a name; or show all of the cache on one page, which needs no network.

    A report is a file of SQL, NAME.sql. Your own are in the folder of CACHEDB_REPORTS, by default reports/ in
    cachedb's folder of the user's configuration, and go before those of the same name. A file begins with comments:
    lines that say what it answers, and for each :parameter of its query a line "-- :parameter", or one with its
    default, "-- :parameter default". A table has sizes for people, all else bytes. It runs at the lowest priority.
    """
    if sum(map(bool, (name, list_, file))) != 1:
        raise click.UsageError("name a report, or use --list, or --html")
    if not name and (parameters or seconds is not None):
        raise click.UsageError("-p and --timeout are for a report that has a name")
    if file:
        _write_page(file)
    elif list_:
        _list_reports(form)
    else:
        from cachedb.reports.named import load

        chosen = load(name or "")
        _ask(chosen.query, chosen.values(parameters), form, seconds, sizes=True)


def _write_page(file: str) -> None:
    if file == "-":
        get_stdout()  # before the work is done: it may be closed
    with open_cache(existing=True) as cache, _giving_way():
        page = cache.get_html_report()
    try:
        if file != "-" and (not os.path.exists(file) or os.path.isfile(file)):
            _replace(file, page)
        else:  # a device, a fifo or stdout is written to, and not replaced
            with click.open_file(file, "w", encoding="utf-8") as opened:
                opened.write(page)
    except OSError as error:
        error.filename = None  # it may be that of the file which was to replace it
        raise click.UsageError(f"cannot write {file!r}: {explain(error)}") from error


def _list_reports(form: str) -> None:
    from cachedb.reports.named import reports

    found = reports()
    if form == "table":
        said = [(one.name, " ".join(one.wanted()), one.description) for one in found]
        print_table(("REPORT", "PARAMETERS", "WHAT IT SAYS"), said)
        return
    nested = form in ("json", "ndjson")
    rows = [
        (one.name, one.description, one.parameters if nested else " ".join(one.wanted()), one.path) for one in found
    ]
    print_rows(("report", "description", "parameters", "path"), rows, form)


def _replace(file: str, text: str) -> None:
    """Write a file whole, or leave what is there as it is."""
    from pathlib import Path

    from cachedb.disk.durable import atomic_file, remove_leftovers

    path = Path(os.path.realpath(file))
    remove_leftovers(path.parent)
    with atomic_file(path) as new:
        rest = memoryview(text.encode())
        while rest:
            rest = rest[new.write(rest) :]
        with suppress(FileNotFoundError):
            os.fchmod(new.fileno(), path.stat().st_mode & 0o777)
