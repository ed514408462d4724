"""Early uploads of a push, before the cache is open: what they send, when none begin, and how they end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cachedb import Cache, RegistryError, StorageError
from cachedb.disk.layout import blob_path
from cachedb.index.sqlite import peek
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import OCI_MANIFEST
from cachedb.oci.names import Name
from cachedb.operations import push_target
from cachedb.operations.push_target import Target
from tests.conftest import Run
from tests.disk.test_locks import wait_until
from tests.operations.test_pull_source import count_connecting, unreachable  # noqa: F401 - the second is a fixture
from tests.operations.test_push import ARM, FIRST, LARGE, SECOND, assert_has, make_referrer, take_sent_digests
from tests.support import make
from tests.support.faults import answer, change_answer
from tests.support.promises import check
from tests.support.registries import Registry, isolate_client  # noqa: F401 - isolate_client is a fixture

OTHER = make.image(8, architecture="arm64")
LAYER = make.digest_of(LARGE.layers[0])


@pytest.fixture
def closed_cache(directory: Path) -> Path:
    """Make a cache that no process has open."""
    with Cache.open(directory) as cache:
        for name, image in (("app:1", FIRST), ("app:2", SECOND), ("large:1", LARGE)):
            make.save(cache, name, image)
        make.save_index(cache, "several:1", FIRST, ARM)
    return directory


@pytest.fixture
def remote() -> Iterator[Registry]:
    with Registry() as registry:
        yield registry


def run_early_uploads(directory: Path, source: str, name: str) -> Target:
    """Return a target whose thread has finished."""
    target = Target(directory, Name.parse(name))
    target.begin(Name.parse(source))
    assert target._thread is not None
    target._thread.join(60)
    return target


@pytest.mark.parametrize(
    ("source", "images"), [("large:1", [LARGE]), ("app:2", [SECOND]), ("several:1", [FIRST, ARM])], ids=lambda it: it
)
def test_blobs_are_sent_once_before_the_cache_is_open(
    closed_cache: Path, remote: Registry, source: str, images: list[make.ImageContent]
) -> None:
    parts = {make.digest_of(data) for image in images for data in (image.config, *image.layers)}
    with run_early_uploads(closed_cache, source, f"{remote.host}/it:1") as target:
        assert {digest for _, digest in remote.blobs} == parts
        assert remote.manifests == {}
        seen: list[tuple[int, int]] = []
        with Cache.open(closed_cache) as cache:
            pushed = cache.push(source, target, progress=lambda *it: seen.append(it))
    assert (pushed.blobs, pushed.existing, str(pushed.name)) == (len(parts), 0, f"{remote.host}/it:1")
    assert pushed.bytes == seen[-1][0] == seen[-1][1]
    asks = [request.path for request in remote.requests if request.method == "HEAD"]
    assert len(asks) == len(set(asks)) == len(parts)
    assert sorted(take_sent_digests(remote)) == sorted(parts)
    for image in images:
        assert_has(remote, "it", "1" if len(images) == 1 else image.digest, image)
    check(closed_cache)


@pytest.mark.slow
def test_the_command_sends_each_blob_once(closed_cache: Path, remote: Registry, cachedb: Run) -> None:
    remote.fault(change_answer(delay=1.5), method="PUT", path="/blobs/")  # longer than it takes to open the cache
    for blobs, existing in ((2, 0), (0, 2)):
        done = cachedb("push", "--format", "json", "large:1", f"{remote.host}/it:1")
        (found,) = json.loads(done.stdout)
        assert (found["blobs"], found["existing"], done.stderr) == (blobs, existing, "")
    assert sorted(take_sent_digests(remote)) == sorted([LAYER, make.digest_of(LARGE.config)])
    assert_has(remote, "it", "1", LARGE)


@pytest.mark.slow
def test_the_progress_of_a_push_includes_early_uploads(closed_cache: Path, remote: Registry) -> None:
    remote.fault(change_answer(delay=2), method="PUT", path="/blobs/", times=2)
    seen: list[int] = []
    with Target(closed_cache, Name.parse(f"{remote.host}/it:1")) as target, Cache.open(closed_cache) as cache:
        target.begin(Name.parse("large:1"))
        while target._sent.get(LAYER, 0) < len(LARGE.layers[0]):  # type: ignore[call-overload]
            time.sleep(0.01)
        cache.push("large:1", target, progress=lambda done, _: seen.append(done))
    assert len(LARGE.layers[0]) in seen or len(LARGE.layers[0]) + len(LARGE.config) in seen[:-1]


def test_a_blob_of_another_repository_is_mounted_early(closed_cache: Path, remote: Registry) -> None:
    remote.add(FIRST, "base")
    with Cache.open(closed_cache) as cache:
        cache.tag("app:1", f"{remote.host}/base:1")
        cache.tag("app:1", "localhost:99999/not/there:1")
        with run_early_uploads(closed_cache, "app:2", f"{remote.host}/app:2") as target:
            assert {digest for repository, digest in remote.blobs if repository == "app"} == (
                SECOND.blobs.keys() - {SECOND.digest}
            )
            pushed = cache.push("app:2", target)
    assert (pushed.mounted, pushed.blobs) == (1, 2)
    assert_has(remote, "app", "2", SECOND)


def test_no_early_upload_begins_for_an_incomplete_image(closed_cache: Path, remote: Registry) -> None:
    with Cache.open(closed_cache) as cache:
        for data in (FIRST.config, FIRST.layers[0]):
            cache.add_blob(data)
        cache.save_manifest("lacking:1", make.image(1, 9).manifest)
        cache.save_manifest("partly:1", make.index(FIRST, make.image(7)))
        make.save(cache, "other:1", OTHER)  # the image is stored, but not as part of the index
        one = remote.add_index(make.index(SECOND, OTHER), "one", "1", [SECOND])
        cache.pull(one, platform="linux/amd64")
    remote.requests.clear()
    for source in ("nothing:1", "lacking:1", "partly:1", one):
        run_early_uploads(closed_cache, source, f"{remote.host}/it:1").__exit__(None, None, None)
    run_early_uploads(closed_cache, "app:1", f"{remote.host}/it@{SECOND.digest}").__exit__(None, None, None)
    assert remote.requests == []


def test_no_early_upload_begins_for_a_damaged_manifest(closed_cache: Path, remote: Registry) -> None:
    with Cache.open(closed_cache) as cache:
        path = cache.get_blob_path(FIRST.digest)
    path.chmod(0o600)
    path.write_bytes(FIRST.manifest.replace(b"sha256", b"sha255"))
    run_early_uploads(closed_cache, "app:1", f"{remote.host}/it:1").__exit__(None, None, None)
    assert remote.requests == []


@pytest.mark.parametrize("index", [b"", b"no index" * 1000, None], ids=["empty", "damaged", "another program's"])
def test_no_early_upload_begins_with_an_unreadable_index(tmp_path: Path, remote: Registry, index: bytes | None) -> None:
    file = tmp_path / "index.db"
    if index is None:
        with sqlite3.connect(file) as other:
            other.execute("CREATE TABLE images (repository, reference)")
        other.close()
    else:
        file.write_bytes(index)
    before = file.read_bytes()
    run_early_uploads(tmp_path, "app:1", f"{remote.host}/it:1").__exit__(None, None, None)
    assert (remote.requests, file.read_bytes()) == ([], before)


@pytest.mark.parametrize("revision", ["0004", "9999"])
def test_no_early_upload_begins_with_another_schema(closed_cache: Path, remote: Registry, revision: str) -> None:
    with closing(sqlite3.connect(closed_cache / "index.db")) as index, index:
        index.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    run_early_uploads(closed_cache, "app:1", f"{remote.host}/it:1").__exit__(None, None, None)
    assert remote.requests == []


def test_no_early_upload_begins_with_values_of_wrong_types(
    closed_cache: Path, remote: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_target, "query_index", lambda *_: [(FIRST.digest, "large", OCI_MANIFEST, FIRST.digest, 1)])
    Target(closed_cache, Name.parse(f"{remote.host}/it:1"))._begin(Name.parse("app:1"))
    assert remote.requests == []


def test_reading_an_idle_index_leaves_no_files(closed_cache: Path, remote: Registry) -> None:
    with run_early_uploads(closed_cache, "app:1", f"{remote.host}/it:1"):
        assert {digest for _, digest in remote.blobs} == FIRST.blobs.keys() - {FIRST.digest}
    assert [path.name for path in closed_cache.glob("index.db*")] == ["index.db"]


def test_early_uploads_read_the_wal_and_do_not_change_it(directory: Path, remote: Registry, tmp_path: Path) -> None:
    left = tmp_path / "left"  # as a killed process leaves the cache
    with Cache.open(directory) as cache:
        make.save(cache, "app:1", FIRST)
        shutil.copytree(directory, left)
    before = {path.name: path.read_bytes() for path in left.glob("index.db*") if not path.name.endswith("-shm")}
    assert before["index.db-wal"]
    run_early_uploads(left, "app:1", f"{remote.host}/it:1").__exit__(None, None, None)
    assert {digest for _, digest in remote.blobs} == FIRST.blobs.keys() - {FIRST.digest}
    assert {name: (left / name).read_bytes() for name in before} == before


def test_no_early_upload_begins_without_a_cache(directory: Path, remote: Registry) -> None:
    with Target(directory, Name.parse(f"{remote.host}/it:1")) as target:
        target.begin(Name.parse("app:1"))
        assert target._thread is None
    assert not directory.exists()


def test_an_invalid_directory_gives_the_error_of_opening_the_cache(tmp_path: Path, cachedb: Run) -> None:
    done = cachedb("--dir", tmp_path / ("long" * 100), "push", "app:1", "127.0.0.1:1/it:1")
    assert (done.returncode, done.stderr[:40]) == (1, "cachedb: cannot use the cache directory:")


def test_referrers_are_pushed_after_early_uploads(closed_cache: Path, remote: Registry) -> None:
    signature = make_referrer(FIRST.manifest)
    name = remote.add(FIRST, "app", "1")
    remote.add(signature, "app")
    with Cache.open(closed_cache) as cache:
        cache.pull(name, referrers=True)
        with run_early_uploads(closed_cache, name, f"{remote.host}/copy:1") as target:
            cache.push(name, target)
    assert_has(remote, "copy", "1", FIRST)
    assert_has(remote, "copy", signature.digest, signature)


def test_a_failed_early_upload_is_retried_unless_the_push_waits_for_it(closed_cache: Path, remote: Registry) -> None:
    file = blob_path(closed_cache, Digest(LAYER))
    file.rename(closed_cache / "away")
    with run_early_uploads(closed_cache, "large:1", f"{remote.host}/it:1") as target, Cache.open(closed_cache) as cache:
        assert remote.count("PUT", "/blobs/") <= 1  # the config
        (closed_cache / "away").rename(file)
        assert cache.push("large:1", target).blobs == 2
    remote.fault(answer(403, delay=1), method="POST", path="/blobs/", times=2)
    with Target(closed_cache, Name.parse(f"{remote.host}/other:1")) as target, Cache.open(closed_cache) as cache:
        target.begin(Name.parse("large:1"))
        while not target._sent:
            time.sleep(0.001)
        with pytest.raises(RegistryError, match="refuses"):
            cache.push("large:1", target)
    assert remote.count("POST") == 2 + 2


def test_no_more_uploads_begin_after_the_registry_refused_one(closed_cache: Path, tmp_path: Path) -> None:
    with Cache.open(closed_cache) as cache:
        make.save(cache, "many:1", make.image(*range(30)))
    for program, answers in (("wrong", '{"Username":"user","Secret":"wrong"}'), ("broken", "")):
        asked = tmp_path / "asked"
        (tmp_path / f"docker-credential-{program}").write_text(f"#!/bin/sh\necho >>{asked}; echo '{answers}'\n")
        (tmp_path / f"docker-credential-{program}").chmod(0o755)
        (tmp_path / "auth.json").write_text(json.dumps({"credsStore": program}))
        with Registry(auth="basic") as remote, pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
            patch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
            target = run_early_uploads(closed_cache, "many:1", f"{remote.host}/it:1")
            with target, Cache.open(closed_cache) as cache, pytest.raises(RegistryError):
                cache.push("many:1", target)
        assert len(asked.read_text()) <= push_target.PARALLEL_UPLOADS
        asked.unlink()


def test_a_name_that_moves_meanwhile_is_pushed_as_its_new_image(closed_cache: Path, remote: Registry) -> None:
    with run_early_uploads(closed_cache, "app:1", f"{remote.host}/it:1") as target, Cache.open(closed_cache) as cache:
        cache.tag("large:1", "app:1")
        pushed = cache.push("app:1", target)
    assert pushed.digest == LARGE.digest
    assert_has(remote, "it", "1", LARGE)


def test_closing_a_target_stops_its_early_uploads(closed_cache: Path, remote: Registry) -> None:
    remote.fault(change_answer(delay=20), method="PUT", path="/blobs/", times=9)
    before = time.monotonic()
    with Target(closed_cache, Name.parse(f"{remote.host}/it:1")) as target:
        target.begin(Name.parse("large:1"))
        while not target._sent.get(LAYER, 0):  # type: ignore[call-overload]
            time.sleep(0.01)
    assert time.monotonic() - before < 15
    assert not target._thread or not target._thread.is_alive()


def test_an_interrupt_before_the_thread_runs_is_raised_unchanged(
    closed_cache: Path, remote: Registry, interrupted_start: None
) -> None:
    with pytest.raises(KeyboardInterrupt), Target(closed_cache, Name.parse(f"{remote.host}/it:1")) as target:
        target.begin(Name.parse("app:1"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [[], ["--platform", "linux/amd64"]], ids=["with early uploads", "without early uploads"]
)
def test_an_interrupt_does_not_wait_for_a_connection(
    closed_cache: Path,
    unreachable: str,  # noqa: F811 - the fixture
    options: list[str],
) -> None:
    others = count_connecting(unreachable)
    process = subprocess.Popen(
        [sys.executable, "-m", "cachedb", "--dir", closed_cache, "push", *options, "several:1", f"{unreachable}/it:1"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert wait_until(lambda: count_connecting(unreachable) > others, 60)
    time.sleep(0.5)  # time for the push to wait for its early uploads
    before = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - before < 5, "the push waited for the connection (10 s)"
    assert (process.returncode, stderr.strip()) == (130, "cachedb: interrupted")


def test_a_push_and_its_early_uploads_do_not_send_the_same_blob(
    closed_cache: Path, remote: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_pushed = threading.Event()
    look = peek.query_index

    def look_and_wait(directory: Path, query: str, *values: str) -> list[tuple[object, ...]]:
        found = look(directory, query, *values)
        if query == peek.CONTENTS:
            is_pushed.wait(30)
        return found

    monkeypatch.setattr(push_target, "query_index", look_and_wait)
    with Target(closed_cache, Name.parse(f"{remote.host}/it:1")) as target, Cache.open(closed_cache) as cache:
        target.begin(Name.parse("large:1"))
        assert cache.push("large:1", target).blobs == 2
        is_pushed.set()
        assert target._thread
        target._thread.join(30)
    assert len(take_sent_digests(remote)) == 2


def test_an_idle_index_that_changes_while_it_is_read_is_an_error(
    closed_cache: Path, remote: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = iter(range(9))
    with Target(closed_cache, Name.parse(f"{remote.host}/it:1")) as target:
        assert peek.query_index(target._directory, "SELECT count(*) FROM images")
        monkeypatch.setattr(peek, "_state", lambda _: peek._State(next(states), 0, has_wal=False))
        with pytest.raises(StorageError, match="changed while it was read"):
            peek.query_index(target._directory, "SELECT count(*) FROM images")
