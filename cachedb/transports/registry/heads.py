"""Read the head of an answer: its status line and headers.

Python's `http.client` takes an interim answer such as 103 Early Hints for the final one, and refuses more than 100
headers, or one over 64 KiB. Some registries and stores send those.
"""

from __future__ import annotations

import http.client
import io
from email.parser import Parser
from typing import Final

__all__ = ["Response"]


_MAX_BYTES: Final = 1024 * 1024  # of one head
_MAX_INTERIM_ANSWERS: Final = 100
_SWITCHING_PROTOCOLS: Final = b"101"  # the one status below 200 that is final
# The headers that say where the body ends, and whether the connection stays open.
_FRAMING: Final = (b"connection:", b"content-length:", b"keep-alive:", b"proxy-connection:", b"transfer-encoding:")


class Response(http.client.HTTPResponse):
    """An answer with any number of headers, after any interim answers."""

    def begin(self) -> None:
        """Read the head.

        Raises:
            http.client.HTTPException: if it is too large, or is none.
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
        lines, size = list[bytes](), 0
        while not lines or lines[-1].strip(b"\r\n"):
            line = self.fp.readline(_MAX_BYTES + 1 - size)
            size += len(line)
            if size > _MAX_BYTES:
                raise http.client.LineTooLong("header")
            if not line.endswith(b"\n"):
                where = "in the middle of the headers" if size else "without response"
                raise http.client.RemoteDisconnected(f"Remote end closed connection {where}")
            lines.append(line)
            if not lines[0].startswith(b"HTTP/"):
                break
        return lines


def _is_framing(line: bytes) -> bool:
    return line.lower().startswith(_FRAMING)
