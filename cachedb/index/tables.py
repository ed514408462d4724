"""Define the tables of the index: images, blobs, and the association between them.

The migrations create the tables, never `create_all`. `alembic check` compares the migrations with this module. All SQL
is portable. SQLite's STRICT tables refuse values of a wrong type, and CHECK constraints refuse invalid values from any
program.

These are Core tables, so that a command does not import SQLAlchemy's ORM; `models` maps classes to them.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    TypedColumns,
    TypeDecorator,
    UniqueConstraint,
)

from cachedb.disk.layout import REVISION
from cachedb.errors import DamagedIndex
from cachedb.oci.digests import HEX_LENGTH
from cachedb.oci.manifests import ROLES

__all__ = [
    "BACKFILLS",
    "BLOBS",
    "HOLDS",
    "IMAGES",
    "IMAGE_BLOBS",
    "IMAGE_LABELS",
    "IMAGE_PLATFORMS",
    "LEASES",
    "METADATA",
    "OLD_NAMES",
    "REVISION",
    "TEXT_LIMIT",
    "TRASH",
    "VIEWS",
    "UtcTime",
    "format_time",
]


OLD_NAMES = {"lasting_holds": "holds", "added_at": "created_at"}
"""The names that tables and columns had before revision 0006, for readers of an older index."""
VIEWS = (
    "blob_usage",
    "common_layers",
    "garbage",
    "growth",
    "holds",
    "image_ages",
    "image_bases",
    "image_contents",
    "image_usage",
    "labels",
    "layers",
    "missing_blobs",
    "platforms",
    "repository_usage",
    "shared_layers",
)
"""The names of the views that the migrations create."""
TEXT_LIMIT = 65536
"""The most characters of a text from an image's config; a longer text is not copied into the index."""

# SQLite's STRICT tables have INTEGER (64 bits), but no BIGINT.
_INTEGER = BigInteger().with_variant(Integer(), "sqlite")


def format_time(time: datetime) -> str:
    """Return an aware time as the index has it: in UTC, as text of fixed width."""
    return f"{time.astimezone(UTC).replace(tzinfo=None).isoformat(timespec='microseconds')}Z"


class UtcTime(TypeDecorator[datetime]):
    """A UTC time stored as text of fixed width that sorts by time: ``2026-01-31T23:59:59.123456Z``."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> str | None:
        """Convert an aware time to text."""
        return None if value is None else format_time(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> datetime | None:
        """Convert text to an aware time."""
        try:
            return None if value is None else datetime.fromisoformat(value)
        except ValueError as error:
            raise DamagedIndex(
                f"the index has the invalid time {value!r}: rebuild it with `cachedb verify --repair`"
            ) from error


def _is_digest(column: str) -> str:
    """Return SQL that is true for ``algorithm:hex`` of the right length, in lower case."""
    forms = (
        f"(substr({column}, 1, 7) = '{algorithm}:' AND length({column}) = {7 + length} "
        f"AND ltrim(substr({column}, 8), '0123456789abcdef') = '')"
        for algorithm, length in HEX_LENGTH.items()
    )
    return " OR ".join(forms)


def _is_time(column: str) -> str:
    return f"{column} LIKE '____-__-__T__:__:__.______Z' AND ltrim({column}, '0123456789-T:.Z') = ''"


METADATA = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class _Blobs(TypedColumns):
    id = Column(_INTEGER, primary_key=True)
    digest = Column(Text, nullable=False)
    size = Column(_INTEGER, nullable=False)  # bytes; the declared size until the blob is stored, then the real one
    stored_at = Column(UtcTime)


BLOBS = Table(
    "blobs",
    METADATA,
    _Blobs,
    UniqueConstraint("digest"),
    CheckConstraint(_is_digest("digest"), "digest"),
    CheckConstraint("size >= 0", "size"),
    CheckConstraint(f"stored_at IS NULL OR ({_is_time('stored_at')})", "stored_at"),
    sqlite_strict=True,
)
"""Content identified by its digest; its file is stored once ``stored_at`` is set."""


class _Images(TypedColumns):
    id = Column(_INTEGER, primary_key=True)
    repository = Column(Text, nullable=False)
    reference = Column(Text, nullable=False)  # a tag or a digest
    manifest_id = Column(_INTEGER, ForeignKey("blobs.id", ondelete="RESTRICT"), nullable=False)
    media_type = Column(Text, nullable=False)
    added_at = Column(UtcTime, nullable=False)  # when the name began to point to this manifest
    last_used_at = Column(UtcTime, nullable=False)
    some_platforms = Column(
        _INTEGER, CheckConstraint("some_platforms = 1", "some_platforms")
    )  # NULL: all platforms of the index
    # The values on which the configs of all platforms agree; NULL if they differ or are not stored.
    architecture = Column(Text, CheckConstraint("length(architecture) BETWEEN 1 AND 64", "architecture"))
    os = Column(Text, CheckConstraint("length(os) BETWEEN 1 AND 64", "os"))
    variant = Column(Text, CheckConstraint("length(variant) BETWEEN 1 AND 64", "variant"))
    created = Column(
        UtcTime, CheckConstraint(_is_time("created"), "created")
    )  # when it was built, according to the config
    author = Column(Text, CheckConstraint(f"length(author) BETWEEN 1 AND {TEXT_LIMIT}", "author"))
    pinned_at = Column(UtcTime, CheckConstraint(_is_time("pinned_at"), "pinned_at"))  # NULL: not pinned
    expires_at = Column(UtcTime, CheckConstraint(_is_time("expires_at"), "expires_at"))  # NULL: never


IMAGES = Table(
    "images",
    METADATA,
    _Images,
    UniqueConstraint("repository", "reference"),
    Index(None, "manifest_id"),
    CheckConstraint("length(repository) BETWEEN 1 AND 255", "repository"),
    CheckConstraint("length(reference) BETWEEN 1 AND 135", "reference"),
    CheckConstraint("media_type LIKE '_%/_%'", "media_type"),
    CheckConstraint(_is_time("added_at"), "created_at"),  # a renamed column keeps the name of its constraint
    CheckConstraint(_is_time("last_used_at"), "last_used_at"),
    sqlite_strict=True,
)
"""A name and the manifest or index it points to."""


class _ImageBlobs(TypedColumns):
    image_id = Column(_INTEGER, ForeignKey("images.id", ondelete="CASCADE"), primary_key=True)
    position = Column(_INTEGER, primary_key=True)
    blob_id = Column(_INTEGER, ForeignKey("blobs.id", ondelete="RESTRICT"), nullable=False)
    role = Column(Text, nullable=False)
    media_type = Column(Text, nullable=False)
    # For a layer, from the config: its digest before compression, and the command that created it.
    diff_id = Column(Text, CheckConstraint(_is_digest("diff_id"), "diff_id"))
    created_by = Column(Text, CheckConstraint(f"length(created_by) BETWEEN 1 AND {TEXT_LIMIT}", "created_by"))


IMAGE_BLOBS = Table(
    "image_blobs",
    METADATA,
    _ImageBlobs,
    Index(None, "blob_id"),
    CheckConstraint("position >= 0", "position"),
    CheckConstraint(f"role IN {ROLES}", "role"),
    CheckConstraint("media_type LIKE '_%/_%'", "media_type"),
    sqlite_strict=True,
    sqlite_with_rowid=False,
)
"""The association of an image with a blob that it references or that is attached to it."""


class _ImageLabels(TypedColumns):
    image_id = Column(_INTEGER, ForeignKey("images.id", ondelete="CASCADE"), primary_key=True)
    key = Column(Text, primary_key=True)
    value = Column(Text, nullable=False)


IMAGE_LABELS = Table(
    "image_labels",
    METADATA,
    _ImageLabels,
    Index(None, "key"),
    CheckConstraint(f"length(key) <= {TEXT_LIMIT}", "key"),
    CheckConstraint(f"length(value) <= {TEXT_LIMIT}", "value"),
    sqlite_strict=True,
    sqlite_with_rowid=False,
)
"""A label of an image's config; for several platforms, a label that all of them have."""


