"""Read an image with its blobs, labels and platforms."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection

from cachedb.content.save import closure
from cachedb.disk import reader
from cachedb.index import descriptions
from cachedb.index.images import read_image, read_image_blobs, read_root
from cachedb.index.records import ImageDetails, PlatformInfo
from cachedb.oci.manifests import Descriptor, descriptors

__all__ = ["read_details", "read_platforms"]


def read_details(connection: Connection, directory: Path, image_id: int) -> ImageDetails:
    """Return an image with its blobs, labels and platforms.

    Args:
        connection: in a read transaction, so that all parts come from one snapshot.
        directory: of the cache.
        image_id: of the image.

    Raises:
        DamagedIndex: if the image has no blobs.
    """
    info, blobs = read_image(connection, directory, image_id)
    labels = descriptions.read_labels(connection, image_id)
    return ImageDetails(info, blobs, labels, read_platforms(connection, directory, image_id))


def read_platforms(connection: Connection, directory: Path, image_id: int) -> list[PlatformInfo]:
    """Return the children of an image's index, in order, and whether the closure of each is stored.

    The list is empty if the image has no index, or its index cannot be read.
    """
    root = read_root(connection, image_id)
    if root.role != "index":
        return []
    blobs = {blob.digest: blob.stored for blob in read_image_blobs(connection, directory, image_id)}

    def is_complete(child: Descriptor) -> bool:
        # The image may leave out foreign layers.
        needed = closure(connection, directory, child, strict=False)
        return all(blobs.get(blob.digest, blob.is_foreign) for blob in needed)

    data = reader.read_small_blob(directory, root.digest, root.size)
    children = [] if data is None else descriptors(data, root.media_type)
    return [PlatformInfo(child.platform, child.digest, is_complete(child)) for child in children]
