"""Connections to a registry: what a stop leaves of those that are being opened."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator

import pytest

from cachedb import CacheError
from cachedb.threads import start
from cachedb.transports.registry.connections import Connections
from tests.support.waiting import wait_until


@pytest.fixture
def silent_host() -> Iterator[str]:
    """A host that accepts connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_stop_leaves_the_socket_of_a_handshake_open(silent_host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that is opened next would get the socket's number, and the handshake would be written into it."""
    begun, stopped = threading.Event(), threading.Event()
    sockets: list[socket.socket] = []

    def wait_for_the_stop(_: ssl.SSLContext, sock: socket.socket, **options: object) -> ssl.SSLSocket:
        sockets.append(sock)
        begun.set()
        assert stopped.wait(30)
        was_open.append(sock.fileno() != -1)
        raise OSError("the handshake failed")

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wait_for_the_stop)
    connections, was_open = Connections(silent_host), list[bool]()
    url = f"https://{silent_host}/v2/"

    def request() -> None:
        with pytest.raises(CacheError, match="cancelled: another transfer failed"):
            connections.get_pool(url, is_ours=True).request("GET", url, retries=False)
        stopped.set()

    thread = threading.Thread(target=request)
    assert start(thread)
    assert begun.wait(30)
    connections.stop()
    thread.join(30)
    assert wait_until(lambda: was_open == [True], 30)
    assert wait_until(lambda: sockets[0].fileno() == -1, 30)
