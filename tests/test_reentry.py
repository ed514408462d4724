"""Calls inside another call of the same thread, and errors raised by callbacks and signal handlers."""

from __future__ import annotations

import errno
import gc
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cachedb import Cache, CacheError, ReentrantCall, StorageError
from cachedb.callbacks import Callbacks
from cachedb.content.last_used import Uses
from cachedb.content.session import Session
from cachedb.disk.folders import Folders
from cachedb.disk.locks import acquire, release
from cachedb.errors import ignore_os_errors, mark_callers_errors, os_errors
from cachedb.index.sqlite.database import Database
from cachedb.operations import upgrade
from tests.conftest import run_python
from tests.support import make


@pytest.fixture
def filled(cache: Cache) -> Cache:
    made = make.image(1)
    for digest, data in made.blobs.items():
        cache.save_blob(digest, data)
    cache.save_manifest("app:1", made.manifest)
    return cache


@pytest.fixture(autouse=True)
def _deadlock_alarm() -> Iterator[None]:
    """Fail a test after a minute with SIGALRM, because a call that waits for itself never ends."""

    def fail(*_: object) -> None:
        pytest.fail("the thread waits for itself")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_a_write_inside_a_write_of_the_same_thread_is_refused_at_once(filled: Cache) -> None:
    with filled._database.write(), pytest.raises(ReentrantCall, match="this thread is already writing to the cache in"):
        filled.tag("app:1", "app:2")
    with Cache.open(filled.directory) as other, filled._database.write(), pytest.raises(ReentrantCall):
        other.tag("app:1", "app:2")
    filled.tag("app:1", "app:2")


def test_a_write_inside_a_write_that_does_not_wait_is_refused_at_once(filled: Cache) -> None:
    with filled._database.write_at_once() as connection:
        assert connection is not None
        with pytest.raises(ReentrantCall):
            filled.tag("app:1", "app:2")
        with filled._database.write_at_once() as second:
            assert second is None
    filled.tag("app:1", "app:2")


def test_a_cache_can_be_read_inside_a_write(filled: Cache) -> None:
    with filled._database.write():
        assert filled.get_manifest("app:1")
        assert filled.is_image_complete("app:1")
        assert [str(name) for name in filled.list_names()] == ["app:1"]
        with filled.sql("SELECT name FROM image_usage") as answer:
            assert list(answer.rows) == [("app:1",)]


def test_a_write_of_another_thread_waits_for_the_first(filled: Cache) -> None:
    with filled._database.write():
        thread = threading.Thread(target=filled.tag, args=("app:1", "app:2"))
        thread.start()
    thread.join(60)
    assert len(filled.list_names()) == 2


@pytest.mark.slow
def test_a_signal_handler_can_use_the_cache_at_any_moment(tmp_path: Path) -> None:
    output = run_python(
        """
        import signal, sys, time
        from cachedb import Cache, ReentrantCall
        refused = done = 0

        def handler(*_):
            global refused, done
            try:
                assert cache.get_manifest("app:1")
                cache.tag("app:1", "tmp:1")
                done += 1
            except ReentrantCall:
                refused += 1
            signal.setitimer(signal.ITIMER_REAL, 0.003)

        with Cache.open(sys.argv[1]) as cache:
            config = cache.add_blob(b"{}")
            cache.save_manifest("app:1", b'{"schemaVersion":2,"config":{"mediaType":'
                b'"application/vnd.oci.image.config.v1+json","digest":"%s","size":2},"layers":[]}' % config.encode())
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, 0.003)
            end = time.monotonic() + 100
            while not (refused and done > 5) and time.monotonic() < end:
                cache.tag("app:1", "app:2")
                cache.has_blob(config)
                cache.add_blob(b"%d" % done)
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(refused > 0, done > 5, len(cache.verify().problems))
        """,
        tmp_path / "cache",
    )
    assert output.split() == ["True", "True", "0"]


