"""Define the db commands: current, history, upgrade, downgrade, check, backup, restore."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from cachedb.cli.context import cache_directory
from cachedb.cli.groups import SpellingGroup
from cachedb.cli.options import format_examples, format_option
from cachedb.cli.output import print_json, print_table
from cachedb.cli.progress import show_stages
from cachedb.text import printable

if TYPE_CHECKING:
    from cachedb.operations.restore import Restored
    from cachedb.operations.upgrade import Change

__all__ = []


@click.group(cls=SpellingGroup)
def db() -> None:
    """Inspect, upgrade, back up and restore the index."""


@db.command(
    "current", epilog=format_examples("cachedb db current", "cachedb db current --format json | jq -r .revision")
)
@format_option
def db_current(form: str) -> None:
    """Show the schema of the cache and of this release."""
    from cachedb.index import schema

    found = schema.current(cache_directory())
    if form == "json":
        print_json(found._asdict())
    elif found.revision is None:
        click.echo(f"no cache yet; this release creates one with schema {found.newest}")
    elif found.pending:
        click.echo(f"{found.revision}; {found.pending} image configs await backfill: run `cachedb db upgrade`")
    elif found.revision == found.newest:
        click.echo(f"{found.revision}, the newest")
    elif found.revision < found.newest:
        click.echo(f"{found.revision}; this release needs {found.newest}: run `cachedb db upgrade`")
    else:
        can = "and can use this one" if found.usable else "at most: use a newer release"
        click.echo(f"{found.revision}; this release knows {found.newest} {can}")


@db.command("history", epilog=format_examples("cachedb db history"))
@format_option
def db_history(form: str) -> None:
    """List the schemas this release knows, newest first.

    OLDEST is the oldest schema whose releases can still use a cache with this REVISION.
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
    print_table(("REVISION", "OLDEST", "", "DESCRIPTION"), rows)


def _print_unread(done: Change | Restored, form: str) -> None:
    """Print the whole result as JSON, or a line on stderr for each skipped config."""
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
        click.echo(f"the cache already has schema {change.after}")
    else:
        click.echo(f"schema {change.before} became {change.after}; the old index is {change.backup}")


@db.command("upgrade", epilog=format_examples("cachedb db upgrade", "cachedb db upgrade 0002"))
@click.argument("revision", default="head")
@format_option
def db_upgrade(revision: str, form: str) -> None:
    """Upgrade the cache to a newer schema.

    The default is the newest schema. Other processes may keep using the cache. The index is backed up first. An
    unreadable config is skipped and reported.
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
    """Downgrade the cache to the schema of an older release.

    This release refuses the cache afterwards. The index is backed up first.
    """
    from cachedb.operations import upgrade

    with show_stages() as progress:
        change = upgrade.downgrade(cache_directory(), revision, progress=progress)
    _print_change(change, form)


@db.command("check", epilog=format_examples("cachedb db check", "cachedb db check --format json"))
@format_option
def db_check(form: str) -> None:
    """Compare the database's schema with this release's.

    It compares tables, columns, indexes, triggers and views. The exit code is 1 if there is a difference. `cachedb
    verify` checks the content of the tables.
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
    """Back up the index and print the path of the copy.

    Other processes may keep writing. Without FILE the copy goes to the cache's folder backups/ and is kept there.
    `cachedb verify --repair` uses backups from that folder. Blobs are not copied.
    """
    from pathlib import Path

    from cachedb.operations import upgrade

    if file == "":
        raise click.UsageError("the file name is empty: name a file")
    if file and os.path.lexists(file):
        raise click.UsageError(f"{file!r} already exists: name another file")
    with show_stages() as progress:
        path = upgrade.back_up(cache_directory(), Path(file).absolute() if file else None, progress=progress)
    if form == "json":
        print_json({"path": path, "size": path.stat().st_size})
    else:
        click.echo(bytes(path))  # a path need not be valid text


@db.command("restore", epilog=format_examples("cachedb db restore ~/.cache/cachedb/backups/000003-0003.db"))
@click.argument("file", type=click.Path())
@format_option
def db_restore(file: str, form: str) -> None:
    """Replace the index by a backup, upgraded to the newest schema.

    Other processes may keep using the cache. Images return to their state at the time of the backup; an image whose
    blobs are gone is incomplete. The next `cachedb gc` frees blobs that no image of the backup uses. The old index is
    kept in quarantine/.
    """
    from pathlib import Path

    from cachedb.operations.restore import restore

    found = restore(cache_directory(), Path(file).absolute())
    _print_unread(found, form)
    if form == "json":
        return
    click.echo(f"images: {found.images}, incomplete: {found.incomplete}; blobs that no image uses: {found.unused}")
    if found.old:
        click.echo(f"the old index is {found.old}")
