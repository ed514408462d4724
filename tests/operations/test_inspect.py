"""Asking registries: digests, tags, and what manifests and configs say; nothing is stored."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachedb import Cache, DigestMismatch, InvalidManifest, InvalidName, NotInCache, RegistryError
from cachedb.oci.manifests import OCI_INDEX, OCI_MANIFEST
from cachedb.transports.registry import repository
from tests.conftest import Run
from tests.support import make
from tests.support.faults import Answer, Call, answer, change_headers, corrupt_body
from tests.support.registries import PASSWORD, USER, Registry, isolate_client  # noqa: F401 - isolate_client is a fixture

IMAGE = make.image(1, 2, compression="gzip")
ARM = make.image(3, architecture="arm64")

pytestmark = pytest.mark.usefixtures("check_promises")


@pytest.fixture
def cache(cache: Cache) -> Iterator[Cache]:
    yield cache
    assert cache.list_names() == cache.list_blobs() == []


@pytest.fixture
def remote() -> Iterator[Registry]:
    with Registry() as made:
        made.add(IMAGE, "app", "1")
        made.add_index(make.index(IMAGE, ARM), "app", "several", [IMAGE, ARM])
        yield made


def test_an_image_is_described_by_its_manifest_and_config(cache: Cache, remote: Registry) -> None:
    image = cache.inspect_remote(f"docker://{remote.host}/app:1")
    assert image.name == f"{remote.host}/app:1"
    assert image.digest == image.manifest == IMAGE.digest
    assert (image.platforms, image.os, image.architecture) == ([], "linux", "amd64")
    assert [layer.digest for layer in image.layers] == [make.digest_of(data) for data in IMAGE.layers]
    assert image.size == sum(len(data) for data in (IMAGE.config, *IMAGE.layers))
    assert remote.count("GET", path="/blobs/") == 1, "only the config is downloaded"


def test_an_index_is_described_with_the_wanted_platform(cache: Cache, remote: Registry) -> None:
    name, index = f"{remote.host}/app:several", make.index(IMAGE, ARM)
    image = cache.inspect_remote(name, platform="aarch64")
    assert (image.digest, image.manifest, image.architecture) == (make.digest_of(index), ARM.digest, "arm64")
    assert [(child.platform, child.digest) for child in image.platforms] == [
        ("linux/amd64", IMAGE.digest),
        ("linux/arm64", ARM.digest),
    ]
    with pytest.raises(NotInCache, match="is not for platform 'linux/s390x', but for linux/amd64, linux/arm64"):
        cache.inspect_remote(name, platform="linux/s390x")


def test_indexes_in_each_other_end(cache: Cache, remote: Registry) -> None:
    data = make.index(IMAGE, platforms=[{"os": "linux", "architecture": "s390x"}])
    for _ in range(20):
        remote.add_manifest(data, "app", "deep")
        entry = make.descriptor(data, json.loads(data)["mediaType"])
        data = json.dumps({**json.loads(data), "manifests": [entry]}).encode()
    remote.add_manifest(data, "app", "deep")
    with pytest.raises(InvalidManifest, match="is nested too deeply"):
        cache.inspect_remote(f"{remote.host}/app:deep", platform="linux/s390x")
    with pytest.raises(NotInCache, match="is not for platform 'linux/arm64'"):
        cache.inspect_remote(f"{remote.host}/app:deep", platform="linux/arm64")


@pytest.mark.parametrize(("indexes", "found"), [(7, True), (8, False)])
def test_seven_indexes_may_lead_to_a_manifest(cache: Cache, remote: Registry, indexes: int, found: bool) -> None:
    data, media_type = IMAGE.manifest, OCI_MANIFEST
    for _ in range(indexes):
        remote.add_manifest(data, "app", "deep")
        entry = make.descriptor(data, media_type)
        media_type = OCI_INDEX
        data = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}).encode()
    remote.add_manifest(data, "app", "deep")
    if found:
        assert cache.inspect_remote(f"{remote.host}/app:deep").manifest == IMAGE.digest
    else:
        with pytest.raises(InvalidManifest, match="is nested too deeply"):
            cache.inspect_remote(f"{remote.host}/app:deep")


def test_a_config_is_verified(cache: Cache, remote: Registry) -> None:
    remote.fault(corrupt_body(), method="GET", path="/blobs/")
    with pytest.raises(DigestMismatch, match="config sha256"):
        cache.inspect_remote(f"{remote.host}/app:1")


def test_a_digest_costs_one_request_and_is_verified_if_given(cache: Cache, remote: Registry) -> None:
    assert cache.get_remote_digest(f"{remote.host}/app:1") == IMAGE.digest
    assert [request.method for request in remote.requests] == ["HEAD"]
    assert cache.get_remote_digest(f"{remote.host}/app:1@{ARM.digest}") == ARM.digest
    with pytest.raises(RegistryError, match="has no app@"):
        cache.get_remote_digest(f"{remote.host}/app@{make.digest_of(b'nothing')}")


@pytest.mark.parametrize("page_size", [None, 1])
def test_all_tags_are_listed(cache: Cache, remote: Registry, page_size: int | None) -> None:
    remote.page_size = page_size
    assert cache.list_remote_tags(f"docker://{remote.host}/app") == ["1", "several"]
    with pytest.raises(InvalidName, match="has a tag or a digest"):
        cache.list_remote_tags(f"{remote.host}/app:1")
    with pytest.raises(RegistryError, match="has no tags of nothing"):
        cache.list_remote_tags(f"{remote.host}/nothing")


@pytest.mark.parametrize(
    ("body", "tags"),
    [(b'{"tags": null}', []), (b"{}", []), (b'{"tags": ["a", 1, "b\\u001b", "a", "c"]}', ["a", "c"])],
)
def test_a_list_of_tags_may_be_null_or_have_invalid_entries(
    cache: Cache, remote: Registry, body: bytes, tags: list[str]
) -> None:
    remote.fault(answer(200, body=body), path="/tags/list")
    assert cache.list_remote_tags(f"{remote.host}/app") == tags


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"tags": "a"}'])
def test_an_answer_that_is_no_list_of_tags_is_an_error(cache: Cache, remote: Registry, body: bytes) -> None:
    remote.fault(answer(200, body=body), path="/tags/list")
    with pytest.raises(RegistryError):
        cache.list_remote_tags(f"{remote.host}/app")


def test_endless_pages_of_tags_are_an_error(cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "_MAX_TAG_PAGES", 3)
    remote.fault(change_headers({"Link": '</v2/app/tags/list>; rel="next"'}), path="/tags/list", times=99)
    with pytest.raises(RegistryError, match="more than 3 pages of tags of app"):
        cache.list_remote_tags(f"{remote.host}/app")


def test_credentials_are_sent_to_a_registry_that_asks_for_them(cache: Cache) -> None:
    with Registry(auth="basic") as remote:
        remote.add(IMAGE, "app", "1")
        name, login = f"{remote.host}/app:1", (USER, PASSWORD)
        assert cache.get_remote_digest(name, credentials=login) == IMAGE.digest
        assert cache.list_remote_tags(f"{remote.host}/app", credentials=login) == ["1"]
        assert cache.inspect_remote(name, credentials=login).digest == IMAGE.digest
        assert cache.plan_pull(name, credentials=login).blobs == 3
        with pytest.raises(RegistryError, match="refuses"):
            cache.get_remote_digest(name)


@pytest.mark.slow
def test_the_commands_print_what_the_registry_has(cachedb: Run, remote: Registry) -> None:
    name = f"{remote.host}/app:several"
    assert cachedb("digest", name).stdout == f"{make.digest_of(make.index(IMAGE, ARM))}\n"
    assert json.loads(cachedb("digest", "--format", "json", name).stdout)["name"] == name
    assert cachedb("tags", f"{remote.host}/app").stdout == "1\nseveral\n"
    assert json.loads(cachedb("tags", "--format", "json", f"{remote.host}/app").stdout) == ["1", "several"]
    found = json.loads(cachedb("inspect", "--platform", "amd64", "--format", "json", name).stdout)
    assert (found["name"], found["manifest"], len(found["layers"])) == (name, IMAGE.digest, 2)
    printed = cachedb("inspect", "--platform", "amd64", f"docker://{name}").stdout
    assert "linux/arm64" in printed
    assert IMAGE.digest in printed
    assert cachedb("inspect", f"{remote.host}/app:nope").returncode == 1


# Plans, and many names


def test_a_plan_counts_what_a_pull_would_download(directory: Path, remote: Registry) -> None:
    name = f"{remote.host}/app:1"
    sizes = [len(data) for data in (IMAGE.config, *IMAGE.layers)]
    with Cache.open(directory) as cache:
        plan = cache.plan_pull(name)
        assert plan._asdict() == {
            "name": name,
            "digest": IMAGE.digest,
            "blobs": 3,
            "bytes": sum(sizes),
            "up_to_date": False,
        }
        assert cache.list_blobs() == []
        pulled = cache.pull(name)
        assert (pulled.blobs, pulled.bytes) == (plan.blobs, plan.bytes)
        assert cache.plan_pull(name) == plan._replace(blobs=0, bytes=0, up_to_date=True)
        several = cache.plan_pull(f"{remote.host}/app:several", all_platforms=True)
        assert (several.blobs, several.up_to_date) == (2, False)


@pytest.mark.slow
def test_one_name_that_fails_stops_no_other(cachedb: Run, directory: Path, remote: Registry, tmp_path: Path) -> None:
    names = [f"{remote.host}/app:1", f"{remote.host}/app:nope", f"{remote.host}/app:several", "Not:a:name"]
    file = tmp_path / "names.txt"
    file.write_text(f"# images\n{names[0]}  # the first\n\n{names[1]}\n{names[3]}\n  {names[2]}\n{names[0]}\n")
    for jobs in ("1", "4"):
        done = cachedb("pull", "--from", str(file), "--jobs", jobs, "--platform", "amd64", "-q")
        assert (done.returncode, done.stdout) == (1, f"{names[0]}\n{names[2]}\n")
        assert f"cachedb: {names[1]}: {remote.host} has no app:nope" in done.stderr
        assert "cachedb: Not:a:name: 'Not:a:name' is not a name" in done.stderr
    with Cache.open(directory) as cache:
        assert all(cache.is_image_complete(name) for name in (names[0], names[2]))
    done = cachedb("pull", "--from", "-", "-q", input=names[0])
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{names[0]}\n", "")
    assert cachedb("pull", "--from", str(tmp_path / "missing")).returncode == 2
    assert cachedb("pull").returncode == 2


def test_a_dry_run_reports_all_names(cachedb: Run, remote: Registry) -> None:
    name = f"{remote.host}/app:1"
    done = cachedb("pull", "-q", "--dry-run", f"{remote.host}/app:absent", name)
    assert (done.returncode, done.stdout) == (1, f"{name}\n")
    assert done.stderr.startswith(f"cachedb: {remote.host}/app:absent: ")


@pytest.mark.slow
def test_a_dry_run_stores_nothing(cachedb: Run, directory: Path, remote: Registry) -> None:
    name = f"{remote.host}/app:1"
    (plan,) = json.loads(cachedb("pull", "--dry-run", "--format", "json", name).stdout)
    assert (plan["name"], plan["blobs"], plan["up_to_date"]) == (name, 3, False)
    assert "would be pulled" in cachedb("pull", "--dry-run", name).stdout
    assert cachedb("pull", "--dry-run", "--if-missing", name).returncode == 2
    with Cache.open(directory) as cache:
        assert cache.list_blobs() == []


@pytest.mark.slow
def test_images_are_pulled_at_once(cachedb: Run, remote: Registry) -> None:
    together = threading.Barrier(2, timeout=60)

    def wait_for_other(call: Call) -> Answer:
        together.wait()
        return call.serve()

    remote.fault(wait_for_other, method="HEAD", path="/manifests/", times=2)
    assert cachedb("pull", "-q", "--jobs", "2", f"{remote.host}/app:1", f"{remote.host}/app:several").returncode == 0
