"""Compare an index with its migrations, for `cachedb db check`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, create_engine
from sqlalchemy.exc import SAWarning

from cachedb.index.schema import UNKNOWN, check_existing, pending_backfills, read_revisions, run_migrations
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.inspect import read_journal_mode
from cachedb.index.sqlite.revision import read_objects, read_oldest, read_revision, read_versions, schema_error
from cachedb.index.tables import METADATA, REVISION

__all__ = ["Drift", "check", "find_foreign_objects", "find_foreign_triggers"]


class Drift(NamedTuple):
    """A difference between the database and the schema of this release."""

    kind: str  # table, column, index, trigger, view, ... as in Alembic or SQLite
    name: str
    detail: str


def check(directory: Path) -> list[Drift]:
    """Compare the tables, indexes, triggers and views of a database with the models and the migrations.

    Args:
        directory: the cache directory.

    Raises:
        NotInCache: if there is no cache.
        SchemaMismatch: if its schema is not that of this release.
    """
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with closing(check_existing(directory)) as database, database.look() as connection:
        versions = read_versions(connection)
        if REVISION not in versions:
            raise schema_error(database.directory, read_revision(connection))
        options = {"compare_type": True, "compare_server_default": True}
        context = MigrationContext.configure(connection, opts=options)
        with warnings.catch_warnings():
            # SQLAlchemy warns that it skips indexes on expressions; `_compare_objects` compares them.
            warnings.simplefilter("ignore", SAWarning)
            found = list(_describe_differences(compare_metadata(context, METADATA)))
        objects, oldest, pending = read_objects(connection), read_oldest(connection), pending_backfills(connection)
        journal_mode = read_journal_mode(database)
    expected_objects, expected_oldest = _read_migrated_objects(REVISION)
    found += _compare_objects(objects, expected_objects)
    for version in sorted(versions - {REVISION}):
        found.append(Drift("row", "alembic_version", f"it has the revision {version!r} too"))
    if journal_mode != "wal":
        found.append(Drift("pragma", "journal_mode", f"it is {journal_mode!r}, and should be 'wal'"))
    if oldest != expected_oldest:
        found.append(Drift("pragma", "user_version", f"it is {oldest}, and should be {expected_oldest}"))
    if pending:
        found.append(Drift("backfill", REVISION, f"{pending} images await backfill: run `cachedb db upgrade`"))
    return found


def find_foreign_objects(connection: Connection) -> list[Drift]:
    """Compare the tables, indexes, triggers and views of an index with the migrations up to its revision.

    For a newer schema, return only its triggers, because this release does not know its other objects.
    """
    revision, there = read_revision(connection) or "", read_objects(connection)
    if revision in read_revisions():
        return list(_compare_objects(there, _read_migrated_objects(revision)[0]))
    return [Drift(kind, name, UNKNOWN) for kind, name in sorted(there) if kind == "trigger"]


def find_foreign_triggers(database: Database) -> list[str]:
    """Return the names of all triggers in an index; the schema of this release has no triggers."""
    with database.read() as connection:
        if read_revision(connection) != REVISION:
            return []
        query = "SELECT name FROM sqlite_master WHERE type = 'trigger' ORDER BY name"
        return [str(name) for name in connection.exec_driver_sql(query).scalars()]


def _read_migrated_objects(revision: str) -> tuple[dict[tuple[str, str], str], int]:
    """Return the objects that the migrations up to a revision create, and the oldest compatible schema."""
    from alembic import command

    engine = create_engine("sqlite://")
    try:
        with engine.begin() as connection:
            run_migrations(command.upgrade, connection, revision)
            return read_objects(connection), read_oldest(connection)
    finally:
        engine.dispose()


def _compare_objects(there: dict[tuple[str, str], str], expected: dict[tuple[str, str], str]) -> Iterator[Drift]:
    for kind, name in sorted(expected.keys() | there.keys()):
        if (kind, name) not in there:
            yield Drift(kind, name, "it is missing")
        elif (kind, name) not in expected:
            yield Drift(kind, name, UNKNOWN)
        elif there[kind, name] != expected[kind, name]:
            yield Drift(kind, name, f"it is defined as {there[kind, name]!r}")


def _describe_differences(differences: list[Any]) -> Iterator[Drift]:
    for difference in differences:
        if isinstance(difference, list):  # several differences of one column
            yield from _describe_differences(difference)
            continue
        action, *details = difference
        kind = action.partition("_")[2]
        if action.startswith("modify"):
            _, table, column, _, old, new = details
            yield Drift("column", f"{table}.{column}", f"{kind}: it is {old!r}, and should be {new!r}")
            continue
        item = details[-1]
        name = getattr(item, "name", item)
        name = f"{details[-2]}.{name}" if kind == "column" else str(name)
        yield Drift(kind, name, "it is missing" if action.startswith("add") else "the models do not have it")
