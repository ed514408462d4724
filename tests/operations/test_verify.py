"""Verification finds every problem and reports no false one; a repair loses no intact blob."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cachedb import Cache, CacheError
from cachedb.disk import hashes
from cachedb.disk.layout import OLDEST, REVISION, blob_path
from cachedb.errors import Busy, DamagedIndex, SchemaMismatch, StorageError
from cachedb.index import blobs
from cachedb.index.sqlite.database import Database
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import OCI_INDEX, OCI_MANIFEST
from cachedb.operations import verify
from cachedb.operations.repair import _mark_missing
from cachedb.operations.verify import KINDS, Problem
from tests.conftest import Run, files_of, running, snapshot, stored_rows
from tests.operations.test_upgrade import unpack_frozen_cache
from tests.support import make
from tests.support.index_file import change_index, read_rows
from tests.support.make import ImageContent, digest_of, hex_of, image, save
from tests.support.promises import check

APP, OTHER = image(1, 2), image(2, 3)
CHILDREN = (image(11), image(12, architecture="arm64"))
MANY = make.index(*CHILDREN)
LAYER = digest_of(APP.layers[0])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a cache with two images that share a layer, and an image index of two platforms."""
    directory = tmp_path_factory.mktemp("prepared") / "cache"
    with Cache.open(directory) as cache:
        save(cache, "app:1", APP)
        save(cache, "other:1", OTHER)
        make.save_index(cache, "many:1", *CHILDREN)
    return directory


@pytest.fixture
def cache(prepared: Path, directory: Path) -> Iterator[Cache]:
    shutil.copytree(prepared, directory)
    with Cache.open(directory) as opened:
        yield opened


def find_blob(cache: Cache, digest: str) -> Path:
    return blob_path(cache.directory, Digest(digest))


def overwrite(path: Path, data: bytes) -> None:
    """Write to a file in place, even if it is read-only."""
    if path.exists():
        path.chmod(0o644)
    path.write_bytes(data)


