"""Send HTTP requests to a registry, with authorization, redirects, proxies, certificates and retries.

Answers are untrusted. Bodies are read up to a limit, and the receiver verifies content. Credentials are sent only to
their registry and to the token server it names. Credentials are not sent to another host after a redirect. They never
appear in an error.
"""

from __future__ import annotations

import base64
import email.utils
import json
import os
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from typing import Final
from urllib.parse import urlencode, urljoin
from urllib.request import getproxies, proxy_bypass
from weakref import WeakSet

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, NameResolutionError, NewConnectionError, ProtocolError, ProxyError, SSLError
from urllib3.util import Timeout, make_headers, parse_url

from cachedb.disk.writer import CHUNK_BYTES
from cachedb.errors import CacheError, RegistryError, RegistryUnavailable, ignore_os_errors
from cachedb.text import shorten
from cachedb.threads import start
from cachedb.transports.registry import credentials
from cachedb.transports.registry.places import Place
from cachedb.transports.registry.tls import advise_on_tls, make_tls_context

__all__ = ["TRIES", "Client", "drain_after", "read_body", "to_one_line", "with_query"]


TRIES: Final = 5
"""How many times a request is sent in total, if its failures may be temporary."""

_TIMEOUT = Timeout(connect=10, read=60)  # seconds; `read` applies to each read from the socket
_BODY_TIMEOUT = Timeout(connect=60, read=600)  # a registry may take long to store a body
_FIRST_PAUSE_SECONDS = 0.5  # before the first retry; it doubles each time, and a longer Retry-After is respected
_MAX_PAUSE_SECONDS = 60.0  # a registry that asks for more time counts as unavailable
_MAX_REDIRECTS = 5
_POLL_SECONDS = 0.05  # between checks for a stop
_MAX_CONNECTIONS = 16  # kept open to one host
_TOKEN_LIMIT = 1024 * 1024  # bytes
_RETRY_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
_CHALLENGE = re.compile(r'\b(\w+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,]+))')  # RFC 9110, 11.6.1

_OBJECT_REPR = re.compile(r"^(?:<.*>|\w+\(host=[^)]*\)): ")  # the repr that urllib3 puts before a message

Body = bytes | str | Iterable[bytes]
"""The body of a request. An iterable must start again at each iteration, because a retry sends the body again."""


