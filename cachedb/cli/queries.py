"""Define the commands that run SQL queries: sql, report."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from cachedb.cli.context import open_cache
from cachedb.cli.options import (
    complete_with,
    format_examples,
    no_header_option,
    parameters_option,
    row_format_option,
    timeout_option,
)
from cachedb.cli.output import print_json, print_rows, print_table
from cachedb.cli.signals import received_signals
from cachedb.cli.step_watcher import StepWatcher
from cachedb.cli.streams import PrintingCommand, get_stdout, read_text, write_text
from cachedb.errors import CacheError, InvalidQuery
from cachedb.text import printable

if TYPE_CHECKING:
    from cachedb.cache import Cache
    from cachedb.index.sqlite.query import Answer
    from cachedb.reports.views import View

__all__ = []


_PROMPT_GRACE_SECONDS = 10


@click.command(
    cls=PrintingCommand,
    epilog=format_examples(
        "cachedb sql",
        "cachedb sql --schema image_usage",
        "cachedb sql 'SELECT name, human(unique_size) FROM image_usage ORDER BY unique_size DESC LIMIT 5'",
        "cachedb sql --format csv -p days=30 'SELECT name FROM image_usage WHERE unused_days > :days'",
    ),
)
@click.argument("query", required=False, shell_complete=complete_with("complete_view"))
@click.option("--file", type=click.Path(), help="Read the query from a file, or - for stdin.")
@click.option(
    "--schema", is_flag=True, help="Print the SQL of the tables, indexes and views, or the columns of the view QUERY."
)
@click.option(
    "--datasette-metadata",
    "datasette",
    is_flag=True,
    help="Print descriptions of the views for `datasette --metadata`.",
)
@parameters_option
@row_format_option
@no_header_option
@timeout_option
def sql(
    query: str | None,
    file: str | None,
    schema: bool,
    datasette: bool,
    parameters: dict[str, str],
    form: str,
    header: bool,
    seconds: int | None,
) -> None:
    """Query the index with SQL; without a query, open a prompt or list the views.

    QUERY is written in SQLite's SQL, with the extra functions human(bytes) and ago(time); - reads it from stdin. A
    query only reads, blocks no writer, and runs at the lowest priority. `cachedb sql --schema VIEW` describes the
    columns of a view.

    Without a query, a terminal gets a prompt with a history and completion. Elsewhere the views are listed.
    """
    from cachedb.reports.parameters import parse_number

    if sum(map(bool, (schema or query, file, datasette))) > 1:
        raise click.UsageError("QUERY, --file, --schema and --datasette-metadata exclude each other: give one of them")
    if schema or datasette:
        with open_cache() as cache:
            if datasette:
                print_json(_describe_for_datasette(cache))
            elif query is not None:
                _list_columns(cache, query, form, header=header)
            else:
                _print_schema(cache)
        return
    if query == "-" or file is not None:
        query = read_text("-" if file is None else file, "the query")
    values = {name: parse_number(value) for name, value in parameters.items()}
    if query is not None:
        with open_cache() as cache, _explaining(query):
            _print_answer(partial(cache.sql, query, values, stream=True), form, seconds, header=header)
    elif sys.stdin.isatty() and sys.stdout.isatty():
        _run_prompt(values, form, seconds, header=header)
    else:
        with open_cache() as cache:
            _list_views(cache, form, header=header)


def _print_schema(cache: Cache) -> None:
    query = "SELECT sql || ';' AS sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY type <> 'table', name"
    with cache.sql(query) as found:
        for (definition,) in found.rows:
            click.echo(definition)


def _column_names(view: View) -> list[str]:
    return [column.name for column in view.columns]


def _list_columns(cache: Cache, name: str, form: str, *, header: bool) -> None:
    from difflib import get_close_matches

    views = {view.name: view for view in cache.list_views()}
    if name not in views:
        near = get_close_matches(name, views, 1)
        hint = f"did you mean {near[0]}?" if near else "`cachedb sql` lists the views"
        raise InvalidQuery(f"there is no view {name!r}: {hint}")
    rows = [tuple(column) for column in views[name].columns]
    if form == "table":
        print_table(("COLUMN", "TYPE", "DESCRIPTION"), rows, header=header)
    else:
        print_rows(("name", "type", "description"), rows, form, header=header)


def _describe_for_datasette(cache: Cache) -> dict[str, object]:
    """Return the descriptions of the views as Datasette's metadata of a database."""
    tables = {
        view.name: {
            "description": view.description,
            "columns": {column.name: column.description for column in view.columns},
        }
        for view in cache.list_views()
    }
    return {"databases": {"index": {"tables": tables}}}  # Datasette calls the database of index.db `index`


