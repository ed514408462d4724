"""No write is lost silently when files of an open cache are removed, renamed, replaced or linked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cachedb import Cache, CacheError, CacheReplaced, DamagedIndex, NotInCache, NotOurs, StorageError, schema
from cachedb.disk import locks, marker, single_flight, turns
from cachedb.disk.layout import blob_path
from cachedb.disk.waiting import Wait
from cachedb.index.sqlite import backups
from cachedb.index.sqlite.database import Database
from cachedb.oci.digests import Digest
from cachedb.operations import rebuild, restore
from tests.conftest import Run, running
from tests.support.make import image, save
from tests.support.mounting import image as image_file
from tests.support.mounting import mounted
from tests.support.waiting import wait_until

APP = image(1)
ANY = f"sha256:{'0' * 64}"


def rename_file(path: Path) -> None:
    path.rename(path.with_name("moved"))


def rename_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))
    path.parent.mkdir()


def link_and_remove(path: Path) -> None:
    os.link(path, path.with_name("linked"))
    path.unlink()


WAYS_TO_LOSE = [rename_file, rename_folder, link_and_remove, Path.unlink]
Loss = Callable[[Path], None]


def list_names(cache: Cache) -> list[str]:
    return sorted(str(found.name) for found in cache.list_manifests())


# Folders


def remove_empty_folders(directory: Path) -> None:
    """Do what `find DIRECTORY -mindepth 1 -type d -empty -delete` does."""
    for folder, _, _ in os.walk(directory, topdown=False):
        if folder != str(directory) and not os.listdir(folder):
            os.rmdir(folder)


def test_an_open_cache_works_after_a_cleaner_has_removed_its_empty_folders(cache: Cache) -> None:
    save(cache, "app:1", APP)
    sha512 = f"sha512:{hashlib.sha512(b'new').hexdigest()}"
    with cache.hold("app:1"):
        session = cache._session.folder
        remove_empty_folders(cache.directory)
        assert not session.exists()
        save(cache, "app:2", image(2))
        assert session.exists()
        cache.save_blob(sha512, b"new")
        remove_empty_folders(cache.directory)
        schema.back_up(cache.directory)
    remove_empty_folders(cache.directory)
    assert cache.collect_garbage().blobs == 0
    cache.remove_manifest("app:2")
    assert list_names(cache) == ["app:1"]
    assert cache.verify().problems == []


def test_a_folder_of_a_session_without_its_lock_is_not_made_again(cache: Cache) -> None:
    save(cache, "app:1", APP)
    (path,) = (cache.directory / "locks").glob("*.session")
    path.unlink()
    os.rmdir(cache._session.folder)
    with pytest.raises(CacheReplaced, match="its lock file was removed or renamed"):
        cache.add_blob(b"more")
    assert not cache._session.folder.exists()


# Lock files


@pytest.mark.parametrize("lose", WAYS_TO_LOSE)
def test_a_write_without_its_lock_is_rolled_back(cache: Cache, index: Database, lose: Loss) -> None:
    save(cache, "app:1", APP)

    def lose_the_lock() -> None:
        with index.write() as connection:
            connection.exec_driver_sql("DELETE FROM images")
            lose(index.write_lock)

    with pytest.raises(CacheReplaced, match=r"write.lock' was removed or renamed while .*; nothing was written"):
        lose_the_lock()
    assert list_names(cache) == ["app:1"]
    cache.tag("app:1", "app:2")


@pytest.mark.parametrize("lose", WAYS_TO_LOSE)
def test_a_block_that_lost_the_write_lock_raises(index: Database, lose: Loss) -> None:
    def lose_the_lock() -> None:
        with index.alone():
            lose(index.write_lock)
            with turns.hold_in_turn(index.write_lock, Wait("it", 0)):
                pass  # another process can now take the lock

    with pytest.raises(CacheReplaced, match=r"another process may have written meanwhile: run `cachedb verify`"):
        lose_the_lock()
    with index.alone():
        pass


@pytest.mark.parametrize("lose", WAYS_TO_LOSE)
def test_a_hold_that_lost_its_lock_file_raises(cache: Cache, cachedb: Run, lose: Loss) -> None:
    save(cache, "app:1", APP)
    held = cache.hold("app:1")
    held.__enter__()
    (path,) = (cache.directory / "locks").glob("*.session")
    lose(path)
    assert cachedb("rm", "app:1").returncode == 0
    assert not cache.has_blob(APP.digest)
    with pytest.raises(CacheReplaced, match="the blobs that it held may have been collected"):
        held.__exit__(None, None, None)
    with pytest.raises(StorageError):
        cache.add_blob(b"more")


def test_a_hold_whose_leases_were_removed_raises(cache: Cache, cachedb: Run) -> None:
    """The lock file is back in its place by the end of the hold."""
    save(cache, "app:1", APP)
    held = cache.hold("app:1")
    held.__enter__()
    (path,) = (cache.directory / "locks").glob("*.session")
    moved = path.rename(path.with_name("moved"))
    assert cachedb("rm", "app:1").returncode == 0
    moved.rename(path)
    with pytest.raises(CacheReplaced, match="its leases were removed, and the blobs that it held"):
        held.__exit__(None, None, None)


def test_an_image_is_not_saved_by_a_lost_session(cache: Cache) -> None:
    cache.add_blob(APP.config)
    (path,) = (cache.directory / "locks").glob("*.session")
    rename_file(path)
    with pytest.raises(CacheReplaced, match="its lock file was removed or renamed"):
        cache.save_manifest("app:1", APP.manifest)


@pytest.mark.parametrize("lose", [rename_file, rename_folder])
def test_a_waiter_for_a_lock_file_that_is_renamed_locks_the_new_file(tmp_path: Path, lose: Loss) -> None:
    path = tmp_path / "locks" / "lock"
    path.parent.mkdir()
    with locks.hold_lock(path):
        wait = Wait("it", 30)
        wait.on_begin = lambda: lose(path)
        with locks.hold_lock(path, wait) as file:
            assert locks.leads_to(path, file.fileno())


def test_a_waiter_for_a_folder_that_is_renamed_locks_the_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "locks"
    path.mkdir()
    with locks.hold_folder_lock(path, Wait("it", 0), shared=False):
        wait = Wait("it", 30)
        wait.on_begin = lambda: rename_folder(path / "lock")
        with locks.hold_folder_lock(path, wait, shared=False), pytest.raises(BlockingIOError):
            os.close(_lock_now(path))


def _lock_now(path: Path) -> int:
    import fcntl

    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(folder)
        raise
    return folder


def test_a_claim_whose_file_is_renamed_is_lost(directory: Path) -> None:
    Cache.open(directory).close()
    with single_flight.try_claim(directory, "key"):
        single_flight.check_claim(directory, "key")
        (path,) = (directory / "locks").glob("*.producing")
        rename_file(path)
        with pytest.raises(single_flight.ClaimLost):
            single_flight.check_claim(directory, "key")


# The index is not replaced without the lock


@pytest.fixture
def interrupted(cache: Cache, cachedb: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the write lock and let another process write after a new index is made and before it is renamed."""
    from cachedb.index.sqlite.replace import replace as original

    def replace(database: Database, turn: turns.Turn, new: Path, old: Path) -> bool:
        database.write_lock.unlink()
        assert cachedb("tag", "app:1", "acknowledged:1").returncode == 0
        return original(database, turn, new, old)

    monkeypatch.setattr(backups, "replace", replace)


