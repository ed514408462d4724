"""What a manifest or index reaches: all of it, or one platform of it."""

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
    """Return an index that names what is here and no more, and what was made for it; as it is, if all of it is here.

    Args:
        root: the index, or a manifest.
        manifests: the bytes of the manifests and indexes of the closure; what is made is put among them.
        here: what the image has in the cache.
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
    """Return the image manifests below a manifest or index; attestations, of unknown/unknown, are none."""
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
    """Return the manifest below a root if there is exactly one image."""
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
        name: the image's.
        root: its manifest or index.
        manifests: the bytes of the manifests and indexes of the closure, by digest.
        read: returns a blob's bytes: of a config, which tells the platform where no index does.
        wanted: ``os/architecture[/variant]``; None for the host's.

    Raises:
        NotInCache: if the image is not for that platform, or what it has for it is not here.
    """
    images = _platforms(root, manifests)
    if wanted is None and len(images) == 1:
        return images[0]
    asked = wanted or host_platform()
    there = {image: image.platform or _platform_of_config(image, manifests, read) for image in images}
    for image, label in there.items():
        if is_for(label, asked):
            return image
    for blob in walk(root, lambda blob: manifests.get(blob.digest)):
        if blob.role == "manifest" and blob.digest not in manifests and is_for(blob.platform, asked):
            raise NotInCache(f"{name} is not here for platform {shorten(asked)}: pull it with --platform")
    known = ", ".join(sorted(there.values()))
    raise NotInCache(f"{name} is not for platform {shorten(asked)}, but for {known}: choose one with --platform")


def _platform_of_config(image: Descriptor, manifests: dict[Digest, bytes], read: Callable[[Digest], bytes]) -> str:
    config = descriptors(manifests[image.digest], image.media_type)[0]
    if config.size > DOCUMENT_LIMIT:
        return "unknown"
    return platform_label(load_json(read(config.digest), f"config {config.digest}")) or "unknown"


def choose(children: list[Descriptor], wanted: str) -> list[Descriptor]:
    """Return the first of an index's children that is for a platform; if none is, those that do not say what for."""
    first = next((child for child in children if is_for(child.platform, wanted)), None)
    return [child for child in children if child is first or (first is None and child.platform is None)]


def walk(
    root: Descriptor,
    read: Callable[[Descriptor], bytes | None],
    choose: Callable[[list[Descriptor]], list[Descriptor]] | None = None,
) -> Iterator[Descriptor]:
    """Yield the closure of a manifest or index: itself, then all it reaches, each manifest once expanded.

    Args:
        root: the manifest to begin with.
        read: returns a manifest's bytes, or None where they are not at hand; what it names is then left out.
        choose: returns those of an index's children that are wanted; all of them unless given.

    Raises:
        InvalidManifest: if one of the manifests is not what its media type says.
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
            named = read_descriptors(document, blob.media_type, f"manifest {blob.digest}")
            stack.extend(reversed(choose(named) if choose and blob.role == "index" else named))


def among(digests: Container[Digest]) -> Callable[[list[Descriptor]], list[Descriptor]]:
    """Return a choice for `walk`: of an index's children those that are among the digests, or all if none is."""
    return lambda children: [child for child in children if child.digest in digests] or children
