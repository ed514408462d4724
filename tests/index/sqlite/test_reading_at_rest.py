"""A process that can only read a cache sees one snapshot of its index, even if another one writes meanwhile."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from cachedb import Cache, StorageError
from cachedb.errors import Busy, CacheReplaced
from cachedb.index.sqlite import connection, database
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.file import IndexFile
from cachedb.index.sqlite.inspect import read_journal_mode
from cachedb.index.sqlite.query import run_query
from cachedb.index.tables import TRASH
from tests.conftest import running
from tests.support.make import digest_of

ROWS = 3000  # enough for hundreds of pages
ALL = "SELECT digest, size FROM trash ORDER BY digest"


def fill(directory: Path, size: int, *, close: bool = True) -> sqlite3.Connection:
    """Replace all rows of the simplest table by rows of one size, in one transaction."""
    shell = sqlite3.connect(directory / "index.db", isolation_level=None)
    shell.execute("PRAGMA wal_autocheckpoint = 0")
    shell.execute("BEGIN IMMEDIATE")
    shell.execute("DELETE FROM trash")
    rows = [(digest_of(b"%d" % number), size) for number in range(ROWS * size)]
    shell.executemany("INSERT INTO trash VALUES (?, ?)", rows)
    shell.execute("COMMIT")
    if close:
        shell.close()
    return shell


@pytest.fixture
def at_rest(directory: Path) -> Path:
    Cache.open(directory).close()
    fill(directory, 1)
    return directory


@pytest.fixture
def with_wal(directory: Path, tmp_path: Path) -> Path:
    """Make an index that was copied with its WAL, but without its -shm file."""
    Cache.open(directory).close()
    shell = fill(directory, 1, close=False)
    for name in ("index.db", "index.db-wal"):
        shutil.copyfile(directory / name, tmp_path / name)
    shell.close()
    for name in ("index.db", "index.db-wal"):
        shutil.copyfile(tmp_path / name, directory / name)
    (directory / "index.db-shm").unlink(missing_ok=True)
    assert (directory / "index.db-wal").stat().st_size
    return directory


@pytest.fixture(params=["at_rest", "with_wal"])
def filled(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


@pytest.fixture
def only_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda _, mode: mode != os.W_OK)


def write(directory: Path) -> None:
    """Write to the index as another process does; closing it checkpoints and removes the WAL."""
    fill(directory, 2)


def is_one_snapshot(rows: list[Any]) -> bool:
    sizes = {size for _, size in rows}
    return len(sizes) == 1 and len(rows) == ROWS * max(sizes) == len({digest for digest, _ in rows})


@pytest.mark.usefixtures("only_read")
def test_an_answer_is_one_snapshot(filled: Path) -> None:
    with Cache.open(filled) as cache:
        for stream in (False, True):
            with cache.sql(ALL, stream=stream) as answer:
                rows = [next(answer.rows) for _ in range(10)]
                write(filled)
                rows += answer.rows
            assert is_one_snapshot(rows)
        with cache.sql(ALL) as answer:
            assert next(answer.rows)[1] == 2


@pytest.mark.usefixtures("only_read")
def test_a_transaction_is_one_snapshot(filled: Path) -> None:
    index = Database(filled)
    with index.read() as connection:
        found = connection.execute(select(TRASH.c.digest, TRASH.c.size).order_by(TRASH.c.digest))
        rows = [tuple(row) for row in found.fetchmany(10)]
        write(filled)
        rows += map(tuple, found)
        assert connection.exec_driver_sql("SELECT max(size) FROM trash").scalar_one() == 1
    assert is_one_snapshot(rows)
    assert index.rows(select(TRASH.c.size).limit(1), {}) == [(2,)]
    index.close()


@pytest.mark.usefixtures("only_read")
def test_a_copy_in_memory_refuses_changes(at_rest: Path) -> None:
    index = Database(at_rest)
    with index.raw() as copy, pytest.raises(sqlite3.OperationalError, match="attempt to write a readonly database"):
        copy.execute("DELETE FROM trash")
    index.close()


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object], int], None]:
    """Return a function that calls `work` during the next `times` copies of an index."""
    snapshot = connection.take_snapshot

    def write_during_copies(work: Callable[[], object], times: int) -> None:
        left = [work] * times

        def copy(opened: Any, *how: Any) -> Any:
            class Source:
                file, is_settled = opened.file, opened.is_settled

                def backup(self, target: sqlite3.Connection) -> None:
                    opened.backup(target, pages=5, progress=lambda *_: left.pop()() if left else None)

                def close(self) -> None:
                    opened.close()

            return snapshot(Source(), *how)  # type: ignore[arg-type]

        monkeypatch.setattr(database, "take_snapshot", copy)

    return write_during_copies


@pytest.mark.usefixtures("only_read")
def test_an_index_that_changes_while_it_is_read_is_read_again(
    filled: Path, writers: Callable[[Callable[[], object], int], None]
) -> None:
    writers(lambda: write(filled), 2)
    index = Database(filled)
    with index.read() as connection:
        rows = [tuple(row) for row in connection.execute(select(TRASH.c.digest, TRASH.c.size))]
    assert is_one_snapshot(rows)
    assert rows[0][1] == 2
    index.close()


@pytest.mark.usefixtures("only_read")
def test_an_index_that_looks_damaged_while_it_changes_is_read_again(
    at_rest: Path, writers: Callable[[Callable[[], object], int], None]
) -> None:
    def tear() -> None:
        os.utime(at_rest / "index.db", (1, 1))
        raise sqlite3.DatabaseError("malformed database schema")

    writers(tear, 1)
    index = Database(at_rest)
    assert len(index.rows(select(TRASH.c.size), {})) == ROWS
    index.close()


@pytest.mark.usefixtures("only_read")
@pytest.mark.parametrize("how", ["read", "rows", "sql"])
def test_reading_an_index_that_changes_all_the_time_fails(
    at_rest: Path, writers: Callable[[Callable[[], object], int], None], how: str
) -> None:
    times = iter(range(10**9, 10**10))
    writers(lambda: os.utime(at_rest / "index.db", ns=(next(times), next(times))), 10**6)
    index = Database(at_rest, wait=0.1)
    reads: dict[str, Callable[[], object]] = {
        "rows": lambda: index.rows(select(TRASH.c.size), {}),
        "read": index.revision,
        "sql": lambda: run_query(index, ALL).__enter__(),
    }
    with pytest.raises(StorageError, match="the index changed while it was read: try again"):
        reads[how]()


@pytest.mark.usefixtures("only_read")
def test_an_index_that_was_just_written_is_read_again(at_rest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second change within the same clock step would not alter the file's modification time."""
    settled = [False, False, True]
    monkeypatch.setattr(IndexFile, "is_settled", lambda _: settled.pop(0))
    index = Database(at_rest)
    assert index.rows(select(TRASH.c.size).limit(1), {}) == [(1,)]
    assert settled == []
    index.close()
    monkeypatch.undo()
    os.utime(at_rest / "index.db")
    assert not index.file.is_settled()
    os.utime(at_rest / "index.db", (1, 1))
    assert index.file.is_settled()


