"""A registry, as a client sees it: the OCI distribution specification v1.1, which grew from Docker's registry API v2.

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
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlencode, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import HTTPError, NameResolutionError, NewConnectionError, SSLError
from urllib3.util import Timeout, make_headers, parse_url

from cachedb import credentials
from cachedb.errors import InvalidDigest, InvalidName, RegistryError, RegistryUnavailable
from cachedb.oci import DOCUMENT_LIMIT, INDEX_TYPES, MANIFEST_TYPES
from cachedb.reference import Digest, Name, parse_digest, shorten

__all__ = ["Blob", "Fetched", "Place", "Repository", "mirrors", "place"]

_HUB: Final = "docker.io"
_TIMEOUT = Timeout(connect=10, read=60)  # seconds; the second for each read from the socket
_SLOWEST = 1024  # bytes a second, in each minute: who sends less has stalled
_MINUTE = 60.0  # seconds
_TRIES = 5
_FIRST_PAUSE = 0.5  # seconds before the second try; it doubles, and Retry-After counts where there is one
_LONGEST_PAUSE = 60.0  # seconds; a registry that wants more time is said to be unavailable
_REDIRECTS = 5
_CONNECTIONS = 16  # to one host, kept open
_TOKEN_LIMIT = 1024 * 1024  # bytes
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_CERTIFICATES = ("/etc/containers/certs.d", "/etc/docker/certs.d", "~/.config/containers/certs.d")
_CHALLENGE = re.compile(r'(\w+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,]+))')  # RFC 9110, 11.6.1
_LOOPBACK = re.compile(r"(?:localhost|127(?:\.\d+){3}|\[::1\])(?::\d+)?")


class Place(NamedTuple):
    """Where a repository is on the wire."""

    url: str  # of the registry: scheme and host, with a prefix for some mirrors
    registry: str  # host[:port] as credentials know it; docker.io for Docker Hub
    repository: str


class Fetched(NamedTuple):
    """A manifest or index, as a registry has it."""

    digest: Digest | None  # as the registry says
    media_type: str | None  # as the registry says
    data: bytes


def place(name: Name, *, plain_http: bool | None = None) -> Place:
    """Return where a name is on the wire, as Docker has it: ``alpine`` is Docker Hub's ``library/alpine``.

    Args:
        name: of an image.
        plain_http: speak HTTP and not HTTPS; None for what is usual: HTTP with this host alone.
    """
    registry, _, repository = str(Name.parse(name).qualified()).partition("/")
    repository = repository.removesuffix(f"{'@' if name.digest else ':'}{name.reference}")
    plain = bool(_LOOPBACK.fullmatch(registry)) if plain_http is None else plain_http
    host = "registry-1.docker.io" if registry in (_HUB, "index.docker.io") else registry
    return Place(f"{'http' if plain else 'https'}://{host}", registry, repository)


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
        if not registry or not host or (separator and scheme not in ("http", "https")):
            raise InvalidName(f"CACHEDB_MIRRORS has {shorten(entry)}: expected REGISTRY=[http://]HOST[:PORT][/PREFIX]")
        if registry == origin.registry:
            scheme = scheme or ("http" if _LOOPBACK.fullmatch(host) else "https")
            path = f"{prefix}/{origin.repository}" if prefix else origin.repository
            found.append(Place(f"{scheme}://{host}", host, path))
    return found


class Repository:
    """A repository at a registry. Usable from several threads."""

    def __init__(self, where: Place, *, authfile: str | os.PathLike[str] | None = None) -> None:
        """Nothing is sent yet.

        Args:
            where: it is.
            authfile: to take credentials from, instead of the usual files.
        """
        self.place = where
        self._authfile = authfile
        self._guard, self._authorizing = threading.Lock(), threading.Lock()
        self._pools: dict[tuple[bool, str | None, str | None], urllib3.PoolManager] = {}
        self._authorization = ""

    def close(self) -> None:
        """Close all connections."""
        for pool in self._pools.values():
            pool.clear()

    def digest(self, reference: str) -> Digest | None:
        """Return the digest of a manifest, by one request; None if the registry does not say.

        Raises:
            RegistryError: if there is none, or it cannot be had.
        """
        headers = {"Accept": _accepted()}
        url = self._url(f"manifests/{reference}")
        with self._request("HEAD", url, self._named(reference), headers, good=(200, 405)) as response:
            return _said_digest(response.headers) if response.status == 200 else None

    def manifest(self, reference: str) -> Fetched:
        """Return a manifest or index.

        Raises:
            RegistryError: if there is none, or it cannot be had.
        """
        headers = {"Accept": _accepted()}
        with self._request("GET", self._url(f"manifests/{reference}"), self._named(reference), headers) as response:
            data = _read(response, DOCUMENT_LIMIT, f"manifest {reference} at {self.place.registry}")
            kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
            return Fetched(_said_digest(response.headers), kind if kind in _manifest_types() else None, data)

    def blob(self, digest: Digest, size: int, offset: int = 0) -> Blob:
        """Return a blob's content from an offset on, as a stream that goes on by itself where it is cut off."""
        return Blob(self, digest, size, offset)

    def open_blob(self, digest: Digest, offset: int) -> tuple[urllib3.BaseHTTPResponse, int]:
        """Ask for a blob's content; return the response, and where in the blob it begins.

        Raises:
            RegistryError: if there is none, or it cannot be had.
        """
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        response = self._request("GET", self._url(f"blobs/{digest}"), f"blob {digest}", headers, good=(200, 206))
        if response.status == 200:
            return response, 0
        begins = re.match(r"bytes (\d{1,18})-", response.headers.get("Content-Range", ""))
        if begins is None or int(begins[1]) != offset:
            response.close()
            raise RegistryError(
                f"{self.place.registry} was asked for the rest of {digest}, and sends another part of it"
            )
        return response, offset

    def _url(self, path: str) -> str:
        return f"{self.place.url}/v2/{self.place.repository}/{path}"

    def _named(self, reference: str) -> str:
        return str(Name(self.place.repository, reference))

    def _request(
        self,
        method: str,
        url: str,
        what: str,
        headers: Mapping[str, str],
        *,
        good: tuple[int, ...] = (200,),
        token: bool = False,
        body: str | None = None,
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

        Raises:
            RegistryUnavailable: if the registry cannot be reached, or is overloaded.
            RegistryError: if it refuses, or has no such thing.
        """
        tries, asked = 0, token
        while True:
            tries += 1
            sent = self._authorization
            try:
                response = self._send(method, url, headers, "" if token else sent, body, redirects=not token)
            except HTTPError as error:
                if tries == _TRIES or isinstance(error, (SSLError, NewConnectionError)):
                    raise self._unreachable(error) from None  # what urllib3 raised may have what was sent
                _pause(tries, None)
                continue
            if response.status in good:
                return response
            with response:
                if response.status == 401 and not asked:
                    asked = True
                    self._authorize(response, sent)
                    tries -= 1
                    continue
                if response.status not in _AGAIN or tries == _TRIES or not _pause(tries, response):
                    raise self._refusal(what, response)

    def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        authorization: str,
        body: str | None,
        *,
        redirects: bool,
    ) -> urllib3.BaseHTTPResponse:
        """Send a request, and follow redirects to where they lead."""
        for _ in range(_REDIRECTS + 1):
            origin = _origin(url)
            ours = origin == _origin(self.place.url)
            secret = {"Authorization": authorization} if authorization and ours else {}
            response = self._pool(url, ours=ours).request(
                method,
                url,
                body=body,
                headers={"User-Agent": "cachedb", "Accept-Encoding": "identity", **headers, **secret},
                redirect=False,
                retries=False,
                timeout=_TIMEOUT,
                preload_content=False,
            )
            location = response.get_redirect_location()
            if not location or not redirects:
                return response
            response.close()
            url = _joined(url, location)
            if _origin(url)[0] not in ({"https"} if origin[0] == "https" else {"http", "https"}):
                raise RegistryError(f"{self.place.registry} redirects to what is not HTTPS")
        raise RegistryError(f"{self.place.registry} redirects more than {_REDIRECTS} times")

    def _pool(self, url: str, *, ours: bool) -> urllib3.PoolManager:
        """Return the connections for a URL: through a proxy if the environment says so."""
        parts = parse_url(url)
        proxy = None if proxy_bypass(parts.host or "") else getproxies().get(parts.scheme or "")
        key = ours, parts.scheme, proxy
        with self._guard:
            if key not in self._pools:
                context = _tls(self.place.registry if ours else None) if parts.scheme == "https" else None
                if proxy:
                    login = _proxy_headers(proxy)
                    pool: urllib3.PoolManager = urllib3.ProxyManager(
                        proxy, proxy_headers=login, maxsize=_CONNECTIONS, ssl_context=context
                    )
                else:
                    pool = urllib3.PoolManager(maxsize=_CONNECTIONS, ssl_context=context)
                self._pools[key] = pool
            return self._pools[key]

    def _authorize(self, response: urllib3.BaseHTTPResponse, sent: str) -> None:
        """Get what the registry asks for; of several threads that were refused the same, one does."""
        challenges = [text.strip().partition(" ") for text in response.headers.getlist("WWW-Authenticate")]
        known = {scheme.lower(): rest for scheme, _, rest in challenges}
        with self._authorizing:
            if self._authorization != sent:
                return
            if "bearer" in known:
                said = {key.lower(): quoted or bare for key, quoted, bare in _CHALLENGE.findall(known["bearer"])}
                self._authorization = f"Bearer {self._token(said)}"
                return
            login = self._login()
            if "basic" not in known or login is None or not login.password:
                raise self._refusal(self.place.repository, response)
            self._authorization = _basic(login)

    def _login(self) -> credentials.Credentials | None:
        return credentials.find(self.place.registry, self.place.repository, self._authfile)

    def _token(self, said: Mapping[str, str]) -> str:
        """Get a token where the registry says (distribution's token and OAuth2 specifications)."""
        realm = said.get("realm", "")
        scheme, host, _ = _origin(realm)
        if scheme not in ("http", "https") or (self.place.url.startswith("https:") and scheme != "https"):
            raise RegistryError(f"{self.place.registry} names {shorten(realm)} for tokens, which is not HTTPS")
        asked = {"service": said.get("service", "")}
        asked["scope"] = said.get("scope") or f"repository:{self.place.repository}:pull"
        login, headers, body = self._login(), {}, None
        if login and login.identity_token:
            form = {**asked, "grant_type": "refresh_token", "client_id": "cachedb"}
            body = urlencode({**form, "refresh_token": login.identity_token})
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        else:
            realm = f"{realm}{'&' if '?' in realm else '?'}{urlencode(asked)}"
            if login:
                headers["Authorization"] = _basic(login)
        what = f"a token for {self.place.repository}"
        with self._request("POST" if body else "GET", realm, what, headers, token=True, body=body) as response:
            data = _read(response, _TOKEN_LIMIT, f"the token of {host}")
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
        if isinstance(error, SSLError):
            return RegistryError(
                f"{host} cannot be trusted: {_plain(reason)}; put the certificate of its authority into "
                f"/etc/containers/certs.d/{host}/ca.crt or SSL_CERT_FILE, or use --plain-http if it speaks HTTP"
            )
        if isinstance(error, NameResolutionError):
            return RegistryUnavailable(f"{host} is not known by that name; check it, and the network")
        return RegistryUnavailable(f"{host} cannot be reached: {_plain(reason)}")

    def _refusal(self, what: str, response: urllib3.BaseHTTPResponse) -> RegistryError:
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
        return RegistryError(f"{host} answers {said} to a request for {what}")


class Blob:
    """A blob's content at a registry, as it comes; where it is cut off, it goes on from there by another request."""

    def __init__(self, repository: Repository, digest: Digest, size: int, offset: int) -> None:
        self._repository, self._digest, self._size, self._at = repository, digest, size, offset
        self._response: urllib3.BaseHTTPResponse | None = None
        self._failed, self._since, self._had = 0, time.monotonic(), 0

    def close(self) -> None:
        """Let go of the connection."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill the front of the buffer and return how many bytes there were; 0 is the end.

        Raises:
            RegistryError: if it cannot be had, or comes too slowly.
        """
        while True:
            if self._response is None and self._at >= self._size:
                return 0
            try:
                if self._response is None:
                    self._open()
                assert self._response is not None
                data = self._response.read1(len(buffer), decode_content=False)
                if not data and self._at < self._size:
                    raise HTTPError("it ended too early")
                self._look_at_the_clock(len(data))
            except HTTPError as error:
                self.close()
                self._failed += 1
                if self._failed == _TRIES:
                    raise RegistryUnavailable(
                        f"{self._repository.place.registry} sends {self._digest} in pieces: {_plain(error)}; try again"
                    ) from None
                _pause(self._failed, None)
                continue
            buffer[: len(data)] = data
            self._at += len(data)
            return len(data)

    def _open(self) -> None:
        self._response, begins = self._repository.open_blob(self._digest, self._at)
        while begins < self._at:  # it knows no ranges: what we have comes again
            data = self._response.read1(min(_CHUNK, self._at - begins), decode_content=False)
            if not data:
                raise HTTPError("it ended too early")
            begins += len(data)

    def _look_at_the_clock(self, count: int) -> None:
        """Count what came in the last minute: a failure after that much is another failure."""
        self._had += count
        now = time.monotonic()
        if self._had > _SLOWEST * _MINUTE:
            self._failed, self._since, self._had = 0, now, 0
        elif now - self._since > _MINUTE:
            self._since, self._had = now, 0
            raise HTTPError(f"less than {_SLOWEST} bytes a second came")


_CHUNK = 1024 * 1024  # bytes


def _joined(url: str, location: str) -> str:
    """Return where a redirect leads.

    Raises:
        RegistryError: if that is no URL.
    """
    try:
        return urljoin(url, location)
    except ValueError:
        raise RegistryError("a registry redirects to what is no URL") from None


def _origin(url: str) -> tuple[str, str | None, int | None]:
    """Return what has to be the same for credentials to be sent.

    Raises:
        RegistryError: if it is no URL. It is not quoted, for there may be a secret in it.
    """
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname, parts.port
    except ValueError:
        raise RegistryError("a registry sends us to what is no URL") from None


def _manifest_types() -> frozenset[str]:
    return MANIFEST_TYPES | INDEX_TYPES


def _accepted() -> str:
    return ", ".join(sorted(_manifest_types()))


def _basic(login: credentials.Credentials) -> str:
    return "Basic " + base64.b64encode(f"{login.username}:{login.password}".encode()).decode()


def _proxy_headers(proxy: str) -> dict[str, str]:
    login = parse_url(proxy).auth
    return make_headers(proxy_basic_auth=login) if login else {}


def _tls(registry: str | None) -> ssl.SSLContext:
    """Return what to trust: what the system does, and the files that podman and Docker keep for a registry."""
    context = ssl.create_default_context()
    for top in _CERTIFICATES if registry else ():
        folder = Path(top).expanduser() / str(registry)
        with suppress(OSError):
            for path in sorted(folder.glob("*.crt")):
                context.load_verify_locations(path)
            for path in sorted(folder.glob("*.cert")):
                context.load_cert_chain(path, path.with_suffix(".key"))
    return context


def _pause(tries: int, response: urllib3.BaseHTTPResponse | None) -> bool:
    """Wait before the next try; say whether it is worth it: not if the registry wants more time than we have."""
    seconds = _FIRST_PAUSE * 2 ** (tries - 1) * random.uniform(0.75, 1.25)  # noqa: S311 - so that not all come at once
    after = response.headers.get("Retry-After", "") if response else ""
    if after.isdigit():
        seconds = max(seconds, int(after[:9]))
    elif after and (date := email.utils.parsedate_tz(after)):
        seconds = max(seconds, email.utils.mktime_tz(date) - time.time())
    if seconds > _LONGEST_PAUSE:
        return False
    time.sleep(seconds)
    return True


def _read(response: urllib3.BaseHTTPResponse, limit: int, what: str) -> bytes:
    """Read a small body.

    Raises:
        RegistryError: if it is over the limit, or cut off.
    """
    try:
        data = b""
        while chunk := response.read(min(_CHUNK, limit + 1 - len(data)), decode_content=False):
            data += chunk
            if len(data) > limit:
                raise RegistryError(f"{what} is over {limit} bytes")
    except HTTPError as error:
        raise RegistryUnavailable(f"{what} was cut off: {_plain(error)}; try again") from None
    return data


def _said_digest(headers: Mapping[str, str]) -> Digest | None:
    try:
        return parse_digest(headers.get("Docker-Content-Digest", ""))
    except InvalidDigest:
        return None


def _said(response: urllib3.BaseHTTPResponse) -> str:
    """Return what an answer says of itself (distribution specification, "Error Codes"), fit for one line."""
    try:
        document = json.loads(response.read(_TOKEN_LIMIT, decode_content=False))
        error = document["errors"][0]
        return f" {_plain(error['code'])}: {_plain(error.get('message', ''))}"
    except (HTTPError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""


def _plain(text: object) -> str:
    """Return a stranger's text, short and on one line; urllib3's own begins with an object and its address."""
    line = " ".join(str(text).rpartition(">: ")[2].split())
    line = "".join(char if char.isprintable() else "?" for char in line)
    return line if len(line) <= 200 else f"{line[:200]}..."
