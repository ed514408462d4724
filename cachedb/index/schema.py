"""The schema: which one a cache has, and bringing it to another with the Alembic migrations.

Alembic is imported only when there is something to migrate or to compare.

A migration says in ``oldest`` which releases can still work with the schema after it: those made for that schema or
a newer one. Those before it refuse the cache as soon as it is migrated, before they write anything.
"""

from __future__ import annotations

import re
import sqlite3
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Connection, create_engine, delete, func, select, update
from sqlalchemy.exc import IntegrityError, SAWarning

from cachedb.arguments import check_functions
from cachedb.content import describe
from cachedb.disk import single_flight
from cachedb.disk.layout import chosen
from cachedb.errors import (
    CacheError,
    DamagedIndex,
    InvalidRevision,
    NotInCache,
    SchemaMismatch,
    StorageError,
    callers_own,
    ignore_os_errors,
    os_errors,
)
from cachedb.index.sqlite import backups
from cachedb.index.sqlite.database import (
    Database,
    has_blobs,
    is_compatible,
    is_empty,
    is_ours,
    lost,
    mismatch,
    read_oldest,
    read_revision,
)
from cachedb.index.tables import BACKFILLS, IMAGES, METADATA, REVISION
from cachedb.oci.names import Digest, Name
from cachedb.threads import told_beside

if TYPE_CHECKING:
    from alembic.config import Config

