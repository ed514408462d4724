"""Garbage collection: it deletes unreferenced blobs only, in an order that survives a crash at any point."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, select

from cachedb import Cache, DamagedIndex, Name, StorageError
from cachedb.content import collect
from cachedb.disk.layout import blob_path, trash_name
from cachedb.index import blobs
from cachedb.index.sqlite.database import Database
from cachedb.index.tables import BLOBS
from cachedb.oci.digests import Digest
from tests.conftest import files_of, running, snapshot, stored_rows
from tests.content.test_session import LIVING
from tests.disk.test_locks import is_free
from tests.support.interrupts import interrupts
from tests.support.make import digest_of, image, oci_files, save, write


def abandon(cache: Cache, *contents: bytes) -> None:
    """Store blobs that no image references and no session leases."""
    with Cache.open(cache.directory) as other:
        for data in contents:
            other.add_blob(data)


def test_only_unreferenced_blobs_are_collected(cache: Cache) -> None:
    kept = image(1, 2)
    save(cache, "kept", kept)
    attached, mine = cache.add_blob(b"attached"), cache.add_blob(b"in work")
    cache.associate_blob_with_image("kept", attached)
    abandon(cache, b"unreferenced", b"unreferenced too")
    assert cache.collect_garbage() == (2, len(b"unreferenced" + b"unreferenced too"))
    assert files_of(cache.directory).keys() == {*kept.blobs, attached, mine}
    assert files_of(cache.directory) == stored_rows(cache.directory)
    assert cache.collect_garbage() == (0, 0)


def test_rows_of_blobs_that_were_never_stored_are_deleted(cache: Cache) -> None:
    cache.save_manifest("app", image(1).manifest)
    assert cache.remove_manifest("app").blobs == 1
    assert snapshot(cache.directory)["blobs"] == []


@pytest.mark.parametrize("how", ["collect", "remove"])
def test_a_dry_run_returns_what_a_real_run_deletes_and_deletes_nothing(cache: Cache, how: str) -> None:
    save(cache, "kept", image(1, 2))
    save(cache, "gone", image(2, 3))
    cache.save_manifest("moved", image(4).manifest)  # references blobs that are never stored
    cache.save_manifest("moved", image(5).manifest)
    cache.add_blob(b"in work")
    abandon(cache, b"unreferenced")

    def run(dry_run: bool) -> tuple[int, int]:
        if how == "remove":
            return cache.remove_manifest("gone", dry_run=dry_run)
        return cache.collect_garbage(dry_run=dry_run)

    before, files = snapshot(cache.directory), files_of(cache.directory)
    planned = run(dry_run=True)
    assert snapshot(cache.directory) == before
    assert run(dry_run=False) == planned
    gone = files.items() - files_of(cache.directory).items()
    assert planned == (len(gone), sum(size for _, size in gone))
    assert len(gone) == {"remove": 3, "collect": 2}[how]


def test_a_removal_unlinks_files_if_the_disk_is_too_full_for_a_rename(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as btrfs does if there is no space for metadata

    save(cache, "gone", image(1))
    monkeypatch.setattr(collect, "rename_over", refuse)
    assert cache.remove_manifest("gone").blobs == 3
    assert files_of(cache.directory) == stored_rows(cache.directory) == {}
    assert snapshot(cache.directory)["trash"] == []


def test_a_dry_run_of_a_removal_waits_for_no_writer_and_counts_no_held_blob(cache: Cache) -> None:
    save(cache, "gone", image(1))
    save(cache, "held", image(2))
    cache.add_hold("held")
    with closing(Database(cache.directory)) as index, index.write():
        planned = cache.remove_manifest("gone", "held", dry_run=True)
    assert planned.images == [Name.parse("gone"), Name.parse("held")]
    assert cache.remove_manifest("gone", "held") == planned == (3, sum(map(len, image(1).blobs.values())))


def test_a_collection_and_a_removal_keep_the_same_blobs(tmp_path: Path) -> None:
    left = []
    for how in ("collection", "removal"):
        with Cache.open(tmp_path / how) as cache:
            save(cache, "kept", image(1, 2))
            save(cache, "gone", image(2, 3))
            cache.add_blob(image(3).layers[0])  # a layer of the removed image, which this session leases again
            if how == "removal":
                cache.remove_manifest("gone")
            else:
                with closing(Database(cache.directory)) as index, index.write() as connection:
                    connection.exec_driver_sql("DELETE FROM images WHERE repository = 'gone'")
                cache.collect_garbage()
            left.append(files_of(cache.directory))
    assert left[0] == left[1]
    assert digest_of(image(3).layers[0]) in left[0]


@pytest.mark.slow
def test_blobs_leased_by_a_live_process_are_kept_until_it_dies(cache: Cache) -> None:
    digest = digest_of(b"data")
    with running(LIVING, cache.directory) as process:
        assert cache.collect_garbage() == (0, 0)
        assert cache.get_blob(digest) == b"data"
        process.kill()
        process.wait()
    assert cache.collect_garbage() == (1, 4)
    assert files_of(cache.directory) == {}


def test_a_blob_that_an_image_references_after_the_search_is_kept(
    cache: Cache, index: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = image(1)
    abandon(cache, b"unreferenced", *kept.blobs.values())
    forget = collect.delete_unreferenced
    happened: list[object] = []

    def forget_and_note(connection: Connection, ids: list[int]) -> collect.Collected:
        happened.append(forget(connection, ids))
        return happened[-1]  # type: ignore[return-value]

    write_ = Database.write

    def save_then_write(self: Database) -> object:
        if self is index and not happened:
            happened.append("saved")
            cache.save_manifest("app", kept.manifest)
        return write_(self)

    monkeypatch.setattr(Database, "write", save_then_write)
    monkeypatch.setattr(collect, "delete_unreferenced", forget_and_note)
    assert list(collect.collect(index)) == [(1, len(b"unreferenced"))]
    assert cache.is_image_complete("app")
    assert files_of(cache.directory).keys() == kept.blobs.keys()


def test_a_blob_is_forgotten_then_moved_then_unlinked(
    cache: Cache, index: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandon(cache, b"unreferenced")
    happened: list[str] = []
    at_commit: list[list[int]] = []

    def note_calls(name: str) -> None:
        call: Callable[..., object] = getattr(os, name)

        def replacement(path: object, *arguments: object, **options: int) -> object:
            folder = os.readlink(f"/proc/self/fd/{options.get('src_dir_fd', options.get('dir_fd'))}")
            happened.append(f"{name} {Path(folder).relative_to(cache.directory).parts[0]}")
            return call(path, *arguments, **options)

        monkeypatch.setattr(os, name, replacement)

    def note_commit(connection: Connection) -> None:
        if connection.get_execution_options().get("cachedb_begin"):
            count = connection.exec_driver_sql
            at_commit.append([len(count(f"SELECT 1 FROM {table}").all()) for table in ("blobs", "trash")])
            happened.append("commit")

    note_calls("rename")
    note_calls("unlink")

    def sync(descriptor: int) -> None:
        happened.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", sync)
    event.listen(Engine, "commit", note_commit)
    try:
        list(collect.collect(index))
    finally:
        event.remove(Engine, "commit", note_commit)
        monkeypatch.undo()  # pytest deletes the folder
    assert happened == ["commit", "rename blobs", "sync sha256", "commit", "unlink trash"]
    assert at_commit == [[0, 1], [0, 0]]


@pytest.mark.slow
def test_files_are_moved_under_the_lock_and_unlinked_outside_it(
    cache: Cache, index: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandon(cache, b"unreferenced")
    free: dict[str, bool] = {}
    for name in ("rename", "unlink"):
        call = getattr(os, name)

        def replacement(
            path: object, *arguments: object, name: str = name, call: Callable[..., object] = call, **options: object
        ) -> object:
            free[name] = is_free(cache.directory / "locks" / "write.lock")
            return call(path, *arguments, **options)

        monkeypatch.setattr(os, name, replacement)
    list(collect.collect(index))
    assert free == {"rename": False, "unlink": True}


def test_a_collection_with_slow_renames_releases_the_write_lock_between_them(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandon(cache, b"one", b"two", b"three")
    monkeypatch.setattr(collect, "_RENAME_SECONDS", 0)
    turns: list[str] = []
    under_lock = Database._under_lock

    def count_turns(self: Database, *arguments: Any) -> object:
        turns.append("turn")
        return under_lock(self, *arguments)

    monkeypatch.setattr(Database, "_under_lock", count_turns)
    assert cache.collect_garbage() == (3, 11)
    assert len(turns) == 1 + 3
    assert files_of(cache.directory) == {}
    assert snapshot(cache.directory)["trash"] == []


def test_several_threads_empty_a_full_trash_and_errors_are_reported(
    cache: Cache, index: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {f"sha256-{number:064x}" for number in range(200)}
    for name in names:
        (cache.directory / "trash" / name).touch()
    unlink, threads, meeting = os.unlink, set[int](), threading.Barrier(collect._UNLINK_THREADS, timeout=60)

    def refuse_one(path: str, *, dir_fd: int | None = None) -> None:
        if threading.get_ident() not in threads and len(threads) < collect._UNLINK_THREADS:
            threads.add(threading.get_ident())
            meeting.wait()  # every thread has begun before one finishes
        if path.endswith("77"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        unlink(path, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse_one)
        left = collect.empty_trash(index)
        assert [(path.name, reason[:17]) for path, reason in left] == [(f"sha256-{0x77:064x}", "Permission denied")]
        with pytest.raises(StorageError, match=r"collected all garbage, but cannot unlink '.*77': Permission denied"):
            cache.collect_garbage()
    assert len(threads) == collect._UNLINK_THREADS > 1
    assert collect.empty_trash(index) == []
    assert os.listdir(cache.directory / "trash") == []


def test_a_failure_in_a_thread_that_unlinks_reaches_the_caller(
    cache: Cache, index: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(200):
        (cache.directory / "trash" / f"sha256-{number:064x}").touch()

    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no memory for the name")

    monkeypatch.setattr(os, "unlink", fail)
    with pytest.raises(MemoryError, match="no memory for the name"):
        collect.empty_trash(index)
    monkeypatch.undo()  # pytest deletes the folder


def test_an_interrupt_leaves_no_thread_that_unlinks(
    cache: Cache, index: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    trash, unlink = cache.directory / "trash", os.unlink
    for number in range(200):
        (trash / f"sha256-{number:064x}").touch()

    def interrupt(path: str, *, dir_fd: int | None = None) -> None:
        if first.acquire(blocking=False):
            sent.send()
        unlink(path, dir_fd=dir_fd)

    first = threading.Lock()
    monkeypatch.setattr(os, "unlink", interrupt)
    with interrupts() as sent, pytest.raises(KeyboardInterrupt):
        collect.empty_trash(index)
    assert sent.outlived == [False]


def test_a_collection_frees_the_files_of_a_batch_before_the_next(cache: Cache, index: Database) -> None:
    abandon(cache, *(b"%03d" % number for number in range(10)))
    trash = cache.directory / "trash"
    left = [(len(files_of(cache.directory)), len(os.listdir(trash))) for _ in collect.collect(index, batch=3)]
    assert left == [(10, 0), (7, 0), (4, 0), (1, 0)]
    assert files_of(cache.directory) == {}


def test_a_leased_blob_is_no_candidate_for_collection(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.add_blob(b"in work")
    monkeypatch.setattr(collect, "delete_unreferenced", lambda *_: pytest.fail("a blob was forgotten"))
    assert cache.collect_garbage() == (0, 0)


def test_the_next_collection_finishes_an_interrupted_one(
    cache: Cache, index: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandon(cache, b"one", b"two")

    def fail(*_: object, **__: object) -> None:
        raise StorageError("interrupted")

    for step in ("rename", "unlink"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, fail)
            with pytest.raises(StorageError, match="interrupted"):
                cache.collect_garbage()
        assert stored_rows(cache.directory) == {}
    assert files_of(cache.directory) == {}
    assert len(os.listdir(cache.directory / "trash")) == 2
    cache.collect_garbage()
    assert os.listdir(cache.directory / "trash") == []


def test_the_next_open_empties_the_trash_of_a_dead_session(cache: Cache, index: Database) -> None:
    abandon(cache, b"unreferenced")
    with index.write() as connection:
        ids = connection.execute(select(BLOBS.c.id)).scalars().all()
        assert collect.delete_unreferenced(connection, ids) == (1, len(b"unreferenced"))
    (cache.directory / "ingest" / "1-00000000dead").mkdir()
    Cache.open(cache.directory).close()
    assert files_of(cache.directory) == {}
    assert os.listdir(cache.directory / "trash") == snapshot(cache.directory)["trash"] == []


def test_many_blobs_are_collected_in_batches(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "BATCH", 3)
    abandon(cache, *(b"%03d" % number for number in range(10)))
    save(cache, "kept", image(1))
    assert cache.collect_garbage() == (10, 30)
    assert files_of(cache.directory) == stored_rows(cache.directory)
    assert files_of(cache.directory).keys() == image(1).blobs.keys()


@pytest.mark.slow
def test_concurrent_imports_removals_and_collections_leave_nothing(cache: Cache, tmp_path: Path) -> None:
    source = write(tmp_path / "app.tar", oci_files({"app:1": image(1, 2)}))
    stop = threading.Event()
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with Cache.open(cache.directory) as own:
                for _ in range(6):
                    own.cache_from_tar(source, f"app-{number}:1")
                    with own.hold(f"app-{number}:1"):
                        own.remove_manifest(f"app-{number}:1")
                        for digest, data in image(1, 2).blobs.items():
                            assert own.get_blob_path(digest).read_bytes() == data
        except BaseException as error:
            failures.append(error)

    def collect_until_stopped() -> None:
        try:
            with Cache.open(cache.directory) as own:
                while not stop.is_set():
                    own.collect_garbage()
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    collector = threading.Thread(target=collect_until_stopped)
    for thread in (*workers, collector):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    collector.join()
    assert failures == []
    cache.collect_garbage()
    left = snapshot(cache.directory)
    assert left == {name: type(left[name])() for name in left} | {"locks": ["write.lock", "write.queue"]}


# Cost


def explain_statements(index: Database, act: Callable[[Connection], object]) -> list[str]:
    """Return the steps of SQLite's query plans for the statements that `act` executes."""
    statements: list[tuple[str, object]] = []

    def note_query(_c: object, _cursor: object, statement: str, parameters: object, _x: object, _many: bool) -> None:
        statements.append((statement, parameters))

    with index.read() as connection:
        event.listen(connection, "before_cursor_execute", note_query)
        try:
            act(connection)
        finally:
            event.remove(connection, "before_cursor_execute", note_query)
        steps = []
        for statement, parameters in statements:
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)  # type: ignore[arg-type]
            steps += [str(row[3]) for row in rows]
        connection.rollback()
    return steps