def test_no_lock_held_for_a_moment_makes_a_thread_wait_for_itself(filled: Cache, tmp_path: Path) -> None:
    from cachedb.disk import forks

    session, uses = filled._session, filled._uses
    with forks._guard:
        lock = acquire(tmp_path / "lock")
        assert lock is not None
        release(lock)
    with session._guard:
        assert session.id
        assert not session.expects(filled.list_blobs()[0])
    with uses._guard:
        filled.get_manifest("app:1")
        uses.write()


def test_a_session_is_not_begun_inside_its_own_beginning(index: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    session, refused = Session(index), list[str]()
    real = Folders.make

    def make(self: Folders, name: str) -> None:
        with pytest.raises(ReentrantCall, match="beginning to write to the cache"):
            _ = session.id
        refused.append(name)
        real(self, name)

    monkeypatch.setattr(Folders, "make", make)
    assert session.id
    assert refused == [f"ingest/{session.id}"]
    monkeypatch.undo()
    session.close()
    assert [name for name in os.listdir(index.directory / "locks") if name.endswith(".session")] == []


def test_an_image_cannot_be_produced_by_a_thread_that_has_claimed_it(
    filled: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, looks = Cache.get_image, [0]

    def get_image(self: Cache, name: Any) -> Any:
        looks[0] += 1
        if looks[0] == 2:  # the claim is held by now
            with pytest.raises(CacheError, match="this thread is already producing"), filled.producing("new:1"):
                pass
        return real(self, name)

    monkeypatch.setattr(Cache, "get_image", get_image)
    with filled.producing("new:1") as image:
        assert image is None
    assert looks[0] >= 2


def test_a_backup_inside_a_backup_is_refused(filled: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    from cachedb.index.sqlite import backups

    refused: list[int] = []

    def progress(*_: object) -> None:
        with pytest.raises(ReentrantCall, match="making a backup"):
            upgrade.back_up(filled.directory)
        refused.append(1)

    monkeypatch.setattr(backups, "_OPCODES", 10)
    upgrade.back_up(filled.directory, progress=progress)
    assert refused


def test_an_export_inside_an_export_to_the_same_layout_is_refused(filled: Cache, tmp_path: Path) -> None:
    def progress(*_: object) -> None:
        with Cache.open(filled.directory, wait=2) as other:  # a wait without end would keep the thread, and the test
            other.export("app:1", tmp_path / "layout", format="oci-dir")

    with pytest.raises(ReentrantCall, match="exporting to"):
        filled.export("app:1", tmp_path / "layout", format="oci-dir", progress=progress)


def test_a_thread_cannot_open_and_replace_an_index_at_once(
    index: Database,
) -> None:
    with (
        index.file.no_replacement(),
        pytest.raises(ReentrantCall, match="opening the index"),
        index.file.no_replacement(replacing=True),
    ):
        pass
    with index.file.no_replacement(replacing=True), pytest.raises(ReentrantCall, match="replacing the index"):
        index.rows(image_ids(), {})
    with index.file.no_replacement(), index.file.no_replacement():
        pass


def image_ids() -> Any:
    from sqlalchemy import select

    from cachedb.index.tables import IMAGES

    return select(IMAGES.c.id)


def test_a_progress_callback_can_use_the_cache(filled: Cache, tmp_path: Path) -> None:
    archive, calls = tmp_path / "other.tar", [0]
    make.write(archive, make.oci_files({"other:1": make.image(2)}))

    def progress(*_: object) -> None:
        calls[0] += 1
        filled.tag("app:1", f"app:{2 + calls[0] % 3}")

    filled.cache_from_tar(archive, progress=progress)
    filled.verify(progress=progress)
    filled.verify(repair=True, progress=progress)
    filled.export("app:1", tmp_path / "out.tar", progress=progress)
    assert calls[0] > 3


# Errors raised by callbacks and signal handlers


@pytest.mark.slow
def test_an_error_of_a_signal_handler_passes_unchanged(filled: Cache) -> None:
    def handler(*_: object) -> None:
        raise TimeoutError

    other = acquire(filled.directory / "locks" / "write.lock")
    assert other is not None
    signal.signal(signal.SIGALRM, handler)
    gc.disable()  # see `test_a_signal_handlers_error_ends_a_query`
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(TimeoutError):
            filled.tag("app:1", "app:2")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        gc.enable()
        release(other)
    filled.tag("app:1", "app:2")


def test_an_os_error_without_an_errno_passes_unchanged() -> None:
    for block in (os_errors("work"), ignore_os_errors()):
        with pytest.raises(TimeoutError), block:
            raise TimeoutError
    with ignore_os_errors():
        raise OSError(errno.ENOSPC, "full")
    with pytest.raises(StorageError, match="cannot work: full"), os_errors("work"):
        raise OSError(errno.ENOSPC, "full")


def test_an_error_of_a_callback_passes_unchanged() -> None:
    @mark_callers_errors
    def fail() -> None:
        raise OSError(errno.EIO, "the caller's")

    for block in (os_errors("work"), ignore_os_errors()):
        with pytest.raises(OSError, match="the caller's"), block:
            fail()


@pytest.mark.parametrize("what", ["import", "verify", "repair", "export", "oci-dir", "link", "backup", "upgrade"])
def test_an_error_of_a_progress_callback_passes_unchanged_through_every_operation(
    filled: Cache, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cachedb.index.sqlite import backups

    monkeypatch.setattr(backups, "_OPCODES", 10)

    def progress(*_: object) -> None:
        raise PermissionError(errno.EACCES, "the caller's")

    archive = tmp_path / "other.tar"
    make.write(archive, make.oci_files({"other:1": make.image(2)}))
    upgrade.downgrade(filled.directory, "0004") if what == "upgrade" else None
    calls: dict[str, Callable[[], object]] = {
        "import": lambda: filled.cache_from_tar(archive, progress=progress),
        "verify": lambda: filled.verify(progress=progress),
        "repair": lambda: filled.verify(repair=True, progress=progress),
        "export": lambda: filled.export("app:1", tmp_path / "out", progress=progress),
        "oci-dir": lambda: filled.export("app:1", tmp_path / "out", format="oci-dir", progress=progress),
        "link": lambda: filled.export("app:1", tmp_path / "out", format="oci-dir", link=True, progress=progress),
        "backup": lambda: upgrade.back_up(filled.directory, progress=progress),
        "upgrade": lambda: upgrade.upgrade(filled.directory, progress=progress),
    }
    with pytest.raises(PermissionError, match="the caller's"):
        calls[what]()
    if what != "upgrade":
        assert filled.verify().problems == []
        assert not (filled.directory / "quarantine").exists()


def test_an_error_of_a_callback_of_sqlite_is_raised_again() -> None:
    callbacks, connection = Callbacks(), sqlite3.connect(":memory:")
    try:
        calls = 0

        def fail_at_third_call() -> bool:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise TimeoutError
            return False

        connection.set_progress_handler(callbacks.progress_handler(fail_at_third_call), 100)
        endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
        with pytest.raises(sqlite3.OperationalError):
            connection.execute(endless)
        with pytest.raises(TimeoutError):
            callbacks.raise_again()
        assert calls == 3
    finally:
        connection.close()


@pytest.mark.slow
@pytest.mark.parametrize("query", ["SELECT count(*) FROM n", "SELECT human(i) FROM n"])
def test_a_signal_handlers_error_ends_a_query(filled: Cache, query: str) -> None:
    def handler(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, handler)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "

    def run_query() -> None:
        with filled.sql(endless + query) as answer:
            for _ in answer.rows:
                pass

    began = time.monotonic()
    gc.disable()  # hypothesis has a callback in it, and Python drops an error that a handler raises there
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(TimeoutError):
            run_query()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        gc.enable()
    assert time.monotonic() - began < 50


def test_uses_can_be_written_while_another_use_is_noted(index: Database) -> None:
    uses = Uses(index)
    with uses._guard:
        uses.write()
