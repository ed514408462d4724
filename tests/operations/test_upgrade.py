"""Schema changes: upgrades and downgrades with real data, other processes, kills and full disks; backups; drift."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pytest_alembic import Config, runner
from pytest_alembic.tests import (
    test_model_definitions_match_ddl,
    test_single_head_revision,
    test_up_down_consistency,
    test_upgrade,
)
from sqlalchemy import Engine, create_engine, event

from cachedb import (
    Cache,
    CacheError,
    DamagedIndex,
    InvalidRevision,
    NotACache,
    NotInCache,
    SchemaMismatch,
    StorageError,
)
from cachedb.content import describe
from cachedb.disk import reader
from cachedb.index import drift as drift_module
from cachedb.index import schema
from cachedb.index.descriptions import BACKFILL
from cachedb.index.sqlite import backups
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.prepare import prepare
from cachedb.index.sqlite.revision import APPLICATION_ID
from cachedb.index.tables import REVISION
from cachedb.oci.configs import ImageConfig, parse_config
from cachedb.operations import restore, upgrade
from tests.conftest import Run, files_of, read_revision, run_python, running, start_python
from tests.index.sqlite.test_database import content
from tests.support.index_file import change_index, list_tables, read_rows
from tests.support.make import image, index, save
from tests.support.powercut import hash_tree, read_tree
from tests.support.promises import check
from tests.support.waiting import wait_until

OPERATIONS: dict[str, Callable[..., object]] = {
    "upgrade": upgrade.upgrade,
    "downgrade": upgrade.downgrade,
    "back_up": upgrade.back_up,
    "check": drift_module.check,
    "current": schema.current,
    "history": schema.history,
}
FROZEN = Path(__file__).parents[1] / "frozen"
REVISIONS = [f"{number:04}" for number in range(1, int(REVISION) + 1)]
ADDED = {
    "created_at",
    "added_at",
    "some_platforms",
    "architecture",
    "os",
    "variant",
    "created",
    "author",
    "pinned_at",
    "expires_at",
    "diff_id",
    "created_by",
}


# The tests of pytest-alembic for all migrations. Its plugin does not work with pytest 9, but its tests do.

__all__ = [
    "test_model_definitions_match_ddl",
    "test_single_head_revision",
    "test_up_down_consistency",
    "test_upgrade",
]


@pytest.fixture
def alembic_runner(tmp_path: Path) -> Iterator[Any]:
    engine = create_engine(f"sqlite:///{tmp_path / 'migrated.db'}")
    options = {"script_location": str(schema.migrations_directory()), "path_separator": "os"}
    with runner(Config(config_options=options), engine) as running:
        yield running
    engine.dispose()


# Every revision that was ever released


def unpack_frozen_cache(revision: str, directory: Path) -> Path:
    """Unpack the cache that the release of a revision made."""
    directory.mkdir()
    with tarfile.open(FROZEN / f"{revision}.tar.xz") as tar:
        if hasattr(tarfile, "data_filter"):  # Python before 3.11.4, as Debian 12 has it, lacks it
            tar.extraction_filter = tarfile.data_filter
        tar.extractall(directory)
    for name in ("ingest", "trash", "locks", "backups"):
        (directory / name).mkdir()
    return directory


def read_common_rows(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Return all rows without the columns and tables that were added after the first revision."""
    found: dict[str, list[dict[str, Any]]] = {}
    shell = sqlite3.connect(directory / "index.db")
    shell.row_factory = sqlite3.Row
    for table in ("images", "blobs", "image_blobs", "leases", "trash"):
        entries = [dict(row) for row in shell.execute(f"SELECT * FROM {table}")]
        kept = [{key: value for key, value in entry.items() if key not in ADDED} for entry in entries]
        found[table] = sorted(kept, key=repr)
    shell.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("revision", REVISIONS)
def test_a_cache_of_any_release_keeps_rows_and_blobs_in_upgrades_and_downgrades(revision: str, tmp_path: Path) -> None:
    directory = unpack_frozen_cache(revision, tmp_path / "cache")
    before, all_rows, files = read_common_rows(directory), read_rows(directory), files_of(directory)
    assert len(before["images"]) == (7 if revision < "0004" else 8)
    changed = upgrade.upgrade(directory)
    assert (changed.before, changed.after) == (revision, REVISION)
    assert read_common_rows(directory) == before
    assert drift_module.check(directory) == []
    with Cache.open(directory) as cache:
        assert cache.get_image("frozen:2").author == cache.get_image("team/frozen:stable").author == "A. Author"
        assert cache.get_labels("docker.io/library/docker:2")["org.opencontainers.image.title"] == "frozen"
        assert [blob.created_by for blob in cache.get_image_blobs("several:1") if blob.role == "layer"] == [
            "layer 1",
            "layer 2",
            "layer 1",
            "layer 3",
        ]
        assert all(blob.diff_id for blob in cache.get_image_blobs("frozen:2") if blob.role == "layer")
        cache.export("frozen:2", tmp_path / "frozen.tar")
    after = read_common_rows(directory)
    upgrade.downgrade(directory, revision)
    assert {name: read_common_rows(directory)[name] for name in ("blobs", "image_blobs")} == {
        name: after[name] for name in ("blobs", "image_blobs")
    }
    assert list_tables(directory) - {"alembic_version"} == all_rows.keys()
    assert files_of(directory) == files
    upgrade.upgrade(directory)
    check(directory)


def test_an_upgrade_finds_the_platforms_of_images(tmp_path: Path) -> None:
    directory = unpack_frozen_cache("0005", tmp_path / "cache")
    upgrade.upgrade(directory)
    with Cache.open(directory) as cache:
        with cache.sql("SELECT name, os, architecture, complete FROM platforms WHERE name LIKE 's%'") as found:
            rows = sorted(found.rows)
        size = sum(blob.size for blob in cache.get_image_blobs("several:1")[1:5])
        with cache.sql("SELECT size FROM platforms WHERE name = 'several:1' AND architecture = 'amd64'") as found:
            assert list(found.rows) == [(size,)]
    assert rows == [
        ("several:1", "linux", "amd64", 1),
        ("several:1", "linux", "arm64", 1),
        ("some:1", "linux", "arm64", 1),
    ]


@pytest.mark.parametrize("revision", REVISIONS[:-1])
def test_an_index_that_lost_its_older_schema_keeps_names_times_and_holds(revision: str, tmp_path: Path) -> None:
    directory = unpack_frozen_cache(revision, tmp_path / "cache")
    shell = sqlite3.connect(directory / "index.db")
    shell.execute("DROP TABLE alembic_version")
    query = "SELECT repository, reference, {}, last_used_at FROM images ORDER BY repository, reference"
    is_old = revision < "0006"
    images = shell.execute(query.format("created_at" if is_old else "added_at")).fetchall()
    table = "holds" if is_old else "lasting_holds"
    holds = shell.execute(f"SELECT * FROM {table}").fetchall() if revision > "0001" else []
    shell.close()
    with Cache.open(directory, damaged=True) as cache:
        assert any("rebuilt" in (problem.repair or "") for problem in cache.verify(repair=True).problems)
    shell = sqlite3.connect(directory / "index.db")
    assert shell.execute(query.format("added_at")).fetchall() == images
    assert shell.execute("SELECT * FROM lasting_holds").fetchall() == holds
    shell.close()
    check(directory)


@pytest.mark.parametrize("revision", REVISIONS[:-1])
def test_a_downgrade_removes_exactly_what_the_upgrade_added(revision: str, tmp_path: Path) -> None:
    directory = unpack_frozen_cache(revision, tmp_path / "cache")
    before = read_rows(directory)
    upgrade.upgrade(directory)
    upgrade.downgrade(directory, revision)
    assert read_rows(directory) == before


