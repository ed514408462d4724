"""The schema: creation by one or many processes, upgrades, downgrades, refusals, and the constraints of rows."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from cachedb import Cache, DamagedIndex, SchemaMismatch
from cachedb.disk.layout import OLDEST
from cachedb.index import schema
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.prepare import prepare
from cachedb.index.sqlite.revision import APPLICATION_ID, read_objects
from cachedb.index.tables import METADATA, REVISION, VIEWS
from cachedb.operations import upgrade as upgrade_module
from tests.conftest import read_revision, run_python, snapshot, stored_rows
from tests.index.sqlite.test_database import content
from tests.support.index_file import change_index, list_tables, read_rows
from tests.support.make import digest_of, image

CHECKOUT = Path(__file__).resolve().parents[2]
TABLES = {
    "alembic_version", "images", "blobs", "image_blobs", "image_labels", "image_platforms", "lasting_holds", "leases",
    "trash", "backfills",
}  # fmt: skip
FIRST = TABLES - {"lasting_holds", "image_labels", "image_platforms", "backfills"}


def alembic(*arguments: str, checkout: Path = CHECKOUT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the `alembic` command in a checkout, with its `alembic.ini`."""
    return subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# Creation


def test_a_new_cache_has_the_newest_schema_and_our_application_id(directory: Path) -> None:
    Cache.open(directory).close()
    assert list_tables(directory) == TABLES
    shell = sqlite3.connect(directory / "index.db")
    assert shell.execute("SELECT version_num FROM alembic_version").fetchall() == [(REVISION,)]
    assert shell.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    assert shell.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    shell.close()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 16])
def test_64_processes_can_create_one_cache_at_once(directory: Path, killed: int) -> None:
    output = run_python(
        """
        import os, random, signal, sys
        from cachedb import Cache

        directory, killed = sys.argv[1], int(sys.argv[2])
        gate, open_gate = os.pipe()
        children = []
        for number in range(64):
            if (child := os.fork()) == 0:
                os.close(open_gate)
                os.read(gate, 1)  # until the parent closes the other end
                if number < killed:
                    signal.setitimer(signal.ITIMER_REAL, random.Random(number).uniform(0.001, 0.6))
                with Cache.open(directory) as cache:
                    digest = cache.add_blob(b"%d" % number)
                    assert cache.has_blob(digest)
                os._exit(0)
            children.append(child)
        os.close(open_gate)
        statuses = [os.waitpid(child, 0)[1] for child in children]
        print(statuses[killed:], sum(status == signal.SIGALRM for status in statuses))
        """,
        directory,
        killed,
    )
    assert output.startswith(str([0] * (64 - killed)))
    assert {digest_of(b"%d" % number) for number in range(killed, 64)} <= stored_rows(directory).keys()
    with Cache.open(directory) as cache:
        cache.collect_garbage()
    left = snapshot(directory)
    assert left == {name: type(left[name])() for name in left} | {"locks": ["write.lock", "write.queue"]}


def test_the_next_open_completes_an_interrupted_creation(directory: Path) -> None:
    stages = directory.parent
    prepare(Database(stages / "folders"))
    prepare(Database(stages / "empty file"))
    (stages / "empty file" / "index.db").touch()
    wal = Database(stages / "wal")
    prepare(wal)
    with closing(sqlite3.connect(wal.path)) as creator:
        creator.execute("PRAGMA journal_mode = WAL")
    assert wal.path.stat().st_size
    for stage in ("folders", "empty file", "wal"):
        Cache.open(stages / stage).close()
        assert list_tables(stages / stage) == TABLES


def test_a_cache_that_lost_its_index_is_refused_and_keeps_its_blobs(directory: Path) -> None:
    with Cache.open(directory) as cache:
        digest = cache.add_blob(b"data")
        path = cache.get_blob_path(digest)
    (directory / "index.db").rename(directory.parent / "backup.db")
    for upgrade in (False, True):
        with pytest.raises(DamagedIndex, match=r"lost its index.db, but not its blobs: `cachedb verify --repair`"):
            Cache.open(directory, upgrade=upgrade)
        assert path.read_bytes() == b"data"
    shutil.copy(directory.parent / "backup.db", directory / "index.db")
    with Cache.open(directory) as cache:
        assert cache.get_blob(digest) == b"data"


