"""Read a blob from a repository as a stream that resumes after an interruption."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import urllib3
from urllib3.exceptions import HTTPError

from cachedb.disk.writer import CHUNK_BYTES
from cachedb.errors import RegistryUnavailable
from cachedb.oci.digests import Digest
from cachedb.transports.registry.answers import is_encoded, to_one_line
from cachedb.transports.registry.explain import name_host
from cachedb.transports.registry.places import Place

__all__ = ["Download"]


_MIN_BYTES_PER_SECOND = 1024  # over a minute; a slower download has stalled
_MINUTE = 60.0  # seconds
_SHORT_WAIT_SECONDS = 5.0  # for a first byte
_LOOK_SECONDS = 5.0  # between two calls of a download's `look`


class Origin(Protocol):
    """The repository that a blob comes from."""

    @property
    def place(self) -> Place:
        """The place of the repository."""

    @property
    def tries(self) -> int:
        """How many times a read is tried in total, if its failures may be temporary."""

    def open_blob(
        self, digest: Digest, size: int, offset: int, url: str | None
    ) -> tuple[urllib3.BaseHTTPResponse, int]:
        """Request a blob's content from an offset; return the answer and the offset where it really starts."""

    def pause(self, tries: int) -> None:
        """Wait before a retry."""


class Download:
    """A stream of a blob's content; after an interruption it resumes with another request."""

    def __init__(
        self,
        repository: Origin,
        digest: Digest,
        size: int,
        offset: int,
        look: Callable[[bool], object] = lambda _: None,
        url: str | None = None,
    ) -> None:
        """Create a download without sending anything.

        Args:
            repository: where the blob is.
            digest: the blob's digest.
            size: the blob's size in bytes.
            offset: where to start, in bytes.
            look: called every few seconds with whether the download is fast enough; it may raise to end the download.
            url: where the blob is; None for the repository.
        """
        self._repository, self._digest, self._size, self._at = repository, digest, size, offset
        self._look, self._looked, self._since_look = look, time.monotonic(), 0  # the last call, and the bytes since
        self._response: urllib3.BaseHTTPResponse | None = None
        self.resumed = offset
        """The bytes that were not downloaded again; 0 if the registry ignored the offset."""
        self._has_begun, self._url = False, url
        self._failed, self._minute = 0, _Minute()
        self._opened: float | None = None  # when the last request was sent; None after the first byte of its body
        self._sender = repository.place.url  # the URL that answered
        self._decodes = False  # whether the body is encoded

    def close(self) -> None:
        """Release the connection."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def readinto(self, buffer: memoryview, /) -> int:
        """Read into the start of the buffer and return the number of bytes; 0 is the end.

        Raises:
            RegistryError: if the download fails or is too slow.
        """
        while True:
            if self._response is None and self._at >= self._size:
                return 0
            try:
                if self._response is None:
                    self._open()
                assert self._response is not None
                data = self._response.read1(len(buffer), decode_content=self._decodes)
                self._note_begin()
                if not data and self._at < self._size:
                    raise HTTPError("the response ended too early")
                self._check_speed(len(data))
            except HTTPError as error:
                self.close()
                self._failed += 1
                if self._failed >= self._repository.tries:
                    host = name_host(self._repository.place, self._sender)
                    raise RegistryUnavailable(
                        f"{host} keeps interrupting the download of {self._digest}: {to_one_line(error)}: try again"
                    ) from None
                self._repository.pause(self._failed)
                continue
            buffer[: len(data)] = data
            self._at += len(data)
            return len(data)

    def _open(self) -> None:
        self._opened = time.monotonic()
        self._response, begins = self._repository.open_blob(self._digest, self._size, self._at, self._url)
        if not self._has_begun:
            self.resumed, self._has_begun = begins, True
        self._sender = self._response.url or self._sender
        # Some stores declare a compressed blob as an encoded body. Then the length is the blob's size.
        has_size = self._response.headers.get("Content-Length") == str(self._size)
        self._decodes = self._response.status == 200 and is_encoded(self._response) and not has_size
        if begins < self._at:
            self._skip(self._response, self._at - begins)

    def _skip(self, response: urllib3.BaseHTTPResponse, count: int) -> None:
        """Skip the bytes that we have, because the registry ignores ranges."""
        minute = None
        while count:
            data = response.read1(min(CHUNK_BYTES, count), decode_content=self._decodes)
            if not data:
                raise HTTPError("the response ended too early")
            count -= len(data)
            self._report_speed(len(data))
            minute = minute or _Minute()  # it begins at the first byte
            minute.add(len(data))

    def _note_begin(self) -> None:
        """Do not count a long wait for the first byte, when the registry may fetch the blob itself."""
        if self._opened is not None:
            waited, self._opened = time.monotonic() - self._opened, None
            if waited > _SHORT_WAIT_SECONDS:
                self._minute.since += waited

    def _check_speed(self, count: int) -> None:
        """Count received bytes; raise if a minute brings too few, and reset the failures if enough came."""
        self._report_speed(count)
        if self._minute.add(count):
            self._failed = 0

    def _report_speed(self, count: int) -> None:
        """Call `look` every few seconds."""
        self._since_look += count
        now = time.monotonic()
        if now - self._looked >= _LOOK_SECONDS:
            is_fast = self._since_look >= _MIN_BYTES_PER_SECOND * (now - self._looked)
            self._looked, self._since_look = now, 0
            self._look(is_fast)


class _Minute:
    """The bytes that came in a minute."""

    def __init__(self) -> None:
        self.since, self._received = time.monotonic(), 0

    def add(self, count: int) -> bool:
        """Count bytes, and return whether they are now enough for a minute; then the next minute begins.

        Raises:
            HTTPError: if the minute is over and brought too few.
        """
        self._received += count
        now = time.monotonic()
        if self._received > _MIN_BYTES_PER_SECOND * _MINUTE:
            self.since, self._received = now, 0
            return True
        if now - self.since > _MINUTE:
            self.since, self._received = now, 0
            raise HTTPError(f"it is slower than {_MIN_BYTES_PER_SECOND} bytes per second")
        return False
