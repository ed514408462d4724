"""Limits, on both sides: what is just within one is taken, and what is just beyond it is not."""

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
from cachedb.transports.registry import client, places
from cachedb.transports.registry import repository as registry
from tests.support import make
from tests.support.faults import Answer, Call, answer, closed, headers, redirect, retry_later, rewritten
from tests.support.registries import PASSWORD, PAUSES, USER, Registry, alone  # noqa: F401 - alone is a fixture

IMAGE = make.image(1, 2, 3, 4, 5)


# A download


class Clock:
    """Stands still unless it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(registry, "time", SimpleNamespace(monotonic=lambda: self.now))


class SlowRepository:
    """A registry that sends a blob a piece a second; a response ends early after ``cut`` pieces."""

    place = SimpleNamespace(registry="slow.test")

    def __init__(self, clock: Clock, data: bytes, piece: int, cut: int | None = None) -> None:
        self._clock, self._data, self._piece, self._cut = clock, data, piece, cut
        self.requests = self.pauses = 0

    def open_blob(self, digest: Digest, offset: int) -> tuple[Any, int]:
        self.requests += 1
        at, pieces = offset, 0

        def read1(size: int, decode_content: bool) -> bytes:
            nonlocal at, pieces
            if pieces == self._cut:
                return b""
            self._clock.now += 1
            pieces += 1
            start, at = at, min(at + min(self._piece, size), len(self._data))
            return self._data[start:at]

        return SimpleNamespace(read1=read1, close=lambda: None), offset

    def pause(self, tries: int) -> None:
        self.pauses += 1


def downloaded(repository: SlowRepository, data: bytes) -> bytes:
    blob = registry.Blob(repository, Digest(make.digest_of(data)), len(data), 0)  # type: ignore[arg-type]
    buffer, found = memoryview(bytearray(64 * 1024)), b""
    while count := blob.readinto(buffer):
        found += buffer[:count]
    return found


def test_a_download_that_is_just_fast_enough_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make.random_bytes(1024 * 60 * 10, 1)  # ten minutes
    remote = SlowRepository(Clock(monkeypatch), data, 1024)
    assert downloaded(remote, data) == data
    assert (remote.requests, remote.pauses) == (1, 0)


def test_of_a_download_that_is_all_there_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    remote = SlowRepository(Clock(monkeypatch), b"data", 1024)
    digest, buffer = Digest(make.digest_of(b"data")), memoryview(bytearray(10))
    assert registry.Blob(remote, digest, 4, 4).readinto(buffer) == 0  # type: ignore[arg-type]
    assert remote.requests == 0
    assert registry.Blob(remote, digest, 4, 3).readinto(buffer) == 1  # type: ignore[arg-type]
    assert remote.requests == 1


def test_a_download_that_is_just_too_slow_is_asked_for_again_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make.random_bytes(1024 * 60 * 10, 1)
    remote = SlowRepository(Clock(monkeypatch), data, 1000)
    with pytest.raises(RegistryUnavailable, match="slower than 1024 bytes per second"):
        downloaded(remote, data)
    assert remote.requests == client.TRIES


def test_each_try_of_a_download_has_a_minute_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    data = make.random_bytes(1000 * 61 * 2 + 1024 * 60 * 5, 1)
    remote = SlowRepository(clock, data, 1000)
    open_blob = remote.open_blob

    def faster_from_the_third(digest: Digest, offset: int) -> tuple[Any, int]:
        remote._piece = 1000 if remote.requests < 2 else 1024
        return open_blob(digest, offset)

    monkeypatch.setattr(remote, "open_blob", faster_from_the_third)
    assert downloaded(remote, data) == data
    assert remote.requests == 3


@pytest.mark.parametrize(("pieces", "whole"), [(13, True), (12, False)])
def test_a_download_that_is_cut_off_again_and_again_goes_on_if_a_minutes_worth_comes_before_the_last_try(
    monkeypatch: pytest.MonkeyPatch, pieces: int, whole: bool
) -> None:
    data = make.random_bytes(1024 * (pieces * client.TRIES + 3), 1)
    remote = SlowRepository(Clock(monkeypatch), data, 1024, cut=pieces)
    if whole:
        assert downloaded(remote, data) == data
        return
    with pytest.raises(RegistryUnavailable, match="keeps interrupting"):
        downloaded(remote, data)
    assert remote.requests == client.TRIES


def test_what_a_registry_without_ranges_sends_again_is_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make.random_bytes(1024 * 60 * 10, 1)
    remote = SlowRepository(Clock(monkeypatch), data, 1024, cut=400)
    open_blob = remote.open_blob

    def from_the_beginning(digest: Digest, offset: int) -> tuple[Any, int]:
        remote._cut = 400 if remote.requests == 0 else None
        return open_blob(digest, 0)

    monkeypatch.setattr(remote, "open_blob", from_the_beginning)
    assert downloaded(remote, data) == data
    assert remote.requests == 2


# Tokens


@pytest.fixture
def guarded() -> Iterator[Registry]:
    with Registry(auth="bearer") as remote:
        remote.add(IMAGE, "app", "1")
        yield remote


@pytest.fixture
def login(guarded: Registry, tmp_path: Path) -> Path:
    path = tmp_path / "auth.json"
    path.write_text(json.dumps({"auths": {guarded.host: {"username": USER, "password": PASSWORD}}}))
    return path


def test_a_request_that_is_refused_with_a_new_token_asks_for_no_other(
    cache: Cache, guarded: Registry, login: Path
) -> None:
    challenge = f'Bearer realm="{guarded.realm}",service="x",scope="repository:app:pull"'
    guarded.fault(answer(401, {"WWW-Authenticate": challenge}), path="/manifests/", times=99)
    with pytest.raises(RegistryError, match="refuses app:1"):
        cache.pull(f"{guarded.host}/app:1", authfile=login)
    assert guarded.count(path="/token") == 1
    assert guarded.count(path="/manifests/") == 2, "without a token, and with one"


def test_requests_that_are_refused_together_ask_for_one_token(cache: Cache, guarded: Registry, login: Path) -> None:
    """The token that the manifest was fetched with has expired when the blobs are asked for, all at once."""
    together = threading.Barrier(4, timeout=60)  # as many as are downloaded at a time
    refused = threading.Semaphore(4)

    def expired(call: Call) -> Answer:
        if refused.acquire(blocking=False):
            together.wait()
            challenge = f'Bearer realm="{guarded.realm}",service="x",scope="repository:app:pull"'
            return Answer(401, {"WWW-Authenticate": challenge})
        return call.serve()

    guarded.fault(expired, method="GET", path="/blobs/", times=99)
    cache.pull(f"{guarded.host}/app:1", authfile=login)
    assert guarded.count(path="/token") == 2, "one for the manifest, one for all blobs"


def test_a_token_of_the_largest_size_is_taken_and_no_larger_one(
    cache: Cache, guarded: Registry, login: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_TOKEN_LIMIT", 2000)
    guarded.fault(rewritten(lambda data: data.ljust(2000)), path="/token")
    cache.pull(f"{guarded.host}/app:1", authfile=login)
    guarded.fault(rewritten(lambda data: data.ljust(2001)), path="/token")
    with pytest.raises(RegistryError, match="is over 2000 bytes"):
        cache.pull(f"{guarded.host}/app:1", authfile=login)


# Requests


@pytest.fixture
def remote() -> Iterator[Registry]:
    with Registry() as made:
        made.add(IMAGE, "app", "1")
        yield made


def repository_at(remote: Registry) -> registry.Repository:
    return registry.Repository(places.place(Name.parse(f"{remote.host}/app:1")))


def test_a_request_is_sent_five_times_and_not_more(remote: Registry) -> None:
    repository = repository_at(remote)
    remote.fault(closed(), times=4)
    assert repository.digest("1") == IMAGE.digest
    remote.fault(closed(), times=5)
    with pytest.raises(RegistryUnavailable, match="cannot be reached"):
        repository.digest("1")
    assert remote.count() == 5 + 5
    repository.close()


@pytest.mark.parametrize(("failures", "goes_on"), [(3, True), (4, False)])
def test_a_token_is_asked_for_while_a_try_is_left_to_use_it(
    guarded: Registry, login: Path, failures: int, goes_on: bool
) -> None:
    repository = registry.Repository(places.place(Name.parse(f"{guarded.host}/app:1")), authfile=login)
    guarded.fault(closed(), method="HEAD", times=failures, first=True)
    if goes_on:
        assert repository.digest("1") == IMAGE.digest
    else:
        with pytest.raises(RegistryError, match="refuses app:1"):
            repository.digest("1")
    assert guarded.count(path="/token") == goes_on
    repository.close()


@pytest.mark.parametrize(
    ("said", "there"), [("0-0", None), ("0-1", 2), ("0-8", 9), ("0-9", 10), ("0-10", None), ("1-5", None)]
)
def test_an_upload_goes_on_where_the_registry_has_more_than_a_byte_and_no_more_than_all(
    remote: Registry, said: str, there: int | None
) -> None:
    repository = repository_at(remote)
    remote.fault(answer(204, {"Range": said, "Location": f"{remote.url}/next"}), method="GET", path="/upload")
    found = repository._upload_so_far(f"{remote.url}/upload", 10)
    assert found == ((None, 0) if there is None else (f"{remote.url}/next", there))
    repository.close()


def test_what_a_stranger_says_is_quoted_to_200_characters() -> None:
    assert client.one_line("x" * 200) == "x" * 200
    assert client.one_line("x" * 201) == "x" * 200 + "..."


def test_a_registry_that_wants_a_minute_has_it_and_no_longer(remote: Registry) -> None:
    repository = repository_at(remote)
    remote.fault(retry_later(60))
    assert repository.digest("1") == IMAGE.digest
    assert PAUSES == [60]
    remote.fault(retry_later(61))
    with pytest.raises(RegistryUnavailable, match="overloaded"):
        repository.digest("1")
    assert PAUSES == [60]
    repository.close()


def test_pauses_double(remote: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda *_: 1.0)
    repository = repository_at(remote)
    remote.fault(closed(), times=4)
    repository.digest("1")
    assert PAUSES == [0.5, 1, 2, 4]
    repository.close()


def test_five_redirects_are_followed(remote: Registry) -> None:
    repository = repository_at(remote)
    remote.fault(redirect(remote.url), times=5)
    assert repository.digest("1") == IMAGE.digest
    remote.fault(redirect(remote.url), times=6)
    with pytest.raises(RegistryError, match="redirects more than 5 times"):
        repository.digest("1")
    repository.close()


def test_a_manifest_of_the_largest_size_is_taken(remote: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = repository_at(remote)
    monkeypatch.setattr(registry, "DOCUMENT_LIMIT", len(IMAGE.manifest))
    assert repository.manifest("1").data == IMAGE.manifest
    monkeypatch.setattr(registry, "DOCUMENT_LIMIT", len(IMAGE.manifest) - 1)
    with pytest.raises(RegistryError, match=f"is over {len(IMAGE.manifest) - 1} bytes"):
        repository.manifest("1")
    repository.close()


def test_the_largest_port_is_one() -> None:
    assert places.place(Name.parse("localhost:65535/app:1")).registry == "localhost:65535"
    with pytest.raises(InvalidName, match="above 65535"):
        places.place(Name.parse("localhost:65536/app:1"))


def referrer(number: int) -> bytes:
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
def test_as_many_referrers_as_may_be_are_listed(remote: Registry, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(registry, "_MAX_REFERRERS", 3)
    for number in range(count):
        remote.add_manifest(referrer(number), "app")
    repository = repository_at(remote)
    if count == 3:
        assert len(repository.referrers(Digest(IMAGE.digest))) == 3
    else:
        with pytest.raises(RegistryError, match="lists more than 3 referrers"):
            repository.referrers(Digest(IMAGE.digest))
    repository.close()


@pytest.mark.parametrize("pages", [3, 4])
def test_as_many_pages_of_referrers_as_may_be_are_read(
    remote: Registry, monkeypatch: pytest.MonkeyPatch, pages: int
) -> None:
    monkeypatch.setattr(registry, "_MAX_REFERRERS", 3)
    more = {"Content-Type": OCI_INDEX, "Link": f'</v2/app/referrers/{IMAGE.digest}>; rel="next"'}
    remote.fault(headers(dict(more)), path="/referrers/", times=pages - 1)
    repository = repository_at(remote)
    if pages == 3:
        assert repository.referrers(Digest(IMAGE.digest)) == []
    else:
        with pytest.raises(RegistryError, match="lists more than 3 referrers"):
            repository.referrers(Digest(IMAGE.digest))
    repository.close()


@pytest.mark.parametrize("count", [2, 3])
def test_an_image_has_as_many_manifests_that_refer_to_it_as_may_be(
    cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr("cachedb.operations.pull._MAX_MANIFESTS", 3)
    remote.blobs["app", make.digest_of(b"{}")] = b"{}"
    for number in range(count):
        remote.add_manifest(referrer(number), "app")
    if count == 2:
        cache.pull(f"{remote.host}/app:1", referrers=True)
    else:
        with pytest.raises(RegistryError, match="has more than 3 manifests that refer to it"):
            cache.pull(f"{remote.host}/app:1", referrers=True)