def begin_with_journal(directory: Path) -> sqlite3.Connection:
    """Switch WAL mode off, as another program may, and write half of a transaction to the index."""
    shell = sqlite3.connect(directory / "index.db", isolation_level=None)
    shell.execute("PRAGMA journal_mode = DELETE").close()
    shell.execute("PRAGMA cache_size = 10")
    shell.execute("BEGIN IMMEDIATE")
    before = (directory / "index.db").read_bytes()
    shell.execute("UPDATE trash SET size = 2")
    assert (directory / "index.db").read_bytes() != before
    os.utime(directory / "index.db", (1, 1))  # the writer pauses for long
    return shell


@pytest.mark.usefixtures("only_read")
def test_half_a_transaction_with_a_journal_is_not_read(at_rest: Path) -> None:
    shell = begin_with_journal(at_rest)
    index = Database(at_rest, wait=0)
    with pytest.raises(Busy, match="the index, which is held by"):
        index.rows(select(TRASH.c.size), {})
    shell.execute("COMMIT")
    index.wait_seconds = 60
    with run_query(index, ALL) as answer:
        assert [size for _, size in answer.rows] == [2] * ROWS
    index.close()
    shell.close()


@pytest.mark.usefixtures("only_read")
def test_half_a_transaction_of_a_killed_program_is_not_read(at_rest: Path, tmp_path: Path) -> None:
    shell = begin_with_journal(at_rest)
    killed = tmp_path / "killed"
    shutil.copytree(at_rest, killed)
    shell.close()
    index = Database(killed)
    with pytest.raises(StorageError, match="another program was killed while it wrote: run `cachedb verify` as a user"):
        index.rows(select(TRASH.c.size), {})
    index.close()
    with sqlite3.connect(killed / "index.db") as owner:
        assert owner.execute("SELECT count(*) FROM trash WHERE size = 1").fetchone() == (ROWS,)
    owner.close()


