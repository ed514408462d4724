"""Inspect and migrate the schema of the index with Alembic.

Alembic is imported only to migrate or compare, because its import is slow.

A migration's ``oldest`` is the oldest schema whose releases can still use the cache after it. Older releases refuse a
migrated cache before they write anything.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Connection, func, select

from cachedb.disk.existence import exists
from cachedb.disk.layout import choose_directory, has_blobs
from cachedb.errors import (
    CacheError,
    DamagedIndex,
    InvalidRevision,
    SchemaMismatch,
    StorageError,
    ignore_os_errors,
)
from cachedb.index import descriptions
from cachedb.index.sqlite import backups
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.prepare import prepare
from cachedb.index.sqlite.revision import (
    explain_refusal,
    find_broken_keys,
    is_compatible,
    is_empty,
    is_ours,
    lost_index_error,
    no_cache_error,
    read_revision,
    read_versions,
    revision_of,
    schema_error,
)
from cachedb.index.tables import BACKFILLS, IMAGES, REVISION
from cachedb.threads import report_in_thread

if TYPE_CHECKING:
    from alembic.config import Config

__all__ = [
    "BACKFILLS_OF_THIS_RELEASE",
    "UNKNOWN",
    "Progress",
    "Revision",
    "State",
    "WantedChange",
    "alembic_config",
    "check_existing",
    "check_known",
    "current",
    "find_change",
    "history",
    "migrate",
    "migrations_directory",
    "open_unchanged",
    "pending_backfills",
    "read_revisions",
    "report_stage",
    "resolve_revision",
    "run_migrations",
]


Progress = Callable[[str, int, int], None]
"""Called with the stage, the amount done, and the total: bytes, migrations or images."""
BACKFILLS_OF_THIS_RELEASE = BACKFILLS.c.revision == descriptions.BACKFILL  # a newer schema may have others


_RELATIVE = re.compile(r"(.*?)([+-][0-9]{1,4})")
"""Matches steps from a revision: ``+1``, ``-1``, ``head-1``."""
UNKNOWN = "no migration creates it"
"""The detail of a `Drift` for a database object that cachedb does not know."""


class State(NamedTuple):
    """The schema of a cache."""

    revision: str | None  # None: there is no cache yet
    newest: str  # the schema of this release
    usable: bool  # whether this release can use the cache without a migration
    pending: int  # images that await backfill


class Revision(NamedTuple):
    """A migration."""

    revision: str
    down_revision: str | None
    message: str
    oldest: str  # the oldest schema whose releases can still use the cache after it
    current: bool  # whether the cache has this schema
    date: str | None  # of the migration, as in 2026-11-24 07:20:00
    description: str  # all of it; its first paragraph is the message


class WantedChange(NamedTuple):
    """A change of a cache's schema that was asked for."""

    before: str
    after: str
    is_downgrade: bool


def migrations_directory() -> Path:
    """Return the folder of the migrations: in the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def alembic_config() -> Config:
    """Return an Alembic configuration that needs no ``alembic.ini``."""
    from alembic.config import Config

    config = Config()
    # The ini parser interpolates a single %.
    config.set_main_option("script_location", str(migrations_directory()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def current(directory: Path) -> State:
    """Return the schema of a cache, without writing anything.

    Args:
        directory: the cache directory.

    Raises:
        NotACache: if the directory is not a cache.
        DamagedIndex: if the index is damaged.
    """
    with closing(Database(choose_directory(directory))) as database:
        revision = database.reserve.run(database.revision)
        if not revision:
            if error := _find_loss_error(database):
                raise error
            return State(None, REVISION, usable=False, pending=0)
        with database.look() as connection:
            return State(revision, REVISION, usable=is_compatible(connection), pending=pending_backfills(connection))


def history(directory: Path) -> list[Revision]:
    """Return all migrations that this release knows, newest first.

    Args:
        directory: the cache directory, which need not exist.
    """
    from alembic.script import ScriptDirectory

    with closing(Database(choose_directory(directory))) as database:
        revision = database.reserve.run(database.revision)
    found = []
    for script in ScriptDirectory.from_config(alembic_config()).walk_revisions():
        description, facts = _split_docstring(script.longdoc)
        parent, oldest = _single_revision(script.down_revision), _oldest_revision(script)
        is_current = script.revision == revision
        found.append(
            Revision(script.revision, parent, script.doc, oldest, is_current, facts.get("Created"), description)
        )
    return found


def _split_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Split a migration's docstring into its description and the facts in the last paragraph."""
    description, _, last = text.strip().rpartition("\n\n")
    facts = dict(line.split(": ", 1) for line in last.splitlines() if ": " in line)
    if "Revision" not in facts:
        return text.strip(), {}
    return description, {key: value.partition(".")[0] for key, value in facts.items()}


