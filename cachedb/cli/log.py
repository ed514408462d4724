"""Print the library's log on stderr: warnings, waits, automatic prunes; with --verbose everything."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from cachedb.text import printable

__all__ = ["hide_prunes", "log_above", "print_line", "show_log"]


class _Log(logging.Handler):
    """Print log records on stderr; on a terminal a wait is one line, rewritten in place."""

    def __init__(self, *, verbose: bool) -> None:
        super().__init__()
        self.print_above: Callable[[str], object] | None = None
        """Print a line above the progress bars; None while there are no bars."""
        self.hides_prunes = False
        """Whether the records of automatic prunes are not printed."""
        self._verbose, self._waiting = verbose, False

    def emit(self, record: logging.LogRecord) -> None:
        wait = getattr(record, "wait", None)
        is_important = record.levelno >= logging.WARNING or (hasattr(record, "pruned") and not self.hides_prunes)
        if wait is None and not self._verbose and not is_important:
            return
        with suppress(OSError, ValueError):  # stderr may be closed
            self._print(printable(record.getMessage()), wait, is_important=is_important)

    def _print(self, message: str, wait: str | None, *, is_important: bool) -> None:
        line = f"cachedb: {message}"
        if self.print_above is None and sys.stderr.isatty():
            clear = "\r\x1b[K" if self._waiting else ""
            self._waiting = wait == "on"
            text = "" if wait == "end" and not self._verbose else line
            sys.stderr.write(f"{clear}{text}" + ("" if self._waiting or not text else "\n"))
            sys.stderr.flush()
        elif is_important or (self._verbose and wait != "on"):
            (self.print_above or print_line)(line)


def print_line(line: str) -> None:
    """Print a line on stderr."""
    sys.stderr.write(f"{line}\n")  # one write, so that the lines of several threads do not mix
    sys.stderr.flush()


_handlers: list[_Log] = []


def show_log(*, verbose: bool) -> None:
    """Print the library's warnings and waits on stderr; all its messages if ``verbose``."""
    logger = logging.getLogger("cachedb")
    for handler in _handlers:
        logger.removeHandler(handler)
    _handlers[:] = [_Log(verbose=verbose)]
    logger.addHandler(_handlers[0])
    logger.setLevel(logging.DEBUG)
    logger.propagate = False


def hide_prunes() -> None:
    """Print no automatic prunes, unless `show_log` was called with ``verbose``."""
    for handler in _handlers:
        handler.hides_prunes = True


@contextmanager
def log_above(print_above: Callable[[str], object]) -> Iterator[None]:
    """Print the library's log through ``print_above`` during this block, so it stays above progress bars."""
    for handler in _handlers:
        handler.print_above = print_above
    try:
        yield
    finally:
        for handler in _handlers:
            handler.print_above = None
