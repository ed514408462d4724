"""Limits of the client: a value at a limit is accepted, and a value just beyond it is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cachedb import Cache, InvalidName, RegistryError, RegistryUnavailable
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST
from cachedb.oci.names import Name
from cachedb.transports.registry import access, answers, authorization, client, places
from cachedb.transports.registry import download as download_module
from cachedb.transports.registry import repository as registry
from cachedb.transports.registry.download import Download
from tests.support import make
from tests.support.faults import Answer, Call, answer, change_headers, closed, redirect, retry_later, rewrite_body
from tests.support.registries import PASSWORD, SKIPPED_PAUSE_SECONDS, USER, Registry, isolate_client  # noqa: F401 - isolate_client is a fixture

IMAGE = make.image(1, 2, 3, 4, 5)


# Downloads


class Clock:
    """A clock that only a test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(download_module, "time", SimpleNamespace(monotonic=lambda: self.now))


class SlowRepository:
    """A registry that sends one piece of a blob a second; a response ends early after `cut` pieces."""

    place = places.Place("https://slow.test", "slow.test", "app")
    tries = client.TRIES

    def __init__(self, clock: Clock, data: bytes, piece: int, cut: int | None = None) -> None:
        self._clock, self._data, self._piece, self._cut = clock, data, piece, cut
        self.requests = self.pauses = 0
        self.first_wait = 0  # seconds until the first piece of a response

    def open_blob(self, digest: Digest, size: int, offset: int, url: str | None) -> tuple[Any, int]:
        self.requests += 1
        at, pieces = offset, 0

        def read1(size: int, decode_content: bool) -> bytes:
            nonlocal at, pieces
            if pieces == self._cut:
                return b""
            self._clock.now += 1 if pieces else 1 + self.first_wait
            pieces += 1
            start, at = at, min(at + min(self._piece, size), len(self._data))
            return self._data[start:at]

        return SimpleNamespace(
            read1=read1, close=lambda: None, headers={}, status=200, url="https://slow.test/"
        ), offset

    def pause(self, tries: int) -> None:
        self.pauses += 1


def read_slowly(repository: SlowRepository, data: bytes) -> bytes:
    blob = Download(repository, Digest(make.digest_of(data)), len(data), 0)
    buffer, found = memoryview(bytearray(64 * 1024)), b""
    while count := blob.readinto(buffer):
        found += buffer[:count]
    return found


def test_a_download_that_is_just_fast_enough_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make.random_bytes(1024 * 60 * 10, 1)  # ten minutes
    remote = SlowRepository(Clock(monkeypatch), data, 1024)
    assert read_slowly(remote, data) == data
    assert (remote.requests, remote.pauses) == (1, 0)


def test_a_complete_download_sends_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    remote = SlowRepository(Clock(monkeypatch), b"data", 1024)
    digest, buffer = Digest(make.digest_of(b"data")), memoryview(bytearray(10))
    assert Download(remote, digest, 4, 4).readinto(buffer) == 0
    assert remote.requests == 0
    assert Download(remote, digest, 4, 3).readinto(buffer) == 1
    assert remote.requests == 1


def test_a_download_that_is_just_too_slow_is_retried_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make.random_bytes(1024 * 60 * 10, 1)
    remote = SlowRepository(Clock(monkeypatch), data, 1000)
    with pytest.raises(RegistryUnavailable, match="slower than 1024 bytes per second"):
        read_slowly(remote, data)
    assert remote.requests == client.TRIES


def test_a_long_wait_for_the_first_byte_is_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    data = make.random_bytes(1024 * 60 * 3, 1)
    remote = SlowRepository(clock, data, 1024)
    open_blob = remote.open_blob

    def open_late(digest: Digest, size: int, offset: int, url: str | None) -> tuple[Any, int]:
        clock.now += 300
        return open_blob(digest, size, offset, url)

    monkeypatch.setattr(remote, "open_blob", open_late)
    assert read_slowly(remote, data) == data
    assert remote.requests == 1


