"""Failures that processes remember for five minutes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from cachedb import Cache
from cachedb.disk import failures
from tests.conftest import run_python


def find_mark(directory: Path, key: str) -> Path:
    return directory / "locks" / failures._file_name(key)


def test_other_processes_know_a_failure_until_it_is_forgotten(cache: Cache) -> None:
    code = (
        "import sys; from pathlib import Path; from cachedb.disk import failures; failures.{}(Path(sys.argv[1]), 'it')"
    )
    assert not failures.has_failed(cache.directory, "it")
    run_python(code.format("note_failure"), cache.directory)
    assert failures.has_failed(cache.directory, "it")
    assert not failures.has_failed(cache.directory, "another")
    run_python(code.format("forget_failure"), cache.directory)
    assert not failures.has_failed(cache.directory, "it")


@pytest.mark.parametrize(("seconds", "remembered"), [(0, True), (-290, True), (-301, False), (1000, False)])
def test_a_failure_is_remembered_for_five_minutes(cache: Cache, seconds: int, remembered: bool) -> None:
    failures.note_failure(cache.directory, "it")
    mark = find_mark(cache.directory, "it")
    os.utime(mark, (time.time() + seconds,) * 2)
    assert failures.has_failed(cache.directory, "it") == remembered
    with Cache.open(cache.directory):
        assert mark.exists() == remembered
    failures.note_failure(cache.directory, "it")  # again
    assert failures.has_failed(cache.directory, "it")


def test_only_a_regular_file_is_a_failure(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "target").touch()
    find_mark(cache.directory, "it").symlink_to(tmp_path / "target")
    assert not failures.has_failed(cache.directory, "it")
    before = (tmp_path / "target").stat().st_mtime_ns
    failures.note_failure(cache.directory, "it")
    assert (tmp_path / "target").stat().st_mtime_ns == before


def test_a_foreign_file_stays(cache: Cache) -> None:
    foreign = cache.directory / "locks" / "foreign.failed"
    foreign.touch()
    os.utime(foreign, (0, 0))
    with Cache.open(cache.directory) as again:
        assert [problem.path for problem in again.verify().problems] == [foreign]
    foreign.unlink()


def test_a_failure_is_not_noted_without_a_folder(tmp_path: Path) -> None:
    failures.note_failure(tmp_path / "missing", "it")
    failures.forget_failure(tmp_path / "missing", "it")
    assert not failures.has_failed(tmp_path / "missing", "it")


def test_a_failure_is_neither_noted_nor_forgotten_behind_a_link(cache: Cache, tmp_path: Path) -> None:
    failures.note_failure(cache.directory, "it")
    (cache.directory / "locks").rename(tmp_path / "locks")
    (cache.directory / "locks").symlink_to(tmp_path / "locks")
    failures.note_failure(cache.directory, "other")
    failures.forget_failure(cache.directory, "it")
    assert os.path.exists(tmp_path / "locks" / failures._file_name("it"))
    assert not os.path.exists(tmp_path / "locks" / failures._file_name("other"))
    (cache.directory / "locks").unlink()
    (tmp_path / "locks").rename(cache.directory / "locks")