def test_forgetting_blobs_of_an_image_reads_only_their_rows(cache: Cache, index: Database) -> None:
    cache.add_blob(b"data")
    steps = explain_statements(index, lambda connection: collect.delete_unreferenced(connection, [1, 2, 3]))
    assert any("image_blobs USING COVERING INDEX ix_image_blobs_blob_id (blob_id=?)" in step for step in steps)
    assert any("leases USING PRIMARY KEY (digest=?)" in step for step in steps)
    assert any("blobs USING INTEGER PRIMARY KEY (rowid=?)" in step for step in steps)
    assert not [step for step in steps if "SCAN" in step]


def test_candidates_and_their_sum_are_found_in_one_pass_over_two_indexes(index: Database) -> None:
    found = explain_statements(index, lambda connection: connection.execute(collect._select_candidates()))
    added_up = explain_statements(index, collect.sum_unreferenced)
    for steps in (found, added_up):
        assert steps.count("MERGE (EXCEPT)") == 2
        scans = [step for step in steps if "SCAN" in step and "leases" not in step and "anon" not in step]
        assert scans == ["SCAN blobs", "SCAN image_blobs USING COVERING INDEX ix_image_blobs_blob_id"]
        assert not [step for step in steps if "TEMP B-TREE" in step and "ORDER BY" not in step]


