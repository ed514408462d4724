"""The conversion of Docker manifests and manifest lists to OCI manifests and indexes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cachedb import oci
from cachedb.oci.conversion import convert_to_oci
from cachedb.oci.digests import digest_of
from cachedb.oci.manifests import DOCKER_CONFIG, DOCKER_LIST, DOCKER_MANIFEST, OCI_CONFIG, OCI_INDEX, OCI_MANIFEST

DOCKER = "application/vnd.docker.image.rootfs."
LAYER = "application/vnd.oci.image.layer."
LAYERS = {
    f"{DOCKER}diff.tar": f"{LAYER}v1.tar",
    f"{DOCKER}diff.tar.gzip": f"{LAYER}v1.tar+gzip",
    f"{DOCKER}diff.tar.zstd": f"{LAYER}v1.tar+zstd",
    f"{DOCKER}foreign.diff.tar": f"{LAYER}nondistributable.v1.tar",
    f"{DOCKER}foreign.diff.tar.gzip": f"{LAYER}nondistributable.v1.tar+gzip",
    "application/vnd.example.other": "application/vnd.example.other",
}


def descriptor(data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data), **more}


def manifest(media_type: str, config: str, *layers: str, **more: Any) -> bytes:
    document = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": descriptor(b"config", config),
        "layers": [descriptor(layer.encode(), layer, urls=["https://example.org/"]) for layer in layers],
        **more,
    }
    return json.dumps(document).encode()


def index(media_type: str, *entries: dict[str, Any]) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": media_type, "manifests": entries}).encode()


def read_closure(*documents: bytes) -> oci.Closure:
    """Return the closure of the last document."""
    stored, root = {digest_of(data): data for data in documents}, documents[-1]
    descriptor = oci.root_descriptor(digest_of(root), len(root), json.loads(root)["mediaType"])
    return oci.read_closure(descriptor, lambda blob: stored[blob.digest])


IMAGE = manifest(DOCKER_MANIFEST, DOCKER_CONFIG, *LAYERS, annotations={"kept": "yes"})


def test_a_manifest_gets_oci_media_types_and_keeps_all_else() -> None:
    closure = convert_to_oci(read_closure(IMAGE))
    data = closure.documents[closure.root.digest]
    expected = json.loads(IMAGE)
    expected["mediaType"], expected["config"]["mediaType"] = OCI_MANIFEST, OCI_CONFIG
    for entry in expected["layers"]:
        entry["mediaType"] = LAYERS[entry["mediaType"]]
    assert json.loads(data) == expected
    assert list(json.loads(data)) == list(expected)
    assert closure.root[:4] == (digest_of(data), len(data), OCI_MANIFEST, "manifest")
    assert closure.made == {closure.root.digest}
    config, *layers = closure.children[closure.root.digest]
    assert [config.media_type, *(layer.media_type for layer in layers)] == [OCI_CONFIG, *LAYERS.values()]
    assert [blob.digest for blob in closure.blobs[1:]] == [blob.digest for blob in read_closure(IMAGE).blobs[1:]]


@pytest.mark.parametrize("key", ["layers", "manifests"])
def test_an_empty_list_may_be_null(key: str) -> None:
    document = json.loads(index(DOCKER_LIST) if key == "manifests" else manifest(DOCKER_MANIFEST, DOCKER_CONFIG))
    closure = convert_to_oci(read_closure(json.dumps({**document, key: None}).encode()))
    assert json.loads(closure.documents[closure.root.digest])[key] == []


def test_a_list_becomes_an_index_of_the_converted_manifests() -> None:
    platform = {"os": "linux", "architecture": "amd64", "features": ["sse4"]}
    other = manifest(OCI_MANIFEST, OCI_CONFIG, f"{LAYER}v1.tar")
    entries = [descriptor(IMAGE, DOCKER_MANIFEST, platform=platform), descriptor(other, OCI_MANIFEST)]
    closure = convert_to_oci(read_closure(IMAGE, other, index(DOCKER_LIST, *entries)))
    image = convert_to_oci(read_closure(IMAGE)).root
    document = json.loads(closure.documents[closure.root.digest])
    assert (closure.root.media_type, document["mediaType"]) == (OCI_INDEX, OCI_INDEX)
    listed = {"mediaType": OCI_MANIFEST, "digest": image.digest, "size": image.size, "platform": platform}
    assert document["manifests"] == [listed, entries[1]]
    assert closure.made == {closure.root.digest, image.digest}
    assert [blob.digest for blob in closure.images] == [image.digest, digest_of(other)]


def test_an_oci_index_of_docker_manifests_is_converted() -> None:
    inner = index(OCI_INDEX, descriptor(IMAGE, DOCKER_MANIFEST))
    closure = convert_to_oci(read_closure(IMAGE, inner, index(OCI_INDEX, descriptor(inner, OCI_INDEX))))
    assert {blob.media_type for blob in closure.blobs if blob.role in ("manifest", "index")} == {
        OCI_INDEX,
        OCI_MANIFEST,
    }
    assert len(closure.made) == 3


def test_an_attestation_names_the_converted_manifest() -> None:
    attestation = manifest(OCI_MANIFEST, OCI_CONFIG, "application/vnd.in-toto+json")
    annotations = {"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": digest_of(IMAGE)}
    entries = [descriptor(IMAGE, DOCKER_MANIFEST), descriptor(attestation, OCI_MANIFEST, annotations=annotations)]
    closure = convert_to_oci(read_closure(IMAGE, attestation, index(OCI_INDEX, *entries)))
    image, about = json.loads(closure.documents[closure.root.digest])["manifests"]
    assert about["annotations"] == {**annotations, "vnd.docker.reference.digest": image["digest"]}
    assert about["digest"] == digest_of(attestation)


def test_an_embedded_copy_of_a_changed_manifest_is_dropped() -> None:
    other = manifest(OCI_MANIFEST, OCI_CONFIG)
    entries = [
        {**descriptor(IMAGE, DOCKER_MANIFEST), "data": "old"},
        {**descriptor(other, OCI_MANIFEST), "data": "same"},
    ]
    closure = convert_to_oci(read_closure(IMAGE, other, index(OCI_INDEX, *entries)))
    listed = json.loads(closure.documents[closure.root.digest])["manifests"]
    assert [entry.get("data") for entry in listed] == [None, "same"]


def test_a_manifest_that_is_a_layer_keeps_its_media_type() -> None:
    holder = json.loads(manifest(DOCKER_MANIFEST, DOCKER_CONFIG))
    holder["layers"] = [descriptor(IMAGE, DOCKER_MANIFEST)]
    closure = convert_to_oci(read_closure(json.dumps(holder).encode()))
    assert closure.children[closure.root.digest][1].media_type == DOCKER_MANIFEST


@pytest.mark.parametrize("annotation", [["list"], {"an": "object"}, 3, None])
def test_an_invalid_annotation_stays(annotation: object) -> None:
    entry = descriptor(IMAGE, DOCKER_MANIFEST, annotations={"vnd.docker.reference.digest": annotation})
    closure = convert_to_oci(read_closure(IMAGE, index(OCI_INDEX, entry)))
    (listed,) = json.loads(closure.documents[closure.root.digest])["manifests"]
    assert listed["annotations"] == {"vnd.docker.reference.digest": annotation}


def test_an_image_without_docker_media_types_stays_the_same() -> None:
    closure = read_closure(manifest(OCI_MANIFEST, OCI_CONFIG, f"{LAYER}v1.tar"))
    assert convert_to_oci(closure) is closure