@pytest.mark.usefixtures("only_read")
@pytest.mark.parametrize("how", ["read", "rows", "sql"])
def test_an_index_whose_last_writer_leaves_is_opened_again(
    at_rest: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """SQLite needs an -shm for an index with a WAL, and the last writer has just removed it."""
    shell = fill(at_rest, 2, close=False)

    def leave(*arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        monkeypatch.setattr("os.access", lambda _, mode: mode != os.W_OK)
        shell.close()
        assert not (at_rest / "index.db-wal").exists()
        error = sqlite3.OperationalError("unable to open database file")
        error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
        raise error

    monkeypatch.setattr(database, "connect", leave)
    index = Database(at_rest)
    if how == "sql":
        with run_query(index, "SELECT DISTINCT size FROM trash") as answer:
            assert list(answer.rows) == [(2,)]
    elif how == "rows":
        assert index.rows(select(TRASH.c.size).distinct(), {}) == [(2,)]
    else:
        with index.read() as connection:
            assert connection.exec_driver_sql("SELECT DISTINCT size FROM trash").all() == [(2,)]
    index.close()


@pytest.mark.usefixtures("only_read")
def test_an_index_that_cannot_be_opened_is_an_error_at_once(at_rest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr(database, "connect", fail)
    index = Database(at_rest, wait=0)
    with pytest.raises(StorageError, match="the index failed: unable to open database file"):
        index.rows(select(TRASH.c.size), {})
    index.close()


@pytest.mark.usefixtures("only_read")
def test_a_write_to_a_read_only_index_is_refused(at_rest: Path) -> None:
    index = Database(at_rest)
    before = (at_rest / "index.db").read_bytes()
    with pytest.raises(StorageError, match="check the owner and mode"), index.write() as connection:
        connection.exec_driver_sql("DELETE FROM trash")
    index.close()
    assert (at_rest / "index.db").read_bytes() == before


SHELL = """
    import sqlite3, sys
    shell = sqlite3.connect(sys.argv[1] + "/index.db", isolation_level=None)
    shell.execute("PRAGMA wal_autocheckpoint = 0")
    shell.execute("UPDATE trash SET size = 2")
    shell.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    print("begun", flush=True)
    for line in sys.stdin:
        shell.execute(line).fetchall()
        print("done", flush=True)
    shell.close()
"""


def execute(shell: subprocess.Popen[str], statement: str) -> None:
    assert shell.stdin is not None
    assert shell.stdout is not None
    print(statement, file=shell.stdin, flush=True)
    assert shell.stdout.readline() == "done\n"


@pytest.mark.usefixtures("only_read")
@pytest.mark.parametrize("change", ["the -shm is removed", "the WAL is emptied"])
def test_an_open_query_keeps_its_locks_during_other_calls(at_rest: Path, tmp_path: Path, change: str) -> None:
    """The last writer overwrites the index without regard to readers that have no lock on it."""
    query, shm = "SELECT size FROM trash ORDER BY digest", at_rest / "index.db-shm"
    with running(SHELL, at_rest) as shell:
        index = Database(at_rest)
        assert index.rows(select(TRASH.c.size).limit(1), {}) == [(2,)]  # leaves an idle connection
        with run_query(index, query, stream=True) as answer:
            rows = [next(answer.rows) for _ in range(10)]
            execute(shell, "PRAGMA wal_checkpoint(TRUNCATE)")
            if change == "the WAL is emptied":
                assert read_journal_mode(index) == "wal"
            else:
                execute(shell, "UPDATE trash SET size = 3")
                shm.rename(tmp_path / shm.name)
                with pytest.raises(CacheReplaced, match="was removed or replaced"), run_query(index, query):
                    pass
                (tmp_path / shm.name).rename(shm)
            execute(shell, "UPDATE trash SET size = 4")
            shell.communicate(timeout=60)
            rows += answer.rows
        assert rows == [(2,)] * ROWS
    index.close()


@pytest.mark.usefixtures("only_read")
def test_a_lost_shm_ends_only_one_query(at_rest: Path) -> None:
    with running(SHELL, at_rest) as shell:
        index = Database(at_rest)
        assert index.rows(select(TRASH.c.size).limit(1), {}) == [(2,)]  # leaves an idle connection
        execute(shell, "UPDATE trash SET size = 3")
        (at_rest / "index.db-shm").unlink()
        with pytest.raises(CacheReplaced, match="was removed or replaced"), run_query(index, ALL):
            pass
        with run_query(index, "SELECT DISTINCT size FROM trash") as answer:
            assert list(answer.rows) == [(3,)]
        index.close()


READER = f"""
    import sys
    from cachedb import Cache
    with Cache.open(sys.argv[1]) as cache, cache.sql({ALL!r}) as answer:
        rows = [next(answer.rows) for _ in range(10)]
        print("begun", flush=True)
        sys.stdin.readline()
        rows += answer.rows
        print(len(rows), len(dict(rows)), set(dict(rows).values()))
"""


def check_reader(directory: Path, path: Path) -> None:
    with running(READER, path) as reader:
        write(directory)
        output, _ = reader.communicate("\n", timeout=60)
    assert (reader.returncode, output) == (0, f"{ROWS} {ROWS} {{1}}\n")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_read_only_mount_is_read_in_one_snapshot(at_rest: Path, tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    if subprocess.run(["mount", "--bind", at_rest, mount], check=False, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here: needs CAP_SYS_ADMIN")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", mount], check=True)
        check_reader(at_rest, mount)
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a folder of any mode")
def test_a_read_only_folder_is_read_in_one_snapshot(at_rest: Path) -> None:
    at_rest.chmod(0o500)
    try:
        with running(READER, at_rest) as reader:
            at_rest.chmod(0o700)
            write(at_rest)
            output, _ = reader.communicate("\n", timeout=60)
        assert (reader.returncode, output) == (0, f"{ROWS} {ROWS} {{1}}\n")
    finally:
        at_rest.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv")
def test_another_user_reads_one_snapshot(at_rest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["chmod", "-R", "a+rX", at_rest], check=True)
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    if subprocess.run([*user, sys.executable, "-c", f"import cachedb, os; os.listdir({str(at_rest)!r})"],
                      check=False, capture_output=True).returncode:  # fmt: skip
        pytest.skip("another user can read neither this Python nor the folder of the tests")
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nexec {" ".join(user)} "{sys.executable}" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    check_reader(at_rest, at_rest)
