"""Real registries and the tools that push to them: an image keeps its digest on the way through cachedb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import urllib3

from cachedb import Cache, IncompleteImage, InvalidName, RegistryError
from cachedb.oci.manifests import (
    DOCKER_CONFIG,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
)
from cachedb.transports.registry import tls
from tests.conftest import Run
from tests.operations.test_push import make_referrer
from tests.peers.test_archives import Tools, copy_rootfs
from tests.support import make
from tests.support.make import ImageContent, descriptor, digest_of, save, save_index
from tests.support.registries import (  # noqa: F401 - isolate_client is a fixture
    HTPASSWD,
    PASSWORD,
    REGISTRIES,
    USER,
    certificate,
    docker_registry,
    isolate_client,
)

PLAIN = "--tls-verify=false"

every_registry = pytest.mark.parametrize("host", REGISTRIES, indirect=True)
every_release = pytest.mark.parametrize("host", ["docker-registry", "distribution-3"], indirect=True)
"""Not crane's registry: its repositories share all blobs, and it does not list the tags of an empty repository."""


def as_docker(image: ImageContent) -> ImageContent:
    """Return a gzipped image with the media types of Docker's schema 2."""
    text = image.manifest.decode().replace(OCI_MANIFEST, DOCKER_MANIFEST).replace(OCI_CONFIG, DOCKER_CONFIG)
    layer = "application/vnd.docker.image.rootfs.diff.tar.gzip"
    return image._replace(manifest=text.replace(f"{OCI_LAYER}+gzip", layer).encode())


def without_media_type(image: ImageContent) -> ImageContent:
    """Return the image with a manifest without the optional field mediaType."""
    document = json.loads(image.manifest)
    del document["mediaType"]
    return image._replace(manifest=json.dumps(document).encode())


IMAGES = {
    "gzip": make.image(1, 2, compression="gzip"),
    "zstd": make.image(1, 2, compression="zstd"),
    "plain": make.image(1, 2),
    "docker": as_docker(make.image(1, 2, compression="gzip")),
}
ODD = {
    "layer-twice": make.image(1, 1, compression="gzip"),
    "no-layers": make.image(),
    "no-media-type": without_media_type(make.image(1, 2, compression="gzip")),
}
FIRST = IMAGES["gzip"]
SECOND = make.image(1, 3, compression="gzip")  # shares a layer with the first
ARM = make.image(1, 4, compression="gzip", architecture="arm64")
MULTI = make.index(FIRST, ARM)


@pytest.fixture(autouse=True)
def _host_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the host's platform to one that the images are for."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


def ask(host: str, method: str, path: str, body: bytes | None = None, **headers: str) -> urllib3.BaseHTTPResponse:
    """Send one request to a registry without cachedb; the path may be a URL, such as that of an upload."""
    with urllib3.PoolManager() as pool:
        url = path if path.startswith("http:") else f"http://{host}/v2/{path}"
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return pool.request(method, url, body=body, headers=headers, retries=False)


def put_image(host: str, repository: str, image: ImageContent, tag: str | None = None) -> None:
    """Push an image or an artifact without cachedb."""
    for data in {image.config, *image.layers}:
        location = ask(host, "POST", f"{repository}/blobs/uploads/").headers["Location"]
        separator = "&" if "?" in location else "?"
        assert ask(host, "PUT", f"{location}{separator}digest={digest_of(data)}", data).status == 201
    put_manifest(host, repository, image.manifest, tag)


def put_manifest(host: str, repository: str, data: bytes, tag: str | None = None) -> None:
    path = f"{repository}/manifests/{tag or digest_of(data)}"
    assert ask(host, "PUT", path, data, Content_Type=json.loads(data).get("mediaType", OCI_MANIFEST)).status == 201


def inspect(tools: Tools, name: str, *options: object) -> str:
    """Return the digest that skopeo reports of an image at a registry; check that its manifest has this digest."""
    digest = json.loads(tools("skopeo", "inspect", *(options or [PLAIN]), f"docker://{name}"))["Digest"]
    raw = tools("skopeo", "inspect", "--raw", *(options or [PLAIN]), f"docker://{name}")
    assert digest_of(raw.encode()) == digest
    return str(digest)


