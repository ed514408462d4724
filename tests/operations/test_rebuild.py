"""Rebuilding: after any damage to index.db the cache opens again, and every intact blob and image is kept."""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import signal
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, event

from cachedb import Cache, DamagedIndex, NotACache, NotOurs, SchemaMismatch, StorageError
from cachedb.disk.layout import blob_path
from cachedb.index import schema
from cachedb.index.sqlite import backups
from cachedb.index.sqlite.database import Database
from cachedb.oci.digests import Digest
from cachedb.operations import rebuild
from cachedb.operations.verify import Problem
from tests.conftest import Run, files_of, running, start_python
from tests.support import make
from tests.support.index_file import change_index
from tests.support.make import digest_of, image, save
from tests.support.promises import check

EXAMPLES = int(os.environ.get("CACHEDB_FUZZ", "60")) // 3
NAMES = [f"team/app-{number}:{'x' * 60}" for number in range(30)]
IMAGES = {name: image(number, number + 1, size=20) for number, name in enumerate(NAMES)}
MANY = (image(51, size=20), image(52, architecture="arm64", size=20))
INDEX = make.index(*MANY)
SIGNATURE = b"a signature"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a cache with thirty images, one attached blob, an image index of two platforms, and a hold."""
    directory = tmp_path_factory.mktemp("prepared") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        with Cache.open(directory) as cache:
            for name, made in IMAGES.items():
                save(cache, name, made)
            make.save_index(cache, "many:1", *MANY)
            signature = cache.add_blob(SIGNATURE)
            cache.associate_blob_with_image(NAMES[0], signature, media_type="text/x-signature")
            cache.add_hold(NAMES[1])
    return directory


@pytest.fixture
def made(prepared: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the prepared cache; no process has the copy open."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    shutil.copytree(prepared, directory)
    return directory


def back_up(directory: Path, name: str) -> Path:
    (directory / "backups").mkdir(exist_ok=True)
    return shutil.copyfile(directory / "index.db", directory / "backups" / name)


def repair_cache(directory: Path) -> list[Problem]:
    with Cache.open(directory, damaged=True) as cache:
        found = cache.verify(repair=True).problems
        assert cache.verify().problems == []
    return found


def read_names(directory: Path) -> dict[str, str]:
    with Cache.open(directory) as cache:
        return {str(image.name): image.digest for image in cache.list_manifests()}


def assert_complete(directory: Path, files: dict[str, int]) -> None:
    """Check that all blobs are stored, and every image under its own name or a recovered one."""
    assert files_of(directory) == files
    found = read_names(directory)
    wanted = {**{name: made.digest for name, made in IMAGES.items()}, "many:1": digest_of(INDEX)}
    for name, digest in wanted.items():
        assert found.get(name) == digest or found.get(f"recovered@{digest}") == digest
    with Cache.open(directory) as cache:
        assert all(image.complete for image in cache.list_manifests())


def assert_all_names(directory: Path) -> None:
    assert set(read_names(directory)) == {*NAMES, "many:1"}


# A lost index


def test_a_cache_that_lost_its_index_is_refused_with_advice(made: Path) -> None:
    (made / "index.db").unlink()
    with pytest.raises(DamagedIndex, match=r"`cachedb verify --repair` rebuilds it from the newest backup"):
        Cache.open(made)
    with Cache.open(made, damaged=True) as cache:
        (problem,) = cache.verify().problems
        assert (problem.kind, problem.digest, problem.repair) == ("index", None, None)
        with pytest.raises(DamagedIndex):
            cache.list_manifests()
    assert not (made / "index.db").exists()
    assert not (made / "quarantine").exists()


@pytest.mark.slow
def test_without_backups_images_are_recovered_under_their_digests(made: Path) -> None:
    files = files_of(made)
    (made / "index.db").unlink()
    found = repair_cache(made)
    wanted = {f"recovered@{digest}" for digest in [*(image.digest for image in IMAGES.values()), digest_of(INDEX)]}
    assert set(read_names(made)) == wanted, "a child of an image index got a name"
    assert_complete(made, files)
    assert all(any(name in problem.detail for problem in found) for name in wanted), "a recovered image is not reported"
    assert "rebuilt" in (found[0].repair or "")
    check(made)


@pytest.mark.parametrize("lost", [False, True])
def test_an_index_without_all_its_platforms_is_complete_if_those_that_are_here_are(
    cache: Cache, directory: Path, lost: bool
) -> None:
    """Without a record of what a pull chose, an absent platform counts as left out."""
    files = make.oci_files({"amd64": MANY[0]}, {"many:1": INDEX})
    cache.cache_from_tar(io.BytesIO(make.tar_of(files)))
    assert cache.is_image_complete("many:1")
    layer = cache.get_blob_path(digest_of(MANY[0].layers[0]))
    cache.close()
    (directory / "index.db").unlink()
    if lost:
        layer.unlink()
    repair_cache(directory)
    with Cache.open(directory) as again:
        (recovered,) = again.list_manifests()
        assert (recovered.digest, recovered.complete) == (digest_of(INDEX), not lost)
        assert [child.complete for child in again.get_platforms(str(recovered.name))] == [not lost, False]


@pytest.mark.slow
def test_names_are_restored_from_the_newest_backup_and_newer_images_recovered(made: Path) -> None:
    with Cache.open(made) as cache:
        before = {image.name: (image.added_at, image.last_used_at) for image in cache.list_manifests()}
    back_up(made, "000002-newest.db")
    change_index(made, "UPDATE images SET repository = 'older' WHERE repository = 'many'")
    back_up(made, "000001-older.db")
    with Cache.open(made) as cache:
        save(cache, "new:1", image(99))
    (made / "index.db").unlink()
    found = repair_cache(made)
    assert set(read_names(made)) == {*NAMES, "many:1", f"recovered@{image(99).digest}"}
    assert any("000002-newest.db" in problem.detail for problem in found)
    with Cache.open(made) as cache:
        for one in cache.list_manifests():
            if one.repository != "recovered":
                assert (one.added_at, one.last_used_at) == before[one.name]
        assert cache.get_image_blobs(NAMES[0])[-1].media_type == "text/x-signature"
    check(made)


@pytest.mark.slow
def test_the_backup_with_the_highest_number_is_the_newest(made: Path) -> None:
    back_up(made, "1000000-newest.db")
    change_index(made, "UPDATE images SET repository = 'older' WHERE repository = 'many'")
    back_up(made, "999999-older.db")
    back_up(made, "somebody's.db")
    (made / "index.db").unlink()
    repair_cache(made)
    assert_all_names(made)


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"no database", b"SQLite format 3\0" + b"\xff" * 9000])
def test_unreadable_backups_are_skipped(made: Path, content: bytes) -> None:
    back_up(made, "000001-good.db")
    (made / "backups" / "000002-bad.db").write_bytes(content)
    (made / "backups" / "000003-cut.db").write_bytes((made / "index.db").read_bytes()[:9000])
    (made / "index.db").unlink()
    repair_cache(made)
    assert_all_names(made)
    assert (made / "backups" / "000002-bad.db").read_bytes() == content
    check(made)


@pytest.mark.slow
def test_names_are_restored_from_a_backup_of_an_older_schema(made: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(made, old)
    index = Database(old)
    with index.write_schema() as connection:
        config = schema.alembic_config()
        config.attributes["connection"] = connection
        command.downgrade(config, "0001")
    index.close()
    (made / "backups").mkdir(exist_ok=True)
    shutil.copyfile(old / "index.db", made / "backups" / "000001-schema-0001.db")
    (made / "index.db").unlink()
    repair_cache(made)
    assert_all_names(made)
    check(made)


@pytest.mark.slow
def test_a_name_in_the_backup_whose_manifest_is_missing_is_reported(made: Path) -> None:
    back_up(made, "000001-a.db")
    blob_path(made, Digest(IMAGES[NAMES[3]].digest)).unlink()
    (made / "index.db").unlink()
    found = repair_cache(made)
    assert any(NAMES[3] in problem.detail and "lost its manifest" in problem.detail for problem in found)
    with Cache.open(made) as cache:
        assert not cache.is_image_complete(NAMES[3])
        save(cache, NAMES[3], IMAGES[NAMES[3]])
        assert cache.is_image_complete(NAMES[3])
    check(made)


@pytest.mark.slow
def test_a_readable_index_is_preferred_to_the_backup(made: Path) -> None:
    """An image that was removed after the backup stays removed."""
    back_up(made, "000001-a.db")
    with Cache.open(made) as cache:
        cache.remove_manifest("many:1")
    change_index(made, "DELETE FROM alembic_version")
    repair_cache(made)
    assert set(read_names(made)) == set(NAMES)


# Damage


def page_count(directory: Path) -> int:
    return (directory / "index.db").stat().st_size // 4096


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 100, 4096, "half"])
def test_a_truncated_index_is_rebuilt(made: Path, size: int | str) -> None:
    files = files_of(made)
    length = (made / "index.db").stat().st_size
    os.truncate(made / "index.db", length // 2 if isinstance(size, str) else size)
    assert repair_cache(made)
    assert_complete(made, files)
    check(made)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ones", "random"])
@pytest.mark.parametrize("part", range(4))
def test_an_index_with_any_overwritten_page_is_rebuilt(made: Path, tmp_path: Path, how: str, part: int) -> None:
    count = page_count(made)
    assert count >= 8
    restored = 0
    for page in range(part, count, 4 if EXAMPLES > 20 else 12):
        directory = tmp_path / str(page)
        shutil.copytree(made, directory)
        files = files_of(directory)
        data = {"ones": b"\xff" * 4096, "zeros": bytes(4096), "random": random.Random(page).randbytes(4096)}[how]
        with (directory / "index.db").open("r+b") as file:
            file.seek(page * 4096)
            file.write(data)
        repair_cache(directory)
        assert_complete(directory, files)
        restored += len(read_names(directory).keys() & set(NAMES))
        check(directory)
        shutil.rmtree(directory)
    assert restored or part == 3, "no name was restored, and only part 3 has the pages of the names"


@pytest.mark.slow
def test_an_index_with_random_overwritten_bytes_is_rebuilt(made: Path, tmp_path: Path) -> None:
    files, dice = files_of(made), random.Random(7)
    length = (made / "index.db").stat().st_size
    for number in range(int(os.environ.get("CACHEDB_FUZZ", "60")) // 20):
        directory = tmp_path / str(number)
        shutil.copytree(made, directory)
        with (directory / "index.db").open("r+b") as file:
            for _ in range(3):
                file.seek(dice.randrange(length))
                file.write(dice.randbytes(dice.choice([1, 4, 40])))
        repair_cache(directory)
        assert_complete(directory, files)
        check(directory)


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 16, 18, 19, 20, 21, 28, 44, 47, 56, 59, 68, 100, 103, 105])
def test_an_index_with_a_changed_byte_in_its_header_is_rebuilt(made: Path, place: int) -> None:
    files = files_of(made)
    with (made / "index.db").open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0x7D]))
    repair_cache(made)
    assert_complete(made, files)
    check(made)


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM alembic_version",
        "DROP TABLE alembic_version",
        "DROP TABLE images",
        "DROP TABLE image_blobs",
        "DROP TABLE leases",
        "DROP TABLE lasting_holds",
        "PRAGMA application_id = 77",
        "INSERT INTO images (id, repository, reference, manifest_id, media_type, added_at, last_used_at) "
        "SELECT 999, 'broken', 'x', 99999, media_type, added_at, last_used_at FROM images LIMIT 1",
        "DELETE FROM blobs WHERE id = (SELECT manifest_id FROM images WHERE repository = 'many')",
        "UPDATE images SET manifest_id = 99999 WHERE repository = 'many'",
    ],
)
def test_an_index_that_a_statement_broke_is_rebuilt(made: Path, statement: str) -> None:
    files = files_of(made)
    change_index(made, statement)
    found = repair_cache(made)
    assert {problem.kind for problem in found} == {"index"}
    assert_complete(made, files)
    if "images SE" not in statement and "blobs WHERE" not in statement and statement != "DROP TABLE images":
        assert {*NAMES, "many:1"} <= set(read_names(made))
    check(made)


@pytest.mark.slow
@pytest.mark.parametrize(
    "assignment",
    [
        "media_type = 'nonsense'",
        "added_at = '2026-99-99T99:99:99.000000Z'",
        "manifest_id = (SELECT id FROM blobs WHERE id NOT IN (SELECT manifest_id FROM images) LIMIT 1)",
        "repository = 'Not A Name'",
        "repository = CAST(x'ff41' AS TEXT)",
    ],
)
def test_an_image_with_an_invalid_row_loses_at_most_its_name(made: Path, assignment: str) -> None:
    files = files_of(made)
    shell = sqlite3.connect(made / "index.db")
    shell.execute("PRAGMA ignore_check_constraints = ON")
    shell.execute(f"UPDATE images SET {assignment} WHERE repository = 'many'")
    shell.execute("DELETE FROM alembic_version")
    shell.commit()
    shell.close()
    repair_cache(made)
    assert set(NAMES) <= set(read_names(made))
    assert_complete(made, files)
    check(made)


@pytest.mark.slow
def test_an_image_keeps_its_name_though_the_size_of_a_lost_layer_is_invalid(made: Path) -> None:
    (made / "blobs" / digest_of(IMAGES[NAMES[0]].layers[0]).replace(":", "/")).unlink()
    shell = sqlite3.connect(made / "index.db")
    shell.execute("PRAGMA ignore_check_constraints = ON")
    shell.execute("UPDATE blobs SET size = -1 WHERE id IN (SELECT blob_id FROM image_blobs WHERE role = 'layer')")
    shell.execute("DELETE FROM alembic_version")
    shell.commit()
    shell.close()
    repair_cache(made)
    assert {*NAMES, "many:1"} <= set(read_names(made))
    check(made)


@pytest.mark.slow
def test_an_sqlite_index_that_differs_from_its_table_is_repaired(made: Path) -> None:
    shell = sqlite3.connect(made / "index.db")
    shell.execute("PRAGMA writable_schema = ON")
    shell.execute(
        "UPDATE sqlite_master SET rootpage = (SELECT rootpage FROM sqlite_master WHERE name = 'ix_image_blobs_blob_id')"
        " WHERE name = 'ix_images_manifest_id'"
    )
    shell.commit()
    shell.close()
    repair_cache(made)
    assert_all_names(made)
    check(made)


@pytest.mark.slow
def test_images_hidden_by_a_damaged_page_are_recovered(made: Path) -> None:
    """SQLite reads a page whose cell count was zeroed as empty, without an error."""
    files = files_of(made)
    shell = sqlite3.connect(made / "index.db")
    (root,) = shell.execute("SELECT rootpage FROM sqlite_master WHERE name = 'images'").fetchone()
    shell.close()
    with (made / "index.db").open("r+b") as file:
        file.seek((root - 1) * 4096 + 3)
        file.write(b"\0\0")
    repair_cache(made)
    assert_complete(made, files)
    check(made)


@pytest.mark.slow
def test_readable_holds_times_and_attached_blobs_survive(made: Path) -> None:
    with Cache.open(made) as cache:
        cache.pin(NAMES[0])
        cache.save_manifest(NAMES[1], IMAGES[NAMES[1]].manifest, ttl=3600)
        holds, images = cache.list_holds(), cache.list_manifests()
    change_index(made, "DELETE FROM alembic_version")
    repair_cache(made)
    with Cache.open(made) as cache:
        assert cache.list_holds() == holds
        assert cache.list_manifests() == images
        assert cache.get_image_blobs(NAMES[0])[-1].media_type == "text/x-signature"
        cache.remove_manifest(NAMES[1])
        assert cache.has_blob(IMAGES[NAMES[1]].digest), "the held blob was deleted"
    check(made)


@pytest.mark.slow
@pytest.mark.parametrize("table", ["image_blobs", "lasting_holds"])
def test_rows_that_cannot_be_restored_are_reported(made: Path, table: str) -> None:
    change_index(made, f"DROP TABLE {table}")
    found = repair_cache(made)
    assert any(table.split("_")[-1] in problem.detail for problem in found if problem.repair is None)


# The WAL


KILLED = """
import os, signal, sys
from cachedb import Cache
from tests.support.make import image
cache = Cache.open(sys.argv[1])
made = image(77)
for digest, data in made.blobs.items():
    cache.save_blob(digest, data)
