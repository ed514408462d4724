"""Find the proxy for a URL in the environment, as Go's clients (docker, podman, skopeo, crane) do.

This follows golang.org/x/net/http/httpproxy. Python's `urllib.request` differs: it uses a proxy for loopback, knows
neither networks nor ports in ``no_proxy``, and needs a scheme.
"""

from __future__ import annotations

import os
import re
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import NamedTuple
from urllib.parse import unquote

from urllib3.util import parse_url

from cachedb.errors import RegistryError
from cachedb.transports.registry.redaction import format_basic

__all__ = ["Proxy", "find_proxy"]


_PORTS = {"http": 80, "https": 443}


class Proxy(NamedTuple):
    """A proxy, and the header of its login."""

    url: str  # without the login
    authorization: str  # the value of Proxy-Authorization; empty if the proxy needs no login
    variable: str  # the environment variable that names the proxy

    def __repr__(self) -> str:
        return f"Proxy(url={self.url!r}, ...)"


def find_proxy(url: str) -> Proxy | None:
    """Return the proxy for a URL, or None to connect directly.

    ``http_proxy`` is for http URLs and ``https_proxy`` for https URLs; the names in upper case come first. There is no
    proxy for loopback, nor for a host that ``no_proxy`` lists.

    Args:
        url: the URL of a request.

    Raises:
        RegistryError: if the variable has no URL of an HTTP proxy.
    """
    parts = parse_url(url)
    scheme, host = parts.scheme or "", (parts.host or "").strip("[]").lower()
    # In a CGI script, HTTP_PROXY comes from a header of the request ("httpoxy").
    names = ["http_proxy"] if scheme == "http" and "REQUEST_METHOD" in os.environ else [f"{scheme.upper()}_PROXY"]
    variable, value = _read_variable(*names, f"{scheme}_proxy")
    if not value or _is_excluded(host, parts.port or _PORTS.get(scheme, 0)):
        return None
    return _parse_proxy(variable, value)


def _read_variable(*names: str) -> tuple[str, str]:
    """Return the first variable that is set and not empty, and its value."""
    return next(((name, value) for name in names if (value := os.environ.get(name, "").strip())), ("", ""))


def _parse_proxy(variable: str, value: str) -> Proxy:
    """Return the proxy that a variable names: ``[http[s]://][USER[:PASSWORD]@]HOST[:PORT]``.

    The login is percent-encoded.
    """
    text = value if "://" in value else f"http://{value}"
    try:
        parts = parse_url(text)
    except ValueError:  # its message has the login
        parts = parse_url("")
    if parts.scheme not in _PORTS or not parts.host:
        raise RegistryError(f"{variable} names no HTTP proxy: expected [http://][USER:PASSWORD@]HOST[:PORT]")
    login = ""
    if parts.auth:
        user, _, password = parts.auth.partition(":")
        login = format_basic(unquote(user), unquote(password))
    return Proxy(parts._replace(auth=None, path=None, query=None, fragment=None).url, login, variable)


def _is_excluded(host: str, port: int) -> bool:
    """Return whether a host is loopback, or ``no_proxy`` lists it."""
    address = _parse_address(host)
    if host == "localhost" or (address and address.is_loopback):
        return True
    _, listed = _read_variable("NO_PROXY", "no_proxy")
    return any(_matches(entry, host, address, port) for entry in re.split(r"[\s,]+", listed.lower()) if entry)


def _matches(entry: str, host: str, address: IPv4Address | IPv6Address | None, port: int) -> bool:
    """Return whether an entry of ``no_proxy`` is for a host.

    An entry is ``*``, a network in CIDR notation, or ``HOST[:PORT]``. A domain is also for its subdomains; ``.DOMAIN``
    and ``*.DOMAIN`` are for the subdomains only.
    """
    if entry == "*":
        return True
    if "/" in entry:
        try:
            return address is not None and address in ip_network(entry, strict=False)
        except ValueError:
            return False
    name, wanted = entry, ""
    if found := re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::(\d+))?", entry):
        name, wanted = found[1].strip("[]"), found[2] or ""
    if wanted and int(wanted) != port:
        return False
    if (listed := _parse_address(name)) is not None:
        return listed == address
    name = name.removeprefix("*")
    return bool(name) and (host == name or host.endswith(name if name.startswith(".") else f".{name}"))


def _parse_address(host: str) -> IPv4Address | IPv6Address | None:
    """Return an IP address, or None for a name."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
