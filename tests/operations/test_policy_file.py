"""The file of a policy: how it is read and replaced."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from cachedb import Cache, InvalidPolicy, StorageError
from cachedb.disk import durable
from cachedb.disk.layout import POLICY_FILE
from cachedb.index.sqlite.database import Database
from cachedb.operations import policy_file
from cachedb.operations.policy import Policy
from cachedb.operations.policy_file import load_policy
from tests.operations.test_policy import EXAMPLE, MEANING


def test_a_cache_without_a_policy_has_an_empty_one(cache: Cache) -> None:
    assert load_policy(cache.directory) == Policy()


def test_a_policy_is_read_from_its_file_whatever_wrote_it(cache: Cache) -> None:
    (cache.directory / POLICY_FILE).write_bytes(b"\xef\xbb\xbf" + EXAMPLE.replace("\n", "\r\n").encode())
    assert load_policy(cache.directory) == MEANING


def test_a_policy_that_is_no_text_is_refused(cache: Cache) -> None:
    path = cache.directory / POLICY_FILE
    path.write_bytes(b"[limits]\n# \xff")
    with pytest.raises(InvalidPolicy, match=r"^policy\.toml, line 2: it is not UTF-8"):
        load_policy(cache.directory)
    path.write_bytes(b"#" * 70_000)
    with pytest.raises(InvalidPolicy, match="over 65536 bytes"):
        load_policy(cache.directory)


def test_a_policy_that_is_no_regular_file_is_refused(cache: Cache, tmp_path: Path) -> None:
    path = cache.directory / POLICY_FILE
    (tmp_path / "elsewhere").write_text("")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="it is a symbolic link, not a regular file"):
        load_policy(cache.directory)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StorageError, match="it is not a regular file"):
        load_policy(cache.directory)


def test_an_installed_policy_applies_and_has_the_mode_of_the_cache(index: Database) -> None:
    index.directory.chmod(0o2770)
    assert policy_file.install_policy(index, EXAMPLE) == MEANING
    assert load_policy(index.directory) == MEANING
    assert stat.S_IMODE((index.directory / POLICY_FILE).stat().st_mode) == 0o660
    assert policy_file.install_policy(index, "") == load_policy(index.directory) == Policy()


def test_a_policy_is_written_whole_though_a_file_takes_few_bytes_at_a_time(
    index: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = durable.atomic_file

    class ShortFile(FileIO):
        def write(self, data: Any) -> int:
            return super().write(memoryview(data)[:10])

    @contextmanager
    def short_file(path: Path) -> Iterator[FileIO]:
        with real(path) as file, ShortFile(file.fileno(), "r+", closefd=False) as short:
            yield short

    monkeypatch.setattr(policy_file, "atomic_file", short_file)
    policy_file.install_policy(index, EXAMPLE)
    assert policy_file.read_policy(index.directory) == EXAMPLE


def test_a_policy_can_be_in_place_before_its_cache(tmp_path: Path) -> None:
    directory = tmp_path / "new"
    directory.mkdir()
    (directory / POLICY_FILE).write_text(EXAMPLE)
    with Cache.open(directory) as opened:
        assert opened.get_policy() == MEANING


def test_a_policy_outlives_gc_verify_and_a_rebuilt_index(cache: Cache) -> None:
    cache.set_policy(EXAMPLE)
    cache.collect_garbage()
    assert cache.verify(repair=True).problems == []
    cache.close()
    (cache.directory / "index.db").unlink()
    with Cache.open(cache.directory, damaged=True) as damaged:
        damaged.verify(repair=True)
    with Cache.open(cache.directory) as opened:
        assert opened.get_policy() == MEANING
        assert opened.verify().problems == []


def test_an_invalid_policy_is_not_installed(index: Database) -> None:
    policy_file.install_policy(index, EXAMPLE)
    for wrong in ("[limits]\nx = 3", '[[keep]]\nsql = "SELECT nothing"', "#" * 70_000):
        with pytest.raises(InvalidPolicy):
            policy_file.install_policy(index, wrong)
    assert policy_file.read_policy(index.directory) == EXAMPLE
    assert [name for name in os.listdir(index.directory) if name.startswith(".cachedb")] == []
