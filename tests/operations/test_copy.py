"""Copies of a cache: a copy is one snapshot while others write, complete or absent, and independent of its source."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sqlite3
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cachedb import Cache, CacheError, DamagedIndex, DigestMismatch, NotACache, StorageError
from cachedb.content.session import Session
from cachedb.disk import locks, marker
from cachedb.disk.folders import Folders
from cachedb.disk.layout import POLICY_FILE, UNFINISHED_INDEX
from cachedb.index import drift
from cachedb.index.sqlite import backups, prepare
from cachedb.index.sqlite.database import Database
from cachedb.operations import copy, verify
from cachedb.operations.policy import Keep
from tests.conftest import Run, files_of, running, snapshot, start_python, stored_rows
from tests.support import make
from tests.support.index_file import change_index
from tests.support.make import image, save
from tests.support.mounting import mounted
from tests.support.promises import check

LARGE = make.random_bytes(3 * 1024 * 1024, 7)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "copy"


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make reflinks and hard links fail."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    monkeypatch.setattr(copy, "_link", lambda *_: False)


def list_names(directory: Path) -> set[str]:
    with Cache.open(directory) as cache:
        return {str(name) for name in cache.list_names()}


def blob_path(directory: Path, data: bytes) -> Path:
    return directory / "blobs" / "sha256" / make.hex_of(data)


def overwrite(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


# What is copied


def test_a_copy_has_all_images_and_blobs_and_is_sound(cache: Cache, target: Path) -> None:
    save(cache, "app:1", image(1, 2))
    save(cache, "app:2", image(2, 3))
    done = cache.copy(target)
    assert (done.directory, done.images) == (target, 2)
    assert (done.blobs, done.bytes) == (len(files_of(cache.directory)), sum(files_of(cache.directory).values()))
    assert files_of(target) == files_of(cache.directory) == stored_rows(target)
    assert drift.check(target) == []
    assert target.stat().st_mode & 0o777 == 0o700
    assert (target / "index.db").stat().st_mode & 0o777 == 0o600
    for digest in files_of(target):
        assert (target / "blobs" / digest.replace(":", "/")).stat().st_mode & 0o777 == 0o444
    check(target)
    assert list_names(target) == {"app:1", "app:2"}


def test_an_empty_cache_is_copied_into_an_empty_directory(cache: Cache, target: Path) -> None:
    target.mkdir()
    assert cache.copy(target)[1:4] == (0, 0, 0)
    check(target)


def test_a_directory_may_have_a_name_that_is_no_text(cache: Cache, tmp_path: Path) -> None:
    save(cache, "app:1", image(1))
    cache.copy(tmp_path / os.fsdecode(b"deep/\xff\n"))
    check(tmp_path / os.fsdecode(b"deep/\xff\n"))


def test_leases_of_processes_and_trash_stay_behind_and_holds_are_copied(cache: Cache, target: Path) -> None:
    save(cache, "app:1", image(1))
    cache.add_hold("app:1")
    loose = cache.add_blob(b"leased by a live process")
    change_index(cache.directory, f"INSERT INTO trash (digest, size) VALUES ('{make.digest_of(b'forgotten')}', 9)")
    before = snapshot(cache.directory)
    cache.copy(target)
    assert snapshot(cache.directory) == before, "the copy left its own leases"
    left: dict[str, Any] = {**read_tables(target)}
    assert {row[1] for row in left["leases"]} == {row[0] for row in left["lasting_holds"]} != set()
    assert left["trash"] == []
    assert loose in files_of(target), "a blob stored at the snapshot is missing"
    check(target)
    assert loose not in files_of(target)


def test_the_policy_is_copied_and_changes_independently(cache: Cache, target: Path) -> None:
    cache.set_policy("[[keep]]\nnewest = 3\n")
    cache.copy(target)
    cache.set_policy("")
    with Cache.open(target) as copied:
        assert copied.get_policy().keep == (Keep(newest=3),)
    assert (target / POLICY_FILE).stat().st_mode & 0o777 == 0o600


def test_the_policy_of_an_interrupted_copy_is_replaced_and_a_foreign_one_is_not(cache: Cache, target: Path) -> None:
    cache.set_policy("[[keep]]\nnewest = 3\n")
    target.mkdir()
    (target / POLICY_FILE).write_text("from an interrupted copy")
    with pytest.raises(NotACache, match=f"it holds '{POLICY_FILE}'"):
        cache.copy(target)
    (target / UNFINISHED_INDEX).touch()
    (target / POLICY_FILE).rename(target.with_name("elsewhere"))
    (target / POLICY_FILE).symlink_to(target.with_name("elsewhere"))
    with pytest.raises(NotACache, match=f"it holds '{POLICY_FILE}'"):
        cache.copy(target)
    target.with_name("elsewhere").rename(target / POLICY_FILE)
    cache.copy(target)
    with Cache.open(target) as copied:
        assert copied.get_policy().keep == (Keep(newest=3),)


def read_tables(directory: Path) -> dict[str, list[tuple[object, ...]]]:
    shell = sqlite3.connect(directory / "index.db")
    try:
        return {
            name: shell.execute(f"SELECT * FROM {name}").fetchall() for name in ("leases", "lasting_holds", "trash")
        }
    finally:
        shell.close()


WRITER = """
import sys, threading
from cachedb import Cache
from tests.support import make
from pathlib import Path
directory, folder = map(Path, sys.argv[1:])
cache = Cache.open(directory)
number = 0
while True:
    number += 1
    pair = {f"left:{number}": make.image(1, number + 10), f"right:{number}": make.image(2, number + 10)}
    cache.cache_from_tar(make.write(folder / "pair.tar", make.oci_files(pair)))
    if number > 3:
        cache.remove_manifest(f"left:{number - 3}", f"right:{number - 3}")
    if number == 4:
        print("running", flush=True)
    cache.collect_garbage()
