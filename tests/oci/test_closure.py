"""The closure of a manifest or index: every blob it reaches, all of them or for one platform."""

from __future__ import annotations

import itertools
import json

import pytest

from cachedb import NotInCache, oci
from cachedb.errors import InvalidManifest
from cachedb.oci.digests import Digest, digest_of
from cachedb.oci.manifests import Descriptor
from cachedb.oci.names import Name

NAME = Name.parse("app:1")


def manifest(number: int) -> bytes:
    config = {"mediaType": oci.OCI_CONFIG, "digest": digest_of(b"config %d" % number), "size": 8}
    layer = {"mediaType": oci.OCI_LAYER, "digest": digest_of(b"layer %d" % number), "size": 7}
    return json.dumps({"schemaVersion": 2, "mediaType": oci.OCI_MANIFEST, "config": config, "layers": [layer]}).encode()


def index(*entries: tuple[bytes, str, str]) -> bytes:
    listed = [
        {
            "mediaType": media_type,
            "digest": digest_of(data),
            "size": len(data),
            "platform": dict(zip(("architecture", "variant"), architecture.split("/"), strict=False), os="linux"),
            "annotations": {"kept": "yes"},
        }
        for data, media_type, architecture in entries
    ]
    return json.dumps({"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": listed}).encode()


AMD, ARM = manifest(1), manifest(2)
INNER = index((ARM, oci.OCI_MANIFEST, "arm64"))
OUTER = index((AMD, oci.OCI_MANIFEST, "amd64"), (INNER, oci.OCI_INDEX, "arm64"))
STORED = {digest_of(data): data for data in (AMD, ARM, INNER, OUTER)}


def read_closure(present: set[Digest] | None = None) -> tuple[oci.Closure, list[Digest]]:
    read: list[Digest] = []

    def data(blob: Descriptor) -> bytes:
        read.append(blob.digest)
        return STORED[blob.digest]

    root = oci.root_descriptor(digest_of(OUTER), len(OUTER), oci.OCI_INDEX)
    return oci.read_closure(root, data, oci.choose_among(present) if present is not None else None), read


def refuse_config(_digest: Digest) -> bytes:
    raise AssertionError("the config was read, though the index names the platform")


def test_each_manifest_is_read_once_and_comes_before_its_references() -> None:
    closure, read = read_closure()
    assert read == [digest_of(OUTER), digest_of(AMD), digest_of(INNER), digest_of(ARM)]
    digests = [blob.digest for blob in closure.blobs]
    assert digests[:2] == [digest_of(OUTER), digest_of(AMD)]
    assert digests.index(digest_of(INNER)) < digests.index(digest_of(ARM)) < digests.index(digest_of(b"layer 2"))
    assert [blob.digest for blob in closure.images] == [digest_of(AMD), digest_of(ARM)]


def test_an_index_with_all_blobs_present_is_unchanged() -> None:
    closure, _ = read_closure()
    assert closure.keep_present(set(STORED)) is closure


def test_an_index_is_rebuilt_without_its_absent_manifests() -> None:
    present = {digest_of(OUTER), digest_of(AMD), digest_of(INNER)}
    closure, _ = read_closure(present)
    pruned = closure.keep_present(present)
    assert pruned.root.digest in pruned.made
    document = json.loads(pruned.documents[pruned.root.digest])
    first, second = document["manifests"]
    assert first == json.loads(OUTER)["manifests"][0]
    assert second["annotations"] == {"kept": "yes"}
    assert json.loads(pruned.documents[second["digest"]])["manifests"] == []
    assert digest_of(ARM) not in {blob.digest for blob in pruned.blobs}
    assert pruned.root.size == len(pruned.documents[pruned.root.digest])


