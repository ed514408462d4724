"""Standard input and output: closed, a terminal, full, or a stream of content."""

from __future__ import annotations

import os
import sys
from typing import IO

import click

__all__ = ["closed_streams", "discard_output", "get_stdin", "get_stdout", "open_standard_files"]


closed_streams: set[str] = set()  # standard files that were closed when we began: "stdin", "stdout", "stderr"


def open_standard_files() -> None:
    """Open the standard files that are closed, as by `>&-`: no file of the cache may come to be in their place."""
    for name in ("stdin", "stdout", "stderr"):  # in the order of their numbers, of which each gets its own
        if getattr(sys, name) is None:
            closed_streams.add(name)
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115


def discard_output(descriptor: int) -> None:
    """Have nothing more be written to stdout or stderr, which cannot be: not what is flushed at exit either."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def get_stdin() -> IO[bytes]:
    """Return stdin, to read content from."""
    if "stdin" in closed_streams:
        raise click.UsageError("stdin is closed: send the content to it, or name a file")
    if sys.stdin.isatty():
        raise click.UsageError("stdin is a terminal: send the content to it, or name a file")
    return sys.stdin.buffer


def get_stdout() -> IO[bytes]:
    """Return stdout, to write content to."""
    if "stdout" in closed_streams:
        raise click.UsageError("stdout is closed: redirect it")
    return sys.stdout.buffer