def test_deleting_leases_and_looking_up_stored_blobs_use_indexes(index: Database) -> None:
    steps = explain_statements(
        index, lambda connection: blobs.read_stored_sizes(connection, [Digest(digest_of(b"data"))])
    )
    assert not [step for step in steps if "SCAN" in step]
    delete = "DELETE FROM leases WHERE session = 'x' AND hold = 1"
    steps = explain_statements(index, lambda connection: connection.exec_driver_sql(delete))
    assert not [step for step in steps if "SCAN" in step]


def test_foreign_key_checks_use_indexes(index: Database) -> None:
    """SQLite shows no foreign key check in a query plan; without these indexes it would scan whole tables."""
    with index.read() as connection:
        for table, column in (("image_blobs", "blob_id"), ("images", "manifest_id"), ("image_blobs", "image_id")):
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN SELECT 1 FROM {table} WHERE {column} = 1").all()
            assert "SCAN" not in plan[0][3]


@pytest.mark.parametrize("table", ["trash", "blobs"])
def test_an_index_that_names_a_path_moves_no_other_file(cache: Cache, table: str, tmp_path: Path) -> None:
    victim = cache.directory.parent / "victim.txt"
    victim.write_text("precious")
    # A digest becomes a path in `blobs/`: its first colon, or every colon, becomes a slash.
    paths = ["..:..:victim.txt", "..:cachedb.json"]
    marker = (cache.directory / "cachedb.json").read_bytes()
    connection = sqlite3.connect(cache.directory / "index.db", isolation_level=None)
    connection.execute("PRAGMA ignore_check_constraints = 1")
    stored_at = "'2026-01-01T00:00:00.000000Z'"
    columns, values = (
        ("digest, size", "?, 8") if table == "trash" else ("digest, size, stored_at", f"?, 8, {stored_at}")
    )
    connection.executemany(f"INSERT INTO {table} ({columns}) VALUES ({values})", [(path,) for path in paths])
    connection.close()
    cache.collect_garbage()
    assert (cache.directory / "cachedb.json").read_bytes() == marker
    with Cache.open(cache.directory) as other:
        assert other.verify(repair=True).problems == []
    assert victim.read_text() == "precious"


