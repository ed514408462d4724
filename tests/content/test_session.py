"""Sessions: a process owns leases, a lock file and a folder; after its death others remove them."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import select

from cachedb import Cache, NotOurs, StorageError
from cachedb.content import collect
from cachedb.content.session import Session, lock_dead_sessions, lock_path
from cachedb.disk.folders import Folders, Leftover
from cachedb.disk.layout import received_digest
from cachedb.index.sqlite.database import Database
from cachedb.index.tables import LEASES
from cachedb.oci.digests import Digest
from tests.conftest import files_of, run_python, running, snapshot
from tests.disk.test_locks import count_open_files, is_free
from tests.index.sqlite.test_database import content
from tests.support.make import digest_of, image, save

DIGEST = Digest(digest_of(b"data"))
LIVING = """
    import sys, time
    from cachedb import Cache
    cache = Cache.open(sys.argv[1])
    cache.add_blob(b"data")
    print(cache._session.id, flush=True)
    time.sleep(60)
"""


def leases(index: Database) -> list[str]:
    with index.read() as connection:
        return list(connection.execute(select(LEASES.c.session)).scalars())


def traces(directory: Path) -> dict[str, object]:
    """Return the leases, the folders in ingest/ and the lock files of a cache."""
    found = snapshot(directory)
    return {name: found[name] for name in ("leases", "ingest", "locks")}


def test_a_session_begins_with_the_first_write(cache: Cache, index: Database) -> None:
    cache.list_manifests()
    assert traces(cache.directory) == {"leases": [], "ingest": [], "locks": ["write.lock", "write.queue"]}
    cache.add_blob(b"data")
    left = traces(cache.directory)
    assert left["ingest"] == leases(index)
    assert left["locks"] == [f"{leases(index)[0]}.session", "write.lock", "write.queue"]
    assert not is_free(lock_path(cache.directory, leases(index)[0]))


def test_a_closed_session_leaves_nothing(directory: Path) -> None:
    before = None
    for _ in range(2):
        with Cache.open(directory) as cache:
            cache.add_blob(b"data")
        assert traces(directory) == {"leases": [], "ingest": [], "locks": ["write.lock", "write.queue"]}
        assert before in (None, count_open_files())
        before = count_open_files()


@pytest.mark.slow
def test_the_next_open_removes_a_dead_session_and_keeps_a_live_one(directory: Path) -> None:
    with running(LIVING, directory) as living, running(LIVING, directory) as dead:
        assert living.pid != dead.pid
        dead.kill()
        dead.wait()
        with Cache.open(directory) as cache:
            left = traces(directory)
            (session,) = os.listdir(directory / "ingest")
            assert session.startswith(f"{living.pid}-")
            assert left["locks"] == [f"{session}.session", "write.lock", "write.queue"]
            assert {row[1] for row in left["leases"]} == {session}  # type: ignore[attr-defined]
            assert cache.collect_garbage().blobs == 0
            assert cache.has_blob(DIGEST)
        living.kill()
        living.wait()
        with Cache.open(directory) as cache:
            assert traces(directory) == {"leases": [], "ingest": [], "locks": ["write.lock", "write.queue"]}
            assert cache.collect_garbage().blobs == 1


@pytest.mark.slow
def test_a_collection_removes_dead_sessions(cache: Cache) -> None:
    with running(LIVING, cache.directory) as process:
        assert cache.collect_garbage().blobs == 0
        process.kill()
        process.wait()
        assert cache.collect_garbage().blobs == 1


def test_the_next_open_removes_a_folder_a_lock_file_or_a_lease_alone(cache: Cache, index: Database) -> None:
    (cache.directory / "ingest" / "1-0000000f01de").mkdir()
    (cache.directory / "ingest" / "1-0000000f01de" / "1").write_bytes(b"half")
    lock_path(cache.directory, "1-0000000010c4").touch()
    with index.write() as connection:
        connection.execute(LEASES.insert().values(digest=DIGEST, session="1-lease", hold=1))
    Cache.open(cache.directory).close()
    assert traces(cache.directory) == {"leases": [], "ingest": [], "locks": ["write.lock", "write.queue"]}


@pytest.mark.parametrize("session", ["", ".", "..", "../..", "../outside", "a/b"])
def test_a_lease_with_an_invalid_session_deletes_no_file(cache: Cache, directory: Path, session: str) -> None:
    """Anybody with a SQL shell can write such a lease."""
    (directory.parent / "outside.session").touch()
    mine = cache.add_blob(b"data")
    shell = sqlite3.connect(directory / "index.db")
    with shell:
        shell.execute("INSERT INTO leases VALUES (?, ?, 1)", (DIGEST, session))
    shell.close()
    Cache.open(directory).close()
    assert [row[1] for row in traces(directory)["leases"]] == [cache._session.id]  # type: ignore[attr-defined]
    assert cache.get_blob(mine) == b"data"
    assert cache._session.folder.is_dir()
    assert (directory.parent / "outside.session").exists()


def test_foreign_files_in_the_folder_of_a_dead_session_are_kept(cache: Cache) -> None:
    folder = cache.directory / "ingest" / "1-00000000dead"
    folder.mkdir()
    strange = [".nfs0001", "1.sha256-xyz", "1.", "noise.txt"]
    for name in (*strange, "1", "2"):
        (folder / name).touch()
    (folder / "3").mkdir()
    (folder / "3" / "index.db").touch()
    assert not any(received_digest(name) for name in strange)
    Cache.open(cache.directory).close()
    assert sorted(path.name for path in folder.iterdir()) == sorted(strange)


def test_the_next_open_retracts_an_interrupted_publication(cache: Cache) -> None:
    folder = cache.directory / "ingest" / "1-00000000dead"
    folder.mkdir()
    stored = cache.add_blob(b"stored")
    for data in (b"interrupted", b"stored"):
        path = folder / f"1.{digest_of(data).replace(':', '-')}"
        path.write_bytes(data)
        if data == b"interrupted":
            os.link(path, cache.directory / "blobs" / digest_of(data).replace(":", "/"))
    assert files_of(cache.directory).keys() == {stored, digest_of(b"interrupted")}
    Cache.open(cache.directory).close()
    assert files_of(cache.directory).keys() == {stored}
    assert not folder.exists()


def test_two_processes_do_not_remove_the_same_session(index: Database) -> None:
    lock_path(index.directory, "1-0000000010c4").touch()
    (index.directory / "ingest" / "2-0000000f01de").mkdir()
    first = lock_dead_sessions(index.folders, [])
    assert next(first) == "1-0000000010c4"
    assert list(lock_dead_sessions(index.folders, [])) == ["2-0000000f01de"]


def test_a_session_that_is_removed_while_it_begins_begins_again(
    index: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finds, locks and unlinks the lock file before the session locks it."""
    removals: list[Iterator[str]] = []
    flock = fcntl.flock

    def remove_then_lock(file: int, operation: int) -> None:
        # Two other processes come after the lock file was made and before it is locked.
        if not removals:
            removals.extend([lock_dead_sessions(index.folders, []), lock_dead_sessions(index.folders, [])])
            removed.append(next(removals[0]))
            assert next(removals[1], None) is None
            assert next(removals[0], None) is None
        flock(file, operation)

    removed: list[str] = []
    monkeypatch.setattr(fcntl, "flock", remove_then_lock)
    session = Session(index)
    assert removed == [session.id]
    assert session.folder.is_dir()
    assert not is_free(lock_path(index.directory, session.id))
    assert list(lock_dead_sessions(index.folders, [])) == []
    session.close()


