"""What a schema change would do: its steps, its SQL, and the revisions that users of Alembic type."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from cachedb import Cache, InvalidRevision, SchemaMismatch
from cachedb.cli.main import cli
from cachedb.index import schema
from cachedb.index.sqlite.database import Database
from cachedb.index.tables import REVISION
from cachedb.operations import preview, upgrade
from tests.conftest import Run, read_revision
from tests.operations.test_upgrade import REVISIONS, unpack_frozen_cache
from tests.support.index_file import change_index
from tests.support.make import image, save

OLDEST = REVISIONS[0]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Return a cache with the oldest schema."""
    return unpack_frozen_cache(OLDEST, tmp_path / "old")


@pytest.fixture
def new(directory: Path) -> Path:
    """Return a cache with an image and the newest schema."""
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
    return directory


def read_schema(directory: Path) -> list[tuple[str, ...]]:
    """Return the revision and the objects of an index, without the layout of their SQL."""
    with closing(sqlite3.connect(directory / "index.db")) as shell:
        objects = shell.execute("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY 1, 2")
        found = [(kind, name, "".join(sql.split())) for kind, name, sql in objects]
        oldest = shell.execute("PRAGMA user_version").fetchone()
        return [*found, *shell.execute("SELECT version_num FROM alembic_version"), tuple(map(str, oldest))]