def assert_is_stored(cache: Cache, name: str, digest: str) -> None:
    """Check that a complete image with this digest is stored."""
    assert cache.get_image(name).digest == digest == digest_of(cache.get_manifest(name))
    assert cache.is_image_complete(name)
    assert all(blob.stored for blob in cache.get_image_blobs(name))
    assert cache.verify().problems == []


# Other tools pull what cachedb pushes


@every_registry
@pytest.mark.parametrize("kind", IMAGES)
def test_skopeo_copies_a_pushed_image_with_its_digest(
    cache: Cache, tools: Tools, host: str, tmp_path: Path, kind: str
) -> None:
    image, name = IMAGES[kind], f"{host}/team/app:1"
    save(cache, "app:1", image)
    pushed = cache.push("app:1", name)
    assert (pushed.digest, pushed.blobs, pushed.mounted, pushed.existing) == (image.digest, 3, 0, 0)
    assert pushed.bytes == sum(map(len, (image.config, *image.layers)))
    assert inspect(tools, name) == inspect(tools, f"{host}/team/app@{image.digest}") == image.digest
    tools("skopeo", "copy", "--src-tls-verify=false", "--preserve-digests", f"docker://{name}", f"dir:{tmp_path}/copy")
    copied = {digest_of(path.read_bytes()) for path in (tmp_path / "copy").iterdir()}
    assert image.blobs.keys() <= copied


def test_skopeo_copies_a_pushed_image_to_a_layout(cache: Cache, tools: Tools, host: str, tmp_path: Path) -> None:
    save(cache, f"{host}/app:1", FIRST)
    cache.push(f"{host}/app:1")
    tools("skopeo", "copy", "--src-tls-verify=false", f"docker://{host}/app:1", f"oci:{tmp_path}/layout:app:1")
    (entry,) = json.loads((tmp_path / "layout" / "index.json").read_bytes())["manifests"]
    assert entry["digest"] == FIRST.digest
    assert {f"sha256:{path.name}" for path in (tmp_path / "layout/blobs/sha256").iterdir()} == FIRST.blobs.keys()


@pytest.mark.parametrize("kind", IMAGES)
def test_podman_pulls_a_pushed_image_with_its_digest(cache: Cache, tools: Tools, host: str, kind: str) -> None:
    image, name = IMAGES[kind], f"{host}/team/app:1"
    save(cache, name, image)
    cache.push(name)
    assert tools("podman", "pull", "--quiet", PLAIN, name) == make.hex_of(image.config)
    assert tools("podman", "image", "inspect", "--format", "{{.Digest}}", name) == image.digest


@pytest.mark.parametrize("kind", IMAGES)
def test_buildah_builds_from_a_pushed_image(cache: Cache, tools: Tools, host: str, kind: str, tmp_path: Path) -> None:
    image, name = IMAGES[kind], f"{host}/team/app:1"
    save(cache, name, image)
    cache.push(name)
    container = tools("buildah", "from", PLAIN, name)
    assert tools("buildah", "inspect", "--format", "{{.FromImageDigest}}", container) == image.digest
    root = copy_rootfs(tools, container, tmp_path / "rootfs")
    assert (root / "file-2").read_bytes() == make.random_bytes(1000, 2)


@pytest.mark.parametrize("arch", ["amd64", "arm64"])
def test_podman_pulls_a_platform_of_a_pushed_index(cache: Cache, tools: Tools, host: str, arch: str) -> None:
    save_index(cache, "multi:1", FIRST, ARM)
    pushed = cache.push("multi:1", f"{host}/multi:1")
    assert (pushed.digest, pushed.media_type) == (digest_of(MULTI), OCI_INDEX)
    assert inspect(tools, f"{host}/multi:1") == digest_of(MULTI)
    config = {"amd64": FIRST.config, "arm64": ARM.config}[arch]
    assert tools("podman", "pull", "--quiet", PLAIN, "--arch", arch, f"{host}/multi:1") == make.hex_of(config)


# cachedb pulls what other tools push


PUSHES = [
    *(
        (tool, *how)
        for tool in ("skopeo", "podman", "buildah")
        for how in (("v2s2", "gzip"), ("oci", "gzip"), ("oci", "zstd"))
    ),
    ("skopeo", "oci", ""),
]
"""A tool, the format of the manifest that it pushes, and the compression of the layers."""