def alter(cache: Cache, digest: str) -> bytes:
    """Change a byte of a blob; return the new content of its file."""
    data = bytearray(find_blob(cache, digest).read_bytes())
    data[len(data) // 2] ^= 1
    overwrite(find_blob(cache, digest), bytes(data))
    return bytes(data)


def truncate(cache: Cache, digest: str) -> None:
    overwrite(find_blob(cache, digest), find_blob(cache, digest).read_bytes()[:-1])


def add_orphan(cache: Cache, data: bytes, content: bytes | None = None) -> str:
    """Write a file at the path of the blob of `data`, without a row in the index."""
    find_blob(cache, digest_of(data)).write_bytes(data if content is None else content)
    return digest_of(data)


def execute(directory: Path, *statements: str) -> None:
    """Execute SQL statements with foreign keys off, as a SQL shell does."""
    connection = sqlite3.connect(directory / "index.db")
    with connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def kinds(problems: list[Problem]) -> list[tuple[str, str | None]]:
    return [(problem.kind, problem.digest) for problem in problems]


def read_quarantine(cache: Cache) -> dict[str, bytes]:
    folder = cache.directory / "quarantine"
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def close_and_check(cache: Cache) -> None:
    """End the session, and check the promises of the cache."""
    cache.close()
    check(cache.directory)


def select_id(cache: Cache, name: str) -> str:
    return f"(SELECT id FROM images WHERE repository = '{name}')"


# Sound caches


@pytest.mark.parametrize("quick", [False, True])
def test_a_sound_cache_has_no_problems_and_every_file_is_checked(cache: Cache, quick: bool) -> None:
    assert cache.verify(quick=quick) == (len(files_of(cache.directory)), [])


def test_an_empty_cache_has_nothing_to_check(tmp_path: Path) -> None:
    with Cache.open(tmp_path / "empty") as cache:
        assert cache.verify() == (0, [])
        assert cache.verify(quick=True, repair=True) == (0, [])


def test_repair_of_a_sound_cache_changes_nothing(cache: Cache) -> None:
    before = snapshot(cache.directory)
    assert cache.verify(repair=True).problems == []
    after = snapshot(cache.directory)
    assert after == before
    assert not (cache.directory / "quarantine").exists()


def test_incomplete_images_and_attached_blobs_are_no_problem(cache: Cache) -> None:
    cache.save_manifest("incomplete:1", image(7).manifest)
    cache.associate_blob_with_image("app:1", cache.add_blob(b"a signature"), role="other")
    cache.tag("app:1", "second:1")
    cache.add_hold("app:1")
    assert cache.verify().problems == []


def test_every_byte_is_read_and_progress_reaches_the_total(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "CHUNK_BYTES", 100)
    seen: list[tuple[int, int]] = []
    cache.verify(progress=lambda done, total: seen.append((done, total)))
    total = sum(files_of(cache.directory).values())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    assert len(seen) > total // 100


def test_a_quick_verification_reads_no_file(cache: Cache) -> None:
    seen: list[tuple[int, int]] = []
    cache.verify(quick=True, progress=lambda done, total: seen.append((done, total)))
    assert seen == []


def test_an_interrupt_stops_the_verification_soon(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "CHUNK_BYTES", 1000)
    cache.add_blob(make.random_bytes(2_000_000, 1))
    is_interrupted, seen = threading.Event(), list[tuple[int, int]]()

    def interrupt(_number: int, _frame: object) -> None:
        is_interrupted.set()
        raise KeyboardInterrupt

    def wait_and_note(done: int, total: int) -> None:
        seen.append((done, total))
        if len(seen) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        assert is_interrupted.wait(60)
        time.sleep(0.001)

    ignored = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            cache.verify(progress=wait_and_note)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert seen[-1][0] < seen[-1][1] / 2
    assert cache.verify().problems == []


# Problems that are found


def test_the_kinds_of_problems_are_as_documented() -> None:
    assert KINDS == ("missing", "corrupt", "wrong_size", "orphan", "index")


@pytest.mark.parametrize("quick", [False, True])
def test_a_missing_file_is_found(cache: Cache, quick: bool) -> None:
    find_blob(cache, LAYER).unlink()
    (problem,) = cache.verify(quick=quick).problems
    assert problem[:3] == ("missing", LAYER, find_blob(cache, LAYER))
    assert problem.repair is None


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("content", [b"", b"x", APP.layers[0] + b"\0"])
def test_a_file_of_another_size_is_found(cache: Cache, quick: bool, content: bytes) -> None:
    overwrite(find_blob(cache, LAYER), content)
    (problem,) = cache.verify(quick=quick).problems
    assert problem[:3] == ("wrong_size", LAYER, find_blob(cache, LAYER))
    assert str(len(content)) in problem.detail


@pytest.mark.parametrize("quick", [False, True])
def test_a_file_without_a_row_is_found(cache: Cache, quick: bool) -> None:
    digest = add_orphan(cache, b"without a row")
    (problem,) = cache.verify(quick=quick).problems
    assert problem[:3] == ("orphan", digest, find_blob(cache, digest))


def test_a_quick_verification_does_not_find_altered_bytes(cache: Cache) -> None:
    altered = alter(cache, LAYER)
    assert cache.verify(quick=True).problems == []
    (problem,) = cache.verify().problems
    assert problem[:3] == ("corrupt", LAYER, find_blob(cache, LAYER))
    assert digest_of(altered) in problem.detail


def test_a_sha512_blob_is_verified(cache: Cache) -> None:
    digest = cache.add_blob(b"some data", algorithm="sha512")
    assert cache.verify().problems == []
    alter(cache, digest)
    assert kinds(cache.verify().problems) == [("corrupt", digest)]


def test_a_row_of_another_size_is_found(cache: Cache) -> None:
    execute(cache.directory, f"UPDATE blobs SET size = 3 WHERE digest = '{LAYER}'")
    assert ("wrong_size", LAYER) in kinds(cache.verify(quick=True).problems)


def test_each_problem_is_reported_once(cache: Cache) -> None:
    gone, cut, altered = digest_of(APP.layers[1]), digest_of(OTHER.layers[1]), LAYER
    find_blob(cache, gone).unlink()
    truncate(cache, cut)
    alter(cache, altered)
    orphan = add_orphan(cache, b"orphan")
    found = kinds(cache.verify().problems)
    assert sorted(found) == sorted([("missing", gone), ("wrong_size", cut), ("corrupt", altered), ("orphan", orphan)])


@pytest.mark.parametrize("quick", [False, True])
def test_without_repair_nothing_is_changed(cache: Cache, quick: bool) -> None:
    find_blob(cache, digest_of(APP.layers[1])).unlink()
    truncate(cache, digest_of(OTHER.layers[1]))
    alter(cache, LAYER)
    add_orphan(cache, b"orphan")
    add_orphan(cache, b"another", b"not that")
    (cache.directory / "blobs" / "sha256" / "stray").write_bytes(b"")
    execute(cache.directory, f"DELETE FROM image_blobs WHERE image_id = {select_id(cache, 'many')} AND position = 2")
    before = snapshot_with_files(cache)
    assert cache.verify(quick=quick).problems
    assert snapshot_with_files(cache) == before


def snapshot_with_files(cache: Cache) -> tuple[object, ...]:
    content = {path: path.read_bytes() for path in sorted((cache.directory / "blobs").rglob("*")) if path.is_file()}
    return {**snapshot(cache.directory), "files": 0}, content, (cache.directory / "quarantine").exists()


@pytest.mark.parametrize("fails", ["open", "read"])
@pytest.mark.parametrize("which", ["layer", "manifest"])
def test_a_file_that_cannot_be_read_is_reported_and_the_others_are_checked(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, fails: str, which: str
) -> None:
    digest = {"layer": LAYER, "manifest": APP.digest}[which]
    altered = digest_of(OTHER.layers[1])
    alter(cache, altered)
    with monkeypatch.context() as patch:
        fail_reading(patch, find_blob(cache, digest), fails)
        found = cache.verify().problems
        assert sorted(kinds(found)) == sorted([("corrupt", digest), ("corrupt", altered)])
        assert next(problem for problem in found if problem.digest == digest).detail.startswith(
            "the file cannot be read"
        )
        assert all(problem.repair for problem in cache.verify(repair=True).problems)
    assert not cache.is_image_complete("app:1")
    assert read_quarantine(cache)[digest.replace(":", "-")] == APP.blobs[digest]
    close_and_check(cache)


def fail_reading(patch: pytest.MonkeyPatch, path: Path, fails: str, code: int = errno.EIO) -> None:
    class Failing(io.FileIO):
        def readinto(self, buffer: Any, /) -> int:
            raise OSError(code, os.strerror(code))

        def readall(self) -> bytes:
            raise OSError(code, os.strerror(code))

        read = readall  # type: ignore[assignment]

    def open_failing(file: Path, *arguments: Any, **options: Any) -> Any:
        if file != path:
            return open(file, *arguments, **options)
        if fails == "open":
            raise OSError(code, os.strerror(code), str(path))
        return Failing(path)

    patch.setattr(hashes, "open", open_failing, raising=False)


def test_a_limit_of_the_process_is_not_reported_as_a_damaged_file(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(cache.directory)
    with monkeypatch.context() as patch:
        fail_reading(patch, find_blob(cache, LAYER), "open", errno.EMFILE)
        with pytest.raises(StorageError, match="ulimit"):
            cache.verify(repair=True)
    assert files_of(cache.directory) == before
    assert cache.verify().problems == []


# Concurrent changes


WORKING = """
import sys
from cachedb import Cache
from tests.support.make import image

with Cache.open(sys.argv[1]) as cache:
    number = 0
    while True:
        made = image(100 + number % 3, 200 + number % 2)
        for digest, data in made.blobs.items():
            cache.save_blob(digest, data)
        cache.save_manifest("busy:1", made.manifest)
        cache.add_blob(b"%d" % number)
        cache.remove_manifest("busy:1")
        cache.collect_garbage()
        if number == 0:
            print(flush=True)
        number += 1
"""


@pytest.mark.slow
def test_concurrent_changes_are_never_reported_as_problems(cache: Cache) -> None:
    with running(WORKING, cache.directory):
        end, runs = time.monotonic() + 0.8, 0
        while time.monotonic() < end or runs <= 3:
            assert cache.verify(quick=runs % 2 == 1, repair=runs % 4 > 1).problems == []
            runs += 1
    close_and_check(cache)


def run_before_settling(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    settle = verify._check_again

    def work_and_settle(*arguments: Any, **options: Any) -> object:
        work()
        return settle(*arguments, **options)

    monkeypatch.setattr(verify, "_check_again", work_and_settle)


@pytest.mark.parametrize("repair", [False, True])
def test_a_file_that_is_being_published_is_no_orphan(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, repair: bool
) -> None:
    is_linked, is_verifying = threading.Event(), threading.Event()
    set_stored = blobs.set_stored

    def wait_and_store(*arguments: Any) -> None:
        is_linked.set()
        assert is_verifying.wait(60)
        set_stored(*arguments)

    with monkeypatch.context() as patch, Cache.open(cache.directory) as other:
        patch.setattr("cachedb.content.publish.set_stored", wait_and_store)
        run_before_settling(patch, is_verifying.set)
        thread = threading.Thread(target=other.add_blob, args=[b"on its way"])
        thread.start()
        assert is_linked.wait(60)
        assert find_blob(cache, digest_of(b"on its way")).exists()
        assert cache.verify(repair=repair).problems == []
        thread.join()
        assert is_verifying.is_set()
        assert other.get_blob(digest_of(b"on its way")) == b"on its way"


@pytest.mark.parametrize("repair", [False, True])
def test_a_file_of_a_killed_publication_is_left_to_the_next_open(cache: Cache, repair: bool) -> None:
    folder = cache.directory / "ingest" / "1-abcdefabcdef"
    folder.mkdir()
    (cache.directory / "locks" / "1-abcdefabcdef.session").touch()
    published = folder / f"2.{digest_of(b'half').replace(':', '-')}"
    published.write_bytes(b"half")
    os.link(published, find_blob(cache, digest_of(b"half")))
    assert cache.verify(repair=repair).problems == []
    assert find_blob(cache, digest_of(b"half")).exists()
    Cache.open(cache.directory).close()
    assert not find_blob(cache, digest_of(b"half")).exists()
    close_and_check(cache)


@pytest.mark.parametrize("repair", [False, True])
def test_the_file_of_a_blob_in_the_trash_is_no_orphan(cache: Cache, repair: bool) -> None:
    digest = add_orphan(cache, b"forgotten")
    execute(cache.directory, f"INSERT INTO trash VALUES ('{digest}', 9)")
    assert cache.verify(repair=repair).problems == []
    assert digest not in stored_rows(cache.directory)


@pytest.mark.parametrize("repair", [False, True])
def test_a_file_replaced_after_it_was_read_is_not_reported_as_corrupt(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, repair: bool
) -> None:
    alter(cache, LAYER)
    path = find_blob(cache, LAYER)

    def replace() -> None:
        new = cache.directory / "new"
        new.write_bytes(APP.layers[0])
        new.rename(path)

    run_before_settling(monkeypatch, replace)
    assert cache.verify(repair=repair).problems == []
    assert cache.is_image_complete("app:1")


def test_an_orphan_replaced_after_it_was_read_is_not_adopted(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = add_orphan(cache, b"orphan")

    def replace() -> None:
        new = cache.directory / "new"
        new.write_bytes(b"altered")
        new.rename(find_blob(cache, digest))

    with monkeypatch.context() as patch:
        run_before_settling(patch, replace)
        (problem,) = cache.verify(repair=True).problems
    assert problem[:2] == ("orphan", digest)
    assert problem.repair is None
    assert digest not in stored_rows(cache.directory)
    assert kinds(cache.verify(repair=True).problems) == [("corrupt", digest)]
    assert cache.verify().problems == []


def test_a_damaged_blob_removed_meanwhile_is_no_problem(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    alter(cache, digest_of(OTHER.layers[1]))
    run_before_settling(monkeypatch, lambda: cache.remove_manifest("other:1"))
    assert cache.verify(repair=True).problems == []
    assert read_quarantine(cache) == {}


def test_an_image_that_is_removed_meanwhile_is_no_problem(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    settle = verify._check_images

    def settle_and_remove(*arguments: Any, **options: Any) -> Iterator[Problem]:
        found = settle(*arguments, **options)
        cache.remove_manifest("other:1")
        yield from found

    monkeypatch.setattr(verify, "_check_images", settle_and_remove)
    assert cache.verify(repair=True).problems == []


# Repair of files


def store_by_import(cache: Cache, tmp_path: Path) -> None:
    cache.cache_from_tar(make.write(tmp_path / "app.tar", make.oci_files({"app:1": APP})))


def store_blobs(cache: Cache, _tmp_path: Path) -> None:
    for digest, data in APP.blobs.items():
        cache.save_blob(digest, data)


@pytest.mark.parametrize("store_again", [store_by_import, store_blobs])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["manifest", "config", "layer"])
@pytest.mark.parametrize("kind", ["missing", "wrong_size", "corrupt"])
def test_a_damaged_blob_is_moved_to_quarantine_and_can_be_stored_again(
    cache: Cache, tmp_path: Path, kind: str, which: int, store_again: Callable[[Cache, Path], None]
) -> None:
    digest = list(APP.blobs)[which]
    {"missing": lambda c, d: find_blob(c, d).unlink(), "wrong_size": truncate, "corrupt": alter}[kind](cache, digest)
    damaged = b"" if kind == "missing" else find_blob(cache, digest).read_bytes()
    (problem,) = cache.verify(repair=True).problems
    assert problem[:2] == (kind, digest)
    assert problem.repair
    assert "import or pull it again" in problem.repair
    kept = {} if kind == "missing" else {digest.replace(":", "-"): damaged}
    assert read_quarantine(cache) == kept
    assert digest not in stored_rows(cache.directory)
    assert digest not in files_of(cache.directory)
    assert not cache.has_blob(digest)
    assert not cache.is_image_complete("app:1")
    assert cache.is_image_complete("many:1")
    assert cache.verify().problems == []
    store_again(cache, tmp_path)
    assert cache.is_image_complete("app:1")
    assert cache.get_blob(digest) == APP.blobs[digest]
    assert [blob.digest for blob in cache.get_image_blobs("app:1")] == list(APP.blobs)
    assert read_quarantine(cache) == kept
    close_and_check(cache)


def test_a_quick_repair_handles_missing_truncated_and_orphaned_files(cache: Cache) -> None:
    gone, cut = digest_of(APP.layers[1]), digest_of(OTHER.layers[1])
    find_blob(cache, gone).unlink()
    truncate(cache, cut)
    orphan = add_orphan(cache, b"orphan")
    wrong = add_orphan(cache, b"wrong", b"other")
    found = cache.verify(quick=True, repair=True).problems
    assert sorted(kinds(found)) == sorted(
        [("missing", gone), ("wrong_size", cut), ("orphan", orphan), ("corrupt", wrong)]
    )
    assert all(problem.repair for problem in found)
    assert cache.has_blob(orphan)
    close_and_check(cache)


@pytest.mark.parametrize("quick", [False, True])
def test_an_intact_file_is_kept_though_its_row_has_a_wrong_size(cache: Cache, quick: bool) -> None:
    execute(cache.directory, f"UPDATE blobs SET size = 3 WHERE digest = '{LAYER}'")
    assert ("wrong_size", LAYER) in kinds(cache.verify(quick=quick, repair=True).problems)
    assert cache.is_image_complete("app:1")
    assert read_quarantine(cache) == {}
    assert cache.get_blob_size(LAYER) == len(APP.layers[0])
    assert cache.verify().problems == []


def test_a_corrupt_manifest_is_one_problem(cache: Cache) -> None:
    overwrite(find_blob(cache, APP.digest), b"x" * len(APP.manifest))
    assert kinds(cache.verify().problems) == [("corrupt", APP.digest)]


@pytest.mark.parametrize("kind", ["missing", "corrupt"])
def test_a_damaged_child_of_an_index_is_one_problem_and_can_be_stored_again(cache: Cache, kind: str) -> None:
    child = CHILDREN[0]
    before = cache.get_image_blobs("many:1")
    if kind == "missing":
        find_blob(cache, child.digest).unlink()
    else:
        overwrite(find_blob(cache, child.digest), b"x" * len(child.manifest))
    assert kinds(cache.verify().problems) == [(kind, child.digest)]
    assert kinds(cache.verify(repair=True).problems) == [(kind, child.digest)]
    assert cache.verify().problems == []
    assert not cache.is_image_complete("many:1")
    assert cache.collect_garbage().blobs == 0, "the image lost the blobs of its damaged child"
    cache.save_blob(child.digest, child.manifest)
    assert cache.is_image_complete("many:1")
    assert cache.get_image_blobs("many:1") == before
    close_and_check(cache)


def test_files_in_quarantine_are_never_overwritten(cache: Cache) -> None:
    first = alter(cache, LAYER)
    cache.verify(repair=True)
    cache.save_blob(LAYER, APP.layers[0])
    overwrite(find_blob(cache, LAYER), b"second")
    cache.verify(repair=True)
    cache.save_blob(LAYER, APP.layers[0])
    overwrite(find_blob(cache, LAYER), b"third")
    cache.verify(repair=True)
    name = LAYER.replace(":", "-")
    assert read_quarantine(cache) == {name: first, f"{name}.1": b"second", f"{name}.2": b"third"}


def test_a_damaged_held_blob_is_moved_to_quarantine_and_stays_held(cache: Cache) -> None:
    cache.add_hold("app:1")
    alter(cache, LAYER)
    assert len(cache.verify(repair=True).problems) == 1
    cache.save_blob(LAYER, APP.layers[0])
    cache.remove_manifest("app:1")
    assert cache.has_blob(LAYER)
    close_and_check(cache)


def test_a_failed_repair_leaves_the_damaged_blob_in_place(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    altered = alter(cache, LAYER)

    def fail(*_: object) -> str:
        raise StorageError("no space")

    with monkeypatch.context() as patch:
        patch.setattr("cachedb.operations.repair._mark_missing", fail)
        with pytest.raises(StorageError):
            cache.verify(repair=True)
    assert LAYER in stored_rows(cache.directory)
    assert find_blob(cache, LAYER).read_bytes() == altered, "P1: a stored row has its file"
    assert kinds(cache.verify(repair=True).problems) == [("corrupt", LAYER)]
    assert altered in read_quarantine(cache).values()
    close_and_check(cache)


def test_the_next_open_finishes_a_repair_that_died_before_it_emptied_the_trash(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    altered = alter(cache, LAYER)

    def die(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cachedb.content.collect.empty_trash", die)
        with pytest.raises(KeyboardInterrupt):
            cache.verify(repair=True)
    Cache.open(cache.directory).close()
    assert not find_blob(cache, LAYER).exists()
    assert read_quarantine(cache) == {LAYER.replace(":", "-"): altered}
    close_and_check(cache)


def test_a_damaged_file_is_in_quarantine_before_its_row_changes(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    altered = alter(cache, LAYER)

    def check_and_unstore(*arguments: Any) -> str:
        assert read_quarantine(cache) == {LAYER.replace(":", "-"): altered}
        return _mark_missing(*arguments)

    monkeypatch.setattr("cachedb.operations.repair._mark_missing", check_and_unstore)
    assert cache.verify(repair=True).problems


# Orphans


def test_an_orphan_becomes_an_unreferenced_blob(cache: Cache) -> None:
    digest = add_orphan(cache, b"orphan")
    (problem,) = cache.verify(repair=True).problems
    assert problem.repair == "added to the index"
    assert cache.get_blob(digest) == b"orphan"
    assert find_blob(cache, digest).stat().st_mode & 0o777 == 0o444
    assert cache.verify().problems == []
    assert cache.collect_garbage() == (1, 6)
    close_and_check(cache)


def test_an_orphan_that_is_a_manifest_becomes_an_image_and_is_not_collected(cache: Cache) -> None:
    child, other = image(31), image(32)
    index = make.index(child)
    for data in (index, *child.blobs.values(), *other.blobs.values()):
        add_orphan(cache, data)
    repairs = {problem.digest: problem.repair for problem in cache.verify(repair=True).problems}
    named = {f"recovered@{digest}" for digest in (make.digest_of(index), other.digest)}
    assert {str(image.name) for image in cache.list_manifests()} >= named, "an image is missing"
    assert named == {repair.split()[-1] for repair in repairs.values() if repair and "recovered" in repair}
    assert cache.collect_garbage() == (0, 0)
    assert all(cache.is_image_complete(name) for name in named)
    close_and_check(cache)


def test_an_orphan_that_an_image_lacks_completes_it(cache: Cache) -> None:
    new = image(7)
    cache.save_manifest("new:1", new.manifest)
    for data in (new.config, *new.layers):
        add_orphan(cache, data)
    assert len(cache.verify(repair=True).problems) == 2
    assert cache.is_image_complete("new:1")
    assert cache.collect_garbage() == (0, 0)
    close_and_check(cache)


def test_an_orphan_that_is_a_child_of_an_index_is_expanded(cache: Cache) -> None:
    children = (image(21), image(22, architecture="arm64"))
    cache.save_manifest("late:1", make.index(*children))
    for child in children:
        for data in child.blobs.values():
            add_orphan(cache, data)
    assert {problem.kind for problem in cache.verify(repair=True).problems} == {"orphan"}
    assert {blob.digest for blob in cache.get_image_blobs("late:1")} > {*children[0].blobs, *children[1].blobs}
    assert cache.is_image_complete("late:1")
    close_and_check(cache)


def test_an_orphan_with_wrong_content_is_moved_to_quarantine(cache: Cache) -> None:
    digest = add_orphan(cache, b"right", b"wrong")
    assert kinds(cache.verify(repair=True).problems) == [("corrupt", digest)]
    assert read_quarantine(cache) == {digest.replace(":", "-"): b"wrong"}
    assert digest not in files_of(cache.directory)
    close_and_check(cache)


def test_files_that_are_no_blobs_are_moved_to_quarantine(cache: Cache, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"somebody's")
    places = cache.directory / "blobs"
    strays = {
        places / "sha256" / "notes.txt": b"a bad name",
        places / "sha256" / hex_of(b"x").upper(): b"x",
        places / "loose": b"a file beside the folders",
    }
    for path, data in strays.items():
        path.write_bytes(data)
    link, folder, named = places / "sha256" / hex_of(b"link"), places / "sha1", places / "sha256" / hex_of(b"folder")
    link.symlink_to(outside)
    for made in (folder, named):
        made.mkdir()
        (made / "inside").write_bytes(b"inside")
    every = {*strays, link, folder, named}
    for quick in (True, False):
        found = cache.verify(quick=quick).problems
        assert {(problem.kind, problem.digest, problem.path) for problem in found} == {
            ("orphan", None, path) for path in every
        }
    found = cache.verify(repair=True).problems
    assert {problem.path for problem in found} == every
    assert all(problem.repair for problem in found)
    kept = cache.directory / "quarantine"
    assert {path.name for path in kept.iterdir()} == {path.name for path in every}
    assert (kept / "notes.txt").read_bytes() == b"a bad name"
    assert (kept / link.name).is_symlink()
    assert (kept / "sha1" / "inside").read_bytes() == b"inside"
    assert outside.read_bytes() == b"somebody's"
    close_and_check(cache)


def test_a_link_in_the_place_of_a_blob_is_moved_and_the_blob_is_missing(cache: Cache, tmp_path: Path) -> None:
    path = find_blob(cache, LAYER)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    found = cache.verify(repair=True).problems
    assert sorted(problem.kind for problem in found) == ["missing", "orphan"]
    assert (tmp_path / "elsewhere").read_bytes() == APP.layers[0]
    assert not cache.is_image_complete("app:1")
    close_and_check(cache)


# Rows that differ from the manifests


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM image_blobs WHERE image_id = {app} AND position = 2",
        "DELETE FROM image_blobs WHERE image_id = {app} AND position = 0",
        "DELETE FROM image_blobs WHERE image_id = {many} AND position > 3",
        "DELETE FROM image_blobs",
        "UPDATE image_blobs SET role = 'other' WHERE image_id = {app} AND role = 'layer'",
        "UPDATE image_blobs SET role = 'config' WHERE image_id = {app} AND role = 'layer'",
        "UPDATE image_blobs SET media_type = 'text/plain' WHERE image_id = {app} AND position = 3",
        "UPDATE image_blobs SET position = 9 WHERE image_id = {app} AND position = 1",
        "UPDATE image_blobs SET blob_id = (SELECT blob_id FROM image_blobs WHERE image_id = {many} AND position = 0) "
        "WHERE image_id = {app} AND position = 3",
        f"UPDATE images SET media_type = '{OCI_INDEX}' WHERE id = {{app}}",
        "UPDATE images SET media_type = 'text/plain' WHERE id = {app}",
        f"UPDATE images SET media_type = '{OCI_MANIFEST}' WHERE id = {{many}}",
    ],
)
def test_a_repair_makes_the_index_agree_with_the_manifests(cache: Cache, statement: str) -> None:
    signature = cache.add_blob(b"a signature")
    cache.associate_blob_with_image("app:1", signature, role="other", media_type="text/x-signature")
    right = {name: cache.get_image_blobs(name) for name in ("app:1", "many:1", "other:1")}
    images = {image.name: image.media_type for image in cache.list_manifests()}
    execute(cache.directory, statement.format(app=select_id(cache, "app"), many=select_id(cache, "many")))
    assert {problem.kind for problem in cache.verify().problems} == {"index"}
    assert cache.verify(quick=True).problems == []
    found = cache.verify(repair=True).problems
    assert {problem.kind for problem in found} == {"index"}
    assert all(problem.repair for problem in found)
    assert cache.verify().problems == []
    for name, blobs_ in right.items():
        found_blobs = cache.get_image_blobs(name)
        manifest = [blob for blob in blobs_ if blob.digest != signature]
        assert found_blobs[: len(manifest)] == manifest
        attached = [blob[:4] for blob in found_blobs[len(manifest) :]]
        if name == "app:1" and statement != "DELETE FROM image_blobs":
            assert (signature, 11, "other", "text/x-signature") in attached, "the attached blob was lost"
    assert {image.name: image.media_type for image in cache.list_manifests()} == images
    close_and_check(cache)


def test_a_difference_is_reported_with_its_image(cache: Cache) -> None:
    execute(cache.directory, f"DELETE FROM image_blobs WHERE image_id = {select_id(cache, 'app')} AND position = 2")
    (problem,) = cache.verify().problems
    assert problem.digest == APP.digest
    assert "app:1" in problem.detail


def test_an_extra_row_is_kept_as_an_attachment(cache: Cache) -> None:
    """A user may have attached the blob, and keeping it costs little."""
    execute(
        cache.directory,
        f"INSERT INTO image_blobs SELECT {select_id(cache, 'app')}, 9, blob_id, role, media_type, NULL, NULL "
        "FROM image_blobs "
        f"WHERE image_id = {select_id(cache, 'other')} AND position = 3",
    )
    assert cache.verify(repair=True).problems == []
    close_and_check(cache)


def make_manifest_with_wrong_size() -> tuple[bytes, ImageContent]:
    made = image(31)
    document = json.loads(made.manifest)
    document["layers"][0]["size"] += 1
    return json.dumps(document).encode(), made


def test_a_manifest_with_a_wrong_size_is_reported_and_not_repaired(cache: Cache) -> None:
    manifest, made = make_manifest_with_wrong_size()
    cache.save_manifest("wrong:1", manifest)  # accepted, as the layer is not stored yet
    for data in (made.config, *made.layers):
        cache.add_blob(data)
    for repair in (False, True, False):
        (problem,) = cache.verify(repair=repair).problems
        assert problem[:2] == ("index", digest_of(made.layers[0]))
        assert "wrong:1" in problem.detail
        assert problem.repair is None
    assert cache.has_blob(digest_of(made.layers[0]))


def test_a_child_of_an_index_that_is_no_manifest_is_reported_and_not_repaired(cache: Cache) -> None:
    child = b"no manifest"
    index = json.dumps(
        {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [make.descriptor(child, OCI_MANIFEST)]}
    ).encode()
    cache.save_manifest("odd:1", index)
    cache.add_blob(child)
    for repair in (False, True, False):
        (problem,) = cache.verify(repair=repair).problems
        assert problem.kind == "index"
        assert "odd:1" in problem.detail
        assert problem.repair is None
    assert cache.has_blob(digest_of(child))


def test_a_name_that_points_to_a_layer_is_reported(cache: Cache) -> None:
    execute(
        cache.directory,
        f"UPDATE images SET manifest_id = (SELECT id FROM blobs WHERE digest = '{LAYER}') "
        f"WHERE id = {select_id(cache, 'app')}",
    )
    found = cache.verify(repair=True).problems
    assert {problem.kind for problem in found} == {"index"}
    assert "app:1" in found[0].detail


# Read-only caches


def test_a_read_only_cache_is_verified_and_not_repaired(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = add_orphan(cache, b"orphan")
    alter(cache, LAYER)
    cache.close()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and real(path, mode))
    with Cache.open(cache.directory) as reader:
        before = snapshot(cache.directory)
        assert sorted(kinds(reader.verify().problems)) == sorted([("corrupt", LAYER), ("orphan", digest)])
        with pytest.raises(CacheError):
            reader.verify(repair=True)
        assert snapshot(cache.directory) == before


# The command line


@pytest.mark.slow
def test_the_command_exits_with_0_for_a_sound_cache(cachedb: Run, cache: Cache) -> None:
    ran = cachedb("verify")
    assert (ran.returncode, ran.stderr) == (0, "")
    count = len(files_of(cache.directory))
    assert ran.stdout == f"{count} files checked, no problems\n"
    ran = cachedb("verify", "--quick", "--format", "json")
    assert ran.returncode == 0
    assert json.loads(ran.stdout) == {"checked": count, "problems": []}


@pytest.mark.slow
def test_the_command_prints_problems_and_exits_with_1_even_after_a_repair(cachedb: Run, cache: Cache) -> None:
    alter(cache, LAYER)
    stray = cache.directory / "blobs" / "sha256" / "stray"
    stray.write_bytes(b"")
    assert cachedb("verify", "--quick").returncode == 1
    ran = cachedb("verify", "--format", "json")
    assert ran.returncode == 1
    document = json.loads(ran.stdout)
    assert list(document) == ["checked", "problems"]
    by_kind = {problem["kind"]: problem for problem in document["problems"]}
    assert list(by_kind["corrupt"]) == ["kind", "digest", "path", "detail", "repair", "images"]
    assert by_kind["corrupt"]["images"] == [{"name": "app:1"}]
    assert by_kind["orphan"]["images"] == []
    assert by_kind["corrupt"]["digest"] == LAYER
    assert by_kind["corrupt"]["path"] == str(find_blob(cache, LAYER))
    assert by_kind["corrupt"]["repair"] is None
    assert (by_kind["orphan"]["digest"], by_kind["orphan"]["path"]) == (None, str(stray))
    ran = cachedb("verify", "--repair")
    assert ran.returncode == 1
    assert "corrupt" in ran.stdout
    assert "2 problems" in ran.stdout
    assert "quarantine/" in ran.stdout
    assert cachedb("verify").returncode == 0


@pytest.mark.parametrize("repair", [False, True])
def test_a_problem_names_all_images_that_have_the_blob(cachedb: Run, cache: Cache, repair: bool) -> None:
    for number in range(3):
        cache.tag("app:1", f"copy:{number}")
    shared = digest_of(APP.layers[1])
    alter(cache, shared)
    find_blob(cache, digest_of(OTHER.config)).unlink()
    names = ("app:1", "copy:0", "copy:1", "copy:2", "other:1")
    printed = cachedb("verify").stdout
    assert "app:1, copy:0, copy:1 and 2 more" in printed
    found = {problem.digest: problem.images for problem in cache.verify(repair=repair).problems}
    assert found == {shared: names, digest_of(OTHER.config): ("other:1",)}


@pytest.mark.slow
def test_quiet_prints_the_digests_of_damaged_blobs(cachedb: Run, cache: Cache) -> None:
    alter(cache, LAYER)
    ran = cachedb("verify", "-q")
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, f"{LAYER}\n", "")
    cachedb("verify", "-q", "--repair")
    ran = cachedb("verify", "-q")
    assert (ran.returncode, ran.stdout) == (0, "")


def test_the_help_names_the_options(cachedb: Run) -> None:
    ran = cachedb("verify", "--help")
    assert ran.returncode == 0
    assert all(text in ran.stdout for text in ("--quick", "--repair", "quarantine/", "exit code is 1", "Examples"))


def test_an_image_with_a_missing_index_blocks_neither_a_repair_nor_other_images(cache: Cache) -> None:
    children = (image(21), image(22, architecture="arm64"))
    root = make.save_index(cache, "lost:1", *children)
    find_blob(cache, digest_of(root)).unlink()
    execute(cache.directory, f"UPDATE blobs SET stored_at = NULL WHERE digest = '{children[0].digest}'")
    cache.save_manifest("other:1", children[0].manifest)
    assert cache.is_image_complete("other:1")
    cache.remove_manifest("other:1")
    assert [problem.kind for problem in cache.verify(repair=True).problems] == ["missing"]
    assert cache.verify().problems == []
    assert not cache.is_image_complete("lost:1")


def test_an_image_without_blobs_is_damage_and_is_repaired(cache: Cache) -> None:
    execute(cache.directory, "DELETE FROM image_blobs")
    with pytest.raises(DamagedIndex, match="has no blobs"):
        cache.get_image("app:1")
    cache.verify(repair=True)
    assert cache.is_image_complete("app:1")


def test_control_characters_in_a_file_name_are_escaped(cache: Cache, cachedb: Run) -> None:
    (cache.directory / "blobs" / "sha256" / "\x1b[31mred\n").touch()
    result = cachedb("verify")
    assert result.returncode == 1
    assert "\\x1b[31mred\\n" in result.stdout
    assert "\x1b" not in result.stdout


# Changes that other programs make to the index file


def read_journal_mode(directory: Path) -> str:
    shell = sqlite3.connect(directory / "index.db")
    try:
        return str(shell.execute("PRAGMA journal_mode").fetchone()[0])
    finally:
        shell.close()


def leave_wal_mode(directory: Path) -> None:
    shell = sqlite3.connect(directory / "index.db")
    assert shell.execute("PRAGMA journal_mode = DELETE").fetchone() == ("delete",)
    shell.close()


@pytest.mark.parametrize("read_only", [False, True])
def test_a_lost_wal_mode_is_reported_and_restored(directory: Path, read_only: bool) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
    leave_wal_mode(directory)
    with Cache.open(directory) as cache:
        cache._database.access.is_writable = not read_only
        (problem,) = cache.verify().problems
        assert problem[:3] == ("index", None, directory / "index.db")
        assert problem[3:5] == ("its journal mode is 'delete', not WAL: readers and writers block each other", None)
        cache._database.access.is_writable = True
        (problem,) = cache.verify(repair=True).problems
        assert problem.repair == "it is in WAL mode again"
        assert read_journal_mode(directory) == "wal"
        cache._database.access.is_writable = not read_only
        assert cache.verify().problems == []
        cache._database.access.is_writable = True
    check(directory)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_writer_restores_wal_mode(directory: Path, at_once: bool) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
    leave_wal_mode(directory)
    database = Database(directory)
    with database.write_at_once() if at_once else database.write() as connection:
        assert connection is not None
    database.close()
    assert read_journal_mode(directory) == "wal"


@pytest.mark.slow
def test_a_writer_does_not_wait_forever_for_a_reader_without_wal_mode(directory: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
    leave_wal_mode(directory)
    reader = sqlite3.connect(directory / "index.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM images").fetchall()
    with Cache.open(directory, wait=0.2) as cache:
        assert [str(name) for name in cache.list_names()] == ["app:1"]
        with pytest.raises(Busy, match=r"another program"):
            cache.tag("app:1", "app:2")
        reader.execute("COMMIT")
        cache.tag("app:1", "app:2")
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM images").fetchall()
        cache.tag("app:1", "app:3")  # in WAL mode a reader blocks no writer
    reader.close()
    assert read_journal_mode(directory) == "wal"
    check(directory)


def test_a_trigger_is_reported_and_kept(directory: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1))
    change_index(directory, "CREATE TRIGGER mine AFTER INSERT ON images BEGIN DELETE FROM image_blobs; END")
    with Cache.open(directory) as cache:
        for repair in (False, True):
            (problem,) = cache.verify(repair=repair).problems
            assert (problem.kind, problem.repair) == ("index", None)
            assert problem.detail.startswith("no migration creates the trigger 'mine'")


@pytest.mark.parametrize(
    ("sql", "detail"),
    [
        ("PRAGMA user_version = 9999", f"its user_version is 9999, and should be {OLDEST}: releases with"),
        ("PRAGMA user_version = 1", f"its user_version is 1, and should be {OLDEST}: releases with"),
        ("INSERT INTO alembic_version VALUES ('0001')", f"it has several revisions: 0001, {REVISION}"),
        ("DROP VIEW image_usage", "another program has dropped 'image_usage'"),
        ("DROP INDEX ix_image_blobs_blob_id", "another program has dropped 'ix_image_blobs_blob_id'"),
    ],
)
def test_a_change_of_the_schema_by_another_program_is_reported_and_repaired(
    cache: Cache, cachedb: Run, sql: str, detail: str
) -> None:
    rows = read_rows(cache.directory)
    change_index(cache.directory, sql)
    for repair in (False, True):
        (problem,) = cache.verify(repair=repair, quick=True).problems
        assert (problem.kind, problem.repair) == ("index", "the index was rebuilt" if repair else None)
        assert problem.detail.startswith(detail)
    close_and_check(cache)
    assert read_rows(cache.directory).keys() == rows.keys()
    assert cachedb("db", "check").returncode == 0


def test_a_row_that_another_program_has_deleted_is_damage_for_a_write(cache: Cache, cachedb: Run) -> None:
    # As a program does that does not check foreign keys.
    change_index(
        cache.directory, "DELETE FROM blobs WHERE id IN (SELECT blob_id FROM image_blobs WHERE role = 'layer')"
    )
    done = cachedb("tag", "app:1", "new:1")
    assert done.returncode == 1
    assert done.stderr.startswith("cachedb: the index is damaged: FOREIGN KEY constraint failed: `cachedb verify --rep")
    assert done.stderr.count("\n") == 1


def test_tables_views_and_indexes_of_other_programs_are_no_damage(cache: Cache) -> None:
    for sql in ("TABLE mine (x)", "VIEW my_images AS SELECT * FROM images", "INDEX my_index ON images (added_at)"):
        change_index(cache.directory, f"CREATE {sql}")
    assert cache.verify().problems == []


@pytest.mark.parametrize("name", ["ingest", "trash", "locks", "blobs"])
def test_verifying_a_cache_with_a_missing_folder_raises_no_other_error(cache: Cache, name: str) -> None:
    shutil.rmtree(cache.directory / name)
    with suppress(CacheError):
        cache.verify()
    with suppress(CacheError):
        cache.verify(repair=True)
    (cache.directory / name).mkdir(exist_ok=True)


def test_a_cache_without_its_ingest_folder_cannot_be_verified(cache: Cache) -> None:
    shutil.rmtree(cache.directory / "ingest")
    with pytest.raises(StorageError, match="cannot verify the cache: No such file or directory"):
        cache.verify()
    (cache.directory / "ingest").mkdir()


@pytest.mark.parametrize("name", ["locks/write.lock", f"locks/{'a' * 64}.producing", f"trash/sha256-{'b' * 64}"])
def test_a_link_with_the_name_of_a_file_of_the_cache_is_reported(cache: Cache, tmp_path: Path, name: str) -> None:
    path = cache.directory / name
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "nothing")
    problems = cache.verify().problems
    assert [(problem.kind, problem.path, problem.repair) for problem in problems] == [("orphan", path, None)]


def test_an_older_index_is_checked_and_named_as_older(tmp_path: Path) -> None:
    directory = unpack_frozen_cache("0003", tmp_path / "cache")
    older = "has schema 0003, and this release needs"
    with Cache.open(directory, damaged=True) as cache:
        assert [older in problem.detail for problem in cache.verify().problems] == [True]
        with pytest.raises(SchemaMismatch, match=older):
            cache.verify(repair=True)
        change_index(directory, "DELETE FROM blobs WHERE id = (SELECT min(blob_id) FROM image_blobs)")
        path = next((directory / "blobs" / "sha256").iterdir())
        path.chmod(0o644)
        path.write_bytes(b"rotten")
        found = cache.verify().problems
        assert {problem.kind for problem in found} == {"index", "corrupt"}
        assert any("refers to a row of blobs that does not exist" in problem.detail for problem in found)
        assert any(older in problem.detail for problem in found)
        assert cache.verify(repair=True).problems
        close_and_check(cache)
    Cache.open(directory).close()


def test_a_damaged_index_with_a_newer_schema_is_not_repaired(cache: Cache) -> None:
    change_index(cache.directory, "DELETE FROM blobs WHERE id = (SELECT min(blob_id) FROM image_blobs)")
    change_index(cache.directory, "UPDATE alembic_version SET version_num = '9999'")
    change_index(cache.directory, "PRAGMA user_version = 9999")
    status = (cache.directory / "index.db").stat()
    assert {problem.kind for problem in cache.verify(quick=True).problems} == {"index"}
    with pytest.raises(SchemaMismatch, match="newer release"):
        cache.verify(repair=True)
    assert (cache.directory / "index.db").stat().st_ino == status.st_ino
