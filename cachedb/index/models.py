"""Map SQLAlchemy classes to the tables of images, blobs, and the association between them.

The classes are for programs that query the index with SQLAlchemy's ORM. cachedb itself uses the tables, because they
import faster.

    with Session(create_engine("sqlite:///file:index.db?mode=ro&uri=true")) as session:
        for image in session.scalars(select(Image).where(Image.name.like("team/%"))):
            print(image.name, [association.blob.digest for association in image.associations])

The URL opens the index read-only, because a write without cachedb's lock is not safe. `views` has classes for the
views.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy import ColumnElement, case, func
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import DeclarativeBase, Mapped, relationship, synonym

from cachedb.index.tables import BLOBS, HOLDS, IMAGE_BLOBS, IMAGE_LABELS, IMAGE_PLATFORMS, IMAGES, LEASES, METADATA
from cachedb.oci.names import Name

__all__ = ["Base", "Blob", "Image", "ImageBlob", "ImageLabel", "ImagePlatform", "LastingHold", "Lease"]


class Base(DeclarativeBase):
    """The declarative base of the index."""

    metadata = METADATA


class Blob(Base):
    """Content identified by its digest; its file is stored once ``stored_at`` is set."""

    __table__ = BLOBS

    if TYPE_CHECKING:
        id: Mapped[int]
        digest: Mapped[str]
        size: Mapped[int]
        stored_at: Mapped[datetime | None]

    associations: Mapped[list[ImageBlob]] = relationship(back_populates="blob", viewonly=True)

    def __repr__(self) -> str:
        return f"Blob({self.digest!r})"


class Image(Base):
    """A name and the manifest or index it points to."""

    __table__ = IMAGES

    if TYPE_CHECKING:
        id: Mapped[int]
        repository: Mapped[str]
        reference: Mapped[str]
        manifest_id: Mapped[int]
        media_type: Mapped[str]
        added_at: Mapped[datetime]
        last_used_at: Mapped[datetime]
        some_platforms: Mapped[int | None]
        architecture: Mapped[str | None]
        os: Mapped[str | None]
        variant: Mapped[str | None]
        created: Mapped[datetime | None]
        author: Mapped[str | None]
        pinned_at: Mapped[datetime | None]
        expires_at: Mapped[datetime | None]

    manifest: Mapped[Blob] = relationship(viewonly=True)
    associations: Mapped[list[ImageBlob]] = relationship(
        back_populates="image", order_by="ImageBlob.position", viewonly=True
    )
    labels: Mapped[list[ImageLabel]] = relationship(order_by="ImageLabel.key", viewonly=True)
    platforms: Mapped[list[ImagePlatform]] = relationship(order_by="ImagePlatform.position", viewonly=True)
    created_at: Mapped[datetime] = synonym("added_at")
    """The old name of ``added_at``."""

    @hybrid_property
    def name(self) -> str:
        """``repository:tag`` or ``repository@digest``."""
        return str(Name(self.repository, self.reference))

    @name.inplace.expression
    @classmethod
    def _name_expression(cls) -> ColumnElement[str]:
        separator = case((func.instr(cls.reference, ":") > 0, "@"), else_=":")
        return cls.repository.concat(separator).concat(cls.reference)

    def __repr__(self) -> str:
        return f"Image({self.name!r})"


class ImageBlob(Base):
    """The association of an image with a blob that it references or that is attached to it."""

    __table__ = IMAGE_BLOBS

    if TYPE_CHECKING:
        image_id: Mapped[int]
        position: Mapped[int]
        blob_id: Mapped[int]
        role: Mapped[str]
        media_type: Mapped[str]
        diff_id: Mapped[str | None]
        created_by: Mapped[str | None]

    image: Mapped[Image] = relationship(back_populates="associations", viewonly=True)
    blob: Mapped[Blob] = relationship(back_populates="associations", viewonly=True)

    def __repr__(self) -> str:
        return f"ImageBlob({self.role!r}, {self.media_type!r})"


class ImageLabel(Base):
    """A label of an image's config; for several platforms, a label that all of them have."""

    __table__ = IMAGE_LABELS

    if TYPE_CHECKING:
        image_id: Mapped[int]
        key: Mapped[str]
        value: Mapped[str]

    def __repr__(self) -> str:
        return f"ImageLabel({self.key!r}, {self.value!r})"


class ImagePlatform(Base):
    """A platform of an image: its manifest, its config and its layers are at consecutive positions."""

    __table__ = IMAGE_PLATFORMS

    if TYPE_CHECKING:
        image_id: Mapped[int]
        position: Mapped[int]
        last_position: Mapped[int]
        os: Mapped[str | None]
        architecture: Mapped[str | None]
        variant: Mapped[str | None]

    def __repr__(self) -> str:
        return f"ImagePlatform({'/'.join(filter(None, (self.os, self.architecture, self.variant)))!r})"


class Lease(Base):
    """A digest that is not collected while its session is alive or its hold lasts."""

    __table__ = LEASES

    if TYPE_CHECKING:
        digest: Mapped[str]
        session: Mapped[str]
        hold: Mapped[int]


class LastingHold(Base):
    """A hold that outlives its process, until it expires or is released."""

    __table__ = HOLDS

    if TYPE_CHECKING:
        id: Mapped[str]
        name: Mapped[str]
        created_at: Mapped[datetime]
        expires_at: Mapped[datetime | None]
