"""Commands about the schema of the index: db current, history, upgrade, downgrade, check, backup, restore."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from cachedb.cli.output import print_json, print_table
from cachedb.text import printable

if TYPE_CHECKING:
    from cachedb.operations.restore import Restored
    from cachedb.operations.upgrade import Change

from cachedb.cli.context import cache_directory
from cachedb.cli.options import format_examples, format_option
from cachedb.cli.progress import show_stages

__all__ = []


@click.group()
def db() -> None:
    """Look at the index's schema, upgrade it, back it up and restore it."""


@db.command(
    "current", epilog=format_examples("cachedb db current", "cachedb db current --format json | jq -r .revision")
)
@format_option
def db_current(form: str) -> None:
    """Say which schema the cache has, and which one this release works with."""
    from cachedb.index import schema

    found = schema.current(cache_directory())
    if form == "json":
        print_json(found._asdict())
    elif found.revision is None:
        click.echo(f"no cache yet; this release makes one with schema {found.newest}")
    elif found.pending:
        click.echo(f"{found.revision}; the configs of {found.pending} images are to be read: run `cachedb db upgrade`")
    elif found.revision == found.newest:
        click.echo(f"{found.revision}, the newest")
    elif found.revision < found.newest:
        click.echo(f"{found.revision}; this release works with {found.newest}: run `cachedb db upgrade`")
    else:
        can = "and can work with this one" if found.usable else "at most: use a newer release"
        click.echo(f"{found.revision}; this release knows {found.newest} {can}")


@db.command("history", epilog=format_examples("cachedb db history"))
@format_option
def db_history(form: str) -> None:
    """List the schemas that this release knows, the newest first.

    OLDEST is the oldest schema whose releases can still read and write a cache after the upgrade.
    """
    from cachedb.index import schema

    found = schema.history(cache_directory())
    if form == "json":
        print_json([revision._asdict() for revision in found])
        return
    rows = [
        (revision.revision, revision.oldest, "current" if revision.current else "", revision.message.splitlines()[0])
        for revision in found
    ]
    print_table(("REVISION", "OLDEST", "", "WHAT IT BRINGS"), rows)


def _print_unread(done: Change | Restored, form: str) -> None:
    """Print all of it as JSON, or the configs that were skipped as lines."""
    if form == "json":
        unread = [{**config._asdict(), "name": str(config.name)} for config in done.unread]
        print_json({**done._asdict(), "unread": unread})
        return
    for name, digest, detail in done.unread:
        click.echo(f"skipped the config {digest} of {name}: {printable(detail)}", err=True)


def _print_change(change: Change, form: str) -> None:
    _print_unread(change, form)
    if form == "json":
        return
    if change.backup is None:
        click.echo(f"the cache has schema {change.after} already")
    else:
        click.echo(f"from schema {change.before} to {change.after}; the index as it was is {change.backup}")


@db.command("upgrade", epilog=format_examples("cachedb db upgrade", "cachedb db upgrade 0002"))
@click.argument("revision", default="head")
@format_option
def db_upgrade(revision: str, form: str) -> None:
    """Bring the cache to a newer schema, the newest by default, also while other processes use it.

    The index is backed up first. A config that cannot be read is skipped and reported.
    """
    from cachedb.operations import upgrade

    with show_stages() as progress:
        change = upgrade.upgrade(cache_directory(), revision, progress=progress)
    _print_change(change, form)


@db.command(
    "downgrade",
    context_settings={"ignore_unknown_options": True},
    epilog=format_examples("cachedb db downgrade 0002", "cachedb db downgrade -1"),
)
@click.argument("revision")
@format_option
def db_downgrade(revision: str, form: str) -> None:
    """Take the cache back to an older schema, for an older release; this one refuses it then.

    The index is backed up first.
    """
    from cachedb.operations import upgrade

    with show_stages() as progress:
        change = upgrade.downgrade(cache_directory(), revision, progress=progress)
    _print_change(change, form)


@db.command("check", epilog=format_examples("cachedb db check", "cachedb db check --format json"))
@format_option
def db_check(form: str) -> None:
    """Compare the database with what this release would make: tables, columns, indexes, triggers, views.

    The exit code is 1 if there is a difference. `cachedb verify` looks at what is in the tables.
    """
    from cachedb.index.drift import check

    found = check(cache_directory())
    if form == "json":
        print_json([drift._asdict() for drift in found])
    elif found:
        print_table(("KIND", "NAME", "DETAIL"), found)
    else:
        click.echo("no differences")
    if found:
        click.get_current_context().exit(1)


@db.command("backup", epilog=format_examples("cachedb db backup", "cachedb db backup /mnt/usb/index.db"))
@click.argument("file", required=False, type=click.Path())
@format_option
def db_backup(file: str | None, form: str) -> None:
    """Copy the index, also while other processes write to it, and print where the copy is.

    Without FILE it goes to the folder backups/ of the cache, where `cachedb verify --repair` looks for one, and stays.
    Blobs are not copied.
    """
    from pathlib import Path

    from cachedb.operations import upgrade

    if file == "":
        raise click.UsageError("the name of the file is empty")
    if file and os.path.lexists(file):
        raise click.UsageError(f"{file!r} exists: name another file")
    with show_stages() as progress:
        path = upgrade.back_up(cache_directory(), Path(file).absolute() if file else None, progress=progress)
    if form == "json":
        print_json({"path": path, "size": path.stat().st_size})
    else:
        click.echo(bytes(path))  # which need not be text


@db.command("restore", epilog=format_examples("cachedb db restore ~/.cache/cachedb/backups/000003-0003.db"))
@click.argument("file", type=click.Path())
@format_option
def db_restore(file: str, form: str) -> None:
    """Put a backup in the place of the index, at the newest schema, also while other processes use the cache.

    Images are as they were then, as far as their blobs are still there. What came since and no image of the backup
    uses is freed by the next `cachedb gc`. The index that was there is kept in quarantine/.
    """
    from pathlib import Path

    from cachedb.operations.restore import restore

    found = restore(cache_directory(), Path(file).absolute())
    _print_unread(found, form)
    if form == "json":
        return
    click.echo(f"images: {found.images}, incomplete: {found.incomplete}; blobs that no image uses: {found.unused}")
    if found.old:
        click.echo(f"the index as it was is {found.old}")
