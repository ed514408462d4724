"""Represent the images in an archive of any format."""

from __future__ import annotations

import codecs
from typing import Any, NamedTuple

from cachedb import oci
from cachedb.disk.waiting import LOG
from cachedb.errors import CacheError, DigestMismatch, InvalidArchive, InvalidManifest
from cachedb.oci.digests import Digest, split_digest
from cachedb.oci.manifests import Descriptor, check_document_size, load_json
from cachedb.oci.names import Name
from cachedb.transports.archive.files import Section

__all__ = [
    "CONTAINERD_NAME",
    "DAMAGE_ERRORS",
    "REF_NAME",
    "ArchivedBlob",
    "ArchivedImage",
    "FoundImage",
    "NamedImage",
    "check_blob_count",
    "check_image_count",
    "list_digests",
    "path_in_layout",
    "read_document",
    "read_small",
]


REF_NAME = "org.opencontainers.image.ref.name"  # image specification, annotations.md
CONTAINERD_NAME = "io.containerd.image.name"  # the full name, written by containerd and Docker
DAMAGE_ERRORS = (InvalidArchive, InvalidManifest, DigestMismatch)
"""The errors of an image that is damaged or incomplete."""

_BLOBS_LIMIT = 100_000  # blobs in an archive's images, counted once for each name of an image
_IMAGES_LIMIT = 1000


class ArchivedBlob(NamedTuple):
    """A blob in an archive."""

    section: Section
    what: str  # its name in errors
    size: int  # the expected size in bytes
    digest: Digest | None  # the expected digest; None for a compressed layer of a docker-archive
    media_type: str
    role: str
    diff_id: tuple[str, Digest] | None = None  # for that layer: its compression and diff id

    @property
    def key(self) -> object:
        """The digest, or the place if it is unknown; the same key means the same content."""
        return self.digest or self.section.place


class ArchivedImage(NamedTuple):
    """An image in an archive."""

    root: Descriptor | None  # the manifest or index; None in a docker-archive
    blobs: list[ArchivedBlob]  # the closure; in a docker-archive the config, then the layers
    chosen: frozenset[Digest] | None = None  # the digests of `blobs` if these are only a part of the closure
    referrers: tuple[ArchivedBlob, ...] = ()  # the closures of the manifests that refer to the image

    @property
    def identity(self) -> object:
        """The digest of the root, or the keys of all blobs; the same identity means the same image."""
        return self.root.digest if self.root else tuple(blob.key for blob in self.blobs)

    def build_manifest(self, digests: list[Digest]) -> bytes:
        """Build the manifest that a docker-archive lacks, from the digests of the blobs."""
        config, *layers = (
            Descriptor(digest, blob.size, blob.media_type, "layer")
            for blob, digest in zip(self.blobs, digests, strict=True)
        )
        return oci.build_manifest(config, layers)


class FoundImage(NamedTuple):
    """An image in an archive, with its names as the archive spells them.

    An image with an error has no blobs.
    """

    image: ArchivedImage
    names: list[str]
    tags: list[str]  # without a repository
    error: CacheError | None = None  # why it cannot be imported


class NamedImage(NamedTuple):
    """An image in an archive, with the names to save it under."""

    image: ArchivedImage
    names: list[Name]
    repository: str | None = None  # for an image without a name: the repository in which its digest is its name
    bare: tuple[Name, ...] = ()  # those of its names that the archive gives as a tag without a repository


def list_digests(blobs: list[ArchivedBlob]) -> frozenset[Digest]:
    """Return the known digests of blobs."""
    return frozenset(blob.digest for blob in blobs if blob.digest)


def path_in_layout(digest: Digest) -> str:
    """Return the path of a blob in an image layout (image-layout.md, "Blobs")."""
    algorithm, encoded = split_digest(digest)
    return f"blobs/{algorithm}/{encoded}"


def check_blob_count(count: int) -> None:
    """Raise `InvalidArchive` if the images of an archive have too many blobs."""
    if count > _BLOBS_LIMIT:
        raise InvalidArchive(f"the images in the archive have more than {_BLOBS_LIMIT} blobs")


def check_image_count(images: list[Any]) -> None:
    """Raise `InvalidArchive` if an archive has too many images."""
    if len(images) > _IMAGES_LIMIT:
        raise InvalidArchive(f"the archive holds {len(images)} images: more than {_IMAGES_LIMIT} are refused")


def read_document(section: Section, what: str, error: type[CacheError] = InvalidArchive) -> Any:  # noqa: ANN401
    """Return a parsed JSON document of an archive; raise ``error`` if it is too large or invalid."""
    data = read_small(section, what, error)
    if data.startswith(codecs.BOM_UTF8):
        # A parser may ignore it (RFC 8259, section 8.1). Some editors and shells of Windows write it.
        LOG.warning("the byte order mark at the start of %s is ignored; other tools may refuse it", what)
        data = data.removeprefix(codecs.BOM_UTF8)
    return load_json(data, what, error)


def read_small(section: Section, what: str, error: type[CacheError]) -> bytes:
    """Return the content of a small file of an archive; raise ``error`` if it is too large."""
    check_document_size(section.size, what, error)
    return section.head(section.size)