def make_and_push(tools: Tools, tool: str, form: str, compression: str, name: str, work: Path) -> None:
    """Let a tool push an image; podman and buildah also make it, and skopeo copies it."""
    if tool == "skopeo":
        layout = make.write(work / "layout", make.oci_files({"app:1": IMAGES["plain"]}))
        how = ["--format", form, "--dest-compress-format", compression] if compression else ["--preserve-digests"]
        tools("skopeo", "copy", *how, "--dest-tls-verify=false", f"oci:{layout}:app:1", f"docker://{name}")
        return
    if tool == "podman":
        (work / "tree.tar").write_bytes(make.layer(1))
        tools("podman", "import", "--quiet", work / "tree.tar", "localhost/app:1")
    else:
        (work / "file").write_bytes(b"content\n" * 100)
        container = tools("buildah", "from", "scratch")
        tools("buildah", "add", "--quiet", container, work / "file", "/file")
        tools("buildah", "commit", "--quiet", container, "localhost/app:1")
    options = ["--format", form, "--compression-format", compression, PLAIN]
    tools(tool, "push", "--quiet", *options, "localhost/app:1", f"docker://{name}")


@pytest.mark.slow
@pytest.mark.parametrize(("tool", "form", "compression"), PUSHES)
def test_an_image_that_a_tool_pushed_is_pulled_with_the_digest_that_skopeo_reports(
    cache: Cache, tools: Tools, host: str, tmp_path: Path, tool: str, form: str, compression: str
) -> None:
    name = f"{host}/team/app:1"
    make_and_push(tools, tool, form, compression, name, tmp_path)
    pulled = cache.pull(name)
    assert_is_stored(cache, name, inspect(tools, name))
    assert pulled.image.media_type == {"v2s2": DOCKER_MANIFEST, "oci": OCI_MANIFEST}[form]
    layers = [blob for blob in cache.get_image_blobs(name) if blob.role == "layer"]
    magic = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "": b"file-"}[compression]
    assert layers
    assert all(cache.get_blob(layer.digest).startswith(magic) for layer in layers)
    assert all(layer.media_type.rpartition("tar")[2].lstrip("+.") == compression for layer in layers)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["oci", "v2s2"])
def test_an_index_that_buildah_pushed_is_pulled_with_all_platforms(
    cache: Cache, tools: Tools, host: str, tmp_path: Path, form: str
) -> None:
    name = f"{host}/multi:1"
    tools("buildah", "manifest", "create", "multi:1")
    for arch in ("amd64", "arm64"):
        container = tools("buildah", "from", "--arch", arch, "scratch")
        (tmp_path / arch).write_text(f"{arch}\n" * 100)
        tools("buildah", "add", "--quiet", container, tmp_path / arch, f"/{arch}")
        tools("buildah", "commit", "--quiet", container, f"localhost/{arch}:1")
        tools("buildah", "manifest", "add", "multi:1", f"containers-storage:localhost/{arch}:1")
    tools("buildah", "manifest", "push", "--quiet", "--all", "--format", form, PLAIN, "multi:1", f"docker://{name}")
    pulled = cache.pull(name, all_platforms=True)
    assert_is_stored(cache, name, inspect(tools, name))
    assert pulled.image.media_type == {"v2s2": DOCKER_LIST, "oci": OCI_INDEX}[form]
    assert [(child.platform, child.complete) for child in cache.get_platforms(name)] == [
        ("linux/amd64", True),
        ("linux/arm64", True),
    ]


# From one registry to another


@every_registry
@pytest.mark.parametrize("image", [*IMAGES.values(), *ODD.values()], ids=[*IMAGES, *ODD])
def test_an_image_is_copied_between_registries_with_its_digest(
    cache: Cache, tools: Tools, host: str, other_host: str, image: ImageContent
) -> None:
    put_image(host, "app", image, "1")
    cache.pull(f"{host}/app:1")
    assert_is_stored(cache, f"{host}/app:1", image.digest)
    cache.push(f"{host}/app:1", f"{other_host}/copies/app:2")
    assert inspect(tools, f"{host}/app:1") == inspect(tools, f"{other_host}/copies/app:2") == image.digest


