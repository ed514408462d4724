"""Pulling: which blobs are downloaded, which requests are sent, and what happens when a registry fails."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from urllib3.exceptions import SSLError

from cachedb import (
    Cache,
    CacheError,
    DigestMismatch,
    ImageInfo,
    InvalidManifest,
    InvalidName,
    NotInCache,
    RegistryError,
    RegistryUnavailable,
    StorageError,
)
from cachedb.disk import downloads
from cachedb.disk.writer import receive
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import OCI_INDEX
from cachedb.oci.names import Name
from cachedb.operations.pull import _Pull
from cachedb.text import format_size, shorten_digest
from cachedb.transports.registry import download, places, source, tls
from tests.conftest import Run, run_python
from tests.support import make
from tests.support.ages import age
from tests.support.faults import (
    Answer,
    Call,
    Do,
    answer,
    answer_endlessly,
    answer_html,
    change_answer,
    closed,
    corrupt_body,
    ignore_part,
    redirect,
    retry_later,
)
from tests.support.index_file import change_index
from tests.support.make import write_bytes
from tests.support.promises import check
from tests.support.registries import (  # noqa: F401 - isolate_client is a fixture
    HTPASSWD,
    PASSWORD,
    REFRESH_TOKEN,
    SKIPPED_PAUSE_SECONDS,
    USER,
    Registry,
    certificate,
    docker_registry,
    isolate_client,
)
from tests.support.waiting import wait_until
from tests.transports.registry.test_credentials import has_ended, is_written

FIRST = make.image(1, 2, compression="gzip")
SECOND = make.image(1, 3, compression="gzip")  # shares a layer with the first
LARGE = make.image(4, size=3_000_000)
ARM = make.image(1, 5, architecture="arm64")
FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
ODD = make.image(6, architecture="riscv64")

pytestmark = pytest.mark.usefixtures("check_promises")


@pytest.fixture
def remote() -> Iterator[Registry]:
    with Registry() as made:
        made.add(FIRST, "app", "1")
        made.add(SECOND, "app", "2")
        made.add(LARGE, "large", "1")
        yield made


def take_requests(remote: Registry) -> list[tuple[str, str]]:
    """Return and clear the requests that the registry got, without `/v2/`."""
    found = [(request.method, request.path.removeprefix("/v2/")) for request in remote.requests]
    remote.requests.clear()
    return found


def take_downloaded_digests(remote: Registry) -> list[str]:
    return [path.rpartition("/")[2] for method, path in take_requests(remote) if method == "GET" and "/blobs/" in path]


def assert_is_stored(cache: Cache, name: str, image: make.ImageContent) -> None:
    assert cache.is_image_complete(name)
    assert cache.get_manifest(name) == image.manifest
    for digest, data in image.blobs.items():
        assert cache.get_blob(digest) == data


# Downloads and requests


def test_a_complete_image_is_pulled_under_the_given_name(cache: Cache, remote: Registry) -> None:
    pulled = cache.pull(f"{remote.host}/app:1")
    assert str(pulled.image.name) == f"{remote.host}/app:1"
    assert (pulled.image.digest, pulled.image.complete, pulled.stale) == (FIRST.digest, True, None)
    assert_is_stored(cache, f"{remote.host}/app:1", FIRST)


def test_names_of_skopeo_and_hosts_in_upper_case_are_accepted(cache: Cache, remote: Registry) -> None:
    port = remote.host.partition(":")[2]
    assert cache.pull(f"docker://LOCALHOST:{port}/app:1").image.name == f"localhost:{port}/app:1"
    pushed = cache.push(f"LOCALHOST:{port}/app:1", f"docker://LocalHost:{port}/copy:1")
    assert pushed.name == f"localhost:{port}/copy:1"
    (tag,) = cache.push_tags(f"LOCALHOST:{port}/app", f"docker://LOCALHOST:{port}/tags")
    assert tag.name == f"localhost:{port}/tags:1"
    with pytest.raises(InvalidName):
        cache.export(f"docker://localhost:{port}/app:1", "unused")


def test_a_tag_that_has_not_moved_costs_one_request(cache: Cache, remote: Registry) -> None:
    cache.pull(f"{remote.host}/app:1")
    take_requests(remote)
    pulled = cache.pull(f"{remote.host}/app:1")
    assert take_requests(remote) == [("HEAD", "app/manifests/1")]
    assert (pulled.blobs, pulled.bytes, pulled.image.digest) == (0, 0, FIRST.digest)


def test_a_tag_that_has_moved_is_followed(cache: Cache, remote: Registry) -> None:
    cache.pull(f"{remote.host}/app:1")
    remote.add(SECOND, "app", "1")
    cache.pull(f"{remote.host}/app:1")
    assert_is_stored(cache, f"{remote.host}/app:1", SECOND)


def test_only_missing_blobs_are_downloaded(cache: Cache, remote: Registry) -> None:
    cache.pull(f"{remote.host}/app:1")
    take_requests(remote)
    pulled = cache.pull(f"{remote.host}/app:2")
    new = SECOND.blobs.keys() - FIRST.blobs.keys() - {SECOND.digest}
    assert sorted(take_downloaded_digests(remote)) == sorted(new)
    assert (pulled.blobs, pulled.bytes) == (len(new), sum(len(SECOND.blobs[digest]) for digest in new))


def test_a_stored_image_named_by_digest_costs_no_request(cache: Cache, remote: Registry) -> None:
    name = f"{remote.host}/app@{FIRST.digest}"
    cache.pull(name)
    assert_is_stored(cache, name, FIRST)
    take_requests(remote)
    cache.pull(name)
    assert take_requests(remote) == []


def test_if_missing_sends_no_request_for_a_complete_image(cache: Cache, remote: Registry) -> None:
    cache.pull(f"{remote.host}/app:1", if_missing=True)
    remote.add(SECOND, "app", "1")
    take_requests(remote)
    assert cache.pull(f"{remote.host}/app:1", if_missing=True).image.digest == FIRST.digest
    assert take_requests(remote) == []


def test_an_incomplete_image_is_completed(cache: Cache, remote: Registry) -> None:
    name = f"{remote.host}/app:1"
    cache.save_manifest(name, FIRST.manifest)
    assert not cache.is_image_complete(name)
    cache.pull(name, if_missing=True)
    assert_is_stored(cache, name, FIRST)


@pytest.mark.parametrize("status", [400, 403, 404, 405, 429, 500, 501])
def test_a_registry_that_refuses_head_is_asked_by_get(cache: Cache, remote: Registry, status: int) -> None:
    name = f"{remote.host}/app:1"
    remote.fault(answer(status), method="HEAD", times=99)
    cache.pull(name)
    assert_is_stored(cache, name, FIRST)
    asked = [request for request in take_requests(remote) if "/manifests/" in request[1]]
    assert asked == [("HEAD", "app/manifests/1"), ("GET", "app/manifests/1")]
    pulled = cache.pull(name)
    assert (pulled.blobs, pulled.image.digest) == (0, FIRST.digest)
    assert take_requests(remote) == [("HEAD", "app/manifests/1"), ("GET", "app/manifests/1")]
    assert SKIPPED_PAUSE_SECONDS == []


def test_the_manifest_is_downloaded_from_a_registry_that_returns_no_digest(cache: Cache, remote: Registry) -> None:
    remote.fault(answer(405), method="HEAD", times=9)
    for _ in range(2):
        cache.pull(f"{remote.host}/app:1")
        assert_is_stored(cache, f"{remote.host}/app:1", FIRST)


# Platforms


@pytest.fixture
def several(remote: Registry, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    children = FIRST, ARM, ODD
    platforms = [{"os": "linux", "architecture": name} for name in ("amd64", "arm64", "riscv64")]
    remote.add_index(make.index(*children, platforms=platforms), "several", "1", children)
    return f"{remote.host}/several:1"


def test_the_hosts_platform_is_pulled_and_the_index_is_kept(cache: Cache, several: str) -> None:
    pulled = cache.pull(several)
    assert pulled.image.complete
    assert pulled.image.architecture == "amd64"
    digests = {blob.digest for blob in cache.get_image_blobs(several)}
    assert digests == {pulled.image.digest, *FIRST.blobs}
    assert cache.verify().problems == []


def test_another_platform_is_added_to_the_stored_ones(cache: Cache, several: str, remote: Registry) -> None:
    index = cache.pull(several).image.digest
    take_requests(remote)
    assert cache.pull(several, platform="linux/arm64").image.complete
    assert set(take_downloaded_digests(remote)) == ARM.blobs.keys() - FIRST.blobs.keys() - {ARM.digest}
    digests = {blob.digest for blob in cache.get_image_blobs(several)}
    assert digests == {index, *FIRST.blobs, *ARM.blobs}
    cache.pull(several)
    cache.pull(several, platform="linux/arm64/v8")
    assert take_requests(remote) == [("HEAD", "several/manifests/1")] * 2
    cache.tag(several, "mine:1")
    assert {blob.digest for blob in cache.get_image_blobs("mine:1")} == digests
    assert cache.verify().problems == []


def test_all_platforms_are_pulled_if_asked_for(cache: Cache, several: str) -> None:
    cache.pull(several)
    pulled = cache.pull(several, all_platforms=True)
    assert pulled.image.complete
    digests = {blob.digest for blob in cache.get_image_blobs(several)}
    assert digests == {pulled.image.digest, *FIRST.blobs, *ARM.blobs, *ODD.blobs}


def test_the_hosts_platform_of_an_index_of_indexes_is_pulled(
    cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    inner = [
        make.index(child, platforms=[{"os": "linux", "architecture": architecture}])
        for child, architecture in ((ARM, "arm64"), (FIRST, "amd64"))
    ]
    entries = [make.descriptor(data, OCI_INDEX) for data in inner]
    outer = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
    for child in (FIRST, ARM):
        remote.add(child, "nested")
    for data in inner:
        remote.add_manifest(data, "nested")
    name = f"{remote.host}/nested:1"
    remote.add_manifest(outer, "nested", "1")
    pulled = cache.pull(name)
    assert pulled.image.complete
    wanted = {make.digest_of(outer), make.digest_of(inner[1]), *FIRST.blobs}
    assert {blob.digest for blob in cache.get_image_blobs(name)} == wanted
    assert cache.get_stats().blob_count == len(wanted), "the other index is not stored"
    take_requests(remote)
    assert cache.pull(name, if_missing=True).up_to_date
    assert take_requests(remote) == []
    assert cache.inspect_remote(name).manifest == FIRST.digest
    with pytest.raises(NotInCache, match="not for platform 'linux/s390x', but for linux/amd64, linux/arm64"):
        cache.pull(name, platform="linux/s390x")


def test_the_error_of_an_unknown_platform_names_the_known_ones(cache: Cache, several: str) -> None:
    with pytest.raises(NotInCache, match=r"not for platform 'linux/s390x', but for linux/amd64, linux/arm64, linux/r"):
        cache.pull(several, platform="linux/s390x")
    assert cache.list_manifests() == []


def test_a_manifest_stored_later_adds_no_platform(cache: Cache, several: str) -> None:
    cache.pull(several)
    before = cache.get_image_blobs(several)
    cache.add_blob(ARM.manifest)
    assert cache.get_image_blobs(several) == before


def test_a_repair_adds_no_platform(cache: Cache, several: str) -> None:
    cache.pull(several)
    before = cache.get_image_blobs(several)
    change_index(cache.directory, "UPDATE image_blobs SET role = 'other' WHERE position = 2")
    assert [problem.kind for problem in cache.verify(repair=True).problems] == ["index"]
    assert cache.get_image_blobs(several) == before


def test_the_error_of_a_platform_that_is_not_stored_says_to_pull_it(cache: Cache, several: str, tmp_path: Path) -> None:
    cache.pull(several, platform="linux/arm64")
    advice = "for platform 'linux/amd64' is not in the cache: pull it with --platform"
    with pytest.raises(NotInCache, match=advice):
        cache.push(several, platform="linux/amd64")
    with pytest.raises(NotInCache, match=advice):
        cache.export(several, tmp_path / "app.tar", format="docker", platform="linux/amd64")
    with pytest.raises(NotInCache, match="is not for platform 'linux/s390x', but for linux/arm64"):
        cache.push(several, platform="linux/s390x")


@pytest.mark.slow
def test_an_export_lists_only_the_stored_platforms(cache: Cache, several: str, tmp_path: Path) -> None:
    cache.pull(several)
    cache.export(several, tmp_path / "layout", format="oci-dir")
    cache.export(several, tmp_path / "image.tar")
    with Cache.open(tmp_path / "other") as other:
        for source in ("layout", "image.tar"):
            (image,) = other.cache_from_tar(tmp_path / source, f"{source.partition('.')[0]}:1")
            assert image.complete
            assert {blob.digest for blob in other.get_image_blobs(str(image.name))} == {image.digest, *FIRST.blobs}
    cache.pull(several, all_platforms=True)
    cache.export(several, tmp_path / "all", format="oci-dir")
    index = json.loads((tmp_path / "all" / "index.json").read_bytes())
    assert index["manifests"][0]["digest"] == cache.get_image(several).digest


# Foreign layers


def make_windows_image(*urls: str, media_type: str = FOREIGN) -> make.ImageContent:
    """Make an image whose first layer may be at other URLs only."""
    manifest = json.loads(FIRST.manifest)
    manifest["layers"][0] |= {"mediaType": media_type, "urls": list(urls)}
    return make.ImageContent(json.dumps(manifest).encode(), FIRST.config, FIRST.layers)


def add_without_first_layer(remote: Registry, image: make.ImageContent, *, index: bool) -> str:
    name = remote.add_index(make.index(image), "win", "1", [image]) if index else remote.add(image, "win", "1")
    del remote.blobs["win", make.digest_of(image.layers[0])]
    return name


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("media_type", [FOREIGN, "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"])
def test_foreign_layers_are_left_out_unless_they_are_wanted(
    cache: Cache, remote: Registry, tmp_path: Path, media_type: str, index: bool
) -> None:
    with Registry() as other:
        layer = make.digest_of(FIRST.layers[0])
        other.blobs["base", layer] = FIRST.layers[0]
        url = f"{other.url}/v2/base/blobs/{layer}"
        image = make_windows_image("file:///etc/passwd", f"{other.url}/nothing", url, media_type=media_type)
        name = add_without_first_layer(remote, image, index=index)
        pulled = cache.pull(name)
        assert (pulled.image.complete, pulled.left_out, other.requests) == (True, 1, [])
        assert layer not in {blob.digest for blob in cache.get_image_blobs(name)}
        assert all(child.complete for child in cache.get_platforms(name))
        take_requests(remote)
        assert cache.pull(name, if_missing=True).up_to_date
        assert take_requests(remote) == []
        assert cache.pull(name).up_to_date
        assert cache.plan_pull(name, foreign_layers=True).bytes == len(FIRST.layers[0])
        pulled = cache.pull(name, foreign_layers=True)
        assert (pulled.blobs, pulled.left_out) == (1, 0)
        assert cache.get_blob(layer) == FIRST.layers[0]
        assert layer in {blob.digest for blob in cache.get_image_blobs(name)}
        assert [request.path for request in other.requests] == ["/nothing", f"/v2/base/blobs/{layer}"]
        assert SKIPPED_PAUSE_SECONDS == []
        assert cache.pull(name).up_to_date
        assert cache.pull(name, foreign_layers=True).up_to_date


def test_a_foreign_layer_that_the_registry_has_is_pulled(cache: Cache, remote: Registry) -> None:
    image = make_windows_image("http://127.0.0.1:1/unused")
    pulled = cache.pull(remote.add(image, "win", "1"))
    assert (pulled.left_out, pulled.blobs) == (0, len(FIRST.layers) + 1)
    assert_is_stored(cache, f"{remote.host}/win:1", image)


def test_a_foreign_layer_is_verified(cache: Cache, remote: Registry) -> None:
    with Registry() as other:
        other.fault(answer(200, body=b"x" * len(FIRST.layers[0])), times=9)
        name = add_without_first_layer(remote, make_windows_image(f"{other.url}/layer"), index=False)
        with pytest.raises(DigestMismatch):
            cache.pull(name, foreign_layers=True)
    assert cache.list_manifests() == []


def test_a_foreign_layer_that_no_url_has_is_an_error(cache: Cache, remote: Registry) -> None:
    with Registry() as other:
        name = add_without_first_layer(
            remote, make_windows_image(f"{other.url}/nothing", f"{other.url}/neither"), index=False
        )
        with pytest.raises(RegistryError, match="none of its 2 URLs has it: pull without --foreign-layers"):
            cache.pull(name, foreign_layers=True)
    assert cache.list_manifests() == []


def test_the_urls_of_a_layer_that_is_not_foreign_are_not_used(cache: Cache, remote: Registry) -> None:
    with Registry() as other:
        layer_type = json.loads(FIRST.manifest)["layers"][0]["mediaType"]
        image = make_windows_image(f"{other.url}/layer", media_type=layer_type)
        name = add_without_first_layer(remote, image, index=False)
        with pytest.raises(RegistryError, match="has no blob"):
            cache.pull(name, foreign_layers=True)
        assert other.requests == []


# Interrupted downloads


def test_a_pull_returns_how_much_an_interrupted_one_had_left(cache: Cache, remote: Registry) -> None:
    write_partial(cache, LARGE.layers[0], LARGE.layers[0][:1_000_000])
    pulled = cache.pull(f"{remote.host}/large:1")
    assert (pulled.resumed, pulled.up_to_date) == (1_000_000, False)
    assert pulled.bytes == sum(len(data) for data in (LARGE.config, *LARGE.layers))
    assert (cache.pull(f"{remote.host}/large:1").resumed, cache.pull(f"{remote.host}/large:1").up_to_date) == (0, True)
    cache.remove_manifest(f"{remote.host}/large:1")
    cache.collect_garbage()
    write_partial(cache, LARGE.layers[0], LARGE.layers[0][:1_000_000])
    remote.fault(ignore_part(header="range"), method="GET", path=make.digest_of(LARGE.layers[0]))
    assert cache.pull(f"{remote.host}/large:1").resumed == 0


def test_an_interrupted_download_resumes(cache: Cache, remote: Registry) -> None:
    layer = make.digest_of(LARGE.layers[0])
    remote.fault(change_answer(cut=1_000_000), method="GET", path=layer)
    cache.pull(f"{remote.host}/large:1")
    assert_is_stored(cache, f"{remote.host}/large:1", LARGE)
    first, second = (request for request in remote.requests if request.path.endswith(layer))
    assert "range" not in first.headers
    assert second.headers["range"].startswith("bytes=")
    assert second.headers["range"] != "bytes=0-"


@pytest.mark.slow
def test_a_pull_resumes_the_download_of_a_killed_one(directory: Path, remote: Registry) -> None:
    name, layer = f"{remote.host}/large:1", make.digest_of(LARGE.layers[0])
    code = (
        "import os, sys; from cachedb import Cache\n"
        "def progress(done, total):\n"
        "    if done > 1_500_000: os.kill(os.getpid(), 9)\n"
        f"Cache.open({str(directory)!r}).pull({name!r}, progress=progress)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    take_requests(remote)
    with Cache.open(directory) as cache:
        assert cache.list_manifests() == []
        assert cache.collect_garbage().blobs < 3  # it keeps partial downloads
        cache.pull(name)
        assert_is_stored(cache, name, LARGE)
    (request,) = (request for request in remote.requests if request.path.endswith(layer))
    assert int(request.headers["range"].removeprefix("bytes=").removesuffix("-")) > 1_000_000
    check(directory)


@pytest.mark.slow
def test_a_layer_that_a_killed_pull_had_downloaded_is_not_downloaded_again(directory: Path, remote: Registry) -> None:
    name, layer = f"{remote.host}/large:1", make.digest_of(LARGE.layers[0])
    code = (
        "import os, time; from cachedb import Cache; from cachedb.content import publish\n"
        f"die = lambda *it: os.kill(os.getpid(), 9) if it[2][0].digest == {layer!r} else time.sleep(60)\n"
        "publish.publish = die\n"
        f"Cache.open({str(directory)!r}).pull({name!r})"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    take_requests(remote)
    with Cache.open(directory) as cache:
        cache.pull(name)
        assert_is_stored(cache, name, LARGE)
    assert layer not in take_downloaded_digests(remote)
    assert list(directory.glob("ingest/partial/*")) == []
    check(directory)


@pytest.mark.slow
def test_a_partial_download_that_is_a_link_to_a_blob_is_not_written_to(cache: Cache, remote: Registry) -> None:
    cache.pull(f"{remote.host}/large:1")
    data = LARGE.layers[0]
    left, stored = write_partial(cache, data, b""), cache.get_blob_path(make.digest_of(data))
    left.unlink()
    os.link(stored, left)
    change_index(cache.directory, f"UPDATE blobs SET stored_at = NULL WHERE digest = '{make.digest_of(data)}'")
    stored.chmod(0o600)
    stored.write_bytes(data[:1000])
    before = stored.stat().st_ino
    cache.pull(f"{remote.host}/large:1")
    assert_is_stored(cache, f"{remote.host}/large:1", LARGE)
    assert stored.stat().st_ino != before


def write_partial(cache: Cache, data: bytes, content: bytes) -> Path:
    path = cache.directory / "ingest" / "partial" / make.digest_of(data).replace(":", "-")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("content", [b"x" * 1000, LARGE.layers[0][:-1] + b"!", LARGE.layers[0] + b"!", LARGE.layers[0]])
def test_a_partial_download_is_not_trusted(cache: Cache, remote: Registry, content: bytes) -> None:
    path = write_partial(cache, LARGE.layers[0], content)
    cache.pull(f"{remote.host}/large:1")
    assert_is_stored(cache, f"{remote.host}/large:1", LARGE)
    assert not path.exists()


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "fifo"])
def test_a_file_put_in_the_place_of_a_download_is_not_written_to(
    cache: Cache, remote: Registry, tmp_path: Path, kind: str
) -> None:
    precious = write_bytes(tmp_path / "precious", b"mine")
    precious.chmod(0o640)
    path = write_partial(cache, LARGE.layers[0], b"")
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "hard link":
        path.hardlink_to(precious)
    else:
        path.symlink_to(precious if kind == "link" else tmp_path / "new")
    cache.pull(f"{remote.host}/large:1")
    assert_is_stored(cache, f"{remote.host}/large:1", LARGE)
    assert precious.read_bytes() == b"mine"
    assert stat.S_IMODE(precious.stat().st_mode) == 0o640
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["link", "hard link", "fifo"])
def test_a_file_put_in_place_at_the_last_moment_is_not_written_to(tmp_path: Path, kind: str) -> None:
    precious = write_bytes(tmp_path / "precious", b"mine")
    precious.chmod(0o640)
    path = tmp_path / "partial"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "hard link":
        path.hardlink_to(precious)
    else:
        path.symlink_to(precious)
    with pytest.raises(StorageError, match=r"another program has put a file|symbolic links"):
        receive(io.BytesIO(b"data"), path, digest=Digest(make.digest_of(b"data")), size=4, resume=True)
    assert precious.read_bytes() == b"mine"
    assert stat.S_IMODE(precious.stat().st_mode) == 0o640


def test_a_download_goes_to_the_folder_that_was_opened(
    cache: Cache, remote: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A symbolic link that replaces the folder during the download is not followed."""
    elsewhere, folder = tmp_path / "elsewhere", cache.directory / "ingest" / "partial"
    elsewhere.mkdir()
    begun = downloads.find_resumable_bytes

    def replace_folder_and_begin(descriptor: int, name: str, size: int) -> int:
        if not folder.is_symlink():
            folder.rename(tmp_path / "moved")
            folder.symlink_to(elsewhere)
            write_bytes(elsewhere / name, b"mine")
        return begun(descriptor, name, size)

    monkeypatch.setattr("cachedb.operations.pull._PARALLEL_DOWNLOADS", 1)  # else another could make the folder again
    monkeypatch.setattr(downloads, "find_resumable_bytes", replace_folder_and_begin)
    with pytest.raises(CacheError):
        cache.pull(f"{remote.host}/large:1")
    assert {path.read_bytes() for path in elsewhere.iterdir()} == {b"mine"}
    folder.unlink()


