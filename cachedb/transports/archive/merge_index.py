"""Add images to the index.json of an existing image layout."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cachedb import oci
from cachedb.disk.reader import read_small_blob
from cachedb.errors import CacheError, InvalidManifest
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import Descriptor
from cachedb.transports.archive.entries import Entry, json_entry
from cachedb.transports.archive.model import REF_NAME

__all__ = ["merge_index"]


def merge_index(folder: Path, entry: Entry) -> Entry:
    """Return the layout's index with the images and their referrers added.

    An image replaces the image that had its name, and that image's referrers if no other image has them.

    Args:
        folder: of the layout.
        entry: index.json of the new images alone; referrers have no names there.

    Raises:
        CacheError: if the folder has another index.json.
    """
    assert isinstance(entry.content, bytes)
    path = folder / entry.path
    try:
        old = oci.load_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        return entry
    new = json.loads(entry.content)["manifests"]
    if not isinstance(old, dict) or not isinstance(old.get("manifests"), list):
        raise CacheError(f"{str(path)!r} is not an image index: name another folder")

    names = [_read_name(entry) for entry in new if _read_name(entry) is not None]
    listed = {entry["digest"] for entry in new if _read_name(entry) is None}
    replaced = [entry for entry in old["manifests"] if _read_name(entry) in names]
    kept = [entry for entry in old["manifests"] if _read_name(entry) not in names and not _is_unnamed(entry, listed)]
    # Without a replaced image, nothing in the layout is read.
    if any(entry not in new for entry in replaced):
        gone = _list_reached(folder, replaced) - _list_reached(folder, [*filter(_read_name, kept), *new])
        kept = _remove_referrers(folder, kept, gone)
    return json_entry("index.json", {**old, "manifests": kept + new})


def _list_reached(folder: Path, entries: Iterable[Any]) -> set[Digest]:
    """Return the digests of the readable manifests and indexes in the closures of entries of index.json."""
    reached = set[Digest]()
    stack = [root for entry in entries if (root := _parse(entry))]
    while stack:
        blob = stack.pop()
        if blob.is_document and blob.digest not in reached:
            reached.add(blob.digest)
            data = read_small_blob(folder, blob.digest, blob.size) if blob.role == "index" else None
            with suppress(InvalidManifest):
                stack += oci.descriptors(data, blob.media_type) if data is not None else []
    return reached


def _remove_referrers(folder: Path, entries: list[Any], gone: set[Digest]) -> list[Any]:
    """Return the entries without those that have no name and refer to a manifest that is gone."""
    unnamed = [root for entry in entries if _read_name(entry) is None and (root := _parse(entry))]
    subjects = {root.digest: _read_subject(folder, root) for root in unnamed}
    while found := {digest for digest, subject in subjects.items() if subject in gone} - gone:
        gone = gone | found
    return [entry for entry in entries if not _is_unnamed(entry, subjects.keys() & gone)]


def _parse(entry: object) -> Descriptor | None:
    with suppress(InvalidManifest):
        return oci.parse_entry(entry, "index.json")
    return None


def _read_subject(folder: Path, root: Descriptor) -> Digest | None:
    # A layout has its blobs in the same places as a cache.
    data = read_small_blob(folder, root.digest, root.size)
    return None if data is None else oci.subject_of(data)


def _read_name(entry: object) -> object:
    annotations = entry.get("annotations") if isinstance(entry, dict) else None
    return annotations.get(REF_NAME) if isinstance(annotations, dict) else None


def _is_unnamed(entry: object, digests: Collection[str]) -> bool:
    """Return whether an entry lists one of these manifests without a name, as an export lists a referrer."""
    return isinstance(entry, dict) and _read_name(entry) is None and entry.get("digest") in digests