def test_a_config_that_cannot_be_read_is_skipped_and_reported(tmp_path: Path) -> None:
    directory = unpack_frozen_cache("0001", tmp_path / "cache")
    with Cache.open(unpack_frozen_cache(REVISION, tmp_path / "newest")) as cache:
        lost = next(blob.path for blob in cache.get_image_blobs("hello:1") if blob.is_config)
    assert lost is not None
    (directory / lost.relative_to(tmp_path / "newest")).unlink()
    found = {str(name): detail for name, _, detail in upgrade.upgrade(directory).unread}
    assert found.keys() == {"broken:1", "hello:1"}
    assert "not JSON" in found["broken:1"]
    assert "is not in the cache" in found["hello:1"]
    with Cache.open(directory) as cache:
        assert cache.get_image("hello:1").os is None
        assert cache.get_image("frozen:2").os == "linux"


def find_config(directory: Path, name: str) -> Path:
    """Return the path of an image's config in a cache of any schema."""
    shell = sqlite3.connect(directory / "index.db")
    query = (
        "SELECT digest FROM images JOIN image_blobs ON image_id = images.id JOIN blobs ON blobs.id = blob_id "
        "WHERE role = 'config' AND repository || ':' || reference = ?"
    )
    ((digest,),) = shell.execute(query, (name,)).fetchall()
    shell.close()
    return directory / "blobs" / str(digest).replace(":", "/")


def test_a_corrupt_config_is_skipped_and_reported(tmp_path: Path) -> None:
    directory = unpack_frozen_cache("0001", tmp_path / "cache")
    path = find_config(directory, "hello:1")
    path.chmod(0o600)
    path.write_text(json.dumps({"os": "plan9"}))
    found = {str(name): detail for name, _, detail in upgrade.upgrade(directory).unread}
    assert "is damaged: run `cachedb verify`" in found["hello:1"]
    with Cache.open(directory) as cache:
        assert cache.get_image("hello:1").os is None


def test_a_backfill_that_runs_out_of_file_descriptors_stops_and_skips_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = unpack_frozen_cache("0001", tmp_path / "cache")

    def refuse_open(path: str, _flags: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files", path)

    monkeypatch.setattr(reader, "open_regular", refuse_open)
    with pytest.raises(StorageError, match="raise the limit on open files"):
        upgrade.upgrade(directory)
    assert schema.current(directory).pending == 7
    monkeypatch.undo()
    assert {str(name) for name, _, _ in upgrade.upgrade(directory).unread} == {"broken:1"}


# Upgrades


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return unpack_frozen_cache("0001", tmp_path / "old")


def list_backups(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "backups").iterdir() if path.name != ".lock")


def test_an_upgrade_makes_a_backup_with_all_rows(old: Path) -> None:
    before = read_rows(old)
    changed = upgrade.upgrade(old)
    assert changed.backup == old / "backups" / f"000001-0001-before-{REVISION}.db"
    assert changed.backup.stat().st_mode & 0o777 == old.stat().st_mode & 0o666
    shutil.copy(changed.backup, old.parent / "index.db")
    assert read_rows(old.parent) == before
    assert upgrade.upgrade(old) == (REVISION, REVISION, None, [])
    assert list_backups(old) == [f"000001-0001-before-{REVISION}.db"]


