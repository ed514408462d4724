"""Options and parameter types that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from cachedb.cli.output import ROW_FORMATS
from cachedb.text import parse_size

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    _Parameter = click.ParamType[str]
else:
    _Parameter = click.ParamType

__all__ = [
    "COMPLETE_VARIABLE",
    "DIGEST",
    "NAME",
    "NAME_OR_DIGEST",
    "DurationParameter",
    "HoldParameter",
    "SizeParameter",
    "authfile_option",
    "dry_run_option",
    "format_examples",
    "format_option",
    "plain_http_option",
    "quiet_option",
    "read_values",
    "row_format_option",
    "timeout_option",
]


COMPLETE_VARIABLE = "_CACHEDB_COMPLETE"
"""The variable by which a shell asks for completion."""


def format_examples(*lines: str) -> str:
    """Return the examples of a command, for its help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


# Parameters


class _InCache(_Parameter):
    """What a shell completes to the names in the cache, or the digests, or both."""

    def __init__(self, name: str, *, names: bool = False, digests: bool = False) -> None:
        self.name, self._names, self._digests = name, names, digests

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from cachedb.cli.candidates import candidates

        return candidates(ctx, incomplete, names=self._names, digests=self._digests)


class HoldParameter(_Parameter):
    """An id or a name of a hold."""

    name = "hold"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return what a shell completes a part to."""
        from cachedb.cli.candidates import held

        return held(ctx, incomplete)


class SizeParameter(_Parameter):
    """A number of bytes, such as 500MB or 64GiB."""

    name = "size"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        """Return the value of a text, or fail."""
        size = parse_size(value)
        if size is None:
            self.fail(f"{value!r} is not a size such as 500MB or 64GiB", param, ctx)
        return size


NAME = _InCache("name", names=True)
DIGEST = _InCache("digest", digests=True)
NAME_OR_DIGEST = _InCache("name or digest", names=True, digests=True)
format_option = click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="How to print the result.",
)
plain_http_option = click.option(
    "--plain-http/--tls", "plain_http", default=None, help="Speak HTTP, or HTTPS with this host too."
)
authfile_option = click.option(
    "--authfile", type=click.Path(), help="Credentials.  [default: as podman and Docker keep them]"
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Remove nothing; say what would be freed.")


def quiet_option(what: str) -> Callable[[Any], Any]:
    """Return the option -q of a command."""
    return click.option("-q", "--quiet", is_flag=True, help=f"Print {what} alone.")


class DurationParameter(_Parameter):
    """A time such as 90s, 30m, 2h, 7d, or 1h30m, in seconds."""

    name = "duration"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        """Return the value of a text, or fail."""
        import re

        units = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
        if not re.fullmatch(r"(\d{1,9}[smhdw])+", value):
            self.fail(f"{value!r} is not a time such as 90s, 30m, 2h, 7d or 1h30m", param, ctx)
        return sum(int(count) * units[unit] for count, unit in re.findall(r"(\d+)([smhdw])", value))


def _parameters(_context: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    for text in given:
        if "=" not in text:
            raise click.BadParameter(f"{text!r} is not NAME=VALUE")
    return dict(text.split("=", 1) for text in given)


row_format_option = click.option(
    "--format",
    "form",
    type=click.Choice(ROW_FORMATS),
    default="table",
    show_default=True,
    help="How to print the rows; all but table and json a line each, as they come. In csv and tsv a text that a "
    "spreadsheet would take for a formula has a ' in front.",
)
timeout_option = click.option(
    "--timeout", "seconds", metavar="TIME", type=DurationParameter(), help="Stop it after a time such as 30s or 5m."
)
read_values = click.option(
    "-p", "parameters", metavar="NAME=VALUE", multiple=True, callback=_parameters, help="A value for :NAME; repeatable."
)