def test_an_index_that_is_rebuilt_embeds_no_content_of_an_old_child() -> None:
    document = json.loads(OUTER)
    document["manifests"] = [{**entry, "data": "old"} for entry in document["manifests"]]
    outer = json.dumps(document).encode()
    stored, present = {**STORED, digest_of(outer): outer}, {digest_of(outer), digest_of(AMD), digest_of(INNER)}
    root = oci.root_descriptor(digest_of(outer), len(outer), oci.OCI_INDEX)
    closure = oci.read_closure(root, lambda blob: stored[blob.digest], oci.choose_among(present))
    pruned = closure.keep_present(present)
    same, rebuilt = json.loads(pruned.documents[pruned.root.digest])["manifests"]
    assert (same["data"], rebuilt.get("data")) == ("old", None)


def test_only_foreign_layers_and_children_of_indexes_may_be_left_out() -> None:
    foreign = {"mediaType": "application/vnd.example.foreign.layer", "urls": ["https://example.com/"]}
    document = json.loads(AMD)
    document["layers"] += [{**document["layers"][0], **foreign, "digest": digest_of(b"foreign")}]
    data = json.dumps(document).encode()
    root = oci.root_descriptor(digest_of(data), len(data), oci.OCI_MANIFEST)
    closure = oci.read_closure(root, lambda _: data, oci.choose_among({digest_of(b"config 1")}))
    assert [blob.digest for blob in closure.blobs[1:]] == [digest_of(b"config 1"), digest_of(b"layer 1")]


def test_a_platform_is_found_in_a_nested_index() -> None:
    closure, _ = read_closure()
    chosen = closure.for_platform(NAME, "linux/arm64", refuse_config)
    assert chosen.root.digest == digest_of(ARM)
    assert [blob.digest for blob in chosen.blobs] == [digest_of(ARM), digest_of(b"config 2"), digest_of(b"layer 2")]


def test_a_platform_that_is_not_stored_and_an_unknown_platform_give_different_errors() -> None:
    present = {digest_of(OUTER), digest_of(INNER), digest_of(ARM)}
    closure, _ = read_closure(present)
    with pytest.raises(NotInCache, match="for platform 'linux/amd64' is not in the cache: pull it"):
        closure.for_platform(NAME, "linux/amd64", refuse_config)
    with pytest.raises(NotInCache, match="is not for platform 'linux/s390x', but for linux/arm64"):
        closure.for_platform(NAME, "linux/s390x", refuse_config)


def test_a_better_platform_that_is_not_stored_is_not_replaced_by_another() -> None:
    outer = index((AMD, oci.OCI_MANIFEST, "amd64"), (ARM, oci.OCI_MANIFEST, "amd64/v3"))
    stored = {digest_of(data): data for data in (AMD, outer)}
    root = oci.root_descriptor(digest_of(outer), len(outer), oci.OCI_INDEX)
    closure = oci.read_closure(root, lambda blob: stored[blob.digest], oci.choose_among(set(stored)))
    with pytest.raises(NotInCache, match="'linux/amd64/v3' is not in the cache: pull it"):
        closure.for_platform(NAME, "linux/amd64/v3", refuse_config)
    assert closure.for_platform(NAME, "linux/amd64/v2", refuse_config).root.digest == digest_of(AMD)


def test_nested_indexes_are_searched_for_a_platform_once_and_to_a_limit() -> None:
    """Each of many levels has two indexes, which list both of the next level."""

    def descriptor(level: int, number: int, *, depth: int) -> Descriptor:
        role, platform = ("manifest", f"linux/{number}") if level == depth else ("index", None)
        return Descriptor(digest_of(b"%d %d" % (level, number)), 1, oci.OCI_INDEX, role, platform)

    def choose(depth: int) -> list[Descriptor]:
        levels = {
            descriptor(level, number, depth=depth): [descriptor(level + 1, other, depth=depth) for other in (0, 1)]
            for level in range(depth)
            for number in (0, 1)
        }
        calls = itertools.count()

        def list_children(blob: Descriptor) -> list[Descriptor]:
            assert next(calls) < 2 * depth
            return levels[blob]

        return oci.choose([descriptor(0, number, depth=depth) for number in (0, 1)], "linux/s390x", list_children)

    assert choose(128) == []
    with pytest.raises(InvalidManifest, match="nested more than 128 deep"):
        choose(129)