def test_a_partial_download_older_than_a_day_is_collected(cache: Cache) -> None:
    old, new = write_partial(cache, b"old", b"o"), write_partial(cache, b"new", b"n")
    os.utime(old, (time.time() - 100_000,) * 2)
    cache.collect_garbage()
    assert (old.exists(), new.exists()) == (False, True)


def test_a_download_begins_again_at_a_registry_without_ranges(cache: Cache, remote: Registry) -> None:
    write_partial(cache, LARGE.layers[0], LARGE.layers[0][:1_000_000])
    remote.fault(ignore_part(header="range"), method="GET", path=make.digest_of(LARGE.layers[0]))
    cache.pull(f"{remote.host}/large:1")
    assert_is_stored(cache, f"{remote.host}/large:1", LARGE)


@pytest.mark.parametrize("status", [400, 403, 404, 406, 416, 500, 501, 503])
def test_a_download_begins_again_at_a_registry_that_refuses_ranges(cache: Cache, remote: Registry, status: int) -> None:
    """`crane registry serve` answers 416 to a range without an end."""
    layer = make.digest_of(LARGE.layers[0])
    write_partial(cache, LARGE.layers[0], LARGE.layers[0][:1_000_000])

    def refuse_ranges(call: Call) -> Answer:
        return Answer(status) if "range" in call.headers else call.serve()

    remote.fault(refuse_ranges, method="GET", path=layer, times=99)
    cache.pull(f"{remote.host}/large:1")
    assert_is_stored(cache, f"{remote.host}/large:1", LARGE)
    assert "range" not in [request for request in remote.requests if request.path.endswith(layer)][-1].headers


