"""Preview a change of the schema and its SQL; nothing is changed."""

from __future__ import annotations

import io
import shutil
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import func, select

from cachedb.errors import CacheError, os_errors
from cachedb.index import descriptions
from cachedb.index.schema import WantedChange, alembic_config, find_change, history, open_unchanged, pending_backfills
from cachedb.index.sqlite import backups
from cachedb.index.sqlite.database import Database
from cachedb.index.tables import IMAGES, REVISION

__all__ = ["Plan", "Step", "plan_change", "render_sql"]


class Step(NamedTuple):
    """A migration that a change would run."""

    revision: str
    message: str


class Plan(NamedTuple):
    """What a change of the schema would do."""

    before: str
    after: str
    steps: list[Step]  # in order; a downgrade undoes them
    backup: Path | None  # where the old index would go; None if there is no step
    needed_size: int  # bytes of disk for the backup and the change; 0 if there is no step
    free_size: int  # bytes of disk
    images: int  # images whose configs would be read afterwards


def plan_change(directory: Path, revision: str = "head", *, is_downgrade: bool = False) -> Plan:
    """Return what an upgrade or a downgrade would do, without changing anything.

    Args:
        directory: the cache directory.
        revision: the new schema, as for `upgrade` and `downgrade`.
        is_downgrade: plan a downgrade.

    Raises:
        NotInCache: if there is no cache.
        InvalidRevision: if there is no such revision.
        SchemaMismatch: if the change goes in the other direction.
    """
    with closing(open_unchanged(directory)) as database:
        change = find_change(database, revision, is_downgrade=is_downgrade)
        steps, backup, needed = _list_steps(directory, change), None, 0
        if steps:
            backup = backups.path_before_change(database.directory, change.before, change.after)
            needed = backups.measure_change(database)
        with os_errors("read the free space of the disk"):
            free = shutil.disk_usage(database.directory).free
        return Plan(change.before, change.after, steps, backup, needed, free, _count_backfills(database, change))


def _list_steps(directory: Path, change: WantedChange) -> list[Step]:
    low, high = sorted((change.before, change.after))
    found = [Step(entry.revision, entry.message) for entry in history(directory) if low < entry.revision <= high]
    return found if change.is_downgrade else found[::-1]


def _count_backfills(database: Database, change: WantedChange) -> int:
    """Return the number of images whose configs a backfill after the change would read."""
    if change.after != REVISION or change.is_downgrade:
        return 0
    with database.look() as connection:
        if change.before < descriptions.BACKFILL:
            return int(connection.execute(select(func.count()).select_from(IMAGES)).scalar_one())
        return pending_backfills(connection)


def render_sql(directory: Path, revision: str = "head", *, is_downgrade: bool = False) -> str:
    """Return the SQL of an upgrade or a downgrade; empty if there is no step.

    Args:
        directory: the cache directory.
        revision: the new schema, as for `upgrade` and `downgrade`.
        is_downgrade: render a downgrade.

    Raises:
        NotInCache: if there is no cache.
        InvalidRevision: if there is no such revision.
        SchemaMismatch: if the change goes in the other direction.
        CacheError: if a migration reads rows, which SQL alone cannot do.
    """
    from alembic import command  # slow
    from alembic.util import CommandError

    with closing(open_unchanged(directory)) as database:
        change = find_change(database, revision, is_downgrade=is_downgrade)
    if change.before == change.after:
        return ""
    config = alembic_config()
    config.output_buffer = io.StringIO()
    render = command.downgrade if is_downgrade else command.upgrade
    try:
        render(config, f"{change.before}:{change.after}", sql=True)
    except (AttributeError, CommandError, NotImplementedError, TypeError) as error:  # it has no connection to read from
        raise CacheError(
            f"the change from {change.before} to {change.after} reads rows, so SQL alone cannot do it: use --dry-run"
        ) from error
    statements = config.output_buffer.getvalue().strip()
    return f"PRAGMA foreign_keys = OFF;\n\nBEGIN IMMEDIATE;\n\n{statements}\n\nCOMMIT;\n"
