"""What the command line prints of the library's log: warnings, for whom it waits, and with --verbose all of it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from cachedb.text import printable

__all__ = ["log_above", "show_log"]


class _Log(logging.Handler):
    """Prints what the library says on stderr. On a terminal a wait is one line, which is rewritten."""

    def __init__(self, *, verbose: bool) -> None:
        super().__init__()
        self.print_above: Callable[[str], object] | None = None
        """Prints a line above progress bars, while there are some."""
        self._verbose, self._waiting = verbose, False

    def emit(self, record: logging.LogRecord) -> None:
        wait = getattr(record, "wait", None)
        if wait is None and not self._verbose and record.levelno < logging.WARNING:
            return
        with suppress(OSError, ValueError):  # stderr is closed: nobody reads it
            self._print(printable(record.getMessage()), record, wait)

    def _print(self, message: str, record: logging.LogRecord, wait: str | None) -> None:
        line = f"cachedb: {message}"
        if self.print_above is None and sys.stderr.isatty():
            clear = "\r\x1b[K" if self._waiting else ""
            self._waiting = wait == "on"
            text = "" if wait == "end" and not self._verbose else line
            sys.stderr.write(f"{clear}{text}" + ("" if self._waiting or not text else "\n"))
            sys.stderr.flush()
        elif record.levelno >= logging.WARNING or (self._verbose and wait != "on"):
            (self.print_above or _print_line)(line)


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_shown: list[_Log] = []


def show_log(*, verbose: bool) -> None:
    """Print what the library says on stderr: warnings, and for whom it waits; if verbose, all of it."""
    logger = logging.getLogger("cachedb")
    for handler in _shown:
        logger.removeHandler(handler)
    _shown[:] = [_Log(verbose=verbose)]
    logger.addHandler(_shown[0])
    logger.setLevel(logging.DEBUG)
    logger.propagate = False


@contextmanager
def log_above(print_above: Callable[[str], object]) -> Iterator[None]:
    """Have what the library says printed by a function of progress bars in the block."""
    for handler in _shown:
        handler.print_above = print_above
    try:
        yield
    finally:
        for handler in _shown:
            handler.print_above = None