def _list_views(cache: Cache, form: str, *, header: bool) -> None:
    views = cache.list_views()
    if form == "table":
        print_table(("VIEW", "DESCRIPTION"), [(view.name, view.description) for view in views], header=header)
    else:
        listing = [(view.name, view.name, view.description, " ".join(_column_names(view))) for view in views]
        columns = ("name", "view", "description", "columns")  # `view` is the old name of the first
        skipped = 0 if form in ("json", "ndjson") else 1
        print_rows(columns[skipped:], [row[skipped:] for row in listing], form, header=header)


def _run_prompt(values: dict[str, int | float | str], form: str, seconds: int | None, *, header: bool) -> None:
    """Answer queries that are typed at a prompt, until its end."""
    from cachedb.cli.sql_prompt import run_prompt
    from cachedb.index.sqlite.query import is_complete

    with open_cache() as cache:

        def execute(query: str) -> None:
            own = {name: value for name, value in values.items() if re.search(rf"[:@$]{re.escape(name)}\b", query)}
            try:
                # A query that cannot be cancelled in time ends the process, and with it the prompt. So allow more time.
                ask = partial(cache.sql, query, own, stream=True)
                _print_answer(ask, form, seconds, header=header, grace_seconds=_PROMPT_GRACE_SECONDS)
            except CacheError as error:
                print(_mark_mistake(query, error), file=sys.stderr)

        def list_columns(view: str) -> None:
            try:
                _list_columns(cache, view, form, header=header)
            except CacheError as error:
                print(_mark_mistake("", error), file=sys.stderr)

        commands: dict[str, Callable[[str], None]] = {
            ".views": lambda _: _list_views(cache, form, header=header),
            ".schema": list_columns,
        }
        run_prompt(execute, commands, is_complete, {view.name: _column_names(view) for view in cache.list_views()})


@contextmanager
def _use_idle_priority() -> Iterator[None]:
    """Run this block only on otherwise idle CPUs.

    Use it for reading, and only after the cache is open: opening may take the write lock, and the holder of that lock
    must not be delayed.
    """
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:
        os.nice(19)
    try:
        yield
    finally:
        # Restore the priority before closing: the last process to close an index writes its WAL back under a lock.
        # Raising the priority again may not be allowed.
        with suppress(OSError):
            os.sched_setscheduler(0, policy, parameter)


def _print_answer(
    ask: Callable[..., AbstractContextManager[Answer]],
    form: str,
    seconds: int | None,
    *,
    header: bool,
    is_report: bool = False,
    grace_seconds: float = 1,
) -> None:
    watcher = StepWatcher(seconds, grace_seconds=grace_seconds)
    try:
        with (
            watcher.watching(),  # before the priority is lowered: the thread must run while other processes compute
            _use_idle_priority(),
            ask(timeout=seconds) as found,
        ):
            rows = watcher.watch_rows(found.rows)
            if form in ("json", "ndjson"):
                rows = _with_booleans(found.columns, rows)
            print_rows(found.columns, rows, form, short=is_report, header=header)
            sys.stdout.flush()
    except InvalidQuery:
        if received_signals:  # SQLite replaces what a signal handler raises inside `human` or `ago`
            raise KeyboardInterrupt from None
        raise


@contextmanager
def _explaining(query: str) -> Iterator[None]:
    """Print an error with its place in the query, if it has one, and exit with 2."""
    try:
        yield
    except InvalidQuery as error:
        if error.place is None:
            raise
        print(_mark_mistake(query, error), file=sys.stderr)
        click.get_current_context().exit(2)


def _mark_mistake(query: str, error: CacheError) -> str:
    """Return an error's message, with the line of the mistake and a mark below it if they are known."""
    message = f"cachedb: {printable(str(error))}"
    place = error.place if isinstance(error, InvalidQuery) else None
    if place is None:
        return message
    start, stop = place
    line = query.count("\n", 0, start)
    text = query.splitlines()[line] if query else ""
    column = start - (query.rfind("\n", 0, start) + 1)
    mark = f"{' ' * len(printable(text[:column]))}{'^' * max(stop - start, 1)}"
    return f"{message}, in line {line + 1}:\n  {printable(text)}\n  {mark}"