def test_an_index_that_names_a_path_is_damaged(cache: Cache, tmp_path: Path) -> None:
    (cache.directory.parent / "victim.txt").write_text("precious")
    words = r"its digest '\.\.:\.\.:victim\.txt' is invalid: run `cachedb verify --repair`"
    with pytest.raises(DamagedIndex, match=words):
        blob_path(cache.directory, Digest("..:..:victim.txt"))


def test_a_folder_in_the_place_of_a_file_in_the_trash_is_set_aside(cache: Cache) -> None:
    abandon(cache, b"unreferenced")
    names = [trash_name(Digest(digest_of(data))) for data in (b"unreferenced", b"another")]
    for name in names:
        (cache.directory / "trash" / name / "deep").mkdir(parents=True)
    assert cache.collect_garbage() == (1, len(b"unreferenced"))
    assert files_of(cache.directory) == {}
    left = sorted(path.name.partition(".")[0] for path in (cache.directory / "trash").iterdir())
    assert left == sorted(names)
    assert {problem.kind for problem in cache.verify().problems} == {"orphan"}


def test_a_file_that_cannot_be_moved_to_the_trash_blocks_no_other_work(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be immutable, or another user's in a sticky folder."""
    save(cache, "app:1", image(1))
    immovable = [b"one", b"two", b"three"]
    abandon(cache, *immovable, b"movable")
    paths = {blob_path(cache.directory, Digest(digest_of(data))) for data in immovable}

    def rename_over(name: str, folder: int, new_name: str, new_folder: int) -> None:
        if name in {path.name for path in paths}:
            raise PermissionError(errno.EPERM, "Operation not permitted", name)
        os.rename(name, new_name, src_dir_fd=folder, dst_dir_fd=new_folder)

    monkeypatch.setattr(collect, "BATCH", 2)
    with monkeypatch.context() as patch:
        patch.setattr(collect, "rename_over", rename_over)
        with pytest.raises(StorageError, match=r"collected all garbage, but cannot unlink '.*/blobs/sha256/"):
            cache.collect_garbage()
        with pytest.raises(StorageError, match=r"collected all garbage, but cannot unlink '.*/blobs/sha256/"):
            cache.collect_garbage()  # it deletes no rows
        with Cache.open(cache.directory) as other:
            assert {left.path for left in other.get_leftovers()} == paths
            other.tag("app:1", "app:2")
            assert {problem.path for problem in other.verify().problems} == paths
    assert all(path.exists() for path in paths)
    cache.collect_garbage()
    assert cache.verify().problems == []
    assert not any(path.exists() for path in paths)


def test_a_full_disk_while_files_are_moved_to_the_trash_is_an_error(
    cache: Cache, index: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the reserve would not be given up."""
    abandon(cache, b"unreferenced")

    def fail(name: str, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", name)

    monkeypatch.setattr(collect, "rename_over", fail)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", fail)
        with pytest.raises(StorageError) as caught:
            list(collect.collect(index))
    assert caught.value.errno == errno.ENOSPC