def open_unchanged(directory: Path) -> Database:
    """Return the database of an existing cache for reading; nothing is created or recreated.

    Raises:
        NotInCache: if there is no cache.
    """
    database = Database(choose_directory(directory))
    try:
        if not database.reserve.run(database.revision):
            raise _find_loss_error(database) or no_cache_error(database.directory)
    except BaseException:
        database.close()
        raise
    return database


def check_existing(directory: Path) -> Database:
    """Return the database of an existing cache, and recreate its missing folders.

    Raises:
        NotInCache: if there is no cache.
    """
    database = Database(choose_directory(directory))
    try:
        has_index = exists(database.path) and database.path.stat().st_size
        # Change nothing in a directory that is not a cache.
        if not has_index or not database.reserve.run(lambda: prepare(database)):
            raise _find_loss_error(database) or no_cache_error(database.directory)
    except BaseException:
        database.close()
        raise
    return database


def _find_loss_error(database: Database) -> CacheError | None:
    """Return the error for a cache whose index or schema is lost; None if there is no cache yet."""
    if exists(database.path) and database.path.stat().st_size:
        with database.look() as connection:
            if not is_empty(connection):
                return schema_error(database.directory, None)
    if is_ours(database.directory) and has_blobs(database.directory):
        return lost_index_error(database.directory)
    return None


def read_revisions() -> list[str]:
    """Return the revisions of this release, oldest first."""
    from alembic.script import ScriptDirectory

    return sorted(script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions())


def check_known(database: Database, found: str | None) -> str:
    """Return the revision of a cache; raise if it is missing, or if no release creates it."""
    if not found:
        raise schema_error(database.directory, None)
    if found <= REVISION and found not in read_revisions():
        raise SchemaMismatch(
            f"the index in {str(database.directory)!r} has schema {found!r}, which no release of cachedb creates: "
            "replace it by a backup with `cachedb db restore`"
        )
    return found


def find_change(database: Database, revision: str, *, is_downgrade: bool) -> WantedChange:
    """Return the change to a revision as Alembic's users write it: ``head``, ``+1``, ``-1``, or a prefix.

    Raises:
        InvalidRevision: if there is no such revision.
        SchemaMismatch: if the change goes in the other direction, or this release does not know the cache's schema.
    """
    found = check_known(database, database.revision())
    if is_downgrade and found > REVISION:
        raise schema_error(database.directory, found)
    target = resolve_revision(revision, found)
    if is_downgrade and found < target:
        raise SchemaMismatch(f"the cache has schema {found}, older than {target}: use `cachedb db upgrade {target}`")
    if not is_downgrade and found > target:
        raise SchemaMismatch(
            f"the cache has schema {found}, which is newer than {target}"
            + (": use a newer release of cachedb" if found > REVISION else f": use `cachedb db downgrade {target}`")
        )
    return WantedChange(found, target, is_downgrade)


