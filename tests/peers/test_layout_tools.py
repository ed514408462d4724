"""Archives and layouts of crane, regctl and oras: cachedb reads what they write, and they read what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cachedb import Cache
from cachedb.transports.archive.formats import Format
from tests.peers.test_archives import Tools, list_parts
from tests.support import make
from tests.support.make import digest_of
from tests.support.registries import crane_registry

AMD = make.image(1, 2, compression="gzip")
ARM = make.image(1, 3, compression="gzip", architecture="arm64")
MULTI = make.index(AMD, ARM)
SBOM = make.artifact("text/sbom", subject=AMD.manifest)

pytestmark = pytest.mark.usefixtures("in_folder")


def list_digests(cache: Cache, name: str) -> set[str]:
    return {blob.digest for blob in cache.get_image_blobs(name)}


def write_layout(path: Path) -> Path:
    """Write a layout with an image for one platform."""
    return make.write(path, make.oci_files({"1": AMD}))


def export_index(cache: Cache, form: Format, path: str, tag: str | None = None) -> None:
    make.save_index(cache, "app:1", AMD, ARM)
    cache.export("app:1", path, format=form, tag=tag)


# crane


def test_a_layout_that_crane_pulled_is_imported_with_its_digests(cache: Cache, tools: Tools, tmp_path: Path) -> None:
    make.write(tmp_path / "source", make.oci_files({"amd64": AMD, "arm64": ARM}, {"1": MULTI}))
    with crane_registry(tmp_path) as host:
        tools("crane", "push", "source", f"{host}/app:1")
        tools("crane", "pull", "--format", "oci", f"{host}/app:1", "layout")
        tools("crane", "pull", "--format", "oci", "--annotate-ref", f"{host}/app:1", "named")
    for layout, name in (("layout", "app:1"), ("named", None)):
        (image,) = cache.cache_from_tar(layout, name)
        assert image.digest == digest_of(MULTI)
        assert list_digests(cache, str(image.name)) == {digest_of(MULTI), *AMD.blobs, *ARM.blobs}
    assert str(image.name) == f"{host}/app:1"


@pytest.mark.parametrize("form", ["tarball", "legacy"])
def test_an_archive_that_crane_pulled_is_imported_with_its_config_and_layers(
    cache: Cache, tools: Tools, tmp_path: Path, form: str
) -> None:
    write_layout(tmp_path / "source")
    with crane_registry(tmp_path) as host:
        tools("crane", "push", "source", f"{host}/app:1")
        tools("crane", "pull", "--format", form, f"{host}/app:1", "crane.tar")
    (image,) = cache.cache_from_tar("crane.tar")
    assert str(image.name) == f"{host}/app:1"
    layers = AMD.layers if form == "tarball" else [make.layer(1), make.layer(2)]
    assert list_parts(cache.get_manifest(image.name)) == (digest_of(AMD.config), [*map(digest_of, layers)])


def test_crane_pushes_an_exported_layout_with_its_digest(cache: Cache, tools: Tools, tmp_path: Path) -> None:
    export_index(cache, "oci-dir", "layout", tag="1")
    with crane_registry(tmp_path) as host:
        tools("crane", "push", "layout", f"{host}/app:1")
        assert tools("crane", "digest", f"{host}/app:1") == digest_of(MULTI)
        assert tools("crane", "validate", "--remote", f"{host}/app:1")


@pytest.mark.parametrize("form", ["docker", "docker-archive"])
def test_crane_pushes_an_exported_archive_with_its_config(
    cache: Cache, tools: Tools, tmp_path: Path, form: Format
) -> None:
    make.save(cache, "app:1", AMD)
    cache.export("app:1", "app.tar", format=form)
    with crane_registry(tmp_path) as host:
        tools("crane", "push", "app.tar", f"{host}/app:1")
        assert list_parts(tools("crane", "manifest", f"{host}/app:1"))[0] == digest_of(AMD.config)


# regctl


def test_an_archive_that_regctl_exported_is_imported_with_its_digests(
    cache: Cache, tools: Tools, tmp_path: Path
) -> None:
    make.write(tmp_path / "source", make.oci_files({"amd64": AMD, "arm64": ARM}, {"1": MULTI}))
    tools("regctl", "image", "export", "--name", "team/app:1", "ocidir://source:1", "regctl.tar")
    (image,) = cache.cache_from_tar("regctl.tar")
    assert (str(image.name), image.digest) == ("docker.io/team/app:1", digest_of(MULTI))
    assert list_digests(cache, "docker.io/team/app:1") == {digest_of(MULTI), *AMD.blobs, *ARM.blobs}


@pytest.mark.parametrize("form", ["docker", "oci-archive"])
def test_regctl_imports_an_exported_archive_with_its_digest(cache: Cache, tools: Tools, form: Format) -> None:
    export_index(cache, form, "app.tar")
    tools("regctl", "image", "import", "ocidir://copy:1", "app.tar")
    assert tools("regctl", "image", "digest", "ocidir://copy:1") == digest_of(MULTI)


def test_regctl_copies_an_exported_layout_with_its_digest(cache: Cache, tools: Tools) -> None:
    export_index(cache, "oci-dir", "layout", tag="1")
    tools("regctl", "image", "copy", "ocidir://layout:1", "ocidir://copy:2")
    assert tools("regctl", "image", "digest", "ocidir://copy:2") == digest_of(MULTI)


# Referrers in layouts


@pytest.mark.parametrize(
    ("attach", "copy"),
    [
        (
            "regctl artifact put --artifact-type text/sbom --subject ocidir://layout:1 --file sbom",
            "regctl image copy --referrers ocidir://layout:1 ocidir://copy:1",
        ),
        (
            "oras attach --oci-layout --artifact-type text/sbom layout:1 sbom",
            "oras cp -r --from-oci-layout layout:1 --to-oci-layout copy:1",
        ),
    ],
    ids=["regctl", "oras"],
)
def test_a_referrer_that_a_tool_attached_in_a_layout_is_imported(
    cache: Cache, tools: Tools, tmp_path: Path, attach: str, copy: str
) -> None:
    write_layout(tmp_path / "layout")
    (tmp_path / "sbom").write_text("an SBOM")
    tools(*attach.split())
    tools(*copy.split())
    for layout in ("layout", "copy"):
        (image,) = cache.cache_from_tar(layout, f"{layout}:1")
        assert image.digest == AMD.digest
        assert {*AMD.blobs, digest_of(b"an SBOM")} < list_digests(cache, f"{layout}:1")
    assert list_digests(cache, "layout:1") == list_digests(cache, "copy:1")


def test_oras_lists_and_copies_the_referrers_of_an_exported_layout(cache: Cache, tools: Tools) -> None:
    make.save(cache, "app:1", AMD)
    make.attach(cache, "app:1", SBOM)
    cache.export("app:1", "layout", format="oci-dir", tag="1", referrers=True)
    tools("oras", "cp", "-r", "--from-oci-layout", "layout:1", "--to-oci-layout", "copy:1")
    for layout in ("layout:1", "copy:1"):
        found = json.loads(tools("oras", "discover", "--oci-layout", "--format", "json", layout))
        assert found["digest"] == AMD.digest
        assert [entry["digest"] for entry in found["referrers"]] == [SBOM.digest]
