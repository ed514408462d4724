"""Read an OCI image layout: https://github.com/opencontainers/image-spec/blob/main/image-layout.md"""

from __future__ import annotations

from collections import Counter
from typing import Any

from cachedb import oci
from cachedb.errors import DigestMismatch, InvalidArchive, InvalidManifest, InvalidName
from cachedb.oci.digests import Digest, digest_of
from cachedb.oci.manifests import Descriptor
from cachedb.oci.names import Name
from cachedb.text import shorten
from cachedb.transports.archive.files import Files, Section
from cachedb.transports.archive.model import (
    CONTAINERD_NAME,
    REF_NAME,
    ArchivedBlob,
    ArchivedImage,
    Found,
    check_blob_count,
    check_image_count,
    path_in_layout,
    read_document,
    read_small,
)

__all__ = ["read_layout"]


def read_layout(files: Files, section: Section, tags: dict[Digest, list[object]]) -> list[Found]:
    """Return the images in index.json with their names.

    Args:
        files: the files of the archive.
        section: index.json.
        tags: the names in manifest.json, by the digest of the config.
    """
    layout = files.find("oci-layout")
    if layout is not None:
        version = read_document(layout, "oci-layout")
        if not isinstance(version, dict) or not str(version.get("imageLayoutVersion")).startswith("1."):
            raise InvalidArchive("oci-layout has an unsupported version: only 1.x is supported")
    index = read_document(section, "index.json")
    entries = index.get("manifests") if isinstance(index, dict) else None
    if not isinstance(entries, list):
        raise InvalidArchive("index.json is not an image index: it has no list of manifests")
    check_image_count(entries)
    names: dict[Digest, list[object]] = {}
    roots: dict[Digest, Descriptor] = {}
    for entry in entries:
        if not isinstance(entry, dict):
            raise InvalidArchive("index.json has an entry that is not a descriptor")
        if "mediaType" not in entry:
            entry = {**entry, "mediaType": oci.OCI_MANIFEST}
        root = oci.parse_entry(entry, "index.json")
        if root.role == "other":
            raise InvalidManifest(f"index.json names a {shorten(root.media_type)}, which is not an image")
        roots[root.digest] = root
        annotations = entry.get("annotations")
        if isinstance(annotations, dict) and (name := _find_annotated_name(annotations)):
            names.setdefault(root.digest, []).append(name)
    images = []
    rows = 0
    for root in roots.values():
        closure = _read_closure(files, root)
        rows += len(closure)
        check_blob_count(rows)
        blobs = [_find_blob(files, blob) for blob in dict.fromkeys(closure)]
        images.append(ArchivedImage([], root, blobs))
    # Some tools list the children of an index beside it. Without a name they are not separate images.
    reachable = {blob.digest for image in images for blob in image.blobs[1:]}
    named = zip(_choose_names(images, names, tags), images, strict=True)
    return [(texts, image) for texts, image in named if texts or image.identity not in reachable]


def _choose_names(
    images: list[ArchivedImage], annotated: dict[Digest, list[object]], tags: dict[Digest, list[object]]
) -> list[list[object]]:
    """Return the names of each image, from manifest.json if they are unambiguous, else from index.json.

    A name from index.json gets the spelling of manifest.json if both have it.
    """
    reached = Counter(digest for image in images for digest in {blob.digest for blob in image.blobs})
    short = {_qualify(text): text for texts in tags.values() for text in texts}
    found = []
    for image in images:
        digests = [blob.digest for blob in image.blobs if blob.digest]
        configs = [digest for digest in dict.fromkeys(digests) if digest in tags]
        tagged = [text for config in configs for text in tags[config]]
        if tagged and all(reached[config] == 1 for config in configs):
            found.append(tagged)
        else:
            found.append([short.get(_qualify(text), text) for text in annotated.get(digests[0], [])])
    return found


def _qualify(text: object) -> object:
    try:
        return Name.parse(text).qualified()  # type: ignore[arg-type]
    except InvalidName:
        return text


def _find_annotated_name(annotations: dict[str, Any]) -> object:
    """Return the name in annotations, or None.

    skopeo and podman write the full name to ref.name, but Docker writes only the tag.
    """
    reference, full = annotations.get(REF_NAME), annotations.get(CONTAINERD_NAME)
    if isinstance(reference, str) and (full is None or ":" in reference or "/" in reference):
        return reference
    return full


def _read_closure(files: Files, root: Descriptor) -> list[Descriptor]:
    def read(blob: Descriptor) -> bytes:
        found = _find_blob(files, blob)
        data = read_small(found.section, found.what, InvalidManifest)
        if len(data) != blob.size:
            raise DigestMismatch(f"{found.what} should be {blob.size} bytes, and is {len(data)}")
        if digest_of(data, blob.digest) != blob.digest:
            raise DigestMismatch(f"{found.what} in the archive does not match its digest")
        return data

    return list(oci.walk(root, read))


def _find_blob(files: Files, blob: Descriptor) -> ArchivedBlob:
    what = f"{blob.role} {blob.digest}"
    section = files.find(path_in_layout(blob.digest))
    if section is None:
        raise InvalidArchive(f"{what} is referenced in the archive, but is not in it")
    return ArchivedBlob(section, what, blob.size, blob.digest, blob.media_type)
