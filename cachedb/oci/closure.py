"""Compute the closure of a manifest or index: every blob that it reaches, or those of one platform."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from cachedb.errors import InvalidManifest, NotInCache
from cachedb.oci.digests import Digest, digest_of
from cachedb.oci.manifests import (
    CONFIG_TYPES,
    DOCUMENT_LIMIT,
    Descriptor,
    artifact_type,
    load_json,
    read_descriptors,
    read_media_type,
    replace_entry,
    subject_of,
)
from cachedb.oci.names import Name
from cachedb.oci.platforms import choose_platform, host_platform, platform_label
from cachedb.text import shorten

__all__ = ["NESTING_LIMIT", "Closure", "choose", "choose_among", "read_closure", "walk"]


NESTING_LIMIT: Final = 128
"""The most indexes in each other; real images have two."""
_EMPTY_CONFIG: Final = digest_of(
    b"{}"
)  # of an artifact without a config (manifest.md, "Guidance for an Empty Descriptor")


@dataclass(frozen=True)
class Closure:
    """Every blob that a manifest or index reaches. Each manifest is read and parsed once.

    Attributes:
        root: the manifest or index.
        documents: the exact bytes of the manifests and indexes that were read.
        children: the descriptors in each of the documents, in order. Those of an index are all that it lists; those of
            a manifest are without the foreign layers that are not in the closure.
        made: the digests of the documents that `keep_present` or a conversion created; they are not stored.
    """

    root: Descriptor
    documents: dict[Digest, bytes]
    children: dict[Digest, list[Descriptor]]
    made: frozenset[Digest] = frozenset()

    @property
    def blobs(self) -> list[Descriptor]:
        """All blobs in order, the root first; a manifest that is referenced twice is expanded once."""
        found, stack, expanded = [], [self.root], set[Digest]()
        while stack:
            blob = stack.pop()
            found.append(blob)
            if blob.is_document and blob.digest not in expanded:
                expanded.add(blob.digest)
                stack.extend(reversed(self.children.get(blob.digest, [])))
        return found

    @property
    def images(self) -> list[Descriptor]:
        """The image manifests that were read, without attestations, whose platform is unknown/unknown."""
        return list(dict.fromkeys(self._find_images(self.root)))

    def _find_images(self, root: Descriptor) -> Iterator[Descriptor]:
        if root.role == "manifest":
            yield root
            return
        for blob in self.children[root.digest]:
            if blob.digest in self.documents and blob.platform != "unknown/unknown":
                yield from self._find_images(blob)

    def keep_present(self, present: Container[Digest]) -> Closure:
        """Return a closure whose indexes list only the children that are present; this one if all are.

        Args:
            present: the digests of the image's blobs in the cache.
        """
        documents, children, made = dict(self.documents), dict(self.children), set[Digest]()

        def prune(blob: Descriptor) -> Descriptor:
            if blob.role != "index":
                return blob
            listed = children[blob.digest]
            kept = [prune(child) for child in listed if child.digest in present]
            if kept == listed:
                return blob
            document = load_json(documents[blob.digest], "the index")
            entries = [
                entry for entry, child in zip(document["manifests"], listed, strict=True) if child.digest in present
            ]
            entries = [replace_entry(entry, child) for entry, child in zip(entries, kept, strict=True)]
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
            name: the image's name, for errors.
            wanted: ``os/architecture[/variant]``; None for the only image, or for the host's platform.
            read: returns the bytes of a config, which states the platform if no index does.

        Raises:
            NotInCache: if the image is not for that platform, or its manifest for that platform is not in the cache.
        """
        images = self.images
        if wanted is None and len(images) == 1:
            return replace(self, root=images[0])
        asked = wanted or host_platform()
        labels = self.read_platforms(read)
        absent = [blob for blob in self.blobs if blob.role == "manifest" and blob.digest not in self.documents]
        chosen = choose_platform([*labels.items(), *((blob, blob.platform) for blob in absent)], asked)
        if chosen in labels:
            return replace(self, root=chosen)
        if chosen:
            raise NotInCache(
                f"{name} for platform {shorten(asked)} is not in the cache: pull it with --platform", name=name
            )
        known = ", ".join(sorted(labels.values()))
        raise NotInCache(
            f"{name} is not for platform {shorten(asked)}, but for {known}: choose one with --platform", name=name
        )

    def read_platforms(self, read: Callable[[Digest], bytes]) -> dict[Descriptor, str]:
        """Return the platform of each image, which its index or its config states, else ``unknown``.

        Args:
            read: returns the bytes of a config.
        """
        return {image: image.platform or self._read_platform(image, read) for image in self.images}

    def _read_platform(self, image: Descriptor, read: Callable[[Digest], bytes]) -> str:
        """Return the platform that the config of an image states."""
        config = self.children[image.digest][0]
        if config.size <= DOCUMENT_LIMIT:
            with suppress(InvalidManifest):  # the config of an artifact may be anything
                return platform_label(load_json(read(config.digest), "the config")) or "unknown"
        return "unknown"

    def find_referrers(self, attached: Mapping[Descriptor, bytes]) -> list[Closure]:
        """Return the closures of the referrers of these manifests, and of their own referrers.

        Args:
            attached: manifests and indexes outside this closure, with their bytes.

        Raises:
            InvalidManifest: if one of the referrers does not match its media type.
        """
        data = {blob.digest: data for blob, data in attached.items()}
        subjects = {blob: subject_of(data) for blob, data in attached.items()}
        known = {blob.digest for blob in self.blobs if blob.digest in self.documents}
        found: list[Closure] = []

        def choose(children: list[Descriptor]) -> list[Descriptor]:
            return [child for child in children if child.role in ("config", "layer") or child.digest in data]

        while new := [blob for blob, subject in subjects.items() if blob.digest not in known and subject in known]:
            for root in new:
                found.append(read_closure(root, lambda blob: data[blob.digest], choose))
                known |= found[-1].documents.keys()
        return found

    def lacks_layers(self, manifest: Descriptor) -> bool:
        """Return whether the closure lacks foreign layers of a manifest.

        Args:
            manifest: one of `images`.
        """
        listed = _parse_children(manifest, self.documents[manifest.digest])
        return len(self.children[manifest.digest]) < len(listed)

    def find_artifact_type(self, manifest: Descriptor) -> str | None:
        """Return the type of an artifact, such as a Helm chart; None for a container image.

        Args:
            manifest: one of `images`.
        """
        document, config = load_json(self.documents[manifest.digest], "the manifest"), self.children[manifest.digest][0]
        # Some tools give the empty config the media type of an image config.
        is_empty = "artifactType" in document and config.digest == _EMPTY_CONFIG
        return None if config.media_type in CONFIG_TYPES and not is_empty else artifact_type(document)