def test_each_try_of_a_download_gets_a_full_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    data = make.random_bytes(1000 * 61 * 2 + 1024 * 60 * 5, 1)
    remote = SlowRepository(clock, data, 1000)
    open_blob = remote.open_blob

    def open_faster_from_third(digest: Digest, size: int, offset: int, url: str | None) -> tuple[Any, int]:
        remote._piece = 1000 if remote.requests < 2 else 1024
        return open_blob(digest, size, offset, url)

    monkeypatch.setattr(remote, "open_blob", open_faster_from_third)
    assert read_slowly(remote, data) == data
    assert remote.requests == 3


@pytest.mark.parametrize(("pieces", "succeeds"), [(13, True), (12, False)])
def test_an_often_interrupted_download_continues_if_its_tries_bring_enough_for_a_minute(
    monkeypatch: pytest.MonkeyPatch, pieces: int, succeeds: bool
) -> None:
    data = make.random_bytes(1024 * (pieces * client.TRIES + 3), 1)
    remote = SlowRepository(Clock(monkeypatch), data, 1024, cut=pieces)
    if succeeds:
        assert read_slowly(remote, data) == data
        return
    with pytest.raises(RegistryUnavailable, match="keeps interrupting"):
        read_slowly(remote, data)
    assert remote.requests == client.TRIES


@pytest.mark.parametrize(("piece", "succeeds"), [(1025, True), (1000, False)])
def test_bytes_that_a_registry_without_ranges_sends_again_are_a_stall_only_if_they_are_too_slow(
    monkeypatch: pytest.MonkeyPatch, piece: int, succeeds: bool
) -> None:
    data = make.random_bytes(1024 * 60 * 10, 1)
    remote = SlowRepository(Clock(monkeypatch), data, 1025, cut=400)
    open_blob = remote.open_blob

    def open_from_beginning(digest: Digest, size: int, offset: int, url: str | None) -> tuple[Any, int]:
        if remote.requests:
            remote._cut, remote._piece, remote.first_wait = None, piece, 300
        return open_blob(digest, size, 0, url)

    monkeypatch.setattr(remote, "open_blob", open_from_beginning)
    if succeeds:
        assert read_slowly(remote, data) == data
        assert remote.requests == 2
        return
    with pytest.raises(RegistryUnavailable, match="slower than 1024 bytes per second"):
        read_slowly(remote, data)
    assert remote.requests == client.TRIES


# Tokens


@pytest.fixture
def guarded() -> Iterator[Registry]:
    with Registry(auth="bearer") as remote:
        remote.add(IMAGE, "app", "1")
        yield remote


@pytest.fixture
def authfile(guarded: Registry, tmp_path: Path) -> Path:
    path = tmp_path / "auth.json"
    path.write_text(json.dumps({"auths": {guarded.host: {"username": USER, "password": PASSWORD}}}))
    return path


def test_a_request_refused_with_a_new_token_gets_no_second_token(
    cache: Cache, guarded: Registry, authfile: Path
) -> None:
    challenge = f'Bearer realm="{guarded.realm}",service="x",scope="repository:app:pull"'
    guarded.fault(answer(401, {"WWW-Authenticate": challenge}), path="/manifests/", times=99)
    with pytest.raises(RegistryError, match="refuses app:1"):
        cache.pull(f"{guarded.host}/app:1", authfile=authfile)
    assert guarded.count(path="/token") == 1
    assert guarded.count(path="/manifests/") == 2, "one request without a token, one with it"