def read_files(directory: Path) -> dict[str, bytes]:
    """Return the files of a cache, without those that SQLite makes to read an index."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.suffix not in (".db-shm", ".db-wal"))
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


# SQL


@pytest.mark.slow
@pytest.mark.parametrize("revision", REVISIONS)
def test_the_sql_makes_the_schema_that_the_migrations_make(revision: str, tmp_path: Path) -> None:
    migrated = unpack_frozen_cache(revision, tmp_path / "migrated")
    run = unpack_frozen_cache(revision, tmp_path / "run")
    for is_downgrade, target in ((False, "head"), (True, OLDEST)):
        sql = preview.render_sql(run, target, is_downgrade=is_downgrade)
        assert bool(sql) == (read_revision(run) != schema.resolve_revision(target, REVISION))
        with closing(sqlite3.connect(run / "index.db")) as shell:
            shell.executescript(sql)
        with closing(Database(migrated)) as database:
            schema.migrate(database, schema.resolve_revision(target, REVISION), down=is_downgrade)
        assert read_schema(run) == read_schema(migrated)


def test_printing_sql_changes_nothing(cachedb: Run, old: Path) -> None:
    before = read_files(old)
    printed = cachedb("--dir", old, "db", "upgrade", "+1", "--sql")
    assert printed.returncode == 0
    assert printed.stdout.startswith("PRAGMA foreign_keys = OFF;\n\nBEGIN IMMEDIATE;\n")
    assert f"SET version_num='{REVISIONS[1]}'" in printed.stdout
    assert f"SET version_num='{REVISIONS[2]}'" not in printed.stdout
    assert read_files(old) == before


# Plans


def test_a_plan_says_what_the_upgrade_then_does(old: Path) -> None:
    before = read_files(old)
    plan = preview.plan_change(old)
    assert read_files(old) == before
    assert [step.revision for step in plan.steps] == REVISIONS[1:]
    assert plan.needed_size > 2 * (old / "index.db").stat().st_size
    done = upgrade.upgrade(old)
    assert (plan.before, plan.after, plan.backup) == (done.before, done.after, done.backup)
    with Cache.open(old) as cache:
        assert plan.images == len(cache.list_names())
    again = preview.plan_change(old)
    assert (again.steps, again.backup, again.needed_size, again.images) == ([], None, 0, 0)


def test_a_plan_of_a_downgrade_lists_the_newest_step_first(new: Path) -> None:
    plan = preview.plan_change(new, OLDEST, is_downgrade=True)
    assert [step.revision for step in plan.steps] == REVISIONS[:0:-1]
    assert plan.images == 0


def test_a_plan_counts_the_images_of_an_interrupted_backfill(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "backfill", lambda *_: [])
    upgrade.upgrade(old)
    plan = preview.plan_change(old)
    with Cache.open(old) as cache:
        assert (plan.steps, plan.images) == ([], len(cache.list_names()))


def test_the_dry_run_prints_the_plan(cachedb: Run, old: Path) -> None:
    def run(*words: str) -> str:
        return str(cachedb("--dir", old, "db", "upgrade", "--dry-run", *words).stdout)

    found = json.loads(run("--format", "json"))
    assert list(found) == list(preview.Plan._fields)
    text = run()
    assert text.startswith(f"schema {OLDEST} would become {REVISION}; the backup would be {found['backup']}\n")
    assert text.endswith(f"\nimages to backfill: {found['images']}\n")
    assert "holds that outlive a process" in text
    assert "disk: needed " in text
    assert read_revision(old) == OLDEST


def test_the_dry_run_exits_with_1_if_the_disk_has_too_little_space(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(old)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    done = CliRunner().invoke(cli, ["--dir", str(old), "db", "upgrade", "--dry-run"])
    assert done.exit_code == 1
    assert "free 0 B: too little" in done.output


def test_sql_and_a_dry_run_exclude_each_other(cachedb: Run, old: Path) -> None:
    for options in (["--sql", "--dry-run"], ["--sql", "--format", "json"]):
        for command in (["upgrade"], ["downgrade", OLDEST]):
            done = cachedb("--dir", old, "db", *command, *options)
            assert (done.returncode, done.stdout) == (2, "")
            assert done.stderr.startswith("cachedb: --sql excludes --dry-run and --format json")


# Revisions


@pytest.mark.slow
def test_steps_count_from_the_current_or_a_named_revision(old: Path) -> None:
    assert upgrade.upgrade(old, "+2").after == REVISIONS[2]
    assert upgrade.downgrade(old, "-1").after == REVISIONS[1]
    assert upgrade.upgrade(old, "head-1").after == REVISIONS[-2]
    assert upgrade.downgrade(old, f"{REVISIONS[0]}+1").after == REVISIONS[1]
    with pytest.raises(SchemaMismatch, match="db downgrade"):
        upgrade.upgrade(old, "-1")
    with pytest.raises(SchemaMismatch, match="db upgrade"):
        upgrade.downgrade(old, "+1")
    assert read_revision(old) == REVISIONS[1]


@pytest.mark.parametrize("revision", ["+99", "-99", "head+1", "+", "--1", "+x", "0009+1"])
def test_steps_beyond_the_revisions_are_refused(new: Path, revision: str) -> None:
    for change in (upgrade.upgrade, upgrade.downgrade):
        with pytest.raises(InvalidRevision, match="is not one of the revisions"):
            change(new, revision)


def test_a_downgrade_to_base_keeps_the_index(cachedb: Run, new: Path) -> None:
    before = read_files(new)
    for options in ([], ["--dry-run"], ["--sql"]):
        done = cachedb("db", "downgrade", "base", *options)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"use {OLDEST}, the oldest schema" in done.stderr
    assert read_files(new) == before
    with pytest.raises(InvalidRevision, match="names of all images"):
        upgrade.upgrade(new, "base")


# Exit codes, history


@pytest.mark.slow
def test_scripts_can_test_whether_an_upgrade_is_needed(cachedb: Run, old: Path, directory: Path) -> None:
    def check(where: Path) -> int:
        return cachedb("--dir", where, "db", "current", "--check").returncode

    assert check(directory) == 3
    assert not directory.exists()
    assert check(old) == 4
    assert cachedb("--dir", old, "db", "current").returncode == 0
    upgrade.upgrade(old)
    assert check(old) == 0
    change_index(old, "UPDATE alembic_version SET version_num = '9999'")
    assert check(old) == 0
    change_index(old, "PRAGMA user_version = 9999")
    assert check(old) == 1


def test_a_pending_backfill_needs_an_upgrade(cachedb: Run, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "backfill", lambda *_: [])
    upgrade.upgrade(old)
    assert cachedb("--dir", old, "db", "current", "--check").returncode == 4


def test_the_history_has_the_date_and_the_docstring_of_each_revision(cachedb: Run, new: Path) -> None:
    text = cachedb("db", "history", "-v").stdout
    assert text.startswith(f"{REVISION}: ")
    found = schema.history(new)
    assert [entry.revision for entry in found] == REVISIONS[::-1]
    for entry in found:
        assert entry.date is not None
        assert f"{entry.revision}: {entry.date}, " in text
        assert "Revises:" not in entry.description
        assert entry.description.startswith(entry.message.splitlines()[0])
        for line in entry.description.splitlines():
            assert line in text
    assert "`backfills` records its progress." in text
