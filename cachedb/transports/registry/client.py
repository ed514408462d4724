"""HTTP to a registry: authorization, redirects, proxies, certificates, and tries until there is an answer.

What a registry says is a stranger's word. Bodies are read to a limit, content is verified by whoever receives it, and
credentials go to the registry they are for and to the token server it names; never along a redirect, nor into an error.
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

from cachedb.disk.writer import CHUNK
from cachedb.errors import CacheError, RegistryError, RegistryUnavailable, ignore_os_errors
from cachedb.text import shorten
from cachedb.threads import start
from cachedb.transports.registry import credentials
from cachedb.transports.registry.places import Place
from cachedb.transports.registry.tls import advise_on_tls, make_tls_context

__all__ = ["TRIES", "Client", "finished", "plain", "read", "with_query"]


TRIES: Final = 5
"""How often something is tried that may succeed yet."""

_TIMEOUT = Timeout(connect=10, read=60)  # seconds; the second for each read from the socket
_STORING = Timeout(connect=60, read=600)  # for each write of a body, and for a registry to put it away
_FIRST_PAUSE = 0.5  # seconds before the second try; it doubles, and Retry-After counts where there is one
_LONGEST_PAUSE = 60.0  # seconds; a registry that wants more time is said to be unavailable
_REDIRECTS = 5
_NAP = 0.05  # seconds between two looks at whether to wait on
_CONNECTIONS = 16  # to one host, kept open
_TOKEN_LIMIT = 1024 * 1024  # bytes
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_CHALLENGE = re.compile(r'\b(\w+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,]+))')  # RFC 9110, 11.6.1

_OBJECT = re.compile(r"^(?:<.*>|\w+\(host=[^)]*\)): ")

Body = bytes | str | Iterable[bytes]
"""What is sent; from its beginning each time it is iterated over."""


class Client:
    """Who speaks with a registry about one repository. Usable from several threads."""

    def __init__(self, where: Place, authfile: str | os.PathLike[str] | None, *, push: bool = False) -> None:
        """Nothing is sent yet.

        Args:
            where: the repository is.
            authfile: to take credentials from; None for the usual files.
            push: ask for tokens to write with at once.
        """
        self.place = where
        self._authfile, self._push = authfile, push
        self._guard, self._authorizing = threading.RLock(), threading.RLock()
        self._pools: dict[tuple[bool, str | None, str | None], urllib3.PoolManager] = {}
        self._authorization = ""
        self._stopped = threading.Event()
        self._connections: WeakSet[HTTPConnection] = WeakSet()
        self._pool_classes = _pool_classes(self._connect)

    def close(self) -> None:
        """Close all connections."""
        for pool in self._pools.values():
            pool.clear()

    def stop(self) -> None:
        """End what other threads wait for, with an error each, and let them begin nothing more.

        A registry may take ten minutes for an answer, and whoever wants us to stop has no such time.
        """
        self._stopped.set()
        with self._guard:
            connections = list(self._connections)
        for connection in connections:
            _wake(connection)

    def _connect(self, connection: HTTPConnection, connect: Callable[[], None]) -> None:
        """Make a connection, in a thread that is left behind if there is a stop: nothing else ends its wait."""
        future = Future[None]()

        def run() -> None:
            try:
                connect()
                future.set_result(None)
            except BaseException as error:
                future.set_exception(error)

        if not start(threading.Thread(target=run, daemon=True)):
            run()
        while wait([future], _NAP).not_done:
            if self._stopped.is_set():
                raise CacheError("it was stopped, for other work beside it failed")
        future.result()
        self._connected(connection)

    def _connected(self, connection: HTTPConnection) -> None:
        with self._guard:
            self._connections.add(connection)
        if self._stopped.is_set():
            _wake(connection)

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
        """Send a request until it is answered, with a pause after each failure that may pass.

        Args:
            method: of HTTP.
            url: in the repository, or of a token server.
            what: how to call in an error what is asked for.
            headers: of the request.
            good: the statuses hoped for.
            token: it is for a token: it has credentials of its own, which go nowhere else.
            body: of the request.
            failed: for a request that must not be sent again as it is: how often one like it failed before. The pause
                is made, and the failure raised.

        Raises:
            RegistryUnavailable: if the registry cannot be reached, or is overloaded.
            RegistryError: if it refuses, or has no such thing.
        """
        tries, asked = failed or 0, token
        while True:
            tries += 1
            sent = self._authorization
            try:
                response, ours = self._send(method, url, headers, "" if token else sent, body, redirects=not token)
            except HTTPError as error:
                if tries == TRIES or _is_final(error):
                    raise self._unreachable(error) from None  # what urllib3 raised may have what was sent
                self.pause(tries, None)
                if failed is not None:
                    raise self._unreachable(error) from None
                continue
            if response.status in good:
                return response
            with response:
                # Whoever it sent us to may not say where its credentials go.
                if response.status == 401 and ours and not asked and tries < TRIES:
                    asked = self._authorize(response, sent)
                    continue
                if response.status not in _AGAIN or tries == TRIES or not self.pause(tries, response):
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
        """Send a request, and follow redirects to where they lead; say whether that is the registry still."""
        for _ in range(_REDIRECTS + 1):
            if self._stopped.is_set():
                raise CacheError("it was stopped, for other work beside it failed")
            ours = _origin(url) == _origin(self.place.url)
            secret = {"Authorization": authorization} if authorization and ours else {}
            response = self._pool(url, ours=ours).request(
                method,
                url,
                body=body,
                headers={"User-Agent": "cachedb", "Accept-Encoding": "identity", **headers, **secret},
                redirect=False,
                retries=False,
                timeout=_TIMEOUT if body is None else _STORING,
                preload_content=False,
            )
            location = response.get_redirect_location()
            if not location or not redirects:
                with suppress(KeyError, ValueError):  # it is said by the URL that answers, not the one asked first
                    response.headers["Location"] = urljoin(url, response.headers["Location"])
                return response, ours
            response.close()
            url = self.follow(url, location)
        raise RegistryError(f"{self.place.registry} redirects more than {_REDIRECTS} times")

    def follow(self, url: str, location: str) -> str:
        """Return where an answer sends us.

        Raises:
            RegistryError: if that is nowhere, no URL, or is not HTTPS where we have been.
        """
        if not location:
            raise RegistryError(f"{self.place.registry} does not say where to go on: it is no registry, or is broken")
        try:
            following = urljoin(url, location)
        except ValueError:
            raise RegistryError(f"{self.place.registry} sends us to what is no URL") from None
        if _origin(following)[0] not in ({"https"} if _origin(url)[0] == "https" else {"http", "https"}):
            raise RegistryError(f"{self.place.registry} sends us to what is not HTTPS")
        return following

    def pause(self, tries: int, response: urllib3.BaseHTTPResponse | None) -> bool:
        """Wait before the next try; say whether it is worth it: not if the registry wants more time than we have."""
        seconds = _FIRST_PAUSE * 2 ** (tries - 1) * random.uniform(0.75, 1.25)  # noqa: S311 - so that not all come at once
        after = response.headers.get("Retry-After", "") if response else ""
        if after.isdecimal():
            seconds = max(seconds, int(after[:9]))
        else:
            with suppress(ValueError, OverflowError):  # of a year that no calendar has
                if date := email.utils.parsedate_tz(after):
                    seconds = max(seconds, email.utils.mktime_tz(date) - time.time())
        if seconds > _LONGEST_PAUSE:
            return False
        _sleep(seconds, self._stopped)
        return True

    def _pool(self, url: str, *, ours: bool) -> urllib3.PoolManager:
        """Return the connections for a URL: through a proxy if the environment says so."""
        parts = parse_url(url)
        proxy = None if proxy_bypass(parts.host or "") else getproxies().get(parts.scheme or "")
        key = ours, parts.scheme, proxy
        with self._guard:
            if key not in self._pools:
                context = make_tls_context(self.place.registry if ours else None) if parts.scheme == "https" else None
                if proxy:
                    login = _proxy_headers(proxy)
                    pool: urllib3.PoolManager = urllib3.ProxyManager(
                        proxy, proxy_headers=login, maxsize=_CONNECTIONS, ssl_context=context
                    )
                else:
                    pool = urllib3.PoolManager(maxsize=_CONNECTIONS, ssl_context=context)
                pool.pool_classes_by_scheme = self._pool_classes
                self._pools[key] = pool
            return self._pools[key]

    def _authorize(self, response: urllib3.BaseHTTPResponse, sent: str) -> bool:
        """Get what the registry asks for; of several threads that were refused the same, one does. Say if it is us."""
        challenges = [text.strip().partition(" ") for text in response.headers.getlist("WWW-Authenticate")]
        known = {scheme.lower(): rest for scheme, _, rest in challenges}
        with self._authorizing:
            if self._authorization != sent:
                return False  # and it may be for less than we need
            if "bearer" in known:
                said = {key.lower(): quoted or bare for key, quoted, bare in _CHALLENGE.findall(known["bearer"])}
                self._authorization = f"Bearer {self._token(said)}"
                return True
            login = self._login()
            if "basic" not in known or login is None or not login.password:
                raise self.refusal(self.place.repository, response)
            self._authorization = _basic(login)
            return True

    def _login(self) -> credentials.Credentials | None:
        return credentials.find(self.place.registry, self.place.repository, self._authfile, stopped=self._stopped)

    def _token(self, said: Mapping[str, str]) -> str:
        """Get a token where the registry says (distribution's token and OAuth2 specifications)."""
        realm = said.get("realm", "")
        scheme, host, _ = _origin(realm)
        if scheme not in ("http", "https") or (self.place.url.startswith("https:") and scheme != "https"):
            raise RegistryError(f"{self.place.registry} names {shorten(realm)} for tokens, which is not HTTPS")
        asked = {"service": said.get("service", "")}
        ours = f"repository:{self.place.repository}:pull"
        scopes = (said.get("scope") or ours).split()
        # Some registries have no token to read what is not there yet, and make it for who asks to write.
        asked["scope"] = " ".join(f"{ours},push" if self._push and scope == ours else scope for scope in scopes)
        login, headers, body = self._login(), {}, None
        if login and login.identity_token:
            form = {**asked, "grant_type": "refresh_token", "client_id": "cachedb"}
            body = urlencode({**form, "refresh_token": login.identity_token})
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        else:
            realm = with_query(realm, asked)
            if login:
                headers["Authorization"] = _basic(login)
        what = f"a token for {self.place.repository}"
        with self.request("POST" if body else "GET", realm, what, headers, token=True, body=body) as response:
            data = read(response, _TOKEN_LIMIT, f"the token of {host}")
        try:
            document = json.loads(data)
            token = document.get("token") or document.get("access_token")
        except (ValueError, AttributeError, RecursionError):
            token = None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise RegistryError(f"{host} gives no token that can be used") from None
        return token

    def _unreachable(self, error: HTTPError) -> RegistryError:
        """Return the error for a registry that did not answer."""
        host = self.place.registry
        reason = getattr(error, "reason", None) or error
        if isinstance(error, SSLError) and _is_final(error):
            return RegistryError(f"{host} cannot be trusted: {plain(reason)}; {advise_on_tls(host, error)}")
        if isinstance(error, NameResolutionError):
            return RegistryUnavailable(f"{host} is not known by that name; check it, and the network")
        return RegistryUnavailable(f"{host} cannot be reached: {plain(reason)}")

    def refusal(self, what: str, response: urllib3.BaseHTTPResponse) -> RegistryError:
        """Return the error for an answer that is none of those hoped for."""
        host, said = self.place.registry, f"{response.status}{_said(response)}"
        if response.status in (401, 403):
            return RegistryError(
                f"{host} refuses {what} ({said}); log in with `skopeo login {host}` or `docker login {host}`, "
                "or name a file of credentials with --authfile"
            )
        if response.status == 404:
            return RegistryError(f"{host} has no {what} ({said})")
        if response.status in _AGAIN:
            return RegistryUnavailable(f"{host} is overloaded, or failing ({said}); try again later")
        if response.status == 405:
            return RegistryError(f"{host} does not take {what} ({said}); it is read-only, or only a mirror")
        # What speaks HTTPS says that of itself, and not as a registry does.
        advice = "; if it speaks HTTPS, use --tls" if said == "400" and self.place.url.startswith("http:") else ""
        return RegistryError(f"{host} answers {said} to a request for {what}{advice}")


def _pool_classes(
    connect: Callable[[HTTPConnection, Callable[[], None]], None],
) -> dict[str, type[urllib3.HTTPConnectionPool]]:
    """Return what urllib3 makes connections with, by scheme: by what is given, with the connection and how it would."""

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


def _wake(connection: HTTPConnection) -> None:
    """Have the thread that waits for a connection see its end."""
    if isinstance(connection.sock, socket.socket):
        with ignore_os_errors():
            socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)  # TLS's own would take the thread's state away


