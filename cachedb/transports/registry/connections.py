"""Connect to a registry and the hosts that it names, with proxies and certificates."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, wait
from typing import Any, Final
from weakref import WeakSet

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import parse_url

from cachedb.errors import CacheError, ignore_os_errors
from cachedb.threads import start
from cachedb.transports.registry.heads import Response
from cachedb.transports.registry.proxies import Proxy, find_proxy
from cachedb.transports.registry.tls import Certificates, find_certificates, make_tls_context
from cachedb.transports.registry.urls import host_of

__all__ = ["Connections"]


_POLL_SECONDS: Final = 0.05  # between checks for a stop
_MAX_CONNECTIONS: Final = 16  # kept open to one host
# With keep-alive, the kernel notices in a minute that a server is gone. A slow answer may still take many minutes.
_SOCKET_OPTIONS: Final = [
    *HTTPConnection.default_socket_options,
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]


class Connections:
    """The connections of one client; safe to use from several threads."""

    def __init__(self, registry: str, *, verify: bool = True) -> None:
        """Create the connections without opening any.

        Args:
            registry: the registry's ``host[:port]``, whose certificates are used.
            verify: whether to verify the certificates of servers.
        """
        self.stopped = threading.Event()
        """Set when requests are cancelled."""
        self._registry, self._verify = registry, verify
        self._guard = threading.RLock()
        self._certificates: dict[str | None, Certificates] = {}  # by host; None is the registry itself
        self._pools: dict[tuple[Certificates | None, str | None, Proxy | None], urllib3.PoolManager] = {}
        self._connections: WeakSet[HTTPConnection] = WeakSet()
        self._pool_classes = _create_pool_classes(self._connect)

    def close(self) -> None:
        """Close all connections."""
        for pool in self._pools.values():
            pool.clear()

    def stop(self) -> None:
        """Cancel running requests and refuse new ones.

        Without it, a cancelled transfer could wait ten minutes for a slow registry.
        """
        self.stopped.set()
        with self._guard:
            connections = list(self._connections)
        for connection in connections:
            _shut_down(connection)

    def check_stopped(self) -> None:
        """Raise `CacheError` if requests are cancelled."""
        if self.stopped.is_set():
            raise CacheError("cancelled: another transfer failed")

    def get_pool(self, url: str, *, is_ours: bool) -> urllib3.PoolManager:
        """Return the connection pool for a URL, through a proxy if the environment sets one.

        Args:
            url: the URL of a request.
            is_ours: whether the URL belongs to the registry itself.

        Raises:
            RegistryError: if the environment names an invalid proxy, or a client certificate cannot be used.
        """
        scheme, proxy = parse_url(url).scheme, find_proxy(url)
        certificates = self.find_certificates(url, is_ours=is_ours) if scheme == "https" else None
        key = certificates, scheme, proxy
        with self._guard:
            if key not in self._pools:
                options: dict[str, Any] = {"maxsize": _MAX_CONNECTIONS, "socket_options": _SOCKET_OPTIONS}
                options["ssl_context"] = make_tls_context(certificates, verify=self._verify) if certificates else None
                if proxy:
                    login = {"Proxy-Authorization": proxy.authorization} if proxy.authorization else {}
                    pool: urllib3.PoolManager = urllib3.ProxyManager(proxy.url, proxy_headers=login, **options)
                else:
                    pool = urllib3.PoolManager(**options)
                pool.pool_classes_by_scheme = self._pool_classes
                self._pools[key] = pool
            return self._pools[key]

    def find_certificates(self, url: str, *, is_ours: bool) -> Certificates:
        """Return the certificates for a URL, as in `get_pool`; the folders of each host are listed once."""
        host = None if is_ours else host_of(url)
        with self._guard:
            if host not in self._certificates:
                self._certificates[host] = find_certificates(self._registry, host)
            return self._certificates[host]

    def _connect(self, connection: HTTPConnection, connecting: _Connecting) -> None:
        """Connect in a thread, which is abandoned on a stop because connecting cannot be cancelled."""
        if not start(threading.Thread(target=connecting.run, daemon=True)):
            connecting.run()
        try:
            while wait([connecting.future], _POLL_SECONDS).not_done:
                self.check_stopped()
        except BaseException:
            connecting.abandon()
            raise
        connecting.future.result()
        self._add_connection(connection)

    def _add_connection(self, connection: HTTPConnection) -> None:
        with self._guard:
            self._connections.add(connection)
        if self.stopped.is_set():
            _shut_down(connection)


class _Connecting:
    """One attempt to connect, in a thread of its own.

    If it is abandoned, only its thread closes the socket. TLS writes to the number of the socket. If another thread
    closed it, a new file could get that number, and the handshake would be written into that file.
    """

    def __init__(self, connect: Callable[[], None], close: Callable[[], None]) -> None:
        self.future = Future[None]()
        self.is_abandoned = False
        self._connect, self._close = connect, close

    def run(self) -> None:
        """Connect, and close the connection if nobody waits for it any more."""
        failure: BaseException | None = None
        try:
            self._connect()
        except BaseException as error:
            failure = error
        try:
            self.future.set_exception(failure)
        except InvalidStateError:  # abandoned
            self._close()

    def abandon(self) -> None:
        """Leave the connection to its thread, if the attempt is not complete."""
        self.is_abandoned = self.future.cancel()


def _create_pool_classes(
    connect: Callable[[HTTPConnection, _Connecting], None],
) -> dict[str, type[urllib3.HTTPConnectionPool]]:
    """Return urllib3 pool classes by scheme; their connections call ``connect`` for each attempt."""

    class Plain(HTTPConnection):
        response_class = Response
        connecting: _Connecting | None = None

        def connect(self) -> None:
            self.connecting = _Connecting(super().connect, super().close)
            connect(self, self.connecting)

        def close(self) -> None:
            if self.connecting is None or not self.connecting.is_abandoned:
                super().close()

    class Secure(HTTPSConnection):
        response_class = Response
        connecting: _Connecting | None = None

        def connect(self) -> None:
            self.connecting = _Connecting(super().connect, super().close)
            connect(self, self.connecting)
            self.is_verified = True  # else urllib3 warns about a connection that the user chose not to verify

        def close(self) -> None:
            if self.connecting is None or not self.connecting.is_abandoned:
                super().close()

    class PlainPool(urllib3.HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(urllib3.HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}


def _shut_down(connection: HTTPConnection) -> None:
    """Shut a connection down, so that a thread waiting for it sees its end."""
    if isinstance(connection.sock, socket.socket):
        with ignore_os_errors():
            # The TLS socket's own shutdown would drop the TLS state that the thread still uses.
            socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)
