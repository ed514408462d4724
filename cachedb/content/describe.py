"""What images' configs say, in the index: platform, time of building, author, labels, and of layers how they were made.

An image is described when it is saved, and again when a config that it waited for arrives. An index's image has
what the configs of all its platforms agree on.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection

from cachedb.disk import reader
from cachedb.errors import CacheError, DigestMismatch, InvalidManifest, os_errors
from cachedb.index.descriptions import (
    ATTRIBUTES,
    Association,
    Description,
    associations,
    backfilled,
    described_layer,
    labels,
    select_attributes,
    write,
)
from cachedb.index.tables import TEXT_LIMIT
from cachedb.oci.configs import ImageConfig, parse_config
from cachedb.oci.digests import Digest, digest_of
from cachedb.oci.manifests import CONFIG_TYPES, DOCUMENT_LIMIT

__all__ = ["Unreadable", "agrees", "describe", "description", "read_ahead", "stored"]


_OUR_OWN = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # these say nothing of the file


class Unreadable(NamedTuple):
    """A stored config that cannot be read."""

    digest: Digest
    detail: str


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
        connection.execute(described_layer(), layers)
    return [Unreadable(digest, str(error)) for digest, error in said.unreadable.items()]


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
    row = connection.execute(select_attributes(), {"of": image_id}).one()
    layers = {blob.position: (blob.diff_id, blob.created_by) for blob in contents}
    return (
        row._asdict() == said.values
        and labels(connection, image_id) == said.labels
        and all(layers[position] == layer for position, layer in said.layers.items())
    )


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
    values = {name: _agreed([getattr(config, name) for config in found]) for name in ATTRIBUTES}
    common = set.intersection(*(set(config.labels.items()) for config in found)) if found else set()
    return Description(values, dict(common), layers, unreadable)


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
