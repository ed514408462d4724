"""Manifests and indexes: parsing, refusing and building them, and walking their closure."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachedb import Cache, oci
from cachedb.errors import InvalidArchive, InvalidManifest
from cachedb.oci.digests import parse_digest
from cachedb.oci.manifests import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    Descriptor,
)
from tests.support import make

EXAMPLES = int(os.environ.get("CACHEDB_FUZZ", "60")) * 5
KINDS = [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST]


def encode(document: object) -> bytes:
    return json.dumps(document).encode()


def entry(seed: int, media_type: str = OCI_LAYER, **more: Any) -> dict[str, Any]:
    return make.descriptor(b"%d" % seed, media_type, **more)


def describe(data: bytes, media_type: str) -> Descriptor:
    return Descriptor(parse_digest(make.digest_of(data)), len(data), media_type, oci.role_of(media_type))


# Parsing


def test_a_manifest_lists_its_config_before_its_layers() -> None:
    made = make.image(1, 2, compression="gzip")
    found = oci.descriptors(made.manifest, OCI_MANIFEST)
    assert [(blob.role, blob.digest, blob.size) for blob in found] == [
        ("config", make.digest_of(made.config), len(made.config)),
        *(("layer", make.digest_of(layer), len(layer)) for layer in made.layers),
    ]
    assert [oci.is_compressed(blob.media_type) for blob in found] == [False, True, True]


def test_an_index_lists_its_children_with_their_platforms() -> None:
    children = [
        entry(1, OCI_MANIFEST, platform={"os": "linux", "architecture": "arm", "variant": "v7"}),
        entry(2, OCI_INDEX, platform={"os": "linux", "architecture": "amd64", "variant": ""}),
        entry(3, "application/x-other"),
    ]
    found = oci.descriptors(encode({"schemaVersion": 2, "manifests": children}), OCI_INDEX)
    assert [(blob.role, blob.platform) for blob in found] == [
        ("manifest", "linux/arm/v7"),
        ("index", "linux/amd64"),
        ("other", None),
    ]


@pytest.mark.parametrize("platform", [None, [], "linux", {"os": 1}, {"os": "a\nb"}, {"os": "\ud800"}, {"os": "x" * 65}])
def test_an_invalid_platform_is_left_out(platform: object) -> None:
    assert oci.parse_entry(entry(1, OCI_MANIFEST, platform=platform), "the index").platform is None


@pytest.mark.parametrize(
    ("document", "declared", "kind"),
    [
        ({"mediaType": DOCKER_LIST}, None, DOCKER_LIST),
        ({"manifests": []}, None, OCI_INDEX),
        ({"layers": []}, None, OCI_MANIFEST),
        ({"layers": []}, DOCKER_MANIFEST, DOCKER_MANIFEST),
        ({"mediaType": None}, OCI_INDEX, OCI_INDEX),
        ({"mediaType": OCI_INDEX}, OCI_INDEX, OCI_INDEX),
    ],
)
def test_the_media_type_comes_from_the_document_else_the_caller_else_the_fields(
    document: object, declared: str | None, kind: str
) -> None:
    assert oci.manifest_media_type(encode(document), declared) == kind


@pytest.mark.parametrize("own", [[], ["x"], {}, {"a": 1}, 0, 1, True, False, "", "x", OCI_CONFIG, OCI_LAYER])
@pytest.mark.parametrize("declared", [None, OCI_MANIFEST])
def test_only_media_types_of_manifests_are_accepted(own: object, declared: str | None) -> None:
    with pytest.raises(InvalidManifest):
        oci.manifest_media_type(encode({"mediaType": own}), declared)


def test_a_document_with_another_media_type_than_declared_is_refused() -> None:
    with pytest.raises(InvalidManifest, match="but was declared as"):
        oci.manifest_media_type(encode({"mediaType": OCI_INDEX}), OCI_MANIFEST)


@pytest.mark.parametrize(
    ("document", "media_type"),
    [
        ({"schemaVersion": 2, "config": entry(1), "layers": [], "manifests": []}, OCI_MANIFEST),
        ({"schemaVersion": 2, "layers": [], "manifests": []}, OCI_INDEX),
        ({"schemaVersion": 2, "config": {}, "manifests": []}, OCI_INDEX),
        ({"schemaVersion": 1, "manifests": []}, OCI_INDEX),
        ({"schemaVersion": 2, "config": entry(1)}, OCI_MANIFEST),
        ({"schemaVersion": 2, "layers": []}, OCI_MANIFEST),
        ({"schemaVersion": 2}, OCI_INDEX),
    ],
)
def test_a_document_that_does_not_fit_its_media_type_is_refused(document: object, media_type: str) -> None:
    with pytest.raises(InvalidManifest):
        oci.descriptors(encode(document), media_type)


@pytest.mark.parametrize("size", [-1, True, 1.0, "1", None, 16 * 1024**4 + 1, 2**63 - 1, 2**64, 10**400])
def test_a_size_that_no_file_can_have_is_refused(size: object) -> None:
    with pytest.raises(InvalidManifest, match="the invalid size"):
        oci.parse_entry(entry(1) | {"size": size}, "the index")


@pytest.mark.parametrize("media_type", [None, 1, "", "x", "a/b\n", "a b/c", "a/" + "b" * 128, "/", "a/é", []])
def test_an_invalid_media_type_is_refused(media_type: object) -> None:
    with pytest.raises(InvalidManifest, match="media type"):
        oci.check_media_type(media_type, "the blob")


@pytest.mark.parametrize("media_type", ["text/plain;x=1", "application/json; charset=utf-8", f"{OCI_LAYER}+gzip ; a=b"])
def test_a_media_type_may_have_parameters(media_type: str) -> None:
    assert oci.check_media_type(media_type, "the blob") == media_type
    manifest = encode({"schemaVersion": 2, "config": entry(1, OCI_CONFIG), "layers": [entry(2, media_type)]})
    (layer,) = oci.descriptors(manifest, OCI_MANIFEST)[1:]
    assert (layer.media_type, layer.role) == (media_type, "layer")


def test_the_compression_of_a_layer_does_not_depend_on_parameters() -> None:
    assert oci.is_compressed(f"{OCI_LAYER}+gzip; charset=x")
    assert not oci.is_compressed(f"{OCI_LAYER}; was=gzip")


@pytest.mark.parametrize("media_type", [None, "", "x", "a/b\n", "a b/c", "a/" + "b" * 128, "/", "a/\u00e9"])
def test_a_layer_with_an_empty_or_odd_media_type_has_unknown_content(media_type: object) -> None:
    layer = make.descriptor(b"layer", "") | {"mediaType": media_type}
    manifest = encode({"schemaVersion": 2, "config": entry(1, OCI_CONFIG), "layers": [layer]})
    (found,) = oci.descriptors(manifest, OCI_MANIFEST)[1:]
    assert (found.media_type, found.role) == ("application/octet-stream", "layer")


@pytest.mark.parametrize("media_type", [1, [], {}, True])
def test_a_descriptor_whose_media_type_is_no_text_is_refused(media_type: object) -> None:
    layer = make.descriptor(b"layer", "") | {"mediaType": media_type}
    with pytest.raises(InvalidManifest, match="invalid media type"):
        oci.descriptors(encode({"schemaVersion": 2, "config": entry(1, OCI_CONFIG), "layers": [layer]}), OCI_MANIFEST)


def test_a_manifest_with_the_largest_sizes_can_be_listed(cache: Cache) -> None:
    layers = [entry(number) | {"size": 16 * 1024**4} for number in range(1000)]
    document = {"schemaVersion": 2, "config": entry(1000), "layers": layers}
    cache.save_manifest("app:1", encode(document), OCI_MANIFEST)
    assert cache.list_manifests()[0].size > 1000 * 16 * 1024**4


# JSON


@pytest.mark.parametrize(
    "data",
    [b"", b"nan", b"NaN", b"[Infinity]", b"-Infinity", b"\xff", b"\xef\xbb\xbf{}", b"{", b"1 2", b"9" * 5000, b"'a'"],
)
def test_invalid_json_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidArchive, match="the thing is not JSON") as caught:
        oci.load_json(data, "the thing", InvalidArchive)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000])
def test_json_that_is_nested_too_deeply_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidManifest, match="nested too deeply"):
        oci.load_json(data, "the manifest")


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_json_may_be_nested_256_deep_wherever_it_is_read(opening: str, closing: str) -> None:
    """The recursion limit counts the caller's stack: what can be saved must be readable from a deeper one."""
    deepest = f"[[[]], {opening * 254}[1]{closing * 254}, {{}}]".encode()
    assert oci.load_json(deepest, "the manifest")
    with pytest.raises(InvalidManifest, match="the manifest is nested too deeply"):
        oci.load_json(b"[" + deepest + b"]", "the manifest")
    assert oci.load_json(json.dumps(["[{" * 1000] * 300).encode(), "the manifest")