class _ImagePlatforms(TypedColumns):
    image_id = Column(_INTEGER, ForeignKey("images.id", ondelete="CASCADE"), primary_key=True)
    position = Column(_INTEGER, primary_key=True)  # of the platform's manifest, in image_blobs
    last_position = Column(_INTEGER, nullable=False)  # of its last layer
    os = Column(Text)
    architecture = Column(Text)
    variant = Column(Text)


IMAGE_PLATFORMS = Table(
    "image_platforms",
    METADATA,
    _ImagePlatforms,
    CheckConstraint("last_position > position", "last_position"),
    CheckConstraint("length(os) BETWEEN 1 AND 64", "os"),
    CheckConstraint("length(architecture) BETWEEN 1 AND 64", "architecture"),
    CheckConstraint("length(variant) BETWEEN 1 AND 64", "variant"),
    CheckConstraint("os IS NOT NULL OR architecture IS NOT NULL", "known"),
    sqlite_strict=True,
    sqlite_with_rowid=False,
)
"""A platform of an image: its manifest, its config and its layers are at consecutive positions."""


class _Leases(TypedColumns):
    digest = Column(Text, primary_key=True)
    session = Column(Text, primary_key=True)  # or the id of a row in lasting_holds
    hold = Column(_INTEGER, primary_key=True)  # distinguishes the holds of a session


LEASES = Table(
    "leases",
    METADATA,
    _Leases,
    Index(None, "session", "hold"),
    CheckConstraint(_is_digest("digest"), "digest"),
    sqlite_strict=True,
    sqlite_with_rowid=False,
)
"""A digest that is not collected while its session is alive or its hold lasts."""


class _Holds(TypedColumns):
    id = Column(Text, primary_key=True)  # the value of `session` in its leases
    name = Column(Text, nullable=False)  # the held image or digest
    created_at = Column(UtcTime, nullable=False)
    expires_at = Column(UtcTime)


HOLDS = Table(
    "lasting_holds",
    METADATA,
    _Holds,
    CheckConstraint("id LIKE 'hold-____________'", "id"),
    CheckConstraint("length(name) BETWEEN 1 AND 400", "name"),
    CheckConstraint(_is_time("created_at"), "created_at"),
    CheckConstraint(f"expires_at IS NULL OR ({_is_time('expires_at')})", "expires_at"),
    sqlite_strict=True,
    sqlite_with_rowid=False,
)
"""A hold that outlives its process, until it expires or is released."""


class _Trash(TypedColumns):
    digest = Column(Text, primary_key=True)
    size = Column(_INTEGER, nullable=False)


TRASH = Table(
    "trash",
    METADATA,
    _Trash,
    CheckConstraint(_is_digest("digest"), "digest"),
    CheckConstraint("size >= 0", "size"),
    sqlite_strict=True,
    sqlite_with_rowid=False,
)
"""A collected blob whose file still has to be removed from ``blobs/``."""


class _Backfills(TypedColumns):
    revision = Column(Text, primary_key=True)
    image_id = Column(_INTEGER, nullable=False)


BACKFILLS = Table("backfills", METADATA, _Backfills, sqlite_strict=True, sqlite_with_rowid=False)
"""A backfill that a migration left to be done in batches; images up to ``image_id`` are done."""
