"""The files that an exported archive consists of.

The same image gives the same bytes: the order of the files, and their times, owners and modes, are fixed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from typing import Any, Final, NamedTuple

from cachedb import oci
from cachedb.oci.closure import Closure
from cachedb.oci.digests import Digest, split_digest
from cachedb.oci.manifests import Descriptor, find_compression
from cachedb.oci.names import Name
from cachedb.transports.archive.model import CONTAINERD_NAME, REF_NAME, path_in_layout

__all__ = ["Entry", "json_entry", "list_entries", "merge_entries"]


_DIR_VERSION: Final = b"Directory Transport Version: 1.1\n"  # of skopeo's transport `dir:`


class Entry(NamedTuple):
    """A file of an archive: its path, and its content or the digest of the blob that it holds."""

    path: str
    size: int  # bytes
    content: bytes | Digest


def list_entries(
    name: Name,
    closure: Closure,
    format: str,
    *,
    ref_name: str | None,
    docker_image: Descriptor | None,
    referrers: list[Closure],
) -> list[Entry]:
    """Return the files that an export consists of, in the order of a tar.

    In a folder, the first file marks the format, and the second refers to all others.

    Args:
        name: of the image.
        closure: of its manifest or index; `MANIFEST_FORMATS` need the closure of a manifest.
        format: one of `FORMATS`.
        ref_name: the name in index.json; None for the image's name.
        docker_image: the image that the manifest.json of the format ``docker`` names; None leaves out the file.
        referrers: the closures of the image's referrers to export; `MANIFEST_FORMATS` hold none.
    """
    root = closure.root
    if name.digest:
        name = Name(name.repository, root.digest)  # the manifest of one platform has another digest than its index
    blobs = {blob.digest: _entry(blob, part) for part in (closure, *referrers) for blob in part.blobs}
    if format == "docker-archive":
        config, *layers = closure.children[root.digest]
        config_path = f"{split_digest(config.digest)[1]}.json"
        paths = {layer.digest: f"{split_digest(layer.digest)[1]}{_suffix(layer.media_type)}" for layer in layers}
        return [
            _manifest_json(name, config_path, [paths[layer.digest] for layer in layers]),
            Entry(config_path, config.size, config.digest),
            *(blobs[digest]._replace(path=path) for digest, path in paths.items()),
        ]
    if format == "dir":
        manifest = closure.documents[root.digest]
        return [
            Entry("version", len(_DIR_VERSION), _DIR_VERSION),
            Entry("manifest.json", len(manifest), manifest),
            *(blob._replace(path=split_digest(digest)[1]) for digest, blob in blobs.items() if digest != root.digest),
        ]
    index = _build_index(name, ref_name or str(name), root, referrers)
    found = [
        json_entry("oci-layout", {"imageLayoutVersion": "1.0.0"}),
        Entry("index.json", len(index), index),
    ]
    if format == "docker" and docker_image is not None:
        config, *layers = closure.children[docker_image.digest]
        found.append(
            _manifest_json(name, path_in_layout(config.digest), [path_in_layout(layer.digest) for layer in layers])
        )
    # Documents come first, so that a reader of a stream learns early what the image is.
    documents = {path_in_layout(digest) for part in (closure, *referrers) for digest in part.documents}
    return found + sorted(blobs.values(), key=lambda entry: (entry.path not in documents, entry.path))


def merge_entries(images: Iterable[list[Entry]]) -> list[Entry]:
    """Join the files of several images, each from `list_entries`, to those of one archive."""
    merged: dict[str, Entry] = {}
    for entry in chain.from_iterable(images):
        old = merged.get(entry.path)
        if old is None:
            merged[entry.path] = entry
        elif entry.path in ("index.json", "manifest.json"):
            merged[entry.path] = _merge_documents(old, entry)
    return list(merged.values())


def _merge_documents(old: Entry, new: Entry) -> Entry:
    """Return an index.json or a manifest.json that lists the images of both."""
    assert isinstance(old.content, bytes)
    assert isinstance(new.content, bytes)
    first, second = json.loads(old.content), json.loads(new.content)
    if isinstance(first, list):
        return json_entry(old.path, first + [image for image in second if image not in first])
    listed = first["manifests"]
    index = oci.build_index(listed + [image for image in second["manifests"] if image not in listed])
    return Entry(old.path, len(index), index)


def _entry(blob: Descriptor, closure: Closure) -> Entry:
    content = closure.documents[blob.digest] if blob.digest in closure.made else blob.digest
    return Entry(path_in_layout(blob.digest), blob.size, content)


def json_entry(path: str, document: object) -> Entry:
    """Return an entry with a document as compact JSON."""
    content = json.dumps(document, separators=(",", ":")).encode()
    return Entry(path, len(content), content)


def _manifest_json(name: Name, config: str, layers: list[str]) -> Entry:
    tags = None if name.digest else [str(name)]
    return json_entry("manifest.json", [{"Config": config, "RepoTags": tags, "Layers": layers}])


def _suffix(media_type: str) -> str:
    return {"gzip": ".tar.gz", "zstd": ".tar.zst"}.get(find_compression(media_type) or "", ".tar")


def _build_index(name: Name, ref_name: str, root: Descriptor, referrers: list[Closure]) -> bytes:
    annotations = {CONTAINERD_NAME: name.qualified(), REF_NAME: ref_name}
    return oci.build_index([{**_descriptor(root), "annotations": annotations}, *map(_describe_referrer, referrers)])


def _descriptor(blob: Descriptor) -> dict[str, Any]:
    return {"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size}


def _describe_referrer(closure: Closure) -> dict[str, Any]:
    """Return the entry of a referrer in index.json.

    It has no name, because the subject in its manifest tells which image it belongs to.
    """
    kind = oci.artifact_type(oci.load_json(closure.documents[closure.root.digest], "the referrer"))
    return {**_descriptor(closure.root), **({"artifactType": kind} if kind else {})}