@pytest.mark.slow
@pytest.mark.usefixtures("interrupted")
def test_a_restore_that_lost_the_lock_loses_no_write(cache: Cache, cachedb: Run, tmp_path: Path) -> None:
    save(cache, "app:1", APP)
    backup = tmp_path / "backup.db"
    assert cachedb("db", "backup", backup).returncode == 0
    with pytest.raises(CacheReplaced, match="the index was not replaced: try again"):
        restore.restore(cache.directory, backup)
    assert list_names(cache) == ["acknowledged:1", "app:1"]
    assert not list((cache.directory / "backups").glob("*-rebuilt.db"))
    assert not list((cache.directory / "quarantine").iterdir())


@pytest.mark.usefixtures("interrupted")
def test_a_rebuild_that_lost_the_lock_loses_no_write(
    cache: Cache, index: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(cache, "app:1", APP)
    monkeypatch.setattr(rebuild, "find_faults", lambda _: ["a fault"])
    with pytest.raises(CacheReplaced, match="the index was not replaced: try again"):
        rebuild.rebuild(index, cache._session.new_folder())
    assert list_names(cache) == ["acknowledged:1", "app:1"]


# SQLite's files beside the index


REMOVALS = [("index.db-shm",), ("index.db-wal",), ("index.db-shm", "index.db-wal")]


@pytest.mark.slow
@pytest.mark.parametrize("removed", REMOVALS, ids="+".join)
@pytest.mark.parametrize("first", ["daemon", "other", "close"])
def test_removing_files_beside_the_index_loses_no_commit_silently(
    directory: Path, cachedb: Run, removed: tuple[str, ...], first: str
) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", APP)
        acknowledged = {"app:1"}
        for number in range(5):
            cache.tag("app:1", f"before:{number}")
            acknowledged.add(f"before:{number}")
        for name in removed:
            (directory / name).unlink()
        errors = []
        for number in range(3 if first != "close" else 0):
            for who in ("daemon", "other") if first == "daemon" else ("other", "daemon"):
                name = f"{who}:{number}"
                if who == "other":
                    if cachedb("tag", "app:1", name).returncode == 0:
                        acknowledged.add(name)
                    continue
                try:
                    cache.tag("app:1", name)
                    acknowledged.add(name)
                except CacheReplaced as error:
                    errors.append(str(error))
                except NotInCache:
                    assert first == "other"
                    assert "index.db-wal" in removed
    found = set(cachedb("ls", "-q").stdout.split())
    if first != "close":
        assert "was removed or replaced while the index was open; nothing was written" in errors[0]
        assert len(errors) < 3, "the next call did not open the index again"
    if first == "other" and "index.db-wal" in removed:  # only the removed WAL had these commits
        acknowledged = {name for name in acknowledged if not name.startswith("before:")}
        acknowledged -= {"app:1"}
    else:
        assert cachedb("verify").returncode == 0
    assert found >= acknowledged


@pytest.mark.slow
def test_a_commit_without_the_shared_memory_is_rolled_back(cache: Cache, index: Database, cachedb: Run) -> None:
    save(cache, "app:1", APP)

    def lose_the_memory() -> None:
        with index.write() as connection:
            connection.exec_driver_sql("DELETE FROM images")
            (cache.directory / "index.db-shm").unlink()
            assert cachedb("ls", "-q").stdout == "app:1\n"

    with pytest.raises(CacheReplaced, match=r"-shm was removed or replaced .*; nothing was written"):
        lose_the_memory()
    assert cachedb("ls", "-q").stdout == "app:1\n"


def test_a_look_up_does_not_read_removed_files(cache: Cache, cachedb: Run) -> None:
    assert not cache.has_blob(APP.digest)
    (cache.directory / "index.db-shm").unlink()
    assert cachedb("ls").returncode == 0
    with pytest.raises(CacheReplaced):
        cache.has_blob(APP.digest)


def test_no_second_connection_shares_removed_files_with_the_first(cache: Cache, directory: Path) -> None:
    """Connections of one process share the -shm file that the first one opened, even if it was removed since."""
    with cache.sql("SELECT 1", stream=True):
        (directory / "index.db-shm").unlink()
        with pytest.raises(CacheReplaced):
            cache.has_blob(APP.digest)
        with pytest.raises(CacheReplaced):
            cache.has_blob(APP.digest)


@pytest.mark.slow
def test_commits_of_a_removed_wal_are_saved_while_another_process_reads(
    cache: Cache, directory: Path, cachedb: Run
) -> None:
    save(cache, "app:1", APP)
    script = """
        import sys
        from cachedb import Cache
        with Cache.open(sys.argv[1]) as cache:
            cache.list_manifests()
            print("open", flush=True)
            input()
        """
    with running(script, directory):  # otherwise closing the last connection would save them
        for name in ("index.db-wal", "index.db-shm"):
            (directory / name).unlink()
        with pytest.raises(CacheReplaced):
            cache.tag("app:1", "app:2")
        assert list_names(cache) == ["app:1"]
        assert cachedb("ls", "-q").stdout == "app:1\n"


# Copies by hard links


def copy_by_hard_links(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=os.link)


@pytest.mark.slow
@pytest.mark.parametrize(
    "use", [list_names, lambda cache: cache.tag("app:1", "app:2"), lambda cache: cache.has_blob(ANY)]
)
def test_an_index_that_another_program_replaces_is_not_used(
    cache: Cache, tmp_path: Path, use: Callable[[Cache], object]
) -> None:
    """SQLite would apply the WAL of the first index to the second."""
    save(cache, "app:1", APP)
    use(cache)
    with Cache.open(tmp_path / "other") as other:
        save(other, "other:1", image(2))
    before = (tmp_path / "other" / "index.db").read_bytes()
    os.replace(tmp_path / "other" / "index.db", cache.directory / "index.db")
    for _ in range(2):
        with pytest.raises(CacheReplaced, match=r"index.db' was replaced by another program .*: open the cache again"):
            use(cache)
    cache.close()
    assert (cache.directory / "index.db").read_bytes() == before


@pytest.mark.slow
def test_a_copy_by_hard_links_and_its_source_can_only_be_read(cachedb: Run, directory: Path, tmp_path: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", APP)
    copy = tmp_path / "copy"
    copy_by_hard_links(directory, copy)
    for there in (directory, copy):
        assert cachedb("--dir", there, "ls", "-q").stdout == "app:1\n"
        done = cachedb("--dir", there, "tag", "app:1", "app:2")
        assert done.returncode == 1
        assert "has 2 hard links, so a copy (`cp -al`, rsnapshot) shares this file" in done.stderr
        assert "make another with `cachedb copy`" in done.stderr
        assert cachedb("--dir", there, "gc").returncode == 1
    assert cachedb("copy", tmp_path / "own").returncode == 0
    shutil.rmtree(copy)
    assert cachedb("tag", "app:1", "app:2").returncode == 0
    assert cachedb("--dir", tmp_path / "own", "tag", "app:1", "app:2").returncode == 0


def test_an_open_cache_with_a_copy_by_hard_links_can_only_be_read(
    cache: Cache, directory: Path, tmp_path: Path
) -> None:
    save(cache, "app:1", APP)
    copy_by_hard_links(directory, tmp_path / "copy")
    for _ in range(2):
        with pytest.raises(NotOurs, match="has 2 hard links"):
            cache.tag("app:1", "app:2")
    assert list_names(cache) == ["app:1"]
    shutil.rmtree(tmp_path / "copy")
    cache.tag("app:1", "app:2")


def test_a_link_of_the_index_alone_is_noticed(directory: Path, tmp_path: Path) -> None:
    Cache.open(directory).close()
    os.link(directory / "index.db", tmp_path / "index.db")
    with Cache.open(directory) as cache, pytest.raises(NotOurs, match=r"index.db' has 2 hard links"):
        cache.add_blob(b"")


def test_a_marker_that_another_process_is_finishing_is_no_copy(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cache.open(directory).close()
    second = directory / f".cachedb-{'0' * 16}.marker"
    os.link(directory / "cachedb.json", second)
    listed = []

    def list_later(folder: int) -> list[str]:
        listed.append(second.exists())
        second.unlink(missing_ok=True)  # after its links were counted, and before its names are
        return os.listdir(folder)

    monkeypatch.setattr(marker, "list_names", list_later)
    with Cache.open(directory) as cache:
        cache.add_blob(b"")
    assert listed[0]


def test_a_second_link_left_by_a_killed_marker_writer_is_no_copy(directory: Path) -> None:
    Cache.open(directory).close()
    os.link(directory / "cachedb.json", directory / f".cachedb-{'0' * 16}.marker")
    with Cache.open(directory) as cache:
        save(cache, "app:1", APP)


# Copies whose files have the inode number of their source


def edit_marker(cache: Path, /, **values: object) -> None:
    path = cache / "cachedb.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def read_marker(directory: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((directory / "cachedb.json").read_text())
    return found


@pytest.mark.parametrize("field", ["directory", "file_system", "generation"])
def test_a_copy_whose_marker_has_the_inode_number_of_its_source_is_checked(
    directory: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    monkeypatch.setattr(marker, "_read_generation", lambda _: 1)
    with Cache.open(directory) as cache:
        save(cache, "app:1", APP)
    before = read_marker(directory)
    edit_marker(directory, **{field: "id 0" if field == "file_system" else 0})
    blob = blob_path(directory, Digest(APP.digest))
    blob.rename(blob.with_name("moved"))
    with pytest.raises(DamagedIndex, match="is a damaged copy of a cache"):
        Cache.open(directory)
    blob.with_name("moved").rename(blob)
    Cache.open(directory).close()
    after = read_marker(directory)
    assert after["id"] != before["id"]
    assert after[field] == before[field]


@pytest.mark.slow
def test_a_torn_backup_that_is_restored_in_the_place_of_its_source_is_refused(tmp_path: Path) -> None:
    # Blocks of 4 KiB make one block group; else ext4 puts a new directory into a random one, and reuses no number.
    file = image_file(tmp_path / "disk.img", 64 * 1024 * 1024, "mkfs.ext4", "-q", "-b", "4096", install="e2fsprogs")
    with mounted(tmp_path / "disk", "-o", "loop", file) as disk:
        directory, backup = disk / "cache", tmp_path / "backup"
        with Cache.open(directory) as cache:
            save(cache, "app:1", APP)
        shutil.copytree(directory, backup)
        blob_path(backup, Digest(APP.digest)).unlink()
        inodes = {path.stat().st_ino for path in (directory, directory / "cachedb.json")}
        shutil.rmtree(directory)
        directory.mkdir()
        shutil.copy2(backup / "cachedb.json", directory)
        assert {path.stat().st_ino for path in (directory, directory / "cachedb.json")} == inodes, "ext4 reuses numbers"
        shutil.copytree(backup, directory, dirs_exist_ok=True)
        with pytest.raises(DamagedIndex, match="is a damaged copy of a cache"):
            Cache.open(directory)


def test_a_moved_cache_on_a_restarted_host_is_no_copy(directory: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", APP)
    before = read_marker(directory)
    moved = directory.rename(directory.with_name("moved"))
    edit_marker(moved, boot="another", file_system="device 1")
    with Cache.open(moved) as cache:
        cache.tag("app:1", "app:2")
    after = read_marker(moved)
    assert after.pop("inode") == (moved / "cachedb.json").stat().st_ino
    del before["inode"], after["generation"], before["generation"], after["written"], before["written"]
    assert after == before, "it was not refreshed"


def test_a_marker_of_an_older_release_is_refreshed_and_its_cache_is_no_copy(directory: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", APP)
        before = read_marker(directory)
        old = {name: before[name] for name in ("format", "id", "inode")}
        (directory / "cachedb.json").write_text(json.dumps(old))
        Cache.open(directory).close()
        after = read_marker(directory)
        assert after["id"] == before["id"]
        assert after["directory"] == directory.stat().st_ino
        cache.tag("app:1", "app:2")


# The holder of a lock without a record


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock(1), of util-linux")
@pytest.mark.parametrize("name", ["locks/write.lock", "locks"])
def test_a_lock_holder_without_a_record_is_named_by_the_kernel(cachedb: Run, directory: Path, name: str) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", APP)
    command: list[str | Path] = ["flock", "--no-fork", directory / name, "sleep", "60"]
    with subprocess.Popen(command) as process:
        try:
            assert wait_until(lambda: _is_locked(directory / name))
            done = cachedb("tag", "app:1", "app:2", env={**os.environ, "CACHEDB_WAIT": "0.3"})
            assert done.returncode == 1
            assert f"process {process.pid} (sleep 60)" in done.stderr
            listed = cachedb("ps")
            assert listed.returncode == 0
            assert (str(process.pid) in listed.stdout) == (name != "locks")
        finally:
            process.kill()


def _is_locked(path: Path) -> bool:
    try:
        os.close(_lock_now(path))
    except BlockingIOError:
        return True
    return False


@pytest.mark.slow
def test_a_process_that_locks_the_index_exclusively_is_named(cachedb: Run, directory: Path) -> None:
    Cache.open(directory).close()
    script = """
        import sqlite3, sys, time
        shell = sqlite3.connect(sys.argv[1], isolation_level=None)
        shell.execute("PRAGMA locking_mode = EXCLUSIVE")
        shell.execute("BEGIN IMMEDIATE")
        print(flush=True)
        time.sleep(60)
        """
    with running(script, directory / "index.db") as outsider:
        done = cachedb("ls", env={**os.environ, "CACHEDB_WAIT": "0.3"})
        assert f"process {outsider.pid} (" in done.stderr
        assert cachedb("ps", env={**os.environ, "CACHEDB_WAIT": "0.3"}).returncode == 0


# Another directory at the path of an open cache


def assert_replaced(cache: Cache) -> None:
    for call in (
        lambda: save(cache, "app:2", image(2)),
        lambda: cache.remove_manifest("app:1"),
        lambda: cache.verify(repair=True),
        cache.list_manifests,
    ):
        with pytest.raises(CacheReplaced, match="was moved, removed or replaced while it was open"):
            call()


def test_a_link_that_leads_to_another_cache_now_is_not_followed(directory: Path, tmp_path: Path) -> None:
    link, second = tmp_path / "link", tmp_path / "second"
    link.symlink_to(directory)
    directory.mkdir()
    with Cache.open(link) as cache, cache.hold():
        save(cache, "app:1", APP)
        shutil.copytree(directory, second)
        link.unlink()
        link.symlink_to(second)
        before = read_files(second)
        assert_replaced(cache)
        assert read_files(second) == before
        link.unlink()
        link.symlink_to(directory)
        cache.tag("app:1", "app:2")
        assert list_names(cache) == ["app:1", "app:2"]


def test_nothing_is_written_to_a_file_system_that_is_mounted_over_an_open_cache(cache: Cache) -> None:
    save(cache, "app:1", APP)
    with mounted(cache.directory, "-t", "tmpfs", "tmpfs") as empty:
        assert_replaced(cache)
        assert os.listdir(empty) == []
    cache.tag("app:1", "app:2")
    assert list_names(cache) == ["app:1", "app:2"]


# The user's own output


OWN_FILES = ["index.db", "index.db-wal", "cachedb.json", "policy.toml", "reserve", "locks/write.lock", "trash/new"]


def read_files(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file() and "index.db" not in path.name]
    return {str(path): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", OWN_FILES)
@pytest.mark.parametrize("way", ["path", "link"])
def test_an_export_over_the_caches_own_files_is_refused(cache: Cache, tmp_path: Path, name: str, way: str) -> None:
    save(cache, "app:1", APP)
    cache.set_policy("")
    path = cache.directory / name
    if way == "link":
        (tmp_path / "link").symlink_to(cache.directory)
        path = tmp_path / "link" / name
    before = read_files(cache.directory)
    for form in ("docker", "oci-dir"):
        with pytest.raises(CacheError, match="belongs to the cache itself: name a path elsewhere"):
            cache.export("app:1", path, format=form)
    assert read_files(cache.directory) == before
    assert not cache.verify().problems


@pytest.mark.parametrize("name", ["blobs", "blobs/sha256", "trash", "quarantine"])
def test_an_export_through_a_bind_mount_of_the_caches_folder_is_refused(
    cache: Cache, tmp_path: Path, name: str
) -> None:
    save(cache, "app:1", APP)
    (cache.directory / name).mkdir(exist_ok=True)
    before = read_files(cache.directory)
    with mounted(tmp_path / "mounted", "--bind", cache.directory / name) as folder:
        for path in (folder, folder / "app"):
            for form in ("docker", "oci-dir"):
                with pytest.raises(CacheError, match="belongs to the cache itself: name a path elsewhere"):
                    cache.export("app:1", path, format=form)
        with pytest.raises(CacheError, match="is inside the cache: name a file elsewhere"):
            schema.back_up(cache.directory, folder / "copy.db")
    assert read_files(cache.directory) == before


def test_a_layout_whose_blobs_are_the_caches_own_is_not_written_to(cache: Cache, tmp_path: Path) -> None:
    save(cache, "app:1", APP)
    layout = tmp_path / "layout"
    cache.export("app:1", layout, format="oci-dir")
    before = {path: path.stat().st_ino for path in (cache.directory / "blobs" / "sha256").iterdir()}
    with (
        mounted(layout / "blobs", "--bind", cache.directory / "blobs"),
        pytest.raises(CacheError, match="belongs to the cache itself: name a path elsewhere"),
    ):
        cache.export("app:1", layout, format="oci-dir")
    assert {path: path.stat().st_ino for path in (cache.directory / "blobs" / "sha256").iterdir()} == before


def test_an_export_to_the_cache_directory_is_refused(cache: Cache) -> None:
    save(cache, "app:1", APP)
    for form in ("docker", "oci-dir"):
        with pytest.raises(CacheError, match="belongs to the cache itself: name a path elsewhere"):
            cache.export("app:1", cache.directory, format=form)


def test_a_report_over_the_caches_own_files_is_refused(cachedb: Run, cache: Cache) -> None:
    for command in (["report", "--html"], ["prune", "--max-size", "1B", "--plan"]):
        result = cachedb(*command, str(cache.directory / "index.db"))
        assert (result.returncode, result.stdout) == (1, "")
        assert "belongs to the cache itself" in result.stderr
    assert not cache.verify().problems


def test_an_export_beside_the_caches_own_files_is_possible(cache: Cache) -> None:
    save(cache, "app:1", APP)
    (cache.directory / "exports" / "locks").mkdir(parents=True)
    for name in ("app.tar", "exports/locks/app.tar", "exports/index.db"):
        cache.export("app:1", cache.directory / name)
        assert (cache.directory / name).is_file()
