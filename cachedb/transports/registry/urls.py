"""Compare and build URLs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

from urllib3.util import parse_url

from cachedb.errors import RegistryError

__all__ = ["allowed_schemes", "host_of", "origin", "with_query"]


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Return the scheme, host and port of a URL; credentials are sent only to the same origin.

    Raises:
        RegistryError: if it is not a URL. The message does not quote it, because it may contain a secret.
    """
    try:
        # Parse with urllib3, as the connection does: another parser may find another host.
        parts = parse_url(url)
    except ValueError:
        raise RegistryError("a registry sent an invalid URL: check that it is a registry") from None
    scheme = parts.scheme or ""
    return scheme, parts.host, parts.port or {"http": 80, "https": 443}.get(scheme)


def allowed_schemes(url: str) -> tuple[str, ...]:
    """Return the schemes of URLs that an answer from this URL may lead to: HTTPS never leads to HTTP."""
    return ("https",) if origin(url)[0] == "https" else ("http", "https")


def host_of(url: str) -> str:
    """Return the ``host[:port]`` of a URL."""
    parts = parse_url(url)
    return f"{parts.host}:{parts.port}" if parts.port else parts.host or ""


def with_query(url: str, values: Mapping[str, str] | Sequence[tuple[str, str]]) -> str:
    """Append values to the query of a URL."""
    return f"{url}{'&' if '?' in url else '?'}{urlencode(values)}"