def test_a_cache_that_lost_its_index_and_had_no_blobs_gets_a_new_one(directory: Path) -> None:
    Cache.open(directory).close()
    (directory / "index.db").unlink()
    Cache.open(directory).close()
    assert list_tables(directory) == TABLES


# Other schemas


@pytest.mark.parametrize("upgrade", [False, True])
def test_a_newer_schema_is_refused_before_any_write(directory: Path, upgrade: bool) -> None:
    with Cache.open(directory) as cache:
        cache.add_blob(b"data")
    change_index(directory, "UPDATE alembic_version SET version_num = '9999'")
    change_index(directory, "PRAGMA user_version = 9999")
    before = content(directory)
    with pytest.raises(SchemaMismatch, match=f"schema 9999, and this release knows {REVISION} at most: use a newer"):
        Cache.open(directory, upgrade=upgrade)
    assert content(directory) == before


def test_an_open_cache_is_not_written_to_after_an_upgrade(cache: Cache, directory: Path) -> None:
    digest = cache.add_blob(b"data")
    change_index(directory, "UPDATE alembic_version SET version_num = '9999'")
    change_index(directory, "PRAGMA user_version = 9999")
    before = snapshot(directory)
    for write in (
        lambda: cache.add_blob(b"more"),
        lambda: cache.save_manifest("app", image(1).manifest),
        lambda: cache.remove_manifest("app"),
        lambda: cache.associate_blob_with_image("app", digest),
        lambda: cache.tag("app", "other"),
        cache.hold(digest).__enter__,
    ):
        with pytest.raises(SchemaMismatch):
            write()
    after = snapshot(directory)
    del before["ingest"], after["ingest"]
    assert after == before
    change_index(directory, f"UPDATE alembic_version SET version_num = '{REVISION}'")


@pytest.mark.slow
def test_an_older_schema_is_upgraded_only_when_asked(directory: Path) -> None:
    Cache.open(directory).close()
    assert alembic("downgrade", "0001", CACHEDB_DIR=str(directory)).returncode == 0
    assert list_tables(directory) == FIRST
    before = content(directory)
    with pytest.raises(SchemaMismatch, match=rf"schema 0001, .* needs {REVISION}: run `cachedb db upgrade`, set "):
        Cache.open(directory)
    assert content(directory) == before
    with Cache.open(directory, upgrade=True) as cache:
        cache.add_blob(b"data")
    assert list_tables(directory) == TABLES


@pytest.mark.slow
def test_an_older_schema_is_upgraded_if_the_environment_asks_for_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cache.open(directory).close()
    assert alembic("downgrade", "0001", CACHEDB_DIR=str(directory)).returncode == 0
    monkeypatch.setenv("CACHEDB_AUTO_UPGRADE", "1")
    with Cache.open(directory) as cache:
        cache.add_blob(b"data")
    assert list_tables(directory) == TABLES


@pytest.mark.slow
def test_an_index_without_a_schema_is_damaged(directory: Path) -> None:
    Cache.open(directory).close()
    assert alembic("downgrade", "base", CACHEDB_DIR=str(directory)).returncode == 0
    for upgrade in (False, True):
        with pytest.raises(DamagedIndex, match="lost its schema"):
            Cache.open(directory, upgrade=upgrade)


# Migrations


def test_the_models_have_the_revision_of_the_newest_migration() -> None:
    migrations = ScriptDirectory.from_config(schema.alembic_config())
    assert migrations.get_heads() == [REVISION]
    assert int(migrations.get_revision(REVISION).module.oldest) == OLDEST


def test_the_views_are_those_that_the_migrations_create(cache: Cache) -> None:
    with closing(Database(cache.directory)) as index, index.read() as connection:
        assert sorted(name for kind, name in read_objects(connection) if kind == "view") == list(VIEWS)


def test_the_migrations_create_the_tables_of_the_models(cache: Cache) -> None:
    with closing(Database(cache.directory)) as index, index.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []


