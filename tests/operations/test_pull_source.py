"""Early downloads of a pull, before the index is open: they are requested once and verified like any download."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from cachedb import Cache, CacheError, DigestMismatch, InvalidManifest, NotInCache, RegistryError, StorageError, threads
from cachedb.content import publish
from cachedb.disk import downloads, single_flight
from cachedb.disk.folders import Folders
from cachedb.disk.layout import partial_path
from cachedb.oci.digests import Digest
from cachedb.oci.names import Name
from cachedb.operations.pull_source import Source
from tests.conftest import Run, run_python
from tests.disk.test_locks import wait_until
from tests.operations.test_pull import (
    ARM,
    FIRST,
    LARGE,
    ODD,
    SECOND,
    assert_is_stored,
    take_downloaded_digests,
    take_requests,
)
from tests.support import make
from tests.support.faults import Do, answer, change_answer, corrupt_body
from tests.support.promises import check
from tests.support.registries import Registry, isolate_client  # noqa: F401 - isolate_client is a fixture
from tests.transports.registry.test_credentials import has_ended, is_written

LAYER = Digest(make.digest_of(LARGE.layers[0]))


@pytest.fixture
def remote() -> Iterator[Registry]:
    with Registry() as registry:
        registry.add(FIRST, "app", "1")
        registry.add(SECOND, "app", "2")
        registry.add(LARGE, "large", "1")
        yield registry


@pytest.fixture
def closed_cache(directory: Path) -> Path:
    """Make a cache that no process has open."""
    Cache.open(directory).close()
    return directory


def run_early_downloads(directory: Path, name: str, **options: str) -> Source:
    """Return a source whose thread has finished."""
    source = Source(directory, Name.parse(name), **options)  # type: ignore[arg-type]
    source.begin()
    assert source._thread is not None
    source._thread.join(60)
    return source


def list_downloaded(directory: Path) -> set[str]:
    return {path.name.replace("-", ":") for path in directory.glob("ingest/partial/*")}


def test_blobs_are_downloaded_once_before_the_cache_is_open(closed_cache: Path, remote: Registry) -> None:
    name = f"{remote.host}/large:1"
    with run_early_downloads(closed_cache, name) as source:
        assert list_downloaded(closed_cache) == LARGE.blobs.keys() - {LARGE.digest}
        with Cache.open(closed_cache) as cache:
            pulled = cache.pull(source)
            assert (pulled.blobs, pulled.image.digest) == (2, LARGE.digest)
            assert_is_stored(cache, name, LARGE)
    requests = sorted((method, path.rpartition("/")[0]) for method, path in take_requests(remote))
    assert requests == [
        ("GET", "large/blobs"),
        ("GET", "large/blobs"),
        ("GET", "large/manifests"),
        ("HEAD", "large/manifests"),
    ]
    assert list_downloaded(closed_cache) == set()
    check(closed_cache)


def test_the_command_sends_each_request_once(closed_cache: Path, remote: Registry, cachedb: Run) -> None:
    for tag, image in (("1", FIRST), ("2", SECOND), ("2", SECOND)):
        done = cachedb("pull", "-q", f"{remote.host}/app:{tag}")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{remote.host}/app:{tag}\n", "")
        with Cache.open(closed_cache) as cache:
            assert_is_stored(cache, f"{remote.host}/app:{tag}", image)
    found = take_requests(remote)
    assert len(found) == len(set(found)) + 1
    assert found[-1] == ("HEAD", "app/manifests/2")  # the tag has not moved


@pytest.mark.slow
def test_the_command_continues_its_early_downloads(closed_cache: Path, remote: Registry, cachedb: Run) -> None:
    layer = make.digest_of(FIRST.layers[0])
    remote.fault(change_answer(delay=1.5), method="GET", path=layer)  # longer than it takes to open the cache
    assert cachedb("pull", f"{remote.host}/app:1").returncode == 0
    assert take_downloaded_digests(remote).count(layer) == 1
    with Cache.open(closed_cache) as cache:
        assert_is_stored(cache, f"{remote.host}/app:1", FIRST)


@pytest.mark.slow
def test_many_images_are_pulled_with_few_open_files(closed_cache: Path, remote: Registry) -> None:
    for tag in range(60):
        remote.add(FIRST, "many", str(tag))
    names = [f"{remote.host}/many:{tag}" for tag in range(60)]
    output = run_python(
        """
        import resource, sys
        from cachedb.cli.main import main
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        sys.argv[1:] = ["--dir", sys.argv[1], "pull", "-q", *sys.argv[2:]]
        main()
        """,
        closed_cache,
        *names,
    )
    assert output.splitlines() == names


def test_no_early_download_begins_without_a_cache(directory: Path, remote: Registry) -> None:
    with Source(directory, Name.parse(f"{remote.host}/app:1")) as source:
        source.begin()
        assert source._thread is None
    assert (take_requests(remote), directory.exists()) == ([], False)


def test_an_invalid_directory_gives_the_same_error_as_in_any_command(cachedb: Run, remote: Registry) -> None:
    name = "x" * 300
    pulled = cachedb("--dir", name, "pull", f"{remote.host}/app:1")
    assert (pulled.returncode, pulled.stderr) == (1, cachedb("--dir", name, "ls").stderr)


def test_stored_blobs_are_not_requested(closed_cache: Path, remote: Registry) -> None:
    with Cache.open(closed_cache) as cache:
        cache.pull(f"{remote.host}/app:1")
    take_requests(remote)
    run_early_downloads(closed_cache, f"{remote.host}/app:1").__exit__(None, None, None)
    assert take_requests(remote) == [("HEAD", "app/manifests/1")]
    run_early_downloads(closed_cache, f"{remote.host}/app@{FIRST.digest}").__exit__(None, None, None)
    assert take_requests(remote) == []
    run_early_downloads(closed_cache, f"{remote.host}/app:2").__exit__(None, None, None)
    assert set(take_downloaded_digests(remote)) == SECOND.blobs.keys() - FIRST.blobs.keys() - {SECOND.digest}


def test_only_the_chosen_platform_of_an_index_is_downloaded(closed_cache: Path, remote: Registry) -> None:
    children = FIRST, ARM, ODD
    platforms = [{"os": "linux", "architecture": name} for name in ("amd64", "arm64", "riscv64")]
    remote.add_index(make.index(*children, platforms=platforms), "several", "1", children)
    name = f"{remote.host}/several:1"
    with run_early_downloads(closed_cache, name, platform="linux/arm64") as source:
        assert list_downloaded(closed_cache) == ARM.blobs.keys() - {ARM.digest}
        with Cache.open(closed_cache) as cache:
            assert cache.pull(source, platform="linux/arm64").image.complete
    found = take_requests(remote)
    assert len(found) == len(set(found))
    with (
        run_early_downloads(closed_cache, name, platform="linux/s390x") as source,
        Cache.open(closed_cache) as cache,
        pytest.raises(NotInCache, match="is not for platform 'linux/s390x'"),
    ):
        cache.pull(source, platform="linux/s390x")


def test_an_index_whose_manifests_exceed_the_memory_limit_is_refused(
    closed_cache: Path, remote: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = FIRST, ARM, ODD
    remote.add_index(make.index(*children), "several", "1", children)
    name = f"{remote.host}/several:1"
    monkeypatch.setattr("cachedb.operations.pull_source._MANIFEST_BYTES", len(FIRST.manifest) + len(ARM.manifest))
    message = r"the manifests of .* have more than \d+ bytes together"
    with Cache.open(closed_cache) as cache, pytest.raises(InvalidManifest, match=message):
        cache.pull(name, all_platforms=True)


def test_an_early_error_is_raised_without_a_second_request(closed_cache: Path, remote: Registry) -> None:
    remote.fault(answer(403), method="HEAD", times=9)
    with (
        run_early_downloads(closed_cache, f"{remote.host}/app:1") as source,
        Cache.open(closed_cache) as cache,
        pytest.raises(RegistryError, match="refuses"),
    ):
        cache.pull(source)
    assert len(take_requests(remote)) == 1
    assert list_downloaded(closed_cache) == set()


@pytest.mark.parametrize(("fault", "error"), [(answer(403), RegistryError), (corrupt_body(), DigestMismatch)])
def test_a_blob_that_failed_early_is_not_requested_again(
    closed_cache: Path, remote: Registry, fault: Do, error: type[CacheError]
) -> None:
    remote.fault(fault, path=LAYER, times=9)
    with (
        run_early_downloads(closed_cache, f"{remote.host}/large:1") as source,
        Cache.open(closed_cache) as cache,
        pytest.raises(error),
    ):
        cache.pull(source)
    assert take_downloaded_digests(remote).count(LAYER) == 1
    assert LAYER not in list_downloaded(closed_cache)
    check(closed_cache)


def test_a_download_with_a_second_hard_link_is_stored_as_a_copy(closed_cache: Path, remote: Registry) -> None:
    name = f"{remote.host}/large:1"
    with run_early_downloads(closed_cache, name) as source:
        # A killed process leaves such a link.
        os.link(partial_path(closed_cache, LAYER), closed_cache / "ingest" / "second")
        with Cache.open(closed_cache) as cache:
            cache.pull(source)
            assert_is_stored(cache, name, LARGE)
            assert cache.get_blob_path(LAYER).stat().st_nlink == 1
    (closed_cache / "ingest" / "second").unlink()
    check(closed_cache)


@pytest.mark.parametrize("content", [LARGE.layers[0][:-1] + b"!", LARGE.layers[0][:1000], None])
def test_a_download_that_was_changed_since_is_not_trusted(
    closed_cache: Path, remote: Registry, content: bytes | None
) -> None:
    name = f"{remote.host}/large:1"
    with run_early_downloads(closed_cache, name) as source:
        path = partial_path(closed_cache, LAYER)
        path.chmod(0o600)
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        with Cache.open(closed_cache) as cache:
            cache.pull(source)
            assert_is_stored(cache, name, LARGE)
    check(closed_cache)


def test_a_blob_that_is_being_downloaded_is_not_requested(closed_cache: Path, remote: Registry) -> None:
    with single_flight.claim_or_find(closed_cache, downloads.claim_key(LAYER), lambda: None):
        run_early_downloads(closed_cache, f"{remote.host}/large:1").__exit__(None, None, None)
    assert LAYER not in list_downloaded(closed_cache)
    assert LAYER not in take_downloaded_digests(remote)


def test_no_early_download_begins_while_the_name_is_being_pulled(closed_cache: Path, remote: Registry) -> None:
    name = f"{remote.host}/large:1"
    with Source(closed_cache, Name.parse(name)) as first, Source(closed_cache, Name.parse(name)) as second:
        first.begin()
        second.begin()
        assert second._thread is None
        with Cache.open(closed_cache) as cache:
            cache.pull(first)
            cache.pull(second)
    assert sorted(method for method, path in take_requests(remote) if "manifests" in path) == ["GET", "HEAD", "HEAD"]
    check(closed_cache)


def test_a_thread_does_not_wait_for_its_own_early_downloads(closed_cache: Path, remote: Registry) -> None:
    name = f"{remote.host}/large:1"
    with Source(closed_cache, Name.parse(name)) as source, Cache.open(closed_cache) as cache:
        source.begin()
        with pytest.raises(CacheError, match="this thread is already producing"):
            cache.pull(name)
        cache.pull(source)
        cache.pull(name)
    check(closed_cache)


def test_another_thread_may_release_the_claim(closed_cache: Path, remote: Registry) -> None:
    name = f"{remote.host}/large:1"
    with Cache.open(closed_cache) as cache, Source(closed_cache, Name.parse(name)) as source:
        source.begin()
        with ThreadPoolExecutor(1) as other:
            other.submit(cache.pull, source).result()
        cache.pull(name)


def test_a_blob_stored_meanwhile_is_not_downloaded(closed_cache: Path, remote: Registry) -> None:
    with Cache.open(closed_cache) as cache:
        cache.add_blob(LARGE.layers[0])
        run_early_downloads(closed_cache, f"{remote.host}/large:1").__exit__(None, None, None)
    assert LAYER not in take_downloaded_digests(remote)


def test_closing_a_source_stops_its_early_downloads(closed_cache: Path, remote: Registry) -> None:
    remote.fault(change_answer(drip=0.1), method="GET", path=LAYER)
    before = time.monotonic()
    with Source(closed_cache, Name.parse(f"{remote.host}/large:1")) as source:
        source.begin()
        while not partial_path(closed_cache, LAYER).exists():
            time.sleep(0.01)
    assert time.monotonic() - before < 20
    assert not source._thread or not source._thread.is_alive()


def test_on_a_full_disk_early_downloads_end_before_space_is_freed(
    closed_cache: Path, remote: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A running download would keep writing to its unlinked file, so its space would not be free."""
    remote.fault(change_answer(drip=0.1), method="GET", path=LAYER)
    sweep, alive = downloads.remove_stale_downloads, []

    def fill(*_: object) -> None:
        raise StorageError("cannot write: No space left on device", errno=errno.ENOSPC)

    with Source(closed_cache, Name.parse(f"{remote.host}/large:1")) as source, Cache.open(closed_cache) as cache:
        source.begin()
        thread = source._thread
        assert thread is not None
        while not partial_path(closed_cache, LAYER).exists():
            time.sleep(0.01)

        def watch(folders: Folders, *, age: float) -> bool:
            alive.append(thread.is_alive())
            return sweep(folders, age=age)

        monkeypatch.setattr(threads, "_STOP_SECONDS", 60)  # a slow disk must not make the test fail
        monkeypatch.setattr(publish, "receive_and_save", fill)
        monkeypatch.setattr(downloads, "remove_stale_downloads", watch)
        with pytest.raises(StorageError, match="No space left"):
            cache.pull(source)
    assert alive[0] is False
    assert not list_downloaded(closed_cache)