cache.save_manifest("in-wal:1", made.manifest)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["left", "deleted", "garbage", "cut"])
def test_an_index_is_rebuilt_with_any_wal_of_a_killed_process(made: Path, how: str) -> None:
    with start_python(KILLED, made) as process:
        assert process.wait(60) == -signal.SIGKILL
    wal = made / "index.db-wal"
    assert wal.stat().st_size
    if how == "deleted":
        wal.unlink()
    elif how == "garbage":
        wal.write_bytes(random.Random(1).randbytes(wal.stat().st_size))
    elif how == "cut":
        os.truncate(wal, wal.stat().st_size // 2)
    files = files_of(made)
    repair_cache(made)
    if how == "left":
        assert "in-wal:1" in read_names(made)
    assert set(NAMES) <= read_names(made).keys()
    assert files_of(made) == files, "a file without a row did not become a blob"
    check(made)


@pytest.mark.slow
def test_the_old_wal_is_not_applied_to_the_new_index(made: Path) -> None:
    with start_python(KILLED, made) as process:
        assert process.wait(60) == -signal.SIGKILL
    wal = (made / "index.db-wal").read_bytes()
    (made / "index.db").unlink()
    repair_cache(made)
    kept = {path.name: path.read_bytes() for path in (made / "quarantine").iterdir()}
    assert wal in kept.values()
    check(made)


@pytest.mark.slow
def test_old_indexes_and_wals_are_kept_and_never_overwritten(made: Path) -> None:
    kept: set[bytes] = set()
    for number in range(3):
        data = (made / "index.db").read_bytes()
        (made / "index.db").write_bytes(garbage := b"%d" % number + data[1:])
        (made / "index.db-wal").write_bytes(wal := b"wal %d" % number)
        if number == 0:
            (made / "index.db").unlink()
            garbage = wal
        repair_cache(made)
        kept.add(garbage)  # SQLite itself may delete a WAL without valid frames
        found = {path.read_bytes() for path in (made / "quarantine").iterdir()}
        assert kept <= found


# Other processes and threads


@pytest.mark.slow
def test_an_open_cache_continues_with_the_new_index(made: Path) -> None:
    with Cache.open(made) as other:
        other.save_manifest("before:1", image(5).manifest)
        change_index(made, "DELETE FROM alembic_version")
        repair_cache(made)
        save(other, "after:1", image(88))
        assert {"before:1", "after:1"} <= {str(image.name) for image in other.list_manifests()}
        assert "after:1" in read_names(made)
    assert {"before:1", "after:1"} <= set(read_names(made)), "closing the old connection lost rows"
    check(made)


READER = """
import sys
from cachedb import Cache
from tests.support.make import image
with Cache.open(sys.argv[1]) as cache:
    print(len(cache.list_manifests()), flush=True)
    sys.stdin.readline()
    made = image(88)
    for digest, data in made.blobs.items():
        cache.save_blob(digest, data)
    cache.save_manifest("after:1", made.manifest)
    print("saved", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.slow
def test_another_process_continues_with_the_new_index(made: Path) -> None:
    with start_python(READER, made) as process:
        assert process.stdin
        assert process.stdout
        process.stdout.readline()
        with (made / "index.db").open("r+b") as file:
            file.seek(4096 * 5)
            file.write(b"\xff" * 4096)
        with Cache.open(made, damaged=True) as cache:
            cache.verify(repair=True)
            save(cache, "mine:1", image(89))
            process.stdin.write("\n")
            assert process.stdout.readline() == "saved\n"
            assert cache.is_image_complete("after:1")
            save(cache, "mine:2", image(90))
            process.stdin.write("\n")
            assert process.wait(60) == 0
            assert cache.is_image_complete("mine:2")
            save(cache, "mine:3", image(91))
    assert {"after:1", "mine:1", "mine:2", "mine:3"} <= set(read_names(made))
    check(made)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["no revision", "no file"])
def test_a_process_with_the_old_wal_does_not_affect_the_new_index(made: Path, damage: str) -> None:
    script = """
        import sys
        from cachedb import Cache
        from tests.support.make import image, save
        with Cache.open(sys.argv[1]) as cache:
            for number in range(60, 70):
                save(cache, f"old:{number}", image(number))
            print("written", flush=True)
            sys.stdin.read()
    """
    with running(script, made):
        if damage == "no file":  # then the WAL is not checkpointed, and the -shm file still lists its frames
            (made / "index.db").unlink()
        else:
            change_index(made, "DELETE FROM alembic_version")
        repair_cache(made)
        with Cache.open(made) as cache:
            for number in range(70, 80):
                save(cache, f"new:{number}", image(number))
            assert cache.verify().problems == []
        expected = {f"new:{number}" for number in range(70, 80)}
        if damage != "no file":
            expected |= {f"old:{number}" for number in range(60, 70)}
        assert expected <= set(read_names(made))
    assert expected <= set(read_names(made))
    check(made)


@pytest.mark.slow
def test_closing_an_old_connection_keeps_the_new_wal(made: Path) -> None:
    old = sqlite3.connect(made / "index.db")
    assert old.execute("SELECT count(*) FROM images").fetchone() == (31,)
    change_index(made, "DELETE FROM alembic_version")
    repair_cache(made)
    with Cache.open(made) as cache:
        save(cache, "after:1", image(88))
        wal = (made / "index.db-wal").stat()
        old.close()
        assert (made / "index.db-wal").stat()[:2] == wal[:2]
        assert cache.is_image_complete("after:1")
    check(made)


@pytest.mark.slow
def test_a_connection_to_the_old_index_is_not_used_again(made: Path) -> None:
    index = Database(made)
    with index.read() as connection:
        old = connection.connection.driver_connection
    change_index(made, "DELETE FROM alembic_version")
    repair_cache(made)
    with index.write() as connection:
        assert connection.connection.driver_connection is not old
        connection.exec_driver_sql("UPDATE images SET repository = 'written' WHERE repository = 'many'")
    index.close()
    assert "written:1" in read_names(made)


@pytest.mark.slow
def test_several_threads_may_repair_at_once(made: Path) -> None:
    files = files_of(made)
    (made / "index.db").unlink()
    found: list[list[Problem]] = []

    def repair() -> None:
        with Cache.open(made, damaged=True) as cache:
            found.append(cache.verify(repair=True).problems)

    threads = [threading.Thread(target=repair) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(read_names(made)) == 31
    assert_complete(made, files)
    assert [path.name for path in (made / "backups").iterdir()] == []
    check(made)


@pytest.mark.slow
def test_an_index_that_was_rebuilt_is_not_rebuilt_again(made: Path) -> None:
    change_index(made, "DELETE FROM alembic_version")
    repair_cache(made)
    status = (made / "index.db").stat()
    with Cache.open(made) as cache:
        assert rebuild.rebuild(cache._database, made / "ingest" / "unused") == []
    assert (made / "index.db").stat().st_ino == status.st_ino


# Crashes


class Crash(BaseException):
    pass


@contextmanager
def crash_at(patch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    """Make every rename, unlink, sync or commit fail from step `number` on."""
    seen = 0

    def step(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen >= number:
            raise Crash

    for name in ("rename", "unlink", "fsync"):
        real = getattr(os, name)

        def count_and_call(*arguments: object, _real: object = real, **options: object) -> object:
            step()
            return _real(*arguments, **options)  # type: ignore[operator]

        patch.setattr(os, name, count_and_call)
    event.listen(Engine, "commit", step)
    try:
        yield
    finally:
        event.remove(Engine, "commit", step)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["lost", "emptied", "emptied, without a backup"])
def test_the_next_repair_finishes_one_that_crashed_at_any_step(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    made = tmp_path / "made"
    shutil.copytree(small, made)
    files, crashed = files_of(made), True
    if damage == "lost":
        (made / "index.db").unlink()
    else:
        change_index(made, "DELETE FROM alembic_version")
    every = EXAMPLES > 20 or "without a backup" in damage
    if "without a backup" in damage:
        (made / "backups" / "000001-a.db").unlink()
    number = 1 if every or damage == "lost" else 0
    while crashed:
        number += 1 if every else 2
        directory = tmp_path / str(number)
        shutil.copytree(made, directory)
        crashed = False
        with pytest.MonkeyPatch.context() as patch, crash_at(patch, number):
            try:
                with Cache.open(directory, damaged=True) as cache:
                    cache.verify(repair=True)
            except Crash:
                crashed = True
        with suppress(DamagedIndex):
            Cache.open(directory).close()
        repair_cache(directory)
        assert files_of(directory) == files
        assert read_names(directory) == {name: one.digest for name, one in SMALL.items()}
        shutil.rmtree(directory)
    assert number > 6


@pytest.mark.slow
def test_a_rebuild_continues_past_an_unreadable_file(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.operations.test_verify import fail_reading

    (made / "index.db").unlink()
    digest = IMAGES[NAMES[4]].digest
    path = blob_path(made, Digest(digest))

    def refuse_path(file: Any, *arguments: Any, **options: Any) -> Any:
        if Path(file) == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return open(file, *arguments, **options)

    with monkeypatch.context() as patch:
        fail_reading(patch, path, "open")
        patch.setattr("cachedb.disk.reader.open", refuse_path, raising=False)
        with Cache.open(made, damaged=True) as cache:
            found = cache.verify(repair=True).problems
    assert ("corrupt", digest) in [(problem.kind, problem.digest) for problem in found]
    assert len(read_names(made)) == 30
    check(made)


# Directories that are no cache


@pytest.mark.parametrize("damaged", [False, True])
def test_a_directory_that_is_no_cache_is_refused_and_unchanged(tmp_path: Path, damaged: bool) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "index.db").write_bytes(b"somebody's")
    (foreign / "notes").write_bytes(b"notes")
    with pytest.raises(NotACache):
        Cache.open(foreign, damaged=damaged)
    (foreign / "index.db").unlink()
    with pytest.raises(NotACache):
        Cache.open(foreign, damaged=damaged)
    assert {path.name: path.read_bytes() for path in foreign.iterdir()} == {"notes": b"notes"}


# Random damage


SMALL = {f"app-{number}:1": image(number, number + 1, size=20) for number in range(4)}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small") / "cache"
    with Cache.open(directory) as cache:
        for name, one in SMALL.items():
            save(cache, name, one)
    shutil.copyfile(directory / "index.db", directory / "backups" / "000001-a.db")
    return directory


damages = st.lists(
    st.tuples(
        st.integers(0, 10**6),
        st.sampled_from(["overwrite", "overwrite", "cut", "delete"]),
        st.integers(0, 10**6),
        st.binary(min_size=1, max_size=50),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.slow
@given(damages)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_intact_blobs_and_images_survive_any_damage(
    small: Path, found: list[tuple[int, str, int, bytes, bool]]
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        directory = Path(folder) / "cache"
        shutil.copytree(small, directory)
        blobs_ = sorted((directory / "blobs").rglob("*/*"))
        for which, how, place, data, index in found:
            paths = [directory / "index.db", *(directory / "backups").iterdir()] if index else blobs_
            path = paths[which % len(paths)]
            if not path.exists():
                continue
            size = path.stat().st_size
            path.chmod(0o644)
            if how == "delete":
                path.unlink()
            elif how == "cut":
                os.truncate(path, place % (size + 1))
            else:
                with path.open("r+b") as file:
                    file.seek(place % (size + 1))
                    file.write(data)
        good = {
            digest: size
            for digest, size in files_of(directory).items()
            if digest_of(blob_path(directory, Digest(digest)).read_bytes()) == digest
        }
        repair_cache(directory)
        assert files_of(directory) == good
        with Cache.open(directory) as cache:
            complete = {image.digest for image in cache.list_manifests() if image.complete}
        for one in SMALL.values():
            if one.blobs.keys() <= good.keys():
                assert one.digest in complete
        check(directory)


# The command line


@pytest.mark.slow
def test_the_command_rebuilds_and_prints_recovered_names(cachedb: Run, made: Path) -> None:
    (made / "index.db").unlink()
    ran = cachedb("ls")
    assert ran.returncode == 1
    assert "cachedb verify --repair" in ran.stderr
    assert cachedb("verify", "--quick").returncode == 1
    assert not (made / "index.db").exists()
    ran = cachedb("verify", "--repair")
    assert ran.returncode == 1
    assert f"recovered@{digest_of(INDEX)}" in ran.stdout.replace("\n", "")
    ran = cachedb("verify")
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.slow
def test_holds_survive_an_interrupted_rebuild(made: Path) -> None:
    with Cache.open(made) as cache:
        (hold,) = cache.add_hold(NAMES[0])
        cache.remove_manifest(NAMES[0])
    (made / "index.db").rename(made / "backups" / "000001-rebuilt.db")  # where a killed rebuild may leave the old index
    repair_cache(made)
    with Cache.open(made) as cache:
        assert hold in cache.list_holds()
        cache.collect_garbage()
        assert cache.has_blob(IMAGES[NAMES[0]].digest)
    assert [path.name for path in (made / "backups").glob("*-rebuilt.db")] == []


def test_an_index_of_a_newer_schema_is_not_rebuilt(made: Path) -> None:
    status = (made / "index.db").stat()
    with Cache.open(made) as cache:
        change_index(made, "ALTER TABLE lasting_holds RENAME COLUMN name TO names")
        change_index(made, "UPDATE alembic_version SET version_num = '9999'")
        change_index(made, "PRAGMA user_version = 9999")
        with pytest.raises(SchemaMismatch, match="newer release"):
            cache.verify(repair=True)
    assert (made / "index.db").stat().st_ino == status.st_ino


@pytest.mark.slow
def test_a_damaged_index_is_rebuilt_though_a_folder_is_missing(made: Path) -> None:
    shutil.rmtree(made / "locks")
    (made / "index.db").write_bytes(b"garbage" * 1000)
    repair_cache(made)
    check(made)


@pytest.mark.slow
def test_an_invalid_time_is_damage(made: Path) -> None:
    change_index(made, "UPDATE images SET added_at = '2026-99-99T00:00:00.000000Z' WHERE id = 1")
    with Cache.open(made) as cache, pytest.raises(DamagedIndex, match="has the invalid time"):
        cache.list_manifests()
    repair_cache(made)
    check(made)


def test_a_new_index_that_still_has_a_wal_is_not_put_in_place(made: Path) -> None:
    new, index = made / "ingest" / "new.db", Database(made)
    new.write_bytes(b"new")
    new.with_name("new.db-wal").write_bytes(b"frames that were not checkpointed")
    before = (made / "index.db").read_bytes()
    with closing(index), index.alone() as turn, pytest.raises(StorageError, match="the new index is incomplete"):
        backups.put_in_place(index, turn, new)
    assert (made / "index.db").read_bytes() == before


def test_an_index_behind_a_link_is_not_put_in_place(made: Path, tmp_path: Path) -> None:
    elsewhere, index = tmp_path / "elsewhere", Database(made)
    elsewhere.mkdir()
    (elsewhere / "index.db").write_bytes(b"mine")
    (made / "ingest" / "1").symlink_to(elsewhere)
    with closing(index), index.alone() as turn, pytest.raises(NotOurs, match="is a symbolic link"):
        backups.put_in_place(index, turn, made / "ingest" / "1" / "index.db")
    assert (elsewhere / "index.db").read_bytes() == b"mine"