class Client:
    """HTTP client for one repository; safe to use from several threads."""

    def __init__(self, place: Place, authfile: str | os.PathLike[str] | None, *, push: bool = False) -> None:
        """Create a client without sending anything.

        Args:
            place: the place of the repository.
            authfile: a file of credentials; None for the usual files.
            push: request tokens with write access from the start.
        """
        self.place = place
        self._authfile, self._push = authfile, push
        self._guard, self._authorization_lock = threading.RLock(), threading.RLock()
        self._pools: dict[tuple[bool, str | None, str | None], urllib3.PoolManager] = {}
        self._authorization = ""
        self._stopped = threading.Event()
        self._connections: WeakSet[HTTPConnection] = WeakSet()
        self._pool_classes = _create_pool_classes(self._connect)

    def close(self) -> None:
        """Close all connections."""
        for pool in self._pools.values():
            pool.clear()

    def stop(self) -> None:
        """Cancel running requests and refuse new ones.

        Without it, a cancelled transfer could wait ten minutes for a slow registry.
        """
        self._stopped.set()
        with self._guard:
            connections = list(self._connections)
        for connection in connections:
            _shut_down(connection)

    def _connect(self, connection: HTTPConnection, connect: Callable[[], None]) -> None:
        """Connect in a thread, which is abandoned on a stop because connecting cannot be cancelled."""
        future = Future[None]()

        def run() -> None:
            try:
                connect()
                future.set_result(None)
            except BaseException as error:
                future.set_exception(error)

        if not start(threading.Thread(target=run, daemon=True)):
            run()
        while wait([future], _POLL_SECONDS).not_done:
            if self._stopped.is_set():
                raise CacheError("cancelled: another transfer failed")
        future.result()
        self._add_connection(connection)

    def _add_connection(self, connection: HTTPConnection) -> None:
        with self._guard:
            self._connections.add(connection)
        if self._stopped.is_set():
            _shut_down(connection)

    def request(
        self,
        method: str,
        url: str,
        what: str,
        headers: Mapping[str, str],
        *,
        good: tuple[int, ...] = (200,),
        token: bool = False,
        body: Body | None = None,
        failed: int | None = None,
    ) -> urllib3.BaseHTTPResponse:
        """Send a request, and retry after a pause if the failure may be temporary.

        Args:
            method: the HTTP method.
            url: a URL of the repository or of a token server.
            what: the name of the requested thing in error messages.
            headers: the headers of the request.
            good: the expected statuses.
            token: True if this requests a token. Its headers or body carry credentials, so redirects are not followed.
            body: the body of the request.
            failed: the number of earlier failures, if the caller itself must retry with a changed request. After a
                temporary failure, `request` pauses and then raises; None to retry here.

        Raises:
            RegistryUnavailable: if the registry is unreachable or overloaded.
            RegistryError: if the registry refuses the request, or does not have the requested thing.
        """
        tries, has_asked = failed or 0, token
        while True:
            tries += 1
            sent = self._authorization
            try:
                response, is_ours = self._send(method, url, headers, "" if token else sent, body, redirects=not token)
            except HTTPError as error:
                if tries == TRIES or _is_final(error):
                    raise self._explain_unreachable(error) from None  # urllib3's error may contain credentials
                self.pause(tries, None)
                if failed is not None:
                    raise self._explain_unreachable(error) from None
                continue
            if response.status in good:
                return response
            with response:
                # Only the registry itself may name a token server, not the target of a redirect.
                if response.status == 401 and is_ours and not has_asked and tries < TRIES:
                    has_asked = self._authorize(response, sent)
                    continue
                if response.status not in _RETRY_STATUSES or tries == TRIES or not self.pause(tries, response):
                    raise self.refusal(what, response)
                if failed is not None:
                    raise self.refusal(what, response)

    def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        authorization: str,
        body: Body | None,
        *,
        redirects: bool,
    ) -> tuple[urllib3.BaseHTTPResponse, bool]:
        """Send a request and follow redirects; return the answer and whether the registry itself sent it."""
        for _ in range(_MAX_REDIRECTS + 1):
            if self._stopped.is_set():
                raise CacheError("cancelled: another transfer failed")
            is_ours = _origin(url) == _origin(self.place.url)
            secret = {"Authorization": authorization} if authorization and is_ours else {}
            response = self._get_pool(url, is_ours=is_ours).request(
                method,
                url,
                body=body,
                headers={"User-Agent": "cachedb", "Accept-Encoding": "identity", **headers, **secret},
                redirect=False,
                retries=False,
                timeout=_TIMEOUT if body is None else _BODY_TIMEOUT,
                preload_content=False,
            )
            location = response.get_redirect_location()
            if not location or not redirects:
                with suppress(KeyError, ValueError):  # Location is relative to the URL that answered
                    response.headers["Location"] = urljoin(url, response.headers["Location"])
                return response, is_ours
            response.close()
            url = self.follow(url, location)
        raise RegistryError(f"{self.place.registry} redirects more than {_MAX_REDIRECTS} times")

    def follow(self, url: str, location: str) -> str:
        """Return the absolute URL of a Location header.

        Raises:
            RegistryError: if the location is missing or not a URL, or if its scheme is not allowed. Only HTTPS is
                allowed after HTTPS; HTTP and HTTPS are allowed after HTTP.
        """
        if not location:
            raise RegistryError(f"{self.place.registry}: answer without a Location: check that it is a registry")
        try:
            following = urljoin(url, location)
        except ValueError:
            raise RegistryError(f"{self.place.registry}: redirect to an invalid URL") from None
        if _origin(following)[0] not in ({"https"} if _origin(url)[0] == "https" else {"http", "https"}):
            raise RegistryError(f"{self.place.registry}: redirect to a URL whose scheme is not allowed")
        return following

    def pause(self, tries: int, response: urllib3.BaseHTTPResponse | None) -> bool:
        """Wait before a retry; return False without waiting if the registry asks for too long a pause."""
        jitter = random.uniform(0.75, 1.25)  # noqa: S311 - clients should not retry all at once
        seconds = _FIRST_PAUSE_SECONDS * 2 ** (tries - 1) * jitter
        after = response.headers.get("Retry-After", "") if response else ""
        if after.isdecimal():
            seconds = max(seconds, int(after[:9]))
        else:
            with suppress(ValueError, OverflowError):  # an impossible date
                if date := email.utils.parsedate_tz(after):
                    seconds = max(seconds, email.utils.mktime_tz(date) - time.time())
        if seconds > _MAX_PAUSE_SECONDS:
            return False
        _sleep(seconds, self._stopped)
        return True

    def _get_pool(self, url: str, *, is_ours: bool) -> urllib3.PoolManager:
        """Return the connection pool for a URL, through a proxy if the environment sets one."""
        parts = parse_url(url)
        proxy = None if proxy_bypass(parts.host or "") else getproxies().get(parts.scheme or "")
        key = is_ours, parts.scheme, proxy
        with self._guard:
            if key not in self._pools:
                context = (
                    make_tls_context(self.place.registry if is_ours else None) if parts.scheme == "https" else None
                )
                if proxy:
                    login = _build_proxy_headers(proxy)
                    pool: urllib3.PoolManager = urllib3.ProxyManager(
                        proxy, proxy_headers=login, maxsize=_MAX_CONNECTIONS, ssl_context=context
                    )
                else:
                    pool = urllib3.PoolManager(maxsize=_MAX_CONNECTIONS, ssl_context=context)
                pool.pool_classes_by_scheme = self._pool_classes
                self._pools[key] = pool
            return self._pools[key]

    def _authorize(self, response: urllib3.BaseHTTPResponse, sent: str) -> bool:
        """Get the authorization for a challenge; return False if another thread got it meanwhile."""
        challenges = [text.strip().partition(" ") for text in response.headers.getlist("WWW-Authenticate")]
        known = {scheme.lower(): rest for scheme, _, rest in challenges}
        with self._authorization_lock:
            if self._authorization != sent:
                return False  # the new token may still lack our scope; then the caller asks again
            if "bearer" in known:
                challenge = {key.lower(): quoted or bare for key, quoted, bare in _CHALLENGE.findall(known["bearer"])}
                self._authorization = f"Bearer {self._request_token(challenge)}"
                return True
            login = self._find_login()
            if "basic" not in known or login is None or not login.password:
                raise self.refusal(self.place.repository, response)
            self._authorization = _format_basic(login)
            return True

    def _find_login(self) -> credentials.Credentials | None:
        return credentials.find(self.place.registry, self.place.repository, self._authfile, stopped=self._stopped)

    def _request_token(self, challenge: Mapping[str, str]) -> str:
        """Request a token from the token server that a challenge names.

        The token and OAuth2 specifications of distribution define the request.
        """
        realm = challenge.get("realm", "")
        scheme, host, _ = _origin(realm)
        if scheme not in ("http", "https") or (self.place.url.startswith("https:") and scheme != "https"):
            raise RegistryError(
                f"{self.place.registry}: the scheme of the token server {shorten(realm)} is not allowed"
            )
        query = {"service": challenge.get("service", "")}
        read_scope = f"repository:{self.place.repository}:pull"
        scopes = (challenge.get("scope") or read_scope).split()
        # For a repository that does not exist, some registries refuse a read token but grant a write token and create
        # the repository.
        query["scope"] = " ".join(
            f"{read_scope},push" if self._push and scope == read_scope else scope for scope in scopes
        )
        login, headers, body = self._find_login(), {}, None
        if login and login.identity_token:
            form = {**query, "grant_type": "refresh_token", "client_id": "cachedb"}
            body = urlencode({**form, "refresh_token": login.identity_token})
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        else:
            realm = with_query(realm, query)
            if login:
                headers["Authorization"] = _format_basic(login)
        what = f"a token for {self.place.repository}"
        with self.request("POST" if body else "GET", realm, what, headers, token=True, body=body) as response:
            data = read_body(response, _TOKEN_LIMIT, f"the token of {host}")
        try:
            document = json.loads(data)
            token = document.get("token") or document.get("access_token")
        except (ValueError, AttributeError, RecursionError):
            token = None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise RegistryError(f"{host} sent no usable token") from None
        return token

    def _explain_unreachable(self, error: HTTPError) -> RegistryError:
        """Return the error for a registry that did not answer."""
        host = self.place.registry
        reason = getattr(error, "reason", None) or error
        if isinstance(error, SSLError) and _is_final(error):
            return RegistryError(f"{host} cannot be trusted: {to_one_line(reason)}; {advise_on_tls(host, error)}")
        if isinstance(error, NameResolutionError):
            return RegistryUnavailable(f"{host} cannot be resolved: check the name and the network")
        return RegistryUnavailable(f"{host} cannot be reached: {to_one_line(reason)}")

    def refusal(self, what: str, response: urllib3.BaseHTTPResponse) -> RegistryError:
        """Return the error for an answer with an unexpected status; ``what`` names the requested thing."""
        host, detail = self.place.registry, f"{response.status}{_read_error_detail(response)}"
        if response.status in (401, 403):
            return RegistryError(
                f"{host} refuses {what} ({detail}); log in with `skopeo login {host}` or `docker login {host}`, "
                "or name a file of credentials with --authfile"
            )
        if response.status == 404:
            return RegistryError(f"{host} has no {what} ({detail})")
        if response.status in _RETRY_STATUSES:
            return RegistryUnavailable(f"{host} is overloaded, or failing ({detail}); try again later")
        if response.status == 405:
            return RegistryError(f"{host} does not accept {what} ({detail}); it may be read-only or a mirror")
        # A server that expects HTTPS answers 400 to HTTP, without a registry's error document.
        advice = "; if it speaks HTTPS, use --tls" if detail == "400" and self.place.url.startswith("http:") else ""
        return RegistryError(f"{host} answers {detail} to a request for {what}{advice}")