def test_if_missing_sends_no_request_for_a_stored_image(closed_cache: Path, remote: Registry, cachedb: Run) -> None:
    assert cachedb("pull", "--if-missing", f"{remote.host}/app:1").returncode == 0
    assert take_requests(remote)
    assert cachedb("pull", "--if-missing", f"{remote.host}/app:1").returncode == 0
    assert take_requests(remote) == []


@pytest.fixture
def unreachable() -> Iterator[str]:
    """Listen on a port that neither accepts nor refuses connections; yield its address."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=0)) as server, ExitStack() as stack:
        for _ in range(3):  # enough to fill the backlog
            connection = stack.enter_context(closing(socket.socket()))
            connection.setblocking(False)
            connection.connect_ex(server.getsockname())
        yield f"127.0.0.1:{server.getsockname()[1]}"


def count_connecting(host: str) -> int:
    """Return how many connections to a host wait for its answer."""
    waiting = f":{int(host.rpartition(':')[2]):04X} 02 "
    return Path("/proc/net/tcp").read_text().count(waiting)


@pytest.mark.parametrize("what", ["a host", "a helper"])
def test_an_interrupt_waits_neither_for_a_host_nor_for_a_credential_helper(
    closed_cache: Path, unreachable: str, tmp_path: Path, what: str
) -> None:
    pid = tmp_path / "pid"
    with Registry(auth="basic") as remote:
        host = unreachable if what == "a host" else remote.host
        others = count_connecting(unreachable)
        (tmp_path / "auth.json").write_text(json.dumps({"credsStore": "slow"}))
        (tmp_path / "docker-credential-slow").write_text(f"#!/bin/sh\necho $$ > {pid}; exec sleep 25\n")
        (tmp_path / "docker-credential-slow").chmod(0o755)
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "cachedb",
                "--dir",
                closed_cache,
                "pull",
                "--authfile",
                tmp_path / "auth.json",
                f"{host}/a",
            ],
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
            stderr=subprocess.PIPE,
            text=True,
            # A background job of a shell ignores SIGINT, and the tests may run in one.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        if what == "a host":
            assert wait_until(lambda: count_connecting(unreachable) > others, 60)
        else:
            assert wait_until(lambda: is_written(pid), 60)
        before = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert time.monotonic() - before < 8, "the pull waited for the host (10 s) or the helper (25 s)"
    assert (process.returncode, stderr.strip()) == (130, "cachedb: interrupted")
    assert what == "a host" or has_ended(int(pid.read_text()))


def test_an_interrupt_before_the_thread_runs_is_raised_unchanged(
    closed_cache: Path, remote: Registry, interrupted_start: None
) -> None:
    with pytest.raises(KeyboardInterrupt), Source(closed_cache, Name.parse(f"{remote.host}/large:1")) as source:
        source.begin()


def test_a_pull_resumes_an_early_download_of_a_killed_process(closed_cache: Path, remote: Registry) -> None:
    name = f"{remote.host}/large:1"
    code = f"""if True:
        import os, pathlib, time
        from cachedb.disk.layout import partial_path
        from cachedb.oci.names import Name
        from cachedb.operations.pull_source import Source
        directory = pathlib.Path({str(closed_cache)!r})
        Source(directory, Name.parse({name!r})).begin()
        path = partial_path(directory, {LAYER!r})
        while not path.exists() or path.stat().st_size < 1_500_000:
            time.sleep(0.001)
        os.kill(os.getpid(), 9)
        """
    remote.fault(change_answer(cut=2_000_000), method="GET", path=LAYER)  # then the download waits before it retries
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == -9
    with Cache.open(closed_cache) as cache:
        cache.pull(name)
        assert_is_stored(cache, name, LARGE)
    request = [request for request in remote.requests if request.path.endswith(LAYER)][-1]
    assert int(request.headers["range"].removeprefix("bytes=").removesuffix("-")) >= 1_500_000
    check(closed_cache)


def test_early_downloads_do_not_import_sqlalchemy() -> None:
    imports = "import sys, cachedb.cli.main, cachedb.operations.pull_source"
    code = f"{imports}; print([name for name in sys.modules if name == 'sqlalchemy'])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env={**os.environ})
    assert done.stdout == "[]\n"
