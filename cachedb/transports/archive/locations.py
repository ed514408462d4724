"""Parse where an archive is, in the words of skopeo and podman: containers-transports(5)."""

from __future__ import annotations

from typing import Final, NamedTuple

from cachedb.errors import CacheError
from cachedb.text import shorten
from cachedb.transports.archive.formats import Format

__all__ = ["Location", "parse_location"]


_TRANSPORTS: Final[dict[str, Format]] = {
    "docker-archive": "docker-archive",
    "oci-archive": "oci-archive",
    "oci": "oci-dir",
    "dir": "dir",
}
"""The formats that the transports of skopeo read and write."""


class Location(NamedTuple):
    """The place of an archive or a folder."""

    format: Format | None  # None if the text is only a path
    path: str
    tag: str | None  # the text behind the path, which names an image inside


def parse_location(text: str) -> Location:
    """Parse the location of an archive: ``TRANSPORT:PATH[:TAG]`` or a path.

    The transports are ``docker-archive``, ``oci-archive``, ``oci``, and ``dir``, which has no tag. Any other text is a
    path, even if it contains a colon. As in skopeo, the path after a transport ends at its first colon, except after
    ``dir:``.

    Raises:
        CacheError: if nothing follows the transport.
    """
    transport, _, rest = text.partition(":")
    if transport == text or transport not in _TRANSPORTS:
        return Location(None, text, None)
    path, _, tag = (rest, "", "") if transport == "dir" else rest.partition(":")
    if not path:
        raise CacheError(
            f"{shorten(text)} has no path: write {transport}:PATH, or ./{transport} for a file of that name"
        )
    return Location(_TRANSPORTS[transport], path, tag or None)
