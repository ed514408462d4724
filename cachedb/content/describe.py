"""What images' configs say, in the index: platform, time of building, author, labels, and of layers how they were made.

An image is described when it is saved, and again when a config that it waited for arrives. An index's image has
what the configs of all its platforms agree on.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Delete, Insert, Select, Update, bindparam, delete, insert, select, update

from cachedb.disk import reader
from cachedb.errors import CacheError, DigestMismatch, InvalidManifest, os_errors
from cachedb.index.tables import BACKFILLS, BLOBS, IMAGE_BLOBS, IMAGE_LABELS, IMAGES, TEXT_LIMIT
from cachedb.oci.manifests import CONFIG_TYPES, DOCUMENT_LIMIT, ImageConfig, parse_config
from cachedb.oci.names import Digest, digest_of

__all__ = [
    "BACKFILL",
    "Association",
    "Description",
    "Unreadable",
    "add_labels",
    "agrees",
    "associations",
    "backfilled",
    "copy",
    "describe",
    "description",
    "labels",
    "read_ahead",
    "stored",
    "write",
]


BACKFILL: Final = "0003"
"""The migration that leaves the configs of the images that are there to be read."""

_OUR_OWN = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # these say nothing of the file
_ATTRIBUTES = ("architecture", "os", "variant", "created", "author")


class Unreadable(NamedTuple):
    """A stored config that cannot be read."""

    digest: Digest
    detail: str


class Association(NamedTuple):
    """An image's association with a blob, as it is in the index."""

    position: int
    role: str
    media_type: str
    blob_id: int
    digest: Digest
    size: int  # bytes
    stored: bool
    diff_id: Digest | None = None
    created_by: str | None = None


class Description(NamedTuple):
    """What the configs of an image say."""

    values: dict[str, Any]  # of the image, by column
    labels: dict[str, str]
    layers: dict[int, tuple[Digest | None, str | None]]  # diff id and command, by position
    unreadable: dict[Digest, CacheError]


def stored(connection: Connection, image_id: int) -> dict[Digest, int]:
    """Return the configs that describe an image, as far as they are stored, with their sizes in bytes."""
    return {config.digest: config.size for config, _ in _configs(associations(connection, image_id))}


def read_ahead(directory: Path, digests: Iterable[Digest]) -> dict[Digest, ImageConfig | InvalidManifest]:
    """Read configs for `describe`, without the write lock; return what can be said of them once and for all.

    Raises:
        StorageError: if this process lacks what it needs to read them.
    """
    found = {digest: _read(directory, digest) for digest in digests}
    return {digest: read for digest, read in found.items() if isinstance(read, ImageConfig | InvalidManifest)}


def describe(
    connection: Connection,
    directory: Path,
    image_id: int,
    known: Mapping[Digest, ImageConfig | InvalidManifest] | None = None,
) -> list[Unreadable]:
    """Write to an image's rows what its configs say, as far as they are stored; return those that cannot be read.

    Args:
        connection: in a write transaction.
        directory: of the cache.
        image_id: of the image.
        known: configs that were read before; the image need not have them any more.

    Raises:
        StorageError: if this process lacks what it needs to read them.
    """
    said = description(directory, associations(connection, image_id), known)
    write(connection, image_id, said)
    if said.layers:
        layers = [
            {"of": image_id, "at": position, "diff_id": diff_id, "created_by": command}
            for position, (diff_id, command) in said.layers.items()
        ]
        connection.execute(_described_layer(), layers)
    return [Unreadable(digest, str(error)) for digest, error in said.unreadable.items()]


def write(connection: Connection, image_id: int, said: Description, *, new: bool = False) -> None:
    """Write to an image's row, and to its labels, what was said of it; a new one has no labels yet."""
    connection.execute(_described(), {"of": image_id, **said.values})
    if not new:
        connection.execute(_without_labels(), {"of": image_id})
    add_labels(connection, {image_id: said.labels})


def add_labels(connection: Connection, labels: Mapping[int, Mapping[str, str]]) -> None:
    """Write the labels of images that have none, by their ids."""
    rows = [
        {"image_id": image_id, "key": key, "value": value}
        for image_id, said in labels.items()
        for key, value in sorted(said.items())
    ]
    if rows:
        connection.execute(_new_labels(), rows)


def agrees(connection: Connection, directory: Path, image_id: int) -> bool:
    """Say whether the index has of an image what its configs say; also where that cannot be told, or not yet.

    Raises:
        StorageError: if this process lacks what it needs to read them.
    """
    begin = backfilled(connection)
    contents = associations(connection, image_id)
    wanted = [blob for blob in contents if blob.role == "config" and blob.media_type in CONFIG_TYPES]
    if (begin is not None and image_id > begin) or not wanted or not all(blob.stored for blob in wanted):
        return True
    said = description(directory, contents)
    if not all(isinstance(error, InvalidManifest) for error in said.unreadable.values()):
        return True  # it may have been read before
    row = connection.execute(_attributes(), {"of": image_id}).one()
    layers = {blob.position: (blob.diff_id, blob.created_by) for blob in contents}
    return (
        row._asdict() == said.values
        and labels(connection, image_id) == said.labels
        and all(layers[position] == layer for position, layer in said.layers.items())
    )


