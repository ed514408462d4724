"""The last use of images: which calls count as a use, and that noting a use never waits."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from cachedb import Cache
from cachedb.content import last_used
from cachedb.disk import locks
from cachedb.oci.names import Name
from tests.conftest import Run
from tests.support import make
from tests.support.index_file import change_index

IMAGE = make.image(1)
LONG_AGO = "2020-01-01T00:00:00.000000Z"


@pytest.fixture
def old(directory: Path) -> Path:
    """Make a cache whose image was last used years ago."""
    with Cache.open(directory) as cache:
        for data in (IMAGE.config, *IMAGE.layers):
            cache.add_blob(data)
        cache.save_manifest("app:1", IMAGE.manifest)
    change_index(directory, f"UPDATE images SET last_used_at = '{LONG_AGO}'")
    return directory


def read_last_use(directory: Path) -> str:
    shell = sqlite3.connect(directory / "index.db")
    (found,) = shell.execute("SELECT last_used_at FROM images").fetchone()
    shell.close()
    return str(found)


USES: dict[str, Callable[[Cache], object]] = {
    "exists": lambda cache: cache.is_image_complete("app:1"),
    "manifest": lambda cache: cache.get_manifest("app:1"),
    "hold": lambda cache: cache.hold("app:1").__enter__(),
    "export": lambda cache: cache.export("app:1", cache.directory.parent / "app.tar"),
    "pull": lambda cache: cache.pull("app:1", if_missing=True),
}


def produce(cache: Cache) -> None:
    with cache.producing("app:1") as image:
        assert image


USES["produce"] = produce
LISTINGS: dict[str, Callable[[Cache], object]] = {
    "image": lambda cache: cache.get_image("app:1"),
    "blobs": lambda cache: cache.get_image_blobs("app:1"),
    "list": lambda cache: cache.list_manifests(),
    "sql": lambda cache: cache.sql("SELECT * FROM image_usage").__enter__(),
    "usage": lambda cache: cache.get_usage(),
    "nothing": lambda cache: cache.is_image_complete("nothing:1"),
}


@pytest.mark.parametrize("name", USES)
def test_closing_the_cache_writes_uses_to_the_index(old: Path, name: str) -> None:
    with Cache.open(old) as cache:
        USES[name](cache)
    assert read_last_use(old) > "2026"


@pytest.mark.parametrize("name", LISTINGS)
def test_a_listing_is_no_use(old: Path, name: str) -> None:
    with Cache.open(old) as cache:
        LISTINGS[name](cache)
    assert read_last_use(old) == LONG_AGO


def test_the_command_exists_is_a_use_and_show_is_none(cachedb: Run, old: Path) -> None:
    cachedb("show", "app:1")
    assert read_last_use(old) == LONG_AGO
    cachedb("exists", "app:1")
    assert read_last_use(old) > "2026"


def test_a_use_within_five_minutes_takes_no_lock_and_writes_nothing(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Cache.open(old) as cache:
        assert cache.is_image_complete("app:1")
    before = read_last_use(old)
    taken: list[Path] = []
    with Cache.open(old) as cache:
        acquire = locks.acquire

        def note_and_acquire(path: Path, **how: bool) -> object:
            taken.append(path)
            return acquire(path, **how)

        monkeypatch.setattr(locks, "acquire", note_and_acquire)
        assert cache.is_image_complete("app:1")
        assert cache.get_manifest("app:1")
    assert taken == []
    assert read_last_use(old) == before


def test_a_child_notes_uses_though_a_thread_of_its_parent_held_the_guard(old: Path) -> None:
    with Cache.open(old) as cache:
        assert cache.is_image_complete("app:1")
        with cache._uses._guard:
            if (child := os.fork()) == 0:
                signal.alarm(30)
                os._exit(not (cache.get_manifest("app:1") and cache._uses._names == {Name("app", "1")}))
        assert os.waitpid(child, 0)[1] == 0
    assert read_last_use(old) > "2026"


def test_closing_does_not_wait_for_the_write_lock_to_note_a_use(old: Path) -> None:
    with Cache.open(old) as cache:
        assert cache.is_image_complete("app:1")
        lock = locks.acquire(old / "locks" / "write.lock")
        assert lock
        closing = threading.Thread(target=cache.close)
        closing.start()
        closing.join(10)
        waited = closing.is_alive()
        locks.release(lock)
        closing.join()
        assert not waited
    assert read_last_use(old) == LONG_AGO


def test_a_cache_that_stays_open_writes_its_uses_after_five_minutes(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Cache.open(old) as cache:
        assert cache.is_image_complete("app:1")
        assert read_last_use(old) == LONG_AGO
        now = time.monotonic()
        monkeypatch.setattr(
            "cachedb.content.last_used.time", SimpleNamespace(monotonic=lambda: now + last_used.RESOLUTION_SECONDS + 1)
        )
        assert cache.is_image_complete("app:1")
        assert read_last_use(old) > "2026"


def test_closing_ignores_uses_of_removed_images(old: Path) -> None:
    with Cache.open(old) as cache:
        assert cache.is_image_complete("app:1")
        cache.remove_manifest("app:1")