"""


@pytest.mark.slow
def test_a_copy_is_one_snapshot_while_others_write_and_collect(cache: Cache, tmp_path: Path) -> None:
    with running(WRITER, cache.directory, tmp_path):
        found = set()
        for number in range(6):
            target = tmp_path / f"copy-{number}"
            cache.copy(target)
            check(target)
            copied_names = list_names(target)
            left, right = (
                {name.partition(":")[2] for name in copied_names if name.startswith(side)} for side in ("l", "r")
            )
            assert left == right, "the copy has only one of two names that one transaction added or removed"
            assert len(left) in (3, 4)
            with Cache.open(target) as copied:
                assert all(copied.is_image_complete(name) for name in copied_names)
            found.add(frozenset(copied_names))
        assert len(found) > 1, "nothing was written meanwhile"
    cache.close()
    check(cache.directory)


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("step", ["copy_snapshot", "_copy_blobs"])
def test_an_image_that_is_removed_during_the_copy_is_in_it(
    cache: Cache, target: Path, late: bool, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(cache, "app:1", image(1))
    owner: Any = backups if step == "copy_snapshot" else copy
    run_step, lease = getattr(owner, step), copy._lease_stored

    def save_late(*arguments: Any) -> None:
        lease(*arguments)
        if late:
            with Cache.open(cache.directory) as other:
                save(other, "late:1", image(4))

    def remove_first(*arguments: Any, **options: Any) -> Any:
        with Cache.open(cache.directory) as other:
            other.remove_manifest(*other.list_names())
            other.collect_garbage()
        return run_step(*arguments, **options)

    monkeypatch.setattr(copy, "_lease_stored", save_late)
    monkeypatch.setattr(owner, step, remove_first)
    cache.copy(target)
    monkeypatch.undo()
    check(target)
    assert list_names(target) == ({"app:1", "late:1"} if late else {"app:1"})
    cache.close()
    with Cache.open(cache.directory) as other:
        other.collect_garbage()
    assert files_of(cache.directory) == {}, "a lease of the copy was left"


def test_a_copy_leases_blobs_in_batches(cache: Cache, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "_LEASES_PER_WRITE", 2)
    save(cache, "app:1", image(1, 2, 3))
    before = snapshot(cache.directory)
    cache.copy(target)
    check(target)
    assert snapshot(cache.directory) == before


def test_a_cache_that_can_only_be_read_is_copied(cache: Cache, target: Path) -> None:
    save(cache, "app:1", image(1))
    before = snapshot(cache.directory)
    cache._database.access.is_writable = False
    cache.copy(target)
    cache._database.access.is_writable = True
    assert snapshot(cache.directory) == before
    check(target)


# Reflinks, hard links and copies of blobs


def test_blobs_are_hard_links_if_the_file_system_has_no_reflinks(
    cache: Cache, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    made = image(1)
    save(cache, "app:1", made)
    done = cache.copy(target)
    assert (done.reflinks, done.hard_links) == (0, 3)
    assert blob_path(target, made.config).samefile(blob_path(cache.directory, made.config))
    cache.remove_manifest("app:1")
    cache.collect_garbage()
    check(target)
    assert files_of(target) == {digest: len(data) for digest, data in made.blobs.items()}


def test_blobs_are_reflinks_if_the_file_system_has_them(
    cache: Cache, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.ioctl

    def clone(made: int, request: int, argument: Any) -> object:
        if request != 0x40049409:  # FICLONE
            return real(made, request, argument)
        return os.write(made, os.pread(argument, 1 << 20, 0))

    monkeypatch.setattr(fcntl, "ioctl", clone)
    made = image(1)
    save(cache, "app:1", made)
    done = cache.copy(target)
    assert (done.reflinks, done.hard_links) == (3, 0)
    assert not blob_path(target, made.config).samefile(blob_path(cache.directory, made.config))
    assert blob_path(target, made.config).stat().st_mode & 0o777 == 0o444
    check(target)


@pytest.mark.parametrize("can_clone", [False, True])
def test_a_corrupt_blob_is_neither_linked_nor_cloned(
    cache: Cache, cachedb: Run, target: Path, can_clone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clone(made: int, target: str) -> bool:
        Path(target).write_bytes(os.pread(made, 1 << 20, 0))
        return True

    made = image(1)
    save(cache, "app:1", made)
    overwrite(blob_path(cache.directory, made.config), made.config[::-1])
    with monkeypatch.context() as patch:
        patch.setattr(copy, "_clone", clone if can_clone else lambda *_: False)
        with pytest.raises(DigestMismatch, match=r"and has sha256:.*: run `cachedb verify --repair` and copy again"):
            cache.copy(target)
        assert not target.exists()
        cache.copy(target, verify=False)
    assert cachedb("copy", target.with_name("second")).returncode == 1
    assert cachedb("copy", "--no-verify", target.with_name("third")).returncode == 0


@pytest.mark.parametrize("mode", [0o464, 0o446])
def test_a_blob_that_others_can_write_to_is_copied(
    cache: Cache, target: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy, "_clone", lambda *_: False)
    made = image(1)
    save(cache, "app:1", made)
    blob_path(cache.directory, made.config).chmod(mode)
    assert cache.copy(target).hard_links == 2
    assert not blob_path(target, made.config).samefile(blob_path(cache.directory, made.config))
    assert blob_path(target, made.config).stat().st_mode & 0o777 == 0o444


@pytest.mark.usefixtures("no_links")
def test_without_links_the_content_is_verified(cache: Cache, target: Path) -> None:
    made = image(1)
    save(cache, "app:1", made)
    cache.add_blob(LARGE)
    assert cache.copy(target)[4:] == (0, 0)
    check(target)
    shutil.rmtree(target)
    overwrite(blob_path(cache.directory, made.layers[0]), b"x" * len(made.layers[0]))
    with pytest.raises(DigestMismatch, match=r"should have digest .*: run `cachedb verify --repair` and copy again$"):
        cache.copy(target)
    assert not target.exists()


def test_a_missing_or_short_file_fails_the_copy(cache: Cache, target: Path) -> None:
    made = image(1)
    save(cache, "app:1", made)
    overwrite(blob_path(cache.directory, made.config), made.config[:-1])
    with pytest.raises(StorageError, match=r"has \d+ bytes and should have \d+: run `cachedb verify --repair` and"):
        cache.copy(target)
    blob_path(cache.directory, made.config).unlink()
    with pytest.raises(StorageError, match=r"is missing: run `cachedb verify --repair` and copy again$"):
        cache.copy(target)
    blob_path(cache.directory, made.config).symlink_to("/etc/hostname")
    with pytest.raises(StorageError, match="symbolic link"):
        cache.copy(target)
    assert not target.exists()
    assert snapshot(cache.directory)["leases"] == []


def test_a_damaged_index_is_not_copied(cache: Cache, target: Path) -> None:
    save(cache, "app:1", image(1))
    change_index(cache.directory, "INSERT INTO image_blobs VALUES (1, 99, 99, 'layer', 'text/plain', NULL, NULL)")
    with pytest.raises(
        DamagedIndex, match="refers to a row of blobs that does not exist: run `cachedb verify --repair`"
    ):
        cache.copy(target)
    assert not target.exists()


# The target directory


def test_only_a_new_or_empty_directory_outside_the_cache_is_accepted(
    cache: Cache, tmp_path: Path, target: Path
) -> None:
    save(cache, "app:1", image(1))
    before = snapshot(cache.directory)
    for inside in (cache.directory, cache.directory / "backups" / "copy"):
        with pytest.raises(NotACache, match="is inside the cache: name a directory elsewhere"):
            cache.copy(inside)
    (tmp_path / "link").symlink_to(cache.directory)
    with pytest.raises(NotACache, match="is inside the cache"):
        cache.copy(tmp_path / "link" / "copy")
    target.mkdir()
    (target / "notes.txt").touch()
    with pytest.raises(NotACache, match=r"is not empty \(it holds 'notes.txt'\): name a new or empty directory"):
        cache.copy(target)
    assert os.listdir(target) == ["notes.txt"]
    with pytest.raises(StorageError, match="cannot copy the cache: "):
        cache.copy(target / "notes.txt")
    cache.copy(tmp_path / "second")
    with pytest.raises(NotACache, match="is a cache already"):
        cache.copy(tmp_path / "second")
    assert snapshot(cache.directory) == before
    check(tmp_path / "second")


@pytest.mark.parametrize("name", ["", "backups", "blobs/sha256", "ingest/partial"])
def test_a_bind_mount_of_the_cache_is_not_copied_into(cache: Cache, target: Path, name: str) -> None:
    save(cache, "app:1", image(1))
    (cache.directory / name).mkdir(exist_ok=True)
    before = snapshot(cache.directory)
    with mounted(target, "--bind", cache.directory / name):
        for path in (target, target / "new" / "copy"):
            with pytest.raises(NotACache, match="is inside the cache: name a directory elsewhere"):
                cache.copy(path)
    assert snapshot(cache.directory) == before


def test_only_one_process_copies_into_a_directory(cache: Cache, target: Path) -> None:
    target.mkdir()
    lock = locks.acquire(target / UNFINISHED_INDEX)
    assert lock is not None
    with pytest.raises(CacheError, match="another process is copying into"):
        cache.copy(target)
    assert os.listdir(target) == [UNFINISHED_INDEX]
    locks.release(lock)
    cache.copy(target)
    check(target)


# Interrupted copies

KILLED = """
import os, signal, sys
from cachedb import Cache
from cachedb.operations import copy
copy_blob, left = copy._copy_blob, int(sys.argv[3])
def copy_and_die(*arguments):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return copy_blob(*arguments)
copy._copy_blob = copy_and_die
with Cache.open(sys.argv[1]) as cache:
    print(flush=True)
    cache.copy(sys.argv[2])
