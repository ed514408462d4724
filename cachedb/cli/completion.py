"""Define the command that prints a completion script: completion."""

from __future__ import annotations

import os

import click

from cachedb.cli.options import COMPLETE_VARIABLE, format_examples
from cachedb.cli.streams import PrintingCommand

__all__ = []


_INSTALL = {
    "bash": 'add `eval "$(cachedb completion bash)"` to ~/.bashrc',
    "zsh": 'add `eval "$(cachedb completion zsh)"` to ~/.zshrc',
    "fish": "run `cachedb completion fish > ~/.config/fish/completions/cachedb.fish`",
}
"""How to install the script of each shell."""


@click.command(
    cls=PrintingCommand,
    epilog=format_examples(
        'eval "$(cachedb completion bash)"',
        'eval "$(cachedb completion zsh)"',
        "cachedb completion fish > ~/.config/fish/completions/cachedb.fish",
    ),
)
@click.argument("shell", required=False, type=click.Choice(list(_INSTALL)))
def completion(shell: str | None) -> None:
    """Print a shell script that completes commands, options, names and digests.

    Without an argument, explain how to install the script for the login shell, $SHELL.
    """
    from cachedb.cli.shell_completion import format_completion_script

    if shell is None:
        shell = os.path.basename(os.environ.get("SHELL", ""))
        raise click.UsageError(f"no shell is given: {_INSTALL.get(shell, 'name bash, zsh or fish')}")
    command = click.get_current_context().find_root().command
    click.echo(format_completion_script(command, shell, COMPLETE_VARIABLE))
