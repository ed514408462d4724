"""Read an OCI image layout: https://github.com/opencontainers/image-spec/blob/main/image-layout.md"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from cachedb import oci
from cachedb.disk.waiting import LOG
from cachedb.errors import InvalidArchive, InvalidDigest
from cachedb.oci.digests import Digest, digest_of, parse_digest
from cachedb.oci.manifests import Descriptor
from cachedb.text import shorten
from cachedb.transports.archive.contents import Contents
from cachedb.transports.archive.files import Files, Section
from cachedb.transports.archive.model import (
    CONTAINERD_NAME,
    DAMAGE_ERRORS,
    REF_NAME,
    ArchivedBlob,
    ArchivedImage,
    FoundImage,
    check_image_count,
    list_digests,
    path_in_layout,
    read_document,
)

__all__ = ["find_children", "open_layout", "read_layout"]


_REFERRER_SUBJECT = "org.opencontainers.image.referrer.subject"  # a digest, written by regctl for a referrers list
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


def read_layout(contents: Contents, section: Section, *, as_one: bool, may_be_damaged: bool) -> list[FoundImage]:
    """Return the images in index.json with their names and referrers.

    Args:
        contents: the blobs of the layout.
        section: index.json.
        as_one: join manifests without a name, which are for several platforms, into one image.
        may_be_damaged: return an image that is damaged or incomplete with its error, instead of raising the error.
    """
    index = read_document(section, "index.json")
    entries = (index.get("manifests") or []) if isinstance(index, dict) else [] if index is None else None
    if not isinstance(entries, list):
        raise InvalidArchive("index.json is not an image index: it has no list of manifests")
    check_image_count(entries)
    listed, images = list[_Listed](), list[tuple[_Listed, ArchivedImage | None]]()
    damaged: list[FoundImage] = []
    for item in _read_entries(contents, entries):
        try:
            if not _is_only_referrer(contents, item):
                images.append((item, contents.read_image(item.root)))
            listed.append(item)
        except DAMAGE_ERRORS as error:
            if not may_be_damaged:
                raise
            damaged.append(FoundImage(ArchivedImage(item.root, []), item.names, item.tags, error))
    # Some tools list the children of an index beside it. Without a name they are not separate images.
    reachable = {blob.digest for _, image in images if image for blob in image.blobs[1:]}
    images = [pair for pair in images if pair[0].names or pair[0].tags or pair[0].root.digest not in reachable]
    found = _join_platforms(contents, images, index, section, as_one=as_one)
    referrers = _list_referrers(contents, listed, may_be_damaged=may_be_damaged)
    return [*_attach_referrers(contents, found, referrers), *damaged]


def find_children(contents: Contents, found: list[FoundImage], prefix: str) -> list[FoundImage]:
    """Return the children of images whose digests begin with a text, as images without a name."""
    roots = {
        blob.digest: Descriptor(blob.digest, blob.size, blob.media_type, blob.role)
        for item in found
        for blob in item.image.blobs[1:]
        if blob.digest and blob.digest.startswith(prefix)
    }
    known = {item.image.identity for item in found}
    images = [contents.read_image(root) for root in roots.values() if root.is_document and root.digest not in known]
    return [FoundImage(image, [], []) for image in images if image]


def _join_platforms(
    contents: Contents,
    images: list[tuple[_Listed, ArchivedImage | None]],
    document: Any,  # noqa: ANN401
    section: Section,
    *,
    as_one: bool,
) -> list[FoundImage]:
    """Return the images; manifests for several platforms with the same names become one image.

    Args:
        contents: the blobs of the layout.
        images: the manifests and indexes in index.json; without an image if they are not for the wanted platform.
        document: index.json, parsed; it is the joined image's index if it lists nothing else.
        section: index.json.
        as_one: also join the manifests that have no name.
    """
    groups: dict[object, list[tuple[_Listed, ArchivedImage | None]]] = {}
    for item, image in images:
        groups.setdefault((tuple(item.names), tuple(item.tags)), []).append((item, image))
    joined = []
    for group in groups.values():
        listed, wanted = [item for item, _ in group], [image for _, image in group if image]
        is_named = bool(listed[0].names or listed[0].tags)
        if wanted and len(group) > 1 and (is_named or as_one) and _are_for_different_platforms(contents, listed):
            entries = [_add_platform(item, contents) for item in listed]
            is_whole = len(wanted) == len(group) and all(image.chosen is None for image in wanted)
            image = _join(wanted, entries, document, section, is_whole=is_whole)
            joined.append(FoundImage(image, listed[0].names, listed[0].tags))
        else:
            joined += [FoundImage(image, item.names, item.tags) for item, image in group if image]
    return joined


def _are_for_different_platforms(contents: Contents, group: list[_Listed]) -> bool:
    try:
        platforms = {contents.read_platform(item.root) if item.root.role == "manifest" else None for item in group}
    except DAMAGE_ERRORS:
        return False  # a config is damaged: the import raises an error if it needs this config
    return len(platforms) == len(group) and None not in platforms


def _add_platform(item: _Listed, contents: Contents) -> dict[str, Any]:
    """Return an entry of an index with its platform, from the config if the entry does not state it."""
    if item.root.platform:
        return item.entry
    label = contents.read_platform(item.root) or ""
    fields = zip(("os", "architecture", "variant"), label.split("/"), strict=False)
    return {**item.entry, "platform": dict(fields)}


def _join(
    images: list[ArchivedImage],
    entries: list[dict[str, Any]],
    document: Any,  # noqa: ANN401
    section: Section,
    *,
    is_whole: bool,
) -> ArchivedImage:
    """Join images for several platforms into one image, whose index has these entries.

    Args:
        images: the images to import.
        entries: one for each platform, imported or not.
        document: index.json, parsed.
        section: index.json.
        is_whole: whether all platforms are imported.
    """
    fields = [document.get("schemaVersion"), document.get("mediaType", oci.OCI_INDEX), document.get("manifests")]
    data = section.head(section.size)
    if fields != [2, oci.OCI_INDEX, entries] or not data.lstrip().startswith(b"{"):  # it may have a byte order mark
        data = oci.build_index(entries)
    root = oci.root_descriptor(digest_of(data), len(data), oci.OCI_INDEX)
    index = ArchivedBlob(Section(data, 0, len(data)), "the index", root.size, root.digest, root.media_type, "index")
    blobs = [index, *dict.fromkeys(blob for image in images for blob in image.blobs)]
    return ArchivedImage(root, blobs, None if is_whole else list_digests(blobs))


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
    subject = annotations.get(_REFERRER_SUBJECT)
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


def _attach_referrers(
    contents: Contents, found: list[FoundImage], referrers: list[tuple[Descriptor, Digest]]
) -> list[FoundImage]:
    """Return the images with the referrers of their manifests, and the referrers of those."""
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
            LOG.warning("not imported: the referrer %s, because its subject %s is not imported", root.digest, subject)
    return result


def _list_referrers(
    contents: Contents, listed: list[_Listed], *, may_be_damaged: bool
) -> list[tuple[Descriptor, Digest]]:
    """Return the referrers in index.json, each with its subject; warn about incomplete ones."""

    def is_whole(root: Descriptor) -> bool:
        try:
            return contents.is_present(root)
        except DAMAGE_ERRORS:
            if not may_be_damaged:
                raise
            return False

    found = []
    for item in listed:
        if subject := contents.read_subject(item.root):
            found.append((item.root, subject))
        # An index that has a fallback tag only lists referrers.
        is_list = item.root.role == "index" and is_whole(item.root)
        roots = contents.read_children(item.root) if is_list else [item.root]
        found += [(root, subject) for subject in item.subjects for root in roots]
    whole = []
    for root, subject in dict.fromkeys(found):
        if is_whole(root):
            whole.append((root, subject))
        else:
            LOG.warning("not imported: %s refers to %s, and the archive lacks a part of it", root.digest, subject)
    return whole
