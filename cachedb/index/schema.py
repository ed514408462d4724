"""The schema: which one a cache has, and bringing it to another with the Alembic migrations.

Alembic is imported only when there is something to migrate or to compare.

A migration says in ``oldest`` which releases can still work with the schema after it: those made for that schema or
a newer one. Those before it refuse the cache as soon as it is migrated, before they write anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Connection, func, select

from cachedb.disk.layout import chosen, has_blobs
from cachedb.errors import (
    CacheError,
    DamagedIndex,
    InvalidRevision,
    NotInCache,
    SchemaMismatch,
    StorageError,
    ignore_os_errors,
)
from cachedb.index import descriptions
from cachedb.index.sqlite import backups
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.prepare import prepare
from cachedb.index.sqlite.revision import is_compatible, is_empty, is_ours, lost, mismatch, read_revision
from cachedb.index.tables import BACKFILLS, IMAGES, REVISION
from cachedb.threads import told_beside

if TYPE_CHECKING:
    from alembic.config import Config
from cachedb.index.sqlite.revision import explain_refusal, find_broken_keys, read_versions, revision_of

__all__ = [
    "BACKFILLS_OF_THIS_RELEASE",
    "UNKNOWN",
    "Progress",
    "Revision",
    "State",
    "alembic_config",
    "check_existing",
    "check_known",
    "current",
    "history",
    "migrate",
    "migrations_directory",
    "pending_backfills",
    "read_revisions",
    "report_stage",
    "resolve_revision",
    "run_migrations",
]


Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is, and how much there is: bytes, migrations or images."""
BACKFILLS_OF_THIS_RELEASE = BACKFILLS.c.revision == descriptions.BACKFILL  # a newer schema may have others


UNKNOWN = "no migration makes it"
"""The detail of a `Drift` that is an object of the database which cachedb does not know."""


class State(NamedTuple):
    """The schema of a cache."""

    revision: str | None  # None: there is no cache yet
    newest: str  # that this release knows, and works with
    usable: bool  # whether this release works with the cache as it is
    pending: int  # images whose configs are still to be read for the columns of a newer schema


class Revision(NamedTuple):
    """A migration."""

    revision: str
    down_revision: str | None
    message: str
    oldest: str  # the oldest schema whose releases can still read and write after it
    current: bool  # whether the cache has this schema