def resolve_revision(revision: str, found: str) -> str:
    """Return the revision for a prefix, for ``head``, or for steps such as ``+1``, ``-1`` and ``head-1``.

    Args:
        revision: the text.
        found: the revision from which steps count, if the text names none.

    Raises:
        InvalidRevision: if there is no such revision. ``base`` is refused: the names of all images would be lost.
    """
    known = read_revisions()
    if revision == "base":
        raise InvalidRevision(
            "'base' would delete the index, and with it the names of all images: "
            f"use {known[0]}, the oldest schema, or delete the cache directory"
        )
    parsed = _RELATIVE.fullmatch(revision)
    start, steps = (parsed[1], int(parsed[2])) if parsed else (revision, 0)
    if start == "head" or (parsed and not start):
        starts = [place for place, one in enumerate(known) if one == (known[-1] if start else found)]
    else:
        starts = [place for place, one in enumerate(known) if start and one.startswith(start)]
    if len(starts) != 1 or not 0 <= starts[0] + steps < len(known):
        raise InvalidRevision(f"{revision!r} is not one of the revisions {', '.join(known)}: see `cachedb db history`")
    return known[starts[0] + steps]


def _single_revision(down_revision: object) -> str | None:
    return down_revision if isinstance(down_revision, str) else None


def _oldest_revision(script: Any) -> str:  # noqa: ANN401
    return str(getattr(script.module, "oldest", script.revision))


def migrate(
    database: Database, target: str = REVISION, progress: Progress | None = None, *, down: bool = False
) -> tuple[str | None, Path | None]:
    """Migrate or create a database; return its previous revision, and the backup if one was made.

    This does not run backfills.
    """
    from alembic import command  # slow, so imported before the lock is taken

    change = command.downgrade if down else command.upgrade
    backup: Path | None = None

    def is_due(found: str) -> bool:
        # Another process may have migrated meanwhile.
        return target < found if down else found < target

    def back_up() -> None:
        nonlocal backup
        with database.raw() as connection:
            found = revision_of(connection)
        if found is None or not is_due(found):
            return
        check_known(database, found)
        report = report_stage("backing up", progress)
        backup = backups.back_up_before_change(database, found, target, report)

    with report_in_thread(progress) as report_beside, database.write_schema(back_up) as connection:
        try:
            found = read_revision(connection)
            if is_empty(connection):
                # With a new index the stored blobs would be orphans, and the next collection would delete them.
                if has_blobs(database.directory):
                    raise lost_index_error(database.directory)
            elif found != REVISION and check_known(database, found) > REVISION and not is_compatible(connection):
                raise schema_error(database.directory, found)
            if found is not None and not is_due(found):
                return found, None
            if found is not None and len(rows := read_versions(connection)) > 1:
                raise SchemaMismatch(
                    f"the table alembic_version has the rows {', '.join(map(repr, rows))}: delete all but the one of "
                    "the index's schema"
                )
            broken = Counter(find_broken_keys(connection))
            run_migrations(change, connection, target, report_beside)
            if new := Counter(find_broken_keys(connection)) - broken:
                raise DamagedIndex(
                    f"the schema was not changed: {new.total()} rows would have broken references: {min(new)}"
                )
        except BaseException as error:
            # The change is rolled back, so its backup is not needed.
            if backup:
                with ignore_os_errors():
                    database.folders.remove(f"backups/{backup.name}")
            if reason := explain_refusal(error):
                raise StorageError(f"the schema was not changed: {reason}") from error
            raise
    if backup:
        backups.keep_newest(database.directory)
    return found, backup


def run_migrations(
    change: Callable[[Config, str], None], connection: Connection, target: str, progress: Progress | None = None
) -> None:
    """Run migrations on an open connection."""
    config = alembic_config()
    config.attributes.update(connection=connection, progress=progress)
    change(config, target)


def report_stage(stage: str, progress: Progress | None) -> Callable[[int, int], None] | None:
    """Return a callback that reports the progress of a stage under its name; None without ``progress``."""
    return None if progress is None else lambda done, total: progress(stage, done, total)


def pending_backfills(connection: Connection) -> int:
    """Return the number of images that await backfill."""
    exists = "SELECT 1 FROM sqlite_master WHERE name = 'backfills'"
    if connection.exec_driver_sql(exists).first() is None:
        return 0
    done = select(BACKFILLS.c.image_id).where(BACKFILLS_OF_THIS_RELEASE).scalar_subquery()
    return connection.execute(select(func.count()).where(IMAGES.c.id > done)).scalar_one()