def read_closure(
    root: Descriptor,
    read: Callable[[Descriptor], bytes],
    choose: Callable[[list[Descriptor]], list[Descriptor]] | None = None,
) -> Closure:
    """Read all manifests that a manifest or index reaches, and return its closure.

    Args:
        root: the manifest or index.
        read: returns the bytes of a manifest.
        choose: returns the children that belong to the closure, from those of a manifest or index; the default is all.

    Raises:
        InvalidManifest: if a manifest does not match its media type.
    """
    documents: dict[Digest, bytes] = {}
    children: dict[Digest, list[Descriptor]] = {}
    stack = [root]
    while stack:
        blob = stack.pop()
        if not blob.is_document or blob.digest in documents:
            continue
        documents[blob.digest] = read(blob)
        found = _parse_children(blob, documents[blob.digest])
        chosen = choose(found) if choose else found
        children[blob.digest] = found if blob.role == "index" else chosen
        stack.extend(reversed(chosen))
    return Closure(root, documents, children)


def _parse_children(blob: Descriptor, data: bytes) -> list[Descriptor]:
    """Return the descriptors in a manifest or index."""
    document = load_json(data, "the manifest")
    read_media_type(document, blob.media_type)
    return read_descriptors(document, blob.media_type, f"manifest {blob.digest}")


def choose(
    children: list[Descriptor],
    wanted: str,
    list_children: Callable[[Descriptor], list[Descriptor]] | None = None,
) -> list[Descriptor]:
    """Return an index's best child for a platform; if none matches, the children without a platform.

    Args:
        children: of the index.
        wanted: ``os/architecture[/variant]``.
        list_children: returns the children of an index without a platform. Such an index is chosen only if it reaches
            the wanted platform, or a manifest without one. None chooses all such indexes.

    Raises:
        InvalidManifest: if indexes are nested too deeply.
    """
    reaches = dict[Digest, bool]()

    def choose_from(children: list[Descriptor], depth: int) -> list[Descriptor]:
        if depth > NESTING_LIMIT:
            raise InvalidManifest(f"the indexes are nested more than {NESTING_LIMIT} deep")
        best = choose_platform([(child, child.platform) for child in children], wanted)
        if best:
            return [best]
        return [child for child in children if child.platform is None and is_useful(child, depth)]

    def is_useful(child: Descriptor, depth: int) -> bool:
        if list_children is None or child.role != "index":
            return True
        if child.digest not in reaches:
            reaches[child.digest] = bool(choose_from(list_children(child), depth + 1))
        return reaches[child.digest]

    return choose_from(children, 0)


def walk(
    root: Descriptor,
    read: Callable[[Descriptor], bytes | None],
    choose: Callable[[list[Descriptor]], list[Descriptor]] | None = None,
    *,
    skip_invalid: bool = False,
) -> Iterator[Descriptor]:
    """Yield a manifest or index and every blob that it reaches; each manifest is expanded once.

    Args:
        root: the manifest or index to begin with.
        read: returns a manifest's bytes, or None to leave out its children.
        choose: returns the children that belong to the closure, from those of a manifest or index; the default is all.
        skip_invalid: leave out the children of a manifest that does not match its media type.

    Raises:
        InvalidManifest: if a manifest does not match its media type, unless ``skip_invalid``.
    """
    stack, expanded = [root], set[Digest]()
    while stack:
        blob = stack.pop()
        yield blob
        if not blob.is_document or blob.digest in expanded:
            continue
        expanded.add(blob.digest)
        data = read(blob)
        try:
            found = [] if data is None else _parse_children(blob, data)
        except InvalidManifest:
            if not skip_invalid:
                raise
            continue
        stack.extend(reversed(choose(found) if choose else found))


def choose_among(digests: Container[Digest]) -> Callable[[list[Descriptor]], list[Descriptor]]:
    """Return a ``choose`` function that keeps the children among the digests, or all if none is.

    It also keeps what no image can do without: its config, and its layers except foreign ones.
    """

    def choose(children: list[Descriptor]) -> list[Descriptor]:
        return [child for child in children if child.digest in digests or _is_required(child)] or children

    return choose


def _is_required(child: Descriptor) -> bool:
    return child.role in ("config", "layer") and not child.is_foreign
