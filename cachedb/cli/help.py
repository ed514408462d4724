"""Define the command that prints the help of another command: help."""

from __future__ import annotations

import click

from cachedb.cli.options import format_examples
from cachedb.cli.streams import PrintingCommand

__all__ = []


@click.command(
    "help",
    cls=PrintingCommand,
    epilog=format_examples("cachedb help", "cachedb help import", "cachedb help db upgrade"),
)
@click.argument("words", metavar="[COMMAND]...", nargs=-1)
def help_(words: tuple[str, ...]) -> None:
    """Print the help of a command, as `cachedb COMMAND --help` does; without COMMAND, list the commands."""
    context = click.get_current_context().find_root()
    rest = list(words)
    while rest:
        group = context.command
        if not isinstance(group, click.Group):
            raise click.UsageError(f"{context.command_path!r} has no commands", context)
        name, command, rest = group.resolve_command(context, rest)
        assert command is not None
        context = click.Context(command, info_name=name, parent=context, **command.context_settings)
    click.echo(context.get_help(), color=context.color)