def _with_booleans(columns: Sequence[str], rows: Iterator[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Yield the rows with true and false in columns named like the boolean columns of the views."""
    from cachedb.reports.views import BOOLEAN_COLUMNS

    are_booleans = [column in BOOLEAN_COLUMNS for column in columns]
    for row in rows:
        yield tuple(
            bool(value) if is_boolean and value in (0, 1) else value
            for value, is_boolean in zip(row, are_booleans, strict=True)
        )


@click.command(
    epilog=format_examples(
        "cachedb report --list",
        "cachedb report --html cache.html",
        "cachedb report largest-unique 5",
        "cachedb report not-used -p days=90 --format json",
        "cachedb report freed-by app:1 'team/*'",
    )
)
@click.argument("name", required=False, shell_complete=complete_with("complete_report"))
@click.argument("values", nargs=-1, metavar="[VALUE]...", shell_complete=complete_with("complete_value"))
@click.option("--list", "list_", is_flag=True, help="List the reports and their parameters.")
@click.option("--html", "file", metavar="FILE", type=click.Path(), help="Write an HTML page about the whole cache.")
@parameters_option
@row_format_option
@no_header_option
@timeout_option
def report(
    name: str | None,
    values: tuple[str, ...],
    list_: bool,
    file: str | None,
    parameters: dict[str, str],
    form: str,
    header: bool,
    seconds: int | None,
) -> None:
    """Run a named SQL report, or write an HTML page of the whole cache.

    The page works offline. VALUEs are for the parameters of the report, in the order in which --list prints them. -p
    gives a parameter a value by its name. A value of the wrong type, or the name of an image that is not in the cache,
    is an error.

    A report is a file NAME.sql. Put your own in the folder CACHEDB_REPORTS; they replace built-in reports of the same
    name. The default folder is reports/ in cachedb's configuration folder. A file starts with comments that describe
    the report. Each :parameter of the query has a line "-- :parameter" or "-- :parameter default". A type may follow
    the name, as in "-- :limit:count 20": count, days, image, images, label, platform, size or text.

    A table shows sizes, times and digests as `ls` does; all other formats show them whole. Reports run at the lowest
    priority.
    """
    if sum(map(bool, (name, list_, file))) != 1:
        raise click.UsageError("expected exactly one of NAME, --list and --html: NAME is a report that --list prints")
    if not file or file == "-":
        get_stdout()  # fail before the work if stdout is closed
    if not name and (parameters or seconds is not None):
        raise click.UsageError("-p and --timeout work only with a report's name")
    if file:
        _write_page(file)
    elif list_:
        _list_reports(form, header=header)
    else:
        from cachedb.reports.named import load_report

        chosen = load_report(name or "")
        given = chosen.assign_values(values, parameters)
        with open_cache() as cache, _explaining(chosen.query):
            ask = partial(cache.run_report, chosen.name, given, stream=True)
            _print_answer(ask, form, seconds, header=header, is_report=True)


def _write_page(file: str) -> None:
    with open_cache() as cache, _use_idle_priority():
        page = cache.get_html_report()
    write_text(file, page, outside=cache.directory)


def _list_reports(form: str, *, header: bool) -> None:
    from cachedb.reports.named import list_reports

    found = list_reports()
    if form == "table":
        listing = [(entry.name, " ".join(map(str, entry.parameters)), entry.description) for entry in found]
        print_table(("REPORT", "PARAMETERS", "DESCRIPTION"), listing, header=header)
        return
    if form in ("json", "ndjson"):
        columns: tuple[str, ...] = ("name", "description", "parameters", "types", "path", "report")
        rows: list[tuple[object, ...]] = [
            (
                entry.name,
                entry.description,
                {parameter.name: parameter.default for parameter in entry.parameters},
                {parameter.name: parameter.kind for parameter in entry.parameters},
                entry.path,
                entry.name,  # the old name of the key
            )
            for entry in found
        ]
    else:
        columns = ("report", "description", "parameters", "path")
        rows = [(entry.name, entry.description, " ".join(map(str, entry.parameters)), entry.path) for entry in found]
    print_rows(columns, rows, form, header=header)