def _sleep(seconds: float, stopped: threading.Event) -> None:
    stopped.wait(seconds)


def _is_final(error: HTTPError) -> bool:
    """Say whether another try would fail as well. With TLS it need not: a connection that ends can be an SSLError."""
    if isinstance(error, SSLError):
        return not any(isinstance(cause, (ssl.SSLEOFError, ssl.SSLZeroReturnError)) for cause in error.args)
    return isinstance(error, NewConnectionError)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    """Return what has to be the same for credentials to be sent.

    Raises:
        RegistryError: if it is no URL. It is not quoted, for there may be a secret in it.
    """
    try:
        # As the connection is made: another parser may see another host.
        parts = parse_url(url)
    except ValueError:
        raise RegistryError("a registry sends us to what is no URL") from None
    scheme = parts.scheme or ""
    return scheme, parts.host, parts.port or {"http": 80, "https": 443}.get(scheme)


def with_query(url: str, values: Mapping[str, str]) -> str:
    """Return a URL with these values in its query, behind those that it has."""
    return f"{url}{'&' if '?' in url else '?'}{urlencode(values)}"


def _basic(login: credentials.Credentials) -> str:
    return "Basic " + base64.b64encode(f"{login.username}:{login.password}".encode()).decode()


def _proxy_headers(proxy: str) -> dict[str, str]:
    login = parse_url(proxy).auth
    return make_headers(proxy_basic_auth=login) if login else {}


