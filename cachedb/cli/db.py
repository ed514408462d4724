"""Define the db commands: current, history, upgrade, downgrade, check, backup, restore."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from cachedb.cli.context import cache_directory
from cachedb.cli.options import format_examples, format_option
from cachedb.cli.output import print_json, print_table
from cachedb.cli.progress import show_stages
from cachedb.cli.spelling import SpellingGroup
from cachedb.cli.streams import PrintingCommand
from cachedb.text import format_size, printable

if TYPE_CHECKING:
    from cachedb.index.schema import Revision, State
    from cachedb.operations.preview import Plan
    from cachedb.operations.restore import Restored
    from cachedb.operations.upgrade import Change

__all__ = []

_UPGRADE_NEEDED = 4
"""The exit code of `db current --check` if an upgrade or a backfill is needed."""


@click.group(cls=SpellingGroup)
def db() -> None:
    """Inspect, upgrade, back up and restore the index."""


@db.command(
    "current",
    epilog=format_examples(
        "cachedb db current",
        "cachedb db current --check || cachedb db upgrade",
        "cachedb db current --format json | jq -r .revision",
    ),
)
@click.option("--check", is_flag=True, help="Exit with 4 if an upgrade or its backfill is needed.")
@format_option
def db_current(check: bool, form: str) -> None:
    """Show the schema of the cache and of this release.

    With --check, the exit code is 0 if this release can use the cache as it is. It is 4 if `cachedb db upgrade` is
    needed. It is 1 if only a newer release can use the cache, and 3 if there is none.
    """
    from cachedb.index import schema
    from cachedb.index.sqlite.revision import no_cache_error

    found = schema.current(cache_directory())
    if check and found.revision is None:
        raise no_cache_error(cache_directory())
    if form == "json":
        print_json(found._asdict())
    elif found.revision is None:
        click.echo(f"no cache yet; this release creates one with schema {found.newest}")
    elif found.pending:
        click.echo(f"{found.revision}; images to backfill: {found.pending}: run `cachedb db upgrade`")
    elif found.revision == found.newest:
        click.echo(f"{found.revision}, the newest")
    elif found.revision < found.newest:
        click.echo(f"{found.revision}; this release needs {found.newest}: run `cachedb db upgrade`")
    else:
        can = f", and can use {found.revision}" if found.usable else ": use a newer release"
        click.echo(f"{found.revision}; this release knows {found.newest} at most{can}")
    if check and (code := _code_of(found)):
        click.get_current_context().exit(code)


def _code_of(found: State) -> int:
    if found.revision and found.revision > found.newest:
        return 0 if found.usable else 1
    return _UPGRADE_NEEDED if found.pending or not found.usable else 0


@db.command("history", cls=PrintingCommand, epilog=format_examples("cachedb db history", "cachedb db history -v"))
@click.option("-v", "--verbose", is_flag=True, help="Show the date and the whole description of each schema too.")
@format_option
def db_history(verbose: bool, form: str) -> None:
    """List the schemas this release knows, newest first.

    OLDEST is the oldest schema whose releases can still use a cache with this REVISION.
    """
    from cachedb.index import schema

    found = schema.history(cache_directory())
    if form == "json":
        print_json([revision._asdict() for revision in found])
        return
    if verbose:
        click.echo("\n\n".join(map(_describe, found)))
        return
    rows = [
        (revision.revision, revision.oldest, "current" if revision.current else "", revision.message.splitlines()[0])
        for revision in found
    ]
    print_table(("REVISION", "OLDEST", "", "DESCRIPTION"), rows)


def _describe(revision: Revision) -> str:
    facts = [f"after {revision.down_revision}" if revision.down_revision else "the first", f"oldest {revision.oldest}"]
    facts = [revision.date or "no date", *facts, *(["current"] if revision.current else [])]
    return f"{revision.revision}: {', '.join(facts)}\n\n{textwrap.indent(revision.description, '    ')}"


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


def _preview_options(command: Callable[..., None]) -> Callable[..., None]:
    sql = click.option("--sql", is_flag=True, help="Print the SQL, and change nothing.")
    dry_run = click.option(
        "--dry-run",
        is_flag=True,
        help="Change nothing; print the steps, the backup, the disk space needed, and how many images to backfill.",
    )
    return sql(dry_run(command))


def _preview(revision: str, form: str, *, is_downgrade: bool, sql: bool, dry_run: bool) -> None:
    """Print what a change would do, or its SQL."""
    from cachedb.operations.preview import plan_change, render_sql

    if sql:
        if dry_run or form == "json":
            raise click.UsageError("--sql excludes --dry-run and --format json: leave them out")
        click.echo(render_sql(cache_directory(), revision, is_downgrade=is_downgrade), nl=False)
        return
    plan = plan_change(cache_directory(), revision, is_downgrade=is_downgrade)
    if form == "json":
        print_json({**plan._asdict(), "steps": [step._asdict() for step in plan.steps]})
    else:
        _print_plan(plan)
    if plan.free_size < plan.needed_size:
        click.get_current_context().exit(1)


def _print_plan(plan: Plan) -> None:
    if not plan.steps:
        click.echo(f"the cache already has schema {plan.after}")
    else:
        click.echo(f"schema {plan.before} would become {plan.after}; the backup would be {plan.backup}\n")
        print_table(("REVISION", "DESCRIPTION"), [(step.revision, step.message.splitlines()[0]) for step in plan.steps])
        space = f"needed {format_size(plan.needed_size)}, free {format_size(plan.free_size)}"
        click.echo(f"\ndisk: {space}" + (": too little" if plan.free_size < plan.needed_size else ""))
    if plan.steps or plan.images:
        click.echo(f"images to backfill: {plan.images}")


@db.command(
    "upgrade",
    epilog=format_examples(
        "cachedb db upgrade", "cachedb db upgrade --dry-run", "cachedb db upgrade +1", "cachedb db upgrade 0004 --sql"
    ),
)
@click.argument("revision", default="head")
@_preview_options
@format_option
def db_upgrade(revision: str, dry_run: bool, sql: bool, form: str) -> None:
    """Upgrade the cache to a newer schema.

    The default is head, the newest schema; +1 is the next one. Other processes may keep using the cache. The index is
    backed up first. An unreadable config is skipped and reported.

    The SQL of --sql does not lock the cache, and makes no backup and no backfill. Prefer `cachedb db upgrade`.
    """
    from cachedb.operations import upgrade

    if sql or dry_run:
        _preview(revision, form, is_downgrade=False, sql=sql, dry_run=dry_run)
        return
    with show_stages() as progress:
        change = upgrade.upgrade(cache_directory(), revision, progress=progress)
    _print_change(change, form)


@db.command(
    "downgrade",
    context_settings={"ignore_unknown_options": True},
    epilog=format_examples(
        "cachedb db downgrade 0002", "cachedb db downgrade -1", "cachedb db downgrade 0004 --dry-run"
    ),
)
@click.argument("revision")
@_preview_options
@format_option
def db_downgrade(revision: str, dry_run: bool, sql: bool, form: str) -> None:
    """Downgrade the cache to the schema of an older release.

    -1 is the schema before the current one. This release refuses the cache afterwards. The index is backed up first.
    base is refused: it would delete the index, and with it the names of all images.
    """
    from cachedb.operations import upgrade

    if sql or dry_run:
        _preview(revision, form, is_downgrade=True, sql=sql, dry_run=dry_run)
        return
    with show_stages() as progress:
        change = upgrade.downgrade(cache_directory(), revision, progress=progress)
    _print_change(change, form)


@db.command("check", epilog=format_examples("cachedb db check", "cachedb db check --format json"))
@format_option
def db_check(form: str) -> None:
    """Compare the schema of the index with that of this release.

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