def migrations_directory() -> Path:
    """Return where the migrations lie: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def alembic_config() -> Config:
    """Return an Alembic configuration that needs no ``alembic.ini``."""
    from alembic.config import Config

    config = Config()
    # A % is an interpolation to the ini parser behind it.
    config.set_main_option("script_location", str(migrations_directory()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def current(directory: Path) -> State:
    """Return which schema a cache has; nothing is written, nor made.

    Args:
        directory: of the cache.

    Raises:
        NotACache: if the directory is something else.
        DamagedIndex: if the index is damaged.
    """
    with closing(Database(chosen(directory))) as database:
        revision = database.reserve.run(database.revision)
        if not revision:
            if error := _lost(database):
                raise error
            return State(None, REVISION, usable=False, pending=0)
        with database.look() as connection:
            return State(revision, REVISION, usable=is_compatible(connection), pending=pending_backfills(connection))


def history(directory: Path) -> list[Revision]:
    """Return all migrations that this release knows, the newest first.

    Args:
        directory: of a cache, which need not be there.
    """
    from alembic.script import ScriptDirectory

    with closing(Database(chosen(directory))) as database:
        revision = database.reserve.run(database.revision)
    return [
        Revision(script.revision, _one(script.down_revision), script.doc, _oldest(script), script.revision == revision)
        for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()
    ]


def check_existing(directory: Path) -> Database:
    """Return the database of a cache, and bring back the folders that it may have lost."""
    database = Database(chosen(directory))
    try:
        there = database.path.exists() and database.path.stat().st_size
        # What is no cache is left alone.
        if not there or not database.reserve.run(lambda: prepare(database)):
            raise _lost(database) or NotInCache(f"there is no cache in {str(directory)!r}")
    except BaseException:
        database.close()
        raise
    return database


def _lost(database: Database) -> CacheError | None:
    """Return the error for a cache that has lost its index, or the schema in it; None if there is no cache yet."""
    if database.path.exists() and database.path.stat().st_size:
        with database.look() as connection:
            if not is_empty(connection):
                return mismatch(database.directory, None)
    if is_ours(database.directory) and has_blobs(database.directory):
        return lost(database.directory)
    return None


def read_revisions() -> list[str]:
    """Return the revisions of this release, the oldest first."""
    from alembic.script import ScriptDirectory

    return sorted(script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions())


def check_known(database: Database, found: str | None) -> str:
    """Return the revision that was found in a cache; refuse one that is not newer than ours, and yet none of ours."""
    if not found:
        raise mismatch(database.directory, None)
    if found <= REVISION and found not in read_revisions():
        raise SchemaMismatch(
            f"the index in {str(database.directory)!r} has schema {found!r}, which no release of cachedb makes: "
            "`cachedb db restore` puts a backup in its place"
        )
    return found


def resolve_revision(revision: str, base: str | None = None) -> str:
    """Return the revision that is meant by a beginning of it, ``head``, or ``-N`` before another."""
    known = read_revisions()
    if revision == "head":
        return known[-1]
    if base and revision.startswith("-") and revision[1:].isdecimal():
        place = known.index(base) - int(revision[1:])
        found = known[place : place + 1] if place >= 0 else []
    else:
        found = [revision] if revision in known else [one for one in known if revision and one.startswith(revision)]
    if len(found) != 1:
        raise InvalidRevision(f"{revision!r} is not one of the revisions {', '.join(known)}; see `cachedb db history`")
    return found[0]


def _one(down_revision: object) -> str | None:
    return down_revision if isinstance(down_revision, str) else None


def _oldest(script: Any) -> str:  # noqa: ANN401
    return str(getattr(script.module, "oldest", script.revision))


def migrate(
    database: Database, target: str = REVISION, progress: Progress | None = None, *, down: bool = False
) -> tuple[str | None, Path | None]:
    """Bring a database to a revision, or make it; return which it had, and the backup of it.

    What the migrations leave to be done in batches is left.
    """
    from alembic import command  # now, and not under the lock

    change = command.downgrade if down else command.upgrade
    backup: Path | None = None

    def is_due(found: str) -> bool:
        # Of many processes that come at once, the first has done it for the others.
        return target < found if down else found < target

    def before() -> None:
        nonlocal backup
        with database.raw() as connection:
            found = revision_of(connection)
        if found is None or not is_due(found):
            return
        check_known(database, found)
        told = report_stage("backing up", progress)
        backup = backups.before_change(database, found, target, told)

    with told_beside(progress) as beside, database.write_schema(before) as connection:
        try:
            found = read_revision(connection)
            if is_empty(connection):
                # A new index would make orphans of what is there, and the next collection would delete it.
                if has_blobs(database.directory):
                    raise lost(database.directory)
            elif found != REVISION and check_known(database, found) > REVISION and not is_compatible(connection):
                raise mismatch(database.directory, found)
            if found is not None and not is_due(found):
                return found, None
            if found is not None and len(rows := read_versions(connection)) > 1:
                raise SchemaMismatch(f"the table alembic_version has {len(rows)} rows: delete those that are wrong")
            broken = Counter(find_broken_keys(connection))
            run_migrations(change, connection, target, beside)
            if new := Counter(find_broken_keys(connection)) - broken:
                raise DamagedIndex(f"the schema was not changed: {new.total()} rows would refer to none: {min(new)}")
        except BaseException as error:
            # What was not committed is rolled back: nothing has become of what the backup is of.
            if backup:
                with ignore_os_errors():
                    database.folders.remove(f"backups/{backup.name}")
            if reason := explain_refusal(error):
                raise StorageError(f"the schema was not changed, for {reason}") from error
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


def report_stage(what: str, progress: Progress | None) -> Callable[[int, int], None] | None:
    """Return the progress of a stage of an upgrade, under the name of the stage."""
    return None if progress is None else lambda done, total: progress(what, done, total)


def pending_backfills(connection: Connection) -> int:
    """Return the number of images whose configs a migration has left to be read."""
    exists = "SELECT 1 FROM sqlite_master WHERE name = 'backfills'"
    if connection.exec_driver_sql(exists).first() is None:
        return 0
    done = select(BACKFILLS.c.image_id).where(BACKFILLS_OF_THIS_RELEASE).scalar_subquery()
    return connection.execute(select(func.count()).where(IMAGES.c.id > done)).scalar_one()
