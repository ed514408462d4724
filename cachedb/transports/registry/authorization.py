"""Get the authorization for a registry: a token, or the header of basic authentication.

The token and OAuth2 specifications of distribution define the requests.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol
from urllib.parse import urlencode

import urllib3

from cachedb.errors import RegistryError
from cachedb.text import shorten
from cachedb.transports.registry.access import Access
from cachedb.transports.registry.answers import read_body
from cachedb.transports.registry.challenges import Challenge
from cachedb.transports.registry.credentials import Credentials, find
from cachedb.transports.registry.places import Place
from cachedb.transports.registry.redaction import format_basic, redact, remember, remember_briefly
from cachedb.transports.registry.urls import allowed_schemes, origin, with_query

__all__ = ["Authorization"]


_TOKEN_LIMIT = 1024 * 1024  # bytes


class _Ask(Protocol):
    """A function that sends a request for a token and returns the answer."""

    def __call__(
        self, method: str, url: str, what: str, headers: Mapping[str, str], *, login: str, body: str | None
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
        self._found: list[Credentials | None] = []  # the credentials, once they have been read

    def renew(self, url: str, challenges: Sequence[Challenge], sent: str) -> Literal["renewed", "changed", "missing"]:
        """Get the authorization for a refused request.

        Args:
            url: the URL of the request.
            challenges: the challenges of the registry.
            sent: the authorization that was refused.

        Returns:
            ``renewed`` if there is a new authorization, ``changed`` if another thread got one meanwhile, ``missing`` if
            there are no credentials for it.

        Raises:
            RegistryError: if the token server refuses or fails, or the credentials cannot be read.
        """
        with self._lock:
            if self.header != sent:
                return "changed"  # if the new token lacks our scope, the caller asks again
            if sent:
                self._found.clear()  # what a helper gave may have expired
            header = self._answer(url, challenges, self._find_login())
            if not header:
                return "missing"
            self.header = header
            return "renewed"

    def has_login(self) -> bool:
        """Return whether there are credentials for the repository.

        Raises:
            RegistryError: if the credentials cannot be read.
        """
        with self._lock:
            return self._find_login() is not None

    def _find_login(self) -> Credentials | None:
        """Return the credentials, which are read once until an authorization with them is refused."""
        if not self._found:
            self._found.append(self._read_login())
        return self._found[0]

    def _read_login(self) -> Credentials | None:
        if self._access.credentials:
            login: Credentials | None = Credentials(*self._access.credentials, identity_token="")
        else:
            login = find(self._place.registry, self._place.repository, self._access.authfile, stopped=self._stopped)
        for secret in login[1:] if login else ():
            remember(secret)
        return login

    def _answer(self, url: str, challenges: Sequence[Challenge], login: Credentials | None) -> str:
        """Return the authorization that answers one of the challenges; empty if there is none."""
        if login and login.registry_token:
            return f"Bearer {login.registry_token}"
        for challenge in challenges:
            if challenge.scheme == "bearer" and "realm" in challenge.parameters:
                return f"Bearer {self._request_token(url, challenge.parameters, login)}"
        if login and login.password and any(challenge.scheme == "basic" for challenge in challenges):
            return format_basic(login.username, login.password)
        return ""

    def _request_token(self, url: str, challenge: Mapping[str, str], login: Credentials | None) -> str:
        """Request a token from the token server that a challenge names.

        A scope is a parameter of its own in a query, and part of a list in a form; Quay accepts nothing else.
        """
        realm = challenge["realm"]
        scheme, host, _ = origin(realm)
        allowed = allowed_schemes(url)
        if scheme not in allowed:
            raise RegistryError(
                f"{self._place.registry}: the scheme of the token server {shorten(redact(realm))} is not allowed: "
                f"its operator must name a server with {' or '.join(allowed)}"
            )
        service = [("service", challenge["service"])] if "service" in challenge else []
        read_scope = f"repository:{self._place.repository}:pull"
        # For a repository that does not exist, some registries refuse a read token but grant a write token and create
        # the repository.
        scopes = [
            f"{read_scope},push" if self._push and scope == read_scope else scope
            for scope in (challenge.get("scope") or read_scope).split()
        ]
        method, headers, body, header = "GET", dict[str, str](), None, ""
        if login and login.identity_token:
            method, headers = "POST", {"Content-Type": "application/x-www-form-urlencoded"}
            grant = [("grant_type", "refresh_token"), ("client_id", "cachedb")]
            body = urlencode([*service, ("scope", " ".join(scopes)), *grant, ("refresh_token", login.identity_token)])
        else:
            realm = with_query(realm, [*service, *(("scope", scope) for scope in scopes)])
            header = format_basic(login.username, login.password) if login else ""
        what = f"a token for {self._place.repository}"
        with self._ask(method, realm, what, headers, login=header, body=body) as response:
            data = read_body(response, _TOKEN_LIMIT, f"the token of {host}")
        try:
            document = json.loads(data)
            token = document.get("token") or document.get("access_token")
        except (ValueError, AttributeError, RecursionError):
            token = None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise RegistryError(f"{host} sent no usable token: check that it is the registry's token server") from None
        remember_briefly(token)
        return token
