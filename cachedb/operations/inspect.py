"""Read what a registry has, without storing it: digests, tags, manifests and configs."""

from __future__ import annotations

from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from cachedb import oci
from cachedb.errors import InvalidManifest
from cachedb.index.tables import TEXT_LIMIT
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import Descriptor
from cachedb.oci.names import Name, RemoteName
from cachedb.transports.registry.access import Access
from cachedb.transports.registry.repository import Repository
from cachedb.transports.registry.routes import pull_routes
from cachedb.transports.registry.source import Source

__all__ = ["RemoteBlob", "RemoteImage", "RemotePlatform", "inspect_image", "list_tags", "resolve_digest"]


_MAX_DEPTH = 8  # of indexes in indexes


class RemotePlatform(NamedTuple):
    """A child of an index at a registry."""

    platform: str | None  # os/architecture[/variant], if the index states it
    digest: Digest
    size: int  # bytes of the child's manifest


class RemoteBlob(NamedTuple):
    """A layer of an image at a registry."""

    digest: Digest
    size: int  # bytes
    media_type: str


class RemoteImage(NamedTuple):
    """An image at a registry."""

    name: Name
    digest: Digest  # of the manifest or index
    media_type: str  # of the manifest or index
    platforms: list[RemotePlatform]  # the children of its index; empty without an index
    # Of the image for one platform:
    manifest: Digest  # the digest of its manifest
    size: int  # bytes of its config and layers, each counted once
    architecture: str | None
    os: str | None
    variant: str | None
    created: datetime | None  # UTC; when it was built
    author: str | None
    labels: dict[str, str]
    layers: list[RemoteBlob]  # in order, the lowest first


def resolve_digest(directory: Path, wanted: RemoteName, access: Access) -> Digest:
    """Return the digest that a name has at its registry.

    Args:
        directory: of the cache, which remembers unavailable mirrors.
        wanted: the image's name.
        access: how to reach the registry.

    Raises:
        RegistryError: if the registry refuses or fails, or has no such image.
    """
    with closing(Source(directory, wanted, access=access)) as source:
        # A digest in the name is no proof that the registry has the image.
        return source.root(wanted.digest).digest if wanted.digest else source.digest()


def list_tags(repository: str, access: Access) -> list[str]:
    """Return the tags of a repository at its registry, in the registry's order.

    Args:
        repository: the repository, without a tag.
        access: how to reach the registry.

    Raises:
        RegistryError: if the registry refuses or fails, or has no such repository.
    """
    registry = pull_routes(Name(repository, "latest"), access)[-1]  # a mirror may have only some of the tags
    with closing(Repository(*registry)) as opened:
        return opened.tags()


def inspect_image(directory: Path, wanted: RemoteName, platform: str | None, access: Access) -> RemoteImage:
    """Return what the manifest and the config of an image at its registry say.

    Args:
        directory: of the cache, which remembers unavailable mirrors.
        wanted: the image's name.
        platform: ``os/architecture[/variant]``; the default is the host's.
        access: how to reach the registry.

    Raises:
        RegistryError: if the registry refuses or fails, or has no such image.
        NotInCache: if an index does not have the platform.
        InvalidManifest: if a manifest or the config is invalid.
        DigestMismatch: if downloaded content has a wrong digest or size.
    """
    with closing(Source(directory, wanted, platform=platform, access=access)) as source:
        root = source.root(source.digest())

        def list_children(index: Descriptor) -> list[Descriptor]:
            return oci.descriptors(source.child(index, lambda _: None), index.media_type)

        blob, data, platforms = root.descriptor, root.data, list[RemotePlatform]()
        for _ in range(_MAX_DEPTH):
            children = oci.descriptors(data, oci.manifest_media_type(data, blob.media_type))
            if blob.role == "manifest":
                return _describe(source, wanted.name, root.descriptor, platforms, blob, children)
            platforms = platforms or [RemotePlatform(child.platform, child.digest, child.size) for child in children]
            blob = next((child for child in source.choose(children, list_children) if child.role != "other"), blob)
            data = source.child(blob, lambda _: None)
    raise InvalidManifest(f"{wanted} is an index without an image, or is nested too deeply: name an image")


def _describe(
    source: Source,
    name: Name,
    root: Descriptor,
    platforms: list[RemotePlatform],
    manifest: Descriptor,
    children: list[Descriptor],
) -> RemoteImage:
    """Return the description of an image from its manifest's children: the config and the layers."""
    config, *layers = children
    data = source.read_config(config) if config.media_type in oci.CONFIG_TYPES else b"{}"
    found = oci.parse_config(data, TEXT_LIMIT)
    return RemoteImage(
        name=name,
        digest=root.digest,
        media_type=root.media_type,
        platforms=platforms,
        manifest=manifest.digest,
        size=sum({blob.digest: blob.size for blob in children}.values()),
        architecture=found.architecture,
        os=found.os,
        variant=found.variant,
        created=found.created,
        author=found.author,
        labels=found.labels,
        layers=[RemoteBlob(layer.digest, layer.size, layer.media_type) for layer in layers],
    )
