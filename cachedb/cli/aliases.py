"""Define the hidden commands of docker and podman: images, rmi, load, save, version."""

from __future__ import annotations

from typing import Any

import click

from cachedb import __version__
from cachedb.cli.archives import export, import_
from cachedb.cli.images import ls, rm

__all__ = ["HIDDEN_COMMANDS"]


def _make_command(name: str, ours: click.Command, *options: click.Parameter, callback: Any) -> click.Command:  # noqa: ANN401
    return click.Command(
        name, params=[*ours.params, *options], callback=callback, help=ours.help, epilog=ours.epilog, hidden=True
    )


def _list_images(all_: bool, digests: bool, **options: Any) -> None:  # noqa: ANN401 - the options of `ls`
    """Run `ls`, which lists all images with their digests anyway."""
    click.get_current_context().invoke(ls, **options)


def _remove_images(force: bool, **options: Any) -> None:  # noqa: ANN401 - the options of `rm`
    """Run `rm`, which needs no force; as in podman, it makes a missing image no error."""
    options["ignore_missing"] |= force
    click.get_current_context().invoke(rm, **options)


def _load(**options: Any) -> None:  # noqa: ANN401 - the options of `import`
    """Run `import`, which reads stdin if no file is given."""
    if options["source"] is None and options["input_"] is None:
        options["source"] = "-"
    click.get_current_context().invoke(import_, **options)


def _save(**options: Any) -> None:  # noqa: ANN401 - the options of `export`
    """Run `export`, which writes to stdout if no file is given."""
    if options["output"] is None:
        options["output"] = "-"  # else `export` would take the last name for a file
    click.get_current_context().invoke(export, **options)


def _print_version() -> None:
    click.echo(f"cachedb {__version__}")


HIDDEN_COMMANDS = {
    "images": _make_command(
        "images",
        ls,
        click.Option(["-a", "--all", "all_"], is_flag=True, hidden=True),
        click.Option(["--digests"], is_flag=True, hidden=True),
        callback=_list_images,
    ),
    "rmi": _make_command(
        "rmi", rm, click.Option(["-f", "--force"], is_flag=True, hidden=True), callback=_remove_images
    ),
    "load": _make_command("load", import_, callback=_load),
    "save": _make_command("save", export, callback=_save),
    "version": click.Command("version", callback=_print_version, help="Print the version.", hidden=True),
}
"""The hidden commands by name."""
