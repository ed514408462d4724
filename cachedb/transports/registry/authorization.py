"""Get the authorization for a registry: a token from its token server, or the header of basic authentication.

The token and OAuth2 specifications of distribution define the requests.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Final, Literal, Protocol
from urllib.parse import urlencode

import urllib3

from cachedb.errors import RegistryError
from cachedb.text import shorten
from cachedb.transports.registry import credentials
from cachedb.transports.registry.access import Access
from cachedb.transports.registry.answers import read_body
from cachedb.transports.registry.places import Place
from cachedb.transports.registry.urls import origin, with_query

__all__ = ["Authorization"]


_TOKEN_LIMIT = 1024 * 1024  # bytes
_CHALLENGE: Final = re.compile(r'\b(\w+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,]+))')  # RFC 9110, 11.6.1


class _Ask(Protocol):
    """A function that sends a request for a token and returns the answer."""

    def __call__(
        self, method: str, url: str, what: str, headers: Mapping[str, str], *, token: bool, body: str | None
    ) -> urllib3.BaseHTTPResponse: ...


class Authorization:
    """The authorization that one client sends to its registry; safe to use from several threads."""

    def __init__(
        self,
        place: Place,
        access: Access,
        ask: _Ask,
        stopped: threading.Event,
        *,
        push: bool = False,
    ) -> None:
        """Create an empty authorization.

        Args:
            place: the place of the repository.
            access: how to reach the registry.
            ask: sends a request for a token.
            stopped: set to cancel a credential helper.
            push: request tokens with write access from the start.
        """
        self.header = ""
        """The value of the header that is sent; empty for anonymous access."""
        self._place, self._access, self._push = place, access, push
        self._ask, self._stopped = ask, stopped
        self._lock = threading.RLock()

    def renew(self, url: str, challenges: Sequence[str], sent: str) -> Literal["renewed", "changed", "missing"]:
        """Get the authorization for a refused request.

        Args:
            url: the URL of the request.
            challenges: the values of the WWW-Authenticate headers.
            sent: the authorization that was refused.

        Returns:
            ``renewed`` if there is a new authorization, ``changed`` if another thread got one meanwhile, ``missing`` if
            there are no credentials for it.

        Raises:
            RegistryError: if the token server refuses or fails, or the credentials cannot be read.
        """
        known = {scheme.lower(): rest for scheme, _, rest in (text.strip().partition(" ") for text in challenges)}
        with self._lock:
            if self.header != sent:
                return "changed"  # the new token may still lack our scope; then the caller asks again
            if "bearer" in known:
                challenge = {key.lower(): quoted or bare for key, quoted, bare in _CHALLENGE.findall(known["bearer"])}
                self.header = f"Bearer {self._request_token(url, challenge)}"
                return "renewed"
            login = self._find_login()
            if "basic" not in known or login is None or not login.password:
                return "missing"
            self.header = _format_basic(login)
            return "renewed"

    def _find_login(self) -> credentials.Credentials | None:
        return credentials.find(
            self._place.registry, self._place.repository, self._access.authfile, stopped=self._stopped
        )

    def _request_token(self, url: str, challenge: Mapping[str, str]) -> str:
        """Request a token from the token server that a challenge names."""
        realm = challenge.get("realm", "")
        scheme, host, _ = origin(realm)
        if scheme not in ("http", "https") or (origin(url)[0] == "https" and scheme != "https"):
            raise RegistryError(
                f"{self._place.registry}: the scheme of the token server {shorten(realm)} is not allowed"
            )
        query = {"service": challenge.get("service", "")}
        read_scope = f"repository:{self._place.repository}:pull"
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
        what = f"a token for {self._place.repository}"
        with self._ask("POST" if body else "GET", realm, what, headers, token=True, body=body) as response:
            data = read_body(response, _TOKEN_LIMIT, f"the token of {host}")
        try:
            document = json.loads(data)
            token = document.get("token") or document.get("access_token")
        except (ValueError, AttributeError, RecursionError):
            token = None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise RegistryError(f"{host} sent no usable token") from None
        return token


def _format_basic(login: credentials.Credentials) -> str:
    return "Basic " + base64.b64encode(f"{login.username}:{login.password}".encode()).decode()