def test_tables_have_the_constraints_of_the_models(cache: Cache, tmp_path: Path) -> None:
    """Alembic compares neither CHECK constraints nor STRICT."""

    def definitions(path: Path) -> dict[str, list[str]]:
        shell = sqlite3.connect(path)
        rows = shell.execute(
            "SELECT name, sql FROM sqlite_master "
            "WHERE type IN ('table', 'index') AND sql IS NOT NULL AND name != 'alembic_version'"
        )
        # SQLite writes a column that was added later on one line.
        lines = {name: re.split(r"\n|, (?=[a-z_]+ [A-Z])", sql) for name, sql in rows}
        found = {name: sorted(line.strip(" ,\t") for line in split) for name, split in lines.items()}
        shell.close()
        return found

    with closing(Database(tmp_path / "models")) as other:
        prepare(other)
        with other.write_schema() as connection:
            METADATA.create_all(connection)
    assert definitions(cache.directory / "index.db") == definitions(other.path)


@pytest.mark.slow
def test_every_migration_goes_down_and_up_again(directory: Path) -> None:
    with closing(Database(directory)) as database:
        upgrade_module.prepare(database)

        def migrate(to: str) -> None:
            config = schema.alembic_config()
            with database.write_schema() as connection:
                config.attributes["connection"] = connection
                (command.downgrade if to.endswith("-1") else command.upgrade)(config, to)

        for _ in ScriptDirectory.from_config(schema.alembic_config()).walk_revisions():
            migrate("-1")
        assert list_tables(directory) == {"alembic_version"}
        migrate("head")
        assert list_tables(directory) == TABLES
        assert database.revision() == REVISION


@pytest.mark.slow
def test_0002_upgrades_and_downgrades_a_cache(directory: Path) -> None:
    with Cache.open(directory) as cache:
        made = image(1, 2)
        for digest, data in made.blobs.items():
            cache.save_blob(digest, data)
        cache.save_manifest("app:1", made.manifest)
        lease = cache.add_blob(b"leased")
        assert [row[0] for row in read_rows(directory)["leases"]] == [lease]
        assert alembic("downgrade", "0002", CACHEDB_DIR=str(directory)).returncode == 0
        before = {name: table for name, table in read_rows(directory).items() if name != "holds"}
        assert alembic("downgrade", "0001", CACHEDB_DIR=str(directory)).returncode == 0
        assert read_rows(directory) == before
        assert alembic("upgrade", "0002", CACHEDB_DIR=str(directory)).returncode == 0
        assert read_rows(directory) == {**before, "holds": []}
        assert alembic("upgrade", "head", CACHEDB_DIR=str(directory)).returncode == 0
        cache.add_hold("app:1")
        assert len(read_rows(directory)["leases"]) == 1 + len(made.blobs)
        assert alembic("downgrade", "0001", CACHEDB_DIR=str(directory)).returncode == 0
        assert read_rows(directory) == before, "the downgrade deleted more than the hold and its leases"
        assert alembic("upgrade", "head", CACHEDB_DIR=str(directory)).returncode == 0
    with Cache.open(directory) as cache:
        assert cache.is_image_complete("app:1")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["CACHEDB_DIR", "-x", "-x, relative"])
def test_the_alembic_command_uses_the_chosen_cache(directory: Path, how: str) -> None:
    named = os.path.relpath(directory, CHECKOUT) if "relative" in how else str(directory)
    chosen = ["-x", f"dir={named}"] if "-x" in how else []
    default = str(directory if how == "CACHEDB_DIR" else directory.parent / "other")
    done = alembic(*chosen, "upgrade", "head", CACHEDB_DIR=default)
    assert done.returncode == 0, done.stderr
    assert list_tables(directory) == TABLES
    done = alembic(*chosen, "check", CACHEDB_DIR=default)
    assert done.returncode == 0, done.stderr
    assert "No new upgrade operations detected" in done.stdout
    with Cache.open(directory) as cache:
        cache.add_blob(b"data")
    assert not (directory.parent / "other").exists()