def test_a_document_of_over_4_mib_is_refused() -> None:
    document = b'"' + b"x" * (oci.DOCUMENT_LIMIT - 2) + b'"'
    assert oci.load_json(document, "the manifest")
    with pytest.raises(InvalidManifest, match="more than 4194304 are refused"):
        oci.load_json(document + b" ", "the manifest")


def test_the_last_value_of_a_repeated_key_wins_as_in_other_tools() -> None:
    assert oci.load_json(b'{"a": 1, "a": 2}', "the manifest") == {"a": 2}


# The closure


def test_the_closure_of_nested_indexes_is_complete_and_in_order() -> None:
    amd, arm = make.image(1, 2), make.image(1, 3)
    inner = make.index(amd, arm)
    outer = encode({"schemaVersion": 2, "manifests": [make.descriptor(inner, OCI_INDEX)]})
    stored = {make.digest_of(data): data for data in (inner, outer)} | amd.blobs | arm.blobs
    found = [blob.digest for blob in oci.walk(describe(outer, OCI_INDEX), lambda blob: stored[blob.digest])]
    assert found == [make.digest_of(outer), make.digest_of(inner), *amd.blobs, *arm.blobs]


def test_an_absent_manifest_is_listed_and_not_expanded() -> None:
    amd, arm = make.image(1), make.image(2)
    index = make.index(amd, arm)
    stored = {make.digest_of(index): index} | arm.blobs
    found = {blob.digest for blob in oci.walk(describe(index, OCI_INDEX), lambda blob: stored.get(blob.digest))}
    assert found == {make.digest_of(index), amd.digest, *arm.blobs}


