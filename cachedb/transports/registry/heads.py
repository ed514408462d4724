"""Read the head of an answer: its status line and headers.

Python's `http.client` takes an interim answer such as 103 Early Hints for the final one, and refuses more than 100
headers, or one over 64 KiB. Some registries and stores send those.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
from email.parser import Parser
from typing import Any, Final

from cachedb.errors import ignore_os_errors

__all__ = ["Response", "SlowHead"]


_MAX_BYTES: Final = 1024 * 1024  # of one head
_HEAD_SECONDS: Final = 60.0  # from the first byte to the last
_READ_SECONDS: Final = 60.0  # for each further read from the socket
_MAX_INTERIM_ANSWERS: Final = 100
_SWITCHING_PROTOCOLS: Final = b"101"  # the one status below 200 that is final
# The headers that say where the body ends, and whether the connection stays open.
_FRAMING: Final = (b"connection:", b"content-length:", b"keep-alive:", b"proxy-connection:", b"transfer-encoding:")


class SlowHead(http.client.HTTPException):
    """The head of an answer comes too slowly."""


class Response(http.client.HTTPResponse):
    """An answer with any number of headers, after any interim answers.

    The timeout of the socket applies to the first byte of the head, and to that of the body. Every later read has a
    shorter timeout, and the whole head has one too.
    """

    def __init__(self, sock: socket.socket, *arguments: Any, **named: Any) -> None:  # noqa: ANN401 - of http.client
        super().__init__(sock, *arguments, **named)
        self._socket, self._first_byte_seconds, self._has_begun = sock, sock.gettimeout(), False

    def begin(self) -> None:
        """Read the head.

        Raises:
            http.client.HTTPException: if it is too large, too slow, or not a head of HTTP.
            TimeoutError: if its first byte does not come in time.
            ConnectionError: if the server closes the connection before its end.
        """
        if self.headers is not None:
            return
        body = self.fp
        status_line, lines = self._read_final_head()
        self.fp = io.BytesIO(b"".join([status_line, *(line for line in lines if _is_framing(line)), b"\r\n"]))
        try:
            super().begin()
        finally:
            self.fp = body
        if self.status in (200, 206):
            self._socket.settimeout(self._first_byte_seconds)
        text = b"".join(lines).decode("iso-8859-1")
        self.headers = self.msg = Parser(_class=http.client.HTTPMessage).parsestr(text)

    def _read_final_head(self) -> tuple[bytes, list[bytes]]:
        """Return the status line and the header lines of the first answer that is not interim."""
        for _ in range(_MAX_INTERIM_ANSWERS + 1):
            status_line, *lines = self._read_head()
            status = status_line.split(None, 2)[1:2]
            if not status or not status[0].startswith(b"1") or status[0] == _SWITCHING_PROTOCOLS:
                return status_line, lines
        raise http.client.HTTPException(f"more than {_MAX_INTERIM_ANSWERS} interim answers")

    def _read_head(self) -> list[bytes]:
        """Return the status line and the header lines; only the first line if it is no status line."""
        self._socket.settimeout(self._first_byte_seconds)
        if not self.fp.peek(1):
            raise http.client.RemoteDisconnected("Remote end closed connection without response")
        self._socket.settimeout(_READ_SECONDS)
        lines, size, deadline = [b""], 0, time.monotonic() + _HEAD_SECONDS
        while lines[-1] not in (b"\r\n", b"\n"):
            data = self._peek()
            data = self.fp.read(data.find(b"\n") + 1 or len(data))
            if not data:
                raise http.client.RemoteDisconnected("Remote end closed connection in the middle of the headers")
            size += len(data)
            if size > _MAX_BYTES:
                raise http.client.LineTooLong("header")
            if time.monotonic() > deadline:
                raise SlowHead(f"the headers took over {_HEAD_SECONDS:g} seconds")
            if lines[-1].endswith(b"\n"):
                lines.append(data)
            else:
                lines[-1] += data
            if lines[0].endswith(b"\n") and not lines[0].startswith(b"HTTP/"):
                break
        return lines

    def _peek(self) -> bytes:
        """Return received bytes, without taking them; wait for one."""
        try:
            return self.fp.peek(1)
        except TimeoutError:
            raise SlowHead(f"the headers stopped for {_READ_SECONDS:g} seconds") from None

    def read(self, amt: int | None = None) -> bytes:
        """Read from the body."""
        return self._note_begin(super().read(amt))

    def read1(self, n: int = -1) -> bytes:
        """Read from the body with one read from the socket at most."""
        return self._note_begin(super().read1(n))

    def _note_begin(self, data: bytes) -> bytes:
        """Wait for a shorter time once the body has begun."""
        if data and not self._has_begun:
            self._has_begun = True
            with ignore_os_errors():  # the socket may be closed by now
                self._socket.settimeout(_READ_SECONDS)
        return data


def _is_framing(line: bytes) -> bool:
    return line.lower().startswith(_FRAMING)