def test_requests_refused_together_get_one_token(cache: Cache, guarded: Registry, authfile: Path) -> None:
    """The token of the manifest's request has expired when all blobs are requested at once."""
    together = threading.Barrier(4, timeout=60)  # the number of concurrent downloads
    refused = threading.Semaphore(4)

    def refuse_or_serve(call: Call) -> Answer:
        if refused.acquire(blocking=False):
            together.wait()
            challenge = f'Bearer realm="{guarded.realm}",service="x",scope="repository:app:pull"'
            return Answer(401, {"WWW-Authenticate": challenge})
        return call.serve()

    guarded.fault(refuse_or_serve, method="GET", path="/blobs/", times=99)
    cache.pull(f"{guarded.host}/app:1", authfile=authfile)
    assert guarded.count(path="/token") == 2, "one for the manifest, one for all blobs"


def test_a_token_of_the_largest_size_is_accepted_and_a_larger_one_refused(
    cache: Cache, guarded: Registry, authfile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authorization, "_TOKEN_LIMIT", 2000)
    guarded.fault(rewrite_body(lambda data: data.ljust(2000)), path="/token")
    cache.pull(f"{guarded.host}/app:1", authfile=authfile)
    guarded.fault(rewrite_body(lambda data: data.ljust(2001)), path="/token")
    with pytest.raises(RegistryError, match="is over 2000 bytes"):
        cache.pull(f"{guarded.host}/app:1", authfile=authfile)


# Requests


@pytest.fixture
def remote() -> Iterator[Registry]:
    with Registry() as made:
        made.add(IMAGE, "app", "1")
        yield made


def open_repository(remote: Registry) -> registry.Repository:
    return registry.Repository(places.place(Name.parse(f"{remote.host}/app:1")))


def test_a_request_is_sent_at_most_five_times(remote: Registry) -> None:
    repository = open_repository(remote)
    remote.fault(closed(), times=4)
    assert repository.digest("1") == IMAGE.digest
    remote.fault(closed(), times=5)
    with pytest.raises(RegistryUnavailable, match="cannot be reached"):
        repository.digest("1")
    assert remote.count() == 5 + 5
    repository.close()


@pytest.mark.parametrize(("failures", "succeeds"), [(3, True), (4, False)])
def test_a_token_is_requested_only_if_a_try_is_left_to_use_it(
    guarded: Registry, authfile: Path, failures: int, succeeds: bool
) -> None:
    repository = registry.Repository(
        places.place(Name.parse(f"{guarded.host}/app:1")), access.Access(authfile=authfile)
    )
    guarded.fault(closed(), method="HEAD", times=failures, first=True)
    if succeeds:
        assert repository.digest("1") == IMAGE.digest
    else:
        with pytest.raises(RegistryError, match="refuses app:1"):
            repository.digest("1")
    assert guarded.count(path="/token") == succeeds
    repository.close()


@pytest.mark.parametrize(
    ("range_header", "offset"), [("0-0", None), ("0-1", 2), ("0-8", 9), ("0-9", 10), ("0-10", None), ("1-5", None)]
)
def test_an_upload_resumes_at_a_valid_offset_of_the_registry(
    remote: Registry, range_header: str, offset: int | None
) -> None:
    repository = open_repository(remote)
    remote.fault(answer(204, {"Range": range_header, "Location": f"{remote.url}/next"}), method="GET", path="/upload")
    found = repository._find_upload_state(f"{remote.url}/upload", 10)
    assert found == ((None, 0) if offset is None else (f"{remote.url}/next", offset))
    repository.close()


def test_text_of_a_registry_is_quoted_up_to_200_characters() -> None:
    assert answers.to_one_line("x" * 200) == "x" * 200
    assert answers.to_one_line("x" * 201) == "x" * 200 + "..."


def test_retry_after_is_obeyed_up_to_a_minute(remote: Registry) -> None:
    repository = open_repository(remote)
    remote.fault(retry_later(60))
    assert repository.manifest("1").data == IMAGE.manifest
    assert SKIPPED_PAUSE_SECONDS == [60]
    remote.fault(retry_later(61))
    with pytest.raises(RegistryUnavailable, match="overloaded"):
        repository.manifest("1")
    assert SKIPPED_PAUSE_SECONDS == [60]
    repository.close()