@pytest.mark.parametrize(
    ("start", "total"), [("0", 0), ("999999", 0), ("1000001", 0), ("1000000", 1), ("*", 0), ("", 0)]
)
def test_a_download_begins_again_after_an_answer_with_another_range(
    cache: Cache, remote: Registry, start: str, total: int
) -> None:
    layer, data = make.digest_of(LARGE.layers[0]), LARGE.layers[0]
    write_partial(cache, data, data[:1_000_000])
    range_ = f"bytes {start}-{len(data) - 1}/{len(data) + total}" if start else ""
    remote.fault(answer(206, {"Content-Range": range_}, b"x" * 10), method="GET", path=layer)
    cache.pull(f"{remote.host}/large:1")
    assert_is_stored(cache, f"{remote.host}/large:1", LARGE)
    asked = [request.headers.get("range") for request in remote.requests if request.path.endswith(layer)]
    assert asked == ["bytes=1000000-", None]


def test_a_download_resumes_if_the_registry_does_not_tell_the_total(cache: Cache, remote: Registry) -> None:
    layer, data = make.digest_of(LARGE.layers[0]), LARGE.layers[0]
    write_partial(cache, data, data[:1_000_000])
    headers = {"Content-Range": f"bytes 1000000-{len(data) - 1}/*"}
    remote.fault(answer(206, headers, data[1_000_000:]), method="GET", path=layer)
    cache.pull(f"{remote.host}/large:1")
    assert_is_stored(cache, f"{remote.host}/large:1", LARGE)
    assert remote.count("GET", layer) == 1


