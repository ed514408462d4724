"""Pushing images and referrers: which blobs are sent, in which order, and what happens when a registry fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cachedb import Cache, DigestMismatch, IncompleteImage, InvalidName, NotInCache, RegistryError, RegistryUnavailable
from cachedb.oci.manifests import OCI_INDEX, OCI_LAYER, OCI_MANIFEST
from cachedb.operations import push
from cachedb.transports.registry import repository as registry
from tests.conftest import Run
from tests.operations.test_pull import (  # noqa: F401 - unreachable is a fixture
    count_connecting,
    interrupt,
    patient_command,
    unreachable,
    write_login,
)
from tests.support import make
from tests.support.faults import Answer, Call, answer, change_answer, change_headers, drop_answer, redirect, retry_later
from tests.support.registries import SKIPPED_PAUSE_SECONDS, Registry, isolate_client  # noqa: F401 - isolate_client is a fixture
from tests.support.waiting import wait_until

FIRST = make.image(1, 2, compression="gzip")
SECOND = make.image(1, 3, compression="gzip")  # shares a layer with the first
LARGE = make.image(4, size=3_000_000)
ARM = make.image(1, 5, architecture="arm64")
EMPTY = b"{}"


def make_referrer(subject: bytes, what: bytes = b"a signature", media_type: str = OCI_MANIFEST) -> make.ImageContent:
    """Make an artifact whose subject is a manifest (image specification, "Guidelines for Artifact Usage")."""
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": "application/vnd.example.signature",
        "config": make.descriptor(EMPTY, "application/vnd.oci.empty.v1+json"),
        "layers": [make.descriptor(what, OCI_LAYER)],
        "subject": make.descriptor(subject, media_type),
        "annotations": {"org.example.by": "tests"},
    }
    return make.ImageContent(json.dumps(manifest).encode(), EMPTY, [what])


pytestmark = pytest.mark.usefixtures("check_promises")


@pytest.fixture
def cache(cache: Cache) -> Cache:
    for name, image in (("app:1", FIRST), ("app:2", SECOND), ("large:1", LARGE)):
        make.save(cache, name, image)
    return cache


@pytest.fixture
def remote() -> Iterator[Registry]:
    with Registry() as made:
        yield made


def assert_has(remote: Registry, repository: str, reference: str, image: make.ImageContent) -> None:
    assert remote.manifests[repository, reference][1] == image.manifest
    for data in (image.config, *image.layers):
        assert remote.blobs[repository, make.digest_of(data)] == data


def take_sent_digests(remote: Registry) -> list[str]:
    """Return the digests of the blobs that the registry was sent, and clear its requests."""
    found = [str(request.query["digest"]) for request in remote.requests if request.method == "PUT" and request.query]
    remote.requests.clear()
    return found


# What is sent, in which order


def test_a_pushed_image_is_complete_and_keeps_its_digest(cache: Cache, remote: Registry) -> None:
    pushed = cache.push("app:1", f"{remote.host}/team/app:stable")
    assert_has(remote, "team/app", "stable", FIRST)
    assert (str(pushed.name), pushed.digest, pushed.media_type) == (
        f"{remote.host}/team/app:stable",
        FIRST.digest,
        OCI_MANIFEST,
    )
    assert (pushed.blobs, pushed.mounted, pushed.existing) == (3, 0, 0)
    assert pushed.bytes == sum(len(data) for data in (FIRST.config, *FIRST.layers))


def test_an_image_without_a_target_is_pushed_to_its_own_name(cache: Cache, remote: Registry) -> None:
    cache.tag("app:1", f"{remote.host}/app:1")
    cache.push(f"{remote.host}/app:1")
    assert_has(remote, "app", "1", FIRST)


def test_the_tag_is_written_last(cache: Cache, remote: Registry) -> None:
    index = make.save_index(cache, "several:1", FIRST, ARM)
    cache.push("several:1", f"{remote.host}/several:1")
    puts = [request.path.rpartition("/")[2] for request in remote.requests if request.method == "PUT"]
    assert puts[-1] == "1"
    assert sorted(puts[-3:-1]) == sorted([FIRST.digest, ARM.digest])
    assert remote.manifests["several", "1"] == (OCI_INDEX, index)


def test_a_nested_index_is_pushed_before_the_outer_one(cache: Cache, remote: Registry) -> None:
    inner = make.save_index(cache, "inner:1", FIRST, ARM)
    child = make.descriptor(inner, OCI_INDEX)
    outer = {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [child, make.descriptor(SECOND.manifest, OCI_MANIFEST)],
    }
    cache.save_manifest("outer:1", json.dumps(outer).encode())
    cache.push("outer:1", f"{remote.host}/outer:1")
    assert remote.manifests["outer", make.digest_of(inner)] == (OCI_INDEX, inner)


def test_only_blobs_that_the_registry_lacks_are_sent(cache: Cache, remote: Registry) -> None:
    cache.push("app:1", f"{remote.host}/app:1")
    take_sent_digests(remote)
    pushed = cache.push("app:2", f"{remote.host}/app:2")
    new = SECOND.blobs.keys() - FIRST.blobs.keys() - {SECOND.digest}
    assert sorted(take_sent_digests(remote)) == sorted(new)
    assert (pushed.blobs, pushed.existing) == (2, 1)
    again = cache.push("app:2", f"{remote.host}/app:2")
    assert (again.blobs, again.bytes, again.existing) == (0, 0, 3)
    assert take_sent_digests(remote) == []


def test_a_blob_of_another_repository_is_mounted(cache: Cache, remote: Registry) -> None:
    remote.add(FIRST, "base")
    cache.tag("app:1", f"{remote.host}/base:1")
    cache.tag("app:1", f"{remote.host}/none:1")  # the registry does not have it
    cache.tag("app:1", "localhost:99999/not/there:1")  # no registry can have this port
    pushed = cache.push("app:2", f"{remote.host}/app:2")
    assert (pushed.mounted, pushed.blobs) == (1, 2)
    assert_has(remote, "app", "2", SECOND)
    deleted = [request for request in remote.requests if request.method == "DELETE"]
    assert len(deleted) == len([r for r in remote.requests if r.query.get("from") and r.status == 202])
    assert remote.uploads == {}


def test_a_mount_is_tried_from_three_repositories(cache: Cache, remote: Registry) -> None:
    for name in "abcd":
        cache.tag("app:1", f"{remote.host}/{name}:1")  # the registry has none of them
    pushed = cache.push("app:1", f"{remote.host}/app:1")
    assert (pushed.mounted, pushed.blobs) == (0, 3)
    tried = [request.query["from"] for request in remote.requests if "from" in request.query]
    assert sorted(tried) == sorted("abc" * 3)


def test_a_blob_that_may_not_be_mounted_is_sent(cache: Cache, tmp_path: Path) -> None:
    with Registry(auth="bearer") as remote:
        remote.grants = lambda repository, action: repository != "secret"
        remote.add(FIRST, "secret")
        cache.tag("app:1", f"{remote.host}/secret:1")
        pushed = cache.push("app:1", f"{remote.host}/app:1", authfile=write_login(tmp_path / "auth.json", remote.host))
        assert (pushed.mounted, pushed.blobs) == (0, 3)
        assert_has(remote, "app", "1", FIRST)


def test_push_tags_pushes_all_tags_of_a_repository(cache: Cache, remote: Registry) -> None:
    cache.tag("app:1", f"app@{FIRST.digest}")
    cache.tag("app:1", "other:1")
    pushed = list(cache.push_tags("app", f"{remote.host}/team/app"))
    assert [str(done.name) for done in pushed] == [f"{remote.host}/team/app:1", f"{remote.host}/team/app:2"]
    assert [(done.blobs, done.existing) for done in pushed] == [(3, 0), (2, 1)]
    assert_has(remote, "team/app", "1", FIRST)
    assert_has(remote, "team/app", "2", SECOND)
    asks = [request.path for request in remote.requests if request.method == "HEAD"]
    assert len(asks) == len(set(asks)) == 5  # the shared layer is checked once
    with pytest.raises(InvalidName, match="'app:1' has a tag"):
        next(cache.push_tags("app:1"))
    with pytest.raises(NotInCache, match="no tags"):
        next(cache.push_tags("nothing"))


@pytest.mark.slow
def test_a_pattern_pushes_each_image_to_its_name_or_to_a_target_with_its_stars(
    cachedb: Run, cache: Cache, remote: Registry
) -> None:
    done = cachedb("push", "app:*", f"{remote.host}/mirror/x*:v*", "-q")
    assert (done.returncode, done.stdout) == (2, "")
    pushed = cachedb("push", "app:*", f"{remote.host}/mirror/app:v*", "-q")
    assert pushed.stdout.split() == [f"{remote.host}/mirror/app@{image.digest}" for image in (FIRST, SECOND)]
    assert_has(remote, "mirror/app", "v2", SECOND)
    cache.tag("app:1", f"{remote.host}/own:1")
    assert cachedb("push", "--filter", "incomplete=false", f"{remote.host}/*").returncode == 0
    assert_has(remote, "own", "1", FIRST)
    assert ("app", "1") not in remote.manifests
    assert cachedb("push", "nope*").returncode == 3
    none = cachedb("push", "nope*", "--ignore-missing")
    assert (none.returncode, none.stderr) == (0, "no image matches: nothing is pushed\n")
    assert cachedb("push").returncode == 2
    assert cachedb("push", "--all-tags", "app", "--filter", "incomplete").returncode == 2


def test_a_target_with_another_digest_is_refused(cache: Cache, remote: Registry) -> None:
    with pytest.raises(InvalidName, match="names another digest than"):
        cache.push("app:1", f"{remote.host}/app@{SECOND.digest}")
    assert remote.requests == []
    cache.push("app:1", f"{remote.host}/app@{FIRST.digest}")
    assert_has(remote, "app", FIRST.digest, FIRST)


def test_a_missing_or_incomplete_image_is_refused_before_any_request(cache: Cache, remote: Registry) -> None:
    with pytest.raises(NotInCache):
        cache.push("nothing:1", f"{remote.host}/app:1")
    cache.save_manifest("lacking:1", make.image(1, 9).manifest)
    with pytest.raises(IncompleteImage):
        cache.push("lacking:1", f"{remote.host}/app:1")
    assert remote.requests == []


# Platforms


@pytest.fixture
def partly(cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch) -> str:
    """Pull one of two platforms of an image; return its name."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    name = remote.add_index(make.index(FIRST, ARM), "source", "1", [FIRST, ARM])
    cache.pull(name)
    remote.requests.clear()
    return name