@every_release
def test_an_image_pushed_by_digest_has_no_tag(cache: Cache, tools: Tools, host: str) -> None:
    save(cache, "app:1", FIRST)
    cache.push("app:1", f"{host}/app@{FIRST.digest}")
    assert tools("skopeo", "inspect", "--raw", PLAIN, f"docker://{host}/app@{FIRST.digest}").encode() == FIRST.manifest
    assert ask(host, "GET", "app/tags/list").status == 404
    with pytest.raises(InvalidName, match="names another digest than"):
        cache.push("app:1", f"{host}/app@{SECOND.digest}")


def test_a_pull_through_registry_can_be_a_mirror(
    cache: Cache, fresh: Cache, tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_image(host, "team/app", FIRST, "1")
    (tmp_path / "mirror").mkdir()
    with docker_registry(tmp_path / "mirror", proxy=f"http://{host}") as mirror:
        monkeypatch.setenv("CACHEDB_MIRRORS", f"registry.test={mirror} {host}={mirror}")
        for opened in (cache, fresh):
            opened.pull("registry.test/team/app:1")  # only the mirror exists
            assert_is_stored(opened, "registry.test/team/app:1", FIRST.digest)
        # A push does not go to a mirror.
        assert cache.push("registry.test/team/app:1", f"{host}/team/app:2").existing == 3


def put_multi(host: str, repository: str, tag: str) -> None:
    put_image(host, repository, FIRST)
    put_image(host, repository, ARM)
    put_manifest(host, repository, MULTI, tag)


@every_registry
@pytest.mark.slow
def test_an_index_is_copied_between_registries_with_all_platforms(
    cachedb: Run, tools: Tools, host: str, other_host: str
) -> None:
    put_multi(host, "multi", "1")
    assert cachedb("pull", "-q", "--all-platforms", f"{host}/multi:1").returncode == 0
    done = cachedb("push", "-q", f"{host}/multi:1", f"{other_host}/multi:1")
    assert (done.returncode, done.stdout) == (0, f"{other_host}/multi@{digest_of(MULTI)}\n")
    assert inspect(tools, f"{other_host}/multi:1") == digest_of(MULTI)
    for image in (FIRST, ARM):
        assert inspect(tools, f"{other_host}/multi@{image.digest}", PLAIN) == image.digest


@pytest.mark.slow
def test_one_platform_is_copied_to_another_registry_as_an_image(
    cachedb: Run, tools: Tools, host: str, other_host: str
) -> None:
    put_multi(host, "multi", "1")
    assert cachedb("pull", "-q", "--platform", "linux/arm64", f"{host}/multi:1").returncode == 0
    failed = cachedb("push", f"{host}/multi:1", f"{other_host}/multi:1")
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert "has linux/amd64, which is not in the cache: pull it with --all-platforms" in failed.stderr
    assert ask(other_host, "GET", "multi/tags/list").status == 404  # nothing was sent
    done = cachedb("push", "-q", "--platform", "linux/arm64", f"{host}/multi:1", f"{other_host}/multi:1")
    assert (done.returncode, done.stdout) == (0, f"{other_host}/multi@{ARM.digest}\n")
    assert inspect(tools, f"{other_host}/multi:1", "--override-arch=arm64", PLAIN) == ARM.digest


def test_a_partial_index_can_be_pushed_if_the_registry_has_the_other_platforms(
    cache: Cache, tools: Tools, host: str
) -> None:
    put_multi(host, "multi", "1")
    cache.pull(f"{host}/multi:1", platform="linux/arm64")
    with pytest.raises(IncompleteImage, match="has linux/amd64, which is not in the cache"):
        cache.push(f"{host}/multi:1", f"{host}/elsewhere:1")
    pushed = cache.push(f"{host}/multi:1", f"{host}/multi:2")
    assert (pushed.blobs, pushed.mounted, pushed.existing) == (0, 0, 3)
    assert inspect(tools, f"{host}/multi:2") == digest_of(MULTI)


# Credentials and certificates


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["skopeo", "podman", "buildah"])
def test_a_push_uses_the_credentials_that_a_tool_wrote(
    cachedb: Run, cache: Cache, tools: Tools, tmp_path: Path, tool: str
) -> None:
    save(cache, "app:1", FIRST)
    authfile = tmp_path / "auth.json"
    with docker_registry(tmp_path, htpasswd=HTPASSWD) as host:
        refused = cachedb("push", "app:1", f"{host}/app:1")
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert f"log in with `skopeo login {host}`" in refused.stderr
        tools(tool, "login", PLAIN, "--authfile", authfile, "--username", USER, "--password", PASSWORD, host)
        done = cachedb("push", "-q", "--authfile", authfile, "app:1", f"{host}/app:1")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{host}/app@{FIRST.digest}\n", "")
        assert inspect(tools, f"{host}/app:1", PLAIN, f"--authfile={authfile}") == FIRST.digest
        with pytest.raises(RegistryError, match=f"log in with `skopeo login {host}`"):
            cache.pull(f"{host}/app:1")
        cache.pull(f"{host}/app:1", authfile=authfile)
        assert_is_stored(cache, f"{host}/app:1", FIRST.digest)
        tools(tool, "logout", "--authfile", authfile, host)
        with pytest.raises(RegistryError, match="log in with"):
            cache.push(f"{host}/app:1", f"{host}/app:2", authfile=authfile)