def test_a_child_with_another_media_type_than_its_index_declares_is_refused() -> None:
    manifest = encode({"schemaVersion": 2, "mediaType": DOCKER_MANIFEST, "config": entry(1), "layers": []})
    index = encode({"schemaVersion": 2, "manifests": [make.descriptor(manifest, OCI_MANIFEST)]})
    stored = {make.digest_of(data): data for data in (manifest, index)}
    with pytest.raises(InvalidManifest, match="but was declared as"):
        list(oci.walk(describe(index, OCI_INDEX), lambda blob: stored.get(blob.digest)))


def test_an_index_that_is_listed_twice_is_expanded_once() -> None:
    data = make.image(1).manifest
    stored = {make.digest_of(data): data}
    media_type = OCI_MANIFEST
    for _ in range(200):
        data = encode({"schemaVersion": 2, "manifests": [make.descriptor(data, media_type)] * 2})
        stored[make.digest_of(data)], media_type = data, OCI_INDEX
    begin = time.process_time()
    closure = list(oci.walk(describe(data, OCI_INDEX), lambda blob: stored[blob.digest]))
    assert len(closure) == 1 + 2 * 200 + 2
    assert time.process_time() - begin < 2


def test_a_built_manifest_is_valid_and_reproducible() -> None:
    config, layer = describe(b"{}", OCI_CONFIG), describe(b"x", OCI_LAYER)
    data = oci.build_manifest(config, [layer, layer])
    assert data == oci.build_manifest(config, [layer, layer])
    assert oci.manifest_media_type(data) == OCI_MANIFEST
    found = oci.descriptors(data, OCI_MANIFEST)
    assert [blob._replace(role="other") for blob in found] == [config, layer, layer]


# Fuzz

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([*KINDS, OCI_LAYER, 2, 2**63, 10**30, make.digest_of(b"x"), "sha256:../x", "\ud800"]),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=3), below, max_size=3),
    max_leaves=4,
)


def _good_or_any(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Generate a good value half of the time, otherwise any value."""
    return st.one_of(good, values)


entries = st.fixed_dictionaries(
    {},
    optional={
        "mediaType": _good_or_any(st.sampled_from([*KINDS, OCI_LAYER, OCI_CONFIG])),
        "digest": _good_or_any(st.sampled_from([make.digest_of(b"x"), make.digest_of(b"y", "sha512")])),
        "size": _good_or_any(st.integers(0, 10)),
        "platform": _good_or_any(st.just({"os": "linux", "architecture": "amd64"})),
        "annotations": values,
    },
)
documents = st.fixed_dictionaries(
    {},
    optional={
        "schemaVersion": _good_or_any(st.just(2)),
        "mediaType": _good_or_any(st.sampled_from(KINDS)),
        "config": _good_or_any(entries),
        "layers": _good_or_any(st.lists(_good_or_any(entries), max_size=3)),
        "manifests": _good_or_any(st.lists(_good_or_any(entries), max_size=3)),
    },
)


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None)
@given(document=documents | values, declared=st.none() | st.sampled_from(KINDS))
def test_any_document_is_parsed_or_refused(document: object, declared: str | None) -> None:
    data = encode(document)
    try:
        media_type = oci.manifest_media_type(data, declared)
        found = oci.descriptors(data, media_type)
        closure = list(oci.walk(describe(data, media_type), lambda blob: data if blob.role != "other" else None))
    except InvalidManifest as error:
        assert str(error).isprintable()  # noqa: PT017
    else:
        assert media_type in KINDS
        assert len(closure) > len(found)
        for blob in closure:
            assert parse_digest(blob.digest) == blob.digest
            assert 0 <= blob.size < 2**63
            assert blob.role in oci.ROLES
            assert blob.platform is None or blob.platform.isprintable()
