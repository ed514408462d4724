"""Make pages from the code when the documentation is built: one for each command, and the fields of result types."""

from __future__ import annotations

import inspect
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from docutils import nodes
from sphinx.application import Sphinx

from cachedb.cli.main import cli

COMMANDS = "reference/commands"  # a folder of generated pages, which git ignores
_MARKDOWN = re.compile(r"([\\*_\[\]<>#|{}$])")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    write_pages(Path(app.srcdir) / COMMANDS)
    app.connect("autodoc-process-docstring", _add_fields, priority=400)
    app.connect("autodoc-process-docstring", _as_rst, priority=450)  # before napoleon
    app.connect("autodoc-skip-member", _skip)
    app.connect("doctree-resolved", _without_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


# Commands


def commands() -> Iterator[tuple[str, click.Command, click.Context]]:
    """Yield every command with its full name, groups before what is in them."""
    yield from _walk("cachedb", cli, None)


def _walk(
    name: str, command: click.Command, parent: click.Context | None
) -> Iterator[tuple[str, click.Command, click.Context]]:
    settings: dict[str, Any] = {**command.context_settings, "terminal_width": 96}
    context = click.Context(command, info_name=name.rpartition(" ")[2], parent=parent, **settings)
    yield name, command, context
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            if found is not None and not found.hidden:
                yield from _walk(f"{name} {child}", found, context)


def man_pages_of(author: str) -> list[tuple[str, str, str, str, int]]:
    """Return the setting `man_pages`: a manual page for each command."""
    return [(f"{COMMANDS}/{_file(name)}", _file(name), _summary(command), author, 1) for name, command, _ in commands()]


def write_pages(folder: Path) -> None:
    """Write a page for each command, and delete the pages of commands that are gone."""
    folder.mkdir(exist_ok=True)
    pages = {f"{_file(name)}.md": _page(name, command, context) for name, command, context in commands()}
    for file in set(folder.iterdir()) - {folder / page for page in pages}:
        file.unlink()
    for page, text in pages.items():
        file = folder / page
        if not file.exists() or file.read_text() != text:  # Sphinx reads again what has a new time
            file.write_text(text)


def _file(name: str) -> str:
    return name.replace(" ", "-")


def _summary(command: click.Command) -> str:
    """Return the first sentence of a command's help, as the name line of a manual page has it."""
    return (_help(command).partition("\n\n")[0].replace("\n", " ").rstrip(".")).replace("`", "")


def _help(command: click.Command) -> str:
    return inspect.cleandoc(command.help or "").partition("\f")[0]


def _without_links(app: Sphinx, tree: nodes.document, _page: str) -> None:
    """Leave the text of links in manual pages, which would print an empty address behind it."""
    if app.builder.name == "man":
        for link in list(tree.findall(nodes.reference)):
            link.replace_self(link.children)


def _page(name: str, command: click.Command, context: click.Context) -> str:
    usage = " ".join(command.collect_usage_pieces(context))
    parts = [f"# {name}", "## Synopsis", f"```text\n{name} {usage}\n```", "## Description", _escaped(_help(command))]
    options = [_option(option, context) for option in command.get_params(context)]
    if described := [text for text in options if text]:
        parts += ["## Options", f"```{{program}} {name}\n```", *described]
    if isinstance(command, click.Group):
        parts.append("## Commands")
        children = [(child, command.get_command(context, child)) for child in command.list_commands(context)]
        parts += [
            f"[`{name} {child}`]({_file(f'{name} {child}')}.md)\n: {_escaped(_summary(found))}."
            for child, found in children
            if found
        ]
    if command.epilog:
        examples = inspect.cleandoc(command.epilog).replace("\b\n", "").removeprefix("Examples:\n")
        parts += ["## Examples", f"```sh\n{inspect.cleandoc(examples)}\n```"]
    parts += ["## Exit status", _exit_status()]
    if name != "cachedb":
        above = name.rpartition(" ")[0]
        parts += ["## See also", f"[{_file(above)}(1)]({_file(above)}.md)"]
    return "\n\n".join(parts) + "\n"


def _option(option: click.Parameter, context: click.Context) -> str | None:
    record = None if isinstance(option, click.Argument) else option.get_help_record(context)
    if record is None:
        return None
    names, text = record
    # click writes a pair of switches as `--one / --other`; Sphinx reads names with a comma between them.
    names = re.sub(r" ?/ ?(?=-)", ", ", names)
    return f"```{{option}} {names}\n{_escaped(text)}\n```"


def _exit_status() -> str:
    (codes,) = re.findall(r"^Exit codes: (.*?)\.$", _help(cli), re.MULTILINE)
    return "\n".join(f"- `{code.partition(' ')[0]}`: {code.partition(' ')[2]}" for code in codes.split("; "))


def _escaped(text: str) -> str:
    """Return a text of `--help` as Markdown that reads the same, with what is between backticks as code."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else _MARKDOWN.sub(r"\\\1", piece) for piece in pieces)


# Docstrings


def _is_record(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields")


def _skip(_app: Sphinx, _what: str, name: str, found: object, _skip: bool, _options: object) -> bool | None:
    """Leave out constructors, and the fields of named tuples, which `_add_fields` describes."""
    return True if name in ("__init__", "__new__") or type(found).__name__ == "_tuplegetter" else None


def _add_fields(_app: Sphinx, _what: str, _name: str, found: object, _options: object, lines: list[str]) -> None:
    """Describe the fields of a named tuple by the comments that its source has behind them."""
    if not _is_record(found):
        return
    lines += ["", "Attributes:"]
    lines += [f"    {field} ({kind}): {comment}" for field, kind, comment in fields(found)]
    lines.append("")


def fields(record: Any) -> Iterator[tuple[str, str, str]]:  # noqa: ANN401
    """Yield the fields of a named tuple: name, type, and the comment behind it."""
    source = inspect.getsource(record)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__)
        if token.type == tokenize.COMMENT
    }
    for number, line in enumerate(source.splitlines(), 1):
        if match := re.fullmatch(r"    (\w+): ([^=#]+?)(?: = [^#]+?)?(?:  #.*)?", line):
            yield match[1], match[2], comments.get(number, "")


def _as_rst(_app: Sphinx, _what: str, _name: str, _found: object, _options: object, lines: list[str]) -> None:
    """Turn `code` into ``code``, and indented examples and drawn trees into literal blocks."""
    new: list[str] = []
    if tree := [number for number, line in enumerate(lines) if "── " in line]:
        first, end = tree[0] - 1, tree[-1] + 1
        lines[first:end] = ["::", "", *(f"    {line}" for line in lines[first:end])]
    for line in lines:
        line = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line)
        starts = line.startswith("    ") and new and not new[-1] and any(new) and not _in_section(new)
        if starts and not _in_code(new):
            new += [".. code-block:: python", ""]
        new.append(line)
    lines[:] = new


def _in_section(before: list[str]) -> bool:
    """Return whether the last line without indentation is a heading such as `Args:`."""
    last = next((line for line in reversed(before) if line and not line.startswith(" ")), "")
    return last in ("Args:", "Returns:", "Raises:", "Attributes:")


def _in_code(before: list[str]) -> bool:
    last = next((line for line in reversed(before) if line and not line.startswith(" ")), "")
    return last == "::" or last.startswith(".. code-block")