def test_pauses_between_tries_double(remote: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda *_: 1.0)
    repository = open_repository(remote)
    remote.fault(closed(), times=4)
    repository.digest("1")
    assert SKIPPED_PAUSE_SECONDS == [0.5, 1, 2, 4]
    repository.close()


def test_five_redirects_are_followed(remote: Registry) -> None:
    repository = open_repository(remote)
    remote.fault(redirect(remote.url), times=5)
    assert repository.digest("1") == IMAGE.digest
    remote.fault(redirect(remote.url), times=6)
    with pytest.raises(RegistryError, match="more than 5 redirects"):
        repository.digest("1")
    repository.close()


def test_a_manifest_of_the_largest_size_is_accepted(remote: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = open_repository(remote)
    monkeypatch.setattr(registry, "DOCUMENT_LIMIT", len(IMAGE.manifest))
    assert repository.manifest("1").data == IMAGE.manifest
    monkeypatch.setattr(registry, "DOCUMENT_LIMIT", len(IMAGE.manifest) - 1)
    with pytest.raises(RegistryError, match=f"is over {len(IMAGE.manifest) - 1} bytes"):
        repository.manifest("1")
    repository.close()


def test_the_largest_port_is_accepted() -> None:
    assert places.place(Name.parse("localhost:65535/app:1")).registry == "localhost:65535"
    with pytest.raises(InvalidName, match="above 65535"):
        places.place(Name.parse("localhost:65536/app:1"))


def make_referrer(number: int) -> bytes:
    config = b"{}"
    return json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": make.descriptor(config, OCI_CONFIG),
            "layers": [],
            "subject": make.descriptor(IMAGE.manifest, OCI_MANIFEST),
            "annotations": {"number": str(number)},
        }
    ).encode()


@pytest.mark.parametrize("count", [3, 4])
def test_the_number_of_referrers_is_limited(remote: Registry, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(registry, "_MAX_REFERRERS", 3)
    for number in range(count):
        remote.add_manifest(make_referrer(number), "app")
    repository = open_repository(remote)
    if count == 3:
        assert len(repository.referrers(Digest(IMAGE.digest))) == 3
    else:
        with pytest.raises(RegistryError, match="lists more than 3 referrers, or pages of them, for"):
            repository.referrers(Digest(IMAGE.digest))
    repository.close()


@pytest.mark.parametrize("pages", [3, 4])
def test_the_number_of_pages_of_referrers_is_limited(
    remote: Registry, monkeypatch: pytest.MonkeyPatch, pages: int
) -> None:
    monkeypatch.setattr(registry, "_MAX_REFERRERS", 3)
    more = {"Content-Type": OCI_INDEX, "Link": f'</v2/app/referrers/{IMAGE.digest}>; rel="next"'}
    remote.fault(change_headers(dict(more)), path="/referrers/", times=pages - 1)
    repository = open_repository(remote)
    if pages == 3:
        assert repository.referrers(Digest(IMAGE.digest)) == []
    else:
        with pytest.raises(RegistryError, match="lists more than 3 referrers, or pages of them, for"):
            repository.referrers(Digest(IMAGE.digest))
    repository.close()


@pytest.mark.parametrize("count", [2, 3])
def test_the_number_of_manifests_that_refer_to_an_image_is_limited(
    cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr("cachedb.operations.pull._MAX_MANIFESTS", 3)
    remote.blobs["app", make.digest_of(b"{}")] = b"{}"
    for number in range(count):
        remote.add_manifest(make_referrer(number), "app")
    if count == 2:
        cache.pull(f"{remote.host}/app:1", referrers=True)
    else:
        with pytest.raises(RegistryError, match="has more than 3 referrers"):
            cache.pull(f"{remote.host}/app:1", referrers=True)
