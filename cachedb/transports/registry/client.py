"""Send HTTP requests to a registry, with authorization, redirects, proxies, certificates and retries.

Answers are untrusted. Bodies are read up to a limit, and the receiver verifies content. Credentials are sent only to
their registry and to the token server that it names, never to the target of a redirect. They never appear in an error.
"""

from __future__ import annotations

import email.utils
import logging
import random
import re
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Final
from urllib.parse import unquote, urljoin

import urllib3
from urllib3.exceptions import HTTPError
from urllib3.util import Timeout

from cachedb.errors import RegistryError
from cachedb.transports.registry.access import Access
from cachedb.transports.registry.answers import to_one_line
from cachedb.transports.registry.authorization import Authorization
from cachedb.transports.registry.challenges import Challenge, parse_challenges
from cachedb.transports.registry.connections import Connections
from cachedb.transports.registry.explain import (
    RETRY_STATUSES,
    NoAnswer,
    explain_no_answer,
    explain_refusal,
    is_final,
)
from cachedb.transports.registry.places import Place
from cachedb.transports.registry.redaction import remember_briefly
from cachedb.transports.registry.tls import Certificates
from cachedb.transports.registry.urls import allowed_schemes, origin

__all__ = ["TRIES", "Client"]


LOG = logging.getLogger("cachedb")

TRIES: Final = 5
"""How many times a request is sent in total, if its failures may be temporary."""

_CONNECT_SECONDS = 10.0
_MAX_TIMEOUT_SECONDS = 1e6  # the system takes no number of milliseconds over 2**31
_WRITE_SECONDS = 60.0  # for each write of a body to the socket
_FIRST_PAUSE_SECONDS = 0.5  # before the first retry; it doubles each time, and a longer Retry-After is respected
_MAX_PAUSE_SECONDS = 60.0  # a registry that asks for more time counts as unavailable
_MAX_REDIRECTS = 5
_MIN_SIGNATURE = 16  # characters
_MAX_WARNINGS = 20  # of one registry
_WARNING = re.compile(r'(?:^|[\s,])299[ \t]+\S+[ \t]+"((?:[^"\\]|\\.)*+)"')  # RFC 7234, 5.5

Body = bytes | str | Iterable[bytes]
"""The body of a request; an iterable must start again at each iteration, for a retry."""