def test_the_default_credentials_file_of_podman_is_found(
    cache: Cache, tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(cache, "app:1", FIRST)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with docker_registry(tmp_path, htpasswd=HTPASSWD) as host:
        tools("podman", "login", PLAIN, "--username", USER, "--password", PASSWORD, host)
        assert (tmp_path / "containers" / "auth.json").exists()
        assert cache.push("app:1", f"{host}/app:1").digest == FIRST.digest


def test_a_private_authority_is_trusted_if_it_is_in_certs_d(
    cache: Cache, tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, certified, key = certificate(tmp_path / "tls", "127.0.0.1")
    save(cache, "app:1", FIRST)
    with docker_registry(tmp_path, tls=(certified, key), htpasswd=HTPASSWD) as host:
        authfile, trust = tmp_path / "auth.json", f"--cert-dir={authority.parent}"
        tools("skopeo", "login", trust, "--authfile", authfile, "--username", USER, "--password", PASSWORD, host)
        for plain, match in (
            (None, "answers 400 .*: if it speaks HTTPS, use --tls"),
            (False, rf"certs\.d/{host}/ca\.crt"),
        ):
            with pytest.raises(RegistryError, match=match):
                cache.push("app:1", f"{host}/app:1", plain_http=plain)
            with pytest.raises(RegistryError, match=match):
                cache.pull(f"{host}/app:1", plain_http=plain)
        (tmp_path / "certs.d" / host).mkdir(parents=True)
        (tmp_path / "certs.d" / host / "ca.crt").write_bytes(authority.read_bytes())
        monkeypatch.setattr(tls, "_CERTIFICATES", (str(tmp_path / "certs.d"),))
        cache.push("app:1", f"{host}/app:1", plain_http=False, authfile=authfile)
        assert inspect(tools, f"{host}/app:1", trust, f"--authfile={authfile}") == FIRST.digest
        cache.pull(f"{host}/app:1", plain_http=False, authfile=authfile)
        assert_is_stored(cache, f"{host}/app:1", FIRST.digest)


# Deleted at the registry


@pytest.mark.slow
def test_a_deleted_manifest_is_not_found_until_it_is_pushed_again(
    cachedb: Run, cache: Cache, tools: Tools, host: str
) -> None:
    name = f"{host}/app:1"
    put_image(host, "app", FIRST, "1")
    cache.pull(name)
    assert ask(host, "DELETE", f"app/manifests/{FIRST.digest}").status == 202
    for option in ([], ["--allow-stale"]):  # the registry is available and answers 404
        gone = cachedb("pull", *option, name)
        assert (gone.returncode, gone.stdout) == (1, "")
        assert gone.stderr == f"cachedb: {host} has no app:1 (404 MANIFEST_UNKNOWN: manifest unknown)\n"
    cache.pull(name, if_missing=True)
    assert_is_stored(cache, name, FIRST.digest)
    pushed = cache.push(name)
    assert (pushed.blobs, pushed.existing) == (0, 3)
    assert inspect(tools, name) == cache.pull(name).image.digest == FIRST.digest


def test_a_push_sends_only_the_blob_that_was_deleted(cache: Cache, tools: Tools, host: str, tmp_path: Path) -> None:
    name, layer = f"{host}/app:1", FIRST.layers[1]
    save(cache, name, FIRST)
    cache.push(name)
    assert ask(host, "DELETE", f"app/blobs/{digest_of(layer)}").status == 202
    pushed = cache.push(name)
    assert (pushed.blobs, pushed.bytes, pushed.mounted, pushed.existing) == (1, len(layer), 0, 2)
    tools("skopeo", "copy", "--src-tls-verify=false", f"docker://{name}", f"dir:{tmp_path}/copy")
    assert cache.push(name).blobs == 0


@pytest.mark.usefixtures("cache")
def test_the_error_of_a_deleted_layer_is_one_line(cachedb: Run, host: str) -> None:
    layer = digest_of(FIRST.layers[1])
    put_image(host, "app", FIRST, "1")
    assert ask(host, "DELETE", f"app/blobs/{layer}").status == 202
    failed = cachedb("pull", "-q", f"{host}/app:1")
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert failed.stderr.startswith(f"cachedb: {host} has no blob {layer} (404")
    assert cachedb("ls", "-q").stdout == ""


# Several repositories and tags of one registry


@every_release
def test_blobs_of_another_repository_are_mounted(cache: Cache, tools: Tools, host: str) -> None:
    save(cache, f"{host}/one/app:1", FIRST)
    assert cache.push(f"{host}/one/app:1").blobs == 3
    cache.tag(f"{host}/one/app:1", f"{host}/two/app:1")
    pushed = cache.push(f"{host}/two/app:1")
    assert (pushed.blobs, pushed.bytes, pushed.mounted, pushed.existing) == (0, 0, 3, 0)
    assert inspect(tools, f"{host}/two/app:1") == FIRST.digest
    save(cache, f"{host}/two/app:2", SECOND)
    pushed = cache.push(f"{host}/two/app:2", f"{host}/three/app:2")
    assert (pushed.blobs, pushed.mounted) == (2, 1)
    assert inspect(tools, f"{host}/three/app:2") == SECOND.digest


def test_a_blob_that_cannot_be_mounted_is_sent(cache: Cache, tools: Tools, host: str) -> None:
    layer = FIRST.layers[0]
    save(cache, f"{host}/one/app:1", FIRST)
    cache.push(f"{host}/one/app:1")
    assert ask(host, "DELETE", f"one/app/blobs/{digest_of(layer)}").status == 202
    pushed = cache.push(f"{host}/one/app:1", f"{host}/two/app:1")
    assert (pushed.blobs, pushed.bytes, pushed.mounted) == (1, len(layer), 2)
    assert inspect(tools, f"{host}/two/app:1") == FIRST.digest


@every_registry
def test_push_all_tags_sends_shared_blobs_once(cachedb: Run, cache: Cache, tools: Tools, host: str) -> None:
    save(cache, "app:1", FIRST)
    save(cache, "app:2", SECOND)
    cache.tag("app:1", "app:latest")
    cache.tag("app:1", f"app@{FIRST.digest}")
    done = cachedb("push", "--all-tags", "--format", "json", "app", f"{host}/team/app")
    assert (done.returncode, done.stderr) == (0, "")
    printed = {push["name"]: (push["digest"], push["blobs"], push["existing"]) for push in json.loads(done.stdout)}
    assert printed == {
        f"{host}/team/app:1": (FIRST.digest, 3, 0),
        f"{host}/team/app:2": (SECOND.digest, 2, 1),
        f"{host}/team/app:latest": (FIRST.digest, 0, 3),
    }
    listed = tools("skopeo", "list-tags", PLAIN, f"docker://{host}/team/app")
    assert sorted(json.loads(listed)["Tags"]) == ["1", "2", "latest"]
    assert inspect(tools, f"{host}/team/app:latest") == FIRST.digest


# Referrers at a registry without the referrers API


def list_entry(made: ImageContent) -> dict[str, Any]:
    """Return the descriptor that lists an artifact."""
    document = json.loads(made.manifest)
    more = {key: document[key] for key in ("artifactType", "annotations")}
    return descriptor(made.manifest, OCI_MANIFEST, **more)


def put_referrers(host: str, repository: str, subject: bytes, *artifacts: ImageContent) -> None:
    """Push artifacts and list them in a tag (distribution specification, "Referrers Tag Schema")."""
    for made in artifacts:
        put_image(host, repository, made)
    listed = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [list_entry(made) for made in artifacts]}
    put_manifest(host, repository, json.dumps(listed).encode(), digest_of(subject).replace(":", "-"))


def read_referrers(host: str, repository: str, subject: bytes) -> list[dict[str, Any]]:
    """Return the referrers that the tag lists."""
    tag = digest_of(subject).replace(":", "-")
    reply = ask(host, "GET", f"{repository}/manifests/{tag}", Accept=OCI_INDEX)
    assert (reply.status, reply.headers["Content-Type"]) == (200, OCI_INDEX)
    return list(json.loads(reply.data)["manifests"])


SIGNATURE = make_referrer(FIRST.manifest, b"a signature of the image")
SBOM = make_referrer(FIRST.manifest, b"an SBOM of the image")
SIGNATURE_OF_SBOM = make_referrer(SBOM.manifest, b"a signature of the SBOM")
SIGNATURE_OF_ARM = make_referrer(ARM.manifest, b"a signature of the image for arm64")
SIGNATURE_OF_MULTI = make_referrer(MULTI, b"a signature of the index", OCI_INDEX)


def list_digests(cache: Cache, name: str) -> set[str]:
    return {blob.digest for blob in cache.get_image_blobs(name)}


def closure(*images: ImageContent) -> set[str]:
    return {digest for image in images for digest in image.blobs}


@every_registry
def test_referrers_are_copied_between_registries(
    cache: Cache, fresh: Cache, tools: Tools, host: str, other_host: str
) -> None:
    put_image(host, "app", FIRST, "1")
    put_referrers(host, "app", FIRST.manifest, SBOM, SIGNATURE)
    put_referrers(host, "app", SBOM.manifest, SIGNATURE_OF_SBOM)
    cache.pull(f"{host}/app:1")
    assert list_digests(cache, f"{host}/app:1") == closure(FIRST)
    cache.pull(f"{host}/app:1", referrers=True)
    everything = closure(FIRST, SBOM, SIGNATURE, SIGNATURE_OF_SBOM)
    assert list_digests(cache, f"{host}/app:1") == everything
    assert_is_stored(cache, f"{host}/app:1", FIRST.digest)

    pushed = cache.push(f"{host}/app:1", f"{other_host}/copy:1")
    assert (pushed.digest, pushed.blobs) == (FIRST.digest, len(everything) - 4)  # without the four manifests
    listed = {listed["digest"]: listed for listed in read_referrers(other_host, "copy", FIRST.manifest)}
    assert listed == {made.digest: list_entry(made) for made in (SBOM, SIGNATURE)}
    assert read_referrers(other_host, "copy", SBOM.manifest) == [list_entry(SIGNATURE_OF_SBOM)]
    raw = tools("skopeo", "inspect", "--raw", PLAIN, f"docker://{other_host}/copy@{SBOM.digest}")
    assert raw.encode() == SBOM.manifest

    fresh.pull(f"{other_host}/copy:1", referrers=True)
    assert list_digests(fresh, f"{other_host}/copy:1") == everything
    assert_is_stored(fresh, f"{other_host}/copy:1", FIRST.digest)


def test_a_second_push_lists_no_referrer_twice_and_keeps_those_of_others(
    cache: Cache, host: str, other_host: str
) -> None:
    put_image(host, "app", FIRST, "1")
    put_referrers(host, "app", FIRST.manifest, SBOM)
    put_image(other_host, "app", FIRST, "1")
    put_referrers(other_host, "app", FIRST.manifest, SIGNATURE)
    cache.pull(f"{host}/app:1", referrers=True)
    for _ in range(2):
        cache.push(f"{host}/app:1", f"{other_host}/app:1")
        assert read_referrers(other_host, "app", FIRST.manifest) == [list_entry(SIGNATURE), list_entry(SBOM)]


@every_registry
def test_referrers_of_an_index_and_its_platforms_are_copied(
    cache: Cache, fresh: Cache, host: str, other_host: str
) -> None:
    put_multi(host, "multi", "1")
    put_referrers(host, "multi", MULTI, SIGNATURE_OF_MULTI)
    put_referrers(host, "multi", ARM.manifest, SIGNATURE_OF_ARM)
    put_referrers(host, "multi", FIRST.manifest, SIGNATURE)
    cache.pull(f"{host}/multi:1", all_platforms=True, referrers=True)
    cache.push(f"{host}/multi:1", f"{other_host}/multi:1")
    fresh.pull(f"{other_host}/multi:1", platform="linux/arm64", referrers=True)
    index = {digest_of(MULTI)}
    assert list_digests(fresh, f"{other_host}/multi:1") == closure(ARM, SIGNATURE_OF_ARM, SIGNATURE_OF_MULTI) | index
    assert_is_stored(fresh, f"{other_host}/multi:1", digest_of(MULTI))
    cache.push(f"{host}/multi:1", f"{other_host}/arm:1", platform="linux/arm64")
    fresh.pull(f"{other_host}/arm:1", platform="linux/arm64", referrers=True)
    assert list_digests(fresh, f"{other_host}/arm:1") == closure(ARM, SIGNATURE_OF_ARM)


def test_referrers_are_kept_when_another_platform_is_pulled(cache: Cache, host: str) -> None:
    put_multi(host, "multi", "1")
    put_referrers(host, "multi", MULTI, SIGNATURE_OF_MULTI)
    cache.pull(f"{host}/multi:1", referrers=True)
    cache.pull(f"{host}/multi:1", platform="linux/arm64")
    everything = closure(FIRST, ARM, SIGNATURE_OF_MULTI) | {digest_of(MULTI)}
    assert list_digests(cache, f"{host}/multi:1") == everything
    cache.tag(f"{host}/multi:1", "mine:1")
    assert list_digests(cache, "mine:1") == everything
    assert cache.verify(repair=True).problems == []


def test_a_referrer_added_later_is_pulled(cache: Cache, host: str) -> None:
    put_image(host, "app", FIRST, "1")
    cache.pull(f"{host}/app:1", referrers=True)
    assert list_digests(cache, f"{host}/app:1") == closure(FIRST)
    put_referrers(host, "app", FIRST.manifest, SIGNATURE)
    cache.pull(f"{host}/app:1")
    assert list_digests(cache, f"{host}/app:1") == closure(FIRST)
    assert cache.pull(f"{host}/app:1", referrers=True).blobs == 2
    assert list_digests(cache, f"{host}/app:1") == closure(FIRST, SIGNATURE)


@every_registry
def test_an_artifact_is_pulled_and_pushed_by_its_own_name(cache: Cache, host: str, other_host: str) -> None:
    put_image(host, "app", FIRST, "1")
    put_referrers(host, "app", FIRST.manifest, SBOM)
    name = f"{host}/app@{SBOM.digest}"
    cache.pull(name)
    assert_is_stored(cache, name, SBOM.digest)
    cache.push(name, f"{other_host}/app:sbom")
    assert read_referrers(other_host, "app", FIRST.manifest) == [list_entry(SBOM)]


def test_a_listed_referrer_that_was_deleted_is_skipped(cache: Cache, fresh: Cache, host: str) -> None:
    put_image(host, "app", FIRST, "1")
    put_referrers(host, "app", FIRST.manifest, SBOM, SIGNATURE)
    assert ask(host, "DELETE", f"app/manifests/{SBOM.digest}").status == 202  # the tag still lists it
    assert read_referrers(host, "app", FIRST.manifest) == [list_entry(SBOM), list_entry(SIGNATURE)]
    cache.pull(f"{host}/app:1", referrers=True)
    assert list_digests(cache, f"{host}/app:1") == closure(FIRST, SIGNATURE)
    other = make_referrer(FIRST.manifest, b"another signature")
    save(cache, "signature:1", other)
    cache.push("signature:1", f"{host}/app:signature")
    assert read_referrers(host, "app", FIRST.manifest) == [list_entry(SIGNATURE), list_entry(other)]
    save(cache, "sbom:1", SBOM)
    cache.push("sbom:1", f"{host}/app@{SBOM.digest}")
    fresh.pull(f"{host}/app:1", referrers=True)
    assert list_digests(fresh, f"{host}/app:1") == closure(FIRST, SIGNATURE, other, SBOM)
