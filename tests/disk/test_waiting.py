"""Waiting for other processes: it ends, it names the other process, and it skips dead and stopped waiters."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import re
import shutil
import signal
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from cachedb import Busy, Cache, CacheError
from cachedb.disk import lock_holders, locks, single_flight, turns, waiting
from cachedb.index.sqlite.database import Database
from tests.conftest import Run, running
from tests.support import make
from tests.support.make import save
from tests.support.waiting import wait_until

WRITER = """
    import sys, time
    from cachedb import Cache
    with Cache.open(sys.argv[1]) as cache, cache._database.write():
        print("writing", flush=True)
        time.sleep(300)
"""
PRODUCER = """
    import sys, time
    from cachedb import Cache
    with Cache.open(sys.argv[1]) as cache, cache.producing("app:1"):
        print("producing", flush=True)
        time.sleep(300)
"""


@pytest.fixture
def full(directory: Path) -> Path:
    """Make a cache with an image."""
    with Cache.open(directory) as cache:
        save(cache, "app:1", make.image(1))
    return directory


def leave_behind(directory: Path) -> None:
    """Leave the files of a process that died in a publication."""
    folder = directory / "ingest" / "1-aaaaaaaaaaaa"
    folder.mkdir()
    (folder / f"1.sha256-{'0' * 64}").touch()


@pytest.mark.slow
def test_a_write_gives_up_after_its_time_and_names_the_lock_holder(full: Path) -> None:
    with running(WRITER, full) as holder, Cache.open(full, wait=0.2) as cache:
        os.kill(holder.pid, signal.SIGSTOP)
        with pytest.raises(
            Busy, match=rf"waited 0.2 s for the write lock, which is held by process {holder.pid} \(python"
        ) as busy:
            cache.tag("app:1", "app:2")
        assert str(holder.pid) in busy.value.holder


@pytest.mark.slow
def test_a_blob_that_cannot_be_stored_waits_only_once(full: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "cachedb")
    with running(WRITER, full) as holder, Cache.open(full, wait=1.2) as cache:
        os.kill(holder.pid, signal.SIGSTOP)
        with pytest.raises(Busy):
            cache.add_blob(b"1")
        assert sum(record.message.startswith("waited for process") for record in caplog.records) == 1
        assert not list((full / "ingest" / cache._session.id).iterdir())


def test_a_wait_ends_after_its_time() -> None:
    wait = waiting.Wait("it", 0.05)

    def nap_ten_times() -> None:
        for _ in range(10):
            wait.nap(0.01, lambda: "process 1")

    with pytest.raises(Busy, match=r"waited 0\.05 s for it, which is held by process 1"):
        nap_ten_times()


@pytest.mark.slow
def test_an_open_that_only_reads_does_not_wait_for_a_writer_to_clean_up(full: Path) -> None:
    with running(WRITER, full):
        leave_behind(full)
        with Cache.open(full, wait=math.inf) as cache:
            assert cache.is_image_complete("app:1")
            assert [str(image.name) for image in cache.list_manifests()] == ["app:1"]
    assert os.listdir(full / "ingest") != []
    Cache.open(full).close()
    assert os.listdir(full / "ingest") == [], "the next open did not clean up"


@pytest.mark.slow
def test_the_command_line_names_the_process_it_waits_for_in_one_line(cachedb: Run, full: Path) -> None:
    with running(WRITER, full) as holder:
        result = cachedb("--wait", "3", "tag", "app:1", "app:2")
    first, last = result.stderr.splitlines()
    assert re.fullmatch(rf"cachedb: waiting for process {holder.pid} \(python {full}\), \d s", first)
    assert last.startswith("cachedb: waited 3 s for the write lock")
    assert result.returncode == 1


def test_a_wait_is_logged_once_a_second_and_at_its_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG, "cachedb")
    seconds = [0.0]
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: seconds[0]))

    def sleep(duration: float) -> None:
        seconds[0] += duration

    with waiting.Wait("it", 60) as wait:
        for _ in range(10):
            wait.nap(0.25, lambda: "process 1 (x)", sleep)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "waiting for process 1 (x), 1 s"),
        ("DEBUG", "waiting for process 1 (x), 2 s"),
        ("DEBUG", "waited for process 1 (x), 2 s"),
    ]


@pytest.mark.parametrize("value", ["-1", "nan", "soon"])
def test_an_invalid_time_to_wait_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch, cachedb: Run, value: str
) -> None:
    monkeypatch.setenv("CACHEDB_WAIT", value)
    with pytest.raises(CacheError, match="CACHEDB_WAIT is '"):
        Cache.open(directory)
    monkeypatch.delenv("CACHEDB_WAIT")
    result = cachedb("--wait", value, "ls")
    assert (result.returncode, result.stderr.count("\n")) == ((2, 1) if value != "nan" else (1, 1))


def test_a_writer_waits_for_another_program_without_the_write_lock(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_program = sqlite3.connect(full / "index.db", isolation_level=None)
    other_program.execute("BEGIN IMMEDIATE")
    was_free: list[bool] = []
    nap = waiting.Wait.nap

    def check_and_nap(wait: waiting.Wait, seconds: float, holder: Callable[[], object]) -> None:
        lock = locks.acquire(full / "locks" / "write.lock", wait=False)
        was_free.append(lock is not None)
        if lock is not None:
            locks.release(lock)
        if len(was_free) == 3:
            other_program.execute("ROLLBACK")
        nap(wait, seconds, holder)

    with Cache.open(full) as cache:
        monkeypatch.setattr(waiting.Wait, "nap", check_and_nap)
        cache.tag("app:1", "app:2")
    other_program.close()
    assert was_free == [True] * 3


def test_a_writer_blocked_by_another_program_gets_our_own_error(full: Path) -> None:
    other_program = sqlite3.connect(full / "index.db", isolation_level=None)
    other_program.execute("BEGIN IMMEDIATE")
    with Cache.open(full, wait=0.1) as cache:
        with pytest.raises(Busy, match=r"waited 0\.1 s for the write lock"):
            cache.tag("app:1", "app:2")
        other_program.execute("ROLLBACK")
        cache.tag("app:1", "app:2")
    other_program.close()


def test_a_reader_blocked_by_another_program_gets_our_own_error(full: Path) -> None:
    shell = sqlite3.connect(full / "index.db", isolation_level=None)
    shell.execute("PRAGMA locking_mode = EXCLUSIVE")
    shell.execute("BEGIN IMMEDIATE")
    database = Database(full, wait=0.1)
    with pytest.raises(Busy, match=r"waited 0\.1 s for the index"), database.read():
        pass
    database.close()
    shell.close()


@pytest.mark.slow
def test_dead_waiters_are_skipped_without_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locks.hold_lock(tmp_path / "lock"):
        children = []
        for _ in range(20):
            if (child := os.fork()) == 0:
                with turns.hold_in_turn(tmp_path / "lock"):
                    os._exit(0)
            children.append(child)
        queue = tmp_path / "lock.queue"
        assert wait_until(lambda: queue.exists() and queue.read_bytes()[:1] == b"\x14")
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    monkeypatch.setattr(turns, "_PATIENCE_SECONDS", 1000.0)
    with turns.hold_in_turn(tmp_path / "lock", waiting.Wait("it", 30)):
        pass


def test_a_queue_whose_file_a_stopped_process_locks_blocks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "_QUEUE_LOCK_SECONDS", 0.05)
    with locks.hold_lock(tmp_path / "lock.queue"), turns.hold_in_turn(tmp_path / "lock"):
        assert locks.is_held(tmp_path / "lock")


@pytest.mark.slow
def test_a_script_that_locks_the_directory_blocks_no_command(cachedb: Run, full: Path) -> None:
    folder = os.open(full, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        for command in (["ls", "-q"], ["tag", "app:1", "app:2"], ["verify", "--repair"]):
            assert cachedb("--wait", "30", *command, timeout=60).returncode == 0
    finally:
        os.close(folder)


@pytest.mark.slow
def test_a_producer_is_waited_for_only_while_it_makes_progress(full: Path) -> None:
    other = full.parent / "other"
    # Progress is noted often, so that a busy machine does not delay it for longer than the wait.
    producer_script = PRODUCER.replace(
        "    with", "    from cachedb.disk import single_flight\n    single_flight._PROGRESS_SECONDS = 0.05\n    with"
    )
    with running(producer_script, other) as producer, Cache.open(other, wait=4) as cache:
        got: list[object] = []

        def want() -> None:
            try:
                with cache.producing("app:1") as image:
                    got.append(image)
            except Busy as error:
                got.append(error)

        thread = threading.Thread(target=want)
        thread.start()
        thread.join(5)
        assert got == [], "the producer is not stopped, but the wait ended"
        os.kill(producer.pid, signal.SIGSTOP)
        thread.join(60)
        assert isinstance(got[0], Busy)
        assert str(producer.pid) in got[0].holder


@pytest.mark.slow
def test_a_stopped_command_makes_no_progress(cachedb: Run, directory: Path) -> None:
    cachedb("ls")
    script = """
        import subprocess, sys
        process = subprocess.Popen([sys.executable, "-m", "cachedb", "--dir", sys.argv[1], "produce", "app:1", "--",
                                    "sh", "-c", "echo begun; kill -STOP $$"])
        process.wait()
    """
    with running(script, directory):
        result = cachedb("--wait", "2", "produce", "app:1", "--", "true")
        sessions = json.loads(cachedb("ps", "--format", "json").stdout)
        (maker,) = [one for one in sessions if one["doing"] and one["doing"][0]["kind"] == "produce"]
        os.kill(maker["pid"], signal.SIGKILL)
        for child in (Path("/proc") / str(maker["pid"]) / "task").glob("*/children"):
            for pid in child.read_text().split():
                os.kill(int(pid), signal.SIGKILL)
    assert result.returncode == 1
    assert f"waited 2 s for app:1, which is held by process {maker['pid']} (cachedb " in result.stderr


def test_a_claim_without_progress_is_taken_over_and_its_owner_notices(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "locks").mkdir(parents=True)
    monkeypatch.setattr(single_flight, "_STALLED_SECONDS", 0.1)
    with single_flight.claim_or_find(directory, "it", lambda: None, is_working=None):
        (path,) = (directory / "locks").glob("*.producing")
        inode = path.stat().st_ino
        took: list[bool] = []

        def want() -> None:
            with single_flight.claim_or_find(
                directory, "it", lambda: None, seconds=30, may_take_over=True, is_working=None
            ):
                took.append(path.stat().st_ino != inode)

        thread = threading.Thread(target=want)
        lost = single_flight._claims[path]
        thread.start()
        thread.join(60)
        assert took == [True]
        single_flight._claims[path] = lost  # the first claim stands for that of another process
        with pytest.raises(single_flight.ClaimLost):
            single_flight.check_claim(directory, "it")
        other = locks.acquire(path, wait=False)
        assert other is not None
    assert path.exists(), "the owner of a lost claim removed the file of the next"
    locks.release(other)


def test_a_claim_with_progress_is_not_taken_over(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "locks").mkdir(parents=True)
    monkeypatch.setattr(single_flight, "_STALLED_SECONDS", 0.0)
    monkeypatch.setattr(single_flight, "_PROGRESS_SECONDS", 0.01)
    with single_flight.claim_or_find(directory, "it", lambda: None):
        (path,) = (directory / "locks").glob("*.producing")
        naps: list[object] = []

        def nap_until_progress(_seconds: float) -> None:
            naps.append(single_flight._read_progress(path))
            if len(naps) == 10 or not wait_until(lambda: single_flight._read_progress(path) != naps[-1]):
                raise InterruptedError

        def want() -> None:
            with (
                pytest.raises(InterruptedError),
                single_flight.claim_or_find(
                    directory, "it", lambda: None, nap_until_progress, seconds=60, may_take_over=True
                ),
            ):
                pass

        thread = threading.Thread(target=want)
        thread.start()
        thread.join()
        assert len(naps) == 10
        single_flight.check_claim(directory, "it")


@pytest.mark.slow
def test_ps_shows_which_process_writes_and_which_waits(cachedb: Run, full: Path) -> None:
    waiter = WRITER.replace("with Cache", "print('begun', flush=True)\n    with Cache")
    with (
        running(WRITER, full) as holder,
        running(waiter, full) as second,
        Cache.open(full, wait=0) as cache,
    ):
        assert wait_until(lambda: len(cache.sessions()) == 2)
        writing, queued = cache.sessions()
        assert (writing.pid, [one.kind for one in writing.doing]) == (holder.pid, ["write"])
        assert (queued.pid, [one.kind for one in queued.doing]) == (second.pid, ["wait"])
        assert writing.command == f"python {full}"
        printed = json.loads(cachedb("ps", "--format", "json").stdout)
        assert [one["pid"] for one in printed] == [holder.pid, second.pid]
        assert printed[0]["doing"][0]["kind"] == "write"
        table = cachedb("ps").stdout
        assert "wait for the write lock" in table
        os.kill(second.pid, signal.SIGKILL)
        assert wait_until(lambda: len(cache.sessions()) == 1), "a dead process is listed"


def test_a_session_is_listed_while_it_lives(full: Path) -> None:
    with Cache.open(full) as cache:
        assert cache.sessions() == []
        with cache.hold("app:1"):
            (session,) = cache.sessions()
            assert (session.pid, session.doing) == (os.getpid(), [])
            assert session.id is not None
    with Cache.open(full) as cache:
        assert cache.sessions() == []


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"\0{}\n", b"\0[1]\n", b"\0" + b"[" * 5000, b'\0{"pid": "x"}\n', b"\xff" * 99]
)
def test_a_lock_file_that_contains_garbage_names_nobody(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lock").write_bytes(content)
    assert locks.read_holder_of(tmp_path / "lock") is None


def test_a_process_that_has_ended_is_not_named(tmp_path: Path) -> None:
    with locks.hold_lock(tmp_path / "lock") as file:
        assert locks.read_holder_of(tmp_path / "lock") == lock_holders.this_process()
        gone = lock_holders.this_process()._replace(start="0")
        record = json.dumps(gone._asdict()).encode()
        os.pwrite(file.fileno(), record + b"\n", lock_holders.RECORD)
        assert locks.read_holder_of(tmp_path / "lock") is None
    assert locks.read_holder_of(tmp_path / "lock") is None


def test_a_process_of_another_user_that_proc_hides_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locks.hold_lock(tmp_path / "lock") as file:
        holder = lock_holders.this_process()
        monkeypatch.setattr(lock_holders, "read_stat", lambda _: [])  # as /proc mounted with hidepid=2
        assert locks.read_holder_of(tmp_path / "lock") == holder
        if (child := os.fork()) == 0:
            os._exit(0)
        os.waitpid(child, 0)
        record = json.dumps(holder._replace(pid=child)._asdict()).encode()
        os.pwrite(file.fileno(), record + b"\n", lock_holders.RECORD)
        assert locks.read_holder_of(tmp_path / "lock") is None


def test_a_process_of_an_inner_pid_namespace_is_named_by_the_pid_that_it_has_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = lock_holders.this_process()
    assert lock_holders._read_inner_pid(os.getpid()) == os.getpid()
    monkeypatch.setattr(lock_holders, "_read_inner_pid", {os.getpid(): 7}.get)
    with locks.hold_lock(tmp_path / "lock") as file:
        record = json.dumps(ours._replace(pid=7, namespace="pid:[1]")._asdict()).encode()
        os.pwrite(file.fileno(), record + b"\n", lock_holders.RECORD)
        assert locks.read_holder_of(tmp_path / "lock") == ours


@pytest.mark.parametrize("change", [{"start": "0"}, {"pid": 2**30}])
def test_a_process_of_an_outer_pid_namespace_is_not_named_as_one_of_ours(
    full: Path, change: dict[str, str | int]
) -> None:
    with Cache.open(full) as cache, cache.hold("app:1"):
        lock = next((full / "locks").glob("*.session"))
        values = {**lock_holders.this_process()._asdict(), "namespace": "pid:[1]", **change}
        with lock.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), json.dumps(values).encode() + b"\n", lock_holders.RECORD)
        (session,) = cache.sessions()
        assert (session.pid, session.command) == (None, values["command"])
        expected = f"process {values['pid']} in another PID namespace ({values['command']})"
        assert str(locks.read_holder_of(lock)) == expected


@pytest.mark.slow
def test_verbose_reports_that_cleaning_up_was_left_to_others(cachedb: Run, full: Path) -> None:
    with running(WRITER, full):
        leave_behind(full)
        assert "the next process that opens the cache cleans up" in cachedb("--verbose", "ls").stderr
        assert cachedb("ls").stderr == ""


def test_ps_lists_nothing_without_the_folder_of_locks(cachedb: Run, directory: Path) -> None:
    Cache.open(directory).close()
    shutil.rmtree(directory / "locks")
    done = cachedb("ps", "--format", "json")
    assert (done.returncode, json.loads(done.stdout)) == (0, [])