@contextmanager
def finished(response: urllib3.BaseHTTPResponse) -> Iterator[urllib3.BaseHTTPResponse]:
    """Give the block an answer whose body is small, or not wanted: read to its end, its connection is used again."""
    with response:
        yield response
        with suppress(HTTPError):
            response.read1(CHUNK, decode_content=False)


def read(response: urllib3.BaseHTTPResponse, limit: int, what: str) -> bytes:
    """Read a small body.

    Raises:
        RegistryError: if it is over the limit, or cut off.
    """
    try:
        data = b""
        while chunk := response.read(min(CHUNK, limit + 1 - len(data)), decode_content=False):
            data += chunk
            if len(data) > limit:
                raise RegistryError(f"{what} is over {limit} bytes")
    except HTTPError as error:
        raise RegistryUnavailable(f"{what} was cut off: {plain(error)}; try again") from None
    return data


def _said(response: urllib3.BaseHTTPResponse) -> str:
    """Return what an answer says of itself (distribution specification, "Error Codes"), fit for one line."""
    try:
        document = json.loads(response.read(_TOKEN_LIMIT, decode_content=False))
        error = document["errors"][0]
        return f" {plain(error['code'])}: {plain(error.get('message', ''))}"
    except (HTTPError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""


def plain(text: object) -> str:
    """Return a stranger's text, short and on one line; urllib3's own begins with an object, or has its cause as one."""
    if isinstance(text, (ProtocolError, ProxyError)) and len(text.args) == 2:
        what, cause = text.args
        text = what if str(cause) in str(what) else f"{str(what).rstrip('.')}: {plain(cause)}"
    line = " ".join(_OBJECT.sub("", str(text), count=1).split())
    line = "".join(char if char.isprintable() else "?" for char in line)
    return line if len(line) <= 200 else f"{line[:200]}..."
