"""An HTTP server for the tests that records its requests and injects faults.

`Server.fault` takes a fault and says which requests meet it: ``server.fault(faults.change_answer(cut=9), path="/x")``.
"""

from __future__ import annotations

import re
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, urlencode

ALWAYS = -1


class Request(NamedTuple):
    """A request that a server received, with the status of the answer."""

    method: str
    path: str
    query: dict[str, str]  # values of the same key are joined by a space, as scopes are
    headers: dict[str, str]  # the keys are in lower case; values of the same name are joined by a comma
    status: int  # 0: the server closed the connection without an answer
    size: int  # bytes of the body that the server read


@dataclass
class Answer:
    """An answer, and how the server sends it."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)  # the server adds Content-Length if it is missing
    body: bytes = b""
    endless: bool = False  # send the body again and again; in chunks if the headers say so
    delay: float = 0  # seconds to wait before the first byte
    drip: float = 0  # seconds to wait after each byte of the body
    cut: int | None = None  # close the connection after this many bytes of the body; -1: before the status line
    reset: bool = False  # close the connection with RST
    early: bool = False  # answer without reading the rest of the request's body, then close the connection


@dataclass
class Call:
    """A request that is being served; a fault may change it before the server sees it."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    read: Callable[[int | None], bytes]  # the next bytes of the body, all by default
    answer: Callable[[Call], Answer]
    body: bytes = b""

    @property
    def target(self) -> str:
        return self.path + (f"?{urlencode(self.query)}" if self.query else "")

    def serve(self, limit: int | None = None) -> Answer:
        """Read the body, or only its first `limit` bytes, and return the server's correct answer."""
        self.body = self.read(limit)
        return self.answer(self)


Do = Callable[[Call], Answer]
"""A fault: a function that is called instead of `Call.serve`."""


def answer(status: int, headers: dict[str, str] | None = None, body: bytes = b"", **fields: Any) -> Do:
    """Send this answer without serving the request; ``fields`` are those of `Answer`."""
    return lambda call: Answer(status, dict(headers or {}), body, **fields)


def retry_later(seconds: int, status: int = 429, *, date: bool = False) -> Do:
    """Ask the client to retry after some seconds, given as a number or as a date."""
    return lambda call: Answer(
        status, {"Retry-After": formatdate(time.time() + seconds, usegmt=True) if date else str(seconds)}
    )


def answer_html(status: int = 200) -> Do:
    """Send an HTML page, as a captive portal does."""
    return answer(status, {"Content-Type": "text/html"}, b"<html><body>Welcome to the hotel's network</body></html>")


def redirect(base: str, status: int = 307) -> Do:
    """Redirect the client to the same path below another base URL; the server's own base makes a loop."""
    return lambda call: Answer(status, {"Location": base + call.target})


def closed(*, reset: bool = False) -> Do:
    """Close the connection without serving the request or answering it."""
    return lambda call: Answer(cut=-1, reset=reset)


def drop_answer(limit: int | None = None, *, reset: bool = False) -> Do:
    """Serve the request with at most `limit` bytes of its body, then close without an answer."""
    return lambda call: replace(call.serve(limit), cut=-1, reset=reset, early=True)


def change_answer(**fields: Any) -> Do:
    """Serve, and change these fields of the `Answer`: ``cut=10, reset=True``; ``delay=5``; ``drip=0.1``."""
    return lambda call: replace(call.serve(), **fields)


def change_headers(values: dict[str, str | None], **fields: Any) -> Do:
    """Serve, and change headers of the answer (None removes one) and fields of the `Answer`."""

    def do(call: Call) -> Answer:
        served = call.serve()
        merged = {**served.headers, "Content-Length": str(len(served.body)), **values}
        return replace(served, headers={key: value for key, value in merged.items() if value is not None}, **fields)

    return do


def answer_endlessly(*, chunked: bool = False) -> Do:
    """Send zeros until the client closes the connection."""
    encoding = "chunked" if chunked else None
    return change_headers({"Content-Length": None, "Transfer-Encoding": encoding}, body=bytes(64 * 1024), endless=True)


def rewrite_body(change: Callable[[bytes], bytes], *, length: bool = True) -> Do:
    """Serve, and change the body; with ``length=False``, Content-Length stays that of the correct body."""

    def do(call: Call) -> Answer:
        served = call.serve()
        kept = {} if length else {"Content-Length": str(len(served.body))}
        return replace(served, body=change(served.body), headers={**served.headers, **kept})

    return do


