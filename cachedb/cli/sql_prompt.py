"""Read SQL queries at a prompt, with history and completion."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Final

import click

from cachedb.cli.signals import received_signals

__all__ = ["run_prompt"]


_WELCOME = "A query ends with ; and .help lists the other commands. ^C cancels a query, ^D ends."
_HELP = """\
.views        list the views
.schema VIEW  list the columns of a view
.exit         end, like ^D"""
_COMMANDS: Final = (".exit", ".help", ".schema", ".views")
_PROMPTS: Final = ("cachedb> ", "    ...> ")  # for the first line of a query, and for the others
_HISTORY_LINES = 1_000
_DELIMITERS = " \t\n()<>=,;+-*/|'\""  # of words for completion; a dot is a part of a word
_KEYWORDS: Final = """
    SELECT DISTINCT FROM JOIN LEFT CROSS ON USING WHERE AND OR NOT IN IS NULL LIKE GLOB BETWEEN EXISTS GROUP BY HAVING
    ORDER LIMIT OFFSET ASC DESC AS WITH RECURSIVE MATERIALIZED UNION ALL EXCEPT INTERSECT CASE WHEN THEN ELSE END
    count sum min max avg total round coalesce substr instr group_concat julianday strftime human ago
    """.split()  # noqa: SIM905


def run_prompt(
    execute: Callable[[str], None],
    commands: Mapping[str, Callable[[str], None]],
    is_complete: Callable[[str], bool],
    columns: Mapping[str, Sequence[str]],
) -> None:
    """Read queries and commands until the end of the input.

    Args:
        execute: called with each query; it prints the result and its own errors.
        commands: called with the text behind a command such as ``.views``.
        is_complete: returns whether a text ends with the semicolon of a query.
        columns: the columns of each view, for completion.
    """
    editor = _LineEditor(columns)
    click.echo(_WELCOME)
    while True:
        try:
            text = _read_text(editor, is_complete)
            if not text.strip(" ;\n"):
                continue
            editor.remember(text)
            word, _, rest = text.rstrip("; ").partition(" ")
            if not word.startswith("."):
                execute(text)
            elif word in (".exit", ".quit"):
                return
            elif word in commands:
                commands[word](rest.strip())
            else:
                click.echo(_HELP)
        except KeyboardInterrupt:
            received_signals.clear()  # it cancels the query, and not the prompt
            click.echo()
        except EOFError:
            click.echo()
            return


def _read_text(editor: _LineEditor, is_complete: Callable[[str], bool]) -> str:
    """Return the next query, or the next command, which is one line that starts with a dot."""
    lines: list[str] = []
    while True:
        lines.append(editor.read_line(lines))
        text = "\n".join(lines).strip()
        if not text or text.startswith(".") or is_complete(text):
            return text


class _LineEditor:
    """Reads lines, with completion and a history if Python has readline."""

    def __init__(self, columns: Mapping[str, Sequence[str]]) -> None:
        self._columns = columns
        self._lines: list[str] = []  # the lines of the query before the one that is edited
        self._matches: list[str] = []
        self._readline: ModuleType | None = None
        with suppress(ImportError):
            import readline

            self._readline = readline
            readline.set_completer(self._complete)
            readline.set_completer_delims(_DELIMITERS)
            # macOS and some builds of Python have libedit instead, which has its own commands.
            is_libedit = "libedit" in (readline.__doc__ or "")
            readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
            readline.set_auto_history(False)
            for line in _read_history():
                readline.add_history(line)

    def read_line(self, lines: list[str]) -> str:
        """Read a line of a query after other lines.

        Raises:
            EOFError: at the end of the input.
            KeyboardInterrupt: on SIGINT.
        """
        self._lines = lines
        return input(_PROMPTS[bool(lines)])

    def remember(self, text: str) -> None:
        """Add a query to the history, as one line unless a comment would then hide the rest."""
        lines = text.splitlines() if "--" in text else [" ".join(text.splitlines())]
        if self._readline is not None:
            for line in lines:
                self._readline.add_history(line)
            _append_history(lines)

    def _complete(self, word: str, number: int) -> str | None:
        """Return a completion of a word by its number, as readline asks for them; None after the last."""
        if number == 0:
            assert self._readline is not None
            typed = "\n".join([*self._lines, self._readline.get_line_buffer()])
            self._matches = self._find_completions(word, typed)
        return self._matches[number] if number < len(self._matches) else None

    def _find_completions(self, word: str, typed: str) -> list[str]:
        qualifier, dot, start = word.rpartition(".")
        if typed.startswith(".") and dot and not qualifier:
            names: Iterable[str] = _COMMANDS
            start = word
        elif dot:
            # The qualifier is a view, or the alias of one: FROM image_usage AS u.
            named = re.search(rf"(\w+)\s+(?:AS\s+)?{re.escape(qualifier)}\b", typed, re.IGNORECASE)
            columns = self._columns.get(qualifier) or self._columns.get(named[1] if named else "", ())
            names, start = [f"{qualifier}.{column}" for column in columns], word
        elif re.search(r"(?:\b(?:FROM|JOIN)\s+|^\.schema\s+)\w*$", typed, re.IGNORECASE):
            names = self._columns
        else:
            mentioned = [view for view in self._columns if re.search(rf"\b{view}\b", typed)]
            columns = [column for view in mentioned or self._columns for column in self._columns[view]]
            keywords = [keyword.lower() for keyword in _KEYWORDS] if start.islower() else _KEYWORDS
            names = [*columns, *self._columns, *keywords]
        return sorted({name for name in names if name.lower().startswith(start.lower())})


def _find_history() -> Path:
    import platformdirs

    return Path(platformdirs.user_state_dir("cachedb")) / "sql_history"


def _read_history() -> list[str]:
    """Return the last queries; keep only these in the file."""
    path = _find_history()
    try:
        lines = path.read_text(errors="replace").splitlines()
        if len(lines) > 2 * _HISTORY_LINES:
            path.unlink()
            _append_history(lines[-_HISTORY_LINES:])
    except OSError:
        return []
    return lines[-_HISTORY_LINES:]


def _append_history(lines: Iterable[str]) -> None:
    """Append lines to the history, which only its user may read; ignore errors."""
    path = _find_history()
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with open(file, "w", encoding="utf-8", errors="replace") as history:
            os.fchmod(file, 0o600)
            history.writelines(f"{line}\n" for line in lines)