def backfilled(connection: Connection) -> int | None:
    """Return the last of the images whose configs a backfill has read so far; None if it has come to its end."""
    return connection.execute(select(BACKFILLS.c.image_id).where(BACKFILLS.c.revision == BACKFILL)).scalar()


def description(
    directory: Path,
    contents: list[Association],
    known: Mapping[Digest, ImageConfig | InvalidManifest] | None = None,
) -> Description:
    """Return what the configs of an image with these contents say, as far as they are stored.

    Args:
        directory: of the cache.
        contents: the image's associations, in the order of their positions.
        known: configs that were read before.

    Raises:
        StorageError: if this process lacks what it needs to read them.
    """
    found: list[ImageConfig] = []
    layers: dict[int, tuple[Digest | None, str | None]] = {}
    unreadable: dict[Digest, CacheError] = {}
    for config, positions in _configs(contents):
        read = (known or {}).get(config.digest) or _read(directory, config.digest)
        if isinstance(read, CacheError):
            unreadable[config.digest] = read
            continue
        if read.os != "unknown":  # as builders call it for what describes an image, and is none
            found.append(read)
        if len(read.layers) <= len(positions):  # what is attached to an image follows its layers
            layers.update(zip(positions, read.layers, strict=False))
    values = {name: _agreed([getattr(config, name) for config in found]) for name in _ATTRIBUTES}
    common = set.intersection(*(set(config.labels.items()) for config in found)) if found else set()
    return Description(values, dict(common), layers, unreadable)


# As in `images`: put together once.


@cache
def _contents_of() -> Select[*tuple[Any, ...]]:
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
def _described() -> Update:
    return update(IMAGES).where(IMAGES.c.id == bindparam("of")).values({name: bindparam(name) for name in _ATTRIBUTES})


@cache
def _without_labels() -> Delete:
    return delete(IMAGE_LABELS).where(IMAGE_LABELS.c.image_id == bindparam("of"))


@cache
def _attributes() -> Select[*tuple[Any, ...]]:
    return select(*(IMAGES.c[name] for name in _ATTRIBUTES)).where(IMAGES.c.id == bindparam("of"))


@cache
def _labels_of() -> Select[*tuple[Any, ...]]:
    query = select(IMAGE_LABELS.c.key, IMAGE_LABELS.c.value).where(IMAGE_LABELS.c.image_id == bindparam("of"))
    return query.order_by(IMAGE_LABELS.c.key)


@cache
def _new_labels() -> Insert:
    return insert(IMAGE_LABELS)


@cache
def _described_layer() -> Update:
    one = update(IMAGE_BLOBS).where(
        IMAGE_BLOBS.c.image_id == bindparam("of"), IMAGE_BLOBS.c.position == bindparam("at")
    )
    return one.values(diff_id=bindparam("diff_id"), created_by=bindparam("created_by"))


def _configs(contents: list[Association]) -> Iterator[tuple[Association, list[int]]]:
    """Yield each stored config of an image or a platform of it, with the positions of its layers, which follow it."""
    for place, config in enumerate(contents):
        if config.role != "config" or not config.stored or config.media_type not in CONFIG_TYPES:
            continue
        positions = []
        for blob in contents[place + 1 :]:
            if blob.role != "layer":
                break
            positions.append(blob.position)
        yield config, positions


def associations(connection: Connection, image_id: int) -> list[Association]:
    """Return an image's associations, in the order of their positions."""
    return [Association(*row) for row in connection.execute(_contents_of(), {"of": image_id})]


def _read(directory: Path, digest: Digest) -> ImageConfig | CacheError:
    """Return what a config says, or why it cannot be read."""
    try:
        with reader.open_blob(directory, digest) as file, os_errors("read a config"):
            data = file.read(DOCUMENT_LIMIT + 1)
        if len(data) <= DOCUMENT_LIMIT and digest_of(data, digest) != digest:
            return DigestMismatch("its file has another content: run `cachedb verify`")
        return parse_config(data, TEXT_LIMIT)
    except CacheError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in _OUR_OWN:
            raise
        return error


def _agreed(values: list[Any]) -> Any:  # noqa: ANN401
    return values[0] if values and all(value == values[0] for value in values) else None


def copy(connection: Connection, source_id: int, target_id: int) -> None:
    """Describe an image as another is that has the same manifest; its associations have been copied already."""
    row = connection.execute(_attributes(), {"of": source_id}).one()
    write(connection, target_id, Description(row._asdict(), labels(connection, source_id), {}, {}))


def labels(connection: Connection, image_id: int) -> dict[str, str]:
    """Return an image's labels, in the order of their keys."""
    return {row.key: row.value for row in connection.execute(_labels_of(), {"of": image_id})}
