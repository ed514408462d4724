"""`cachedb help COMMAND` prints the help of a command."""

from __future__ import annotations

import pytest

from tests.conftest import Run


@pytest.mark.parametrize("command", ["", "ls", "db", "db upgrade", "blob cat", "help"])
def test_help_prints_what_the_option_prints(cachedb: Run, command: str) -> None:
    done = cachedb("help", *command.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == cachedb(*command.split(), "--help").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("frobnicate", "no such command 'frobnicate'; see `cachedb --help`"),
        ("db frobnicate", "no such command 'frobnicate'; see `cachedb db --help`"),
        ("cleanup", "no such command 'cleanup': use `cachedb prune`, which removes images, or `cachedb gc`"),
        ("ls app:1", "'cachedb ls' has no commands; see `cachedb ls --help`"),
    ],
)
def test_help_of_an_unknown_command_is_an_error(cachedb: Run, words: str, message: str) -> None:
    done = cachedb("help", *words.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"cachedb: {message}")
    assert done.stderr.count("\n") == 1
