"""What a manifest or index reaches: all of it, or one platform of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace

from cachedb.errors import NotInCache
from cachedb.oci.digests import Digest, digest_of
from cachedb.oci.manifests import (
    DOCUMENT_LIMIT,
    Descriptor,
    load_json,
    read_descriptors,
    read_media_type,
)
from cachedb.oci.names import Name
from cachedb.oci.platforms import host_platform, is_for, platform_label
from cachedb.text import shorten

__all__ = ["Closure", "among", "choose", "read_closure", "walk"]


@dataclass(frozen=True)
class Closure:
    """What a manifest or index reaches. Each manifest is read and parsed once.

    Attributes:
        root: the manifest or index.
        documents: the exact bytes of the manifests and indexes that are at hand.
        children: what each of those refers to, in order; also what is not at hand.
        made: those of the documents that `only` made; they are stored nowhere.
    """

    root: Descriptor
    documents: dict[Digest, bytes]
    children: dict[Digest, list[Descriptor]]
    made: frozenset[Digest] = frozenset()

    @property
    def blobs(self) -> list[Descriptor]:
        """All blobs in order, the root first; a manifest that is referred to twice is followed once."""
        found, stack, followed = [], [self.root], set[Digest]()
        while stack:
            blob = stack.pop()
            found.append(blob)
            if blob.role in ("manifest", "index") and blob.digest not in followed:
                followed.add(blob.digest)
                stack.extend(reversed(self.children.get(blob.digest, [])))
        return found

    @property
    def images(self) -> list[Descriptor]:
        """The image manifests that are at hand; attestations, of platform unknown/unknown, are none."""
        return list(dict.fromkeys(self._images(self.root)))

    def _images(self, root: Descriptor) -> Iterator[Descriptor]:
        if root.role == "manifest":
            yield root
            return
        for blob in self.children[root.digest]:
            if blob.digest in self.documents and blob.platform != "unknown/unknown":
                yield from self._images(blob)

    def only(self, present: Container[Digest]) -> Closure:
        """Return the closure of an index that refers to nothing but what is present; itself if all of it is.

        Args:
            present: the digests that the cache has of the image.
        """
        documents, children, made = dict(self.documents), dict(self.children), set[Digest]()

        def prune(blob: Descriptor) -> Descriptor:
            if blob.role != "index":
                return blob
            named = children[blob.digest]
            kept = [prune(child) for child in named if child.digest in present]
            if kept == named:
                return blob
            document = load_json(documents[blob.digest], "the index")
            entries = [
                entry for entry, child in zip(document["manifests"], named, strict=True) if child.digest in present
            ]
            entries = [
                {**entry, "digest": child.digest, "size": child.size}
                for entry, child in zip(entries, kept, strict=True)
            ]
            data = json.dumps({**document, "manifests": entries}, separators=(",", ":")).encode()
            digest = digest_of(data)
            documents[digest], children[digest] = data, kept
            made.add(digest)
            return blob._replace(digest=digest, size=len(data))

        root = prune(self.root)
        return self if root is self.root else Closure(root, documents, children, frozenset(made))

    def for_platform(self, name: Name, wanted: str | None, read: Callable[[Digest], bytes]) -> Closure:
        """Return the closure of the manifest of one platform.

        Args:
            name: of the image.
            wanted: ``os/architecture[/variant]``; None for the host's.
            read: returns the bytes of a config, which tells the platform where no index does.

        Raises:
            NotInCache: if the image is not for that platform, or what it has for it is not here.
        """
        images = self.images
        if wanted is None and len(images) == 1:
            return replace(self, root=images[0])
        asked = wanted or host_platform()
        here = {image: image.platform or self._platform_of(image, read) for image in images}
        for image, label in here.items():
            if is_for(label, asked):
                return replace(self, root=image)
        for blob in self.blobs:
            if blob.role == "manifest" and blob.digest not in self.documents and is_for(blob.platform, asked):
                raise NotInCache(
                    f"{name} is not here for platform {shorten(asked)}: pull it with --platform", name=name
                )
        known = ", ".join(sorted(here.values()))
        raise NotInCache(
            f"{name} is not for platform {shorten(asked)}, but for {known}: choose one with --platform", name=name
        )

    def _platform_of(self, image: Descriptor, read: Callable[[Digest], bytes]) -> str:
        """Return the platform that the config of an image says."""
        config = self.children[image.digest][0]
        if config.size > DOCUMENT_LIMIT:
            return "unknown"
        return platform_label(load_json(read(config.digest), f"config {config.digest}")) or "unknown"


def read_closure(
    root: Descriptor,
    read: Callable[[Descriptor], bytes],
    choose: Callable[[list[Descriptor]], list[Descriptor]] | None = None,
) -> Closure:
    """Read what a manifest or index reaches.

    Args:
        root: the manifest or index.
        read: returns the bytes of a manifest.
        choose: returns those of an index's children that are to be read; all of them unless given.

    Raises:
        InvalidManifest: if one of the manifests is not what its media type says.
    """
    documents: dict[Digest, bytes] = {}
    children: dict[Digest, list[Descriptor]] = {}
    stack = [root]
    while stack:
        blob = stack.pop()
        if blob.role not in ("manifest", "index") or blob.digest in documents:
            continue
        documents[blob.digest] = read(blob)
        children[blob.digest] = _refers_to(blob, documents[blob.digest])
        named = children[blob.digest]
        stack.extend(reversed(choose(named) if choose and blob.role == "index" else named))
    return Closure(root, documents, children)


def _refers_to(blob: Descriptor, data: bytes) -> list[Descriptor]:
    """Return what a manifest or index refers to."""
    document = load_json(data, "the manifest")
    read_media_type(document, blob.media_type)
    return read_descriptors(document, blob.media_type, f"manifest {blob.digest}")


def choose(children: list[Descriptor], wanted: str) -> list[Descriptor]:
    """Return the first child of an index for a platform; if there is none, the children that state no platform."""
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
            named = _refers_to(blob, data)
            stack.extend(reversed(choose(named) if choose and blob.role == "index" else named))


def among(digests: Container[Digest]) -> Callable[[list[Descriptor]], list[Descriptor]]:
    """Return a choice for `walk`: of an index's children those that are among the digests, or all if none is."""
    return lambda children: [child for child in children if child.digest in digests] or children
