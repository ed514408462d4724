"""An HTTP server for the tests that says what it was asked, and does wrong as a test tells it.

A fault is given to `Server.fault` with the requests that it is for: ``server.fault(faults.changed(cut=9), path="/x")``.
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
    """What a server was asked, and what it answered."""

    method: str
    path: str
    query: dict[str, str]  # values of the same key with a space between, as scopes are joined
    headers: dict[str, str]  # by names in lower case; values of the same name with a comma between
    status: int  # 0: the connection was closed without an answer
    size: int  # bytes of the body that were read


@dataclass
class Answer:
    """What is sent, and how."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)  # Content-Length is put in, unless there is one
    body: bytes = b""
    endless: bool = False  # the body is sent over and over; in chunks if the headers say so
    delay: float = 0  # seconds before anything
    drip: float = 0  # seconds after each byte
    cut: int | None = None  # the connection ends after so many bytes of the body; -1: before any answer
    reset: bool = False  # it ends with RST
    early: bool = False  # sent without reading the rest of the request's body, and the connection ends


@dataclass
class Call:
    """A request that is being served; what a fault changes in it is changed for the server."""

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
        """Let the server answer as it should; with only the first bytes of the body, if there is a limit."""
        self.body = self.read(limit)
        return self.answer(self)


Do = Callable[[Call], Answer]
"""What a fault does instead of `Call.serve`."""


def answer(status: int, headers: dict[str, str] | None = None, body: bytes = b"", **fields: Any) -> Do:
    """Answer this, with other fields of `Answer`: ``early=True``; nothing is done."""
    return lambda call: Answer(status, dict(headers or {}), body, **fields)


def retry_later(seconds: int, status: int = 429, *, date: bool = False) -> Do:
    return lambda call: Answer(
        status, {"Retry-After": formatdate(time.time() + seconds, usegmt=True) if date else str(seconds)}
    )


def html(status: int = 200) -> Do:
    return answer(status, {"Content-Type": "text/html"}, b"<html><body>Welcome to the hotel's network</body></html>")


def redirect(base: str, status: int = 307) -> Do:
    """Send the client to the same path at another server; at this one, it is a loop."""
    return lambda call: Answer(status, {"Location": base + call.target})


def closed(*, reset: bool = False) -> Do:
    """End the connection before anything is done or answered."""
    return lambda call: Answer(cut=-1, reset=reset)


def lost(limit: int | None = None, *, reset: bool = False) -> Do:
    """Do what is asked, with the first bytes of the body at most, and end the connection without an answer."""
    return lambda call: replace(call.serve(limit), cut=-1, reset=reset, early=True)


def changed(**fields: Any) -> Do:
    """Serve, and send the answer with these fields of `Answer`: ``cut=10, reset=True``; ``delay=5``; ``drip=0.1``."""
    return lambda call: replace(call.serve(), **fields)


def headers(values: dict[str, str | None], **fields: Any) -> Do:
    """Serve, with other headers, of which None leaves one out, and fields of `Answer`."""

    def do(call: Call) -> Answer:
        served = call.serve()
        merged = {**served.headers, "Content-Length": str(len(served.body)), **values}
        return replace(served, headers={key: value for key, value in merged.items() if value is not None}, **fields)

    return do


def endless(*, chunked: bool = False) -> Do:
    """Send bytes until the client goes away."""
    encoding = "chunked" if chunked else None
    return headers({"Content-Length": None, "Transfer-Encoding": encoding}, body=bytes(64 * 1024), endless=True)


def rewritten(change: Callable[[bytes], bytes], *, length: bool = True) -> Do:
    """Serve another body; without ``length``, Content-Length stays that of the right one."""

    def do(call: Call) -> Answer:
        served = call.serve()
        kept = {} if length else {"Content-Length": str(len(served.body))}
        return replace(served, body=change(served.body), headers={**served.headers, **kept})

    return do