"""


@pytest.mark.slow
def test_a_killed_copy_is_no_cache_and_the_next_one_succeeds(cachedb: Run, cache: Cache, target: Path) -> None:
    save(cache, "app:1", image(1, 2, 3))
    for left in (1, 3):
        with running(KILLED, cache.directory, target, left) as process:
            process.wait(60)
        assert (target / UNFINISHED_INDEX).exists()
        with pytest.raises(NotACache):
            Cache.open(target)
        for command in ("ls", "verify --repair", "gc", "db current"):
            done = cachedb("--dir", target, *command.split())
            assert done.returncode in (1, 3) or "no cache yet" in done.stdout
        (target / "notes.txt").touch()
        with pytest.raises(NotACache, match=r"it holds 'notes\.txt'"):
            cache.copy(target)
        (target / "notes.txt").unlink()
        (target / "blobs" / "sha256" / "notes.txt").touch()
        with pytest.raises(NotACache, match="is not a blob"):
            cache.copy(target)
        (target / "blobs" / "sha256" / "notes.txt").unlink()
    cache.copy(target)
    check(target)
    assert list_names(target) == {"app:1"}
    cache.close()
    check(cache.directory)


def test_a_link_in_an_unfinished_copy_is_not_followed(cache: Cache, target: Path, tmp_path: Path) -> None:
    save(cache, "app:1", image(1))
    cache.copy(tmp_path / "other")
    target.mkdir()
    (target / UNFINISHED_INDEX).touch()
    (target / "blobs").symlink_to(tmp_path / "other" / "blobs")
    with pytest.raises(NotACache, match="it holds 'blobs'"):
        cache.copy(target)
    (target / "blobs").unlink()
    (target / UNFINISHED_INDEX).unlink()
    (target / UNFINISHED_INDEX).symlink_to(tmp_path / "other" / "index.db")
    with pytest.raises(NotACache, match=f"it holds '{UNFINISHED_INDEX}'"):
        cache.copy(target)
    check(tmp_path / "other")


def test_a_foreign_file_with_the_name_of_an_unfinished_copy_is_not_emptied(
    cache: Cache, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(cache, "app:1", image(1))
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    precious.chmod(0o640)
    target.mkdir()
    (target / UNFINISHED_INDEX).hardlink_to(precious)
    with pytest.raises(NotACache, match=f"it holds '{UNFINISHED_INDEX}'"):
        cache.copy(target)
    assert os.listdir(target) == [UNFINISHED_INDEX]
    monkeypatch.setattr(copy, "_is_leftover", lambda _: True)  # the file appears after the check
    with pytest.raises(StorageError, match="the lock file is a hard link to another file"):
        cache.copy(target)
    assert precious.read_bytes() == b"mine"
    assert stat.S_IMODE(precious.stat().st_mode) == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root to give a file to another user")
def test_a_file_of_another_user_with_the_name_of_an_unfinished_copy_is_not_emptied(
    cache: Cache, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(cache, "app:1", image(1))
    target.mkdir()
    (target / UNFINISHED_INDEX).write_bytes(b"theirs")
    os.chown(target / UNFINISHED_INDEX, 65534, 65534)
    with pytest.raises(NotACache, match=f"it holds '{UNFINISHED_INDEX}'"):
        cache.copy(target)
    monkeypatch.setattr(copy, "_is_leftover", lambda _: True)  # the file appears after the check
    with pytest.raises(NotACache, match="is not from a copy by this user"):
        cache.copy(target)
    assert (target / UNFINISHED_INDEX).read_bytes() == b"theirs"


def test_an_interrupt_leaves_nothing(cache: Cache, target: Path) -> None:
    save(cache, "app:1", image(1, 2))
    target.mkdir()

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.copy(target, progress=interrupt)
    assert os.listdir(target) == []
    assert snapshot(cache.directory)["leases"] == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("nothing can be mounted: run as root")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def test_a_copy_to_a_full_disk_leaves_no_files(cache: Cache, small_disk: Path) -> None:
    save(cache, "app:1", image(1))
    large = cache.add_blob(LARGE)
    with pytest.raises(StorageError, match="No space left on device"):
        cache.copy(small_disk)
    assert os.listdir(small_disk) == []
    with pytest.raises(StorageError, match="No space left on device"):
        cache.copy(small_disk / "deep" / "copy")
    assert os.listdir(small_disk) == []
    cache.close()
    with Cache.open(cache.directory) as other:
        other.collect_garbage()
        assert not other.has_blob(large)
        other.copy(small_disk)
    assert list_names(small_disk) == {"app:1"}


def test_progress_ends_at_all_bytes(cache: Cache, target: Path) -> None:
    save(cache, "app:1", image(1, 2))
    calls: list[tuple[int, int]] = []
    done = cache.copy(target, progress=lambda count, total: calls.append((count, total)))
    assert calls[-1] == (done.bytes, done.bytes)


# The command line


@pytest.mark.slow
def test_the_command_prints_a_summary(cachedb: Run, cache: Cache, tmp_path: Path, target: Path) -> None:
    save(cache, "app:1", image(1))
    done = cachedb("copy", target)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("images: 1; blobs: 3, ")
    quiet = cachedb("copy", "-q", tmp_path / "quiet")
    assert (quiet.returncode, quiet.stdout) == (0, f"{tmp_path / 'quiet'}\n")
    found = json.loads(cachedb("copy", "--format", "json", tmp_path / "json").stdout)
    assert set(found) == {"directory", "images", "blobs", "bytes", "reflinks", "hard_links", "size"}
    assert found["size"] == found["bytes"]
    assert (found["directory"], found["images"], found["blobs"]) == (str(tmp_path / "json"), 1, 3)
    again = cachedb("copy", target)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == f"cachedb: {str(target)!r} is a cache already: name a new or empty directory\n"
    assert cachedb("copy", "").returncode == 1
    assert cachedb("--dir", tmp_path / "none", "copy", tmp_path / "x").returncode == 3
    assert not (tmp_path / "x").exists()
    assert cachedb("--dir", target, "verify").returncode == 0


# Copies that other programs make, file by file


def copy_files(source: Path, target: Path, *, without: tuple[str, ...] = ()) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*-shm", *without))


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that gets the directory of each cache that is checked as a copy."""
    found: list[Path] = []
    check_copy = prepare._check_copy

    def note_and_check(database: Database, folders: Folders) -> None:
        found.append(database.directory)
        check_copy(database, folders)

    monkeypatch.setattr(prepare, "_check_copy", note_and_check)
    return found