def _create_pool_classes(
    connect: Callable[[HTTPConnection, Callable[[], None]], None],
) -> dict[str, type[urllib3.HTTPConnectionPool]]:
    """Return urllib3 pool classes by scheme.

    Each connection calls ``connect`` with itself and its original connect method.
    """

    class Plain(HTTPConnection):
        def connect(self) -> None:
            connect(self, super().connect)

    class Secure(HTTPSConnection):
        def connect(self) -> None:
            connect(self, super().connect)

    class PlainPool(urllib3.HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(urllib3.HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}


def _shut_down(connection: HTTPConnection) -> None:
    """Shut a connection down, so that a thread waiting for it sees its end."""
    if isinstance(connection.sock, socket.socket):
        with ignore_os_errors():
            # The TLS socket's own shutdown would drop the TLS state that the thread still uses.
            socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)


def _sleep(seconds: float, stopped: threading.Event) -> None:
    stopped.wait(seconds)


def _is_final(error: HTTPError) -> bool:
    """Return whether a retry would fail too.

    An SSLError that only reports a closed connection is not final.
    """
    if isinstance(error, SSLError):
        return not any(isinstance(cause, (ssl.SSLEOFError, ssl.SSLZeroReturnError)) for cause in error.args)
    return isinstance(error, NewConnectionError)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    """Return the scheme, host and port of a URL; credentials are sent only to the same origin.

    Raises:
        RegistryError: if it is not a URL. The message does not quote it, because it may contain a secret.
    """
    try:
        # Parse with urllib3, as the connection does: another parser may find another host.
        parts = parse_url(url)
    except ValueError:
        raise RegistryError("a registry sent an invalid URL") from None
    scheme = parts.scheme or ""
    return scheme, parts.host, parts.port or {"http": 80, "https": 443}.get(scheme)


