"""Read an OCI image layout: https://github.com/opencontainers/image-spec/blob/main/image-layout.md"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from cachedb import oci
from cachedb.disk.waiting import LOG
from cachedb.errors import InvalidArchive, InvalidDigest
from cachedb.oci.digests import Digest, digest_of, parse_digest
from cachedb.oci.manifests import Descriptor, load_json
from cachedb.text import shorten
from cachedb.transports.archive.contents import Contents
from cachedb.transports.archive.files import Files, Section
from cachedb.transports.archive.model import (
    CONTAINERD_NAME,
    REF_NAME,
    REFERRER_SUBJECT,
    ArchivedBlob,
    ArchivedImage,
    FoundImage,
    check_image_count,
    list_digests,
    path_in_layout,
    read_document,
)

__all__ = ["open_layout", "read_layout"]


_FALLBACK_TAG = re.compile(
    r"(?:.*:)?(sha256|sha512)-([0-9a-f]{64,128})"
)  # distribution specification, "Referrers Tag Schema"


class _Listed(NamedTuple):
    """A manifest or index in index.json, which may list it several times."""

    root: Descriptor
    entry: dict[str, Any]
    names: list[str]
    tags: list[str]
    subjects: set[Digest]  # of the manifests that annotations say it refers to


def open_layout(files: Files, platform: str | None) -> Contents:
    """Return the blobs of an image layout, after a check of its version."""
    layout = files.find("oci-layout")
    if layout is not None:
        version = read_document(layout, "oci-layout")
        if not isinstance(version, dict) or not str(version.get("imageLayoutVersion")).startswith("1."):
            raise InvalidArchive("oci-layout has an unsupported version: only 1.x is supported")
    return Contents(lambda blob: files.find(path_in_layout(blob.digest)), platform, has_end=files.has_end)


def read_layout(contents: Contents, section: Section, *, as_one: bool) -> list[FoundImage]:
    """Return the images in index.json with their names and referrers.

    Args:
        contents: the blobs of the layout.
        section: index.json.
        as_one: return manifests for several platforms, which have no name, as one image.
    """
    index = read_document(section, "index.json")
    entries = (index.get("manifests") or []) if isinstance(index, dict) else [] if index is None else None
    if not isinstance(entries, list):
        raise InvalidArchive("index.json is not an image index: it has no list of manifests")
    check_image_count(entries)
    listed = _read_entries(contents, entries)
    found = [
        FoundImage(image, item.names, item.tags, item.entry)
        for item in listed
        if not _is_only_referrer(contents, item) and (image := contents.read_image(item.root)) is not None
    ]
    # Some tools list the children of an index beside it. Without a name they are not separate images.
    reachable = {blob.digest for item in found for blob in item.image.blobs[1:]}
    found = [item for item in found if item.names or item.tags or item.image.identity not in reachable]
    found = _join_platforms(contents, found, section, as_one=as_one)
    return _attach_referrers(contents, found, listed)


def _join_platforms(contents: Contents, found: list[FoundImage], section: Section, *, as_one: bool) -> list[FoundImage]:
    """Return the images; manifests for several platforms with the same names become one image.

    Args:
        contents: the blobs of the layout.
        found: the images.
        section: index.json, which is the joined image's index if it lists nothing else.
        as_one: also join the manifests that have no name.
    """
    groups: dict[object, list[FoundImage]] = {}
    for item in found:
        groups.setdefault((tuple(item.names), tuple(item.tags)), []).append(item)
    joined = []
    for group in groups.values():
        is_named = bool(group[0].names or group[0].tags)
        if len(group) > 1 and (is_named or as_one) and _are_for_different_platforms(contents, group):
            entries = [_add_platform(item.entry or {}, contents) for item in group]
            joined.append(_join(group, entries, section))
        else:
            joined += group
    return joined


def _are_for_different_platforms(contents: Contents, group: list[FoundImage]) -> bool:
    roots = [item.image.root for item in group if item.image.root]
    platforms = {contents.read_platform(root) if root.role == "manifest" else None for root in roots}
    return len(platforms) == len(group) and None not in platforms


def _add_platform(entry: dict[str, Any], contents: Contents) -> dict[str, Any]:
    """Return an entry of an index with its platform, from the config if the entry does not state it."""
    root = oci.parse_entry(entry, "index.json")
    if root.platform:
        return entry
    fields = zip(("os", "architecture", "variant"), (contents.read_platform(root) or "").split("/"), strict=False)
    return {**entry, "platform": dict(fields)}


def _join(group: list[FoundImage], entries: list[dict[str, Any]], section: Section) -> FoundImage:
    """Return one image whose index has these entries, which list the manifests of several images."""
    data = section.head(section.size)
    document = load_json(data, "index.json")
    fields = [document.get("schemaVersion"), document.get("mediaType", oci.OCI_INDEX), document.get("manifests")]
    if fields != [2, oci.OCI_INDEX, entries]:
        data = oci.build_index(entries)
    root = oci.root_descriptor(digest_of(data), len(data), oci.OCI_INDEX)
    index = ArchivedBlob(Section(data, 0, len(data)), "the index", root.size, root.digest, root.media_type, "index")
    blobs = [index, *dict.fromkeys(blob for item in group for blob in item.image.blobs)]
    is_whole = all(item.image.chosen is None for item in group)
    image = ArchivedImage(root, blobs, None if is_whole else list_digests(blobs))
    return FoundImage(image, group[0].names, group[0].tags)


def _read_entries(contents: Contents, entries: list[Any]) -> list[_Listed]:
    """Return the manifests and indexes in index.json, each once."""
    listed: dict[Digest, _Listed] = {}
    for entry in entries:
        if not isinstance(entry, dict):
            raise InvalidArchive("index.json has an entry that is not a descriptor")
        entry = {"mediaType": oci.OCI_MANIFEST, **entry}
        root = oci.parse_entry(entry, "index.json")
        contents.add_embedded(entry)
        if root.role == "other":
            LOG.warning("not imported: %s is %s, not an image", root.digest, shorten(root.media_type))
            continue
        item = listed.setdefault(root.digest, _Listed(root, entry, [], [], set()))
        _read_annotations(entry.get("annotations"), item)
    return list(listed.values())


def _read_annotations(annotations: object, item: _Listed) -> None:
    """Add the name in an entry's annotations, or the subject that they state.

    skopeo and podman write the full name to ref.name, but Docker writes only the tag, and the name beside it.
    """
    if not isinstance(annotations, dict):
        return
    reference, full = annotations.get(REF_NAME), annotations.get(CONTAINERD_NAME)
    subject = annotations.get(REFERRER_SUBJECT)
    if isinstance(reference, str) and (fallback := _FALLBACK_TAG.fullmatch(reference)):
        subject = ":".join(fallback.groups())
    if isinstance(subject, str):
        try:
            item.subjects.add(parse_digest(subject))
        except InvalidDigest as error:
            raise InvalidArchive(f"index.json refers to an invalid subject: {error}") from error
    elif isinstance(reference, str) and (":" in reference or "/" in reference):
        item.names.append(reference)
    elif isinstance(full, str):
        item.names.append(full)
    elif isinstance(reference, str) and reference:
        item.tags.append(reference)


def _is_only_referrer(contents: Contents, item: _Listed) -> bool:
    """Return whether an entry without a name only refers to another manifest.

    Its annotations state the subject, or the subject is in the archive.
    """
    if item.names or item.tags:
        return False
    subject = contents.read_subject(item.root)
    return bool(item.subjects) or (subject is not None and contents.has_manifest(subject))


def _attach_referrers(contents: Contents, found: list[FoundImage], listed: list[_Listed]) -> list[FoundImage]:
    """Return the images with the referrers of their manifests, and the referrers of those."""
    referrers = _list_referrers(contents, listed)
    attached = set[Digest]()
    result = []
    for item in found:
        known = set(list_digests(item.image.blobs))
        blobs = dict[ArchivedBlob, None]()
        pending = referrers
        while ready := [root for root, subject in pending if subject in known]:
            pending = [(root, subject) for root, subject in pending if subject not in known]
            known.update(root.digest for root in ready)
            for root in ready:
                blobs.update(dict.fromkeys(contents.read_referrer(root)))
        attached |= known
        result.append(item._replace(image=item.image._replace(referrers=tuple(blobs))))
    for root, subject in referrers:
        if root.digest not in attached:
            LOG.warning("not imported: %s refers to %s, which is not imported", root.digest, subject)
    return result


def _list_referrers(contents: Contents, listed: list[_Listed]) -> list[tuple[Descriptor, Digest]]:
    """Return the manifests that refer to another one, each with its subject; warn about those that are not whole."""
    found = []
    for item in listed:
        if subject := contents.read_subject(item.root):
            found.append((item.root, subject))
        # An index that has a fallback tag only lists referrers.
        is_list = item.root.role == "index" and contents.is_present(item.root)
        roots = contents.read_children(item.root) if is_list else [item.root]
        found += [(root, subject) for subject in item.subjects for root in roots]
    whole = []
    for root, subject in dict.fromkeys(found):
        if contents.is_present(root):
            whole.append((root, subject))
        else:
            LOG.warning("not imported: %s refers to %s, and is not whole in the archive", root.digest, subject)
    return whole
