"""A slow registry is waited for, and an answer without an end is not."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cachedb import Cache, CacheError, RegistryError, RegistryUnavailable
from cachedb.transports.registry import answers, heads
from cachedb.transports.registry.connections import Connections
from cachedb.transports.registry.heads import Response, SlowHead
from tests.conftest import Run
from tests.support import make
from tests.support.faults import ALWAYS, change_answer
from tests.support.registries import (  # noqa: F401 - isolate_client is a fixture
    PASSWORD,
    USER,
    Registry,
    isolate_client,
)

IMAGE = make.image(1)


@pytest.fixture
def remote() -> Iterator[Registry]:
    with Registry() as made:
        made.add(IMAGE, "app", "1")
        yield made


@contextmanager
def serving(serve: Callable[[socket.socket], None]) -> Iterator[socket.socket]:
    """Yield the client's end of a connection; the server's end is served in a thread until the block ends."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=serve, args=(theirs,))
    thread.start()
    try:
        yield ours
    finally:
        ours.close()
        thread.join()
        theirs.close()


@pytest.mark.slow
def test_an_answer_is_waited_for_as_long_as_the_timeout_says(cache: Cache, remote: Registry) -> None:
    remote.fault(change_answer(delay=60), path="/manifests/", times=ALWAYS)
    message = f"^{remote.host} sent no answer in 0.2 seconds: wait longer with --timeout$"
    with pytest.raises(RegistryUnavailable, match=message):
        cache.pull(f"{remote.host}/app:1", timeout=0.2)
    assert remote.count() <= 1, "it is not asked again"


@pytest.mark.slow
def test_the_first_byte_may_take_longer_than_the_next_ones(
    cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "_READ_SECONDS", 0.3)
    remote.fault(change_answer(delay=0.5), path="/blobs/", times=2)
    cache.pull(f"{remote.host}/app:1")
    assert cache.is_image_complete(f"{remote.host}/app:1")
    assert remote.count(path="/blobs/") == 2, "nothing is requested again"


def test_the_timeout_is_for_the_first_byte_of_the_head_and_of_the_body() -> None:
    timeouts = list[float | None]()
    goes_on = threading.Event()

    def serve(connection: socket.socket) -> None:
        for part in (b"HTTP/1.1 103 Early Hints\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"a", b"b"):
            connection.sendall(part)
            goes_on.wait()
            goes_on.clear()

    with serving(serve) as ours:
        ours.settimeout(600)
        response = Response(ours, method="GET")
        goes_on.set()
        response.begin()
        timeouts.append(ours.gettimeout())
        goes_on.set()
        assert response.read1(1) == b"a"
        timeouts.append(ours.gettimeout())
        goes_on.set()
        assert response.read1(1) == b"b"
        goes_on.set()
        response.close()
    assert timeouts == [600, heads._READ_SECONDS]


@pytest.mark.parametrize("part", [b"H", b"HTTP/1.1 200 OK\r\nA: 1\r\n"])
def test_a_head_that_stops_is_an_error(monkeypatch: pytest.MonkeyPatch, part: bytes) -> None:
    monkeypatch.setattr(heads, "_READ_SECONDS", 0.05)
    with serving(lambda connection: connection.sendall(part)) as ours, Response(ours, method="GET") as response:
        ours.settimeout(600)
        with pytest.raises(SlowHead, match=r"the headers stopped for 0\.05 seconds"):
            response.begin()


def test_a_head_without_an_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_HEAD_SECONDS", 0.05)

    def serve(connection: socket.socket) -> None:
        with suppress(OSError):  # the client closes the connection
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            for _ in range(1000):
                connection.sendall(b"x")
                time.sleep(0.001)
            connection.shutdown(socket.SHUT_WR)

    with serving(serve) as ours, Response(ours, method="GET") as response:
        ours.settimeout(600)
        with pytest.raises(http.client.HTTPException, match=r"the headers took over 0\.05 seconds"):
            response.begin()


def test_a_slow_head_is_not_requested_again(cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_HEAD_SECONDS", -1)
    with pytest.raises(RegistryUnavailable, match="the headers took over"):
        cache.pull(f"{remote.host}/app:1")
    assert remote.count() == 1


@pytest.mark.parametrize("path", ["/manifests/", "/token"])
def test_a_document_without_an_end_is_an_error(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str
) -> None:
    monkeypatch.setattr(answers, "_BODY_SECONDS", 0.1)
    with Registry(auth="bearer") as remote:
        name, authfile = remote.add(IMAGE, "app", "1"), tmp_path / "auth.json"
        authfile.write_text(json.dumps({"auths": {remote.host: {"username": USER, "password": PASSWORD}}}))
        remote.fault(change_answer(drip=0.01), method="GET", path=path)
        with pytest.raises(RegistryUnavailable, match=r"took over 0\.1 seconds: try again$"):
            cache.pull(name, authfile=authfile)


def test_the_error_document_of_a_slow_server_is_left_out(
    cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "_BODY_SECONDS", 0.1)
    remote.fault(change_answer(drip=0.01), method="GET", path="/manifests/2")
    with pytest.raises(RegistryError, match=r"has no app:2 \(404\)$"):
        cache.pull(f"{remote.host}/app:2")


def test_connections_are_kept_alive(remote: Registry) -> None:
    made = Connections(remote.host)
    with made.get_pool(remote.url, is_ours=True).request("GET", f"{remote.url}/v2/", preload_content=False) as response:
        (connection,) = made._connections
        assert connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
        assert response.status == 200
    made.close()


def test_a_timeout_is_above_zero(cache: Cache, cachedb: Run, remote: Registry) -> None:
    name = f"{remote.host}/app:1"
    for wrong in (0, -1, float("nan")):
        for method in (cache.pull, cache.push):
            with pytest.raises(CacheError, match=r"^timeout is .*: give a number above 0"):
                method(name, timeout=wrong)
    cache.pull(name, timeout=float("inf"))
    assert cachedb("pull", "-q", "--timeout", "30s", name).returncode == 0
    assert cachedb("pull", "-q", "--timeout", "soon", name).returncode == 2