def corrupt_body(at: int = 0) -> Do:
    """Flip one bit of the body, in the byte at this offset."""
    return rewrite_body(lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def append_bytes(extra: bytes) -> Do:
    """Append bytes to the body, beyond what Content-Length says."""
    return rewrite_body(lambda data: data + extra, length=False)


def ignore_part(*, header: str = "", query: str = "") -> Do:
    """Serve, but ignore a header or a part of the query, like a registry without Range or mount."""

    def do(call: Call) -> Answer:
        call.headers.pop(header, None)
        call.query.pop(query, None)
        return call.serve()

    return do


@dataclass
class Fault:
    """A rule: the next requests that match a method and a path meet this fault."""

    method: str
    path: re.Pattern[str]
    times: int
    do: Do
    first: bool
    optional: bool
    fired: bool = False


class Server:
    """A server at a free port of the loopback interface; it serves in threads until the block ends.

    Args:
        tls: paths of a certificate and its key.
    """

    def __init__(self, *, tls: tuple[Path, Path] | None = None) -> None:
        self.requests: list[Request] = []
        self.errors: list[BaseException] = []  # errors of the server's own code; the end of the block raises one
        self._faults: list[Fault] = []
        self.lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), _Handler, self)
        self.port: int = self._server.server_address[1]
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"{'https' if tls else 'http'}://{self.host}"
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            # The first read does the handshake, so each connection's own thread does it.
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stop; raise the server's first error, and fail if the block passed but a fault did not fire."""
        self._server.stop()
        self._thread.join()
        for error in self.errors:
            raise error
        missed = [f"{fault.method} {fault.path.pattern}" for fault in self._faults if not fault.fired | fault.optional]
        assert kind or not missed, f"no request met the fault for {missed}: nothing was tested"

    def fault(
        self,
        do: Do,
        *,
        method: str = "",
        path: str = "",
        times: int = 1,
        first: bool = False,
        optional: bool = False,
    ) -> None:
        """Apply a fault to the next requests that match.

        Args:
            do: the fault.
            method: of the requests; empty for any method.
            path: a pattern that is searched for in the path and query.
            times: how many requests meet the fault; `ALWAYS` for all.
            first: apply the fault before the authorization check; otherwise refused requests do not count.
            optional: allow that no request meets the fault; otherwise the end of the block fails.
        """
        self._faults.append(Fault(method, re.compile(path), times, do, first, optional))

    def count(self, method: str = "", path: str = "") -> int:
        """Count the requests so far that match a method and a pattern in the path."""
        return sum(method in ("", request.method) and bool(re.search(path, request.path)) for request in self.requests)

    def refuse(self, call: Call) -> Answer | None:
        """Return the answer that refuses a request without authorization, or None to allow it."""
        return None

    def serve(self, call: Call) -> Answer:
        """Return the correct answer."""
        return Answer(404)

    def respond(self, call: Call) -> Answer:
        """Return the answer to a request, changed by a fault if one matches."""
        if do := self._take_fault(call, first=True):
            return do(call)
        return self.refuse(call) or (self._take_fault(call) or Call.serve)(call)

    def _take_fault(self, call: Call, *, first: bool = False) -> Do | None:
        with self.lock:
            for fault in self._faults:
                fits = fault.first == first and fault.method in ("", call.method) and fault.path.search(call.target)
                if fault.times and fits:
                    fault.times -= fault.times > 0
                    fault.fired = True
                    return fault.do
        return None


def parse_query(text: str) -> dict[str, str]:
    """Return the values by key; values of the same key are joined by a space, as scopes are."""
    return {key: " ".join(values) for key, values in parse_qs(text, keep_blank_values=True).items()}


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so server_close() waits for all of them
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], owner: Server) -> None:
        super().__init__(address, handler)
        self.owner = owner
        self.stopping = threading.Event()
        self._connections: set[socket.socket] = set()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        error = sys.exception()
        if error and not isinstance(error, OSError):  # an OSError means that the client closed the connection
            self.owner.errors.append(error)

    def stop(self) -> None:
        self.stopping.set()
        self.shutdown()
        for connection in list(self._connections):
            with suppress(OSError):
                # Not SSLSocket.shutdown: only the thread that reads the connection may call it.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _handle(self) -> None:
        path, _, query = self.path.partition("?")
        values = {name.lower(): ", ".join(self.headers.get_all(name, [])) for name in self.headers}
        self._left = 0 if "content-length" not in values else int(values["content-length"])
        self._chunked = values.get("transfer-encoding") == "chunked"
        call = Call(self.command, path, parse_query(query), values, self._read, self.server.owner.serve)
        received = replace(call, query=dict(call.query), headers=dict(values))  # a copy that no fault changes
        reply = self.server.owner.respond(call)
        if not reply.early:
            self._read(None)
        status = 0 if reply.cut == -1 else reply.status
        request = Request(received.method, received.path, received.query, received.headers, status, len(call.body))
        self.server.owner.requests.append(request)
        self.server.stopping.wait(reply.delay)
        if reply.cut != -1:
            self._send(reply)
        if reply.cut is not None or reply.early or reply.endless:
            self._hang_up(reply)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass

    def _read(self, limit: int | None) -> bytes:
        if not self._chunked:
            size = self._left if limit is None else min(limit, self._left)
            self._left -= size
            return self.rfile.read(size)
        data = b""
        while limit is None or len(data) < limit:
            if not (line := self.rfile.readline()):
                break  # the client closed the connection
            size = int(line.split(b";")[0], 16)
            data += self.rfile.read(size)
            self.rfile.readline()
            if not size:
                self._chunked = False  # and _left is 0: the next call reads nothing
                break
        return data[:limit]

    def _send(self, reply: Answer) -> None:
        chunked = reply.headers.get("Transfer-Encoding") == "chunked"
        if not chunked and not reply.endless and reply.status != 204:
            reply.headers.setdefault("Content-Length", str(len(reply.body)))
        self.send_response_only(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        left = sys.maxsize if reply.cut is None else reply.cut
        for part in repeat(reply.body) if reply.endless else [reply.body]:
            for piece in (part[i : i + 1] for i in range(len(part))) if reply.drip else [part]:
                if left and piece:
                    data = piece[:left]
                    left -= len(data)
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
                if self.server.stopping.wait(reply.drip):
                    return
        if chunked and reply.cut is None:
            self.wfile.write(b"0\r\n\r\n")

    def _hang_up(self, reply: Answer) -> None:
        self.close_connection = True
        if reply.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()  # now: the server's own shutdown would send FIN instead of RST
        elif reply.early and reply.cut is None:
            # Closing a connection with unread data sends RST, which may overtake the answer.
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(64 * 1024):
                pass