@pytest.mark.slow
def test_a_new_revision_gets_the_next_number_and_can_be_downgraded(directory: Path) -> None:
    copy = directory.parent / "checkout"
    for name in ("cachedb", "migrations"):
        shutil.copytree(CHECKOUT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CHECKOUT / "alembic.ini", copy)
    with (copy / "cachedb" / "tables.py").open("a") as file:
        file.write("\nIMAGES.append_column(Column('stars', Text()))\n")

    def run(*arguments: str) -> str:
        done = alembic(*arguments, checkout=copy, CACHEDB_DIR=str(directory))
        assert done.returncode == 0, done.stderr
        return done.stdout

    number = int(REVISION)
    run("upgrade", "head")
    run("revision", "--autogenerate", "-m", "stars")
    (made,) = (copy / "migrations" / "versions").glob(f"{number + 1:04}_stars.py")
    assert f"\noldest = '{number + 1:04}'\n" in made.read_text()
    run("upgrade", "head")
    run("check")
    run("downgrade", "-1")
    assert read_revision(directory) == REVISION
    run("revision", "-m", "by hand")
    run("revision", "-m", "chosen", "--rev-id", f"{number + 7:04}")
    run("revision", "-m", "after it")
    run("upgrade", "head")
    assert read_revision(directory) == f"{number + 8:04}"
    assert [line.split()[2].rstrip(",") for line in run("history").splitlines()] == [
        f"{number + step:04}" for step in (8, 7, 2, 1)
    ] + [f"{earlier:04}" for earlier in range(number, 0, -1)]


@pytest.mark.slow
def test_alembic_refuses_another_programs_database(tmp_path: Path) -> None:
    change_index(tmp_path, "CREATE TABLE diary (entry TEXT)")
    before = content(tmp_path)
    done = alembic("upgrade", "head", CACHEDB_DIR=str(tmp_path))
    assert done.returncode == 1
    assert "another program's database" in done.stderr
    assert content(tmp_path) == before


# Rows

DIGEST = f"sha256:{'ab' * 32}"
TIME = "2026-01-31T23:59:59.123456Z"
BLOB = {"id": 7, "digest": f"sha256:{'cd' * 32}", "size": 1, "stored_at": TIME}
IMAGE = {
    "id": 7,
    "repository": "app",
    "reference": "1",
    "manifest_id": 1,
    "media_type": "application/json",
    "added_at": TIME,
    "last_used_at": TIME,
}
PLATFORM = {"image_id": 1, "position": 7, "last_position": 8, "os": "linux", "architecture": "amd64", "variant": None}
LABEL = {"image_id": 1, "key": "version", "value": ""}
ASSOCIATION = {"image_id": 1, "position": 7, "blob_id": 1, "role": "layer", "media_type": "application/json"}
LEASE = {"digest": DIGEST, "session": "1-abc", "hold": 1}
TRASH = {"digest": DIGEST, "size": 0}
HOLD = {"id": "hold-0123456789ab", "name": "app:1", "created_at": TIME, "expires_at": None}
VALID: dict[str, dict[str, Any]] = {
    "blobs": BLOB, "images": IMAGE, "image_blobs": ASSOCIATION, "image_labels": LABEL, "image_platforms": PLATFORM,
    "leases": LEASE, "lasting_holds": HOLD, "trash": TRASH
}  # fmt: skip

INVALID_DIGESTS = [
    "",
    "ab" * 32,
    f"sha256:{'ab' * 31}",
    f"sha256:{'ab' * 33}",
    f"sha256:{'AB' * 32}",
    f"sha256:{'xy' * 32}",
    f"sha256:{'ab' * 31}/.",
    f"sha256:../{'a' * 61}",
    f"sha512:{'ab' * 32}",
    f"sha256:{'ab' * 64}",
    f"md5:{'ab' * 16}",
    f" {DIGEST}",
    f"{DIGEST}\n",
    None,
    7,
    b"x" * 71,
]
INVALID_TIMES = [
    "",
    "2026-01-31",
    "2026-01-31 23:59:59.123456Z",
    "2026-01-31T23:59:59Z",
    "2026-01-31T23:59:59.123456+00:00",
    "2026-01-31T23:59:59.12345xZ",
    7,
    1769903999.5,
]
INVALID_MEDIA_TYPES = ["", "json", "/json", "application/", None]
INVALID = [
    *((table, "digest", value) for table in ("blobs", "leases", "trash") for value in INVALID_DIGESTS),
    *((table, "size", value) for table in ("blobs", "trash") for value in (-1, None, 1.5, "many")),
    *(("blobs", "stored_at", value) for value in INVALID_TIMES),
    *(("images", column, value) for column in ("added_at", "last_used_at") for value in [*INVALID_TIMES, None]),
    *((table, "media_type", value) for table in ("images", "image_blobs") for value in INVALID_MEDIA_TYPES),
    *(("images", "repository", value) for value in ("", "a" * 256, None)),
    *(("images", "reference", value) for value in ("", "a" * 136, None)),
    *(("images", "manifest_id", value) for value in (99, None, "x")),
    *(("image_blobs", "role", value) for value in ("", "Layer", "blob", None)),
    *(("image_blobs", "position", value) for value in (-1, None, "first")),
    *(("image_blobs", column, value) for column in ("image_id", "blob_id") for value in (99, None)),
    *(("leases", column, None) for column in ("session", "hold")),
    *(("lasting_holds", "id", value) for value in ("", "hold-", "hold-0123456789abc", "1-abc", None)),
    *(("lasting_holds", "name", value) for value in ("", "a" * 401, None)),
    *(("lasting_holds", "created_at", value) for value in [*INVALID_TIMES, None]),
    *(("lasting_holds", "expires_at", value) for value in INVALID_TIMES),
    *(("images", column, value) for column in ("architecture", "os", "variant") for value in ("", "a" * 65, b"x")),
    *(("image_platforms", column, "a" * 65) for column in ("architecture", "os", "variant")),
    *(("image_platforms", column, "") for column in ("architecture", "os", "variant")),
    *(("image_platforms", "last_position", value) for value in (7, None)),
    *(("images", column, value) for column in ("created", "pinned_at", "expires_at") for value in INVALID_TIMES),
    *(("images", "author", value) for value in ("", "a" * 65537)),
    *(("images", "some_platforms", value) for value in (0, 2, "all")),
    *(("image_blobs", "diff_id", value) for value in INVALID_DIGESTS if value is not None),
    *(("image_blobs", "created_by", value) for value in ("", "a" * 65537)),
    *(("image_labels", column, value) for column in ("key", "value") for value in (None, "a" * 65537)),
    *(("image_labels", "image_id", value) for value in (99, None)),
]


