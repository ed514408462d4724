"""Test which images of an OCI image layout are imported, and with which parts of their closures."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from cachedb import Cache
from cachedb.errors import DigestMismatch, InvalidArchive, InvalidManifest
from cachedb.oci.manifests import OCI_INDEX, OCI_MANIFEST
from tests.support import make
from tests.support.make import digest_of, hex_of, tar_of

AMD, ARM = make.image(1), make.image(2, architecture="arm64")
BOTH = make.index(AMD, ARM)
FOREIGN = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"


def layout_of(*entries: dict[str, Any], blobs: list[bytes]) -> dict[str, bytes]:
    """Return the files of a layout with these entries in index.json."""
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list(entries)}
    files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": json.dumps(index).encode()}
    return files | {f"blobs/sha256/{hex_of(data)}": data for data in blobs}


def named(data: bytes, name: str, media_type: str = OCI_MANIFEST) -> dict[str, Any]:
    return make.descriptor(data, media_type, annotations={make.REF_NAME: name})


def referrer_of(subject: bytes, content: bytes = b"an SBOM") -> bytes:
    """Return the manifest of an artifact that refers to another manifest."""
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": "application/vnd.example.sbom",
        "config": make.descriptor(b"{}", "application/vnd.oci.empty.v1+json"),
        "layers": [make.descriptor(content, "application/json")],
        "subject": make.descriptor(subject, OCI_MANIFEST),
    }
    return json.dumps(document).encode()


def import_files(cache: Cache, files: dict[str, bytes], name: str | None = None, **options: Any) -> list[str]:
    return [str(image.name) for image in cache.cache_from_tar(io.BytesIO(tar_of(files)), name, **options)]


def list_digests(cache: Cache, name: str) -> list[str]:
    return [blob.digest for blob in cache.get_image_blobs(name)]


def list_platforms(cache: Cache, name: str) -> dict[str | None, bool]:
    return {child.platform: child.complete for child in cache.get_platforms(name)}


# Partial indexes


@pytest.mark.parametrize("present", [[], [ARM.manifest], [ARM.manifest, ARM.config]])
def test_platforms_that_the_archive_lacks_are_absent(cache: Cache, tmp_path: Path, present: list[bytes]) -> None:
    files = layout_of(named(BOTH, "app:1", OCI_INDEX), blobs=[BOTH, *AMD.blobs.values(), *present])
    assert import_files(cache, files) == ["app:1"]
    assert cache.get_image("app:1").digest == digest_of(BOTH)
    assert cache.is_image_complete("app:1")
    assert list_platforms(cache, "app:1") == {"linux/amd64": True, "linux/arm64": False}
    cache.export("app:1", tmp_path / "app.tar")
    with Cache.open(tmp_path / "other") as other:
        other.cache_from_tar(tmp_path / "app.tar")
        assert list_platforms(other, "app:1") == {"linux/amd64": True}


def test_an_attestation_that_the_archive_lacks_is_absent(cache: Cache) -> None:
    attestation = make.image(3)
    index = make.index(
        AMD,
        attestation,
        platforms=[{"os": "linux", "architecture": "amd64"}, {"os": "unknown", "architecture": "unknown"}],
    )
    import_files(cache, layout_of(named(index, "app:1", OCI_INDEX), blobs=[index, *AMD.blobs.values()]))
    assert list_digests(cache, "app:1") == [digest_of(index), *AMD.blobs]


def test_platforms_of_two_partial_archives_are_kept_together(cache: Cache) -> None:
    for child in (AMD, ARM):
        import_files(cache, layout_of(named(BOTH, "app:1", OCI_INDEX), blobs=[BOTH, *child.blobs.values()]))
    assert list_digests(cache, "app:1") == [digest_of(BOTH), *AMD.blobs, *ARM.blobs]
    assert list_platforms(cache, "app:1") == {"linux/amd64": True, "linux/arm64": True}


def test_an_index_without_any_of_its_platforms_is_refused(cache: Cache) -> None:
    files = layout_of(named(BOTH, "app:1", OCI_INDEX), blobs=[BOTH])
    with pytest.raises(InvalidArchive, match=f"manifest {AMD.digest} is referenced in the archive, but is not in it"):
        import_files(cache, files)


def test_an_image_without_an_index_is_refused_if_a_layer_is_missing(cache: Cache) -> None:
    files = layout_of(named(AMD.manifest, "app:1"), blobs=[AMD.manifest, AMD.config])
    with pytest.raises(InvalidArchive, match=f"layer {digest_of(AMD.layers[0])} is referenced"):
        import_files(cache, files)


def test_a_partial_index_is_refused_in_a_tar_that_is_cut_short(cache: Cache) -> None:
    data = tar_of(layout_of(named(BOTH, "app:1", OCI_INDEX), blobs=[BOTH, *AMD.blobs.values(), *ARM.blobs.values()]))
    cut = data[: data.index(ARM.layers[0]) - 512]
    with pytest.raises(InvalidArchive, match="is not in the archive, which is cut short"):
        cache.cache_from_tar(io.BytesIO(cut))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        last = tar.getmembers()[-1]
    cache.cache_from_tar(io.BytesIO(data[: last.offset_data + last.size]))  # only the end is missing
    assert list_platforms(cache, "app:1") == {"linux/amd64": True, "linux/arm64": True}


def test_indexes_that_are_nested_too_deep_are_refused(cache: Cache) -> None:
    blobs, data, media_type = list(AMD.blobs.values()), AMD.manifest, OCI_MANIFEST
    for _ in range(130):
        entries = [make.descriptor(data, media_type)]
        data, media_type = json.dumps({"schemaVersion": 2, "manifests": entries}).encode(), OCI_INDEX
        blobs.append(data)
    with pytest.raises(InvalidArchive, match="nested more than 128 deep"):
        import_files(cache, layout_of(named(data, "app:1", OCI_INDEX), blobs=blobs))


def test_a_platform_whose_manifest_is_also_a_layer_needs_its_own_layers(cache: Cache) -> None:
    bundle = artifact(make.descriptor(b"{}", make.EMPTY_TYPE), make.descriptor(ARM.manifest, OCI_MANIFEST))
    index = make.index(make.ImageContent(bundle, b"{}", []), ARM)
    blobs = [index, bundle, b"{}", ARM.manifest, ARM.config]
    import_files(cache, layout_of(named(index, "app:1", OCI_INDEX), blobs=blobs))
    assert list_platforms(cache, "app:1") == {"linux/amd64": True, "linux/arm64": False}
    assert not cache.is_image_complete("app:1")
    with pytest.raises(InvalidArchive, match=f"layer {digest_of(ARM.layers[0])} is referenced"):
        import_files(cache, layout_of(named(bundle, "a:1"), named(ARM.manifest, "b:1"), blobs=blobs))


def test_the_blobs_of_images_that_share_them_have_a_limit(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachedb.transports.archive.model._BLOBS_LIMIT", 12)
    indexes = [json.dumps({**json.loads(BOTH), "annotations": {"n": str(n)}}).encode() for n in range(2)]
    blobs = [*indexes, *AMD.blobs.values(), *ARM.blobs.values()]
    entries = [named(index, f"app:{n}", OCI_INDEX) for n, index in enumerate(indexes)]
    assert import_files(cache, layout_of(entries[0], blobs=blobs)) == ["app:0"]
    read = []
    monkeypatch.setattr("cachedb.transports.archive.layout._attach_referrers", lambda *_: read.append(1))
    with pytest.raises(InvalidArchive, match="have more than 12 blobs"):
        import_files(cache, layout_of(*entries, blobs=blobs))
    assert not read  # refused before all lists of blobs are in memory


# Platforms


def test_only_the_wanted_platform_is_imported(cache: Cache) -> None:
    files = layout_of(named(BOTH, "app:1", OCI_INDEX), blobs=[BOTH, *AMD.blobs.values(), *ARM.blobs.values()])
    import_files(cache, files, platform="linux/arm64")
    assert list_digests(cache, "app:1") == [digest_of(BOTH), *ARM.blobs]


@pytest.mark.parametrize("blobs", [[*AMD.blobs.values()], [*AMD.blobs.values(), ARM.manifest]])
def test_a_wanted_platform_that_the_archive_lacks_is_refused(cache: Cache, blobs: list[bytes]) -> None:
    files = layout_of(named(BOTH, "app:1", OCI_INDEX), blobs=[BOTH, *blobs])
    with pytest.raises(InvalidArchive, match="no image for platform 'linux/arm64', but for linux/amd64: choose one"):
        import_files(cache, files, platform="linux/arm64")


def test_images_for_other_platforms_are_not_imported(cache: Cache) -> None:
    blobs = [*AMD.blobs.values(), *ARM.blobs.values()]
    files = layout_of(named(AMD.manifest, "amd:1"), named(ARM.manifest, "arm:1"), blobs=blobs)
    assert import_files(cache, files, platform="linux/arm64") == ["arm:1"]
    docker = make.docker_files({"amd:2": AMD, "arm:2": ARM})
    assert import_files(cache, docker, platform="linux/arm64") == ["arm:2"]
    with pytest.raises(InvalidArchive, match="no image for platform 'linux/s390x', but for linux/amd64, linux/arm64"):
        import_files(cache, docker, platform="linux/s390x")


def entries_by_platform(*names: str) -> list[dict[str, Any]]:
    """Return an entry of index.json for each architecture, with these names."""
    return [
        {**(named(child.manifest, name) if name else make.descriptor(child.manifest, OCI_MANIFEST)), "platform": label}
        for child, name, label in zip((AMD, ARM), names, LABELS, strict=True)
    ]


LABELS = [{"os": "linux", "architecture": architecture} for architecture in ("amd64", "arm64")]


def test_a_manifest_for_another_platform_may_be_absent(cache: Cache) -> None:
    files = layout_of(*entries_by_platform("app:1", "other:1"), blobs=[*AMD.blobs.values()])
    with pytest.raises(InvalidArchive, match=f"manifest {ARM.digest} is referenced"):
        import_files(cache, files)
    assert import_files(cache, files, platform="linux/amd64") == ["app:1"]
    assert cache.get_image("app:1").digest == AMD.digest


@pytest.mark.parametrize("name", ["app:1", ""])
def test_manifests_for_several_platforms_become_one_image_for_one_of_them(cache: Cache, name: str) -> None:
    """An absent platform is absent, as after a pull."""
    files = layout_of(*entries_by_platform(name, name), blobs=[*AMD.blobs.values()])
    assert import_files(cache, files, None if name else "app:1", platform="linux/amd64") == ["app:1"]
    assert cache.get_image("app:1").digest == digest_of(files["index.json"])
    assert list_platforms(cache, "app:1") == {"linux/amd64": True, "linux/arm64": False}
    assert cache.is_image_complete("app:1")
    with pytest.raises(InvalidArchive, match="no image for platform 'linux/s390x', but for linux/amd64, linux/arm64"):
        import_files(cache, files, "app:2", platform="linux/s390x")


def test_an_index_of_indexes_is_imported_for_one_platform(cache: Cache) -> None:
    inner = [make.index(child, platforms=[label]) for child, label in zip((AMD, ARM), LABELS, strict=True)]
    outer = json.dumps(
        {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [make.descriptor(data, OCI_INDEX) for data in inner]}
    ).encode()
    blobs = [outer, *inner, *AMD.blobs.values(), *ARM.blobs.values()]
    files = layout_of(named(outer, "app:1", OCI_INDEX), blobs=blobs)
    assert import_files(cache, files, platform="linux/arm64") == ["app:1"]
    assert list_digests(cache, "app:1") == [digest_of(outer), digest_of(inner[1]), *ARM.blobs]
    assert cache.is_image_complete("app:1")
    with pytest.raises(InvalidArchive, match="no image for platform 'linux/s390x', but for linux/amd64, linux/arm64"):
        import_files(cache, files, platform="linux/s390x")


def test_manifests_for_several_platforms_become_one_image_under_a_given_name(cache: Cache) -> None:
    entries = [
        make.descriptor(child.manifest, OCI_MANIFEST, platform={"os": "linux", "architecture": architecture})
        for child, architecture in ((AMD, "amd64"), (ARM, "arm64"))
    ]
    files = layout_of(*entries, blobs=[*AMD.blobs.values(), *ARM.blobs.values()])
    import_files(cache, files, "app:1")
    assert cache.get_manifest("app:1") == files["index.json"]  # crane and regctl push the same index
    assert list_platforms(cache, "app:1") == {"linux/amd64": True, "linux/arm64": True}


def test_manifests_with_one_name_become_one_image_with_the_platforms_of_their_configs(cache: Cache) -> None:
    entries = [named(AMD.manifest, "app:1"), named(ARM.manifest, "app:1")]
    files = layout_of(*entries, blobs=[*AMD.blobs.values(), *ARM.blobs.values()])
    assert import_files(cache, files) == ["app:1"]
    assert list_platforms(cache, "app:1") == {"linux/amd64": True, "linux/arm64": True}


@pytest.mark.parametrize("more", [{"schemaVersion": None}, {"mediaType": "application/example"}])
def test_an_index_json_that_is_no_index_is_replaced_by_one(cache: Cache, more: dict[str, Any]) -> None:
    entries = [
        make.descriptor(child.manifest, OCI_MANIFEST, platform={"os": "linux", "architecture": architecture})
        for child, architecture in ((AMD, "amd64"), (ARM, "arm64"))
    ]
    files = layout_of(*entries, blobs=[*AMD.blobs.values(), *ARM.blobs.values()])
    expected = files["index.json"]
    files["index.json"] = json.dumps({**json.loads(expected), **more}).encode()
    import_files(cache, files, "app:1")
    assert json.loads(cache.get_manifest("app:1")) == json.loads(expected)


def test_two_manifests_for_one_platform_do_not_become_one_image(cache: Cache) -> None:
    other = make.image(5)
    entries = [make.descriptor(child.manifest, OCI_MANIFEST) for child in (AMD, other)]
    files = layout_of(*entries, blobs=[*AMD.blobs.values(), *other.blobs.values()])
    with pytest.raises(
        InvalidArchive, match="the archive holds 2 images, but one NAME was given: leave it out, or choose"
    ):
        import_files(cache, files, "app:1")


# Foreign layers


def windows_image(base: bytes, *, urls: list[str]) -> tuple[bytes, bytes]:
    """Return the manifest and config of an image whose first layer is foreign."""
    config = make.image(1, 2).config
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": make.descriptor(config, "application/vnd.oci.image.config.v1+json"),
        "layers": [
            make.descriptor(base, FOREIGN, urls=urls),
            make.descriptor(make.layer(2), "application/vnd.oci.image.layer.v1.tar"),
        ],
    }
    return json.dumps(manifest).encode(), config


def test_a_foreign_layer_may_be_absent(cache: Cache, tmp_path: Path) -> None:
    base, layer = b"Windows", make.layer(2)
    manifest, config = windows_image(base, urls=["https://example.com/base"])
    import_files(cache, layout_of(named(manifest, "win:1"), blobs=[manifest, config, layer]))
    assert list_digests(cache, "win:1") == [digest_of(data) for data in (manifest, config, layer)]
    assert cache.is_image_complete("win:1")
    cache.export("win:1", tmp_path / "layout", format="oci-dir")
    with Cache.open(tmp_path / "other") as other:
        other.cache_from_tar(tmp_path / "layout")
        assert other.get_manifest("win:1") == manifest
    assert cache.verify().problems == []


def test_a_foreign_layer_in_the_archive_is_imported(cache: Cache) -> None:
    base, layer = b"Windows", make.layer(2)
    manifest, config = windows_image(base, urls=["https://example.com/base"])
    import_files(cache, layout_of(named(manifest, "win:1"), blobs=[manifest, config, base, layer]))
    assert list_digests(cache, "win:1") == [digest_of(data) for data in (manifest, config, base, layer)]


def test_a_layer_without_urls_may_not_be_absent(cache: Cache) -> None:
    manifest, config = windows_image(b"Windows", urls=[])
    with pytest.raises(InvalidArchive, match="is referenced in the archive, but is not in it"):
        import_files(cache, layout_of(named(manifest, "win:1"), blobs=[manifest, config, make.layer(2)]))


def test_a_config_is_never_foreign(cache: Cache) -> None:
    document = json.loads(AMD.manifest)
    document["config"] |= {"mediaType": "application/vnd.example.foreign.config", "urls": ["https://example.com/"]}
    manifest = json.dumps(document).encode()
    with pytest.raises(InvalidArchive, match=f"config {digest_of(AMD.config)} is referenced"):
        import_files(cache, layout_of(named(manifest, "app:1"), blobs=[manifest, *AMD.layers]))


# What index.json lists besides images


def test_entries_of_other_media_types_are_left_out_with_a_warning(
    cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    other = make.descriptor(b"<xml/>", "application/xml")
    files = layout_of(other, named(AMD.manifest, "app:1"), blobs=[b"<xml/>", *AMD.blobs.values()])
    assert import_files(cache, files) == ["app:1"]
    assert f"not imported: {digest_of(b'<xml/>')} is 'application/xml', not an image" in caplog.messages


def test_a_referrer_is_attached_to_its_subject_and_so_is_its_own(cache: Cache) -> None:
    sbom = referrer_of(AMD.manifest)
    signature = referrer_of(sbom, b"a signature")
    blobs = [*AMD.blobs.values(), sbom, signature, b"{}", b"an SBOM", b"a signature"]
    entries = [make.descriptor(data, OCI_MANIFEST) for data in (signature, sbom)]
    assert import_files(cache, layout_of(*entries, named(AMD.manifest, "app:1"), blobs=blobs)) == ["app:1"]
    assert set(list_digests(cache, "app:1")) == {digest_of(data) for data in blobs}


@pytest.mark.parametrize(
    "annotations",
    [
        {make.REF_NAME: AMD.digest.replace(":", "-")},
        {make.REF_NAME: f"registry/app:{AMD.digest.replace(':', '-')}"},
        {"org.opencontainers.image.referrer.subject": AMD.digest},
    ],
)
def test_the_referrers_behind_a_fallback_tag_are_attached(cache: Cache, annotations: dict[str, str]) -> None:
    sbom = referrer_of(AMD.manifest)
    listing = json.dumps({"schemaVersion": 2, "manifests": [make.descriptor(sbom, OCI_MANIFEST)]}).encode()
    entry = make.descriptor(listing, OCI_INDEX, annotations=annotations)
    blobs = [*AMD.blobs.values(), listing, sbom, b"{}", b"an SBOM"]
    assert import_files(cache, layout_of(named(AMD.manifest, "app:1"), entry, blobs=blobs)) == ["app:1"]
    assert list_digests(cache, "app:1")[-3:] == [digest_of(data) for data in (sbom, b"{}", b"an SBOM")]


def test_a_referrer_without_its_subject_is_an_image_of_its_own(cache: Cache) -> None:
    sbom = referrer_of(AMD.manifest)
    files = layout_of(make.descriptor(sbom, OCI_MANIFEST), blobs=[sbom, b"{}", b"an SBOM"])
    assert import_files(cache, files, "sbom:1") == ["sbom:1"]


def test_a_referrers_list_without_its_subject_is_left_out_with_a_warning(
    cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    sbom = referrer_of(ARM.manifest)
    listing = json.dumps({"schemaVersion": 2, "manifests": [make.descriptor(sbom, OCI_MANIFEST)]}).encode()
    entries = [named(AMD.manifest, "app:1"), named(listing, ARM.digest.replace(":", "-"), OCI_INDEX)]
    blobs = [*AMD.blobs.values(), listing, sbom, b"{}", b"an SBOM"]
    assert import_files(cache, layout_of(*entries, blobs=blobs)) == ["app:1"]
    assert (
        f"not imported: the referrer {digest_of(sbom)}, because its subject {ARM.digest} is not imported"
        in caplog.messages
    )


@pytest.mark.parametrize("present", [[], ["manifest"], ["manifest", "listing"], ["listing"]])
@pytest.mark.parametrize("entry", ["listing", "manifest"])
def test_a_referrer_that_is_not_whole_is_left_out_with_a_warning(
    cache: Cache, caplog: pytest.LogCaptureFixture, present: list[str], entry: str
) -> None:
    sbom = referrer_of(AMD.manifest)
    listing = json.dumps({"schemaVersion": 2, "manifests": [make.descriptor(sbom, OCI_MANIFEST)]}).encode()
    data, media_type = {"listing": (listing, OCI_INDEX), "manifest": (sbom, OCI_MANIFEST)}[entry]
    entries = [named(AMD.manifest, "app:1"), named(data, AMD.digest.replace(":", "-"), media_type)]
    blobs = [*AMD.blobs.values(), b"{}", *({"manifest": sbom, "listing": listing}[name] for name in present)]
    assert import_files(cache, layout_of(*entries, blobs=blobs)) == ["app:1"]
    assert list_digests(cache, "app:1") == list(AMD.blobs)
    assert f"refers to {AMD.digest}, and the archive lacks a part of it" in caplog.text


# Embedded content


def embedded(data: bytes, content: bytes | None = None) -> dict[str, Any]:
    text = base64.b64encode(data if content is None else content).decode()
    return {**make.descriptor(data, "application/vnd.oci.empty.v1+json"), "data": text}


def artifact(config: dict[str, Any], *layers: dict[str, Any]) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers}).encode()


def test_content_that_a_descriptor_embeds_need_not_be_in_the_archive(cache: Cache) -> None:
    manifest = artifact(embedded(b"{}"))
    import_files(cache, layout_of(named(manifest, "art:1"), blobs=[manifest]))
    assert cache.get_blob(digest_of(b"{}")) == b"{}"


def test_embedded_content_is_verified(cache: Cache) -> None:
    manifest = artifact(embedded(b"{}", b"[]"))
    with pytest.raises(DigestMismatch):
        import_files(cache, layout_of(named(manifest, "art:1"), blobs=[manifest]))
    manifest = artifact({**embedded(b"{}"), "data": "!"})
    with pytest.raises(InvalidManifest, match="is not base64"):
        import_files(cache, layout_of(named(manifest, "art:1"), blobs=[manifest]))


def test_embedded_content_has_a_limit(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachedb.transports.archive.contents._EMBEDDED_LIMIT", 100)
    manifest = artifact(embedded(b"x" * 100))
    with pytest.raises(InvalidArchive, match="embed more than 100 bytes"):
        import_files(cache, layout_of(named(manifest, "art:1"), blobs=[manifest]))


def test_embedded_content_is_decoded_once(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, decode = [], base64.b64decode

    def count(text: str, *, validate: bool) -> bytes:
        decoded.append(text)
        return decode(text, validate=validate)

    monkeypatch.setattr("base64.b64decode", count)
    manifests = [artifact(embedded(b"{}"), make.descriptor(b"x" * n, "text/plain")) for n in range(3)]
    blobs = [*manifests, *(b"x" * n for n in range(3))]
    entries = [named(manifest, f"art:{n}") for n, manifest in enumerate(manifests)]
    assert len(import_files(cache, layout_of(*entries, blobs=blobs))) == 3
    assert len(decoded) == 1


@pytest.mark.parametrize("media_type", ["application/vnd.oci.image.layer.v1.tar+gzip; charset=x", "text/plain;x=1", ""])
def test_a_layer_with_an_odd_media_type_is_imported_and_exported(cache: Cache, media_type: str, tmp_path: Path) -> None:
    image = make.image(1, compression="gzip")
    document = json.loads(image.manifest)
    document["layers"][0]["mediaType"] = media_type
    manifest = json.dumps(document).encode()
    files = layout_of(named(manifest, "app:1"), blobs=[manifest, image.config, *image.layers])
    assert import_files(cache, files) == ["app:1"]
    assert list_digests(cache, "app:1") == [digest_of(data) for data in (manifest, image.config, *image.layers)]
    cache.export("app:1", tmp_path / "app.tar")
    with Cache.open(tmp_path / "other") as other:
        (imported,) = other.cache_from_tar(tmp_path / "app.tar")
        assert imported.digest == digest_of(manifest)


def test_a_partial_import_completes_an_image_that_lacks_other_platforms(cache: Cache) -> None:
    files = layout_of(named(BOTH, "app:1", OCI_INDEX), blobs=[BOTH, *AMD.blobs.values()])
    for data in (BOTH, *AMD.blobs.values()):
        cache.add_blob(data)
    cache.save_manifest("app:1", BOTH)
    note = cache.add_blob(b"a note")
    cache.associate_blob_with_image("app:1", note)
    assert not cache.is_image_complete("app:1")
    assert import_files(cache, files) == ["app:1"]
    assert cache.is_image_complete("app:1")
    assert list_platforms(cache, "app:1") == {"linux/amd64": True, "linux/arm64": False}
    assert list_digests(cache, "app:1")[-1] == note, "attached blobs stay attached"