def read_marker(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "cachedb.json").read_text()))


def make_torn_copy(source: Path, target: Path, *, without: tuple[str, ...] = ()) -> None:
    """Copy a live cache file by file; many images are added and removed between the index and its WAL."""
    with Cache.open(source) as cache:
        for number in range(60):
            cache.tag("app:1", f"name-{number}:1")
        copy_files(source, target, without=("index.db-wal", *without))
        shell = sqlite3.connect(source / "index.db")
        for number in range(60):
            cache.remove_manifest(f"name-{number}:1")
            cache.tag("app:1", f"other-{number * 7919 % 60}:1")
        shell.execute("PRAGMA wal_checkpoint(RESTART)")
        shell.close()
        for number in range(30):
            cache.tag("app:1", f"third-{number * 7919 % 60}:1")
        shutil.copy(source / "index.db-wal", target / "index.db-wal")


@pytest.mark.slow
@pytest.mark.parametrize("without", [(), ("cachedb.json",)])
def test_a_torn_copy_is_refused_until_it_is_repaired(
    cachedb: Run, directory: Path, target: Path, without: tuple[str, ...]
) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1, 2))
    make_torn_copy(directory, target, without=without)
    for _ in range(2):
        for command in ("ls", "gc", "stats", "db check", "db backup"):
            done = cachedb("--dir", target, *command.split())
            assert (done.returncode, done.stdout) == (1, "")
            assert "damaged" in done.stderr
            assert "`cachedb verify --repair`" in done.stderr
    assert cachedb("--dir", target, "verify").returncode == 1
    assert cachedb("--dir", target, "verify", "--repair").returncode == 1
    assert cachedb("--dir", target, "ls").returncode == 0
    check(target)
    check(directory)