def test_a_lock_file_of_a_dead_session_that_cannot_be_removed_is_reported(
    index: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    (index.directory / "ingest" / "2-0000000f01de").mkdir()

    def refuse(name: str, *, dir_fd: int) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", name)

    left: list[Leftover] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        assert list(lock_dead_sessions(index.folders, left)) == ["2-0000000f01de"]
    assert [path for path, _ in left] == [lock_path(index.directory, "2-0000000f01de")]
    assert list(lock_dead_sessions(index.folders, left)) == ["2-0000000f01de"]
    assert len(left) == 1


def test_a_session_is_locked_while_it_is_removed(index: Database) -> None:
    """A session without a lock file is locked too: a new session of the same name must wait."""
    lock_path(index.directory, "1-0000000010c4").touch()
    (index.directory / "ingest" / "2-0000000f01de").mkdir()
    for session in lock_dead_sessions(index.folders, []):
        assert not is_free(lock_path(index.directory, session))
    assert sorted(os.listdir(index.directory / "locks")) == ["write.lock", "write.queue"]


@pytest.mark.slow
def test_sessions_begin_and_end_while_others_collect(directory: Path) -> None:
    output = run_python(
        """
        import os, sys
        from cachedb import Cache

        Cache.open(sys.argv[1]).close()
        children = []
        for number in range(6):
            if (child := os.fork()) == 0:
                for turn in range(6):
                    with Cache.open(sys.argv[1]) as cache:
                        digest = cache.add_blob(b"%d %d" % (number, turn))
                        cache.collect_garbage()
                        assert cache.get_blob(digest)
                        assert cache._session.folder.is_dir()
                os._exit(0)
            children.append(child)
        print([os.waitpid(child, 0)[1] for child in children])
        """,
        directory,
    )
    assert output == f"{[0] * 6}\n"
    assert traces(directory) == {"leases": [], "ingest": [], "locks": ["write.lock", "write.queue"]}


def test_a_session_that_cannot_begin_leaves_no_file_open(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    before = None
    with monkeypatch.context() as broken:
        broken.setattr(Folders, "make", fail)
        for _ in range(3):
            with pytest.raises(StorageError, match="cannot begin a session"):
                cache.add_blob(b"data")
            assert before in (None, count_open_files())
            before = count_open_files()
    cache.add_blob(b"data")
    Cache.open(cache.directory).close()
    assert len(traces(cache.directory)["ingest"]) == 1  # type: ignore[arg-type]


def test_a_session_that_cannot_begin_leaves_no_file_behind(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("cachedb.content.session.OpenFolder", fail)
        with pytest.raises(StorageError, match="cannot begin a session"):
            cache.add_blob(b"data")
    assert os.listdir(cache.directory / "ingest") == []
    assert [name for name in os.listdir(cache.directory / "locks") if name.endswith(".session")] == []
    cache.add_blob(b"data")


def test_threads_of_one_cache_share_its_session(cache: Cache) -> None:
    together = threading.Barrier(16)
    found = []

    def begin() -> None:
        together.wait()
        found.append(cache._session.id)

    threads = [threading.Thread(target=begin) for _ in range(together.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    assert len(set(found)) == 1


@pytest.mark.slow
def test_a_childs_exit_keeps_the_session_and_the_holds_of_its_parent(directory: Path) -> None:
    output = run_python(
        """
        import os, sys
        from cachedb import Cache

        with Cache.open(sys.argv[1]) as cache:
            digest = cache.add_blob(b"data")
            with cache.hold(digest):
                child = os.fork()
            if child == 0:
                theirs = cache.add_blob(b"child")
                assert cache._session.folder.is_dir()
                print(cache._session.id, flush=True)
                cache.close()
                sys.exit()
            assert os.waitpid(child, 0)[1] == 0
            print(cache._session.id)
            with Cache.open(sys.argv[1]) as other:
                assert other.collect_garbage().blobs == 1  # the child's
                assert cache.has_blob(digest)
                assert cache._session.folder.is_dir()
        """,
        directory,
    )
    first, second = output.split()
    assert first != second
    assert traces(directory) == {"leases": [], "ingest": [], "locks": ["write.lock", "write.queue"]}


@pytest.mark.slow
def test_a_child_that_leaves_a_hold_keeps_its_parents_leases(directory: Path) -> None:
    output = run_python(
        """
        import os, sys
        from cachedb import Cache

        cache = Cache.open(sys.argv[1])
        with Cache.open(sys.argv[1]) as first:
            digest = first.add_blob(b"data")
            with cache.hold(digest):
                first.close()
                child = os.fork()
                if child:
                    assert os.waitpid(child, 0)[1] == 0
                    assert cache.collect_garbage().blobs == 0
            if child == 0:
                os._exit(0)
            assert cache.collect_garbage().blobs == 1
        cache.close()
        print("done")
        """,
        directory,
    )
    assert output == "done\n"


@pytest.mark.slow
def test_a_session_ends_with_its_process_though_a_child_lives(directory: Path) -> None:
    script = """
        import os, sys, time
        from cachedb import Cache
        cache = Cache.open(sys.argv[1])
        cache.add_blob(b"data")
        if os.fork() == 0:
            print("child", flush=True)
            sys.stdin.read()
            os._exit(0)
        time.sleep(60)
    """
    with running(script, directory) as parent:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        with Cache.open(directory) as cache:
            assert traces(directory) == {"leases": [], "ingest": [], "locks": ["write.lock", "write.queue"]}
            with closing(Database(directory)) as index:
                assert [part.blobs for part in collect.collect(index)] == [1]
            assert not cache.has_blob(DIGEST)


def test_a_session_works_in_the_folder_that_it_has_opened(directory: Path, tmp_path: Path) -> None:
    """A user who shares the cache can put a symbolic link in the folder's place."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
        folder = cache._session.folder
        for number in range(1, 30):
            for digest in image(2).blobs:
                (elsewhere / f"{number}.{digest.replace(':', '-')}").write_bytes(b"mine")
            (elsewhere / f"{number}").write_bytes(b"mine")
        before = content(elsewhere)
        folder.rename(tmp_path / "moved")
        folder.symlink_to(elsewhere)
        save(cache, "app:2", image(2))
        assert content(elsewhere) == before
        assert os.listdir(tmp_path / "moved") == []
    assert content(elsewhere) == before
    with Cache.open(directory) as cache:
        assert {str(found.name) for found in cache.list_manifests() if found.complete} == {"app:1", "app:2"}


@pytest.mark.parametrize("is_link", [True, False])
def test_the_folder_of_a_new_index_is_in_our_own_folder(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_link: bool
) -> None:
    with Cache.open(directory) as cache:
        folder = cache._session.folder
        monkeypatch.setattr(cache._session, "new_path", lambda: folder / "1")  # as if somebody could guess the name
        folder.rename(tmp_path / "moved")
        other = tmp_path / "other" if is_link else folder
        (other / "1").mkdir(parents=True)
        if is_link:
            folder.symlink_to(other)
        with pytest.raises(NotOurs, match=r"is a symbolic link|was replaced by another folder"):
            cache._session.new_folder()
        assert set(content(other).values()) == {None}, "the session wrote to the other folder"
        (folder.unlink if is_link else lambda: shutil.rmtree(folder))()
        (tmp_path / "moved").rename(folder)
