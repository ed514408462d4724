"""The index: SQLAlchemy models of images, blobs, and the association between them.

The tables are made by the migrations, never by `create_all`; `alembic check` holds the two together.
All of it is portable SQL. SQLite's STRICT tables refuse a value of the wrong type, and the CHECK
constraints a wrong value, whoever writes it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from cachedb.errors import DamagedIndex
from cachedb.oci import ROLES
from cachedb.reference import HEX_LENGTH

__all__ = [
    "REVISION",
    "TEXT_LIMIT",
    "Backfill",
    "Base",
    "Blob",
    "Hold",
    "Image",
    "ImageBlob",
    "ImageLabel",
    "Lease",
    "Trash",
    "UtcTime",
]

REVISION = "0005"
"""The newest migration: the schema that these models describe."""

TEXT_LIMIT = 65536
"""Characters of a text that an image's config brings; a longer one is in the config alone."""

# SQLite's STRICT tables know INTEGER (of 64 bits), and no BIGINT.
_Integer = BigInteger().with_variant(Integer(), "sqlite")


class UtcTime(TypeDecorator[datetime]):
    """A time in UTC, kept as text of one width that sorts by time: ``2026-01-31T23:59:59.123456Z``."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> str | None:
        """Write an aware time as text."""
        if value is None:
            return None
        return f"{value.astimezone(UTC).replace(tzinfo=None).isoformat(timespec='microseconds')}Z"

    def process_result_value(self, value: str | None, dialect: Dialect) -> datetime | None:
        """Read the text back as an aware time."""
        try:
            return None if value is None else datetime.fromisoformat(value)
        except ValueError as error:
            raise DamagedIndex(f"the index has {value!r} for a time; `cachedb verify --repair` rebuilds it") from error


def _is_digest(column: str) -> str:
    """SQL that holds for ``algorithm:hex`` of the right length, in lower case."""
    forms = (
        f"(substr({column}, 1, 7) = '{algorithm}:' AND length({column}) = {7 + length} "
        f"AND ltrim(substr({column}, 8), '0123456789abcdef') = '')"
        for algorithm, length in HEX_LENGTH.items()
    )
    return " OR ".join(forms)


def _is_time(column: str) -> str:
    return f"{column} LIKE '____-__-__T__:__:__.______Z' AND ltrim({column}, '0123456789-T:.Z') = ''"


def _checked(column: str, condition: str) -> Mapped[Any]:
    """A column with its constraint beside it, as it is where it was added to a table."""
    return mapped_column(CheckConstraint(condition, name=column))


class Base(DeclarativeBase):
    """The declarative base of the index."""

    type_annotation_map: ClassVar = {str: Text(), int: _Integer, datetime: UtcTime()}
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Blob(Base):
    """Bytes, known by the digest of their content; on disk once ``stored_at`` is set."""

    __tablename__ = "blobs"

    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str]
    size: Mapped[int]  # bytes; what a manifest says until the blob is stored, its true size from then on
    stored_at: Mapped[datetime | None]

    associations: Mapped[list[ImageBlob]] = relationship(back_populates="blob", viewonly=True)

    __table_args__ = (
        UniqueConstraint("digest"),
        CheckConstraint(_is_digest("digest"), "digest"),
        CheckConstraint("size >= 0", "size"),
        CheckConstraint(f"stored_at IS NULL OR ({_is_time('stored_at')})", "stored_at"),
        {"sqlite_strict": True},
    )


class Image(Base):
    """A name, and the manifest or index it points to."""

    __tablename__ = "images"

    id: Mapped[int] = mapped_column(primary_key=True)
    repository: Mapped[str]
    reference: Mapped[str]  # a tag or a digest
    manifest_id: Mapped[int] = mapped_column(ForeignKey("blobs.id", ondelete="RESTRICT"))
    media_type: Mapped[str]
    created_at: Mapped[datetime]  # when the name came to point to this manifest
    last_used_at: Mapped[datetime]
    some_platforms: Mapped[int | None] = _checked("some_platforms", "some_platforms = 1")  # else all of its index
    # What the configs of all its platforms agree on; empty where they do not, or are not stored.
    architecture: Mapped[str | None] = _checked("architecture", "length(architecture) BETWEEN 1 AND 64")
    os: Mapped[str | None] = _checked("os", "length(os) BETWEEN 1 AND 64")
    variant: Mapped[str | None] = _checked("variant", "length(variant) BETWEEN 1 AND 64")
    created: Mapped[datetime | None] = _checked("created", _is_time("created"))  # when it was built, it says
    author: Mapped[str | None] = _checked("author", f"length(author) BETWEEN 1 AND {TEXT_LIMIT}")

    manifest: Mapped[Blob] = relationship(viewonly=True)
    associations: Mapped[list[ImageBlob]] = relationship(
        back_populates="image", order_by="ImageBlob.position", viewonly=True
    )

    __table_args__ = (
        UniqueConstraint("repository", "reference"),
        Index(None, "manifest_id"),
        CheckConstraint("length(repository) BETWEEN 1 AND 255", "repository"),
        CheckConstraint("length(reference) BETWEEN 1 AND 135", "reference"),
        CheckConstraint("media_type LIKE '_%/_%'", "media_type"),
        CheckConstraint(_is_time("created_at"), "created_at"),
        CheckConstraint(_is_time("last_used_at"), "last_used_at"),
        {"sqlite_strict": True},
    )


class ImageBlob(Base):
    """The association: a blob in an image's closure, or attached to it, with its role and position."""

    __tablename__ = "image_blobs"

    image_id: Mapped[int] = mapped_column(ForeignKey("images.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    blob_id: Mapped[int] = mapped_column(ForeignKey("blobs.id", ondelete="RESTRICT"))
    role: Mapped[str]
    media_type: Mapped[str]
    # Of a layer, as the config says: the digest before compression, and the command that made it.
    diff_id: Mapped[str | None] = _checked("diff_id", _is_digest("diff_id"))
    created_by: Mapped[str | None] = _checked("created_by", f"length(created_by) BETWEEN 1 AND {TEXT_LIMIT}")

    image: Mapped[Image] = relationship(back_populates="associations", viewonly=True)
    blob: Mapped[Blob] = relationship(back_populates="associations", viewonly=True)

    __table_args__ = (
        Index(None, "blob_id"),
        CheckConstraint("position >= 0", "position"),
        CheckConstraint(f"role IN {ROLES}", "role"),
        CheckConstraint("media_type LIKE '_%/_%'", "media_type"),
        {"sqlite_strict": True, "sqlite_with_rowid": False},
    )


class ImageLabel(Base):
    """A label that an image's config has; of several platforms, one that all of them have."""

    __tablename__ = "image_labels"

    image_id: Mapped[int] = mapped_column(ForeignKey("images.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]

    __table_args__ = (
        Index(None, "key"),
        CheckConstraint(f"length(key) <= {TEXT_LIMIT}", "key"),
        CheckConstraint(f"length(value) <= {TEXT_LIMIT}", "value"),
        {"sqlite_strict": True, "sqlite_with_rowid": False},
    )


class Lease(Base):
    """A digest that is not collected while the session that works with it lives, or the hold it belongs to lasts."""

    __tablename__ = "leases"

    digest: Mapped[str] = mapped_column(primary_key=True)
    session: Mapped[str] = mapped_column(primary_key=True)  # or the id of a row in holds
    hold: Mapped[int] = mapped_column(primary_key=True)  # tells apart the holds of one session

    __table_args__ = (
        Index(None, "session", "hold"),
        CheckConstraint(_is_digest("digest"), "digest"),
        {"sqlite_strict": True, "sqlite_with_rowid": False},
    )


class Hold(Base):
    """A hold that outlives the process that took it: until its time, or until it is released."""

    __tablename__ = "holds"

    id: Mapped[str] = mapped_column(primary_key=True)  # what its leases have for a session
    name: Mapped[str]  # the image or digest that was named
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint("id LIKE 'hold-____________'", "id"),
        CheckConstraint("length(name) BETWEEN 1 AND 400", "name"),
        CheckConstraint(_is_time("created_at"), "created_at"),
        CheckConstraint(f"expires_at IS NULL OR ({_is_time('expires_at')})", "expires_at"),
        {"sqlite_strict": True, "sqlite_with_rowid": False},
    )


class Trash(Base):
    """A blob that the index has forgotten, and whose file is still to be taken out of ``blobs/``."""

    __tablename__ = "trash"

    digest: Mapped[str] = mapped_column(primary_key=True)
    size: Mapped[int]

    __table_args__ = (
        CheckConstraint(_is_digest("digest"), "digest"),
        CheckConstraint("size >= 0", "size"),
        {"sqlite_strict": True, "sqlite_with_rowid": False},
    )


class Backfill(Base):
    """Work that a migration has left to be done in batches: its images up to this one are done."""

    __tablename__ = "backfills"

    revision: Mapped[str] = mapped_column(primary_key=True)
    image_id: Mapped[int]

    __table_args__ = ({"sqlite_strict": True, "sqlite_with_rowid": False},)
