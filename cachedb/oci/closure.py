"""Walk what a manifest or index references: all of it, or one platform."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator

from cachedb.errors import NotInCache
from cachedb.oci.digests import Digest, digest_of
from cachedb.oci.manifests import (
    DOCUMENT_LIMIT,
    Descriptor,
    child,
    descriptors,
    load_json,
    read_descriptors,
    read_media_type,
)
from cachedb.oci.names import Name
from cachedb.oci.platforms import host_platform, is_for, platform_label
from cachedb.text import shorten

__all__ = ["among", "choose", "choose_platform", "only_image", "walk", "without_absent"]


def without_absent(
    root: Descriptor, manifests: dict[Digest, bytes], here: Container[Digest]
) -> tuple[Descriptor, dict[Digest, bytes]]:
    """Return an index that lists only the stored children, and the documents created for it.

    If all children are stored, the root is returned unchanged, with no new documents.

    Args:
        root: the index, or a manifest.
        manifests: the bytes of the manifests and indexes of the closure, by digest; new indexes are added.
        here: the digests the image has in the cache.
    """
    if root.role != "index":
        return root, {}
    made: dict[Digest, bytes] = {}
    entries, document = [], load_json(manifests[root.digest], "the index")
    for entry in document["manifests"]:
        blob = child(entry, "the index")
        if blob.digest in here:
            new, more = without_absent(blob, manifests, here)
            made |= more
            entries.append({**entry, "digest": new.digest, "size": new.size})
    if entries == document["manifests"]:
        return root, {}
    data = json.dumps({**document, "manifests": entries}, separators=(",", ":")).encode()
    digest = digest_of(data)
    made[digest] = manifests[digest] = data
    return root._replace(digest=digest, size=len(data)), made


def _platforms(root: Descriptor, manifests: dict[Digest, bytes]) -> list[Descriptor]:
    """Return the image manifests below a manifest or index, without attestations (platform unknown/unknown)."""
    if root.role == "manifest":
        return [root]
    children = descriptors(manifests[root.digest], root.media_type)
    found = [
        image
        for blob in children
        if blob.role in ("manifest", "index") and blob.digest in manifests and blob.platform != "unknown/unknown"
        for image in ([blob] if blob.role == "manifest" else _platforms(blob, manifests))
    ]
    return list(dict.fromkeys(found))


def only_image(root: Descriptor, manifests: dict[Digest, bytes]) -> Descriptor | None:
    """Return the manifest below a root if it has exactly one image, else None."""
    images = _platforms(root, manifests)
    return images[0] if len(images) == 1 else None


def choose_platform(
    name: Name,
    root: Descriptor,
    manifests: dict[Digest, bytes],
    read: Callable[[Digest], bytes],
    wanted: str | None,
) -> Descriptor:
    """Return the manifest of one platform of an image.

    Args:
        name: the image's name, for errors.
        root: its manifest or index.
        manifests: the bytes of the manifests and indexes of the closure, by digest.
        read: returns the bytes of a config, for an image whose platform no index states.
        wanted: ``os/architecture[/variant]``; None for the host's.

    Raises:
        NotInCache: if the image does not have that platform, or the platform's manifest is not stored.
    """
    images = _platforms(root, manifests)
    if wanted is None and len(images) == 1:
        return images[0]
    wanted = wanted or host_platform()
    labels = {image: image.platform or _platform_of_config(image, manifests, read) for image in images}
    for image, label in labels.items():
        if is_for(label, wanted):
            return image
    for blob in walk(root, lambda blob: manifests.get(blob.digest)):
        if blob.role == "manifest" and blob.digest not in manifests and is_for(blob.platform, wanted):
            raise NotInCache(f"{name} is not here for platform {shorten(wanted)}: pull it with --platform")
    known = ", ".join(sorted(labels.values()))
    raise NotInCache(f"{name} is not for platform {shorten(wanted)}, but for {known}: choose one with --platform")


def _platform_of_config(image: Descriptor, manifests: dict[Digest, bytes], read: Callable[[Digest], bytes]) -> str:
    config = descriptors(manifests[image.digest], image.media_type)[0]
    if config.size > DOCUMENT_LIMIT:
        return "unknown"
    return platform_label(load_json(read(config.digest), f"config {config.digest}")) or "unknown"


def choose(children: list[Descriptor], wanted: str) -> list[Descriptor]:
    """Return the first child of an index for a platform; if there is none, the children that state no platform."""
    first = next((child for child in children if is_for(child.platform, wanted)), None)
    return [child for child in children if child is first or (first is None and child.platform is None)]


def walk(
    root: Descriptor,
    read: Callable[[Descriptor], bytes | None],
    choose: Callable[[list[Descriptor]], list[Descriptor]] | None = None,
) -> Iterator[Descriptor]:
    """Yield the root and everything it references, expanding each manifest once.

    Args:
        root: the manifest or index to start from.
        read: returns a manifest's bytes, or None to skip what it references.
        choose: returns the wanted children of an index; the default is all of them.

    Raises:
        InvalidManifest: if a manifest does not match its media type.
    """
    stack, expanded = [root], set[Digest]()
    while stack:
        blob = stack.pop()
        yield blob
        if blob.role not in ("manifest", "index") or blob.digest in expanded:
            continue
        expanded.add(blob.digest)
        data = read(blob)
        if data is not None:
            document = load_json(data, "the manifest")
            read_media_type(document, blob.media_type)
            children = read_descriptors(document, blob.media_type, f"manifest {blob.digest}")
            stack.extend(reversed(choose(children) if choose and blob.role == "index" else children))


def among(digests: Container[Digest]) -> Callable[[list[Descriptor]], list[Descriptor]]:
    """Return a ``choose`` function for `walk` that selects the children in ``digests``, or all if none is in it."""
    return lambda children: [child for child in children if child.digest in digests] or children
