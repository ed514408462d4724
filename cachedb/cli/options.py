"""Define the options and parameter types that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from cachedb.cli.output import ROW_FORMATS
from cachedb.text import parse_duration, parse_size

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from cachedb.index.filters import Filters

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
    "Output",
    "SizeParameter",
    "check_selection",
    "complete_with",
    "dry_run_option",
    "filter_options",
    "format_examples",
    "format_option",
    "ignore_missing_option",
    "no_header_option",
    "output_options",
    "parameters_option",
    "quiet_option",
    "registry_options",
    "row_format_option",
    "timeout_option",
    "ttl_option",
]


COMPLETE_VARIABLE = "_CACHEDB_COMPLETE"
"""The environment variable that a shell sets to ask for completions."""


def format_examples(*lines: str) -> str:
    """Return the examples of a command as the epilog of its help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def complete_with(function: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Return a completion that calls a function of `shell_completion`.

    The module is imported only when a shell asks for completions.
    """

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from cachedb.cli import shell_completion

        found: list[CompletionItem] = getattr(shell_completion, function)(ctx, param, incomplete)
        return found

    return complete


# Parameters


class _NameParameter(_Parameter):
    """A name or digest, which a shell completes from the cache."""

    def __init__(self, name: str, *, names: bool = False, digests: bool = False) -> None:
        self.name, self._names, self._digests = name, names, digests

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from cachedb.cli.shell_completion import complete_names

        return complete_names(ctx, incomplete, names=self._names, digests=self._digests)


class HoldParameter(_Parameter):
    """The id of a hold, or a held name or digest."""

    name = "hold"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the completions of the typed text."""
        from cachedb.cli.shell_completion import complete_holds

        return complete_holds(ctx, incomplete)


class SizeParameter(_Parameter):
    """A number of bytes, such as 500MB or 64GiB."""

    name = "size"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        """Return the size in bytes; fail with a usage error if the text is not a size."""
        size = parse_size(value)
        if size is None:
            self.fail(f"{value!r} is not a size: write it as in 500MB or 64GiB", param, ctx)
        return size


NAME = _NameParameter("name", names=True)
DIGEST = _NameParameter("digest", digests=True)
NAME_OR_DIGEST = _NameParameter("name or digest", names=True, digests=True)
format_option = click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="How to print the result.",
)
ignore_missing_option = click.option(
    "--ignore-missing", is_flag=True, help="Skip names and patterns that match nothing."
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Remove nothing; print what would be freed.")


def _add_options(
    command: Callable[..., Any], options: Sequence[Callable[[Callable[..., Any]], Callable[..., Any]]]
) -> Callable[..., Any]:
    """Add options to a command, which prints them in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that select images; the command gets them as ``filters``, None if none is given."""

    @wraps(command)
    def run(*args: Any, conditions: tuple[str, ...], sort: str | None, limit: int | None, **options: Any) -> Any:  # noqa: ANN401
        filters = None
        if conditions or sort is not None or limit is not None:
            from cachedb.index.filters import parse_filters

            filters = parse_filters(conditions, sort=sort, limit=limit)
        return command(*args, filters=filters, **options)

    options = (
        click.option(
            "--filter",
            "conditions",
            metavar="KEY=VALUE",
            multiple=True,
            help="Select only images with label=KEY[=VALUE], platform=[OS/]ARCH, unused-for=7d, "
            "added-before=24h|DATE, base=NAME or digest=DIGEST, or that are incomplete, pinned or expired; repeatable.",
        ),
        click.option(
            "--sort",
            metavar="KEY",
            help="Sort by name, size, created, added or used, the smallest or oldest first; -KEY reverses the order.  "
            "[default: name]",
        ),
        click.option("--limit", metavar="N", type=click.IntRange(min=0), help="Select only the first N images."),
    )
    return _add_options(run, options)


def check_selection(names: Sequence[str], filters: Filters | None, *, ignore_missing: bool) -> None:
    """Fail with a usage error if neither names nor conditions are given.

    With ``ignore_missing``, there may be no names.
    """
    if not names and not ignore_missing and not (filters and filters.has_conditions):
        raise click.UsageError("expected names, patterns or --filter: '*' selects all images")


class Output(NamedTuple):
    """How a command prints its rows."""

    form: str  # table, json, ndjson, csv, tsv or a template
    columns: tuple[str, ...]  # the chosen columns; empty for the usual ones
    has_heading: bool


class _FormatParameter(_Parameter):
    """A format for rows, or a template such as ``{{.Name}}``."""

    name = "format"
    choices = ("table", "json", "ndjson", "csv", "tsv")

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        """Return the format; fail with a usage error if the text is neither a format nor a template."""
        if value not in self.choices and "{{" not in value:
            known = ", ".join(self.choices)
            self.fail(f"{value!r} is not one of {known}, nor a template like '{{{{.Name}}}}'", param, ctx)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the formats that start with the typed text."""
        return click.Choice(self.choices).shell_complete(ctx, param, incomplete)


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how rows are printed; the command gets them as ``output``."""

    @wraps(command)
    def run(*args: Any, form: str, columns: str | None, no_header: bool, **options: Any) -> Any:  # noqa: ANN401
        chosen = tuple(name.strip() for name in columns.split(",")) if columns else ()
        return command(*args, output=Output(form, chosen, not no_header), **options)

    options = (
        click.option(
            "--columns", metavar="NAME,...", help="The columns to print; an unknown one gives an error that lists all."
        ),
        click.option(
            "--format",
            "form",
            metavar="FORMAT",
            type=_FormatParameter(),
            default="table",
            show_default=True,
            help="table, json, ndjson, csv, tsv, or a template of columns, as in '{{.Name}} {{.Size}}'. {{json .}} is "
            "a row as JSON.",
        ),
        click.option("--no-header", is_flag=True, help="Print a table, csv or tsv without its headings."),
    )
    return _add_options(run, options)


def _parse_credentials(_context: click.Context, _option: click.Parameter, given: str | None) -> Any:  # noqa: ANN401
    if given is None:
        return None
    user, colon, password = given.partition(":")
    if not colon or not user:
        raise click.BadParameter("expected USER:PASSWORD")  # do not quote it: it may be the password
    return user, password


def registry_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how a registry is reached; their names are those of the fields of `Access`."""
    options = (
        click.option(
            "--plain-http/--tls",
            "plain_http",
            default=None,
            help="Use HTTP or HTTPS.  [default: HTTP for localhost, else HTTPS]",
        ),
        click.option(
            "--tls-verify",
            metavar="true|false",
            type=bool,
            help="With false, accept any certificate, and use HTTP if HTTPS fails.  [default: as in registries.conf]",
        ),
        click.option(
            "--authfile", type=click.Path(), help="A file of credentials.  [default: the files of podman and Docker]"
        ),
        click.option(
            "--creds",
            "credentials",
            metavar="USER:PASSWORD",
            callback=_parse_credentials,
            help="Credentials instead of a file. Other users of this host can see them (ps): prefer `skopeo login`.",
        ),
        click.option(
            "--timeout",
            metavar="TIME",
            type=DurationParameter(),
            default="10m",
            show_default=True,
            help="How long to wait for the first byte of an answer.",
        ),
    )
    return _add_options(command, options)


def quiet_option(what: str) -> Callable[[Any], Any]:
    """Return the option -q of a command that then prints only ``what``."""
    return click.option("-q", "--quiet", is_flag=True, callback=_be_quiet, help=f"Print only {what}.")


def _be_quiet(_context: click.Context, _option: click.Parameter, is_quiet: bool) -> bool:
    if is_quiet:
        from cachedb.cli.log import hide_prunes

        hide_prunes()
    return is_quiet


class DurationParameter(_Parameter):
    """A duration such as 90s, 30m, 2h, 7d or 1h30m, converted to seconds."""

    name = "duration"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        """Return the duration in seconds; fail with a usage error if the text is not a duration."""
        seconds = parse_duration(value)
        if seconds is None:
            self.fail(f"{value!r} is not a duration: write it as in 90s, 30m, 2h, 7d or 1h30m", param, ctx)
        return seconds


ttl_option = click.option(
    "--ttl",
    metavar="TIME",
    type=DurationParameter(),
    help="Let a prune remove the images after a time such as 6h or 7d.  [default: they have no lifetime]",
)


def _parse_parameters(_context: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    for text in given:
        if "=" not in text:
            raise click.BadParameter(f"{text!r} has no '=': write NAME=VALUE")
    return dict(text.split("=", 1) for text in given)


row_format_option = click.option(
    "--format",
    "form",
    type=click.Choice(ROW_FORMATS),
    default="table",
    show_default=True,
    help="How to print the rows. ndjson, csv, tsv and markdown print each row as soon as it is found. In csv and tsv, "
    "a ' is added in front of a text that a spreadsheet would run as a formula.",
)
no_header_option = click.option(
    "--no-header", "header", flag_value=False, default=True, help="Print no line with the names of the columns."
)
timeout_option = click.option(
    "--timeout",
    "seconds",
    metavar="TIME",
    type=DurationParameter(),
    help="Stop the query after a time such as 30s or 5m.",
)
parameters_option = click.option(
    "-p",
    "parameters",
    metavar="NAME=VALUE",
    multiple=True,
    callback=_parse_parameters,
    shell_complete=complete_with("complete_parameter"),
    help="A value for :NAME in the query; repeatable.",
)