def test_a_partial_index_is_pushed_only_where_its_other_manifests_are(
    cache: Cache, partly: str, remote: Registry
) -> None:
    with pytest.raises(IncompleteImage, match=r"has linux/arm64, .* --all-platforms, or push one .* --platform"):
        cache.push(partly, f"{remote.host}/target:1")
    assert [request.method for request in remote.requests] == ["HEAD"]
    cache.push(partly, f"{remote.host}/source:2")  # this repository has all manifests
    assert remote.manifests["source", "2"] == remote.manifests["source", "1"]


def test_one_platform_is_pushed_as_an_image_without_an_index(cache: Cache, partly: str, remote: Registry) -> None:
    pushed = cache.push(partly, f"{remote.host}/target:1", platform="linux/amd64")
    assert pushed.digest == FIRST.digest
    assert_has(remote, "target", "1", FIRST)
    with pytest.raises(NotInCache, match="for platform 'linux/arm64' is not in the cache"):
        cache.push(partly, f"{remote.host}/target:2", platform="linux/arm64")


def test_get_platforms_returns_all_platforms_and_which_are_complete(cache: Cache, partly: str) -> None:
    assert [tuple(found) for found in cache.get_platforms(partly)] == [
        ("linux/amd64", FIRST.digest, True),
        ("linux/arm64", ARM.digest, False),
    ]
    cache.pull(partly, all_platforms=True)
    assert all(found.complete for found in cache.get_platforms(partly))
    assert cache.get_platforms("app:1") == []