def test_a_backup_is_synced_before_it_has_its_name(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    fsync, rename = os.fsync, Path.rename

    def sync_and_note(descriptor: int) -> None:
        fsync(descriptor)
        calls.append(("sync", os.fstat(descriptor).st_ino))

    def note_and_rename(path: Path, target: Path) -> Path:
        calls.append(("name", path.stat().st_ino))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", sync_and_note)
    monkeypatch.setattr(Path, "rename", note_and_rename)
    backup = upgrade.back_up(cache.directory)
    file, folder = backup.stat().st_ino, backup.parent.stat().st_ino
    assert calls == [("sync", file), ("name", file), ("sync", folder)]


@pytest.mark.slow
def test_the_newest_automatic_backups_and_all_manual_ones_are_kept(old: Path) -> None:
    manual = upgrade.back_up(old)
    for _ in range(3):
        upgrade.upgrade(old)
        upgrade.downgrade(old, "0001")
    assert list_backups(old) == [
        manual.name,
        f"000005-{REVISION}-before-0001.db",
        f"000006-0001-before-{REVISION}.db",
        f"000007-{REVISION}-before-0001.db",
    ]


@pytest.mark.slow
def test_failed_and_killed_changes_do_not_accumulate_backups(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upgrade.upgrade(old)
    upgrade.downgrade(old, "0001")
    before = list_backups(old)

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(schema, "run_migrations", fail)
        for _ in range(5):
            with pytest.raises(KeyboardInterrupt):
                upgrade.upgrade(old)
            assert list_backups(old) == before
    script = """
        import os, sys
        from pathlib import Path
        from cachedb.index import schema
        from cachedb.operations import upgrade

        schema.run_migrations = lambda *_, **__: os.kill(os.getpid(), 9)
        upgrade.upgrade(Path(sys.argv[1]))
        """
    for _ in range(5):
        with start_python(script, old) as process:
            assert process.wait() == -9
    assert len(list_backups(old)) == backups.KEPT + 1
    upgrade.upgrade(old)
    assert len(list_backups(old)) == backups.KEPT


def test_the_error_of_an_old_backup_that_cannot_be_deleted_names_it(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(backups.KEPT):
        (old / "backups" / f"{number + 1:06}-0001-before-{REVISION}.db").touch()
    real = os.unlink

    def refuse(path: str, **options: Any) -> None:
        if str(path).endswith(".db"):
            raise PermissionError(1, "Operation not permitted", path)
        real(path, **options)

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(StorageError, match=r"cannot delete an old backup: Operation not permitted: '.*000001-"):
        upgrade.upgrade(old)


@pytest.mark.parametrize("step", ["0002", "head"])
def test_an_upgrade_stops_at_the_given_revision(old: Path, step: str) -> None:
    after = upgrade.upgrade(old, step).after
    assert read_revision(old) == after == {"0002": "0002", "head": REVISION}[step]


@pytest.mark.slow
def test_an_open_cache_works_again_after_a_downgrade_and_an_upgrade(
    directory: Path,
) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
        upgrade.downgrade(directory, "0002")
        for call in (cache.list_manifests, lambda: cache.add_blob(b"x"), lambda: cache.get_image("app:1")):
            with pytest.raises(SchemaMismatch, match=r"has schema 0002, .* run `cachedb db upgrade`"):
                call()
        upgrade.upgrade(directory)
        assert cache.get_image("app:1").architecture == "amd64"
        cache.add_blob(b"x")


def test_a_newer_schema_that_declares_itself_compatible_can_be_used(directory: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
        change_index(directory, "ALTER TABLE images ADD COLUMN stars INTEGER")
        change_index(directory, "UPDATE alembic_version SET version_num = '0099'")
        change_index(directory, f"PRAGMA user_version = {int(REVISION)}")
        cache.tag("app:1", "app:2")
    with Cache.open(directory) as cache:
        assert [image.reference for image in cache.list_manifests()] == ["1", "2"]
        assert cache.verify().problems == []
    assert schema.current(directory) == ("0099", REVISION, True, 0)
    for call in (upgrade.upgrade, drift_module.check, lambda path: upgrade.downgrade(path, "0001")):
        with pytest.raises(SchemaMismatch, match="newer"):
            call(directory)
    change_index(directory, "PRAGMA user_version = 99")
    with pytest.raises(SchemaMismatch, match="use a newer release"):
        Cache.open(directory)


@pytest.mark.slow
def test_every_migration_sets_the_oldest_schema_whose_release_can_use_it(directory: Path) -> None:
    Cache.open(directory).close()
    for revision in reversed(schema.history(directory)):
        assert revision.oldest <= revision.revision
        if read_revision(directory) != revision.revision:
            upgrade.downgrade(directory, revision.revision)
        shell = sqlite3.connect(directory / "index.db")
        assert shell.execute("PRAGMA user_version").fetchone() == (int(revision.oldest),)
        shell.close()
        upgrade.upgrade(directory)


@pytest.mark.slow
def test_one_of_many_processes_upgrades_and_all_continue(old: Path) -> None:
    output = run_python(
        """
        import os, sys
        from cachedb import Cache

        gate, open_gate = os.pipe()
        children = []
        for number in range(16):
            if (child := os.fork()) == 0:
                os.close(open_gate)
                os.read(gate, 1)
                with Cache.open(sys.argv[1], upgrade=True) as cache:
                    cache.add_blob(b"%d" % number)
                    assert cache.get_image("frozen:2").os == "linux"
                os._exit(0)
            children.append(child)
        os.close(open_gate)
        print({os.waitpid(child, 0)[1] for child in children})
        """,
        old,
    )
    assert output == "{0}\n"
    assert list_backups(old) == [f"000001-0001-before-{REVISION}.db"]
    check(old)


SECONDS = float(os.environ.get("CACHEDB_UPGRADE_SECONDS", "4"))


@pytest.mark.slow
def test_32_processes_lose_no_write_during_upgrades_and_downgrades(directory: Path) -> None:
    Cache.open(directory).close()
    output = run_python(
        """
        import mmap, os, random, sys, time, traceback
        from pathlib import Path
        from cachedb import Cache, SchemaMismatch
        from cachedb.operations import upgrade
        from tests.support.make import image, save

        directory, until = Path(sys.argv[1]), time.monotonic() + float(sys.argv[2])
        some_refused = mmap.mmap(-1, 1)  # shared by all processes

        def work(number):
            refused, done = 0, 0
            cache = None
            while time.monotonic() < until or not done or not some_refused[0]:
                try:
                    cache = cache or Cache.open(directory, upgrade=number % 8 == 0)
                    made = image(number, 100 + done % 5)
                    save(cache, f"app{number}:{done}", made)
                    assert cache.is_image_complete(f"app{number}:{done}")
                    done += 1
                    if done > 2:
                        cache.remove_manifest(f"app{number}:{done - 3}")
                    if done % 10 == 0:
                        cache.close()
                        cache = None
                except SchemaMismatch as error:
                    assert "cachedb db upgrade" in str(error)
                    refused += 1
                    some_refused[0] = 1
                    time.sleep(random.random() / 20)
            return refused, done

        children = {}
        for number in range(32):
            reader, writer = os.pipe()
            if (child := os.fork()) == 0:
                try:
                    text = "{} {}".format(*work(number))
                except BaseException:
                    text = traceback.format_exc()
                os.write(writer, text.encode())
                os._exit(0)
            os.close(writer)
            children[number] = child, reader
        changes = 0
        while time.monotonic() < until or not some_refused[0]:
            upgrade.downgrade(directory, ("0001", "0002")[changes % 2])
            upgrade.upgrade(directory)
            changes += 1
        upgrade.upgrade(directory)
        refused = 0
        with Cache.open(directory, upgrade=True) as cache:
            for number, (child, reader) in children.items():
                os.waitpid(child, 0)
                text = os.read(reader, 1 << 16).decode()
                assert text.replace(" ", "").isdecimal(), text
                refused, done = refused + int(text.split()[0]), int(text.split()[1])
                for last in range(max(0, done - 2), done):
                    assert cache.is_image_complete(f"app{number}:{last}")
                    assert cache.get_image(f"app{number}:{last}").architecture == "amd64"
        assert changes and refused
        print("all there")
        """,
        directory,
        SECONDS,
    )
    assert output == "all there\n"
    check(directory)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["upgrade", "downgrade"])
def test_a_change_killed_at_any_statement_leaves_the_old_or_the_new_schema(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = unpack_frozen_cache("0001" if how == "upgrade" else REVISION, tmp_path / "changed")
    before = read_common_rows(directory)
    left: dict[bytes, Path] = {}
    kills = 0

    def copy(*_: object) -> None:
        """Copy the directory, as a kill at this moment would leave it; of identical copies, keep one."""
        nonlocal kills
        kills += 1
        ignored = shutil.ignore_patterns("*-shm")  # shared memory has no meaning after a kill
        made = shutil.copytree(directory, tmp_path / str(kills), ignore=ignored)
        if left.setdefault(hash_tree(read_tree(made)), made) != made:
            shutil.rmtree(made)

    monkeypatch.setattr(upgrade, "_BATCH", 2)
    for name in ("before_cursor_execute", "commit"):
        event.listen(Engine, name, copy)
    try:
        upgrade.upgrade(directory) if how == "upgrade" else upgrade.downgrade(directory, "0001")
    finally:
        for name in ("before_cursor_execute", "commit"):
            event.remove(Engine, name, copy)
    copy()
    assert kills > 30
    found = set()
    for made in left.values():
        found.add(read_revision(made))
        kept = {name: table for name, table in read_common_rows(made).items() if name != "leases"}
        assert kept == {name: table for name, table in before.items() if name != "leases"}
        upgrade.upgrade(made)
        assert drift_module.check(made) == []
        with Cache.open(made) as cache:
            assert cache.get_image("frozen:2").os == "linux"
            if how == "downgrade":  # an image with some platforms became one that lacks the others
                assert {problem.kind for problem in cache.verify(repair=True).problems} <= {"index"}
        check(made)
    assert found == {"0001", REVISION}


@pytest.mark.slow
def test_an_interrupted_backfill_resumes(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "_BATCH", 2)
    calls: list[tuple[str, int, int]] = []

    class Stop(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        calls.append((what, done, total))
        if (what, done) == ("reading configs", 4):
            raise Stop

    with pytest.raises(Stop):
        upgrade.upgrade(old, progress=stop)
    assert {what for what, _, _ in calls} >= {"migrating", "reading configs"}
    assert schema.current(old) == (REVISION, REVISION, True, 3)
    assert [drift.kind for drift in drift_module.check(old)] == ["backfill"]
    with Cache.open(old) as cache:
        # The cache can be used, and has the values of the configs read so far.
        assert cache.get_image("docker.io/library/docker:2").os == "linux"
    again: list[tuple[str, int, int]] = []
    upgrade.upgrade(old, progress=lambda *step: again.append(step))
    assert again == [("reading configs", 2, 3), ("reading configs", 3, 3), ("reading configs", 3, 3)]
    assert drift_module.check(old) == []


@pytest.mark.parametrize("pending", [True, False])
def test_a_backfill_of_another_migration_is_left_pending(old: Path, pending: bool) -> None:
    upgrade.upgrade(old)
    change_index(old, "INSERT INTO backfills VALUES ('0004', 3)")
    if pending:
        change_index(old, f"INSERT INTO backfills VALUES ('{BACKFILL}', 1)")
    calls: list[tuple[str, int, int]] = []
    upgrade.upgrade(old, progress=lambda *step: calls.append(step))
    assert calls == ([("reading configs", 6, 6), ("reading configs", 6, 6)] if pending else [])
    shell = sqlite3.connect(old / "index.db")
    assert shell.execute("SELECT * FROM backfills").fetchall() == [("0004", 3)]
    shell.close()


def test_configs_are_read_without_the_write_lock(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse_unlocked(data: bytes, limit: int) -> ImageConfig:
        with (old / "locks" / "write.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return parse_config(data, limit)

    monkeypatch.setattr(describe, "parse_config", parse_unlocked)
    upgrade.upgrade(old)
    with Cache.open(old) as cache:
        assert cache.get_image("frozen:2").os == "linux"


def test_large_configs_are_written_in_separate_transactions(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "_BATCH_BYTES", 1)
    calls: list[int] = []
    upgrade.upgrade(old, progress=lambda what, done, _: calls.append(done) if what == "reading configs" else None)
    assert calls == [1, 2, 3, 4, 5, 6, 7, 7]
    assert drift_module.check(old) == []


def run_during_reading(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    """Call `work` after the first configs are read and before their values are written."""
    read = describe.read_documents

    def read_and_work(*arguments: Any) -> Any:
        found = read(*arguments)
        monkeypatch.setattr(describe, "read_documents", read)
        work()
        return found

    monkeypatch.setattr(describe, "read_documents", read_and_work)


@pytest.mark.slow
def test_an_image_that_changes_during_a_backfill_gets_its_new_description(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        with Cache.open(old) as cache:
            save(cache, "frozen:2", image(7, architecture="riscv64"))
            cache.remove_manifest("hello:1")

    run_during_reading(monkeypatch, work)
    upgrade.upgrade(old)
    with Cache.open(old) as cache:
        assert cache.get_image("frozen:2").architecture == "riscv64"
        assert cache.get_image("team/frozen:stable").author == "A. Author"
    check(old)


def test_a_config_that_reappears_during_a_backfill_is_read(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = find_config(old, "hello:1")
    aside = path.rename(old.parent / "aside")
    run_during_reading(monkeypatch, lambda: aside.rename(path))
    assert {str(name) for name, _, _ in upgrade.upgrade(old).unread} == {"broken:1"}
    with Cache.open(old) as cache:
        assert cache.get_image("hello:1").os == "linux"


def test_configs_that_another_process_backfilled_are_not_written_again(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upgrade, "_BATCH", 2)
    found: list[upgrade.Unread] = []
    run_during_reading(monkeypatch, lambda: found.extend(upgrade.upgrade(old).unread))
    calls: list[str] = []
    assert upgrade.upgrade(old, progress=lambda what, *_: calls.append(what)).unread == []
    assert "reading configs" not in calls
    assert [str(unread.name) for unread in found] == ["broken:1"]
    assert drift_module.check(old) == []


def test_too_little_disk_space_is_reported_before_any_change(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Database(old)) as database:
        prepare(database)  # a cache of an older release gets its marker
    before = content(old)
    usage = shutil.disk_usage(old)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(StorageError, match=r"was not changed: .* and 1000000 are free: free some space"):
        upgrade.upgrade(old)
    monkeypatch.undo()
    left = content(old)
    assert {name: data for name, data in left.items() if "locks" not in str(name)} == {
        name: data for name, data in before.items() if "locks" not in str(name)
    } | {name: data for name, data in left.items() if ".lock" in str(name) and "locks" not in str(name)}
    upgrade.upgrade(old)


def test_a_backup_that_cannot_be_written_stops_the_upgrade(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with closing(Database(old)) as database:
        prepare(database)  # a cache of an older release gets its marker
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="cannot make a backup of the index: No space left"):
        upgrade.upgrade(old)
    monkeypatch.undo()
    assert read_revision(old) == "0001"
    assert list_backups(old) == []


def test_a_change_that_would_break_references_is_rolled_back(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = schema.run_migrations

    def migrate_and_break(change: Any, connection: Any, *arguments: Any) -> None:
        real(change, connection, *arguments)
        connection.exec_driver_sql("UPDATE images SET manifest_id = 999 WHERE id = 1")

    monkeypatch.setattr(schema, "run_migrations", migrate_and_break)
    with pytest.raises(
        DamagedIndex, match=r"not changed: .* row 1 of images refers to a row of blobs that does not exist"
    ):
        upgrade.upgrade(old)
    assert read_revision(old) == "0001"


@pytest.mark.parametrize("call", ["upgrade", "downgrade", "check", "back_up"])
def test_a_directory_that_is_no_cache_is_unchanged(call: str, tmp_path: Path) -> None:
    def run(directory: Path) -> object:
        arguments = ("0001",) if call == "downgrade" else ()
        return OPERATIONS[call](directory, *arguments)

    with pytest.raises(NotInCache, match="there is no cache in"):
        run(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "diary").mkdir()
    change_index(tmp_path / "diary", "CREATE TABLE diary (entry TEXT)")
    before = content(tmp_path / "diary")
    with pytest.raises(NotACache, match="another program's database"):
        run(tmp_path / "diary")
    assert content(tmp_path / "diary") == before
    half = unpack_frozen_cache("0001", tmp_path / "half")
    data = (half / "index.db").read_bytes()
    (half / "index.db").write_bytes(data[: len(data) // 2])
    with pytest.raises(DamagedIndex):
        run(half)
    lost = unpack_frozen_cache("0001", tmp_path / "lost")
    with closing(Database(lost)) as database:
        prepare(database)  # a cache of an older release gets its marker
    (lost / "index.db").unlink()
    with pytest.raises(DamagedIndex, match="lost its index"):
        run(lost)


@pytest.mark.parametrize("call", ["current", "upgrade", "downgrade", "check", "back_up"])
@pytest.mark.parametrize("damage", ["gone", "empty", "no tables", "no schema"])
def test_a_lost_index_and_a_cache_not_created_yet_give_different_errors(
    directory: Path, damage: str, call: str
) -> None:
    def run() -> object:
        return OPERATIONS[call](directory, *(("0001",) if call == "downgrade" else ()))

    Cache.open(directory).close()
    (directory / "index.db").unlink()
    if damage == "empty":
        (directory / "index.db").touch()
    elif damage == "no tables":
        change_index(directory, "PRAGMA journal_mode = WAL")
    elif damage == "no schema":
        change_index(directory, "CREATE TABLE alembic_version (version_num TEXT)")
        change_index(directory, f"PRAGMA application_id = {APPLICATION_ID}")
        with pytest.raises(DamagedIndex, match="has lost its schema"):
            run()
        return
    if call == "current":
        assert run() == (None, REVISION, False, 0)
    else:
        with pytest.raises(NotInCache, match="there is no cache"):
            run()
    (directory / "blobs" / "sha256" / ("0" * 64)).touch()
    with pytest.raises(DamagedIndex, match=r"lost its index.db, but not its blobs"):
        run()


@pytest.mark.parametrize("call", ["upgrade", "downgrade", "check", "back_up"])
def test_missing_folders_are_created_again(old: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if call == "check":
        upgrade.upgrade(old)
        shutil.rmtree(old / "backups")
    elif call == "downgrade":
        upgrade.upgrade(old, "0002")
        shutil.rmtree(old / "backups")
    else:
        (old / "backups").rmdir()
    for name in ("locks", "trash", "ingest"):
        shutil.rmtree(old / name)
    run = OPERATIONS[call]
    arguments = ("0001",) if call == "downgrade" else ()
    run(old, *arguments)
    assert {path.name for path in old.iterdir() if path.is_dir()} >= {"backups", "locks", "trash", "ingest"}
    monkeypatch.setattr("cachedb.index.sqlite.prepare.explain_shared", lambda _: "the directory is on nfs")
    with pytest.raises(StorageError, match="the directory is on nfs"):
        run(old, *arguments)


@pytest.mark.parametrize("revision", ["9999", "x", "", "-9", "-x", "000"])
def test_an_unknown_revision_is_refused(directory: Path, revision: str) -> None:
    Cache.open(directory).close()
    for call in (upgrade.upgrade, upgrade.downgrade):
        with pytest.raises(InvalidRevision, match="is not one of the revisions 0001, "):
            call(directory, revision)
    assert read_revision(directory) == REVISION


def migrate(directory: Path, *arguments: Any, **options: Any) -> None:
    with closing(Database(directory)) as index:
        schema.migrate(index, *arguments, **options)


@pytest.mark.slow
@pytest.mark.parametrize("revision", ["0000", "00025", "0002a", "", None])
def test_a_cache_with_a_schema_of_no_release_is_unchanged(directory: Path, revision: str | None) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
    copy = upgrade.back_up(directory)
    if revision is None:
        change_index(directory, "DELETE FROM alembic_version")
    else:
        change_index(directory, f"UPDATE alembic_version SET version_num = '{revision}'")
    before, kept = read_rows(directory), list_backups(directory)
    if not revision:
        for look in (schema.current, drift_module.check):
            with pytest.raises(DamagedIndex, match="lost its schema"):
                look(directory)
    for call in (
        upgrade.upgrade,
        lambda path: upgrade.upgrade(path, "0001"),
        lambda path: upgrade.downgrade(path, "0001"),
        lambda path: upgrade.downgrade(path, "-1"),
        migrate,
        lambda path: migrate(path, "0001", down=True),
    ):
        with pytest.raises(SchemaMismatch if revision else DamagedIndex, match=r"no release of|lost its schema"):
            call(directory)
    assert (read_rows(directory), list_backups(directory)) == (before, kept)
    restore.restore(directory, copy)
    check(directory)


@pytest.mark.slow
def test_the_error_of_a_trigger_that_blocks_a_change_quotes_it(cachedb: Run, old: Path) -> None:
    refuse = "BEGIN SELECT RAISE({}, 'not on a Friday'); END"
    for how in ("ABORT", "FAIL", "ROLLBACK"):
        change_index(old, f"CREATE TRIGGER mine BEFORE UPDATE ON alembic_version {refuse.format(how)}")
        done = cachedb("--dir", old, "db", "upgrade")
        expected = "cachedb: the schema was not changed: SQLite refused a row: not on a Friday\n"
        assert (done.returncode, done.stderr) == (1, expected)
        assert (read_revision(old), list_backups(old)) == ("0001", [])
        change_index(old, "DROP TRIGGER mine")
    change_index(old, f"CREATE TRIGGER mine BEFORE UPDATE ON images {refuse.format('ABORT')}")
    with pytest.raises(
        StorageError, match=rf"schema is {REVISION}, but .* not on a Friday: continue it with `cachedb db upgrade`"
    ):
        upgrade.upgrade(old)
    with pytest.raises(StorageError, match="not on a Friday"):
        Cache.open(old, upgrade=True)
    change_index(old, "DROP TRIGGER mine")
    upgrade.upgrade(old)
    assert drift_module.check(old) == []


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("CREATE INDEX mine ON images (author)", "the index 'mine' uses what the change removes (no such column"),
        (
            "CREATE VIEW [my view] AS SELECT author FROM images",
            "the view 'my view' uses what the change removes (no such",
        ),
        (
            "CREATE VIEW mine AS SELECT * FROM image_labels",
            "the view 'mine' uses what the change removes (no such table",
        ),
        (
            "CREATE TRIGGER mine AFTER INSERT ON blobs BEGIN SELECT author FROM images; END",
            "the trigger 'mine' uses what the change removes (no such column",
        ),
    ],
)
def test_objects_over_a_removed_column_must_be_dropped_first(directory: Path, sql: str, message: str) -> None:
    Cache.open(directory).close()
    change_index(directory, sql)
    with pytest.raises(StorageError, match=r"^the schema was not changed: .*: drop it first$") as caught:
        upgrade.downgrade(directory, "0002")
    assert message in str(caught.value)
    assert (read_revision(directory), list_backups(directory)) == (REVISION, [])


def test_upgrade_refuses_an_older_revision_and_downgrade_a_newer_one(directory: Path) -> None:
    Cache.open(directory).close()
    with pytest.raises(SchemaMismatch, match=r"newer than 0001: use `cachedb db downgrade 0001`"):
        upgrade.upgrade(directory, "0001")
    upgrade.downgrade(directory, "0001")
    with pytest.raises(SchemaMismatch, match=r"older than 0002: use `cachedb db upgrade 0002`"):
        upgrade.downgrade(directory, "0002")


# Drift


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sql", "kind", "name"),
    [
        ("CREATE TABLE diary (entry TEXT)", "table", "diary"),
        ("DROP TABLE image_labels", "table", "image_labels"),
        ("DROP INDEX ix_image_blobs_blob_id", "index", "ix_image_blobs_blob_id"),
        ("CREATE INDEX mine ON blobs (size)", "index", "mine"),
        ("CREATE TRIGGER mine AFTER INSERT ON images BEGIN SELECT 1; END", "trigger", "mine"),
        ("CREATE VIEW mine AS SELECT 1", "view", "mine"),
        ("ALTER TABLE blobs ADD COLUMN colour TEXT", "column", "blobs.colour"),
        ("ALTER TABLE images DROP COLUMN some_platforms", "column", "images.some_platforms"),
        ("PRAGMA user_version = 1", "pragma", "user_version"),
        ("PRAGMA journal_mode = DELETE", "pragma", "journal_mode"),
    ],
)
def test_drift_is_found(directory: Path, sql: str, kind: str, name: str) -> None:
    Cache.open(directory).close()
    assert drift_module.check(directory) == []
    change_index(directory, sql)
    assert (kind, name) in [drift[:2] for drift in drift_module.check(directory)]


def test_an_index_over_an_expression_is_drift_without_a_warning(cachedb: Run, directory: Path) -> None:
    Cache.open(directory).close()
    change_index(directory, "CREATE INDEX mine ON blobs (size + 1)")
    done = cachedb("db", "check", "--format", "json")
    assert (done.returncode, done.stderr) == (1, "")
    assert [(drift["kind"], drift["name"]) for drift in json.loads(done.stdout)] == [("index", "mine")]


@pytest.mark.parametrize("version", ["0002", "0009", "mine"])
def test_a_second_row_of_alembic_version_is_drift_and_blocks_changes(directory: Path, version: str) -> None:
    Cache.open(directory).close()
    change_index(directory, f"INSERT INTO alembic_version VALUES ('{version}')")
    assert [drift[:2] for drift in drift_module.check(directory)] == [("row", "alembic_version")]
    if version == "0002":
        change_index(directory, f"DELETE FROM alembic_version WHERE version_num = '{REVISION}'")
        change_index(directory, f"INSERT INTO alembic_version VALUES ('{REVISION}')")
        with pytest.raises(SchemaMismatch, match="delete all but the one"):
            upgrade.upgrade(directory)
    with pytest.raises(SchemaMismatch, match="delete all but the one"):
        upgrade.downgrade(directory, "0001")
    assert list_backups(directory) == []


def test_a_changed_constraint_is_drift(directory: Path) -> None:
    Cache.open(directory).close()
    shell = sqlite3.connect(directory / "index.db")
    shell.execute("PRAGMA writable_schema = ON")
    shell.execute("UPDATE sqlite_master SET sql = replace(sql, 'size >= 0', 'size >= 9') WHERE name = 'blobs'")
    shell.commit()
    shell.close()
    (drift,) = drift_module.check(directory)
    assert drift[:2] == ("table", "blobs")
    assert "size >= 9" in drift.detail


# Backups and restoring them


def test_a_backup_is_a_sound_snapshot_while_others_write(cache: Cache, tmp_path: Path) -> None:
    save(cache, "app:1", image(1))
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            save(cache, f"busy:{number}", image(2, 100 + number))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        copies = [upgrade.back_up(cache.directory, tmp_path / f"{number}.db") for number in range(5)]
    finally:
        stop.set()
        thread.join()
    for copy in copies:
        shell = sqlite3.connect(copy)
        assert shell.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert shell.execute("PRAGMA foreign_key_check").fetchall() == []
        shell.close()
    with pytest.raises(CacheError, match="already exists: name another file"):
        upgrade.back_up(cache.directory, copies[0])


@pytest.mark.slow
def test_a_restored_backup_has_its_images_and_marks_lost_blobs_as_missing(cache: Cache) -> None:
    save(cache, "kept:1", image(1))
    save(cache, "gone:1", image(2))
    gone = cache.get_image_blobs("gone:1")
    leased = cache.add_blob(b"leased by a live session")
    backup = upgrade.back_up(cache.directory)
    cache.remove_manifest("gone:1")
    save(cache, "late:1", image(3))
    cache.tag("late:1", "kept:1")
    found = restore.restore(cache.directory, backup)
    assert found[:3] == (2, 1, 4)
    assert found.old is not None
    with closing(sqlite3.connect(found.old)) as shell:
        assert shell.execute("SELECT count(*) FROM images").fetchone() == (2,)
    assert [str(one.name) for one in cache.list_manifests()] == ["gone:1", "kept:1"]
    assert cache.get_image("kept:1").digest == image(1).digest
    assert not cache.is_image_complete("gone:1")
    assert cache.collect_garbage().blobs == 3  # three blobs of the late image, but not the leased blob
    assert cache.has_blob(leased)
    save(cache, "gone:1", image(2))
    assert cache.get_image_blobs("gone:1") == gone
    cache.close()
    check(cache.directory)


def test_restoring_a_backup_keeps_the_current_holds(cache: Cache) -> None:
    save(cache, "app:1", image(1))
    backup = upgrade.back_up(cache.directory)
    (hold,) = cache.add_hold("app:1")
    restore.restore(cache.directory, backup)
    assert cache.list_holds() == [hold]


@pytest.mark.slow
@pytest.mark.parametrize("revision", REVISIONS)
def test_a_backup_of_any_schema_can_be_restored(revision: str, tmp_path: Path) -> None:
    directory = unpack_frozen_cache(REVISION, tmp_path / "cache")
    old = unpack_frozen_cache(revision, tmp_path / "old")
    before = [row["repository"] for row in read_common_rows(old)["images"]]
    restore.restore(directory, old / "index.db")
    assert [row["repository"] for row in read_common_rows(directory)["images"]] == before
    assert drift_module.check(directory) == []
    with Cache.open(directory) as cache:
        assert cache.get_image("hello:1").os == "linux"
    check(directory)


@pytest.mark.parametrize("damage", ["lost", "garbage"])
def test_a_backup_replaces_a_lost_or_damaged_index(directory: Path, damage: str) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
    backup = upgrade.back_up(directory)
    (directory / "index.db").unlink()
    if damage == "garbage":
        (directory / "index.db").write_bytes(b"garbage" * 1000)
    assert restore.restore(directory, backup)[:3] == (1, 0, 0)
    with Cache.open(directory) as cache:
        assert cache.is_image_complete("app:1")
    check(directory)


def test_a_child_manifest_stored_after_the_backup_is_expanded(cache: Cache) -> None:
    child = image(1)
    cache.save_manifest("several:1", index(child))
    backup = upgrade.back_up(cache.directory)
    for digest, data in child.blobs.items():
        cache.save_blob(digest, data)
    restore.restore(cache.directory, backup)
    assert cache.is_image_complete("several:1")


def test_an_invalid_backup_is_refused_and_the_index_unchanged(cache: Cache, tmp_path: Path) -> None:
    save(cache, "app:1", image(1))
    backup = upgrade.back_up(cache.directory, tmp_path / "backup.db")
    data = backup.read_bytes()
    (tmp_path / "half.db").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.db").write_text("no database" * 1000)
    (tmp_path / "empty.db").touch()
    change_index(tmp_path, "CREATE TABLE diary (entry TEXT)")
    (tmp_path / "link.db").symlink_to(cache.directory / "index.db")
    future = shutil.copy(backup, tmp_path / "future.db")
    shell = sqlite3.connect(future)
    shell.execute("UPDATE alembic_version SET version_num = '9999'")
    shell.execute("PRAGMA user_version = 9999")
    shell.commit()
    shell.close()
    before = read_rows(cache.directory)
    for name, error, text in (
        ("nothing.db", NotInCache, "there is no backup"),
        ("half.db", DamagedIndex, "is damaged, and was not restored"),
        ("text.db", DamagedIndex, "is damaged, and was not restored"),
        ("empty.db", NotACache, "is not a backup"),
        ("index.db", NotACache, "is not a backup"),
        ("link.db", NotACache, "is the index itself"),
        ("future.db", SchemaMismatch, "use a newer release"),
    ):
        with pytest.raises(error, match=text):
            restore.restore(cache.directory, tmp_path / name)
        assert read_rows(cache.directory) == before
    with pytest.raises(NotACache, match="is not a cache"):
        restore.restore(tmp_path, backup)
    cache.close()
    check(cache.directory)


TAMPERED = {
    "trigger": "CREATE TRIGGER evil AFTER INSERT ON images BEGIN DELETE FROM image_blobs; END",
    "view": "CREATE VIEW evil AS SELECT load_extension('x')",
    "table": "CREATE TABLE evil (x)",
    "index": "CREATE INDEX evil ON blobs (size)",
}


@pytest.mark.slow
@pytest.mark.parametrize("revision", REVISIONS)
def test_a_backup_with_a_foreign_schema_object_is_refused(revision: str, directory: Path, tmp_path: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
    before = read_rows(directory)
    old = unpack_frozen_cache(revision, tmp_path / "old")
    for kind, statement in TAMPERED.items():
        change_index(old, statement)
        message = rf"{kind} 'evil': no migration creates it: drop these objects"
        with pytest.raises(NotACache, match=rf"changed by another program, and was not restored: {message}"):
            restore.restore(directory, old / "index.db")
        assert read_rows(directory) == before
        change_index(old, f"DROP {kind} evil")
    restore.restore(directory, old / "index.db")
    check(directory)


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        (
            "UPDATE sqlite_master SET name = 'sqlite_evil', sql = replace(sql, 'evil', 'sqlite_evil') "
            "WHERE name = 'evil'",
            "trigger 'sqlite_evil': no migration",
        ),
        (
            "UPDATE sqlite_master SET sql = replace(sql, 'size >= 0', 'size >= 9') WHERE name = 'blobs'",
            "'blobs': it is",
        ),
        (
            "DELETE FROM sqlite_master WHERE name = 'ix_image_blobs_blob_id'",
            "'ix_image_blobs_blob_id': it is",
        ),
    ],
)
def test_a_backup_with_a_forged_schema_is_refused(directory: Path, tmp_path: Path, sql: str, message: str) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
    upgrade.back_up(directory, tmp_path / "index.db")
    if "evil" in sql:
        change_index(tmp_path, TAMPERED["trigger"])
    shell = sqlite3.connect(tmp_path / "index.db")
    shell.execute("PRAGMA writable_schema = ON")
    shell.execute(sql)
    shell.commit()
    shell.close()
    with pytest.raises(NotACache, match=message):
        restore.restore(directory, tmp_path / "index.db")
    assert list_repositories(directory) == ["app"]


def list_repositories(directory: Path) -> list[str]:
    with Cache.open(directory) as cache:
        return [name.repository for name in cache.list_names()]


def test_a_backup_of_a_newer_schema_with_a_trigger_is_refused(directory: Path, tmp_path: Path) -> None:
    Cache.open(directory).close()
    backup = upgrade.back_up(directory, tmp_path / "index.db")
    change_index(tmp_path, "UPDATE alembic_version SET version_num = '9999'")
    change_index(tmp_path, f"PRAGMA user_version = {int(REVISION)}")
    change_index(tmp_path, TAMPERED["trigger"])
    with pytest.raises(NotACache, match="trigger 'evil': no migration creates it"):
        restore.restore(directory, backup)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TAMPERED)
def test_a_rebuild_takes_only_rows_from_a_backup(kind: str, directory: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
    backup = upgrade.back_up(directory)
    shell = sqlite3.connect(backup)
    shell.execute(TAMPERED[kind])
    shell.commit()
    shell.close()
    (directory / "index.db").unlink()
    with Cache.open(directory, damaged=True) as cache:
        cache.verify(repair=True)
    assert drift_module.check(directory) == []
    check(directory)
    assert list_repositories(directory) == ["app"]


@pytest.mark.slow
def test_statistics_page_size_and_encoding_are_no_drift(directory: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
    shell = sqlite3.connect(directory / "index.db", isolation_level=None)
    for sql in ("ANALYZE", "PRAGMA journal_mode = DELETE", "PRAGMA page_size = 8192", "PRAGMA auto_vacuum = FULL"):
        shell.execute(sql)
    for sql in ("PRAGMA encoding = 'UTF-16'", "VACUUM", "PRAGMA journal_mode = WAL"):
        shell.execute(sql)
    shell.close()
    assert drift_module.check(directory) == []
    backup = upgrade.back_up(directory)
    assert restore.restore(directory, backup).images == 1
    check(directory)


def test_an_index_of_an_incompatible_newer_schema_is_not_replaced(directory: Path, tmp_path: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
    backup = upgrade.back_up(directory, tmp_path / "backup.db")
    change_index(directory, "UPDATE alembic_version SET version_num = '9999'")
    change_index(directory, "PRAGMA user_version = 9999")
    before = content(directory)
    with pytest.raises(SchemaMismatch, match="use a newer release"):
        restore.restore(directory, backup)
    assert content(directory) == before
    change_index(directory, f"PRAGMA user_version = {int(REVISION)}")  # now this release can use the schema
    assert restore.restore(directory, backup).images == 1
    assert schema.current(directory).revision == REVISION


def test_a_backup_of_a_compatible_newer_schema_is_restored(directory: Path, tmp_path: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
    backup = upgrade.back_up(directory, tmp_path / "index.db")
    change_index(tmp_path, "UPDATE alembic_version SET version_num = '9999'")
    change_index(tmp_path, f"PRAGMA user_version = {int(REVISION)}")
    assert restore.restore(directory, backup).images == 1
    assert schema.current(directory).revision == "9999"


def test_restoring_does_not_change_the_backup(directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
        for name in ("index.db", "index.db-wal"):  # a backup made by copying files
            shutil.copy(directory / name, copy / name)
            assert (copy / name).stat().st_size
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    assert restore.restore(directory, copy / "index.db").images == 1
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert (directory / "index.db").stat().st_mode & 0o777 == 0o600


def test_a_restore_reports_unreadable_configs(directory: Path, tmp_path: Path) -> None:
    old = unpack_frozen_cache("0001", tmp_path / "old")
    with Cache.open(directory):
        pass
    for path in old.glob("blobs/sha256/*"):
        shutil.copy(path, directory / "blobs" / "sha256" / path.name)
    unread = restore.restore(directory, old / "index.db").unread
    assert {str(config.name) for config in unread} == {"broken:1"}


@pytest.mark.slow
def test_other_processes_keep_working_while_a_backup_is_restored(directory: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "kept:1", image(1))
    backup = upgrade.back_up(directory)
    script = """
        import sys
        from pathlib import Path
        from cachedb import Cache
        directory, number = Path(sys.argv[1]), int(sys.argv[2])
        print("begun", flush=True)
        with Cache.open(directory) as cache:
            done = 0
            while not (directory / "enough").exists() or not done:
                assert cache.is_image_complete("kept:1")
                cache.add_blob(b"%d %d" % (number, done))
                with Cache.open(directory) as other:
                    assert str(other.list_manifests()[0].name) == "kept:1"
                done += 1
        print("done", done, flush=True)
    """
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(running(script, directory, number)) for number in range(4)]
        for _ in range(12):
            assert restore.restore(directory, backup).images == 1
        (directory / "enough").touch()
        for process in others:
            assert process.stdout is not None
            output = process.stdout.read()
            assert output.startswith("done "), output
            assert process.wait(120) == 0
    (directory / "enough").unlink()
    check(directory)


@pytest.mark.slow
def test_a_rebuild_restores_names_from_a_backup_of_an_older_schema(tmp_path: Path) -> None:
    directory = unpack_frozen_cache("0001", tmp_path / "cache")
    upgrade.upgrade(directory)
    (directory / "index.db").write_bytes(b"garbage" * 1000)
    with Cache.open(directory, damaged=True) as cache:
        cache.verify(repair=True)
    with Cache.open(directory) as cache:
        assert {one.repository for one in cache.list_manifests()} == {
            "broken",
            "docker.io/library/docker",
            "frozen",
            "hello",
            "incomplete",
            "several",
            "team/frozen",
        }
        assert cache.get_image("frozen:2").author == "A. Author"


def test_backups_are_numbered_independently_of_the_clock(cache: Cache) -> None:
    (cache.directory / "backups" / "000041-mine.db").touch()
    (cache.directory / "backups" / "notes.db").touch()
    assert upgrade.back_up(cache.directory).name == f"000042-{REVISION}.db"
    assert [path.name for path in backups.list_backups(cache.directory)] == [
        f"000042-{REVISION}.db",
        "000041-mine.db",
        "notes.db",
    ]


@pytest.mark.slow
def test_a_backup_deletes_the_files_of_killed_backups_only(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "mine.db.half").write_text("mine")
    (tmp_path / "mine.db.half-journal").write_text("mine")
    assert upgrade.back_up(cache.directory, tmp_path / "mine.db") == tmp_path / "mine.db"
    mine = sorted(path.name for path in tmp_path.iterdir() if path != cache.directory)
    assert mine == ["mine.db", "mine.db.half", "mine.db.half-journal"]
    script = """
        import os, sys
        from pathlib import Path
        from cachedb.index.sqlite import backups
        from cachedb.operations import upgrade

        backups._OPCODES = 10
        upgrade.back_up(Path(sys.argv[1]), Path(sys.argv[2]), progress=lambda *_: os.kill(os.getpid(), 9))
        """
    for folder in (tmp_path, cache.directory / "backups"):
        with start_python(script, cache.directory, folder / "killed.db") as process:
            assert process.wait() == -9
        (half,) = (path for path in folder.glob(".backup-*") if not path.name.endswith("-journal"))
        half.with_name(f"{half.name}-journal").touch()
        upgrade.back_up(cache.directory, folder / "killed.db")
    assert list_backups(cache.directory) == ["killed.db"]
    assert (tmp_path / "mine.db.half").read_text() == "mine"


def test_paths_of_a_cache_and_a_backup_may_be_no_text(cachedb: Run, tmp_path: Path) -> None:
    old = unpack_frozen_cache("0001", Path(f"{tmp_path}/old\udcff"))
    assert upgrade.upgrade(old).after == REVISION
    copy = Path(f"{tmp_path}/copy\udcff")
    done = cachedb("--dir", old, "db", "backup", copy, text=False)
    assert (done.returncode, done.stdout) == (0, bytes(copy) + b"\n"), done.stderr
    assert copy.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("nowhere/x.db", 1, "there is no folder for '{path}': make '{path.parent}' first"),
        ("file/x.db", 1, "cannot make a backup of the index: Not a directory: '{path}'"),
        ("x" * 252, 0, ""),
        ("x" * 256, 1, "cannot make a backup of the index: File name too long: '{path}'"),
        (
            "cache/blobs/sha256/x.db",
            1,
            "'{path}' is inside the cache: name a file elsewhere, or in its folder backups/",
        ),
        ("cache/x.db", 1, "'{path}' is inside the cache: name a file elsewhere, or in its folder backups/"),
        ("link/x.db", 1, "'{path}' is inside the cache: name a file elsewhere, or in its folder backups/"),
        ("cache/backups/x.db", 0, ""),
    ],
)
def test_the_error_of_an_invalid_backup_path_names_only_that_path(
    cachedb: Run, directory: Path, tmp_path: Path, name: str, code: int, message: str
) -> None:
    Cache.open(directory).close()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(directory / "blobs")
    path = tmp_path / name
    done = cachedb("db", "backup", path)
    assert done.stderr == (f"cachedb: {message.format(path=path)}\n" if message else "")
    assert done.returncode == code
    assert os.path.lexists(tmp_path / "cache" / "backups" / "x.db") == (name == "cache/backups/x.db")


def test_the_error_of_a_read_only_folder_names_the_given_file(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse_part(path: Any, *arguments: Any, **options: Any) -> int:
        if ".backup-" in str(path):
            raise PermissionError(13, "Permission denied", "a random name")
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse_part)
    with pytest.raises(StorageError) as caught:
        upgrade.back_up(cache.directory, tmp_path / "x.db")
    message = (
        f"cannot make a backup of the index: Permission denied: '{tmp_path / 'x.db'}': check the owner and mode of"
    )
    assert str(caught.value).startswith(message)


@pytest.mark.slow
def test_an_upgrade_reports_the_progress_of_its_backup(old: Path) -> None:
    shell = sqlite3.connect(old / "index.db")
    shell.executemany(
        "INSERT INTO blobs (digest, size) VALUES (?, 1)", [(f"sha256:{number:064x}",) for number in range(20_000)]
    )
    shell.commit()
    shell.close()
    calls: list[tuple[str, int, int]] = []
    upgrade.upgrade(old, progress=lambda *step: calls.append(step))
    parts = [done for what, done, _ in calls if what == "backing up"]
    assert len(parts) > 3
    assert parts == sorted(parts)


# The command line


@pytest.mark.slow
def test_the_db_commands_print_json(cachedb: Run, old: Path) -> None:
    def run(*arguments: str, code: int = 0) -> Any:
        done = cachedb("--dir", old, "db", *arguments, "--format", "json")
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout) if done.stdout else done.stderr

    assert run("current") == {"revision": "0001", "newest": REVISION, "usable": False, "pending": 0}
    assert [(entry["revision"], entry["current"]) for entry in run("history")][-1] == ("0001", True)
    assert "run `cachedb db upgrade`" in run("check", code=1)
    changed = run("upgrade")
    assert changed["backup"] == str(old / "backups" / f"000001-0001-before-{REVISION}.db")
    assert [entry["name"] for entry in changed["unread"]] == ["broken:1"]
    assert run("check") == []
    assert run("backup")["size"] > 0
    assert run("downgrade", "0002")["after"] == "0002"
    assert cachedb("--dir", old, "ls").returncode == 1
    restored = run("restore", str(old / "backups" / f"000002-{REVISION}.db"))
    assert (restored["images"], restored["incomplete"]) == (7, 1)
    change_index(old, "DROP INDEX ix_image_blobs_blob_id")
    assert run("check", code=1)[0]["name"] == "ix_image_blobs_blob_id"
    assert run("restore", str(old / "none.db"), code=3).startswith("cachedb: there is no backup")


@pytest.mark.slow
def test_the_db_commands_print_text(cachedb: Run, old: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        done = cachedb("--dir", old, "db", *arguments)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    assert "run `cachedb db upgrade`" in run("current")
    assert "holds that outlive a process" in run("history")
    done = cachedb("--dir", old, "db", "upgrade")
    assert done.stdout.startswith(f"schema 0001 became {REVISION}; the old index is ")
    assert "skipped the config" in done.stderr
    assert run("upgrade") == f"the cache already has schema {REVISION}\n"
    assert run("current") == f"{REVISION}, the newest\n"
    assert run("check") == "no differences\n"
    path = run("backup").strip()
    assert run("restore", path).startswith("images: 7, incomplete: 1; ")
    assert "no cache yet" in cachedb("--dir", tmp_path / "new", "db", "current").stdout
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("upgrade", "nonsense"), "'nonsense' is not one of the revisions"),
        (("downgrade", "nonsense"), "'nonsense' is not one of the revisions"),
        (("downgrade", "-9"), "'-9' is not one of the revisions"),
        (("backup", ""), "the file name is empty"),
        (("backup", "/"), "'/' already exists: name another file"),
        (("backup", __file__), f"{__file__!r} already exists: name another file"),
    ],
)
def test_wrong_arguments_of_db_commands_exit_with_2(
    cachedb: Run, directory: Path, arguments: tuple[str, ...], message: str
) -> None:
    Cache.open(directory).close()
    done = cachedb("db", *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"cachedb: {message}")
    assert list_backups(directory) == []


@pytest.fixture(scope="module")
def large_old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an old cache whose backup takes a while; tests copy it."""
    directory = unpack_frozen_cache("0001", tmp_path_factory.mktemp("large") / "old")
    change_index(
        directory,
        "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 300000)"
        " INSERT INTO blobs (digest, size) SELECT printf('sha256:%064x', n), 1 FROM n",
    )
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("command", ["backup", "upgrade"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_backup_with_the_exit_code_of_the_signal(
    large_old: Path, tmp_path: Path, command: str, number: signal.Signals, code: int
) -> None:
    def has_begun(directory: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):  # the backup got its name meanwhile
            return any(path.stat().st_size for path in (directory / "backups").glob(".backup-*"))
        return False

    for turn in range(20):
        directory = shutil.copytree(large_old, tmp_path / f"turn-{turn}")
        command_line = [sys.executable, "-m", "cachedb", "--dir", str(directory), "db", command]
        with subprocess.Popen(command_line, stderr=subprocess.PIPE, text=True) as process:
            wait_until(lambda: has_begun(directory) or process.poll() is not None)  # noqa: B023 - called at once
            process.send_signal(number)
            _, stderr = process.communicate(timeout=60)
        if not list_backups(directory):
            break
        # The backup was complete before the signal arrived, so try again.
    assert (process.returncode, stderr.strip()) == (code, "cachedb: interrupted" if code == 130 else "")
    assert list_backups(directory) == []
    assert read_revision(directory) == "0001"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["current", "history", "upgrade", "downgrade", "check", "backup", "restore"])
def test_an_empty_directory_name_is_refused(cachedb: Run, command: str) -> None:
    done = cachedb("--dir", "", "db", command, *(["0001"] if command in ("downgrade", "restore") else []))
    assert (done.returncode, done.stderr) == (
        1,
        "cachedb: the name of the cache directory is empty: name a directory, or leave it out for the default\n",
    )


def test_opening_reads_the_revision_with_one_statement(directory: Path) -> None:
    Cache.open(directory).close()
    seen: list[str] = []

    def note_statement(_c: object, _d: object, statement: str, *_: object) -> None:
        seen.append(statement)

    event.listen(Engine, "before_cursor_execute", note_statement)
    try:
        with closing(Database(directory)) as index:
            upgrade.prepare(index)
    finally:
        event.remove(Engine, "before_cursor_execute", note_statement)
    assert sum("version_num" in statement for statement in seen) == 1
