"""The manifests and configs of a held image, verified."""

from __future__ import annotations

from pathlib import Path

from cachedb import oci
from cachedb.disk.reader import open_blob
from cachedb.errors import DigestMismatch, NotInCache, StorageError, os_errors
from cachedb.index import images
from cachedb.index.images import BlobInfo, ImageInfo
from cachedb.oci.digests import Digest, digest_of
from cachedb.oci.manifests import Descriptor
from cachedb.oci.names import Name

__all__ = ["read_document", "read_manifests"]


def read_manifests(
    directory: Path, name: Name, info: ImageInfo, held: list[BlobInfo]
) -> tuple[Descriptor, dict[Digest, bytes]]:
    """Return what an image points to, and the manifests that it reaches and has here.

    Raises:
        IncompleteImage: if a blob of it is not stored.
    """
    if not info.complete:
        raise images.incomplete(name, held)
    manifests: dict[Digest, bytes] = {}

    def read(blob: Descriptor) -> bytes:
        manifests[blob.digest] = read_document(directory, blob.digest)
        return manifests[blob.digest]

    root = oci.root(info.digest, held[0].size, info.media_type)
    here = {blob.digest for blob in held}
    for _ in oci.walk(root, read, oci.among(here)):
        pass
    return root, manifests


def read_document(directory: Path, digest: Digest) -> bytes:
    """Return a manifest or config of an image that is held.

    Raises:
        DigestMismatch: if its file is damaged.
        StorageError: if its file is gone.
    """
    try:
        with open_blob(directory, digest) as file, os_errors("read a blob"):
            data = file.read()
    except NotInCache:
        raise StorageError(f"the file of {digest} is gone: run `cachedb verify`") from None
    if digest_of(data, digest) != digest:
        raise DigestMismatch(f"the file of {digest} has another content: run `cachedb verify`")
    return data
