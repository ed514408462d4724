"""The database: transactions of processes and threads, look-ups, forks, and directories that are no cache."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, Dialect, MetaData, Table, Text, TypeDecorator, bindparam, insert, literal, select

from cachedb import Busy, Cache, NotACache, NotOurs, SchemaMismatch, StorageError
from cachedb.disk import locks, turns
from cachedb.index.sqlite import lookups
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.prepare import prepare
from cachedb.index.sqlite.replace import replace
from cachedb.index.sqlite.revision import APPLICATION_ID
from cachedb.index.tables import TRASH
from tests.conftest import Run, files_of, read_revision, run_python, running, stored_rows
from tests.disk.test_locks import count_open_files
from tests.support.make import digest_of
from tests.support.waiting import wait_until


def trash_row(data: bytes) -> dict[str, object]:
    """Return a row of the simplest table."""
    return {"digest": digest_of(data), "size": len(data)}


def count_trash(directory: Path) -> int:
    connection = sqlite3.connect(directory / "index.db")
    try:
        return int(connection.execute("SELECT count(*) FROM trash").fetchone()[0])
    finally:
        connection.close()


def content(directory: Path) -> dict[str, bytes | None]:
    """Return every file and folder below a directory with its bytes, except the queue of the write lock."""
    paths = sorted(path for path in directory.rglob("*") if path.name != "write.queue")
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def set_revision(index: Database, revision: str, oldest: int) -> None:
    """Give the index another schema revision, and the oldest revision whose release can use it."""
    shell = sqlite3.connect(index.path)
    shell.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    shell.execute(f"PRAGMA user_version = {oldest}")
    shell.commit()
    shell.close()


# Transactions


def test_a_write_commits_at_the_end_of_its_block_and_rolls_back_on_an_error(index: Database) -> None:
    with index.write() as connection:
        connection.execute(insert(TRASH), [trash_row(b"kept")])
    with pytest.raises(KeyError), index.write() as connection:  # noqa: PT012
        connection.execute(insert(TRASH), [trash_row(b"undone")])
        raise KeyError
    assert count_trash(index.directory) == 1


def test_a_write_waits_for_the_lock_file(index: Database) -> None:
    entered = threading.Event()

    def write() -> None:
        with index.write():
            entered.set()

    with locks.hold_lock(index.write_lock):
        writer = threading.Thread(target=write)
        writer.start()
        assert wait_until(lambda: entered.is_set() or len(turns.find_waiters(index.write_lock)) == 1)
        assert not entered.is_set()
    writer.join(60)
    assert entered.is_set()


@pytest.mark.slow
def test_a_write_waits_for_a_program_that_ignores_the_lock_file(index: Database) -> None:
    entered = threading.Event()

    def write() -> None:
        with index.write() as connection:
            entered.set()
            connection.execute(insert(TRASH), [trash_row(b"ours")])

    shell = sqlite3.connect(index.path, isolation_level=None)
    shell.execute("BEGIN IMMEDIATE")
    writer = threading.Thread(target=write)
    writer.start()
    # The write waits before its block begins: the block must read what it will change.
    assert not entered.wait(0.2)
    shell.execute("INSERT INTO trash VALUES (?, 1)", (digest_of(b"theirs"),))
    shell.execute("COMMIT")
    shell.close()
    writer.join(60)
    assert count_trash(index.directory) == 2


def test_a_reader_takes_no_lock_and_sees_one_snapshot(index: Database) -> None:
    with index.read() as reader:
        assert reader.execute(select(TRASH.c.digest)).all() == []
        with index.write() as connection:
            connection.execute(insert(TRASH), [trash_row(b"new")])
            with index.read() as other:
                assert other.execute(select(TRASH.c.digest)).all() == []
        assert reader.execute(select(TRASH.c.digest)).all() == []
    with index.read() as reader:
        assert len(reader.execute(select(TRASH.c.digest)).all()) == 1


@pytest.mark.slow
def test_killing_a_writer_rolls_back_its_transaction_and_releases_its_lock(index: Database) -> None:
    script = """
        import sys, time
        from pathlib import Path
        from cachedb.index.sqlite.database import Database
        with Database(Path(sys.argv[1])).write() as connection:
            connection.exec_driver_sql("INSERT INTO trash VALUES (?, 1)", (sys.argv[2],))
            print("written", flush=True)
            time.sleep(60)
    """
    with running(script, index.directory, digest_of(b"half")) as writer:
        writer.kill()
        writer.wait()
        with index.write() as connection:
            connection.execute(insert(TRASH), [trash_row(b"whole")])
    assert count_trash(index.directory) == 1


@pytest.mark.slow
def test_writers_wait_in_turn_and_never_see_a_locked_database(index: Database) -> None:
    output = run_python(
        """
        import hashlib, os, sys, time
        from pathlib import Path
        from cachedb.index.sqlite.database import Database

        index = Database(Path(sys.argv[1]))
        counter = Path(sys.argv[1]) / "ingest" / "counter"
        counter.write_text("0")
        turns = counter.with_name("turns")  # a byte each, so that it can be read without the lock
        turns.touch()

        def write(number):
            most = 0  # turns of other writers during one of our waits
            for turn in range(25):
                before = turns.stat().st_size
                with index.write() as connection:
                    digest = hashlib.sha256(f"{number} {turn}".encode()).hexdigest()
                    connection.exec_driver_sql("INSERT INTO trash VALUES (?, 1)", (f"sha256:{digest}",))
                    most = max(most, turns.stat().st_size - before)
                    count = int(counter.read_text())
                    time.sleep(0.002)
                    counter.write_text(str(count + 1))
                    with turns.open("ab") as file:
                        file.write(b".")
            return most

        with index.read() as connection:  # one reader reads during all writes
            connection.exec_driver_sql("SELECT * FROM trash")
            children = []
            if (writers := os.fork()) == 0:
                for number in range(16):
                    if (child := os.fork()) == 0:
                        os._exit(0 if write(number) < 100 else 1)  # usually 15; more if this one missed its turn
                    children.append(child)
                os._exit(max(os.waitpid(child, 0)[1] for child in children) != 0)
            assert os.waitpid(writers, 0)[1] == 0
        print(counter.read_text())
        """,
        index.directory,
    )
    assert output == "400\n"
    assert count_trash(index.directory) == 400


@pytest.mark.slow
def test_the_write_after_a_killed_writer_commits_before_its_block(index: Database) -> None:
    script = """
        import sys, time
        from pathlib import Path
        from cachedb.index.sqlite.database import Database
        with Database(Path(sys.argv[1])).write():
            print("writing", flush=True)
            time.sleep(60)
    """

    def wal_size() -> int:
        return index.path.with_name("index.db-wal").stat().st_size

    with index.read() as reader:  # a reader keeps SQLite from restarting the WAL
        reader.exec_driver_sql("SELECT * FROM trash")
        for end, grown in (("well", False), ("killed", True), ("well", False)):
            if end == "killed":
                with running(script, index.directory) as writer:
                    writer.kill()
                    writer.wait()
            before = wal_size()
            with index.write():
                assert (wal_size() > before) is grown, end
    with pytest.raises(KeyError), index.write():
        raise KeyError
    with index.alone() as turn:
        assert not turn.is_marked, "a rolled-back write left its mark"


@pytest.mark.slow
def test_a_commit_that_no_process_saw_does_not_reappear(
    directory: Path, peer: Callable[[str], str], tmp_path: Path
) -> None:
    """A writer killed in the sync of its commit leaves the whole commit in the WAL.

    Processes that have the index open do not see it, and the next open removes the blob's file. When all of them
    have closed the index, SQLite reads the WAL to its end.
    """
    Cache.open(directory).close()
    bystander = """
        import sys
        from cachedb import Cache
        with Cache.open(sys.argv[1]) as cache:
            cache.list_blobs()
            print("open", flush=True)
            sys.stdin.read()
    """
    writer = """
        import ctypes, sys
        from cachedb import Cache
        ctypes.CDLL(None).prctl(0x59616d61, -1, 0, 0, 0)  # let strace, a sibling process, trace this one
        with Cache.open(sys.argv[1]) as cache:
            print("open", flush=True)
            sys.stdin.readline()
            cache.add_blob(b"data")
    """
    for sync in (1, 2, 3):  # one of the syncs belongs to the commit that stores the blob
        path = tmp_path / str(sync)
        Cache.open(path).close()
        with running(bystander, path) as first, running(writer, path) as victim:
            inject = f"inject=fdatasync:signal=SIGKILL:when={sync}"
            command = [peer("strace"), "-f", "-o", "/dev/null", "-e", "trace=fdatasync", "-e", inject, "-p"]
            with subprocess.Popen([*command, str(victim.pid)], stderr=subprocess.PIPE, text=True) as strace:
                assert strace.stderr is not None
                attached = strace.stderr.readline()
                if "attached" not in attached:
                    pytest.skip(f"strace cannot trace here: {attached.strip()}")
                print(file=victim.stdin)
                victim.wait(60)
                strace.stderr.read()
            with running(bystander, path) as second:
                second.kill()
                second.wait()
            first.kill()
        with Cache.open(path):
            assert stored_rows(path) == files_of(path), sync


def test_24_threads_may_be_in_transactions_at_once(index: Database) -> None:
    together = threading.Barrier(24)
    done = []

    def read() -> None:
        with index.read() as connection:
            together.wait(60)
            done.append(connection.execute(select(TRASH.c.digest)).all())

    threads = [threading.Thread(target=read) for _ in range(together.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == together.parties


@pytest.mark.parametrize(("revision", "advice"), [("0000", "upgrade=True"), ("9999", "newer release")])
def test_a_write_in_another_schema_is_refused_before_its_block(index: Database, revision: str, advice: str) -> None:
    set_revision(index, revision, int(revision))
    with pytest.raises(SchemaMismatch, match=advice), index.write():
        pytest.fail("the block began")


# Look-ups

DIGESTS = select(TRASH.c.digest)


def test_a_look_up_takes_no_lock_and_sees_the_last_commit(index: Database) -> None:
    with index.write() as connection:
        connection.execute(insert(TRASH), [trash_row(b"new")])
        assert index.rows(DIGESTS, {}) == []
    assert index.rows(DIGESTS, {}) == [(digest_of(b"new"),)]
    assert index.rows(DIGESTS.where(TRASH.c.size == bindparam("size")).limit(1), {"size": -1}) == []


def test_a_look_up_reads_the_new_index_after_a_replacement(index: Database, new: Path) -> None:
    with index.write() as connection:
        connection.execute(insert(TRASH), [trash_row(b"in the old one")])
    with closing(Database(index.directory)) as other:
        assert len(other.rows(DIGESTS, {})) == 1
        with index.alone() as turn:
            assert replace(index, turn, new, index.directory / "quarantine" / "old.db")
        assert other.rows(DIGESTS, {}) == []


@pytest.mark.parametrize(("revision", "advice"), [("0000", "upgrade=True"), ("9999", "newer release")])
def test_a_look_up_in_another_schema_is_refused(index: Database, revision: str, advice: str) -> None:
    assert index.rows(DIGESTS, {}) == []
    set_revision(index, revision, int(revision))
    with pytest.raises(SchemaMismatch, match=advice):
        index.rows(DIGESTS, {})


def test_a_look_up_in_a_newer_compatible_schema_succeeds(index: Database) -> None:
    with index.write() as connection:
        connection.execute(insert(TRASH), [trash_row(b"kept")])
    set_revision(index, "9999", 1)
    assert index.rows(DIGESTS, {}) == [(digest_of(b"kept"),)]


def test_a_look_up_reads_the_schema_and_the_rows_in_one_snapshot(
    index: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = lookups._compile

    def write_then_compile(statement: Any) -> Any:
        with index.write() as connection:
            connection.execute(insert(TRASH), [trash_row(b"in another schema")])
        return compiled(statement)

    monkeypatch.setattr(lookups, "_compile", write_then_compile)
    assert index.rows(DIGESTS, {}) == []


def test_a_failed_look_up_leaves_no_connection_open(index: Database) -> None:
    index.rows(DIGESTS, {})
    gone = select(Table("gone", MetaData(), Column("name", Text)))
    with pytest.raises(StorageError, match="no such table: gone"):
        index.rows(gone, {})
    assert index._lookups._idle == []
    assert index.rows(DIGESTS, {}) == []


def test_look_up_connections_are_closed_before_a_fork(index: Database) -> None:
    index.rows(DIGESTS, {})
    assert len(index._lookups._idle) == 1
    if (child := os.fork()) == 0:
        os._exit(len(index._lookups._idle))
    assert os.waitpid(child, 0)[1] == 0
    assert index.rows(DIGESTS, {}) == []


@pytest.mark.slow
def test_a_fork_waits_for_a_look_up_of_another_thread(index: Database) -> None:
    output = run_python(
        """
        import os, sys, threading, time
        from pathlib import Path
        from sqlalchemy import select
        from cachedb.index.sqlite import lookups
        from cachedb.index.sqlite import database
        from cachedb.disk import forks, locks
        from cachedb.index.tables import TRASH

        index = database.Database(Path(sys.argv[1]))
        within, forked = threading.Event(), threading.Event()
        compiled, seen = lookups._compile, []

        def fork():
            within.wait()
            if (child := os.fork()) == 0:
                os._exit(0)
            forked.set()
            os.waitpid(child, 0)

        def compile_slowly(statement):
            within.set()
            while not (forks._forking or forked.is_set()):
                time.sleep(0.001)
            seen.append(forked.is_set())
            return compiled(statement)

        lookups._compile = compile_slowly
        forker = threading.Thread(target=fork)
        forker.start()
        index.rows(select(TRASH.c.digest), {})
        forker.join(50)
        assert forked.is_set()
        print(seen)
        """,
        index.directory,
    )
    assert output == "[False]\n"


def test_many_threads_look_up_at_once(index: Database) -> None:
    with index.write() as connection:
        connection.execute(insert(TRASH), [trash_row(b"there")])
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: index.rows(DIGESTS, {}), range(500)))
    assert found == [[(digest_of(b"there"),)]] * 500
    assert len(index._lookups._idle) <= 5


# Connections


def test_every_connection_is_durable_and_enforces_foreign_keys(index: Database) -> None:
    with index.read() as first, index.read() as second, index.write() as third:
        for connection in (first, second, third):
            pragmas = ("synchronous", "foreign_keys", "journal_mode", "application_id")
            values = [connection.exec_driver_sql(f"PRAGMA {pragma}").scalar() for pragma in pragmas]
            assert values == [2, 1, "wal", APPLICATION_ID]


def test_foreign_keys_are_enforced_again_after_a_migration(index: Database) -> None:
    with index.write_schema() as connection:
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 0
    with index.write() as connection:
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


def test_a_failed_migration_is_rolled_back(tmp_path: Path) -> None:
    with closing(Database(tmp_path / "new")) as index:
        prepare(index)
        with pytest.raises(KeyError), index.write_schema() as connection:  # noqa: PT012
            connection.exec_driver_sql("CREATE TABLE half (done)")
            raise KeyError
        assert index.revision() is None
    shell = sqlite3.connect(index.path)
    assert shell.execute("SELECT * FROM sqlite_master").fetchall() == []
    shell.close()


def test_a_full_disk_is_reported_and_rolls_back_the_transaction(index: Database) -> None:
    with pytest.raises(StorageError, match="full: free some space"), index.write() as connection:  # noqa: PT012
        connection.exec_driver_sql("PRAGMA max_page_count = 1")
        connection.execute(insert(TRASH), [trash_row(b"%d" % number) for number in range(1000)])
    index.close()
    assert count_trash(index.directory) == 0
    with index.write() as connection:
        connection.execute(insert(TRASH), [trash_row(b"later")])


@pytest.mark.slow
def test_opening_and_closing_a_cache_leaves_no_file_open(directory: Path, tmp_path: Path) -> None:
    def use() -> None:
        with Cache.open(directory) as cache:
            cache.add_blob(b"data")
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / "index.db").write_text("dear diary " * 100)
        with pytest.raises(NotACache):
            Cache.open(tmp_path / "text")

    use()
    before = count_open_files()
    for _ in range(3):
        use()
    assert count_open_files() == before


# Forks


@pytest.mark.slow
@pytest.mark.parametrize("end", ["close", "exit"])
def test_blobs_that_a_child_stores_survive_its_parents_close(directory: Path, end: str) -> None:
    output = run_python(
        """
        import os, sys
        from cachedb import Cache

        close_read, close_write = os.pipe()
        stored_read, stored_write = os.pipe()
        cache = Cache.open(sys.argv[1])
        cache.add_blob(b"parent")
        if (child := os.fork()) == 0:
            cache.add_blob(b"one")
            os.write(stored_write, b"x")
            os.read(close_read, 1)
            cache.add_blob(b"two")
            if sys.argv[2] == "close":
                cache.close()
            os._exit(0)
        os.read(stored_read, 1)
        cache.add_blob(b"parent again")
        cache.close()
        os.write(close_write, b"x")
        assert os.waitpid(child, 0)[1] == 0
        print("done")
        """,
        directory,
        end,
    )
    assert output == "done\n"
    wanted = (b"parent", b"one", b"two", b"parent again")
    assert stored_rows(directory) == {digest_of(data): len(data) for data in wanted}


@pytest.mark.slow
@pytest.mark.parametrize("transaction", ["read", "write", "write_schema"])
def test_a_fork_waits_for_the_transactions_of_other_threads(index: Database, transaction: str) -> None:
    output = run_python(
        """
        import os, sys, threading, time
        from pathlib import Path
        from cachedb.disk import forks, locks
        from cachedb.index.sqlite.database import Database

        index = Database(Path(sys.argv[1]))
        forked = threading.Event()

        def fork():
            if (child := os.fork()) == 0:
                os._exit(0)
            forked.set()
            os.waitpid(child, 0)

        with getattr(index, sys.argv[2])():
            forker = threading.Thread(target=fork)
            forker.start()
            while not (forks._forking or forked.is_set()):
                time.sleep(0.001)
            assert not forked.is_set()
        forker.join(50)
        assert forked.is_set()
        print("done")
        """,
        index.directory,
        transaction,
    )
    assert output == "done\n"


@pytest.mark.slow
def test_a_child_works_though_other_threads_were_in_transactions(directory: Path) -> None:
    output = run_python(
        """
        import os, sys, threading
        from cachedb import Cache

        cache = Cache.open(sys.argv[1])
        stop = threading.Event()

        def work(number):
            turn = 0
            while not stop.is_set():
                digest = cache.add_blob(b"%d %d" % (number, turn))
                assert cache.has_blob(digest)
                turn += 1

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        children = []
        for number in range(12):
            if (child := os.fork()) == 0:
                for turn in range(5):
                    digest = cache.add_blob(b"child %d %d" % (number, turn))
                    assert cache.has_blob(digest)
                cache.close()
                os._exit(0)
            children.append(child)
        stop.set()
        for thread in threads:
            thread.join()
        cache.close()
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 12
        print("done")
        """,
        directory,
    )
    assert output == "done\n"
    expected = {digest_of(b"child %d %d" % (number, turn)) for number in range(12) for turn in range(5)}
    assert expected <= stored_rows(directory).keys()
    with Cache.open(directory) as cache:
        cache.collect_garbage()
    assert stored_rows(directory) == {}


@pytest.mark.slow
def test_a_cache_works_in_workers_of_multiprocessing(directory: Path) -> None:
    output = run_python(
        """
        import multiprocessing, sys
        from cachedb import Cache
        from tests.support.make import digest_of

        with Cache.open(sys.argv[1]) as cache:
            cache.add_blob(b"parent")
            fork = multiprocessing.get_context("fork")
            workers = [fork.Process(target=cache.add_blob, args=(b"fork %d" % number,)) for number in range(3)]
            spawn = multiprocessing.get_context("spawn")
            workers += [spawn.Process(target=Cache.open, args=(sys.argv[1],))]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            assert [worker.exitcode for worker in workers] == [0] * 4
            assert cache.get_stats().blob_count == 4
            assert cache.collect_garbage().blobs == 0 or cache.has_blob(digest_of(b"parent"))
        print("done")
        """,
        directory,
        new_interpreter=True,
    )
    assert output == "done\n"


# Directories


def test_a_new_directory_and_its_folders_are_synced_before_the_index_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("cachedb.index.sqlite.prepare.sync_folder", synced.append)
    directory = tmp_path / "a" / "b"
    prepare(Database(directory))
    assert {tmp_path, tmp_path / "a", directory, directory / "blobs"} <= set(synced)
    assert not (directory / "index.db").exists()


def test_only_the_owner_can_access_a_new_cache(cache: Cache) -> None:
    paths = [cache.directory, *(path for path in cache.directory.iterdir() if path.is_dir())]
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o700}


def test_an_index_that_is_no_database_is_refused_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "index.db").write_text("dear diary " * 100)
    before = content(tmp_path)
    with pytest.raises(NotACache, match="not an SQLite database: name another directory"):
        Cache.open(tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_another_programs_database_is_refused_and_unchanged(tmp_path: Path, journal: str) -> None:
    shell = sqlite3.connect(tmp_path / "index.db")
    shell.execute(f"PRAGMA journal_mode = {journal}")
    shell.execute("CREATE TABLE diary (entry TEXT)")
    shell.commit()
    shell.close()
    before = content(tmp_path)
    for upgrade in (False, True):
        with pytest.raises(NotACache, match="another program's database: name another directory"):
            Cache.open(tmp_path, upgrade=upgrade)
    assert content(tmp_path) == before


@pytest.mark.parametrize("index", [None, b""])
def test_a_folder_of_other_files_is_refused_and_unchanged(tmp_path: Path, index: bytes | None) -> None:
    (tmp_path / "thesis.txt").write_text("chapter one")
    if index is not None:
        (tmp_path / "index.db").write_bytes(index)
    before = content(tmp_path)
    with pytest.raises(NotACache, match=r"not empty \(it holds 'thesis.txt'\): name another directory"):
        Cache.open(tmp_path)
    assert content(tmp_path) == before


def test_a_file_is_no_cache_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("data")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match=f"cannot (use|open) the cache directory: .*'{directory}'"):
            Cache.open(directory)
    assert (tmp_path / "file").read_text() == "data"


def test_a_place_where_no_directory_can_be_made_is_refused() -> None:
    with pytest.raises(StorageError, match=r"cannot use the cache directory: .*'/proc/cachedb'"):
        Cache.open("/proc/cachedb")


def test_an_error_of_a_damaged_index_names_the_repair(directory: Path) -> None:
    with Cache.open(directory) as cache:
        cache.add_blob(b"data")
    with (directory / "index.db").open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))
    with pytest.raises(StorageError, match="`cachedb verify --repair` rebuilds it"), Cache.open(directory) as cache:
        cache.list_manifests()


# Replacing the index


@pytest.fixture
def new(index: Database) -> Path:
    """Make a second index, which replaces the first."""
    path = index.directory / "backups" / "new.db"
    with index.raw() as connection:
        connection.execute("VACUUM INTO ?", (str(path),))
    (index.directory / "quarantine").mkdir()
    return path


@pytest.mark.slow
def test_an_index_cannot_be_opened_while_it_is_replaced_and_always_exists(
    index: Database, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, sync = threading.Event(), os.fsync
    threads: list[threading.Thread] = []

    def open_it() -> None:
        read_revision(index.directory)
        opened.set()

    def sync_and_open(file: int) -> None:
        sync(file)
        assert index.path.exists()
        if not threads:
            threads.append(threading.Thread(target=open_it))
            threads[0].start()
        if new.exists():
            assert not opened.wait(0.2)

    with index.alone() as turn, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", sync_and_open)
        assert replace(index, turn, new, index.directory / "quarantine" / "old.db")
    assert opened.wait(60)
    threads[0].join()


def test_a_replaced_index_contains_its_wal(index: Database, new: Path, cache: Cache) -> None:
    cache.add_blob(b"in the WAL")
    wal = index.path.with_name("index.db-wal")
    assert wal.stat().st_size
    old = index.directory / "quarantine" / "old.db"
    with index.alone() as turn:
        assert replace(index, turn, new, old)
    shell = sqlite3.connect(old)
    assert shell.execute("SELECT count(*) FROM blobs").fetchone() == (1,)
    shell.close()


def test_an_index_that_another_program_reads_is_not_replaced(
    index: Database, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachedb.index.sqlite.replace._READING_SECONDS", 0)
    shell = sqlite3.connect(index.path, isolation_level=None)
    shell.execute("BEGIN")
    shell.execute("SELECT * FROM images").fetchall()
    with index.write() as connection:
        connection.execute(insert(TRASH), [trash_row(b"written meanwhile")])
    before, old = index.path.stat().st_ino, index.directory / "quarantine" / "old.db"
    with index.alone() as turn, pytest.raises(StorageError, match="another program has been reading it"):
        replace(index, turn, new, old)
    assert index.path.stat().st_ino == before
    shell.close()
    with index.alone() as turn:
        assert replace(index, turn, new, old)


def long_path(folder: Path, length: int) -> Path:
    """Return a directory whose index has a path of `length` bytes."""
    while (left := length - len(os.fsencode(folder)) - len("/index.db")) > 101:
        folder /= "x" * 100 if left > 202 else "x" * (left // 2)
    return folder / ("y" * (left - 1))


def test_a_path_that_is_too_long_for_sqlite_is_refused(tmp_path: Path, cachedb: Run) -> None:
    with Cache.open(long_path(tmp_path, 504)) as cache:
        cache.add_blob(b"here")
    long = long_path(tmp_path, 505)
    with pytest.raises(StorageError, match="has 505 bytes, and SQLite takes 504 at most: choose a cache directory"):
        Cache.open(long)
    assert not long.exists()
    done = cachedb("--dir", long, "ls")
    assert (done.returncode, done.stdout) == (1, "")
    assert "SQLite takes 504 at most" in done.stderr


@pytest.mark.slow
def test_a_backup_to_a_path_that_is_too_long_for_sqlite_fails_in_one_line(tmp_path: Path, cachedb: Run) -> None:
    (long := long_path(tmp_path, 520)).mkdir(parents=True)
    cachedb("init")
    done = cachedb("db", "backup", long / "index.db")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1


def test_a_symbolic_link_does_not_make_a_path_shorter(tmp_path: Path) -> None:
    long = long_path(tmp_path, 510)
    long.mkdir(parents=True)
    (tmp_path / "link").symlink_to(long)
    with pytest.raises(StorageError, match="has 510 bytes"):
        Cache.open(tmp_path / "link")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
@pytest.mark.parametrize("is_cache", [False, True])
def test_an_index_that_is_not_a_regular_file_is_refused(
    directory: Path, make: Callable[[Path], None], is_cache: bool
) -> None:
    directory.mkdir()
    if is_cache:
        Cache.open(directory).close()
        (directory / "index.db").unlink()
    make(directory / "index.db")
    with pytest.raises(NotACache, match=r"index.db' is not a regular file: move it away"):
        Cache.open(directory)


@pytest.mark.parametrize("suffix", ["-journal", "-wal", "-shm"])
@pytest.mark.parametrize("kind", ["symbolic link", "dangling link", "hard link", "pipe", "folder"])
def test_a_link_or_pipe_beside_the_index_is_refused(directory: Path, tmp_path: Path, suffix: str, kind: str) -> None:
    Cache.open(directory).close()
    thesis, beside = tmp_path / "thesis.txt", directory / f"index.db{suffix}"
    thesis.write_text("the only copy")
    make: dict[str, Callable[[], object]] = {
        "symbolic link": lambda: beside.symlink_to(thesis),
        "dangling link": lambda: beside.symlink_to(tmp_path / "nothing"),
        "hard link": lambda: os.link(thesis, beside),
        "pipe": lambda: os.mkfifo(beside),
        "folder": beside.mkdir,
    }
    make[kind]()
    what = kind.replace("dangling", "symbolic") if "link" in kind else "not a regular file"
    for damaged in (False, True):
        with pytest.raises(NotOurs, match=f"index.db{suffix}' is (a )?{what}.*: move it away$"):
            Cache.open(directory, damaged=damaged)
    with closing(Database(directory)) as index, pytest.raises(NotOurs, match=what), index.write():
        pytest.fail("SQLite writes to another file")
    assert thesis.read_text() == "the only copy"
    assert not (tmp_path / "nothing").exists()


@pytest.mark.slow
def test_a_deleted_working_directory_is_reported(tmp_path: Path) -> None:
    script = """
        import os, subprocess, sys
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir("../gone")
        sys.exit(subprocess.run([sys.executable, "-m", "cachedb", "--dir", *sys.argv[1:], "ls"]).returncode)
        """
    command = [sys.executable, "-c", textwrap.dedent(script), "relative"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "'relative' is relative to a working directory that was deleted: change to another one" in done.stderr


def test_an_error_of_a_signal_handler_is_not_wrapped_as_an_error_of_the_statement(index: Database) -> None:
    """SQLAlchemy wraps what is raised while it prepares a statement."""

    class Interrupted(Exception):
        pass

    class Interrupting(TypeDecorator[str]):
        impl = Text
        cache_ok = True

        def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
            raise Interrupted

    with index.read() as connection, pytest.raises(Interrupted):
        connection.execute(select(literal("x", Interrupting())))


def test_a_block_that_finds_something_busy_is_not_run_again(index: Database) -> None:
    with pytest.raises(Busy, match="another cache"), index.write():
        raise Busy("another cache is busy", "process 1")


@pytest.mark.slow
def test_an_interrupt_at_the_end_of_any_block_of_a_write_leaves_no_lock(index: Database) -> None:
    script = """
    import contextlib, gc, itertools, sys
    from pathlib import Path
    from cachedb.disk import locks
    from cachedb.index.sqlite.database import Database

    index = Database(Path(sys.argv[1]), wait=0)
    ended = 0

    def interrupt(frame, event, _argument):
        global ended
        if frame.f_code.co_name == "__exit__" and frame.f_code.co_filename == contextlib.__file__:
            ended += 1
            if ended == wanted:
                raise KeyboardInterrupt

    gc.disable()  # otherwise it releases the lock at some later time
    for wanted in itertools.count(1):
        ended = 0
        try:
            sys.settrace(interrupt)
            with index.write():
                pass
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        if ended < wanted:
            break
        assert not locks.is_held(index.write_lock), wanted
        with index.write():  # raises if the thread seems to write still
            pass
    print(wanted > 10)
    """
    assert run_python(script, index.directory) == "True\n"


@pytest.mark.parametrize("suffix", ["", "-wal"])
def test_losing_the_permission_for_an_open_index_is_our_error(
    directory: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    Cache.open(directory).close()
    statement = select(TRASH.c.size)
    stat, path = os.stat, f"{directory}/index.db{suffix}"

    def refuse(name: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if str(name) == path:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return stat(name, *arguments, **options)

    with closing(Database(directory)) as index:
        assert index.rows(statement, {}) == []
        monkeypatch.setattr("os.stat", refuse)
        for read in (lambda: index.rows(statement, {}), index.revision):
            with pytest.raises(StorageError, match=r"cannot open the index: Permission denied: .*: check the owner"):
                read()
    monkeypatch.undo()
    index.close()