def insert_row(shell: sqlite3.Connection, table: str, row: dict[str, object]) -> None:
    marks = ", ".join("?" * len(row))
    shell.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", [*row.values()])


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sqlite3.Connection]:
    """Open an index that has a blob and an image, as a person with a SQL shell does."""
    directory = tmp_path_factory.mktemp("rows")
    Cache.open(directory).close()
    connection = sqlite3.connect(directory / "index.db", isolation_level=None)
    connection.execute("PRAGMA foreign_keys = ON")
    insert_row(connection, "blobs", {"id": 1, "digest": f"sha512:{'ef' * 64}", "size": 0, "stored_at": None})
    insert_row(connection, "images", {**IMAGE, "id": 1, "reference": "latest"})
    yield connection
    connection.close()


@pytest.mark.parametrize("table", VALID)
def test_a_valid_row_can_be_inserted(shell: sqlite3.Connection, table: str) -> None:
    shell.execute("BEGIN")
    insert_row(shell, table, VALID[table])
    shell.execute("ROLLBACK")


@pytest.mark.parametrize(("table", "column", "value"), INVALID)
def test_an_invalid_value_cannot_be_inserted(shell: sqlite3.Connection, table: str, column: str, value: object) -> None:
    shell.execute("BEGIN")
    with pytest.raises(sqlite3.IntegrityError):
        insert_row(shell, table, {**VALID[table], column: value})
    shell.execute("ROLLBACK")


@pytest.mark.parametrize("table", VALID)
def test_a_row_cannot_be_inserted_twice(shell: sqlite3.Connection, table: str) -> None:
    shell.execute("BEGIN")
    insert_row(shell, table, VALID[table])
    row = {column: value for column, value in VALID[table].items() if column != "id"}
    with pytest.raises(sqlite3.IntegrityError):
        insert_row(shell, table, row)
    shell.execute("ROLLBACK")


def test_a_referenced_blob_cannot_be_deleted_and_an_image_takes_its_associations(shell: sqlite3.Connection) -> None:
    shell.execute("BEGIN")
    with pytest.raises(sqlite3.IntegrityError):
        shell.execute("DELETE FROM blobs WHERE id = 1")
    insert_row(shell, "blobs", BLOB)
    insert_row(shell, "image_blobs", {**ASSOCIATION, "blob_id": BLOB["id"]})
    with pytest.raises(sqlite3.IntegrityError):
        shell.execute("DELETE FROM blobs WHERE id = 7")
    shell.execute("DELETE FROM images WHERE id = 1")
    assert shell.execute("SELECT * FROM image_blobs").fetchall() == []
    shell.execute("DELETE FROM blobs")
    shell.execute("ROLLBACK")
