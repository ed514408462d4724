"""Explain why a request failed, and which host: the registry, token server, proxy or another one."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Final, Literal, NamedTuple

import urllib3
from urllib3.exceptions import (
    HTTPError,
    NameResolutionError,
    NewConnectionError,
    ProtocolError,
    ProxyError,
    ReadTimeoutError,
    SSLError,
)

from cachedb.errors import RegistryError, RegistryUnavailable
from cachedb.transports.registry.answers import read_error_detail, to_one_line
from cachedb.transports.registry.heads import SlowHead
from cachedb.transports.registry.places import Place
from cachedb.transports.registry.proxies import Proxy, find_proxy
from cachedb.transports.registry.redaction import redact
from cachedb.transports.registry.tls import Certificates, advise_on_tls
from cachedb.transports.registry.urls import host_of

__all__ = ["RETRY_STATUSES", "NoAnswer", "explain_no_answer", "explain_refusal", "is_final", "name_host"]


# Cloudflare sends 520 to 524.
RETRY_STATUSES: Final = frozenset({408, 429, 500, 502, 503, 504, *range(520, 525)})
"""The statuses of failures that may be temporary."""


class NoAnswer(Exception):
    """A request to a URL got no answer."""

    def __init__(self, url: str, error: HTTPError) -> None:
        super().__init__(url, error)
        self.url, self.error = url, error


class _Host(NamedTuple):
    """A host that failed."""

    name: str  # in messages
    address: str  # host[:port]
    role: Literal["registry", "token server", "other host"]


def name_host(place: Place, url: str) -> str:
    """Return the name of the host of a URL in messages: the registry, or a host that it names."""
    return _find_host(place, url, is_token=False).name


def _find_host(place: Place, url: str, *, is_token: bool) -> _Host:
    address = redact(host_of(url))
    if host_of(url) in (host_of(place.url), place.registry):
        return _Host(place.registry, place.registry, "registry")
    if is_token:
        return _Host(f"{address} (token server of {place.registry})", address, "token server")
    return _Host(f"{address} (named by {place.registry})", address, "other host")


def is_final(error: HTTPError) -> bool:
    """Return whether a retry would fail too, or would wait too long again.

    An SSLError that only reports a closed connection is not final.
    """
    if isinstance(error, SSLError):
        return not any(isinstance(cause, (ssl.SSLEOFError, ssl.SSLZeroReturnError)) for cause in error.args)
    if isinstance(error, ProtocolError):
        return any(isinstance(cause, SlowHead) for cause in error.args)
    if isinstance(error, ProxyError):
        cause = error.original_error
        return isinstance(cause, NewConnectionError) or str(cause).startswith("Tunnel connection failed: 4")
    return isinstance(error, (NewConnectionError, ReadTimeoutError))


def explain_no_answer(
    place: Place,
    failure: NoAnswer,
    certificates: Callable[[str], Certificates],
    seconds: float,
    *,
    is_token: bool,
) -> RegistryError:
    """Return the error for a request without an answer.

    Args:
        place: the place of the repository.
        failure: the failure.
        certificates: returns the certificates that were used for a URL.
        seconds: how long the client waited for the answer.
        is_token: whether a token was requested.
    """
    host, error = _find_host(place, failure.url, is_token=is_token), failure.error
    proxy = find_proxy(failure.url)
    if proxy and isinstance(error, ProxyError):
        return _explain_proxy(proxy, host, to_one_line(error.original_error))
    reason = to_one_line(getattr(error, "reason", None) or error)
    if isinstance(error, SSLError) and is_final(error):
        advice = advise_on_tls(host.address, certificates(failure.url), error)
        return RegistryError(f"{host.name} cannot be trusted: {reason}: {advice}")
    if isinstance(error, ReadTimeoutError):
        return RegistryUnavailable(f"{host.name} sent no answer in {seconds:g} seconds: wait longer with --timeout")
    if isinstance(error, NameResolutionError):
        return RegistryUnavailable(f"{host.name} cannot be resolved: check the name and the network")
    return RegistryUnavailable(f"{host.name} cannot be reached: {reason}")


def _explain_proxy(proxy: Proxy, host: _Host, reason: str) -> RegistryError:
    name = f"{host_of(proxy.url)} (proxy for {host.address})"
    if "407" in reason:
        return RegistryError(f"{name} refuses: {reason}: put USER:PASSWORD@ before its host in {proxy.variable}")
    return RegistryUnavailable(f"{name} fails: {reason}: check {proxy.variable}, or add the host to no_proxy")


def explain_refusal(place: Place, what: str, response: urllib3.BaseHTTPResponse, *, is_token: bool) -> RegistryError:
    """Return the error for an answer with an unexpected status.

    Args:
        place: the place of the repository.
        what: the name of the requested thing.
        response: the answer.
        is_token: whether a token was requested.
    """
    url, detail = response.url or place.url, f"{response.status}{read_error_detail(response)}"
    host, registry = _find_host(place, url, is_token=is_token), place.registry
    if response.status == 407 and (proxy := find_proxy(url)):
        return _explain_proxy(proxy, host, detail)
    if response.status in (401, 403) and host.role == "other host":
        return RegistryError(
            f"{host.name} refuses {what} ({detail}): the link may have expired: check "
            "the clock of this host, and try again"
        )
    if response.status in (401, 403):
        return RegistryError(
            f"{host.name} refuses {what} ({detail}): log in with `skopeo login {registry}` or "
            f"`docker login {registry}`, or name a file of credentials with --authfile"
        )
    if response.status == 404:
        return RegistryError(f"{host.name} has no {what} ({detail})")
    if response.status in RETRY_STATUSES:
        return RegistryUnavailable(f"{host.name} is overloaded, or failing ({detail}): try again later")
    if response.status == 405:
        return RegistryError(
            f"{host.name} does not accept {what} ({detail}): check that it is neither read-only nor a mirror"
        )
    # A server that expects HTTPS answers 400 to HTTP, without a registry's error document.
    is_tls = detail == "400" and url.startswith("http:")
    advice = "if it speaks HTTPS, use --tls" if is_tls else "check that it is a registry"
    return RegistryError(f"{host.name} answers {detail} to a request for {what}: {advice}")
