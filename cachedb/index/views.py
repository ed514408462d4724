"""Map SQLAlchemy classes to the views of the index, which docs/reference/sql.md describes.

    with Session(create_engine("sqlite:///file:index.db?mode=ro&uri=true")) as session:
        for image in session.scalars(select(ImageUsage).where(ImageUsage.unused_days > 30)):
            print(image.name, image.freed_size)

The types of the columns do not depend on the version of SQLite. Those of a reflected view do: before version 3.41,
SQLite reports no type for a computed column.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import MetaData
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from cachedb.index.tables import UtcTime

__all__ = [
    "BlobUsage",
    "CommonLayer",
    "Day",
    "Garbage",
    "Hold",
    "ImageBase",
    "ImageContent",
    "ImageUsage",
    "Label",
    "Layer",
    "MissingBlob",
    "Platform",
    "RepositoryUsage",
    "SharedLayer",
    "View",
]


class View(DeclarativeBase):
    """The declarative base of the views; `create_all` and Alembic do not see them."""

    metadata = MetaData()
    type_annotation_map: ClassVar[dict[Any, Any]] = {datetime: UtcTime}

    def __repr__(self) -> str:
        keys = self.__mapper__.primary_key
        return f"{type(self).__name__}({', '.join(repr(getattr(self, key.name)) for key in keys)})"


class ImageUsage(View):
    """What an image takes, shares and lacks, and what its removal frees."""

    __tablename__ = "image_usage"

    name: Mapped[str] = mapped_column(primary_key=True)
    repository: Mapped[str]
    reference: Mapped[str]
    digest: Mapped[str]
    media_type: Mapped[str]
    author: Mapped[str | None]
    created: Mapped[datetime | None]
    last_used_at: Mapped[datetime]
    complete: Mapped[bool]
    blobs: Mapped[int]
    size: Mapped[int]
    missing_size: Mapped[int]
    unique_size: Mapped[int]
    shared_size: Mapped[int]
    freed_size: Mapped[int]
    added_at: Mapped[datetime]
    built_days: Mapped[float | None]
    added_days: Mapped[float]
    unused_days: Mapped[float]
    pinned: Mapped[bool]
    expires_at: Mapped[datetime | None]


class Platform(View):
    """A platform of an image."""

    __tablename__ = "platforms"

    name: Mapped[str] = mapped_column(primary_key=True)
    os: Mapped[str | None]
    architecture: Mapped[str | None]
    variant: Mapped[str | None]
    digest: Mapped[str] = mapped_column(primary_key=True)
    size: Mapped[int]
    complete: Mapped[bool]


class ImageContent(View):
    """A position in an image, and the blob there."""

    __tablename__ = "image_contents"

    name: Mapped[str] = mapped_column(primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    role: Mapped[str]
    digest: Mapped[str]
    size: Mapped[int]
    stored: Mapped[bool]
    media_type: Mapped[str]
    diff_id: Mapped[str | None]
    created_by: Mapped[str | None]


class Label(View):
    """A label of an image."""

    __tablename__ = "labels"

    name: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class ImageBase(View):
    """An image that is built on another one."""

    __tablename__ = "image_bases"

    name: Mapped[str] = mapped_column(primary_key=True)
    layers: Mapped[int]
    base: Mapped[str]
    base_digest: Mapped[str]
    base_layers: Mapped[int]


class BlobUsage(View):
    """A blob, and how many images use it."""

    __tablename__ = "blob_usage"

    digest: Mapped[str] = mapped_column(primary_key=True)
    size: Mapped[int]
    stored: Mapped[bool]
    stored_at: Mapped[datetime | None]
    images: Mapped[int]
    held: Mapped[bool]


class Layer(View):
    """A layer, and the command that created it."""

    __tablename__ = "layers"

    digest: Mapped[str] = mapped_column(primary_key=True)
    size: Mapped[int]
    stored: Mapped[bool]
    images: Mapped[int]
    created_by: Mapped[str | None]


class SharedLayer(View):
    """A stored layer that several images have."""

    __tablename__ = "shared_layers"

    digest: Mapped[str] = mapped_column(primary_key=True)
    size: Mapped[int]
    images: Mapped[int]
    saved_size: Mapped[int]
    created_by: Mapped[str | None]


class CommonLayer(View):
    """A layer that two images have in common."""

    __tablename__ = "common_layers"

    name: Mapped[str] = mapped_column(primary_key=True)
    other: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(primary_key=True)
    size: Mapped[int]
    stored: Mapped[bool]


class RepositoryUsage(View):
    """What the images of a repository take together, and what their removal frees."""

    __tablename__ = "repository_usage"

    repository: Mapped[str] = mapped_column(primary_key=True)
    images: Mapped[int]
    blobs: Mapped[int]
    size: Mapped[int]
    missing_size: Mapped[int]
    unique_size: Mapped[int]
    shared_size: Mapped[int]
    freed_size: Mapped[int]


class MissingBlob(View):
    """A position in an incomplete image, and the missing blob there."""

    __tablename__ = "missing_blobs"

    name: Mapped[str] = mapped_column(primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    role: Mapped[str]
    digest: Mapped[str]
    size: Mapped[int]


class Garbage(View):
    """A blob that a collection frees."""

    __tablename__ = "garbage"

    digest: Mapped[str] = mapped_column(primary_key=True)
    size: Mapped[int]
    stored_at: Mapped[datetime]


class Hold(View):
    """A hold that has not expired."""

    __tablename__ = "holds"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    blobs: Mapped[int]
    size: Mapped[int]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]


class Day(View):
    """A day, and how many of the names and blobs that came on it are still in the cache."""

    __tablename__ = "growth"

    day: Mapped[str] = mapped_column(primary_key=True)
    images: Mapped[int]
    blobs: Mapped[int]
    size: Mapped[int]
