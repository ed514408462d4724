"""Define the command that prints a completion script: completion."""

from __future__ import annotations

import click

from cachedb.cli.options import COMPLETE_VARIABLE, format_examples

__all__ = []


@click.command(
    epilog=format_examples(
        'eval "$(cachedb completion bash)"',
        'eval "$(cachedb completion zsh)"',
        "cachedb completion fish > ~/.config/fish/completions/cachedb.fish",
    )
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a shell script that completes commands, options, names and digests."""
    from cachedb.cli.shell_completion import format_completion_script

    command = click.get_current_context().find_root().command
    click.echo(format_completion_script(command, shell, COMPLETE_VARIABLE))
