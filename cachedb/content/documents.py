"""Read the manifests and configs of a held image, and verify them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from cachedb import oci
from cachedb.disk.reader import missing_file_error, read_verified
from cachedb.errors import NotInCache
from cachedb.index import images
from cachedb.index.records import BlobInfo, ImageInfo
from cachedb.oci import Closure
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import Descriptor
from cachedb.oci.names import Name

__all__ = ["read_attached", "read_closure", "read_document"]


def read_closure(directory: Path, name: Name, info: ImageInfo, blobs: list[BlobInfo]) -> Closure:
    """Read the manifests of a held image and return its closure.

    Args:
        directory: of the cache.
        name: of the image.
        info: the image, which is held.
        blobs: of the image, by position.

    Raises:
        IncompleteImage: if a blob of the image is not stored.
        DigestMismatch: if the file of a manifest is damaged.
    """
    if not info.complete:
        raise images.incomplete_error(name, blobs)
    root = oci.root_descriptor(info.digest, blobs[0].size, info.media_type)
    choose = oci.choose_among({blob.digest for blob in blobs})
    return oci.read_closure(root, lambda blob: read_document(directory, blob.digest), choose)


def read_attached(
    closure: Closure, blobs: Iterable[BlobInfo], read: Callable[[Digest], bytes]
) -> dict[Descriptor, bytes]:
    """Return the manifests and indexes attached to a held image, such as referrers, with their bytes.

    Args:
        closure: of the image.
        blobs: of the image; those outside the closure are attached.
        read: returns the bytes of a manifest.
    """
    return {
        Descriptor(blob.digest, blob.size, blob.media_type, blob.role): read(blob.digest)
        for blob in blobs
        if blob.role in ("manifest", "index")
        and blob.digest not in closure.documents
        and blob.size <= oci.DOCUMENT_LIMIT
    }


def read_document(directory: Path, digest: Digest) -> bytes:
    """Return the verified bytes of a manifest or config of a held image.

    Raises:
        DigestMismatch: if its file is damaged.
        StorageError: if its file is gone.
    """
    try:
        return read_verified(directory, digest)
    except NotInCache:
        raise missing_file_error(digest) from None
