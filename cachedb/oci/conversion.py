"""Convert Docker manifests and manifest lists to OCI; configs and layers keep their bytes."""

from __future__ import annotations

import json
from typing import Any, Final

from cachedb.oci.closure import Closure
from cachedb.oci.digests import Digest, digest_of
from cachedb.oci.manifests import (
    DOCKER_CONFIG,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    Descriptor,
    load_json,
    read_descriptors,
    replace_entry,
)

__all__ = ["convert_to_oci"]


_DOCKER_LAYER: Final = "application/vnd.docker.image.rootfs.diff.tar"
_DOCKER_FOREIGN: Final = "application/vnd.docker.image.rootfs.foreign.diff.tar"
_OCI_FOREIGN: Final = "application/vnd.oci.image.layer.nondistributable.v1.tar"

_DOCUMENT_TYPES: Final = {DOCKER_MANIFEST: OCI_MANIFEST, DOCKER_LIST: OCI_INDEX}
_CONTENT_TYPES: Final = {
    DOCKER_CONFIG: OCI_CONFIG,
    _DOCKER_LAYER: OCI_LAYER,
    f"{_DOCKER_LAYER}.gzip": f"{OCI_LAYER}+gzip",
    f"{_DOCKER_LAYER}.zstd": f"{OCI_LAYER}+zstd",
    _DOCKER_FOREIGN: _OCI_FOREIGN,
    f"{_DOCKER_FOREIGN}.gzip": f"{_OCI_FOREIGN}+gzip",
}
"""The OCI media type for each of Docker's (image specification, "Compatibility Matrix")."""

_ATTESTED: Final = "vnd.docker.reference.digest"
"""The annotation by which an attestation in an index names the manifest that it is about."""


def convert_to_oci(closure: Closure) -> Closure:
    """Return the closure with OCI media types; the same one if it has no Docker media types.

    A manifest that changes gets another digest, and so do the indexes that list it. Media types without an OCI
    counterpart stay as they are.
    """
    documents, children, made = dict(closure.documents), dict(closure.children), set(closure.made)
    converted: dict[Descriptor, Descriptor] = {}

    def convert(blob: Descriptor) -> Descriptor:
        if blob not in converted:
            is_document = blob.is_document
            converted[blob] = convert_document(blob) if is_document else _convert_content(blob)
        return converted[blob]

    def convert_document(blob: Descriptor) -> Descriptor:
        if blob.digest not in closure.documents:
            return blob
        document = load_json(documents[blob.digest], "the manifest")
        media_type = _DOCUMENT_TYPES.get(blob.media_type, blob.media_type)
        # The closure may lack foreign layers, which the manifest lists.
        listed, kept = read_descriptors(document, blob.media_type, "the manifest"), set(children[blob.digest])
        found = [convert(child) for child in listed]
        if (media_type, found) == (blob.media_type, listed):
            return blob
        data = json.dumps(_rewrite(document, media_type, found), separators=(",", ":")).encode()
        digest = digest_of(data)
        documents[digest] = data
        children[digest] = [new for old, new in zip(listed, found, strict=True) if old in kept]
        made.add(digest)
        return blob._replace(digest=digest, size=len(data), media_type=media_type)

    root = convert(closure.root)
    return closure if root is closure.root else Closure(root, documents, children, frozenset(made))


def _convert_content(blob: Descriptor) -> Descriptor:
    is_content = blob.role in ("config", "layer")
    return blob._replace(media_type=_CONTENT_TYPES.get(blob.media_type, blob.media_type)) if is_content else blob


def _rewrite(document: dict[str, Any], media_type: str, found: list[Descriptor]) -> dict[str, Any]:
    """Return a manifest or index of another media type, which lists these children in place of its own."""
    is_index = "manifests" in document
    # Go writes an empty list as null.
    listed = (document["manifests"] or []) if is_index else [document["config"], *(document["layers"] or [])]
    entries = [replace_entry(entry, child) for entry, child in zip(listed, found, strict=True)]
    if not is_index:
        return {**document, "mediaType": media_type, "config": entries[0], "layers": entries[1:]}
    digests = {entry["digest"]: child.digest for entry, child in zip(listed, found, strict=True)}
    return {**document, "mediaType": media_type, "manifests": [_update_attested(entry, digests) for entry in entries]}


def _update_attested(entry: dict[str, Any], digests: dict[str, Digest]) -> dict[str, Any]:
    """Return the entry of an attestation with the new digest of the manifest that it is about."""
    annotations = entry.get("annotations")
    attested = annotations.get(_ATTESTED) if isinstance(annotations, dict) else None
    if not isinstance(attested, str) or attested not in digests:
        return entry
    return {**entry, "annotations": {**entry["annotations"], _ATTESTED: digests[attested]}}
