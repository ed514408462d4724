"""Every file of a cache has a word, and its bytes count under it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cachedb import Cache
from cachedb.disk.sizes import measure_files

DIGEST = f"sha256-{'0' * 64}"


@pytest.mark.parametrize(
    ("path", "word", "age", "is_freed"),
    [
        ("index.db-journal", "index", 0, False),
        ("policy.toml", "policy", 0, False),
        (f"ingest/partial/{DIGEST}", "partial downloads", 86_000, False),
        (f"ingest/partial/{DIGEST}", "old partial downloads", 86_500, True),
        ("ingest/partial/notes.txt", "partial downloads", 86_500, False),
        (f"ingest/1-{'0' * 12}/7", "ingest", 0, False),
        ("locks/x", "locks", 0, False),
        ("quarantine/index.db.1", "quarantine", 0, False),
        ("backups/0001.db", "backups", 0, False),
        (f"trash/{DIGEST}", "trash", 0, True),
        ("trash/notes.txt", "other files", 0, False),
        ("reserve.inodes/99", "reserve", 0, False),
        ("notes.txt", "other files", 0, False),
        ("notes/more/notes.txt", "other files", 0, False),
    ],
)
def test_a_file_counts_under_one_word_and_is_freed_by_a_prune_or_stays(
    directory: Path, path: str, word: str, age: float, is_freed: bool
) -> None:
    Cache.open(directory).close()
    before = measure_files(directory)
    file = directory / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x" * 777)
    changed_at = file.stat().st_mtime - age
    os.utime(file, (changed_at, changed_at))
    after = measure_files(directory)
    grown = {name: size for name, size in {**after.kept, **after.freed}.items() if size != before.kept.get(name, 0)}
    assert grown == {word: before.kept.get(word, 0) + 777}
    assert after.total_size == before.total_size + 777
    assert after.freed_size == (777 if is_freed else 0)
    if word not in ("index", "policy", "ingest"):  # such a file is not what it should be
        with Cache.open(directory) as cache:
            cache.prune(to_free=1)
        assert file.exists() is not is_freed


def test_a_file_with_two_names_counts_once(directory: Path) -> None:
    Cache.open(directory).close()
    before = measure_files(directory).total_size
    (directory / "ingest" / "partial").mkdir()
    (directory / "ingest" / f"1-{'0' * 12}").mkdir()
    (directory / "ingest" / "partial" / DIGEST).write_bytes(b"12345")
    os.link(directory / "ingest" / "partial" / DIGEST, directory / "ingest" / f"1-{'0' * 12}" / f"1.{DIGEST}")
    assert measure_files(directory).total_size == before + 5
