"""Map SQLAlchemy classes to the tables of images, blobs, and the association between them.

The classes are for programs that query the index with SQLAlchemy's ORM. cachedb itself uses the tables, because they
import faster.

    with Session(create_engine("sqlite:///index.db")) as session:
        for image in session.scalars(select(Image)):
            print(image.repository, [association.blob.digest for association in image.associations])
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy.orm import DeclarativeBase, Mapped, relationship

from cachedb.index.tables import BLOBS, HOLDS, IMAGE_BLOBS, IMAGE_LABELS, IMAGES, LEASES, METADATA

__all__ = ["Base", "Blob", "Hold", "Image", "ImageBlob", "ImageLabel", "Lease"]


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


class Image(Base):
    """A name and the manifest or index it points to."""

    __table__ = IMAGES

    if TYPE_CHECKING:
        id: Mapped[int]
        repository: Mapped[str]
        reference: Mapped[str]
        manifest_id: Mapped[int]
        media_type: Mapped[str]
        created_at: Mapped[datetime]
        last_used_at: Mapped[datetime]
        some_platforms: Mapped[int | None]
        architecture: Mapped[str | None]
        os: Mapped[str | None]
        variant: Mapped[str | None]
        created: Mapped[datetime | None]
        author: Mapped[str | None]

    manifest: Mapped[Blob] = relationship(viewonly=True)
    associations: Mapped[list[ImageBlob]] = relationship(
        back_populates="image", order_by="ImageBlob.position", viewonly=True
    )
    labels: Mapped[list[ImageLabel]] = relationship(order_by="ImageLabel.key", viewonly=True)


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


class ImageLabel(Base):
    """A label of an image's config; for several platforms, a label that all of them have."""

    __table__ = IMAGE_LABELS

    if TYPE_CHECKING:
        image_id: Mapped[int]
        key: Mapped[str]
        value: Mapped[str]


class Lease(Base):
    """A digest that is not collected while its session is alive or its hold lasts."""

    __table__ = LEASES

    if TYPE_CHECKING:
        digest: Mapped[str]
        session: Mapped[str]
        hold: Mapped[int]


class Hold(Base):
    """A hold that outlives its process, until it expires or is released."""

    __table__ = HOLDS

    if TYPE_CHECKING:
        id: Mapped[str]
        name: Mapped[str]
        created_at: Mapped[datetime]
        expires_at: Mapped[datetime | None]
