"""An index whose schema is copied equals one that the migrations make."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from cachedb import Cache
from cachedb.index import schema
from cachedb.index.schema import check_existing, resolve_revision
from cachedb.index.tables import REVISION
from tests.conftest import Run, read_revision
from tests.support import make, new_index


@pytest.fixture
def migrate(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Return a function that creates a cache with the migrations."""

    def create(directory: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(schema, "run_migrations", new_index.MIGRATE)
            Cache.open(directory).close()

    return create


def read(directory: Path) -> list[object]:
    with closing(sqlite3.connect(directory / "index.db")) as connection:
        return [*new_index.dump(connection), connection.execute("PRAGMA application_id").fetchone()]


@pytest.mark.slow
def test_a_copied_schema_equals_a_migrated_one(
    cachedb: Run, tmp_path: Path, directory: Path, migrate: Callable[[Path], None]
) -> None:
    migrate(tmp_path / "migrated")
    Cache.open(tmp_path / "copied").close()
    archive = make.write(tmp_path / "app.tar", make.oci_files({"app:1": make.image(1)}))
    assert cachedb("import", archive).returncode == 0
    assert cachedb("rm", "app:1").returncode == 0
    expected = read(tmp_path / "migrated")
    assert f"INSERT INTO \"alembic_version\" VALUES('{REVISION}');" in expected
    assert read(tmp_path / "copied") == expected
    assert read(directory) == expected


def test_an_older_schema_is_migrated(directory: Path) -> None:
    Cache.open(directory).close()
    with closing(check_existing(directory)) as database:
        older = resolve_revision("-1", REVISION)
        schema.migrate(database, older, down=True)
        assert read_revision(directory) == older
        schema.migrate(database)
    assert read_revision(directory) == REVISION