# Referrers


@pytest.mark.slow
@pytest.mark.parametrize("lists", [True, False], ids=["listed", "by-tag"])
def test_referrers_are_pulled_and_pushed_with_their_image(
    cache: Cache, remote: Registry, directory: Path, lists: bool
) -> None:
    remote.referrers = lists
    signature = make_referrer(FIRST.manifest)
    about = make_referrer(signature.manifest, b"about the signature")
    name = remote.add(FIRST, "app", "1")
    for made in (signature, about):
        remote.add(made, "app")
    if not lists:
        for subject, made in ((FIRST, signature), (signature, about)):
            index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
            index["manifests"] = [make.descriptor(made.manifest, OCI_MANIFEST)]
            remote.add_manifest(json.dumps(index).encode(), "app", subject.digest.replace(":", "-"))
    cache.pull(name, referrers=True)
    digests = {blob.digest for blob in cache.get_image_blobs(name)}
    assert digests == {*FIRST.blobs, *signature.blobs, *about.blobs}
    assert cache.get_image(name).architecture == "amd64"
    assert cache.verify().problems == []
    for target_lists in (True, False):
        with Registry() as target:
            target.referrers = target_lists
            cache.push(name, f"{target.host}/copy:1")
            for made in (signature, about):
                assert_has(target, "copy", made.digest, made)
            with Cache.open(directory.parent / f"other-{target_lists}") as other:
                other.pull(f"{target.host}/copy:1", referrers=True)
                assert {blob.digest for blob in other.get_image_blobs(f"{target.host}/copy:1")} == digests
            listed = target.manifests.get(("copy", FIRST.digest.replace(":", "-")))
            if not target_lists:
                assert listed
                (entry,) = json.loads(listed[1])["manifests"]
                assert entry["artifactType"] == "application/vnd.example.signature"
                assert entry["annotations"] == {"org.example.by": "tests"}
                cache.push(name, f"{target.host}/copy:1")
                assert target.manifests["copy", FIRST.digest.replace(":", "-")] == listed
            else:
                assert listed is None


