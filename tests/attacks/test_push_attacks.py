"""Faulty and hostile registries during push and pull: an error of one line, and no damage."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cachedb import Cache, CacheError, InvalidManifest, NotInCache, RegistryError
from cachedb.oci.manifests import OCI_INDEX, OCI_MANIFEST
from cachedb.transports.registry import urls
from cachedb.transports.registry.challenges import parse_challenges
from tests.operations.test_pull import write_login
from tests.operations.test_push import FIRST, assert_has, make_referrer
from tests.support import make
from tests.support.faults import Answer, Call, answer, answer_html, change_answer, change_headers, drop_answer, redirect
from tests.support.make import save, save_index
from tests.support.registries import SKIPPED_PAUSE_SECONDS, Registry, certificate, isolate_client  # noqa: F401 - isolate_client is a fixture
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("check_promises")


@pytest.fixture
def cache(cache: Cache) -> Cache:
    save(cache, "app:1", FIRST)
    return cache


@pytest.fixture
def remote() -> Iterator[Registry]:
    with Registry() as made:
        yield made


@pytest.mark.slow
def test_an_interrupted_upload_resumes_over_tls(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # OpenSSL's error for a closed connection must not count as an untrusted certificate.
    ca, certified, key = certificate(tmp_path / "tls", "127.0.0.1")
    monkeypatch.setenv("SSL_CERT_FILE", str(ca))
    save(cache, "huge:1", huge := make.image(9, size=30_000_000))
    with Registry(tls=(certified, key)) as remote:
        for _ in range(3):
            remote.fault(drop_answer(3_000_000, reset=True), path="/blobs/uploads/.*state=")
        cache.push("huge:1", f"{remote.host}/huge:1", plain_http=False)
        assert_has(remote, "huge", "1", huge)
    assert SKIPPED_PAUSE_SECONDS


def test_credentials_go_only_to_the_host_of_the_connection(cache: Cache, tmp_path: Path) -> None:
    # URL parsers differ in where the host is: before the backslash, or after the last @.
    with Registry(auth="basic") as remote, Registry() as storage, Registry() as other:
        name, authfile = remote.add(FIRST, "app", "1"), write_login(tmp_path / "auth.json", remote.host)
        remote.fault(redirect(storage.url), method="GET", path="/blobs/", times=99)
        storage.fault(answer(307, {"Location": f"http://{other.host}\\@{remote.host}/x"}), times=99)
        cache.remove_manifest("app:1")
        cache.collect_garbage()
        with pytest.raises(RegistryError):
            cache.pull(name, authfile=authfile)
        assert all("authorization" not in request.headers for request in [*storage.requests, *other.requests])


@pytest.mark.parametrize("command", ["pull", "push"])
def test_only_the_registry_chooses_the_token_server(cache: Cache, tmp_path: Path, command: str) -> None:
    with Registry(auth="bearer") as remote, Registry() as storage, Registry() as other:
        name, authfile = remote.add(make.image(7), "app", "1"), write_login(tmp_path / "auth.json", remote.host)
        if command == "pull":
            remote.fault(redirect(storage.url), method="GET", path="/blobs/", times=99)
        else:
            remote.fault(change_headers({"Location": f"{storage.url}/upload"}), method="POST", path="/blobs/", times=99)
        challenge = {"WWW-Authenticate": f'Bearer realm="{other.url}/token",service="x",scope="repository:app:pull"'}
        storage.fault(answer(401, challenge), times=99)
        call = cache.pull if command == "pull" else partial(cache.push, "app:1")
        with pytest.raises(RegistryError, match="refuses"):
            call(name, authfile=authfile)
        assert storage.requests
        assert other.requests == []


@pytest.mark.parametrize("port", ["", ":443"])
def test_the_default_port_of_https_is_443(port: str) -> None:
    assert urls.origin(f"https://registry.example.org{port}/v2/") == ("https", "registry.example.org", 443)


@pytest.mark.parametrize(
    "after", ["²", "Wed, 21 Oct 99999 07:28:00 GMT", "Wed, 21 Oct 2015 07:28:00 +99999999999999999999", "-1", "soon"]
)
def test_an_invalid_retry_after_is_ignored(cache: Cache, remote: Registry, after: str) -> None:
    remote.fault(answer(503, {"Retry-After": after}), method="PUT", path="/blobs/")
    cache.push("app:1", f"{remote.host}/app:1")
    assert_has(remote, "app", "1", FIRST)
    assert len(SKIPPED_PAUSE_SECONDS) == 1


def test_a_long_challenge_costs_no_time() -> None:
    began = time.process_time()
    for text in ("a" * 60_000, "a=" * 30_000, 'a="' + "\\" * 60_000, "a" + " " * 60_000 + "b", "a " * 30_000):
        parse_challenges([text])
    assert time.process_time() - began < 2  # a minute if the pattern is tried from each letter on


def test_an_upload_answer_without_a_location_is_an_error(cache: Cache, remote: Registry) -> None:
    remote.fault(change_headers({"Location": None}), method="POST", times=99)
    with pytest.raises(RegistryError, match="answer without a Location"):
        cache.push("app:1", f"{remote.host}/app:1")


@pytest.mark.parametrize("least", ["²", "9" * 5000, "-1"])
def test_an_invalid_minimum_chunk_size_is_ignored(cache: Cache, remote: Registry, least: str) -> None:
    remote.fault(change_headers({"OCI-Chunk-Min-Length": least}), method="POST", times=99)
    remote.fault(drop_answer(5), method="PUT", path="/blobs/")
    cache.push("app:1", f"{remote.host}/app:1")
    assert_has(remote, "app", "1", FIRST)


def test_a_captive_portal_is_not_taken_for_a_registry(cache: Cache, remote: Registry) -> None:
    remote.fault(answer_html(), times=99)
    with pytest.raises(RegistryError, match="answers 200 to a request for app:1"):
        cache.push("app:1", f"{remote.host}/app:1")


def test_the_first_token_of_a_push_includes_the_right_to_push(cache: Cache, tmp_path: Path) -> None:
    # Some registries create a repository only for a token that may push.
    def refuse_without_push(call: Call) -> Answer:
        return call.serve() if "push" in call.query["scope"] else Answer(403)

    with Registry(auth="bearer") as remote:
        remote.fault(refuse_without_push, path="/token", times=99)
        cache.push("app:1", f"{remote.host}/app:1", authfile=write_login(tmp_path / "auth.json", remote.host))
        assert_has(remote, "app", "1", FIRST)
        assert remote.count(path="/token") == 1


def test_a_registry_that_is_down_is_named_without_internal_objects(cache: Cache) -> None:
    with pytest.raises(RegistryError) as raised:
        cache.push("app:1", "127.0.0.1:1/app:1")
    assert str(raised.value).startswith("127.0.0.1:1 cannot be reached: Failed to establish a new connection")


@pytest.mark.parametrize("data", [b"no JSON", b"", None])
@pytest.mark.parametrize("what", ["image", "referrer", "layer"])
def test_a_push_of_a_damaged_or_missing_file_names_verify(
    directory: Path, cache: Cache, remote: Registry, what: str, data: bytes | None
) -> None:
    name, made = remote.add(FIRST, "app", "1"), make_referrer(FIRST.manifest)
    remote.add(made, "app")
    cache.pull(name, referrers=True)
    digests = {"image": FIRST.digest, "referrer": made.digest, "layer": make.digest_of(FIRST.layers[0])}
    path = cache.get_blob_path(digests[what])
    kept = path.read_bytes()
    path.unlink()
    if data is not None:
        path.write_bytes(data if what != "layer" else data.ljust(len(kept) if data else 0))
    with Registry() as other, pytest.raises(CacheError, match=r"`cachedb verify( --repair)?`") as raised:
        cache.push(name, f"{other.host}/app:1")
    assert not isinstance(raised.value, NotInCache)
    assert not other.manifests
    path.unlink(missing_ok=True)
    path.write_bytes(kept)
    path.chmod(0o444)


@pytest.mark.slow
def test_connections_are_reused(cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    accept = remote._server.get_request

    def counted() -> tuple[socket.socket, Any]:
        made.append(1)
        return accept()

    monkeypatch.setattr(remote._server, "get_request", counted)
    save(cache, "many:1", make.image(*range(20)))
    cache.push("many:1", f"{remote.host}/many:1")
    assert len(remote.requests) > 60
    assert len(made) <= 5


def test_a_manifest_that_is_also_a_layer_is_pushed_as_both(cache: Cache, remote: Registry) -> None:
    outer = make.image(9)
    document = json.loads(outer.manifest)
    document["layers"].append(make.descriptor(FIRST.manifest, "application/vnd.example.manifest+json"))
    outer = outer._replace(manifest=json.dumps(document).encode(), layers=[*outer.layers, FIRST.manifest])
    save_index(cache, "both:1", FIRST, outer)
    cache.push("both:1", f"{remote.host}/both:1")
    assert_has(remote, "both", FIRST.digest, FIRST)
    assert_has(remote, "both", outer.digest, outer)


# Requests that have become useless are cancelled at once


@pytest.mark.slow
@pytest.mark.parametrize("tls", [False, True])
def test_a_refused_push_does_not_wait_for_unanswered_requests(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tls: bool
) -> None:
    ca, certified, key = certificate(tmp_path / "tls", "127.0.0.1")
    monkeypatch.setenv("SSL_CERT_FILE", str(ca))
    layer = make.digest_of(FIRST.layers[0])
    with Registry(tls=(certified, key) if tls else None) as remote:
        remote.fault(change_answer(delay=60), method="PUT", path=f"/blobs/.*{layer.partition(':')[2]}", times=99)
        remote.fault(answer(403, delay=1), method="PUT", path="/blobs/", times=99)
        began = time.monotonic()
        with pytest.raises(RegistryError, match="refuses upload"):
            cache.push("app:1", f"{remote.host}/app:1", plain_http=not tls)
        assert time.monotonic() - began < 30


PAUSE = answer(503, {"Retry-After": "50"})
SAY_WHEN_PAUSING = """
import os
from cachedb.cli.main import main
from cachedb.transports.registry import client

