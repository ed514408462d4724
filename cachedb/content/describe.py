"""Copy the data of configs into the index: platforms, build time, author, labels, layer commands.

An image is described when it is saved, and again when a missing config arrives. An image of several platforms gets
the values on which the configs of all its platforms agree. The platform that an index states wins over the config's.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice, pairwise, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection

from cachedb.disk import reader
from cachedb.errors import CacheError, DigestMismatch, InvalidManifest, os_errors
from cachedb.index.descriptions import (
    ATTRIBUTES,
    Association,
    Description,
    Platform,
    build_layer_update,
    read_associations,
    read_backfill,
    read_labels,
    read_platforms,
    select_attributes,
    write,
)
from cachedb.index.tables import TEXT_LIMIT
from cachedb.oci.configs import ImageConfig, parse_config
from cachedb.oci.digests import Digest, digest_of
from cachedb.oci.manifests import CONFIG_TYPES, DOCUMENT_LIMIT, descriptors

__all__ = ["Unreadable", "describe", "find_stored_documents", "matches_configs", "read_description", "read_documents"]


_Document = ImageConfig | dict[Digest, str]
"""A parsed config, or the platforms that an index states for its children."""

_RESOURCE_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # the process lacks resources; the file may be sound


class Unreadable(NamedTuple):
    """A stored config or index that cannot be read."""

    digest: Digest
    detail: str


def find_stored_documents(connection: Connection, image_id: int) -> list[Association]:
    """Return the stored configs and indexes that describe an image."""
    contents = read_associations(connection, image_id)
    return [*_indexes(contents), *(config for config, _ in _configs(contents))]


def read_documents(directory: Path, documents: Iterable[Association]) -> dict[Digest, _Document | InvalidManifest]:
    """Read configs and indexes for `describe`, without the write lock.

    The result has the content of each document, or the error if it is invalid. It lacks documents whose files are
    lost, damaged or unreadable: `describe` tries those again.

    Raises:
        StorageError: if this process lacks file descriptors or memory to read them.
    """
    found = {document.digest: _read(directory, document) for document in documents}
    return {digest: read for digest, read in found.items() if isinstance(read, ImageConfig | dict | InvalidManifest)}


def describe(
    connection: Connection,
    directory: Path,
    image_id: int,
    known: Mapping[Digest, _Document | InvalidManifest] | None = None,
) -> list[Unreadable]:
    """Copy the data of an image's stored configs and indexes to its rows; return the unreadable ones.

    Args:
        connection: in a write transaction.
        directory: of the cache.
        image_id: of the image.
        known: configs and indexes that were read before; those of other images are ignored.

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
    """Return whether the index matches an image's configs and indexes.

    It is True if one of them is not stored or its file cannot be read, and until the backfill has read them.

    Raises:
        StorageError: if this process lacks file descriptors or memory to read them.
    """
    last_read = read_backfill(connection)
    contents = read_associations(connection, image_id)
    wanted = [blob for blob in contents if blob.role == "index" or _is_config(blob)]
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
        and read_platforms(connection, image_id) == described.platforms
        and all(layers[position] == layer for position, layer in described.layers.items())
    )