def test_a_listed_artifact_of_another_image_is_not_pulled(cache: Cache, remote: Registry) -> None:
    remote.referrers = False
    name, stranger = remote.add(FIRST, "app", "1"), make_referrer(SECOND.manifest)
    remote.add(stranger, "app")
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX}
    index |= {"manifests": [make.descriptor(stranger.manifest, OCI_MANIFEST)]}
    remote.add_manifest(json.dumps(index).encode(), "app", FIRST.digest.replace(":", "-"))
    cache.pull(name, referrers=True)
    assert {blob.digest for blob in cache.get_image_blobs(name)} == {*FIRST.blobs}


def list_by_tag(remote: Registry, repository: str, subject: make.ImageContent, *artifacts: make.ImageContent) -> None:
    """List the referrers of an image in a tag, as for a registry without the referrers API."""
    remote.referrers = False
    entries = [make.descriptor(made.manifest, OCI_MANIFEST) for made in artifacts]
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    remote.add_manifest(json.dumps(index).encode(), repository, subject.digest.replace(":", "-"))


def test_a_listed_referrer_that_was_deleted_is_skipped(cache: Cache, remote: Registry) -> None:
    name, deleted, signature = (
        remote.add(FIRST, "app", "1"),
        make_referrer(FIRST.manifest, b"old"),
        make_referrer(FIRST.manifest),
    )
    remote.add(signature, "app")
    list_by_tag(remote, "app", FIRST, deleted, signature)
    cache.pull(name, referrers=True)
    assert {blob.digest for blob in cache.get_image_blobs(name)} == {*FIRST.blobs, *signature.blobs}
    cache.remove_manifest(name)
    cache.collect_garbage()
    remote.fault(answer(400), method="GET", path=signature.digest, times=9)  # it exists but cannot be downloaded
    with pytest.raises(RegistryError, match="answers 400"):
        cache.pull(name, referrers=True)


def test_deleted_referrers_are_dropped_from_the_list_when_one_is_added(cache: Cache, remote: Registry) -> None:
    deleted, other, signature = (make_referrer(FIRST.manifest, what) for what in (b"old", b"other", b"new"))
    remote.add(other, "app")
    list_by_tag(remote, "app", FIRST, deleted, other)
    make.save(cache, "signature:1", signature)
    cache.push("signature:1", f"{remote.host}/app:signature")
    listed = json.loads(remote.manifests["app", FIRST.digest.replace(":", "-")][1])["manifests"]
    assert [entry["digest"] for entry in listed] == [other.digest, signature.digest]
    newer = make_referrer(FIRST.manifest, b"newer")
    make.save(cache, "signature:2", newer)
    remote.fault(answer(400), method="PUT", path=FIRST.digest.replace(":", "-"))
    with pytest.raises(RegistryError, match="answers 400"):
        cache.push("signature:2", f"{remote.host}/app:newer")


def test_all_pages_of_a_list_of_referrers_are_read(cache: Cache, remote: Registry) -> None:
    remote.page_size = 1
    name, made = remote.add(FIRST, "app", "1"), [make_referrer(FIRST.manifest, bytes([n])) for n in range(3)]
    for signature in made:
        remote.add(signature, "app")
    cache.pull(name, referrers=True)
    digests = {blob.digest for blob in cache.get_image_blobs(name)}
    assert digests == set().union(FIRST.blobs, *(signature.blobs for signature in made))


