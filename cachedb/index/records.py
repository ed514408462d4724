"""Define the records that the index returns for images and their blobs."""

from __future__ import annotations

import warnings
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from cachedb.oci.digests import Digest
from cachedb.oci.names import Name
from cachedb.oci.platforms import join_platform

__all__ = [
    "BlobDetails",
    "BlobInfo",
    "BlobRow",
    "BlobUse",
    "ImageDetails",
    "ImageInfo",
    "ImageRow",
    "ImportedImage",
    "PlatformInfo",
]


class ImageInfo(NamedTuple):
    """An image in the cache."""

    repository: str
    reference: str  # a tag or a digest
    digest: Digest  # of the manifest or index
    media_type: str  # of the manifest or index
    size: int  # bytes of all its blobs, each counted once
    complete: bool  # whether all its blobs are stored
    added_at: datetime  # UTC; when the name began to point to this manifest
    last_used_at: datetime  # UTC
    # From the config; for several platforms, the values on which all of them agree.
    architecture: str | None
    os: str | None
    variant: str | None
    created: datetime | None  # UTC; when it was built
    author: str | None
    pinned: bool  # whether a pin of its name keeps it from a prune
    expires_at: datetime | None  # UTC; when a prune may remove it; None for never

    @property
    def name(self) -> Name:
        """The image's name."""
        return Name(self.repository, self.reference)

    @property
    def created_at(self) -> datetime:
        """The old name of `added_at`."""
        warnings.warn("ImageInfo.created_at is now ImageInfo.added_at", DeprecationWarning, stacklevel=2)
        return self.added_at

    @property
    def platform(self) -> str:
        """``os/architecture[/variant]``, without unknown parts."""
        return join_platform(self.os, self.architecture, self.variant)


class ImportedImage(ImageInfo):
    """An image that an import saved."""

    replaced: Digest | None
    """The digest that its name pointed to before, if the import has replaced another image."""

    def __new__(cls, info: ImageInfo, replaced: Digest | None) -> ImportedImage:  # noqa: D102
        image = super().__new__(cls, *info)
        image.replaced = replaced
        return image


class BlobInfo(NamedTuple):
    """A blob of an image."""

    digest: Digest
    size: int  # bytes
    role: str  # manifest, index, config, layer or other
    media_type: str
    position: int  # in the image; the manifest or index is at 0
    stored: bool
    compressed: bool
    path: Path | None  # the file, if stored; hold the image to keep the path valid
    diff_id: Digest | None  # for a layer: the digest before compression, from the config
    created_by: str | None  # for a layer: the command that created it, from the config

    @property
    def is_config(self) -> bool:
        """Whether the blob is an image's config."""
        return self.role == "config"


class BlobUse(NamedTuple):
    """The use of a blob by an image."""

    name: Name
    role: str  # manifest, index, config, layer or other
    media_type: str
    position: int  # in the image; the manifest or index is at 0


class BlobDetails(NamedTuple):
    """A blob that is stored, or that an image lacks, with the images that have it."""

    digest: Digest
    size: int  # bytes
    stored_at: datetime | None  # UTC; None if it is not stored
    path: Path | None  # the file, if stored; hold the blob to keep the path valid
    held: bool  # whether a hold or a process keeps it
    uses: list[BlobUse]  # by name and position


class PlatformInfo(NamedTuple):
    """A child of an image's index."""

    platform: str | None  # os/architecture[/variant], if the index states it
    digest: Digest  # of the manifest, or of a nested index
    complete: bool  # whether the child and all its blobs are stored


class BlobRow(NamedTuple):
    """A blob's row."""

    id: int
    size: int  # bytes
    stored: bool


class ImageDetails(NamedTuple):
    """An image with its blobs, labels and platforms, read at one moment."""

    image: ImageInfo
    blobs: list[BlobInfo]  # in the order of their positions
    labels: dict[str, str]
    platforms: list[PlatformInfo]  # the children of its index; empty without an index


class ImageRow(NamedTuple):
    """An image's row."""

    id: int
    manifest_id: int
    digest: Digest
    media_type: str
    some_platforms: int | None  # 1 if its closure lacks platforms of its index, or foreign layers
