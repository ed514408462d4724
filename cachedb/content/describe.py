"""Copy the data of configs into the index: platform, build time, author, labels, layer commands.

An image is described when it is saved, and again when a missing config arrives. An image of several platforms gets
the values on which the configs of all its platforms agree.
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
    build_layer_update,
    read_associations,
    read_backfill,
    read_labels,
    select_attributes,
    write,
)
from cachedb.index.tables import TEXT_LIMIT
from cachedb.oci.configs import ImageConfig, parse_config
from cachedb.oci.digests import Digest, digest_of
from cachedb.oci.manifests import CONFIG_TYPES, DOCUMENT_LIMIT

__all__ = ["Unreadable", "describe", "find_stored_configs", "matches_configs", "read_configs", "read_description"]


_RESOURCE_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # this process lacks them; the file may be sound


class Unreadable(NamedTuple):
    """A stored config that cannot be read."""

    digest: Digest
    detail: str


def find_stored_configs(connection: Connection, image_id: int) -> dict[Digest, int]:
    """Return the stored configs that describe an image, with their sizes in bytes."""
    return {config.digest: config.size for config, _ in _configs(read_associations(connection, image_id))}


def read_configs(directory: Path, digests: Iterable[Digest]) -> dict[Digest, ImageConfig | InvalidManifest]:
    """Read configs for `describe` without the write lock; return the configs and the errors.

    The result has an error only for an invalid config. It lacks configs whose files are lost, damaged or unreadable:
    `describe` tries those again.

    Raises:
        StorageError: if this process lacks file descriptors or memory to read them.
    """
    found = {digest: _read(directory, digest) for digest in digests}
    return {digest: read for digest, read in found.items() if isinstance(read, ImageConfig | InvalidManifest)}


def describe(
    connection: Connection,
    directory: Path,
    image_id: int,
    known: Mapping[Digest, ImageConfig | InvalidManifest] | None = None,
) -> list[Unreadable]:
    """Write what an image's stored configs say to its rows; return the configs that cannot be read.

    Args:
        connection: in a write transaction.
        directory: of the cache.
        image_id: of the image.
        known: configs that were read before; those of other images are ignored.

    Raises:
        StorageError: if this process lacks file descriptors or memory to read them.
    """
    described = read_description(directory, read_associations(connection, image_id), known)
    write(connection, image_id, described)
    if described.layers:
        layers = [
            {"of": image_id, "at": position, "diff_id": diff_id, "created_by": command}
            for position, (diff_id, command) in described.layers.items()
        ]
        connection.execute(build_layer_update(), layers)
    return [Unreadable(digest, str(error)) for digest, error in described.unreadable.items()]


def matches_configs(connection: Connection, directory: Path, image_id: int) -> bool:
    """Return whether the index matches an image's configs.

    It is True if a config is not stored or its file cannot be read, and until the backfill has read the configs.

    Raises:
        StorageError: if this process lacks file descriptors or memory to read them.
    """
    last_read = read_backfill(connection)
    contents = read_associations(connection, image_id)
    wanted = [blob for blob in contents if blob.role == "config" and blob.media_type in CONFIG_TYPES]
    if (last_read is not None and image_id > last_read) or not wanted or not all(blob.stored for blob in wanted):
        return True
    described = read_description(directory, contents)
    if not all(isinstance(error, InvalidManifest) for error in described.unreadable.values()):
        return True  # the file was perhaps sound when the image was described
    row = connection.execute(select_attributes(), {"of": image_id}).one()
    layers = {blob.position: (blob.diff_id, blob.created_by) for blob in contents}
    return (
        row._asdict() == described.values
        and read_labels(connection, image_id) == described.labels
        and all(layers[position] == layer for position, layer in described.layers.items())
    )


def read_description(
    directory: Path,
    contents: list[Association],
    known: Mapping[Digest, ImageConfig | InvalidManifest] | None = None,
) -> Description:
    """Return what the stored configs of an image with these blobs say.

    Args:
        directory: of the cache.
        contents: the image's associations, by position.
        known: configs that were read before.

    Raises:
        StorageError: if this process lacks file descriptors or memory to read them.
    """
    found: list[ImageConfig] = []
    layers: dict[int, tuple[Digest | None, str | None]] = {}
    unreadable: dict[Digest, CacheError] = {}
    for config, positions in _configs(contents):
        read = (known or {}).get(config.digest) or _read(directory, config.digest)
        if isinstance(read, CacheError):
            unreadable[config.digest] = read
            continue
        if read.os != "unknown":  # builders give this name to attestations, which are not images
            found.append(read)
        if len(read.layers) <= len(positions):  # layers that a user attached follow those of the config
            layers.update(zip(positions, read.layers, strict=False))
    values = {name: _agreed([getattr(config, name) for config in found]) for name in ATTRIBUTES}
    common = set.intersection(*(set(config.labels.items()) for config in found)) if found else set()
    return Description(values, dict(common), layers, unreadable)


def _configs(contents: list[Association]) -> Iterator[tuple[Association, list[int]]]:
    """Yield each stored config of an image, with the positions of the layers that follow it."""
    for index, config in enumerate(contents):
        if config.role != "config" or not config.stored or config.media_type not in CONFIG_TYPES:
            continue
        positions = []
        for blob in contents[index + 1 :]:
            if blob.role != "layer":
                break
            positions.append(blob.position)
        yield config, positions


def _read(directory: Path, digest: Digest) -> ImageConfig | CacheError:
    """Return a parsed config, or the error if it cannot be read."""
    try:
        with reader.open_blob(directory, digest) as file, os_errors("read a config"):
            data = file.read(DOCUMENT_LIMIT + 1)
        if len(data) <= DOCUMENT_LIMIT and digest_of(data, digest) != digest:
            return DigestMismatch("its file is damaged: run `cachedb verify`")
        return parse_config(data, TEXT_LIMIT)
    except CacheError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in _RESOURCE_ERRNOS:
            raise
        return error


def _agreed(values: list[Any]) -> Any:  # noqa: ANN401
    return values[0] if values and all(value == values[0] for value in values) else None
