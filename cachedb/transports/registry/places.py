"""Where a name is on the wire: its registry, and the registry's mirrors."""

from __future__ import annotations

import os
import re
from typing import Final, NamedTuple

from cachedb.errors import (
    InvalidName,
)
from cachedb.oci.names import Name
from cachedb.text import shorten

__all__ = ["Place", "mirrors", "place"]


class Place(NamedTuple):
    """Where a repository is on the wire."""

    url: str  # of the registry: scheme and host, with a prefix for some mirrors
    registry: str  # host[:port] as credentials know it; docker.io for Docker Hub
    repository: str


_HUB: Final = "docker.io"
_LAST_PORT: Final = 65535
_LOOPBACK = re.compile(r"(?:localhost|127(?:\.\d+){3}|\[::1\])(?::\d+)?")


def place(name: Name, *, plain_http: bool | None = None) -> Place:
    """Return where a name is on the wire, as Docker has it: ``alpine`` is Docker Hub's ``library/alpine``.

    Args:
        name: of an image.
        plain_http: speak HTTP and not HTTPS; None for what is usual: HTTP with this host alone.

    Raises:
        InvalidName: if its registry has a port that cannot be.
    """
    registry, _, repository = str(Name.parse(name).qualified()).partition("/")
    repository = repository.removesuffix(f"{'@' if name.digest else ':'}{name.reference}")
    plain = bool(_LOOPBACK.fullmatch(registry)) if plain_http is None else plain_http
    host = "registry-1.docker.io" if registry in (_HUB, "index.docker.io") else registry
    if not _has_port(host):
        raise InvalidName(f"{shorten(host)} has a port above {_LAST_PORT}")
    return Place(f"{'http' if plain else 'https'}://{host}", registry, repository)


def _has_port(host: str) -> bool:
    """Say whether there can be such a port, if a host has one."""
    port = host.rpartition(":")[2]
    return not port.isdecimal() or (len(port) <= len(str(_LAST_PORT)) and int(port) <= _LAST_PORT)


def mirrors(name: Name) -> list[Place]:
    """Return where else to look for a name first: ``CACHEDB_MIRRORS`` has ``REGISTRY=MIRROR``, divided by spaces.

    A mirror is ``[http://]host[:port][/prefix]``, asked as any registry is, with the prefix in front of the repository.

    Raises:
        InvalidName: if there is something else in the variable.
    """
    origin = place(name)
    found = []
    for entry in os.environ.get("CACHEDB_MIRRORS", "").split():
        registry, _, mirror = entry.partition("=")
        scheme, separator, rest = mirror.rpartition("://")
        host, _, prefix = rest.strip("/").partition("/")
        if not registry or not host or not _has_port(host) or (separator and scheme not in ("http", "https")):
            raise InvalidName(f"CACHEDB_MIRRORS has {shorten(entry)}: expected REGISTRY=[http://]HOST[:PORT][/PREFIX]")
        if registry == origin.registry:
            scheme = scheme or ("http" if _LOOPBACK.fullmatch(host) else "https")
            path = f"{prefix}/{origin.repository}" if prefix else origin.repository
            found.append(Place(f"{scheme}://{host}", host, path))
    return found
