"""Show progress bars on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from cachedb.cli.log import log_above, print_line
from cachedb.text import format_size, shorten_digest

if TYPE_CHECKING:
    import rich.progress

    from cachedb.cache import Progress
    from cachedb.progress import BlobProgress


__all__ = ["show_downloads", "show_progress", "show_stages", "show_transfer"]


@contextmanager
def _show_bars(*, quiet: bool = False) -> Iterator[rich.progress.Progress | None]:
    """Show bars that count bytes on stderr; yield None if stderr is not a terminal, or if ``quiet``."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars,
        log_above(lambda line: bars.console.print(line, markup=False, highlight=False)),
    ):
        yield bars


@contextmanager
def show_progress(action: str, *, quiet: bool = False) -> Iterator[Progress | None]:
    """Show one bar for the whole operation; yield its progress callback, or None."""
    with _show_bars(quiet=quiet) as bars:
        yield _total_reporter(bars, action) if bars else None


@contextmanager
def show_transfer(action: str, *, quiet: bool) -> Iterator[dict[str, Any]]:
    """Show a bar for the whole transfer and one for each blob; yield the callbacks as keyword arguments."""
    with _show_bars(quiet=quiet) as bars:
        yield {"progress": _total_reporter(bars, action), "blob_progress": _blob_reporter(bars)} if bars else {}


def _total_reporter(bars: rich.progress.Progress, action: str) -> Progress:
    task = bars.add_task(action, total=None)
    return lambda done, total: bars.update(task, completed=done, total=total)


def _blob_reporter(bars: rich.progress.Progress) -> BlobProgress:
    tasks: dict[str, Any] = {}

    def show(digest: str, done: int, total: int) -> None:
        if digest not in tasks:
            tasks[digest] = bars.add_task(f"  {shorten_digest(digest)}", total=total)
        bars.update(tasks[digest], completed=done, visible=done < total)

    return show


@contextmanager
def show_downloads(action: str, *, quiet: bool) -> Iterator[dict[str, Any]]:
    """Show bars as `show_transfer` does, or print a line for each blob if stderr is not a terminal."""
    if quiet or sys.stderr.isatty():
        with show_transfer(action, quiet=quiet) as callbacks:
            yield callbacks
        return
    printed = set[str]()

    def show(digest: str, done: int, total: int) -> None:
        if done >= total and digest not in printed:
            printed.add(digest)
            with suppress(OSError, ValueError):  # stderr may be closed
                print_line(f"cachedb: downloaded {shorten_digest(digest)}, {format_size(total)}")

    yield {"blob_progress": show}


@contextmanager
def show_stages() -> Iterator[Callable[[str, int, int], None] | None]:
    """Show a bar on stderr for each stage; yield the callback, or None if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield show
