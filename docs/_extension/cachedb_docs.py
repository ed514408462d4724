"""Generate documentation from the code: a page for each command, and the fields of the result types."""

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
    """Write the pages of the commands, and register the extension with Sphinx."""
    write_pages(Path(app.srcdir) / COMMANDS)
    app.connect("autodoc-process-docstring", _add_fields, priority=400)
    app.connect("autodoc-process-docstring", _convert_to_rst, priority=450)  # before napoleon
    app.connect("autodoc-skip-member", _skip_member)
    app.connect("doctree-resolved", _remove_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


# Commands


def commands() -> Iterator[tuple[str, click.Command, click.Context]]:
    """Yield every command with its full name; a group comes before its commands."""
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
    """Return the Sphinx setting `man_pages`: a manual page for each command."""
    pages = []
    for name, command, _ in commands():
        pages.append((f"{COMMANDS}/{_page_name(name)}", _page_name(name), _summarize(command), author, 1))
    return pages


def write_pages(folder: Path) -> None:
    """Write a page for each command, and delete the pages of commands that no longer exist."""
    folder.mkdir(exist_ok=True)
    pages = {f"{_page_name(name)}.md": _render_page(name, command, context) for name, command, context in commands()}
    for file in set(folder.iterdir()) - {folder / page for page in pages}:
        file.unlink()
    for page, text in pages.items():
        file = folder / page
        if not file.exists() or file.read_text() != text:  # Sphinx reads a file again if its time is new
            file.write_text(text)


def _page_name(name: str) -> str:
    return name.replace(" ", "-")


def _summarize(command: click.Command) -> str:
    """Return the first paragraph of a command's help on one line, for the name line of a manual page."""
    return (_get_help(command).partition("\n\n")[0].replace("\n", " ").rstrip(".")).replace("`", "")


def _get_help(command: click.Command) -> str:
    return inspect.cleandoc(command.help or "").partition("\f")[0]


def _remove_links(app: Sphinx, tree: nodes.document, _page: str) -> None:
    """Replace each link in a manual page by its text, as the page would print an empty address."""
    if app.builder.name == "man":
        for link in list(tree.findall(nodes.reference)):
            link.replace_self(link.children)


def _render_page(name: str, command: click.Command, context: click.Context) -> str:
    usage = " ".join(command.collect_usage_pieces(context))
    parts = [f"# {name}", "## Synopsis", f"```text\n{name} {usage}\n```", "## Description"]
    parts.append(_escape_markdown(_get_help(command)))
    options = [_render_option(option, context) for option in command.get_params(context)]
    if described := [text for text in options if text]:
        parts += ["## Options", f"```{{program}} {name}\n```", *described]
    if isinstance(command, click.Group):
        parts.append("## Commands")
        children = [(child, command.get_command(context, child)) for child in command.list_commands(context)]
        parts += [
            f"[`{name} {child}`]({_page_name(f'{name} {child}')}.md)\n: {_escape_markdown(_summarize(found))}."
            for child, found in children
            if found
        ]
    if command.epilog:
        examples = inspect.cleandoc(command.epilog).replace("\b\n", "").removeprefix("Examples:\n")
        parts += ["## Examples", f"```sh\n{inspect.cleandoc(examples)}\n```"]
    parts += ["## Exit status", _render_exit_codes()]
    if name != "cachedb":
        group = _page_name(name.rpartition(" ")[0])
        parts += ["## See also", f"[{group}(1)]({group}.md)"]
    return "\n\n".join(parts) + "\n"


def _render_option(option: click.Parameter, context: click.Context) -> str | None:
    record = None if isinstance(option, click.Argument) else option.get_help_record(context)
    if record is None:
        return None
    names, text = record
    # click separates a pair of switches by a slash, `--one / --other`; Sphinx needs a comma.
    names = re.sub(r" ?/ ?(?=-)", ", ", names)
    return f"```{{option}} {names}\n{_escape_markdown(text)}\n```"


def _render_exit_codes() -> str:
    (codes,) = re.findall(r"^Exit codes: (.*?)\.$", _get_help(cli), re.MULTILINE)
    return "\n".join(f"- `{code.partition(' ')[0]}`: {code.partition(' ')[2]}" for code in codes.split("; "))


def _escape_markdown(text: str) -> str:
    """Escape the Markdown of a help text, except for code between backticks."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else _MARKDOWN.sub(r"\\\1", piece) for piece in pieces)


# Docstrings


def _is_record(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields")


def _skip_member(_app: Sphinx, _what: str, name: str, found: object, _skip: bool, _options: object) -> bool | None:
    """Skip constructors, and the fields of named tuples, because `_add_fields` describes them."""
    return True if name in ("__init__", "__new__") or type(found).__name__ == "_tuplegetter" else None


def _add_fields(_app: Sphinx, _what: str, _name: str, found: object, _options: object, lines: list[str]) -> None:
    """Describe the fields of a named tuple with the comments behind them in its source."""
    if not _is_record(found):
        return
    lines += ["", "Attributes:"]
    lines += [f"    {field} ({kind}): {comment}" for field, kind, comment in fields(found)]
    lines.append("")


def fields(record: Any) -> Iterator[tuple[str, str, str]]:  # noqa: ANN401
    """Yield the name, the type and the comment of each field of a named tuple."""
    source = inspect.getsource(record)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__)
        if token.type == tokenize.COMMENT
    }
    for number, line in enumerate(source.splitlines(), 1):
        if match := re.fullmatch(r"    (\w+): ([^=#]+?)(?: = [^#]+?)?(?:  #.*)?", line):
            yield match[1], match[2], comments.get(number, "")


def _convert_to_rst(_app: Sphinx, _what: str, _name: str, _found: object, _options: object, lines: list[str]) -> None:
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
    """Return whether the last unindented line is a heading such as `Args:`."""
    last = next((line for line in reversed(before) if line and not line.startswith(" ")), "")
    return last in ("Args:", "Returns:", "Raises:", "Attributes:")


def _in_code(before: list[str]) -> bool:
    last = next((line for line in reversed(before) if line and not line.startswith(" ")), "")
    return last == "::" or last.startswith(".. code-block")
