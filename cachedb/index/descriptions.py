"""Read and write what the index copies from configs: attributes, labels, platforms and layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Delete, Insert, Select, Update, bindparam, delete, insert, select, update

from cachedb.errors import CacheError
from cachedb.index.tables import BACKFILLS, BLOBS, IMAGE_BLOBS, IMAGE_LABELS, IMAGE_PLATFORMS, IMAGES
from cachedb.oci.digests import Digest

__all__ = [
    "ATTRIBUTES",
    "BACKFILL",
    "Association",
    "Description",
    "Platform",
    "add_labels",
    "add_platforms",
    "build_layer_update",
    "copy",
    "read_associations",
    "read_backfill",
    "read_labels",
    "read_platforms",
    "select_attributes",
    "write",
]


BACKFILL: Final = "0006"
"""The migration whose backfill reads the configs and indexes of existing images."""
ATTRIBUTES = ("architecture", "os", "variant", "created", "author")


class Association(NamedTuple):
    """An image's association with a blob, as stored in the index."""

    position: int
    role: str
    media_type: str
    blob_id: int
    digest: Digest
    size: int  # bytes
    stored: bool
    diff_id: Digest | None = None
    created_by: str | None = None


class Platform(NamedTuple):
    """A platform of an image."""

    position: int  # of its manifest
    last_position: int  # of its last layer; its config and its layers follow its manifest
    os: str | None
    architecture: str | None
    variant: str | None


class Description(NamedTuple):
    """The data of an image's configs that the index keeps."""

    values: dict[str, Any]  # the image's attributes, by column
    labels: dict[str, str]
    platforms: list[Platform]
    layers: dict[int, tuple[Digest | None, str | None]]  # diff id and command, by position
    unreadable: dict[Digest, CacheError]


def write(connection: Connection, image_id: int, description: Description, *, new: bool = False) -> None:
    """Write an image's attributes, labels and platforms; ``new`` means that it has none to replace."""
    connection.execute(_build_attributes_update(), {"of": image_id, **description.values})
    if not new:
        connection.execute(_build_labels_delete(), {"of": image_id})
        connection.execute(_build_platforms_delete(), {"of": image_id})
    add_labels(connection, {image_id: description.labels})
    add_platforms(connection, {image_id: description.platforms})


def add_labels(connection: Connection, labels: Mapping[int, Mapping[str, str]]) -> None:
    """Insert the labels of images that have none yet, given by image id."""
    rows = [
        {"image_id": image_id, "key": key, "value": value}
        for image_id, labels_of_image in labels.items()
        for key, value in sorted(labels_of_image.items())
    ]
    if rows:
        connection.execute(_build_labels_insert(), rows)


def add_platforms(connection: Connection, platforms: Mapping[int, Iterable[Platform]]) -> None:
    """Insert the platforms of images that have none yet, given by image id."""
    rows = [
        {"image_id": image_id, **platform._asdict()}
        for image_id, platforms_of_image in platforms.items()
        for platform in platforms_of_image
    ]
    if rows:
        connection.execute(_build_platforms_insert(), rows)


def read_backfill(connection: Connection) -> int | None:
    """Return the last image id whose configs the backfill has read; None if the backfill is complete."""
    return connection.execute(select(BACKFILLS.c.image_id).where(BACKFILLS.c.revision == BACKFILL)).scalar()


# As in `images`, each statement is built once, because building it takes longer than executing it.


@cache
def _select_associations() -> Select[*tuple[Any, ...]]:
    columns = (
        IMAGE_BLOBS.c.position,
        IMAGE_BLOBS.c.role,
        IMAGE_BLOBS.c.media_type,
        BLOBS.c.id,
        BLOBS.c.digest,
        BLOBS.c.size,
        BLOBS.c.stored_at.is_not(None),
        IMAGE_BLOBS.c.diff_id,
        IMAGE_BLOBS.c.created_by,
    )
    joined = select(*columns).join(BLOBS, BLOBS.c.id == IMAGE_BLOBS.c.blob_id)
    return joined.where(IMAGE_BLOBS.c.image_id == bindparam("of")).order_by(IMAGE_BLOBS.c.position)


@cache
def _build_attributes_update() -> Update:
    return update(IMAGES).where(IMAGES.c.id == bindparam("of")).values({name: bindparam(name) for name in ATTRIBUTES})


@cache
def _build_labels_delete() -> Delete:
    return delete(IMAGE_LABELS).where(IMAGE_LABELS.c.image_id == bindparam("of"))


@cache
def select_attributes() -> Select[*tuple[Any, ...]]:
    """Return the query for the attributes of an image."""
    return select(*(IMAGES.c[name] for name in ATTRIBUTES)).where(IMAGES.c.id == bindparam("of"))


@cache
def _select_labels() -> Select[*tuple[Any, ...]]:
    query = select(IMAGE_LABELS.c.key, IMAGE_LABELS.c.value).where(IMAGE_LABELS.c.image_id == bindparam("of"))
    return query.order_by(IMAGE_LABELS.c.key)


@cache
def _build_labels_insert() -> Insert:
    return insert(IMAGE_LABELS)


@cache
def _build_platforms_delete() -> Delete:
    return delete(IMAGE_PLATFORMS).where(IMAGE_PLATFORMS.c.image_id == bindparam("of"))


@cache
def _select_platforms() -> Select[*tuple[Any, ...]]:
    query = select(*(IMAGE_PLATFORMS.c[name] for name in Platform._fields))
    return query.where(IMAGE_PLATFORMS.c.image_id == bindparam("of")).order_by(IMAGE_PLATFORMS.c.position)


@cache
def _build_platforms_insert() -> Insert:
    return insert(IMAGE_PLATFORMS)


@cache
def build_layer_update() -> Update:
    """Return the statement that sets the command and the diff id of a layer."""
    update_one = update(IMAGE_BLOBS).where(
        IMAGE_BLOBS.c.image_id == bindparam("of"), IMAGE_BLOBS.c.position == bindparam("at")
    )
    return update_one.values(diff_id=bindparam("diff_id"), created_by=bindparam("created_by"))


def read_associations(connection: Connection, image_id: int) -> list[Association]:
    """Return an image's associations by position."""
    return [Association(*row) for row in connection.execute(_select_associations(), {"of": image_id})]


def copy(connection: Connection, source_id: int, target_id: int) -> None:
    """Copy attributes, labels and platforms from an image with the same manifest.

    The caller has copied the associations, which include the layers' commands and diff ids.
    """
    row = connection.execute(select_attributes(), {"of": source_id}).one()
    labels, platforms = read_labels(connection, source_id), read_platforms(connection, source_id)
    write(connection, target_id, Description(row._asdict(), labels, platforms, {}, {}))


def read_labels(connection: Connection, image_id: int) -> dict[str, str]:
    """Return an image's labels, sorted by key."""
    return {row.key: row.value for row in connection.execute(_select_labels(), {"of": image_id})}


def read_platforms(connection: Connection, image_id: int) -> list[Platform]:
    """Return an image's platforms by position."""
    return [Platform(*row) for row in connection.execute(_select_platforms(), {"of": image_id})]