def corrupt(at: int = 0) -> Do:
    """Change one byte of the body."""
    return rewritten(lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def more(extra: bytes) -> Do:
    """Send more bytes than Content-Length says."""
    return rewritten(lambda data: data + extra, length=False)


def without(*, header: str = "", query: str = "") -> Do:
    """Serve as if a header or a part of the query had not come: a registry that ignores Range, or mount."""

    def do(call: Call) -> Answer:
        call.headers.pop(header, None)
        call.query.pop(query, None)
        return call.serve()

    return do


@dataclass
class Fault:
    """A rule: what is done with the next requests of a method to a path."""

    method: str
    path: re.Pattern[str]
    times: int
    do: Do
    first: bool
    optional: bool
    fired: bool = False


class Server:
    """Serves at a free port of the loopback interface, in threads, as long as the block lasts.

    Args:
        tls: paths of a certificate and its key.
    """

    def __init__(self, *, tls: tuple[Path, Path] | None = None) -> None:
        self.requests: list[Request] = []
        self.errors: list[BaseException] = []  # of the server's own code, raised at the end
        self._faults: list[Fault] = []
        self.lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), _Handler, self)
        self.port: int = self._server.server_address[1]
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"{'https' if tls else 'http'}://{self.host}"
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            # The handshake is left to the first read, which is in the connection's own thread.
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Raise the server's own error if there was one, and fail if a fault did not fire in a block that did well."""
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
        """Do this with the next requests of a method, if one is given, to where a path (a pattern) is found.

        Requests that are refused for want of authorization do not count, unless it is to come ``first``. One request
        at least must come, unless the fault is ``optional``.
        """
        self._faults.append(Fault(method, re.compile(path), times, do, first, optional))

    def count(self, method: str = "", path: str = "") -> int:
        """The requests so far of a method to where a path is found."""
        return sum(method in ("", request.method) and bool(re.search(path, request.path)) for request in self.requests)

    def refuse(self, call: Call) -> Answer | None:
        """Return the answer to a request without authorization."""
        return None

    def serve(self, call: Call) -> Answer:
        """Answer as it should be answered."""
        return Answer(404)

    def respond(self, call: Call) -> Answer:
        """Answer, with the faults."""
        if do := self._fault(call, first=True):
            return do(call)
        return self.refuse(call) or (self._fault(call) or Call.serve)(call)

    def _fault(self, call: Call, *, first: bool = False) -> Do | None:
        with self.lock:
            for fault in self._faults:
                fits = fault.first == first and fault.method in ("", call.method) and fault.path.search(call.target)
                if fault.times and fits:
                    fault.times -= fault.times > 0
                    fault.fired = True
                    return fault.do
        return None


def parse_query(text: str) -> dict[str, str]:
    """The values by keys; those of the same key with a space between, as scopes are joined."""
    return {key: " ".join(values) for key, values in parse_qs(text, keep_blank_values=True).items()}


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that all of them have ended when it is closed
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
        if error and not isinstance(error, OSError):  # which is a client that went away
            self.owner.errors.append(error)

    def stop(self) -> None:
        self.stopping.set()
        self.shutdown()
        for connection in list(self._connections):
            with suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)  # not TLS's, which is for the thread that reads
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _do(self) -> None:
        path, _, query = self.path.partition("?")
        values = {name.lower(): ", ".join(self.headers.get_all(name, [])) for name in self.headers}
        self._left = 0 if "content-length" not in values else int(values["content-length"])
        self._chunked = values.get("transfer-encoding") == "chunked"
        call = Call(self.command, path, parse_query(query), values, self._read, self.server.owner.serve)
        asked = replace(call, query=dict(call.query), headers=dict(values))  # as it was before a fault changes it
        answered = self.server.owner.respond(call)
        if not answered.early:
            self._read(None)
        status = 0 if answered.cut == -1 else answered.status
        request = Request(asked.method, asked.path, asked.query, asked.headers, status, len(call.body))
        self.server.owner.requests.append(request)
        self.server.stopping.wait(answered.delay)
        if answered.cut != -1:
            self._send(answered)
        if answered.cut is not None or answered.early or answered.endless:
            self._hang_up(answered)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _do  # noqa: N815

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
                break  # the client went away
            size = int(line.split(b";")[0], 16)
            data += self.rfile.read(size)
            self.rfile.readline()
            if not size:
                self._chunked = False  # and nothing is left
                break
        return data[:limit]

    def _send(self, answered: Answer) -> None:
        chunked = answered.headers.get("Transfer-Encoding") == "chunked"
        if not chunked and not answered.endless and answered.status != 204:
            answered.headers.setdefault("Content-Length", str(len(answered.body)))
        self.send_response_only(answered.status)
        for name, value in answered.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        left = sys.maxsize if answered.cut is None else answered.cut
        for part in repeat(answered.body) if answered.endless else [answered.body]:
            for piece in (part[i : i + 1] for i in range(len(part))) if answered.drip else [part]:
                if left and piece:
                    data = piece[:left]
                    left -= len(data)
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
                if self.server.stopping.wait(answered.drip):
                    return
        if chunked and answered.cut is None:
            self.wfile.write(b"0\r\n\r\n")

    def _hang_up(self, answered: Answer) -> None:
        self.close_connection = True
        if answered.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()  # here, before the server shuts it down, which would be an end without a fault
        elif answered.early and answered.cut is None:
            # What is unread when it is closed becomes a reset, which may overtake the answer.
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(64 * 1024):
                pass
