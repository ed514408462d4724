"""Backups of the index: several at once, their descriptors, how many are kept, and which damage an error names."""

from __future__ import annotations

import gc
import os
import sqlite3
import threading
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cachedb import Cache, CacheError, DamagedIndex, StorageError
from cachedb.disk import locks
from cachedb.index.sqlite import backups
from cachedb.index.sqlite.database import Database
from cachedb.operations import restore, upgrade
from tests.support import make
from tests.support.make import save

Free = namedtuple("Free", "free")


def open_files() -> int:
    """Return how many files this process has open, without those that are garbage."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_of_two_backups_at_once_the_second_waits_and_both_are_whole(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(cache, "app:1", make.image(1))
    monkeypatch.setattr(backups, "_OPCODES", 10)
    held, asked, made = locks.held, threading.Event(), list[Path]()

    @contextmanager
    def held_by_second(path: Path, *arguments: Any) -> Any:
        if threading.current_thread() is second:
            asked.set()
        with held(path, *arguments) as lock:
            yield lock

    monkeypatch.setattr(locks, "held", held_by_second)
    second = threading.Thread(target=lambda: made.append(upgrade.back_up(cache.directory)))

    def progress(*_: object) -> None:
        """Begin the second in the middle of the first, and go on once it waits, or has ended."""
        if second.ident is None:
            second.start()
            while not asked.wait(0.01) and second.is_alive():
                pass
            assert not made, "the second has not waited"

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
def test_a_change_of_the_schema_needs_twice_the_index_and_a_mebibyte(
    index: Database, monkeypatch: pytest.MonkeyPatch, missing: int, enough: bool
) -> None:
    with index.raw() as connection:
        needed = 2 * backups.size_of(connection) + 1024 * 1024
    monkeypatch.setattr("shutil.disk_usage", lambda _: Free(needed - missing))
    if enough:
        assert backups.before_change(index, "0004", "0005").exists()
    else:
        with pytest.raises(StorageError, match=f"take up to {needed} bytes of disk, and {needed - missing} are free"):
            backups.before_change(index, "0004", "0005")


def test_while_the_schema_is_changed_one_backup_more_is_kept(cache: Cache, index: Database) -> None:
    for _ in range(backups.KEPT + 3):
        backups.before_change(index, "0004", "0005")
    assert len(backups.newest_first(cache.directory)) == backups.KEPT + 1
    backups.keep_newest(cache.directory)
    assert [path.name[:6] for path in backups.newest_first(cache.directory)] == ["000006", "000005", "000004"]


def damaged(path: Path, damage: str) -> None:
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
        ("a row that is gone", "row 1 of images refers to a row of blobs that is not there"),
    ],
)
def test_the_error_of_a_damaged_backup_names_the_file_and_the_damage(
    cache: Cache, tmp_path: Path, damage: str, words: str
) -> None:
    save(cache, "app:1", make.image(1))
    backup = upgrade.back_up(cache.directory, tmp_path / "backup.db")
    damaged(backup, damage)
    with pytest.raises(DamagedIndex) as raised:
        restore.restore(cache.directory, backup)
    text = str(raised.value)
    assert text.startswith(f"{str(backup)!r} is damaged, and was not restored: "), text
    assert words in text
    assert "\n" not in text
    assert cache.is_image_complete("app:1"), "the index is as it was"


def test_only_backups_from_before_changes_of_the_schema_are_deleted(cache: Cache) -> None:
    folder = cache.directory / "backups"
    for name in ("000001-0004-before-0005.db", "000002-0004-before-0005.db", "3-before-the-move.db", "000004-mine.db"):
        (folder / name).touch()
    backups.keep_newest(cache.directory, 1)
    assert sorted(os.listdir(folder)) == ["000002-0004-before-0005.db", "000004-mine.db", "3-before-the-move.db"]
