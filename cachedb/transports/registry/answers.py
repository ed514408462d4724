"""Read the answers of registries: bodies up to a limit, and error documents."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import urllib3
from urllib3.exceptions import HTTPError, ProtocolError, ProxyError

from cachedb.disk.writer import CHUNK_BYTES
from cachedb.errors import RegistryError, RegistryUnavailable
from cachedb.transports.registry.redaction import redact

__all__ = ["drain_after", "is_encoded", "read_body", "read_error_detail", "to_one_line"]


_ERROR_LIMIT = 1024 * 1024  # bytes of an error document
_BODY_SECONDS = 60.0  # from the first piece of a body to its end
_OBJECT_REPR = re.compile(r"^(?:<.*>|\w+\(host=[^)]*\)): ")  # the repr that urllib3 puts before a message


@contextmanager
def drain_after(response: urllib3.BaseHTTPResponse) -> Iterator[urllib3.BaseHTTPResponse]:
    """Yield an answer and read the rest of its small body at the end, so that its connection is reused."""
    with response:
        yield response
        with suppress(HTTPError):
            response.read1(CHUNK_BYTES)


def read_body(response: urllib3.BaseHTTPResponse, limit: int, what: str) -> bytes:
    """Read the body of an answer, and decode it if it is encoded.

    Args:
        response: the answer.
        limit: the most bytes that the body may have.
        what: the name of the body in error messages.

    Raises:
        RegistryError: if it is too large or too slow, or is interrupted.
    """
    data, deadline = b"", float("inf")
    try:
        while chunk := response.read1(min(CHUNK_BYTES, limit + 1 - len(data))):
            data += chunk
            if len(data) > limit:
                raise RegistryError(f"{what} is over {limit} bytes: check that the server is a registry")
            deadline = min(deadline, time.monotonic() + _BODY_SECONDS)
            if time.monotonic() > deadline:
                raise RegistryUnavailable(f"{what} took over {_BODY_SECONDS:g} seconds: try again")
    except HTTPError as error:
        raise RegistryUnavailable(f"{what} was interrupted: {to_one_line(error)}: try again") from None
    return data


def is_encoded(response: urllib3.BaseHTTPResponse) -> bool:
    """Return whether the body has an encoding of its own, such as gzip, that urllib3 can decode.

    Some proxies encode answers although the request refuses it.
    """
    encodings = response.headers.get("Content-Encoding", "").lower().split(",")
    return any(encoding.strip() in urllib3.HTTPResponse.CONTENT_DECODERS for encoding in encodings)


def read_error_detail(response: urllib3.BaseHTTPResponse) -> str:
    """Return the code and message of an error answer on one line, or an empty string.

    The distribution specification defines them in "Error Codes".
    """
    try:
        document = json.loads(read_body(response, _ERROR_LIMIT, "the error"))
        error = document["errors"][0]
        return f" {to_one_line(error['code'])}: {to_one_line(error.get('message', ''))}"
    except (RegistryError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""


def to_one_line(text: object) -> str:
    """Return untrusted text on one line of at most 200 characters, without secrets and object reprs."""
    if isinstance(text, (ProtocolError, ProxyError)) and len(text.args) == 2:
        what, cause = text.args
        text = what if str(cause) in str(what) else f"{str(what).rstrip('.')}: {to_one_line(cause)}"
    line = redact(_OBJECT_REPR.sub("", str(text), count=1))
    line = redact(" ".join(line.split()))
    line = "".join(char if char.isprintable() else "?" for char in line)
    return line if len(line) <= 200 else f"{line[:200]}..."
