"""Find the part of an image's closure that an archive holds.

An archive may lack parts of an image: the platforms that a tool did not copy, attestations, and foreign layers.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any, NamedTuple

from cachedb import oci
from cachedb.errors import DigestMismatch, InvalidArchive, InvalidManifest
from cachedb.oci.closure import NESTING_LIMIT, Closure
from cachedb.oci.digests import Digest, digest_of
from cachedb.oci.manifests import Descriptor, load_json, read_descriptors, read_media_type, read_subject
from cachedb.transports.archive.files import Section
from cachedb.transports.archive.model import ArchivedBlob, ArchivedImage, check_blob_count, list_digests, read_small
from cachedb.transports.archive.tar import SAVE_AGAIN

__all__ = ["Contents"]


_EMBEDDED_LIMIT = 16 * 1024 * 1024  # bytes of base64 in all descriptors


class _Document(NamedTuple):
    children: list[Descriptor]
    subject: Digest | None


class Contents:
    """The blobs of an archive by their descriptors. Each manifest is read, verified and parsed once."""

    def __init__(self, find: Callable[[Descriptor], Section | None], platform: str | None, *, has_end: bool) -> None:
        """Create it without reading anything.

        Args:
            find: returns the content of a blob, or None if it is not in the archive.
            platform: the only platform to import; None for all.
            has_end: False if the archive may be cut short; then nothing may be missing.
        """
        self._find, self._platform, self._has_end = find, platform, has_end
        self._embedded: dict[Digest, str] = {}  # base64
        self._embedded_length = 0  # characters
        self._decoded: dict[Digest, Section] = {}
        self._descriptor_count = self._blob_count = 0
        self._documents: dict[Digest, _Document] = {}
        self._present: dict[tuple[Digest, str], bool] = {}  # by digest and role: a manifest may also be a layer
        self.other_platforms: set[str] = set()
        """The platforms of the images that are not for the wanted one."""

    def read_image(self, root: Descriptor) -> ArchivedImage | None:
        """Return an image, without the parts that the archive lacks; None if it is for another platform.

        Raises:
            InvalidArchive: if the archive lacks a part that the image needs.
            InvalidManifest: if a manifest is invalid.
            DigestMismatch: if a manifest does not match its digest or size.
        """
        # If index.json states another platform for the image, the image itself may be absent.
        if self._platform and root.role == "manifest" and (root.platform or self.is_present(root)):
            label = self.read_platform(root)
            if label and not oci.is_for(label, self._platform):
                self.other_platforms.add(label)
                return None
        if not self.is_present(root):
            missing = self._find_missing(root)
            raise InvalidArchive(
                f"{_describe(missing)} is referenced in the archive, but is not in it: save the image again"
            )
        chosen = self._expand(root, self._choose)
        if any(not found and self._read(blob).children for blob, found in chosen.items()):
            return None
        blobs = self._list_blobs(root, chosen)
        is_whole = all(len(found) == len(self._read(blob).children) for blob, found in chosen.items())
        return ArchivedImage(root, blobs, None if is_whole else list_digests(blobs))

    def read_referrer(self, root: Descriptor) -> list[ArchivedBlob]:
        """Return the closure of a referrer, without the parts that the archive lacks."""
        return self._list_blobs(root, self._expand(root, self._find_present))

    def _expand(
        self, root: Descriptor, choose: Callable[[Descriptor], list[Descriptor]]
    ) -> dict[Descriptor, list[Descriptor]]:
        """Return a root and the manifests and indexes below it, each with its chosen children."""
        chosen: dict[Descriptor, list[Descriptor]] = {}
        stack = [root]
        while stack:
            blob = stack.pop()
            if blob.is_document and blob not in chosen:
                chosen[blob] = choose(blob)
                stack.extend(chosen[blob])
        return chosen

    def _list_blobs(self, root: Descriptor, chosen: dict[Descriptor, list[Descriptor]]) -> list[ArchivedBlob]:
        children = {blob.digest: found for blob, found in chosen.items()}
        listed = dict.fromkeys(Closure(root, {}, children).blobs)
        self._blob_count += len(listed)
        check_blob_count(self._blob_count)  # images may share blobs: a few descriptors may make many blobs
        return [self.find_blob(blob) for blob in listed]

    def is_present(self, blob: Descriptor, depth: int = 0) -> bool:
        """Return whether a blob is in the archive, and enough of its closure.

        A manifest needs all its blobs except foreign layers. An index needs one of its children.
        """
        if depth > NESTING_LIMIT:
            raise InvalidArchive(f"the archive has indexes that are nested more than {NESTING_LIMIT} deep")
        key = blob.digest, blob.role
        if key not in self._present:
            self._present[key] = self._has(blob) and self._has_children(blob, depth)
        return self._present[key]

    def _has_children(self, blob: Descriptor, depth: int) -> bool:
        if not blob.is_document:
            return True
        children = self._read(blob).children
        present = [self.is_present(child, depth + 1) or child.is_foreign for child in children]
        return all(present) if blob.role == "manifest" else any(present) or not children

    def _has(self, blob: Descriptor) -> bool:
        is_found = blob.digest in self._embedded or self._find(blob) is not None
        if not is_found and not self._has_end:
            raise InvalidArchive(f"{_describe(blob)} is not in the archive, which is cut short: {SAVE_AGAIN}")
        return is_found

    def _find_missing(self, blob: Descriptor) -> Descriptor:
        """Return the first missing blob in an incomplete closure."""
        while document := self._documents.get(blob.digest):
            blob = next(child for child in document.children if not (self.is_present(child) or child.is_foreign))
        return blob

    def _find_present(self, blob: Descriptor) -> list[Descriptor]:
        return [child for child in self._read(blob).children if self.is_present(child)]

    def _choose(self, blob: Descriptor) -> list[Descriptor]:
        """Return the children to import; none if an index has none for the wanted platform."""
        present = self._find_present(blob)
        if self._platform is None or blob.role != "index":
            return present
        found = oci.choose(present, self._platform, self._find_present)
        if not found:
            reached = self._expand(blob, self._find_present).values()
            self.other_platforms.update(child.platform for listed in reached for child in listed if child.platform)
        return found

    def read_platform(self, root: Descriptor) -> str | None:
        """Return the platform of a manifest, which its descriptor or its config states; None if neither does."""
        if root.platform:
            return root.platform
        config = self._read(root).children[0]
        if config.media_type not in oci.CONFIG_TYPES:
            return None
        return oci.platform_label(load_json(self._read_verified(config), _describe(config)))

    def read_subject(self, root: Descriptor) -> Digest | None:
        """Return the subject of a manifest or index (manifest.md, "subject"); None if it has none."""
        return self._read(root).subject if self._has(root) else None

    def has_manifest(self, digest: Digest) -> bool:
        """Return whether the manifest or index with this digest is in the archive."""
        return self._find(oci.root_descriptor(digest, 0, oci.OCI_MANIFEST)) is not None

    def read_children(self, root: Descriptor) -> list[Descriptor]:
        """Return the descriptors in a manifest or index."""
        return self._read(root).children

    def find_blob(self, blob: Descriptor) -> ArchivedBlob:
        """Return a blob that is present."""
        section = self._find(blob) or self._decoded.get(blob.digest)
        if section is None:
            data = _decode(self._embedded[blob.digest], blob)
            section = self._decoded[blob.digest] = Section(data, 0, len(data))
        return ArchivedBlob(section, _describe(blob), blob.size, blob.digest, blob.media_type, blob.role)

    def add_embedded(self, value: object) -> None:
        """Note the content that a JSON descriptor embeds (descriptor.md, "Embedded Content")."""
        if isinstance(value, dict) and isinstance(value.get("data"), str) and isinstance(value.get("digest"), str):
            self._embedded_length += len(value["data"])
            self._embedded.setdefault(Digest(value["digest"]), value["data"])
            if self._embedded_length > _EMBEDDED_LIMIT:
                raise InvalidArchive(f"the manifests in the archive embed more than {_EMBEDDED_LIMIT} bytes of data")

    def _read(self, root: Descriptor) -> _Document:
        """Return a manifest or index that is in the archive."""
        if root.digest in self._documents:
            return self._documents[root.digest]
        data = self._read_verified(root)
        document = load_json(data, "the manifest")
        read_media_type(document, root.media_type)
        children = read_descriptors(document, root.media_type, f"manifest {root.digest}")
        self._descriptor_count += len(children)
        check_blob_count(self._descriptor_count)
        for value in _list_descriptors(document):
            self.add_embedded(value)
        self._documents[root.digest] = _Document(children, read_subject(document))
        return self._documents[root.digest]

    def _read_verified(self, blob: Descriptor) -> bytes:
        """Return the bytes of a manifest or config that is in the archive."""
        found = self.find_blob(blob)
        data = read_small(found.section, found.what, InvalidManifest)
        if len(data) != blob.size:
            raise DigestMismatch(f"{found.what} should have {blob.size} bytes, and has {len(data)}: {SAVE_AGAIN}")
        if digest_of(data, blob.digest) != blob.digest:
            raise DigestMismatch(f"{found.what} in the archive does not match its digest: {SAVE_AGAIN}")
        return data


def _describe(blob: Descriptor) -> str:
    return f"{blob.role} {blob.digest}"


def _decode(text: str, blob: Descriptor) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise InvalidManifest(f"the data embedded in the descriptor of {_describe(blob)} is not base64") from None


def _list_descriptors(document: dict[str, Any]) -> list[object]:
    """Return the descriptors in a manifest or index that may embed content, as JSON."""
    lists = [document.get(key) for key in ("manifests", "layers")]
    return [document.get("config"), *(value for found in lists if isinstance(found, list) for value in found)]