def test_a_range_for_the_whole_blob_is_checked(cache: Cache, remote: Registry) -> None:
    remote.fault(answer(206, {"Content-Range": "bytes 5-9/10"}), method="GET", path=make.digest_of(LARGE.layers[0]))
    with pytest.raises(RegistryError, match=r"sent another range of sha256:.* than requested"):
        cache.pull(f"{remote.host}/large:1")


def test_progress_ends_at_the_bytes_that_are_downloaded(cache: Cache, remote: Registry) -> None:
    write_partial(cache, LARGE.layers[0], LARGE.layers[0][:1_000_000])
    calls: list[tuple[int, int]] = []
    pulled = cache.pull(f"{remote.host}/large:1", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (pulled.bytes, pulled.bytes)


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="needs root: run as root to become another user")
def test_a_user_who_is_not_root_stores_a_complete_partial_download(remote: Registry) -> None:
    name, data = f"{remote.host}/large:1", LARGE.layers[0]
    code = f"""if True:
        import os
        # Import these while root can still read them.
        import alembic.command, encodings.ascii, encodings.idna
        import cachedb.operations.pull, cachedb.transports.registry.repository
        from cachedb import Cache
        from tests.operations.test_pull import LARGE, write_partial
        os.setuid(65534)
        with Cache.open("cache") as cache:
            write_partial(cache, LARGE.layers[0], LARGE.layers[0]).chmod(0o444)  # as a killed publication leaves it
            assert cache.pull({name!r}).image.complete
        """
    # Only their owner can read pytest's own folders.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)
    assert make.digest_of(data) not in take_downloaded_digests(remote)


# Concurrent pulls


@pytest.mark.slow
def test_downloaded_blobs_are_not_collected_before_their_image_is_saved(
    cache: Cache, remote: Registry, directory: Path
) -> None:
    many = make.image(*range(20, 32))
    name = remote.add(many, "many", "1")
    with Cache.open(directory) as other:
        cache.pull(name, progress=lambda done, total: other.collect_garbage() and None)
    assert_is_stored(cache, name, many)


@pytest.mark.slow
def test_processes_that_pull_one_image_download_it_once(directory: Path, remote: Registry) -> None:
    name = f"{remote.host}/large:1"
    code = f"from cachedb import Cache\nwith Cache.open({str(directory)!r}) as cache: cache.pull({name!r})"
    remote.fault(change_answer(delay=0.5), method="GET", path=make.digest_of(LARGE.layers[0]))
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(6)]
    assert [process.wait(60) for process in running] == [0] * 6
    found = take_downloaded_digests(remote)
    assert len(found) == len(set(found)) == 2
    with Cache.open(directory) as cache:
        assert_is_stored(cache, name, LARGE)