@pytest.mark.parametrize("status", [303, 400, 401, 403, 404, 405, 406, 410, 415, 429, 500, 501])
def test_the_tag_lists_the_referrers_if_the_registry_refuses_to_list_them(
    cache: Cache, remote: Registry, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    name, signature = remote.add(FIRST, "app", "1"), make_referrer(FIRST.manifest)
    remote.add(signature, "app")
    list_by_tag(remote, "app", FIRST, signature)
    with Registry() as other:
        refused = redirect(other.url, 303) if status == 303 else answer(status)
        other.fault(answer(429), times=99, optional=True)
        remote.fault(refused, path="/referrers/", times=99)
        cache.pull(name, referrers=True)
    assert {blob.digest for blob in cache.get_image_blobs(name)} == {*FIRST.blobs, *signature.blobs}
    assert remote.count(path="/referrers/") <= 5, "one failing request for all manifests"
    assert "referrers" not in caplog.text


@pytest.mark.parametrize("status", [404, 429, 500, 503])
def test_a_registry_that_fails_to_list_referrers_is_not_silently_taken_to_have_none(
    cache: Cache, remote: Registry, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    name = remote.add(FIRST, "app", "1")
    remote.fault(answer(status), path="/referrers/", times=99)
    assert cache.pull(name, referrers=True).image.complete
    warning = (
        f"{remote.host} may have referrers that it does not list: {remote.host} is overloaded, or failing ({status}"
    )
    assert (warning in caplog.text) == (status != 404)


def test_another_host_that_fails_to_list_referrers_is_not_asked_again(cache: Cache, remote: Registry) -> None:
    """ghcr.io redirects to such a host."""
    name = remote.add(FIRST, "app", "1")
    with Registry() as other:
        other.fault(answer(429), times=99)
        remote.fault(redirect(other.url, 303), path="/referrers/", times=99)
        cache.pull(name, referrers=True)
        assert len(other.requests) == 1


def test_a_list_of_referrers_is_asked_for_again_after_a_temporary_failure(cache: Cache, remote: Registry) -> None:
    name, signature = remote.add(FIRST, "app", "1"), make_referrer(FIRST.manifest)
    remote.add(signature, "app")
    remote.fault(answer(503), path="/referrers/", times=4)
    cache.pull(name, referrers=True)
    assert {blob.digest for blob in cache.get_image_blobs(name)} == {*FIRST.blobs, *signature.blobs}


def test_a_later_page_of_referrers_that_fails_is_an_error(cache: Cache, remote: Registry) -> None:
    remote.page_size = 1
    name = remote.add(FIRST, "app", "1")
    for number in range(3):
        remote.add(make_referrer(FIRST.manifest, bytes([number])), "app")
    remote.fault(answer(404), path="/referrers/.*last=")
    with pytest.raises(RegistryError, match="has no referrers of sha256"):
        cache.pull(name, referrers=True)


def test_a_list_that_is_null_is_empty(cache: Cache, remote: Registry) -> None:
    name = remote.add(FIRST, "app", "1")
    null = b'{"schemaVersion":2,"mediaType":"%s","manifests":null}' % OCI_INDEX.encode()
    remote.fault(answer(200, {"Content-Type": OCI_INDEX}, null), path="/referrers/", times=9)
    cache.pull(name, referrers=True)
    assert {blob.digest for blob in cache.get_image_blobs(name)} == {*FIRST.blobs}


@pytest.mark.parametrize("is_index", [False, True])
def test_a_tag_that_gives_the_image_itself_lists_no_referrers(
    cache: Cache, remote: Registry, directory: Path, is_index: bool
) -> None:
    """registry.gitlab.com takes the tag sha256-HEX for the digest."""
    subject, media_type = (make.index(FIRST), OCI_INDEX) if is_index else (FIRST.manifest, OCI_MANIFEST)
    digest, tag = make.digest_of(subject), make.digest_of(subject).replace(":", "-")

    def serve_digest(call: Call) -> Answer:
        known = ("app", tag) in remote.manifests
        return call.serve() if known else Answer(200, {"Content-Type": media_type}, subject)

    remote.referrers = False
    remote.add(FIRST, "app")
    name = remote.add_manifest(subject, "app", "1")
    remote.fault(serve_digest, method="GET", path=tag, times=99)
    cache.pull(name, referrers=True)
    assert cache.get_image(name).digest == digest
    signature = make_referrer(subject, media_type=media_type)
    make.save(cache, "signature:1", signature)
    cache.push("signature:1", f"{remote.host}/app:signature")
    listed = json.loads(remote.manifests["app", tag][1])["manifests"]
    assert [entry["digest"] for entry in listed] == [signature.digest]


def test_a_new_signature_is_pulled_to_a_stored_image(cache: Cache, remote: Registry) -> None:
    name = remote.add(FIRST, "app", "1")
    cache.pull(name, referrers=True)
    signature = make_referrer(FIRST.manifest)
    remote.add(signature, "app")
    cache.pull(name)
    assert len(cache.get_image_blobs(name)) == 4
    cache.pull(name, referrers=True)
    assert {blob.digest for blob in cache.get_image_blobs(name)} == {*FIRST.blobs, *signature.blobs}
    cache.tag(name, "mine:1")
    cache.remove_manifest(name)
    assert {blob.digest for blob in cache.get_image_blobs("mine:1")} == {*FIRST.blobs, *signature.blobs}
    cache.remove_manifest("mine:1", "app:1")
    assert not cache.has_blob(signature.digest)


# Registries that fail or return wrong values


def test_an_interrupted_upload_resumes_in_chunks(
    cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_CHUNK_BYTES", 800_000)
    remote.fault(drop_answer(1_000_000), method="PUT", path="/uploads/", times=1)
    calls: list[tuple[int, int]] = []
    pushed = cache.push("large:1", f"{remote.host}/large:1", progress=lambda done, total: calls.append((done, total)))
    assert_has(remote, "large", "1", LARGE)
    whole = sum(len(data) for data in (LARGE.config, *LARGE.layers))
    assert calls[-1] == (whole, whole)
    assert max(done for done, _ in calls) <= whole
    assert pushed.bytes == whole
    ranges = [request.headers["content-range"] for request in remote.requests if "content-range" in request.headers]
    assert ranges or len(LARGE.layers[0]) < 1_000_000  # the interrupted blob may be the small one


@pytest.mark.parametrize("status", [404, 413, 416])
def test_an_upload_that_is_lost_or_too_large_restarts_in_chunks(
    cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(registry, "_CHUNK_BYTES", 700_000)
    remote.fault(answer(status), method="PUT", path=f"/uploads/.*{make.hex_of(LARGE.layers[0])}")
    cache.push("large:1", f"{remote.host}/large:1")
    assert_has(remote, "large", "1", LARGE)
    patched = [request for request in remote.requests if request.method == "PATCH" and request.size > 100_000]
    assert [request.size for request in patched][:4] == [700_000] * 4


@pytest.mark.parametrize("status", [400, 403, 405, 411, 415, 501])
def test_a_blob_is_sent_in_chunks_if_the_registry_refuses_it_whole(
    cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(registry, "_CHUNK_BYTES", 700_000)

    def refuse_bodies(call: Call) -> Answer:
        return Answer(status) if call.headers.get("content-length", "0") != "0" else call.serve()

    remote.fault(refuse_bodies, method="PUT", path="/uploads/", times=99)
    pushed = cache.push("large:1", f"{remote.host}/large:1")
    assert_has(remote, "large", "1", LARGE)
    assert pushed.bytes == sum(len(data) for data in (LARGE.config, *LARGE.layers))


def test_a_registry_that_refuses_whole_blobs_is_not_offered_all_of_them(cache: Cache, remote: Registry) -> None:
    make.save(cache, "many:1", make.image(*range(20)))

    def refuse_bodies(call: Call) -> Answer:
        return Answer(501) if call.headers.get("content-length", "0") != "0" else call.serve()

    remote.fault(refuse_bodies, method="PUT", path="/uploads/", times=99)
    cache.push("many:1", f"{remote.host}/many:1")
    assert sum(request.status == 501 for request in remote.requests) <= push._PARALLEL_UPLOADS


def test_an_upload_that_cannot_be_cancelled_is_left(cache: Cache, remote: Registry) -> None:
    for number in range(3):
        make.save(cache, f"{remote.host}/other{number}:1", LARGE)
    remote.fault(answer(500), method="DELETE", times=99)
    cache.push("large:1", f"{remote.host}/large:1")
    assert_has(remote, "large", "1", LARGE)
    assert remote.count("DELETE") == 1
    assert SKIPPED_PAUSE_SECONDS == []


@pytest.mark.parametrize("status", [400, 403, 405, 501])
def test_a_blob_is_found_at_a_registry_that_refuses_head(cache: Cache, remote: Registry, status: int) -> None:
    cache.push("app:1", f"{remote.host}/app:1")
    remote.requests.clear()
    remote.fault(answer(status), method="HEAD", times=99)
    pushed = cache.push("app:1", f"{remote.host}/app:2")
    assert (pushed.blobs, pushed.existing) == (0, 3)


def test_a_push_fails_if_the_registry_loses_every_upload(
    cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_CHUNK_BYTES", 700_000)
    remote.fault(answer(404), method="PUT", path="/uploads/", times=-1)
    calls = iter(range(500))  # ends an endless push
    with pytest.raises(RegistryError, match="404"):
        cache.push("large:1", f"{remote.host}/large:1", progress=lambda done, total: print(next(calls)))


@pytest.mark.parametrize("status", [429, 503])
def test_a_temporary_failure_is_retried(cache: Cache, remote: Registry, status: int) -> None:
    remote.fault(retry_later(7, status), method="PUT", times=2)
    remote.fault(retry_later(7, status), method="POST", times=1)
    cache.push("app:1", f"{remote.host}/app:1")
    assert_has(remote, "app", "1", FIRST)
    assert len([pause for pause in SKIPPED_PAUSE_SECONDS if pause >= 7]) == 3


def test_a_registry_that_is_overloaded_for_long_is_unavailable(cache: Cache, remote: Registry) -> None:
    remote.fault(answer(503), method="PUT", path="/uploads/", times=-1)
    with pytest.raises(RegistryUnavailable, match="503"):
        cache.push("app:1", f"{remote.host}/app:1")
    assert remote.manifests == {}


def test_a_registry_that_returns_another_digest_is_an_error(cache: Cache, remote: Registry) -> None:
    remote.fault(change_headers({"Docker-Content-Digest": SECOND.digest}), method="PUT", path="/manifests/")
    with pytest.raises(RegistryError, match="is not its digest"):
        cache.push("app:1", f"{remote.host}/app:1")


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_only_a_logged_in_user_may_push(cache: Cache, tmp_path: Path, auth: str) -> None:
    with Registry(auth=auth) as remote:
        with pytest.raises(RegistryError, match="log in with"):
            cache.push(
                "app:1", f"{remote.host}/app:1", authfile=write_login(tmp_path / "no", remote.host, password="x")
            )
        cache.push("app:1", f"{remote.host}/app:1", authfile=write_login(tmp_path / "auth.json", remote.host))
        assert_has(remote, "app", "1", FIRST)


def test_no_more_uploads_begin_after_the_registry_refused_one(cache: Cache, tmp_path: Path) -> None:
    make.save(cache, "many:1", make.image(*range(30)))
    for program, answers in (("wrong", '{"Username":"user","Secret":"wrong"}'), ("broken", "")):
        asked = tmp_path / "asked"
        (tmp_path / f"docker-credential-{program}").write_text(f"#!/bin/sh\necho >>'{asked}'; echo '{answers}'\n")
        (tmp_path / f"docker-credential-{program}").chmod(0o755)
        (tmp_path / "auth.json").write_text(json.dumps({"credsStore": program}))
        with Registry(auth="basic") as remote, pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
            with pytest.raises(RegistryError):
                cache.push("many:1", f"{remote.host}/it:1", authfile=tmp_path / "auth.json")
        assert len(asked.read_text()) <= push._PARALLEL_UPLOADS
        asked.unlink()


@pytest.mark.slow
def test_a_token_that_expires_during_an_upload_is_replaced(cache: Cache, tmp_path: Path) -> None:
    with Registry(auth="bearer") as remote:
        remote.expires_in = 1
        remote.fault(change_answer(delay=1.5), method="POST", path="/uploads/", times=3)
        cache.push("large:1", f"{remote.host}/large:1", authfile=write_login(tmp_path / "auth.json", remote.host))
        assert_has(remote, "large", "1", LARGE)


def test_nothing_is_sent_to_an_upload_url_that_is_not_https(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.registries import certificate

    ca, certified, key = certificate(tmp_path / "tls", "127.0.0.1")
    monkeypatch.setenv("SSL_CERT_FILE", str(ca))
    with Registry() as other, Registry(auth="basic", tls=(certified, key)) as remote:
        authfile = write_login(tmp_path / "auth.json", remote.host)
        remote.fault(change_headers({"Location": f"{other.url}/v2/app/blobs/uploads/x"}), method="POST", times=1)
        with pytest.raises(RegistryError, match="redirect to a URL whose scheme is not allowed"):
            cache.push("app:1", f"{remote.host}/app:1", plain_http=False, authfile=authfile)
        assert other.requests == []


@pytest.mark.parametrize("data", [LARGE.manifest, LARGE.layers[0]], ids=["manifest", "layer"])
def test_a_damaged_blob_is_not_pushed(cache: Cache, remote: Registry, data: bytes) -> None:
    path = cache.get_blob_path(make.digest_of(data))
    path.chmod(0o600)
    path.write_bytes(data.replace(b": 2", b" :2", 1) if data == LARGE.manifest else data[:-1] + b"!")
    with pytest.raises(DigestMismatch, match=f"the file of {make.digest_of(data)} is damaged.*cachedb verify"):
        cache.push("large:1", f"{remote.host}/large:1")
    assert remote.manifests == {}
    if data == LARGE.layers[0]:  # the end of the blob is not sent
        assert ("large", make.digest_of(data)) not in remote.blobs
        assert all(len(sent) < len(data) for _, sent in remote.uploads.values())
    path.write_bytes(data)


@pytest.mark.slow
def test_a_push_succeeds_after_a_killed_one(directory: Path, cache: Cache, remote: Registry) -> None:
    target = f"{remote.host}/large:1"
    code = (
        "import os; from cachedb import Cache\n"
        "def progress(done, total):\n"
        "    if done > 1_500_000: os.kill(os.getpid(), 9)\n"
        f"Cache.open({str(directory)!r}).push('large:1', {target!r}, progress=progress)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert ("large", "1") not in remote.manifests
    cache.push("large:1", target)
    assert_has(remote, "large", "1", LARGE)


def test_an_image_that_is_removed_during_its_push_is_pushed_completely(cache: Cache, remote: Registry) -> None:
    many = make.image(*range(20, 32))  # more blobs than are sent at once, so most are not open yet
    make.save(cache, "many:1", many)

    def remove_and_collect(done: int, total: int) -> None:
        if cache.is_image_complete("many:1"):
            cache.remove_manifest("many:1")
            cache.collect_garbage()

    cache.push("many:1", f"{remote.host}/many:1", progress=remove_and_collect)
    assert_has(remote, "many", "1", many)
    cache.collect_garbage()
    assert not cache.has_blob(many.digest)


# The command line


@pytest.mark.slow
def test_push_prints_its_results(cachedb: Run, cache: Cache, remote: Registry) -> None:
    target = f"{remote.host}/team/app"
    (pushed,) = json.loads(cachedb("push", "--format", "json", "app:1", f"{target}:1").stdout)
    assert pushed.pop("size") == pushed["bytes"]
    assert pushed | {"bytes": 0} == {
        "name": f"{target}:1",
        "digest": FIRST.digest,
        "media_type": OCI_MANIFEST,
        "blobs": 3,
        "bytes": 0,
        "mounted": 0,
        "existing": 0,
    }
    assert cachedb("push", "-q", "app:1", f"{target}:1").stdout == f"{target}@{FIRST.digest}\n"
    both = cachedb("push", "--all-tags", "-q", "app", target).stdout
    assert both == f"{target}@{FIRST.digest}\n{target}@{SECOND.digest}\n"
    assert "EXISTING" in cachedb("push", "app:1", f"{target}:1").stdout
    assert cachedb("push", "nothing:1", f"{target}:1").returncode == 3
    assert cachedb("push", "app:1", "UPPER:1").returncode == 2
    assert cachedb("push", "-a", "--platform", "linux/amd64", "app", target).returncode == 2
    assert cachedb("push", "app:1", "127.0.0.1:1/app:1").returncode == 1


def test_tags_pushed_before_a_failure_are_printed(cachedb: Run, cache: Cache, remote: Registry) -> None:
    remote.fault(answer(400), method="PUT", path="/manifests/2", times=-1)
    done = cachedb("push", "-q", "--all-tags", "app", f"{remote.host}/app")
    assert (done.returncode, done.stdout) == (1, f"{remote.host}/app@{FIRST.digest}\n")
    assert "400" in done.stderr


def test_blob_progress_ends_at_the_size_of_each_blob(cache: Cache, remote: Registry, directory: Path) -> None:
    def make_bars() -> tuple[dict[str, tuple[int, int]], Any]:
        found: dict[str, tuple[int, int]] = {}
        return found, lambda digest, done, total: found.__setitem__(digest, (done, total))

    expected = {make.digest_of(data): (len(data), len(data)) for data in (FIRST.config, *FIRST.layers)}
    found, each = make_bars()
    cache.push("app:1", f"{remote.host}/app:1", blob_progress=each)
    assert found == expected
    with Cache.open(directory.parent / "other") as other:
        found, each = make_bars()
        other.pull(f"{remote.host}/app:1", blob_progress=each)
        assert found == expected


def test_an_upload_continues_at_the_host_of_its_redirect(cache: Cache, remote: Registry) -> None:
    with Registry() as storage:
        remote.fault(redirect(storage.url), method="POST", path="/blobs/uploads/", times=99)
        storage.fault(
            change_headers({"Location": "/v2/app/blobs/uploads/one"}), method="POST", path="/blobs/uploads/", times=99
        )
        with pytest.raises(RegistryError):
            cache.push("app:1", f"{remote.host}/app:1")  # the storage host does not commit any blob
        assert storage.count("PUT", "/blobs/uploads/one")
    assert not remote.count("PUT", "/blobs/uploads/")


def test_the_error_of_a_read_only_registry_says_so(cache: Cache, remote: Registry) -> None:
    remote.fault(answer(405), method="POST", times=99)
    with pytest.raises(RegistryError, match=r"does not accept repository app \(405\): check that it is neither"):
        cache.push("app:1", f"{remote.host}/app:1")


def test_the_location_of_a_pushed_manifest_is_ignored(cache: Cache, remote: Registry) -> None:
    for location in ("http://elsewhere.example/", "https://[", "ftp:x"):
        remote.fault(change_headers({"Location": location}), method="PUT", path="/manifests/")
        cache.push("app:1", f"{remote.host}/app:1")
    assert_has(remote, "app", "1", FIRST)


@pytest.mark.slow
def test_an_interrupt_does_not_wait_for_a_connection(
    directory: Path,
    cache: Cache,
    unreachable: str,  # noqa: F811 - the fixture
) -> None:
    others = count_connecting(unreachable)
    with patient_command("--dir", directory, "push", "app:1", f"{unreachable}/it:1") as process:
        assert wait_until(lambda: count_connecting(unreachable) > others)
        assert interrupt(process) == (130, "cachedb: interrupted")