def make_cache_long_ago(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(time, "time_ns", lambda: 0)
        with Cache.open(directory) as cache:
            save(cache, "app:1", image(1, 2))


def test_a_damaged_backup_that_is_copied_over_its_cache_is_refused_until_it_is_repaired(
    cachedb: Run, directory: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache_long_ago(directory, monkeypatch)
    before = (read_marker(directory), (directory / "cachedb.json").stat().st_ino)
    copy_files(directory, target)
    change_index(target, "DELETE FROM blobs WHERE id = 1")
    subprocess.run(["cp", "--archive", "--force", f"{target}/.", directory], check=True)
    assert (read_marker(directory), (directory / "cachedb.json").stat().st_ino) == before
    for _ in range(2):
        with pytest.raises(DamagedIndex, match="is a damaged copy of a cache"):
            Cache.open(directory)
    assert cachedb("verify", "--repair").returncode == 1
    with Cache.open(directory) as cache:
        assert cache.verify().problems == []


def test_a_cache_whose_owner_was_changed_is_checked_once_and_keeps_its_id(
    directory: Path, checks: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache_long_ago(directory, monkeypatch)
    before = read_marker(directory)
    blob_path(directory, image(1, 2).config).unlink()  # a cache is opened even if it lacks a blob
    os.chmod(directory / "cachedb.json", 0o600)
    with Cache.open(directory) as cache:
        Cache.open(directory).close()
        cache.tag("app:1", "app:2")
    assert checks == [directory]
    assert read_marker(directory)["id"] == before["id"]


def test_a_copy_that_lacks_a_blob_is_refused_until_it_is_repaired(cachedb: Run, directory: Path, target: Path) -> None:
    made = image(1)
    with Cache.open(directory) as cache:
        save(cache, "app:1", made)
    copy_files(directory, target)
    blob_path(target, made.config).unlink()
    with pytest.raises(DamagedIndex, match=r"is a damaged copy of a cache \(sha256:.* is missing or has"):
        Cache.open(target)
    assert cachedb("--dir", target, "verify", "--quick", "--repair").returncode == 1
    with Cache.open(target) as cache:
        assert not cache.is_image_complete("app:1")
    blob_path(directory, made.config).unlink()
    with Cache.open(directory) as cache:  # an original is opened even if it lacks a blob
        assert cache.has_blob(make.digest_of(made.layers[0]))


def test_a_sound_copy_is_a_cache_with_its_own_id(directory: Path, target: Path, checks: list[Path]) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
    copy_files(directory, target)
    first = read_marker(directory)
    for _ in range(2):
        assert list_names(target) == {"app:1"}
        assert list_names(directory) == {"app:1"}
    assert checks == [target]
    assert read_marker(directory) == first
    assert read_marker(target)["id"] != first["id"]
    assert read_marker(target)["inode"] == (target / "cachedb.json").stat().st_ino
    target.rename(target.with_name("renamed"))
    assert list_names(target.with_name("renamed")) == {"app:1"}
    assert checks == [target], "a renamed cache was checked as a copy"


def test_a_copy_that_can_only_be_read_is_checked_each_time(
    directory: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = image(1)
    with Cache.open(directory) as cache:
        save(cache, "app:1", made)
    copy_files(directory, target)
    monkeypatch.setattr(os, "access", lambda *_: False)
    before = read_marker(target)
    for _ in range(2):
        assert list_names(target) == {"app:1"}
    assert read_marker(target) == before
    blob_path(target, made.config).unlink()
    with pytest.raises(DamagedIndex, match="is a damaged copy"):
        Cache.open(target)
    assert list_names(directory) == {"app:1"}


def test_a_copy_on_a_full_disk_can_be_read(directory: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
    copy_files(directory, target)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(marker, "renew", full)
    assert list_names(target) == {"app:1"}
    monkeypatch.undo()
    assert list_names(target) == {"app:1"}
    assert read_marker(target)["id"] != read_marker(directory)["id"]


@pytest.mark.slow
def test_many_processes_open_a_copy_at_once(directory: Path, target: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
    copy_files(directory, target)
    script = (
        "import sys; from cachedb import Cache\nwith Cache.open(sys.argv[1]) as cache: cache.tag('app:1', sys.argv[2])"
    )
    started = [start_python(script, target, f"app:{number}") for number in range(2, 8)]
    for process in started:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert len(list_names(target)) == 7


def test_a_copy_is_accepted_once(directory: Path, target: Path) -> None:
    Cache.open(directory).close()
    copy_files(directory, target)
    first, second = Database(target), Database(target)
    assert first.folders.is_copy
    assert second.folders.is_copy
    prepare.accept_copy(first, check=True)
    accepted = read_marker(target)
    prepare.accept_copy(second, check=True)
    assert read_marker(target) == accepted, "a second id would end the work of the first process"
    first.close()
    second.close()


def test_a_repaired_copy_is_accepted_though_problems_remain(directory: Path, target: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
    copy_files(directory, target)
    (target / "blobs" / "sha256" / ("0" * 64)).write_bytes(b"x")
    database = Database(target)
    assert database.folders.is_copy
    session = Session(database)
    verify.verify(database, session, quick=False, repair=True)
    session.close()
    database.close()
    assert read_marker(target)["inode"] == (target / "cachedb.json").stat().st_ino


def test_a_cache_of_an_older_release_that_lacks_a_blob_can_be_opened(directory: Path) -> None:
    made = image(1)
    with Cache.open(directory) as cache:
        save(cache, "app:1", made)
    blob_path(directory, made.config).unlink()
    (directory / "cachedb.json").unlink()
    assert list_names(directory) == {"app:1"}
    assert read_marker(directory)["inode"] == (directory / "cachedb.json").stat().st_ino


def test_a_copy_whose_index_lacks_entries_is_refused(directory: Path, target: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
    copy_files(directory, target)
    for sql in (
        "UPDATE sqlite_master SET sql = sql || ' WHERE 0' WHERE name = 'ix_image_blobs_blob_id'",
        "REINDEX ix_image_blobs_blob_id",
        "UPDATE sqlite_master SET sql = replace(sql, ' WHERE 0', '') WHERE name = 'ix_image_blobs_blob_id'",
    ):
        shell = sqlite3.connect(target / "index.db", isolation_level=None)
        shell.execute("PRAGMA writable_schema = ON")
        shell.execute(sql)
        shell.close()
    for _ in range(2):
        with pytest.raises(DamagedIndex, match=r"is a damaged copy of a cache \(.*ix_image_blobs_blob_id"):
            Cache.open(target)


def test_a_pipe_in_the_place_of_a_blob_is_an_error(cache: Cache, tmp_path: Path) -> None:
    save(cache, "app:1", image(1))
    path = next((cache.directory / "blobs" / "sha256").iterdir())
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StorageError, match="it is not a regular file"):
        cache.copy(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