@pytest.mark.slow
def test_a_layer_shared_by_two_concurrent_pulls_is_downloaded_once(directory: Path, remote: Registry) -> None:
    shared = make.digest_of(FIRST.layers[0])
    remote.fault(change_answer(delay=0.5), method="GET", path=shared)
    with Cache.open(directory) as cache:
        threads = [threading.Thread(target=cache.pull, args=(f"{remote.host}/app:{tag}",)) for tag in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert_is_stored(cache, f"{remote.host}/app:1", FIRST)
        assert_is_stored(cache, f"{remote.host}/app:2", SECOND)
    assert take_downloaded_digests(remote).count(shared) == 1
    check(directory)


# Registries that fail or send wrong content


def assert_refused(cache: Cache, name: str, data: bytes, match: str) -> None:
    with pytest.raises(DigestMismatch, match=match):
        cache.pull(name)
    assert cache.list_manifests() == []
    assert not list(cache.directory.glob(f"ingest/partial/*{make.hex_of(data)}"))


def test_content_of_another_digest_is_refused(cache: Cache, remote: Registry) -> None:
    remote.fault(corrupt_body(), method="GET", path=make.digest_of(FIRST.layers[1]), times=9)
    assert_refused(cache, f"{remote.host}/app:1", FIRST.layers[1], "should have digest")


@pytest.mark.parametrize("chunked", [False, True])
def test_content_without_an_end_is_refused(cache: Cache, remote: Registry, chunked: bool) -> None:
    remote.fault(answer_endlessly(chunked=chunked), method="GET", path=make.digest_of(FIRST.layers[1]), times=9)
    assert_refused(cache, f"{remote.host}/app:1", FIRST.layers[1], "bytes, and has more")


def test_a_manifest_of_another_digest_is_refused(cache: Cache, remote: Registry) -> None:
    remote.fault(answer(405), method="HEAD", times=9)
    remote.fault(corrupt_body(30), method="GET", path="manifests", times=9)
    with pytest.raises((DigestMismatch, InvalidManifest)):
        cache.pull(f"{remote.host}/app:1")
    with pytest.raises(DigestMismatch, match=FIRST.digest):
        cache.pull(f"{remote.host}/app@{FIRST.digest}")


def test_a_manifest_of_many_megabytes_is_refused(cache: Cache, remote: Registry) -> None:
    remote.add_manifest(FIRST.manifest + b" " * 5_000_000, "app", "huge")
    with pytest.raises(RegistryError, match="over 4194304 bytes"):
        cache.pull(f"{remote.host}/app:huge")


def test_an_index_whose_manifests_exceed_the_memory_limit_is_refused(
    cache: Cache, several: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_MANIFEST_BYTES", len(FIRST.manifest) + len(ARM.manifest))
    with pytest.raises(InvalidManifest, match=r"the manifests of .* have more than \d+ bytes together"):
        cache.pull(several, all_platforms=True)


def test_an_image_that_the_registry_lacks_is_an_error(cache: Cache, remote: Registry) -> None:
    with pytest.raises(RegistryError, match=rf"{remote.host} has no app:9 \(404"):
        cache.pull(f"{remote.host}/app:9")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_temporary_failure_is_retried(cache: Cache, remote: Registry, status: int) -> None:
    remote.fault(retry_later(7, status), method="GET", times=2)
    cache.pull(f"{remote.host}/app:1")
    assert_is_stored(cache, f"{remote.host}/app:1", FIRST)
    assert len(SKIPPED_PAUSE_SECONDS) == 2
    assert min(SKIPPED_PAUSE_SECONDS) >= 7


def test_a_registry_that_asks_to_wait_an_hour_is_unavailable(cache: Cache, remote: Registry) -> None:
    remote.fault(retry_later(3600), path="/manifests/", times=9)
    with pytest.raises(RegistryUnavailable, match=r"overloaded, or failing \(429"):
        cache.pull(f"{remote.host}/app:1")
    assert SKIPPED_PAUSE_SECONDS == []


@pytest.mark.parametrize(
    ("status", "asked_for"),
    [(429, {"path": "/manifests/1"}), (503, {"path": "/blobs/"})],
    ids=["first request", "later request"],
)
def test_a_stale_image_is_returned_only_if_allowed(
    cache: Cache, remote: Registry, status: int, asked_for: dict[str, Any]
) -> None:
    name = f"{remote.host}/app:1"
    with pytest.raises(RegistryUnavailable):
        cache.pull("127.0.0.1:1/app:1", allow_stale=True)
    cache.pull(name)
    remote.add(LARGE, "app", "1")
    remote.fault(answer(status), **asked_for, times=99)
    with pytest.raises(RegistryUnavailable):
        cache.pull(name)
    pulled = cache.pull(name, allow_stale=True)
    assert str(status) in (pulled.stale or "")
    assert pulled.image.digest == FIRST.digest
    assert_is_stored(cache, name, FIRST)


@pytest.mark.parametrize("how", ["new", "moved", "up to date", "if missing", "stale"])
def test_each_pull_of_a_name_decides_anew_when_it_expires(cache: Cache, remote: Registry, how: str) -> None:
    name = f"{remote.host}/app:1"
    for ttl in (3600, 60, None):
        if how == "new":
            cache.remove_manifest(name, ignore_missing=True)
        elif how == "moved":
            remote.add(SECOND if ttl == 60 else FIRST, "app", "1")
        elif how == "stale" and ttl == 60:
            remote.fault(answer(503), times=99)
        before = datetime.now(UTC)
        image = cache.pull(name, ttl=ttl, if_missing=how == "if missing", allow_stale=how == "stale").image
        assert image == cache.get_image(name)
        if ttl is None:
            assert image.expires_at is None
        else:
            assert image.expires_at is not None
            assert before <= image.expires_at - timedelta(seconds=ttl) <= datetime.now(UTC)


def test_an_expired_image_that_a_pull_finds_here_is_removed_by_no_earlier_plan(cache: Cache, remote: Registry) -> None:
    name = f"{remote.host}/app:1"
    with Cache.open(cache.directory) as other:
        other.pull(name, ttl=1)
    age(cache, "expires_at", name, days=1)
    age(cache, "last_used_at", name, days=1)
    plan = cache.plan_prune()
    assert [image.name for image in plan.images] == [name]
    assert cache.pull(name).up_to_date
    with Cache.open(cache.directory) as other:  # the pull has not yet written that it used the image
        done = other.prune(plan=plan.images)
    assert (done.images, [image.reason for image in done.skipped]) == ([], ["used since the plan"])
    assert cache.is_image_complete(name)


@pytest.mark.parametrize("if_missing", [True, False])
def test_an_image_that_is_removed_while_a_pull_finds_it_is_pulled_again(
    cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch, if_missing: bool
) -> None:
    name = f"{remote.host}/app:1"
    cache.pull(name, ttl=1)
    real = _Pull.set_lifetime

    def remove_first(self: _Pull, here: ImageInfo) -> ImageInfo | None:
        cache.remove_manifest(name, ignore_missing=True)
        return real(self, here)

    monkeypatch.setattr(_Pull, "set_lifetime", remove_first)
    pulled = cache.pull(name, if_missing=if_missing)
    assert (pulled.up_to_date, pulled.image.expires_at) == (False, None)
    assert_is_stored(cache, name, FIRST)


def test_a_pull_in_a_cache_that_can_only_be_read_leaves_the_lifetime_as_it_is(
    directory: Path, remote: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{remote.host}/app:1"
    with Cache.open(directory) as writable:
        image = writable.pull(name, ttl=3600).image
    with monkeypatch.context() as patched:
        patched.setattr("os.access", lambda _, mode: mode != os.W_OK)
        with Cache.open(directory) as cache:
            assert cache.pull(name, if_missing=True).image == image


@pytest.mark.parametrize("reset", [False, True])
def test_a_request_whose_connection_is_closed_is_retried(cache: Cache, remote: Registry, reset: bool) -> None:
    remote.fault(closed(reset=reset), times=3)
    cache.pull(f"{remote.host}/app:1")
    assert_is_stored(cache, f"{remote.host}/app:1", FIRST)


@pytest.mark.slow
def test_a_download_that_is_too_slow_fails(cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_MINUTE", 0.2)
    remote.fault(change_answer(drip=0.05), method="GET", path=make.digest_of(LARGE.layers[0]), times=99)
    with pytest.raises(RegistryUnavailable, match="slower than 1024 bytes per second"):
        cache.pull(f"{remote.host}/large:1")


# Addresses, mirrors and credentials


def test_a_name_has_the_address_that_docker_gives_it() -> None:
    def find_place(name: str, plain: bool | None = None) -> tuple[str, str]:
        found = places.place(Name.parse(name), plain_http=plain)
        return found.url, found.repository

    assert find_place("alpine") == ("https://registry-1.docker.io", "library/alpine")
    assert find_place("team/app:1") == ("https://registry-1.docker.io", "team/app")
    for hub in ("docker.io", "index.docker.io", "registry-1.docker.io", "Docker.IO"):
        assert find_place(f"{hub}/library/alpine:3") == ("https://registry-1.docker.io", "library/alpine")
        assert find_place(f"{hub}/alpine@sha256:" + "0" * 64) == ("https://registry-1.docker.io", "library/alpine")
        assert places.place(Name.parse(f"{hub}/alpine")).registry == "docker.io"  # as credentials know it
    assert find_place("LOCALHOST:5000/app") == ("http://localhost:5000", "app")
    assert find_place("ghcr.io/team/app@sha256:" + "0" * 64) == ("https://ghcr.io", "team/app")
    assert find_place("localhost/app") == ("http://localhost", "app")
    assert find_place("127.0.0.1:5000/app") == ("http://127.0.0.1:5000", "app")
    assert find_place("registry:5000/app") == ("https://registry:5000", "app")
    assert find_place("registry:5000/app", plain=True) == ("http://registry:5000", "app")
    assert find_place("localhost:5000/app", plain=False) == ("https://localhost:5000", "app")


@pytest.mark.parametrize("port", ["65536", "99999", "655350"])
def test_a_port_above_65535_is_refused(cache: Cache, monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    if len(port) <= 5:
        with pytest.raises(InvalidName, match=f"'localhost:{port}' has a port above 65535"):
            cache.pull(f"localhost:{port}/app:1")
    monkeypatch.setenv("CACHEDB_MIRRORS", f"docker.io=localhost:{port}")
    with pytest.raises(InvalidName, match=f"CACHEDB_MIRRORS has 'docker.io=localhost:{port}'"):
        cache.pull("alpine:3")


def test_mirrors_are_tried_before_the_registry(cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    with Registry() as mirror:
        mirror.add(FIRST, "mirrored/app", "1")
        monkeypatch.setenv("CACHEDB_MIRRORS", f"docker.io=unused {remote.host}={mirror.host}/mirrored")
        cache.pull(f"{remote.host}/app:1")
        assert_is_stored(cache, f"{remote.host}/app:1", FIRST)
        assert take_requests(remote) == []
        cache.pull(f"{remote.host}/app:2")  # the mirror lacks this tag
        assert_is_stored(cache, f"{remote.host}/app:2", SECOND)


def test_a_name_with_a_tag_and_a_digest_pulls_the_digest_and_keeps_the_tag(cache: Cache, remote: Registry) -> None:
    """Renovate, Dependabot and Kubernetes pin images so."""
    name = f"{remote.host}/app:1"
    cache.pull(f"docker://{name}@{SECOND.digest}")
    assert_is_stored(cache, name, SECOND)
    take_requests(remote)
    assert cache.pull(f"{name}@{SECOND.digest}").blobs == 0
    assert take_requests(remote) == []
    cache.pull(f"{name}@{FIRST.digest}", if_missing=True)
    assert_is_stored(cache, name, FIRST)
    assert ("HEAD", "app/manifests/1") not in take_requests(remote)
    with pytest.raises(RegistryError, match=f"has no app@{LARGE.digest}"):
        cache.pull(f"{name}@{LARGE.digest}", allow_stale=True)
    assert cache.list_names() == [name]


@pytest.mark.parametrize("hub", ["", "docker.io/", "index.docker.io/", "registry-1.docker.io/", "DOCKER.io/"])
@pytest.mark.parametrize("origin", ["docker.io", "index.docker.io"])
def test_every_name_of_docker_hub_leads_to_its_mirror(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, hub: str, origin: str
) -> None:
    with Registry() as mirror:
        mirror.add(FIRST, "library/alpine", "3")
        monkeypatch.setenv("CACHEDB_MIRRORS", f"{origin}={mirror.host}")
        cache.pull(f"{hub}alpine:3")
        assert_is_stored(cache, f"{hub.lower()}alpine:3", FIRST)


@pytest.mark.parametrize(
    ("fault", "path"),
    [
        (answer_html(), ""),
        (corrupt_body(30), "/manifests/sha256"),
        (corrupt_body(30), f"/manifests/{ARM.digest}"),
        (corrupt_body(), "/blobs/"),
    ],
)
def test_a_mirror_with_other_content_is_skipped(
    cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch, fault: Do, path: str
) -> None:
    seen: list[tuple[int, int]] = []
    with Registry() as mirror:
        for server in (remote, mirror):
            server.add_index(make.index(FIRST, ARM), "several", "1", [FIRST, ARM])
        mirror.fault(fault, path=path, times=99)
        monkeypatch.setenv("CACHEDB_MIRRORS", f"{remote.host}={mirror.host}")
        name = f"{remote.host}/several:1"
        cache.pull(name, all_platforms=True, referrers=True, progress=lambda *counts: seen.append(counts))
        assert cache.is_image_complete(name)
        assert all(cache.get_blob(digest) == data for digest, data in {**FIRST.blobs, **ARM.blobs}.items())
    assert seen[-1][0] == seen[-1][1] == max(done for done, _ in seen)


@pytest.mark.parametrize(
    ("fault", "requests"), [(answer(503), 2), (retry_later(20), 2), (retry_later(20, 503), 2), (closed(), 1)]
)
def test_an_unavailable_mirror_is_asked_once_in_five_minutes(
    cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch, fault: Do, requests: int
) -> None:
    with Registry() as mirror:
        mirror.fault(fault, times=99)
        monkeypatch.setenv("CACHEDB_MIRRORS", f"{remote.host}={mirror.host}")
        cache.pull(f"{remote.host}/app:1")
        assert_is_stored(cache, f"{remote.host}/app:1", FIRST)
        assert (len(mirror.requests), SKIPPED_PAUSE_SECONDS) == (requests, [])
        mirror.requests.clear()
        cache.pull(f"{remote.host}/app:2", referrers=True)
        assert mirror.requests == []
        (mark,) = cache.directory.glob("locks/*.failed")
        os.utime(mark, (time.time() - 301,) * 2)
        cache.pull(f"{remote.host}/large:1")
        assert mirror.requests


@pytest.mark.slow
def test_a_mirror_that_hangs_is_waited_for_a_minute(
    cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_pulled, has_waited = threading.Event(), list[bool]()

    def hang(call: Call) -> Answer:
        if not has_waited and not has_pulled.wait(60):
            has_waited.append(True)
        return call.serve()

    monkeypatch.setattr(source, "_MIRROR_SECONDS", 0.2)
    with Registry() as mirror:
        mirror.fault(hang, times=99)
        monkeypatch.setenv("CACHEDB_MIRRORS", f"{remote.host}={mirror.host}")
        cache.pull(f"{remote.host}/app:1")
        has_pulled.set()
        assert not has_waited
        assert_is_stored(cache, f"{remote.host}/app:1", FIRST)


def test_a_mirror_that_lacks_an_image_is_asked_again(
    cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Registry() as mirror:
        mirror.add(FIRST, "app", "other")  # its blobs are of use, though it lacks the tag
        monkeypatch.setenv("CACHEDB_MIRRORS", f"{remote.host}={mirror.host}")
        cache.pull(f"{remote.host}/app:1")
        assert set(take_downloaded_digests(mirror)) == FIRST.blobs.keys() - {FIRST.digest}
        assert not list(cache.directory.glob("locks/*.failed"))


def test_skipped_mirrors_are_asked_if_the_registry_is_unavailable(
    cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Registry() as mirror:
        mirror.add(FIRST, "app", "1")
        mirror.fault(answer(503), times=3)
        remote.fault(answer(503), times=99)
        monkeypatch.setenv("CACHEDB_MIRRORS", f"{remote.host}={mirror.host}")
        cache.pull(f"{remote.host}/app:1")
        assert_is_stored(cache, f"{remote.host}/app:1", FIRST)
        assert not list(cache.directory.glob("locks/*.failed"))


def test_an_unavailable_registry_is_the_error_though_a_mirror_has_other_content(
    cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Registry() as mirror:
        mirror.add(FIRST, "app", "1")
        mirror.fault(corrupt_body(), path="/manifests/", times=99)
        remote.fault(answer(503), times=99)
        monkeypatch.setenv("CACHEDB_MIRRORS", f"{remote.host}={mirror.host}")
        with pytest.raises(RegistryUnavailable, match=remote.host):
            cache.pull(f"{remote.host}/app@{FIRST.digest}")


def write_login(path: Path, host: str, user: str = USER, password: str = PASSWORD) -> Path:
    auth = {"username": user, "password": password}
    path.write_text(json.dumps({"auths": {host: auth}}))
    return path


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_credentials_are_sent_to_a_registry_that_asks_for_them(cache: Cache, tmp_path: Path, auth: str) -> None:
    with Registry(auth=auth) as remote:
        remote.add(FIRST, "app", "1")
        with pytest.raises(RegistryError, match=r"refuses .*log in with `skopeo login") as error:
            cache.pull(
                f"{remote.host}/app:1",
                authfile=write_login(tmp_path / "wrong.json", remote.host, password="wrong-word"),
            )
        assert "wrong-word" not in str(error.value)
        cache.pull(f"{remote.host}/app:1", authfile=write_login(tmp_path / "auth.json", remote.host))
        assert_is_stored(cache, f"{remote.host}/app:1", FIRST)


@pytest.mark.slow
def test_a_token_that_expires_during_a_pull_is_replaced(cache: Cache, tmp_path: Path) -> None:
    with Registry(auth="bearer") as remote:
        remote.expires_in = 1
        remote.add(LARGE, "large", "1")
        remote.fault(change_answer(delay=1.5), method="GET", path="manifests")
        cache.pull(f"{remote.host}/large:1", authfile=write_login(tmp_path / "auth.json", remote.host))
        assert_is_stored(cache, f"{remote.host}/large:1", LARGE)


def test_credentials_are_not_sent_along_a_redirect(cache: Cache, tmp_path: Path) -> None:
    with Registry() as storage, Registry(auth="basic") as remote:
        remote.add(FIRST, "app", "1")
        storage.add(FIRST, "app", "1")
        remote.fault(redirect(storage.url), method="GET", path="/blobs/", times=99)
        cache.pull(f"{remote.host}/app:1", authfile=write_login(tmp_path / "auth.json", remote.host))
        assert_is_stored(cache, f"{remote.host}/app:1", FIRST)
        assert storage.requests
        assert all("authorization" not in request.headers for request in storage.requests)


def test_an_https_registry_cannot_lead_to_http(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ca, certified, key = certificate(tmp_path / "tls", "127.0.0.1")
    monkeypatch.setenv("SSL_CERT_FILE", str(ca))
    with Registry() as other, Registry(auth="bearer", tls=(certified, key)) as remote:
        name, authfile = remote.add(FIRST, "app", "1"), write_login(tmp_path / "auth.json", remote.host)
        remote.realm = f"{other.url}/token"
        with pytest.raises(RegistryError, match=r"token server .* is not allowed: .* must name a server with https$"):
            cache.pull(name, plain_http=False, authfile=authfile)
        remote.realm = f"{remote.url}/token"
        remote.fault(redirect(other.url), method="GET", path="/blobs/", times=99)
        with pytest.raises(RegistryError, match=r"whose scheme is not allowed: its operator must redirect to https$"):
            cache.pull(name, plain_http=False, authfile=authfile)
        assert other.requests == []


def test_the_error_of_an_https_registry_on_an_http_port_names_tls(cache: Cache, remote: Registry) -> None:
    # The answer of Go's HTTPS servers to an HTTP request. Its body is not JSON.
    remote.fault(answer(400, body=b"Client sent an HTTP request to an HTTPS server.\n"), times=9)
    with pytest.raises(RegistryError, match=r"answers 400 to a request for app[^ ]+: if it speaks HTTPS, use --tls$"):
        cache.pull(f"{remote.host}/app:1")


def test_an_endless_redirect_fails(cache: Cache, remote: Registry) -> None:
    remote.fault(redirect(remote.url), method="GET", path="/blobs/", times=99)
    with pytest.raises(RegistryError, match="more than 5 redirects"):
        cache.pull(f"{remote.host}/app:1")


@pytest.mark.parametrize("location", ["http://host:99999999/", "http://[bad", "file:///etc/passwd", "ftp://host/x"])
def test_a_redirect_to_an_invalid_or_other_url_is_refused(cache: Cache, remote: Registry, location: str) -> None:
    remote.fault(answer(307, {"Location": location}), method="GET", path="/blobs/", times=99)
    with pytest.raises(RegistryError):
        cache.pull(f"{remote.host}/app:1")


def test_an_identity_token_is_exchanged_by_post(cache: Cache, tmp_path: Path) -> None:
    with Registry(auth="bearer") as remote:
        name = remote.add(FIRST, "app", "1")
        path = tmp_path / "auth.json"
        path.write_text(json.dumps({"auths": {remote.host: {"identitytoken": REFRESH_TOKEN}}}))
        cache.pull(name, authfile=path)
        assert_is_stored(cache, name, FIRST)
        assert {request.method for request in remote.requests if request.path == "/token"} == {"POST"}


def test_an_image_for_another_platform_is_refused(cache: Cache, remote: Registry) -> None:
    with pytest.raises(NotInCache, match=r"not for platform 'linux/arm64', but for linux/amd64"):
        cache.pull(f"{remote.host}/app:1", platform="linux/arm64")
    assert cache.list_manifests() == []
    assert cache.pull(f"{remote.host}/app:1", platform="linux/amd64").image.complete
    with pytest.raises(NotInCache, match=r"not for platform 'linux/arm64', but for linux/amd64"):
        # The stored image has another platform.
        cache.pull(f"{remote.host}/app:1", platform="linux/arm64", if_missing=True)
    assert cache.is_image_complete(f"{remote.host}/app:1")


def test_if_missing_takes_no_lock_for_a_complete_image(
    cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.pull(f"{remote.host}/app:1")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the pull took a lock")

    with monkeypatch.context() as patch:
        patch.setattr("cachedb.disk.locks.acquire", refuse)
        assert cache.pull(f"{remote.host}/app:1", if_missing=True).image.complete


# Debian's registry, and images that skopeo pushed


def push_with_skopeo(peer: Callable[[str], str], host: str, *options: str) -> str:
    """Push the example with skopeo, and return its digest at the registry."""
    skopeo, image = peer("skopeo"), f"docker://{host}/hello:1"
    source = f"oci-archive:{Path(__file__).parents[2]}/examples/hello.oci.tar"
    command = [skopeo, "copy", "-q", *(f"--dest-{option}" for option in options), source, image]
    subprocess.run(command, check=True, capture_output=True)
    raw = subprocess.run(
        [skopeo, "inspect", "--raw", *(f"--{option}" for option in options), image], check=True, capture_output=True
    )
    return make.digest_of(raw.stdout)


@pytest.mark.slow
def test_an_image_that_skopeo_pushed_keeps_its_digest(cache: Cache, tmp_path: Path, peer: Callable[[str], str]) -> None:
    with docker_registry(tmp_path, htpasswd=HTPASSWD) as host:
        digest = push_with_skopeo(peer, host, "tls-verify=false", f"creds={USER}:{PASSWORD}")
        with pytest.raises(RegistryError, match="log in"):
            cache.pull(f"{host}/hello:1")
        pulled = cache.pull(f"{host}/hello:1", authfile=write_login(tmp_path / "auth.json", host))
    assert (pulled.image.digest, pulled.image.complete) == (digest, True)
    assert cache.verify().problems == []


@pytest.mark.slow
def test_the_certificate_of_a_registry_is_verified(
    cache: Cache, tmp_path: Path, peer: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ca, certified, key = certificate(tmp_path / "tls", "127.0.0.1")
    with docker_registry(tmp_path, tls=(certified, key)) as host:
        digest = push_with_skopeo(peer, host, f"cert-dir={ca.parent}")
        with pytest.raises(RegistryError, match=r"cannot be trusted: .*certs\.d/"):
            cache.pull(f"{host}/hello:1", plain_http=False)
        monkeypatch.setenv("SSL_CERT_FILE", str(ca))
        assert cache.pull(f"{host}/hello:1", plain_http=False).image.digest == digest
        monkeypatch.delenv("SSL_CERT_FILE")
        (tmp_path / "certs.d" / host).mkdir(parents=True)
        (tmp_path / "certs.d" / host / "ca.crt").write_bytes(ca.read_bytes())
        monkeypatch.setattr(tls, "_CERTIFICATES", (str(tmp_path / "certs.d"),))
        assert cache.pull(f"{host}/hello:1", plain_http=False).image.digest == digest


def test_a_tls_error_says_what_to_do(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: Registry
) -> None:
    ca, certified, key = certificate(tmp_path / "tls", "localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(ca))
    advice = r"cannot be trusted: .* mismatch.*: use a host name that its certificate contains$"
    with Registry(tls=(certified, key)) as other, pytest.raises(RegistryError, match=advice):
        cache.pull(f"{other.host}/app:1", plain_http=False)
    with pytest.raises(RegistryError, match=r"cannot be trusted: .*: use --plain-http if it speaks HTTP$"):
        cache.pull(f"{remote.host}/app:1", plain_http=False)
    out_of_date = ssl.SSLCertVerificationError("certificate has expired")
    out_of_date.verify_code = 10
    assert "clock" in tls.advise_on_tls("registry:5000", tls.Certificates((), ()), SSLError(out_of_date))


def test_connection_errors_are_printed_without_python_objects(
    cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.fault(closed(), path="manifests/1", times=99)
    with pytest.raises(RegistryError) as raised:
        cache.pull(f"{remote.host}/app:1")
    reason = "Connection aborted: Remote end closed connection without response"
    assert str(raised.value) == f"{remote.host} cannot be reached: {reason}"
    remote.fault(change_answer(cut=10), method="GET", path="/blobs/", times=99)
    with pytest.raises(RegistryError, match=r"broken: IncompleteRead\(10 bytes read, \d+ more expected\): try"):
        cache.pull(f"{remote.host}/app@{FIRST.digest}")
    monkeypatch.setenv("https_proxy", "http://somebody:secret@127.0.0.1:1")
    with pytest.raises(RegistryError) as raised:
        cache.pull("registry.example.org/app:1")
    reason = "Failed to establish a new connection: [Errno 111] Connection refused"
    advice = "check https_proxy, or add the host to no_proxy"
    assert str(raised.value) == f"127.0.0.1:1 (proxy for registry.example.org) fails: {reason}: {advice}"


# The command line


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_pull_prints_what_it_did(cachedb: Run, remote: Registry) -> None:
    name = f"{remote.host}/app:1"
    done = cachedb("pull", "--format", "json", name)
    (image,) = json.loads(done.stdout)
    assert (image["repository"], image["reference"], image["digest"]) == (f"{remote.host}/app", "1", FIRST.digest)
    sizes = {digest: len(data) for digest, data in FIRST.blobs.items() if digest != FIRST.digest}
    assert (image["blobs"], image["bytes"], image["resumed"]) == (len(sizes), sum(sizes.values()), 0)
    assert (image["name"], image["downloaded_size"]) == (name, image["bytes"])
    assert (image["up_to_date"], image["stale"]) == (False, None)
    assert 0 < image["seconds"] < 600
    printed = [f"cachedb: downloaded {shorten_digest(digest)}, {format_size(size)}" for digest, size in sizes.items()]
    assert sorted(done.stderr.splitlines()) == sorted(printed)
    done = cachedb("pull", name)
    assert done.stdout.split()[:6] == ["NAME", "DIGEST", "DOWNLOADED", "RESUMED", "TIME", "STATE"]
    assert done.stdout.endswith("  up to date\n")
    assert done.stderr == ""
    assert cachedb("pull", "-q", name).stdout == f"{name}\n"
    failed = cachedb("pull", f"{remote.host}/app:9")
    assert (failed.returncode, failed.stderr.startswith(f"cachedb: {remote.host} has no app:9")) == (1, True)
    assert cachedb("pull", "--platform", "linux/arm64", "--all-platforms", name).returncode == 2


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_images_pulled_before_a_failure_are_printed(cachedb: Run, remote: Registry) -> None:
    names = f"{remote.host}/app:1", f"{remote.host}/app:nope", f"{remote.host}/app:2"
    done = cachedb("pull", "-q", *names)
    assert (done.returncode, done.stdout) == (1, f"{names[0]}\n")
    assert done.stderr == f"cachedb: {remote.host} has no app:nope (404 MANIFEST_UNKNOWN: manifest unknown)\n"
    assert cachedb("pull", names[1]).stdout == ""


@pytest.mark.slow
def test_pull_warns_about_a_stale_image(cachedb: Run) -> None:
    with Registry() as remote:
        name = remote.add(FIRST, "app", "1")
        cachedb("pull", name)
    assert cachedb("pull", name).returncode == 1
    done = cachedb("pull", "--allow-stale", "-q", name)
    assert done.stdout == f"{name}\n"
    assert "may be out of date" in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_the_command_sends_each_request_once(directory: Path, remote: Registry, cachedb: Run) -> None:
    for tag, image in (("1", FIRST), ("2", SECOND), ("2", SECOND)):
        done = cachedb("pull", "-q", f"{remote.host}/app:{tag}")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{remote.host}/app:{tag}\n", "")
        with Cache.open(directory) as cache:
            assert_is_stored(cache, f"{remote.host}/app:{tag}", image)
    found = take_requests(remote)
    assert len(found) == len(set(found)) + 1
    assert found[-1] == ("HEAD", "app/manifests/2")  # the tag has not moved


def test_the_command_pulls_with_a_lifetime_but_a_dry_run_has_none(cachedb: Run, cache: Cache, remote: Registry) -> None:
    name = f"{remote.host}/app:1"
    assert cachedb("pull", "--ttl", "6h", name).returncode == 0
    ends = cache.get_image(name).expires_at
    assert ends is not None
    assert timedelta(hours=5) < ends - datetime.now(UTC) <= timedelta(hours=6)
    done = cachedb("pull", "--dry-run", "--ttl", "6h", name)
    assert done.returncode == 2
    assert "--dry-run excludes --if-missing, --allow-stale and --ttl" in done.stderr


@pytest.mark.slow
def test_the_command_sends_no_request_for_a_complete_image_with_if_missing(cachedb: Run, remote: Registry) -> None:
    assert cachedb("pull", "--if-missing", f"{remote.host}/app:1").returncode == 0
    assert take_requests(remote)
    assert cachedb("pull", "--if-missing", f"{remote.host}/app:1").returncode == 0
    assert take_requests(remote) == []


@pytest.mark.slow
def test_the_command_pulls_all_platforms_if_asked_for(cachedb: Run, several: str, directory: Path) -> None:
    assert cachedb("pull", "--all-platforms", several).returncode == 0
    with Cache.open(directory) as cache:
        assert all(platform.complete for platform in cache.get_platforms(several))


@pytest.mark.slow
def test_many_images_are_pulled_with_few_open_files(directory: Path, remote: Registry) -> None:
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
        directory,
        *names,
    )
    assert output.splitlines() == names


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


@contextmanager
def patient_command(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run a command that waits ten minutes for a host or a credential helper, so that an interrupt ends it first."""
    script = """
        from cachedb.cli.main import main
        from cachedb.transports.registry import client, credentials

        client._CONNECT_SECONDS = client._WRITE_SECONDS = credentials._TIMEOUT_SECONDS = 600.0
        main()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def interrupt(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Interrupt a command; return its exit code, and what it printed on stderr."""
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr.strip()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["a host", "a helper"])
@pytest.mark.usefixtures("cache")
def test_an_interrupt_waits_neither_for_a_host_nor_for_a_credential_helper(
    directory: Path, unreachable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    pid = tmp_path / "pid"
    (tmp_path / "auth.json").write_text(json.dumps({"credsStore": "slow"}))
    (tmp_path / "docker-credential-slow").write_text(f"#!/bin/sh\necho $$ > '{pid}'; exec sleep 600\n")
    (tmp_path / "docker-credential-slow").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with Registry(auth="basic") as remote:
        host = unreachable if what == "a host" else remote.host
        others = count_connecting(unreachable)
        arguments = ["--dir", directory, "pull", "--authfile", tmp_path / "auth.json", f"{host}/a"]
        with patient_command(*arguments) as process:
            assert wait_until(lambda: is_written(pid) or count_connecting(unreachable) > others)
            assert interrupt(process) == (130, "cachedb: interrupted")
    assert what == "a host" or has_ended(int(pid.read_text()))
