"""Backups of the index: several at once, their open files, the number that is kept, and errors of damaged ones."""

from __future__ import annotations

import gc
import os
import sqlite3
import threading
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cachedb import Busy, Cache, CacheError, DamagedIndex, StorageError
from cachedb.disk import locks, waiting
from cachedb.index.sqlite import backups
from cachedb.index.sqlite.database import Database
from cachedb.operations import restore, upgrade
from tests.support import make
from tests.support.make import save

Free = namedtuple("Free", "free")


def open_files() -> int:
    """Return how many files this process has open, after collecting garbage."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_a_second_backup_waits_for_the_first_and_both_are_complete(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(cache, "app:1", make.image(1))
    monkeypatch.setattr(backups, "_OPCODES", 10)
    held, asked, made = locks.hold_lock, threading.Event(), list[Path]()

    @contextmanager
    def note_second_and_hold(path: Path, *arguments: Any) -> Any:
        if threading.current_thread() is second:
            asked.set()
        with held(path, *arguments) as lock:
            yield lock

    monkeypatch.setattr(locks, "hold_lock", note_second_and_hold)
    second = threading.Thread(target=lambda: made.append(upgrade.back_up(cache.directory)))

    def progress(*_: object) -> None:
        """Start the second backup in the middle of the first; return when the second waits or has ended."""
        if second.ident is None:
            second.start()
            while not asked.wait(0.01) and second.is_alive():
                pass
            assert not made, "the second backup did not wait"

    first = upgrade.back_up(cache.directory, progress=progress)
    second.join(60)
    assert second.ident is not None
    assert not second.is_alive()
    assert [first, *made] == sorted((cache.directory / "backups").glob("*.db"))
    assert len(made) == 1
    for path in (first, *made):
        shell = sqlite3.connect(path)
        assert shell.execute("SELECT repository FROM images").fetchall() == [("app",)]
        assert shell.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        shell.close()


@pytest.mark.slow
def test_a_backup_leaves_no_descriptor_open(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backups, "_OPCODES", 10)

    def fail(*_: object) -> None:
        raise RuntimeError("no further")

    def work(number: int) -> None:
        upgrade.back_up(cache.directory)
        upgrade.back_up(cache.directory, tmp_path / f"{number}.db")
        with pytest.raises(RuntimeError, match="no further"):
            upgrade.back_up(cache.directory, progress=fail)
        with pytest.raises(CacheError, match="there is no folder"):
            upgrade.back_up(cache.directory, tmp_path / "nowhere" / "x.db")

    work(0)
    before = open_files()
    for number in range(1, 6):
        work(number)
    assert open_files() == before


@pytest.mark.parametrize(("missing", "enough"), [(0, True), (1, False)])
def test_a_schema_change_needs_twice_the_indexs_size_and_one_mebibyte_free(
    index: Database, monkeypatch: pytest.MonkeyPatch, missing: int, enough: bool
) -> None:
    with index.raw() as connection:
        needed = 2 * backups.size_of(connection) + 1024 * 1024
    monkeypatch.setattr("shutil.disk_usage", lambda _: Free(needed - missing))
    if enough:
        assert backups.back_up_before_change(index, "0004", "0005").exists()
    else:
        with pytest.raises(StorageError, match=f"take up to {needed} bytes of disk, and {needed - missing} are free"):
            backups.back_up_before_change(index, "0004", "0005")


def test_one_more_backup_is_kept_during_a_schema_change(cache: Cache, index: Database) -> None:
    for _ in range(backups.KEPT + 3):
        backups.back_up_before_change(index, "0004", "0005")
    assert len(backups.list_backups(cache.directory)) == backups.KEPT + 1
    backups.keep_newest(cache.directory)
    assert [path.name[:6] for path in backups.list_backups(cache.directory)] == ["000006", "000005", "000004"]


def damage_backup(path: Path, damage: str) -> None:
    data = path.read_bytes()
    if damage == "cut short":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "no database":
        path.write_bytes(b"no database" * 1000)
    elif damage == "no schema":
        path.unlink()
        shell = sqlite3.connect(path)
        shell.execute("PRAGMA application_id = 0x63616462")
        shell.execute("CREATE TABLE other (x)")
        shell.close()
    else:
        shell = sqlite3.connect(path)
        shell.execute("PRAGMA foreign_keys = OFF")
        shell.execute("DELETE FROM blobs")
        shell.commit()
        shell.close()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("cut short", "database disk image is malformed"),
        ("no database", "file is not a database"),
        ("no schema", "it has lost its schema"),
        ("a missing row", "refers to a row of blobs that does not exist"),
    ],
)
def test_the_error_of_a_damaged_backup_names_the_file_and_the_damage(
    cache: Cache, tmp_path: Path, damage: str, words: str
) -> None:
    save(cache, "app:1", make.image(1))
    backup = upgrade.back_up(cache.directory, tmp_path / "backup.db")
    damage_backup(backup, damage)
    with pytest.raises(DamagedIndex) as raised:
        restore.restore(cache.directory, backup)
    text = str(raised.value)
    assert text.startswith(f"{str(backup)!r} is damaged, and was not restored: "), text
    assert words in text
    assert "\n" not in text
    assert cache.is_image_complete("app:1"), "the failed restore changed the index"


def test_only_backups_from_before_changes_of_the_schema_are_deleted(cache: Cache) -> None:
    folder = cache.directory / "backups"
    for name in ("000001-0004-before-0005.db", "000002-0004-before-0005.db", "3-before-the-move.db", "000004-mine.db"):
        (folder / name).touch()
    backups.keep_newest(cache.directory, 1)
    assert sorted(os.listdir(folder)) == ["000002-0004-before-0005.db", "000004-mine.db", "3-before-the-move.db"]


def test_a_backup_waits_for_another_only_as_long_as_the_cache_allows(cache: Cache) -> None:
    index = Database(cache.directory, wait=0)
    with locks.hold_lock(cache.directory / "backups" / ".lock"), pytest.raises(Busy, match="did not wait for the lock"):
        backups.back_up(index, "mine")
    index.close()


def test_the_wait_for_another_backup_ends_when_this_one_begins(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_SILENT_SECONDS", 0)
    save(cache, "app:1", make.image(1))
    awaited: list[set[str]] = []
    hold_lock = locks.hold_lock

    @contextmanager
    def hold_late(path: Path, wait: waiting.Wait) -> Iterator[Any]:
        for _ in range(2):
            wait.nap(0, lambda: "another process")
        assert waiting._logged_holders
        with hold_lock(path, wait) as file:
            yield file

    monkeypatch.setattr(locks, "hold_lock", hold_late)
    monkeypatch.setattr(backups, "_copy_index", lambda *_: awaited.append(set(waiting._logged_holders)))
    upgrade.back_up(cache.directory)
    assert awaited == [set()]


@pytest.mark.slow
@pytest.mark.parametrize(("digits", "is_number"), [(18, True), (19, False)])
def test_the_number_of_a_backup_has_up_to_18_digits(cache: Cache, digits: int, is_number: bool) -> None:
    first = upgrade.back_up(cache.directory)
    other = first.with_name(f"{'1' * digits}-0006.db")
    other.touch()
    assert backups.list_backups(cache.directory) == ([other, first] if is_number else [first, other])


def test_no_folder_with_the_name_of_a_backup_blocks_a_backup(cache: Cache) -> None:
    save(cache, "app:1", make.image(1))
    names = (f".backup-{'0' * 32}", "000007-0005-before-0006.db", "000008-rebuilt.db", f"{'9' * 240}-0006.db")
    for name in names:
        (cache.directory / "backups" / name / "deep").mkdir(parents=True)
    made = upgrade.back_up(cache.directory)
    assert made.name.startswith("000009-")
    backups.keep_newest(cache.directory, 0)
    restore.restore(cache.directory, made)
    assert backups.list_backups(cache.directory) == [made]
    assert set(names) < set(os.listdir(cache.directory / "backups"))
