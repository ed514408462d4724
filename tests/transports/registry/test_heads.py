"""Answers of odd servers are read: interim answers, many and long headers, encodings."""

from __future__ import annotations

import gzip
import http.client
import io
import random
from collections.abc import Iterator

import pytest

from cachedb import Cache, RegistryUnavailable
from cachedb.oci.digests import Digest
from cachedb.oci.names import Name
from cachedb.transports.registry import heads
from cachedb.transports.registry.heads import Response
from cachedb.transports.registry.places import place
from cachedb.transports.registry.repository import Repository
from tests.support import make
from tests.support.faults import ALWAYS, Answer, Call, answer, change_headers
from tests.support.registries import Registry, isolate_client  # noqa: F401 - isolate_client is a fixture

IMAGE = make.image(1, 2, size=100_000)
LAYER = make.digest_of(IMAGE.layers[0])


class Socket:
    """A socket with a server's whole answer."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.timeout: float | None = 600

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(io.BytesIO(self._data))

    def gettimeout(self) -> float | None:
        return self.timeout

    def settimeout(self, seconds: float | None) -> None:
        self.timeout = seconds


def read(data: bytes, method: str = "GET") -> Response:
    response = Response(Socket(data), method=method)  # type: ignore[arg-type]
    response.begin()
    return response


def test_interim_answers_are_skipped() -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\nContent-Length: 5\r\n\r\n"
    response = read(b"HTTP/1.1 100 Continue\r\n\r\n" + early * 2 + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody")
    assert (response.status, response.headers["Link"], response.read()) == (200, None, b"body")
    assert read(b"HTTP/1.1 101 Switching Protocols\r\n\r\n").status == 101


def test_endless_interim_answers_are_an_error() -> None:
    assert read(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100 + b"HTTP/1.1 200 OK\r\n\r\n").status == 200
    with pytest.raises(http.client.HTTPException, match="more than 100 interim answers"):
        read(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 101 + b"HTTP/1.1 200 OK\r\n\r\n")


def test_all_headers_are_kept() -> None:
    response = read(b"HTTP/1.0 200\r\nA: 1\r\nB: 2\r\n  folded\r\nA: 3\r\nContent-Length: 2\r\n\r\nok..")
    assert response.headers.get_all("a") == ["1", "3"]
    assert response.headers["B"].split() == ["2", "folded"]
    assert (response.version, response.reason, response.read()) == (10, "", b"ok")


def test_the_framing_is_that_of_http_client() -> None:
    chunked = read(b"HTTP/1.1 200 OK\r\nTRANSFER-ENCODING: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
    assert (chunked.read(), chunked.will_close) == (b"ok", False)
    closing = read(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end")
    assert (closing.read(), closing.will_close) == (b"until the end", True)
    assert read(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", "HEAD").read() == b""


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "closed connection without response"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "in the middle of the headers"),
        (b"HTTP/1.1 200 OK\r\nA: 1\r\n", "in the middle of the headers"),
        (b"SSH-2.0-OpenSSH\r\n", "SSH-2.0-OpenSSH"),
        (b"HTTP/1.1\r\n\r\n", r"HTTP/1\.1"),
    ],
)
def test_what_is_no_answer_is_an_error(data: bytes, error: str) -> None:
    with pytest.raises((http.client.HTTPException, ConnectionError), match=error):
        read(data)


def test_a_head_is_read_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    head = b"HTTP/1.1 200 OK\r\nA: 1\r\n\r\n"
    monkeypatch.setattr(heads, "_MAX_BYTES", len(head))
    assert read(head).headers["A"] == "1"
    monkeypatch.setattr(heads, "_MAX_BYTES", len(head) - 1)
    with pytest.raises(http.client.LineTooLong):
        read(head)


# Whole pulls


@pytest.fixture
def remote() -> Iterator[Registry]:
    with Registry() as made:
        made.add(IMAGE, "app", "1")
        yield made


def assert_pulled(cache: Cache, remote: Registry) -> None:
    cache.pull(f"{remote.host}/app:1")
    assert all(cache.get_blob(digest) == data for digest, data in IMAGE.blobs.items())


def read_blob(remote: Registry, digest: str, size: int) -> bytes:
    repository = Repository(place(Name.parse(f"{remote.host}/app:1")))
    blob, buffer, found = repository.blob(Digest(digest), size), memoryview(bytearray(64 * 1024)), b""
    while count := blob.readinto(buffer):
        found += buffer[:count]
    repository.close()
    return found


def test_many_and_long_headers_are_accepted(cache: Cache, remote: Registry) -> None:
    headers: dict[str, str | None] = {f"X-Header-{number}": "x" for number in range(150)}
    remote.fault(change_headers({**headers, "X-Long": "x" * 70_000}), times=ALWAYS)
    assert_pulled(cache, remote)


@pytest.mark.parametrize("status", [*range(520, 525)])
def test_failures_of_a_proxy_before_the_registry_are_retried(cache: Cache, remote: Registry, status: int) -> None:
    remote.fault(answer(status), path="/manifests/", times=2)
    assert_pulled(cache, remote)
    remote.fault(answer(status), path="/manifests/", times=ALWAYS)
    with pytest.raises(RegistryUnavailable, match=rf"overloaded, or failing \({status}\)"):
        cache.pull(f"{remote.host}/app:1")


def encode(call: Call) -> Answer:
    """Serve, and encode the body although the client refuses that, as some proxies do."""
    served = call.serve()
    assert call.headers["accept-encoding"] == "identity"
    body = gzip.compress(served.body) if call.method == "GET" else b""
    return Answer(served.status, {**served.headers, "Content-Encoding": "gzip"}, body)


@pytest.mark.parametrize("path", ["/manifests/", "/blobs/", "/referrers/", ""])
def test_an_encoded_body_is_decoded(cache: Cache, remote: Registry, path: str) -> None:
    remote.fault(encode, path=path, times=ALWAYS)
    cache.pull(f"{remote.host}/app:1", referrers=True)
    assert_pulled(cache, remote)


def test_an_encoded_token_is_decoded(cache: Cache) -> None:
    with Registry(auth="bearer") as remote:
        remote.anonymous = True
        remote.add(IMAGE, "app", "1")
        remote.fault(encode, path="/token")
        assert_pulled(cache, remote)


def test_an_interrupted_encoded_blob_is_read_again_without_a_range(cache: Cache, remote: Registry) -> None:
    content = random.Random(1).randbytes(300_000)
    digest = make.digest_of(content)
    remote.blobs["app", digest] = content
    cut = True

    def interrupt(call: Call) -> Answer:
        nonlocal cut
        encoded, total = encode(call), len(content)
        if "range" in call.headers:  # the range of an encoded body, whose size is not known
            start = int(call.headers["range"].removeprefix("bytes=").removesuffix("-"))
            encoded.status, encoded.headers["Content-Range"] = 206, f"bytes {start}-{total - 1}/*"
        encoded.cut, cut = (200_000 if cut else None), False
        return encoded

    remote.fault(interrupt, method="GET", path=digest, times=ALWAYS)
    assert read_blob(remote, digest, len(content)) == content


@pytest.mark.parametrize("offset", [0, 50_000])
def test_a_compressed_blob_that_is_called_encoded_is_not_decoded(remote: Registry, offset: int) -> None:
    content = gzip.compress(random.Random(1).randbytes(100_000))
    digest = make.digest_of(content)
    remote.blobs["app", digest] = content
    if offset:
        remote.fault(change_headers({"Content-Encoding": "gzip"}, cut=offset), method="GET", path=digest)
    remote.fault(change_headers({"Content-Encoding": "gzip"}), method="GET", path=digest, times=ALWAYS)
    assert read_blob(remote, digest, len(content)) == content