class Client:
    """HTTP client for one repository; safe to use from several threads."""

    def __init__(self, place: Place, access: Access, *, push: bool = False, tries: int = TRIES) -> None:
        """Create a client without sending anything.

        Args:
            place: the place of the repository.
            access: how to reach the registry.
            push: request tokens with write access from the start.
            tries: how many times a request is sent in total, if its failures may be temporary.
        """
        self.place, self.tries = place, tries
        self._timeout = min(access.timeout, _MAX_TIMEOUT_SECONDS)
        self._guard = threading.RLock()
        self._base_challenges: list[Challenge] | None = None
        self._warnings = set[str]()  # that were shown
        self._is_open = False  # whether the registry has answered without authorization
        self._connections = Connections(place.registry, verify=place.is_verified)
        self._authorization = Authorization(place, access, self.request, self._connections.stopped, push=push)

    def close(self) -> None:
        """Close all connections."""
        self._connections.close()

    def stop(self) -> None:
        """Cancel running requests and refuse new ones."""
        self._connections.stop()

    def find_url(self) -> str:
        """Return the scheme and host of the registry.

        An insecure place is asked over HTTPS first, and uses HTTP if that fails.
        """
        with self._guard:
            if self.place.allows_http:
                url = self.place.url
                try:
                    self._send("GET", f"{url}/v2/", {}, "", None)[0].close()
                except NoAnswer:
                    url = f"http://{url.partition('://')[2]}"
                self.place = self.place._replace(url=url, allows_http=False)
            return self.place.url

    def request(
        self,
        method: str,
        url: str,
        what: str,
        headers: Mapping[str, str],
        *,
        good: tuple[int, ...] = (200,),
        login: str | None = None,
        body: Body | None = None,
        failed: int | None = None,
        max_tries: int | None = None,
    ) -> urllib3.BaseHTTPResponse:
        """Send a request, and retry after a pause if the failure may be temporary.

        Args:
            method: the HTTP method.
            url: a URL of the repository or of a token server.
            what: the name of the requested thing in error messages.
            headers: the headers of the request.
            good: the expected statuses.
            login: the authorization of a request for a token, which may be empty; None for a request to the registry.
                It is not sent to another host after a redirect, and a body is not either.
            body: the body of the request.
            failed: the number of earlier failures, if the caller itself must retry with a changed request. After a
                temporary failure, `request` pauses and then raises; None to retry here.
            max_tries: how many times the request is sent in total, if its failures may be temporary; None for
                ``tries``.

        Raises:
            RegistryUnavailable: if the registry is unreachable or overloaded.
            RegistryError: if the registry refuses the request, or does not have the requested thing.
        """
        is_token = login is not None
        tries, has_asked = failed or 0, is_token
        limit = self.tries if max_tries is None else max_tries
        while True:
            tries += 1
            sent = self._authorization.header if login is None else login
            try:
                response, is_ours = self._send(method, url, headers, sent, body, is_token=is_token)
            except NoAnswer as failure:
                if tries >= limit or is_final(failure.error):
                    raise self._explain(failure, is_token=is_token) from None  # urllib3's error may contain credentials
                self.pause(tries, None)
                if failed is not None:
                    raise self._explain(failure, is_token=is_token) from None
                continue
            if is_ours:
                self._show_warnings(response)
            # Only the registry itself may name a token server, not the target of a redirect.
            may_ask = is_ours and not has_asked and tries < TRIES
            challenges = self._find_challenges(response, sent, good) if may_ask else []
            if response.status in good and not challenges:
                return response
            with response:
                if challenges:
                    outcome = self._authorization.renew(url, challenges, sent)
                    if outcome == "missing":
                        raise self.refusal(self.place.repository, response)
                    has_asked = outcome == "renewed"
                    continue
                if response.status not in RETRY_STATUSES or tries >= limit or not self.pause(tries, response):
                    raise self.refusal(what, response, is_token=is_token)
                if failed is not None:
                    raise self.refusal(what, response, is_token=is_token)

    def _find_challenges(self, response: urllib3.BaseHTTPResponse, sent: str, good: tuple[int, ...]) -> list[Challenge]:
        """Return the challenges of an answer; empty if a repetition with authorization cannot help.

        Some registries hide a private repository from anonymous requests: they answer 403 or 404, or 401 without a
        challenge. Their challenge is at the base URL.
        """
        if response.status == 401:
            found = parse_challenges(response.headers.getlist("WWW-Authenticate"))
            if found:
                return found
        if sent or response.status not in (401, 403, 404):
            self._is_open = self._is_open or (not sent and response.status < 400)
            return []
        if self._is_open:
            return []
        try:
            return self._read_base_challenges() if self._authorization.has_login() else []
        except RegistryError:
            if response.status in good:
                return []
            raise

    def _read_base_challenges(self) -> list[Challenge]:
        """Return the challenges of the registry's base URL."""
        with self._guard:
            if self._base_challenges is None:
                self._base_challenges = []
                with suppress(NoAnswer), self._send("GET", f"{self.place.url}/v2/", {}, "", None)[0] as response:
                    if response.status == 401:
                        self._base_challenges = parse_challenges(response.headers.getlist("WWW-Authenticate"))
            return self._base_challenges

    def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        authorization: str,
        body: Body | None,
        *,
        is_token: bool = False,
    ) -> tuple[urllib3.BaseHTTPResponse, bool]:
        """Send a request and follow redirects; return the answer and whether the registry itself sent it.

        The authorization is sent to the registry only; that of a request for a token to its token server only.
        """
        owner = origin(url if is_token else self.place.url)
        for _ in range(_MAX_REDIRECTS + 1):
            self._connections.check_stopped()
            is_ours = origin(url) == origin(self.place.url)
            secret = {"Authorization": authorization} if authorization and origin(url) == owner else {}
            try:
                response = self._connections.get_pool(url, is_ours=is_ours).request(
                    method,
                    url,
                    body=body,
                    headers={"User-Agent": "cachedb", "Accept-Encoding": "identity", **headers, **secret},
                    redirect=False,
                    retries=False,
                    timeout=Timeout(connect=_CONNECT_SECONDS if body is None else _WRITE_SECONDS, read=self._timeout),
                    preload_content=False,
                )
            except HTTPError as error:
                raise NoAnswer(url, error) from error
            response.url = url
            location = response.get_redirect_location()
            if not location:
                with suppress(KeyError, ValueError):  # Location is relative to the URL that answered
                    response.headers["Location"] = urljoin(url, response.headers["Location"])
                return response, is_ours
            response.close()
            url = self.follow(url, location)
            for value in filter(None, re.split("[?&;=]", url.partition("?")[2])):  # it may be a signature
                if len(value) >= _MIN_SIGNATURE:
                    remember_briefly(unquote(value))
            if is_token and body is not None and origin(url) != owner:
                raise RegistryError(
                    f"{self.place.registry}: its token server redirects a secret to another host: "
                    "the operator of the registry must name that host in the challenge"
                )
        raise RegistryError(f"{self.place.registry}: more than {_MAX_REDIRECTS} redirects: check that it is a registry")

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
            raise RegistryError(
                f"{self.place.registry}: redirect to an invalid URL: check that it is a registry"
            ) from None
        allowed = allowed_schemes(url)
        if origin(following)[0] not in allowed:
            raise RegistryError(
                f"{self.place.registry}: redirect to a URL whose scheme is not allowed: "
                f"its operator must redirect to {' or '.join(allowed)}"
            )
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
        _sleep(seconds, self._connections.stopped)
        return True

    def refusal(self, what: str, response: urllib3.BaseHTTPResponse, *, is_token: bool = False) -> RegistryError:
        """Return the error for an answer with an unexpected status.

        Args:
            what: the name of the requested thing.
            response: the answer.
            is_token: whether a token was requested.
        """
        return explain_refusal(self.place, what, response, is_token=is_token)

    def _explain(self, failure: NoAnswer, *, is_token: bool) -> RegistryError:
        """Return the error for a request without an answer."""
        return explain_no_answer(self.place, failure, self._find_certificates, self._timeout, is_token=is_token)

    def _find_certificates(self, url: str) -> Certificates:
        return self._connections.find_certificates(url, is_ours=origin(url) == origin(self.place.url))

    def _show_warnings(self, response: urllib3.BaseHTTPResponse) -> None:
        """Log the warnings of the registry (distribution specification, "Warnings"), each once."""
        for header in response.headers.getlist("Warning"):
            for quoted in _WARNING.findall(header):
                text = to_one_line(re.sub(r"\\(.)", r"\1", quoted))
                if text and text not in self._warnings and len(self._warnings) < _MAX_WARNINGS:
                    self._warnings.add(text)
                    LOG.warning("%s warns: %s", self.place.registry, text)


def _sleep(seconds: float, stopped: threading.Event) -> None:
    stopped.wait(seconds)