def read_description(
    directory: Path,
    contents: list[Association],
    known: Mapping[Digest, _Document | InvalidManifest] | None = None,
) -> Description:
    """Return the data in the stored configs and indexes of an image with these blobs.

    Args:
        directory: of the cache.
        contents: the image's associations, by position.
        known: configs and indexes that were read before.

    Raises:
        StorageError: if this process lacks file descriptors or memory to read them.
    """
    configs: dict[int, ImageConfig] = {}  # by position
    layers: dict[int, tuple[Digest | None, str | None]] = {}
    stated: dict[Digest, str] = {}
    unreadable: dict[Digest, CacheError] = {}

    def read(blob: Association) -> _Document | None:
        found = known[blob.digest] if known and blob.digest in known else _read(directory, blob)
        if isinstance(found, CacheError):
            unreadable[blob.digest] = found
            return None
        return found

    for index in _indexes(contents):
        if isinstance(platforms := read(index), dict):
            stated.update(platforms)
    for config, positions in _configs(contents):
        if isinstance(found := read(config), ImageConfig):
            configs[config.position] = found
            if len(found.layers) <= len(positions):  # layers that a user attached follow those of the config
                layers.update(zip(positions, found.layers, strict=False))
    # Builders give the system "unknown" to attestations, which are not images.
    images = [config for config in configs.values() if config.os != "unknown"]
    values = {name: _agreed([getattr(config, name) for config in images]) for name in ATTRIBUTES}
    common = set.intersection(*(set(config.labels.items()) for config in images)) if images else set()
    return Description(values, dict(common), list(_find_platforms(contents, configs, stated)), layers, unreadable)


def _find_platforms(
    contents: list[Association], configs: Mapping[int, ImageConfig], stated: Mapping[Digest, str]
) -> Iterator[Platform]:
    """Yield the platforms of an image.

    Args:
        contents: the image's associations, by position.
        configs: the configs that could be read, by position.
        stated: the platforms that indexes state for manifests.
    """
    for index, (manifest, config) in enumerate(pairwise(contents)):
        if manifest.role != "manifest" or not _is_config(config):
            continue
        found = configs.get(config.position)
        parts = stated.get(manifest.digest, "").split("/")
        if len(parts) > 1:
            os, architecture, variant = (*parts, None)[:3]
        elif found is not None:
            os, architecture, variant = found.os, found.architecture, found.variant
        else:
            continue
        if os == "unknown" or (os or architecture) is None:
            continue
        layers = _find_layers(contents, index + 1)
        if found is not None and len(found.layers) <= len(layers):
            layers = layers[: len(found.layers)]
        yield Platform(manifest.position, [config.position, *layers][-1], os, architecture, variant)


def _indexes(contents: list[Association]) -> list[Association]:
    """Return the stored indexes of an image."""
    return [blob for blob in contents if blob.role == "index" and blob.stored]


def _configs(contents: list[Association]) -> Iterator[tuple[Association, list[int]]]:
    """Yield each stored config of an image, with the positions of the layers that follow it."""
    for index, blob in enumerate(contents):
        if _is_config(blob) and blob.stored:
            yield blob, _find_layers(contents, index)


def _is_config(blob: Association) -> bool:
    return blob.role == "config" and blob.media_type in CONFIG_TYPES


def _find_layers(contents: list[Association], config: int) -> list[int]:
    """Return the positions of the layers that follow the config with this number."""
    following = islice(contents, config + 1, None)
    return [blob.position for blob in takewhile(lambda blob: blob.role == "layer", following)]


def _read(directory: Path, blob: Association) -> _Document | CacheError:
    """Return what a config or an index states, or the error if it cannot be read."""
    parse: Callable[[bytes], _Document]
    parse = partial(_parse_index, media_type=blob.media_type) if blob.role == "index" else _parse_config
    try:
        with reader.open_blob(directory, blob.digest) as file, os_errors(f"read the {blob.role} {blob.digest}"):
            data = file.read(DOCUMENT_LIMIT + 1)
        if len(data) <= DOCUMENT_LIMIT and digest_of(data, blob.digest) != blob.digest:
            return DigestMismatch("its file is damaged: run `cachedb verify`")
        return parse(data)
    except CacheError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in _RESOURCE_ERRNOS:
            raise
        return error


def _parse_config(data: bytes) -> ImageConfig:
    return parse_config(data, TEXT_LIMIT)


def _parse_index(data: bytes, *, media_type: str) -> dict[Digest, str]:
    return {child.digest: child.platform for child in descriptors(data, media_type) if child.platform}


def _agreed(values: list[Any]) -> Any:  # noqa: ANN401
    return values[0] if values and all(value == values[0] for value in values) else None