def with_query(url: str, values: Mapping[str, str]) -> str:
    """Append values to the query of a URL."""
    return f"{url}{'&' if '?' in url else '?'}{urlencode(values)}"


def _format_basic(login: credentials.Credentials) -> str:
    return "Basic " + base64.b64encode(f"{login.username}:{login.password}".encode()).decode()


def _build_proxy_headers(proxy: str) -> dict[str, str]:
    login = parse_url(proxy).auth
    return make_headers(proxy_basic_auth=login) if login else {}


@contextmanager
def drain_after(response: urllib3.BaseHTTPResponse) -> Iterator[urllib3.BaseHTTPResponse]:
    """Yield an answer and read the rest of its small body at the end, so that its connection is reused."""
    with response:
        yield response
        with suppress(HTTPError):
            response.read1(CHUNK_BYTES, decode_content=False)


def read_body(response: urllib3.BaseHTTPResponse, limit: int, what: str) -> bytes:
    """Read the body of an answer.

    Raises:
        RegistryError: if it has more than ``limit`` bytes, or is interrupted.
    """
    try:
        data = b""
        while chunk := response.read(min(CHUNK_BYTES, limit + 1 - len(data)), decode_content=False):
            data += chunk
            if len(data) > limit:
                raise RegistryError(f"{what} is over {limit} bytes")
    except HTTPError as error:
        raise RegistryUnavailable(f"{what} was interrupted: {to_one_line(error)}; try again") from None
    return data


def _read_error_detail(response: urllib3.BaseHTTPResponse) -> str:
    """Return the code and message of an error answer on one line, or an empty string.

    The distribution specification defines them in "Error Codes".
    """
    try:
        document = json.loads(response.read(_TOKEN_LIMIT, decode_content=False))
        error = document["errors"][0]
        return f" {to_one_line(error['code'])}: {to_one_line(error.get('message', ''))}"
    except (HTTPError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""


def to_one_line(text: object) -> str:
    """Return untrusted text on one line of at most 200 characters, without urllib3's object reprs."""
    if isinstance(text, (ProtocolError, ProxyError)) and len(text.args) == 2:
        what, cause = text.args
        text = what if str(cause) in str(what) else f"{str(what).rstrip('.')}: {to_one_line(cause)}"
    line = " ".join(_OBJECT_REPR.sub("", str(text), count=1).split())
    line = "".join(char if char.isprintable() else "?" for char in line)
    return line if len(line) <= 200 else f"{line[:200]}..."