__all__ = [
    "UNKNOWN",
    "Change",
    "Drift",
    "Progress",
    "Revision",
    "State",
    "Unread",
    "alembic_config",
    "back_up",
    "backfill",
    "check",
    "current",
    "downgrade",
    "foreign_objects",
    "foreign_triggers",
    "history",
    "migrate",
    "migrations_directory",
    "prepare",
    "upgrade",
]


Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is, and how much there is: bytes, migrations or images."""

_IN_THE_WAY = re.compile(r"error in (index|trigger|view) (.+?)(?: after [a-z ]+)?: (.+)")
# A transaction has as many images as take a few hundredths of a second of the write lock.
_BATCH = 50  # images
_BATCH_SIZE = 1024 * 1024  # bytes of configs
_OURS = BACKFILLS.c.revision == describe.BACKFILL  # a newer schema may have others


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


class Unread(NamedTuple):
    """A config that could not be read for the columns of a newer schema."""

    name: Name  # of the image
    digest: Digest  # of the config
    detail: str


class Change(NamedTuple):
    """What an upgrade or a downgrade has done."""

    before: str | None
    after: str
    backup: Path | None  # of the index as it was; None if nothing was changed
    unread: list[Unread]


class Drift(NamedTuple):
    """A difference between the database and what this release would have made."""

    kind: str  # table, column, index, trigger, view, ... as Alembic or SQLite calls it
    name: str
    detail: str


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


def prepare(database: Database, *, upgrade: bool = False) -> None:
    """Make the cache directory ready for work: create what is not there, at the newest schema.

    Args:
        database: of the directory.
        upgrade: bring an older schema to the newest.

    Raises:
        NotACache: if the directory is something else.
        DamagedIndex: if it has blobs, and no index or a damaged one.
        SchemaMismatch: if the schema is too new for this release, or older and ``upgrade`` is false.
    """
    revision = database.prepare()
    if revision == REVISION:
        if upgrade and not database.read_only:
            backfill(database)
        return
    if revision is not None and revision > REVISION:
        with database.read():  # it says whether it is too new
            return
    if revision is not None and not upgrade:
        raise mismatch(database.directory, revision)

    def find() -> str | None:
        found = database.revision()
        return found if found == REVISION else None

    # Of many that come at once the first does it, and the others hold up nobody who writes by then.
    with single_flight.once(database.directory, "schema", find, seconds=database.wait_seconds) as found:
        if found is None:
            migrate(database)
    if upgrade:
        backfill(database)


def current(directory: Path) -> State:
    """Return which schema a cache has; nothing is written, nor made.

    Args:
        directory: of the cache.

    Raises:
        NotACache: if the directory is something else.
        DamagedIndex: if the index is damaged.
    """
    with closing(Database(chosen(directory))) as database:
        revision = database.with_reserve(database.revision)
        if not revision:
            if error := _lost(database):
                raise error
            return State(None, REVISION, usable=False, pending=0)
        with database.look() as connection:
            return State(revision, REVISION, usable=is_compatible(connection), pending=_pending(connection))


def history(directory: Path) -> list[Revision]:
    """Return all migrations that this release knows, the newest first.

    Args:
        directory: of a cache, which need not be there.
    """
    from alembic.script import ScriptDirectory

    with closing(Database(chosen(directory))) as database:
        revision = database.with_reserve(database.revision)
    return [
        Revision(script.revision, _one(script.down_revision), script.doc, _oldest(script), script.revision == revision)
        for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()
    ]


def upgrade(directory: Path, revision: str = "head", *, progress: Progress | None = None) -> Change:
    """Bring a cache to a newer schema, also while other processes use it.

    A backup of the index is made first. All migrations are one transaction; then, in batches beside the other
    processes, what they need to know of images that are there is read from their configs. An upgrade that was cut off
    there goes on with the next one.

    Args:
        directory: of the cache; there must be one.
        revision: to come to; ``head`` is the newest.
        progress: is told what is being done.

    Raises:
        NotInCache: if there is no cache.
        InvalidRevision: if there is no such revision.
        SchemaMismatch: if the cache has a newer one.
        StorageError: if the disk is too full, before anything is changed.
    """
    check_functions(progress=progress)
    progress = progress and callers_own(progress)
    with closing(_existing(directory)) as database:
        target = _resolve(revision)
        found = _known(database, database.revision())
        if found > target:
            raise SchemaMismatch(
                f"the cache has schema {found}, which is newer than {target}"
                + ("; use a newer release of cachedb" if found > REVISION else f": use `cachedb db downgrade {target}`")
            )
        before, backup = migrate(database, target, progress)
        return Change(before, target, backup, backfill(database, progress) if target == REVISION else [])


def downgrade(directory: Path, revision: str, *, progress: Progress | None = None) -> Change:
    """Take a cache back to an older schema, for an older release; this one will not work with it then.

    Args:
        directory: of the cache.
        revision: to come to; ``-1`` is the one before the cache's.
        progress: is told what is being done.

    Raises:
        NotInCache: if there is no cache.
        InvalidRevision: if there is no such revision.
        SchemaMismatch: if the cache has an older one, or one that this release does not know.
        StorageError: if the disk is too full, before anything is changed.
    """
    check_functions(progress=progress)
    progress = progress and callers_own(progress)
    with closing(_existing(directory)) as database:
        found = _known(database, database.revision())
        if found > REVISION:
            raise mismatch(database.directory, found)
        target = _resolve(revision, found)
        if found < target:
            raise SchemaMismatch(
                f"the cache has schema {found}, older than {target}: use `cachedb db upgrade {target}`"
            )
        before, backup = migrate(database, target, progress, down=True)
        return Change(before, target, backup, [])


def back_up(directory: Path, file: Path | None = None, *, progress: Progress | None = None) -> Path:
    """Make a copy of the index, also while other processes write to it; what it has is of one moment.

    Args:
        directory: of the cache.
        file: where to; by default a new one in ``backups/``, which is kept until a person deletes it.
        progress: is told how far it is, in bytes.

    Returns:
        Where the copy is.

    Raises:
        NotInCache: if there is no cache.
        CacheError: if the file is there already, or its folder is not, or is one of the cache's and not ``backups/``.
        StorageError: if it cannot be written.
    """
    check_functions(progress=progress)
    progress = progress and callers_own(progress)
    with closing(_existing(directory)) as database:
        if file is not None:
            file = file.absolute()
            _check_place(database.directory, file)
        revision = str(database.revision())
        return backups.back_up(database, revision, path=file, progress=_stage("backing up", progress))


def _check_place(directory: Path, file: Path) -> None:
    with os_errors("make a backup of the index"):
        with suppress(FileNotFoundError):
            file.lstat()
            raise CacheError(f"{str(file)!r} exists: name another file")
        if not file.parent.exists():
            raise CacheError(f"there is no folder for {str(file)!r}: make {str(file.parent)!r} first")
        folder, cache = file.parent.resolve(), directory.resolve()
        if folder.is_relative_to(cache) and folder != (cache / "backups").resolve():
            raise CacheError(f"{str(file)!r} is inside the cache: name a file elsewhere, or in its folder backups/")


def check(directory: Path) -> list[Drift]:
    """Compare the database with the models and with what the migrations make: tables, indexes, triggers and views.

    Args:
        directory: of the cache.

    Raises:
        NotInCache: if there is no cache.
        SchemaMismatch: if it has not the schema of this release.
    """
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with closing(_existing(directory)) as database, database.look() as connection:
        versions = _versions(connection)
        if REVISION not in versions:
            raise mismatch(database.directory, read_revision(connection))
        options = {"compare_type": True, "compare_server_default": True}
        context = MigrationContext.configure(connection, opts=options)
        with warnings.catch_warnings():
            # Of indexes over expressions, which SQLAlchemy does not look at: we do.
            warnings.simplefilter("ignore", SAWarning)
            found = list(_described(compare_metadata(context, METADATA)))
        there, oldest, pending = _objects(connection), read_oldest(connection), _pending(connection)
        journal_mode = database.journal_mode()
    expected, stated = _made(REVISION)
    found += _compared(there, expected)
    for version in sorted(versions - {REVISION}):
        found.append(Drift("row", "alembic_version", f"it says {version!r} too"))
    if journal_mode != "wal":
        found.append(Drift("pragma", "journal_mode", f"it is {journal_mode!r}, and should be 'wal'"))
    if oldest != stated:
        found.append(Drift("pragma", "user_version", f"it is {oldest}, and should be {stated}"))
    if pending:
        found.append(Drift("backfill", REVISION, f"{pending} images are still to be read: run `cachedb db upgrade`"))
    return found


def foreign_objects(connection: Connection) -> list[Drift]:
    """Compare the tables, indexes, triggers and views of an index with what the migrations make at its revision.

    Of a schema newer than ours, only triggers that this release does not know are returned: the rest is not known here.
    """
    revision, there = read_revision(connection) or "", _objects(connection)
    if revision in _revisions():
        return list(_compared(there, _made(revision)[0]))
    return [Drift(kind, name, UNKNOWN) for kind, name in sorted(there) if kind == "trigger"]


def foreign_triggers(database: Database) -> list[str]:
    """Return the names of the triggers that no migration makes; none does up to our schema."""
    with database.read() as connection:
        if read_revision(connection) != REVISION:
            return []
        query = "SELECT name FROM sqlite_master WHERE type = 'trigger' ORDER BY name"
        return [str(name) for name in connection.exec_driver_sql(query).scalars()]


def _made(revision: str) -> tuple[dict[tuple[str, str], str], int]:
    """Return what the migrations make up to a revision, and the oldest release that can work with it."""
    from alembic import command

    engine = create_engine("sqlite://")
    try:
        with engine.begin() as connection:
            _run(command.upgrade, connection, revision)
            return _objects(connection), read_oldest(connection)
    finally:
        engine.dispose()


def _objects(connection: Connection) -> dict[tuple[str, str], str]:
    """Return what SQLite knows by kind and name, each as the SQL that made it, without the layout."""
    # SQLite makes an index for a constraint, and `ANALYZE` makes statistics. Other names that begin with `sqlite_` are
    # forged: with `PRAGMA writable_schema` anything can have one.
    query = """SELECT type, name, sql FROM sqlite_master WHERE NOT (type = 'index' AND sql IS NULL)
        AND NOT (type = 'table' AND name IN ('sqlite_sequence', 'sqlite_stat1', 'sqlite_stat3', 'sqlite_stat4'))"""
    return {(kind, name): " ".join(str(sql).split()) for kind, name, sql in connection.exec_driver_sql(query)}


def _compared(there: dict[tuple[str, str], str], expected: dict[tuple[str, str], str]) -> Iterator[Drift]:
    for kind, name in sorted(expected.keys() | there.keys()):
        if (kind, name) not in there:
            yield Drift(kind, name, "it is missing")
        elif (kind, name) not in expected:
            yield Drift(kind, name, UNKNOWN)
        elif there[kind, name] != expected[kind, name]:
            yield Drift(kind, name, f"it is defined as {there[kind, name]!r}")


def _described(differences: list[Any]) -> Iterator[Drift]:
    for difference in differences:
        if isinstance(difference, list):  # of one column
            yield from _described(difference)
            continue
        action, *about = difference
        kind = action.partition("_")[2]
        if action.startswith("modify"):
            _, table, column, _, old, new = about
            yield Drift("column", f"{table}.{column}", f"{kind}: it is {old!r}, and should be {new!r}")
            continue
        item = about[-1]
        name = getattr(item, "name", item)
        name = f"{about[-2]}.{name}" if kind == "column" else str(name)
        yield Drift(kind, name, "it is missing" if action.startswith("add") else "the models do not have it")


def _existing(directory: Path) -> Database:
    """Return the database of a cache, and bring back the folders that it may have lost."""
    database = Database(chosen(directory))
    try:
        there = database.path.exists() and database.path.stat().st_size
        # What is no cache is left alone.
        if not there or not database.with_reserve(database.prepare):
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


def _revisions() -> list[str]:
    from alembic.script import ScriptDirectory

    return sorted(script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions())


def _known(database: Database, found: str | None) -> str:
    """Return the revision that was found in a cache; refuse one that is not newer than ours, and yet none of ours."""
    if not found:
        raise mismatch(database.directory, None)
    if found <= REVISION and found not in _revisions():
        raise SchemaMismatch(
            f"the index in {str(database.directory)!r} has schema {found!r}, which no release of cachedb makes: "
            "`cachedb db restore` puts a backup in its place"
        )
    return found


def _resolve(revision: str, base: str | None = None) -> str:
    """Return the revision that is meant by a beginning of it, ``head``, or ``-N`` before another."""
    known = _revisions()
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
            found = _revision_of(connection)
        if found is None or not is_due(found):
            return
        _known(database, found)
        told = _stage("backing up", progress)
        backup = backups.before_change(database, found, target, told)

    with told_beside(progress) as beside, database.write_schema(before) as connection:
        try:
            found = read_revision(connection)
            if is_empty(connection):
                # A new index would make orphans of what is there, and the next collection would delete it.
                if has_blobs(database.directory):
                    raise lost(database.directory)
            elif found != REVISION and _known(database, found) > REVISION and not is_compatible(connection):
                raise mismatch(database.directory, found)
            if found is not None and not is_due(found):
                return found, None
            if found is not None and len(rows := _versions(connection)) > 1:
                raise SchemaMismatch(f"the table alembic_version has {len(rows)} rows: delete those that are wrong")
            broken = Counter(_broken(connection))
            _run(change, connection, target, beside)
            if new := Counter(_broken(connection)) - broken:
                raise DamagedIndex(f"the schema was not changed: {new.total()} rows would refer to none: {min(new)}")
        except BaseException as error:
            # What was not committed is rolled back: nothing has become of what the backup is of.
            if backup:
                with ignore_os_errors():
                    backup.unlink()
            if reason := _refused(error):
                raise StorageError(f"the schema was not changed, for {reason}") from error
            raise
    if backup:
        backups.keep_newest(database.directory)
    return found, backup


def _refused(error: BaseException) -> str | None:
    """Return what SQLite says, if it is of something that a person has put into the index."""
    if isinstance(error, IntegrityError):
        return f"SQLite refused a row: {error.orig}"
    if isinstance(error, StorageError) and (found := _IN_THE_WAY.fullmatch(str(error.__cause__))):
        kind, name, reason = found.groups()
        return f"the {kind} {name!r} is over what it takes away ({reason}): drop it first"
    return None


def _broken(connection: Connection) -> Iterator[str]:
    for table, row, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
        yield f"{table} {row} to {parent}"


def _run(
    change: Callable[[Config, str], None], connection: Connection, target: str, progress: Progress | None = None
) -> None:
    config = alembic_config()
    config.attributes.update(connection=connection, progress=progress)
    change(config, target)


def _revision_of(connection: sqlite3.Connection) -> str | None:
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone() is None:
        return None
    row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return row and str(row[0])


def _versions(connection: Connection) -> set[str]:
    return set(map(str, connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars()))


def _stage(what: str, progress: Progress | None) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)


def backfill(database: Database, progress: Progress | None = None) -> list[Unread]:
    """Do what the migrations have left to be done in batches; return the configs that could not be read."""
    try:
        return _read_configs(database, progress)
    except IntegrityError as error:
        raise StorageError(
            f"the schema is {REVISION}, but not all configs are read, for SQLite refused a row: {error.orig}; "
            "`cachedb db upgrade` goes on with them"
        ) from error


def _pending(connection: Connection) -> int:
    """Return the number of images whose configs a migration has left to be read."""
    exists = "SELECT 1 FROM sqlite_master WHERE name = 'backfills'"
    if connection.exec_driver_sql(exists).first() is None:
        return 0
    done = select(BACKFILLS.c.image_id).where(_OURS).scalar_subquery()
    return connection.execute(select(func.count()).where(IMAGES.c.id > done)).scalar_one()


def _read_configs(database: Database, progress: Progress | None) -> list[Unread]:
    """Read the configs of the images that were there before, beside other processes, from where it was left.

    They are read without the write lock. What an image has by the time that the lock is there is looked at under it.
    """
    unread: list[Unread] = []
    with database.read() as connection:
        total = _pending(connection)
    done, finished = 0, False
    while not finished:
        with database.read() as connection:
            begin = describe.backfilled(connection)
            if begin is None:
                break  # maybe another process came to the end of it
            last, digests = _next_batch(connection, begin)
        known = describe.read_ahead(database.directory, digests)
        with database.write() as connection:
            if describe.backfilled(connection) != begin:
                continue  # another process has done these
            query = select(IMAGES.c.id, IMAGES.c.repository, IMAGES.c.reference).where(
                IMAGES.c.id > begin, IMAGES.c.id <= last
            )
            rows = connection.execute(query.order_by(IMAGES.c.id)).all()
            for image_id, repository, reference in rows:
                for digest, detail in describe.describe(connection, database.directory, image_id, known):
                    unread.append(Unread(Name(repository, reference), digest, detail))
            connection.execute(update(BACKFILLS).where(_OURS).values(image_id=last))
            finished = last == begin and not _pending(connection)
            if finished:
                connection.execute(delete(BACKFILLS).where(_OURS))
        done += len(rows)
        if progress:
            progress("reading configs", done, max(done, total))
    return unread


def _next_batch(connection: Connection, begin: int) -> tuple[int, set[Digest]]:
    """Return the last of the images that are next, or ``begin`` if there are none, and what configs they have."""
    query = select(IMAGES.c.id).where(IMAGES.c.id > begin).order_by(IMAGES.c.id).limit(_BATCH)
    last, digests, size = begin, set[Digest](), 0
    for image_id in connection.execute(query).scalars().all():
        found = describe.stored(connection, image_id)
        size += sum(found.values())
        if size > _BATCH_SIZE and last > begin:
            break
        last = image_id
        digests.update(found)
    return last, digests
