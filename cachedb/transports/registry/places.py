"""Find the registry and the mirrors of a name."""

from __future__ import annotations

import os
import re
from typing import Final, NamedTuple

from cachedb.errors import InvalidName
from cachedb.oci.names import HUB, HUB_HOSTS, Name
from cachedb.text import shorten

__all__ = ["Place", "build_place", "mirrors", "place"]


class Place(NamedTuple):
    """The network place of a repository."""

    url: str  # scheme and host of the registry
    registry: str  # host[:port] as credentials know it; docker.io for Docker Hub
    repository: str
    is_verified: bool = True  # whether the certificates of the registry, and of hosts it leads to, are verified
    allows_http: bool = False  # whether HTTP is used if HTTPS fails


_HUB_SERVER: Final = "registry-1.docker.io"
_LAST_PORT: Final = 65535
_LOOPBACK = re.compile(r"(?:localhost|127(?:\.\d+){3}|\[::1\])(?::\d+)?")


def place(name: Name, *, plain_http: bool | None = None) -> Place:
    """Return the place of a name, with Docker's defaults: ``alpine`` is Docker Hub's ``library/alpine``.

    Args:
        name: the name of an image.
        plain_http: use HTTP if True, HTTPS if False; None means HTTP only for localhost.

    Raises:
        InvalidName: if the registry's port is above 65535.
    """
    host, _, repository = Name.parse(name).qualified().partition("/")
    repository = repository.removesuffix(f"{'@' if name.digest else ':'}{name.reference}")
    return build_place(host, repository, plain_http=plain_http)


def build_place(host: str, repository: str, *, plain_http: bool | None) -> Place:
    """Return the place of a repository; see `place`."""
    if not _has_valid_port(host):
        raise InvalidName(f"{shorten(host)} has a port above {_LAST_PORT}")
    plain = bool(_LOOPBACK.fullmatch(host)) if plain_http is None else plain_http
    server = _HUB_SERVER if host in HUB_HOSTS else host
    return Place(f"{'http' if plain else 'https'}://{server}", HUB if host in HUB_HOSTS else host, repository)


def _has_valid_port(host: str) -> bool:
    """Return whether a host has no port or a valid one."""
    port = host.rpartition(":")[2]
    return not port.isdecimal() or (len(port) <= len(str(_LAST_PORT)) and int(port) <= _LAST_PORT)


def mirrors(origin: Place) -> list[Place]:
    """Return the mirrors of a repository at its registry that ``CACHEDB_MIRRORS`` lists.

    Its entries are ``REGISTRY=MIRROR``, separated by spaces. A mirror is ``[http://]host[:port][/prefix]``. It is used
    like a registry, with the prefix before the repository.

    Raises:
        InvalidName: if the variable has an invalid entry.
    """
    found = []
    for entry in os.environ.get("CACHEDB_MIRRORS", "").split():
        registry, _, mirror = entry.partition("=")
        registry = registry.lower()
        scheme, separator, rest = mirror.rpartition("://")
        host, _, prefix = rest.strip("/").partition("/")
        if not registry or not host or not _has_valid_port(host) or (separator and scheme not in ("http", "https")):
            raise InvalidName(f"CACHEDB_MIRRORS has {shorten(entry)}: write REGISTRY=[http://]HOST[:PORT][/PREFIX]")
        if origin.registry == (HUB if registry in HUB_HOSTS else registry):
            path = f"{prefix}/{origin.repository}" if prefix else origin.repository
            found.append(build_place(host.lower(), path, plain_http=scheme == "http" if scheme else None))
    return found