def say_and_sleep(*arguments, sleep=client._sleep):
    os.write(1, b"pausing\\n")  # at once: several threads may pause
    sleep(*arguments)

client._sleep = say_and_sleep
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["push", "pull"])
@pytest.mark.parametrize("do", [change_answer(delay=60), PAUSE], ids=["answer", "pause"])
def test_an_interrupt_does_not_wait_for_the_registry(
    cache: Cache, directory: Path, remote: Registry, command: str, do: Callable[[Call], Answer]
) -> None:
    name = remote.add(make.image(7, 8), "app", "1")
    cache.tag("app:1", f"{remote.host}/app:2")
    remote.fault(do, path="/blobs/", times=99)
    arguments = [sys.executable, "-c", SAY_WHEN_PAUSING, "--dir", str(directory), command]
    arguments.append(name if command == "pull" else f"{remote.host}/app:2")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert wait_until(lambda: any("/blobs/" in request.path for request in remote.requests))
        assert process.stdout is not None
        if do is PAUSE:
            assert process.stdout.readline() == "pausing\n"
        process.send_signal(signal.SIGINT)
        try:
            _, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
    assert (process.returncode, stderr.strip()) == (130, "cachedb: interrupted")


# Referrers

NONE = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}).encode()


def test_pages_of_referrers_have_an_end(cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachedb.transports.registry.repository._MAX_REFERRERS", 20)
    name = remote.add(FIRST, "app", "1")
    more = {"Content-Type": OCI_INDEX, "Link": f'</v2/app/referrers/{FIRST.digest}>; rel="next"'}
    remote.fault(answer(200, more, NONE), path="/referrers/", times=100)
    with pytest.raises(RegistryError, match="lists more than 20 referrers, or pages of them, for"):
        cache.pull(name, referrers=True)


def test_a_long_link_costs_no_time(cache: Cache, remote: Registry) -> None:
    name = remote.add(FIRST, "app", "1")
    remote.fault(answer(200, {"Content-Type": OCI_INDEX, "Link": "<" * 60_000}, NONE), path="/referrers/")
    began = time.process_time()
    cache.pull(name, referrers=True)
    assert time.process_time() - began < 5  # 15 seconds if the pattern is tried from each "<" to the end


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_an_index_of_referrers_with_a_subject_does_not_count_as_a_referrer(
    cache: Cache, remote: Registry, algorithm: str
) -> None:
    remote.referrers = False
    made = make_referrer(FIRST.manifest)
    tag = FIRST.digest.replace(":", "-")
    own = json.loads(NONE) | {"subject": make.descriptor(FIRST.manifest, OCI_MANIFEST)}
    remote.add_manifest(json.dumps(own).encode(), "app", tag)
    for data in (made.config, *made.layers):
        cache.add_blob(data)
    name = f"signature@{make.digest_of(made.manifest, algorithm)}"
    cache.save_manifest(name, made.manifest)
    cache.push(name, f"{remote.host}/app@{name.partition('@')[2]}")
    (entry,) = json.loads(remote.manifests["app", tag][1])["manifests"]
    assert ("app", entry["digest"]) in remote.manifests
    assert entry["digest"] == name.partition("@")[2]


def test_a_pull_by_digest_adds_new_referrers_to_a_stored_image(cache: Cache, remote: Registry) -> None:
    name = remote.add(FIRST, "app")
    cache.pull(name)
    remote.add(made := make_referrer(FIRST.manifest), "app")
    cache.pull(name, referrers=True)
    assert made.digest in {blob.digest for blob in cache.get_image_blobs(name)}
    remote.requests.clear()
    cache.pull(name, referrers=True, if_missing=True)
    assert remote.requests == []


def list_as_referrers(remote: Registry, *others: make.ImageContent) -> str:
    """Let the registry list these images as referrers of `FIRST`; return the name of `FIRST`."""
    name, entries = remote.add(FIRST, "app", "1"), []
    for other in others:
        remote.add(other, "app")
        entries.append(make.descriptor(other.manifest, json.loads(other.manifest)["mediaType"]))
    index = json.loads(NONE) | {"manifests": entries}
    found = answer(200, {"Content-Type": OCI_INDEX}, json.dumps(index).encode())
    remote.fault(found, path=f"/referrers/{FIRST.digest}", times=99)
    return name


def test_a_listed_referrer_of_another_image_leaves_nothing_behind(cache: Cache, remote: Registry) -> None:
    cache.pull(list_as_referrers(remote, make_referrer(b"another")), referrers=True)
    assert cache.get_stats().reclaimable_blobs == 0


def test_a_falsely_listed_manifest_that_a_referrer_contains_is_kept(cache: Cache, remote: Registry) -> None:
    inner = make_referrer(b"another")
    index = json.loads(NONE) | {
        "manifests": [make.descriptor(inner.manifest, OCI_MANIFEST)],
        "subject": make.descriptor(FIRST.manifest, OCI_MANIFEST),
    }
    outer = make.ImageContent(json.dumps(index).encode(), b"", [])
    name = list_as_referrers(remote, outer, inner)
    cache.pull(name, referrers=True)
    assert {outer.digest, inner.digest} <= {blob.digest for blob in cache.get_image_blobs(name)}


def test_the_manifest_of_a_referrer_is_requested_once(cache: Cache, remote: Registry) -> None:
    made = make_referrer(FIRST.manifest)
    cache.pull(list_as_referrers(remote, made), referrers=True)
    assert remote.count("GET", f"/manifests/{made.digest}") == 1


def test_referrers_whose_manifests_exceed_the_memory_limit_are_refused(
    cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachedb.transports.registry.source._MANIFEST_BYTES", 10_000)
    name = list_as_referrers(remote, *(make_referrer(FIRST.manifest, bytes([number])) for number in range(30)))
    with pytest.raises(InvalidManifest, match="more than 10000 bytes together"):
        cache.pull(name, referrers=True)
    assert cache.get_stats().reclaimable_blobs == 0
