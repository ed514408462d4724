"""Read stdin and write stdout, even if they are closed, a terminal, or on a full disk."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import IO, TYPE_CHECKING

import click

from cachedb.errors import explain

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "PrintingCommand",
    "closed_streams",
    "discard_output",
    "get_stdin",
    "get_stdout",
    "open_standard_files",
    "read_text",
    "write_text",
]


closed_streams: set[str] = set()  # of "stdin", "stdout" and "stderr": those that were closed at the start


def open_standard_files() -> None:
    """Open /dev/null for each closed standard file, so that no file of the cache gets its descriptor."""
    for name in ("stdin", "stdout", "stderr"):  # in descriptor order: open() takes the lowest free one
        if getattr(sys, name) is None:
            closed_streams.add(name)
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115


def discard_output(descriptor: int) -> None:
    """Redirect stdout or stderr to /dev/null, so that flushing it at exit cannot fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def get_stdin() -> IO[bytes]:
    """Return stdin as a binary stream; raise a usage error if it is closed or a terminal."""
    if "stdin" in closed_streams:
        raise click.UsageError("stdin is closed: send the content to it or name a file")
    if sys.stdin.isatty():
        raise click.UsageError("stdin is a terminal: send the content to it or name a file")
    return sys.stdin.buffer


def read_text(file: str, what: str) -> str:
    """Return the text of a file, or of stdin for ``-``; raise a usage error if it cannot be read.

    Args:
        file: the path, or ``-``.
        what: the name of the content in errors.
    """
    if file == "-" and "stdin" in closed_streams:
        raise click.UsageError(f"stdin is closed: send {what} to it or name a file")
    try:
        with open(0 if file == "-" else file, encoding="utf-8-sig") as opened:  # skip an editor's byte order mark
            return opened.read()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise click.UsageError(f"cannot read {file!r}: {reason}") from error


def write_text(file: str, text: str, *, outside: Path | None = None) -> None:
    """Write a text to a file, atomically; raise a usage error if it cannot be written.

    Args:
        file: the path, or ``-`` for stdout. A device or a fifo is written to instead of being replaced.
        text: the text.
        outside: a cache directory whose own files are refused.
    """
    if outside is not None and file != "-":
        from pathlib import Path

        from cachedb.disk.layout import check_destination

        check_destination(outside, Path(file))
    try:
        if file != "-" and (not os.path.exists(file) or os.path.isfile(file)):
            _write_atomically(file, text)
        else:
            with click.open_file(file, "w", encoding="utf-8") as opened:
                opened.write(text)
    except OSError as error:
        error.filename = None  # it may name the temporary file
        raise click.UsageError(f"cannot write {file!r}: {explain(error)}") from error


def _write_atomically(file: str, text: str) -> None:
    """Replace a file by one with this text, or leave it unchanged on failure."""
    from pathlib import Path

    from cachedb.disk.durable import atomic_file, remove_leftovers
    from cachedb.disk.writer import write_all

    path = Path(os.path.realpath(file))
    remove_leftovers(path.parent)
    with atomic_file(path) as new:
        write_all(new, text.encode())
        with suppress(FileNotFoundError):
            os.fchmod(new.fileno(), path.stat().st_mode & 0o777)


def get_stdout() -> IO[bytes]:
    """Return stdout as a binary stream; raise a usage error if it is closed."""
    if "stdout" in closed_streams:
        raise click.UsageError("stdout is closed: redirect it")
    return sys.stdout.buffer


class PrintingCommand(click.Command):
    """A command that only prints; without stdout, exit code 0 would hide that its output was lost."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command, or raise a usage error if stdout is closed."""
        get_stdout()
        return super().invoke(ctx)
