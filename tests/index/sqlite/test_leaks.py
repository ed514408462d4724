"""Connections: an operation that fails closes every one that it opened, on every Python.

Python 3.13 and later warn about a connection that is collected open, and a warning fails the tests. These tests find
such a connection on every Python: they keep the error alive, so that the collector closes no connection first.
"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from alembic import command
from sqlalchemy import literal, select

from cachedb import Cache, CacheError, DamagedIndex, NotACache, NotInCache, StorageError
from cachedb.index import drift, schema
from cachedb.index.sqlite import connection
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.lookups import Lookups
from cachedb.operations import rebuild, restore
from tests.conftest import is_open
from tests.support.index_file import change_index
from tests.support.make import image, save


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[sqlite3.Connection]:
    """Return a list that gets every connection that this process opens in this test."""
    found: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def connect_and_note(*arguments: Any, **options: Any) -> sqlite3.Connection:
        found.append(connect(*arguments, **options))
        return found[-1]

    for module in (sqlite3, sqlite3.dbapi2):  # SQLAlchemy calls connect() of the second
        monkeypatch.setattr(module, "connect", connect_and_note)
    return found


@pytest.fixture
def filled(directory: Path) -> Path:
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
    return directory


def fail(*_arguments: object, **_options: object) -> None:
    raise StorageError("failed on purpose")


def open_cut_index(filled: Path, _patch: pytest.MonkeyPatch) -> None:
    os.truncate(filled / "index.db", 1000)
    Cache.open(filled)


def open_other_database(filled: Path, _patch: pytest.MonkeyPatch) -> None:
    (filled / "index.db").write_bytes(b"no database " * 500)
    Cache.open(filled)


def look_up_in_cut_index(filled: Path, _patch: pytest.MonkeyPatch) -> None:
    os.truncate(filled / "index.db", 1000)
    Cache.open(filled, damaged=True).has_blob(image(1).digest)


def restore_cut_backup(filled: Path, _patch: pytest.MonkeyPatch) -> None:
    backup = shutil.copyfile(filled / "index.db", filled / "backups" / "cut.db")
    os.truncate(backup, 9000)
    restore.restore(filled, backup)


def restore_missing_backup(filled: Path, _patch: pytest.MonkeyPatch) -> None:
    (filled / "cachedb.json").unlink()  # so the index shows whether it is a cache
    restore.restore(filled, filled / "backups" / "missing.db")


def restore_without_agreement(filled: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(restore, "_match_cache", fail)
    restore.restore(filled, shutil.copyfile(filled / "index.db", filled / "backups" / "good.db"))


def rebuild_without_rows(filled: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rebuild, "_write_index", fail)
    os.truncate(filled / "index.db", 1000)
    with Cache.open(filled, damaged=True) as cache:
        cache.verify(repair=True)


def check_with_failing_migrations(filled: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(drift, "run_migrations", fail)
    drift.check(filled)


def run_alembic_on_unmarked_index(filled: Path, patch: pytest.MonkeyPatch) -> None:
    change_index(filled, "PRAGMA application_id = 5")
    patch.setenv("CACHEDB_DIR", str(filled))
    command.upgrade(schema.alembic_config(), "head")


def look_up_without_permission_for_the_wal(filled: Path, patch: pytest.MonkeyPatch) -> None:
    stat, wal = os.stat, f"{filled}/index.db-wal"

    def refuse(name: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if str(name) == wal:
            raise PermissionError(errno.EACCES, "Permission denied", wal)
        return stat(name, *arguments, **options)

    statement = select(literal(1))
    with closing(Database(filled)) as index:
        index.rows(statement, {})
        with index.read():
            pass
        patch.setattr("os.stat", refuse)
        index.rows(statement, {})


@pytest.mark.parametrize(
    ("operation", "error"),
    [
        (open_cut_index, DamagedIndex),
        (open_other_database, (DamagedIndex, NotACache)),
        (look_up_in_cut_index, DamagedIndex),
        (look_up_without_permission_for_the_wal, StorageError),
        (restore_cut_backup, DamagedIndex),
        (restore_missing_backup, NotInCache),
        (restore_without_agreement, StorageError),
        (rebuild_without_rows, StorageError),
        (check_with_failing_migrations, StorageError),
        (run_alembic_on_unmarked_index, DamagedIndex),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_failed_operation_closes_its_connections(
    filled: Path,
    opened: list[sqlite3.Connection],
    monkeypatch: pytest.MonkeyPatch,
    operation: Callable[[Path, pytest.MonkeyPatch], None],
    error: type[CacheError],
) -> None:
    with pytest.raises(error) as raised:
        operation(filled, monkeypatch)
    assert opened
    assert not [connection for connection in opened if is_open(connection)]
    del raised


def test_a_repair_closes_its_connections(filled: Path, opened: list[sqlite3.Connection]) -> None:
    backup = shutil.copyfile(filled / "index.db", filled / "backups" / "000001-cut.db")
    os.truncate(backup, 9000)
    os.truncate(filled / "index.db", 1000)
    with Cache.open(filled, damaged=True) as cache:
        assert cache.verify(repair=True).problems
    assert not [connection for connection in opened if is_open(connection)]


@pytest.mark.parametrize("pragma", ["synchronous", "foreign_keys", "schema_version", "locking_mode"])
def test_a_connection_whose_pragma_fails_is_closed(
    index: Database, opened: list[sqlite3.Connection], monkeypatch: pytest.MonkeyPatch, pragma: str
) -> None:
    class Failing(connection.CacheConnection):
        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
            if statement.startswith(f"PRAGMA {pragma}"):
                raise sqlite3.OperationalError("disk I/O error")
            return super().execute(statement, *values)

    monkeypatch.setattr(connection, "CacheConnection", Failing)
    device, inode, mode = index.identify_file()
    if pragma == "locking_mode":
        monkeypatch.setattr(connection, "has_locks", lambda _: False)
        monkeypatch.setattr(index, "identify_file", lambda: (device, inode, f"{mode}&vfs=unix-none"))
    with pytest.raises(StorageError), index.raw():
        pass
    assert [is_open(connection) for connection in opened] == [False]


def test_five_idle_connections_are_kept_for_look_ups(directory: Path) -> None:
    together = Barrier(8)

    def is_current(_: object) -> bool:
        together.wait(60)  # so that each thread has a connection of its own
        return True

    with Cache.open(directory) as cache, ThreadPoolExecutor(8) as pool:
        lookups = Lookups(cache._database._open, is_current)
        list(pool.map(lambda _: lookups.find(select(literal(1)), {}), range(8)))
        assert len(lookups._idle) == 5
        lookups.close()
