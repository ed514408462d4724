"""Registries that lie to who pushes, or pulls what refers to an image: an error of one line, and no harm."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachedb import Cache, RegistryError, client
from tests import make
from tests.faults import answer, lost, redirect
from tests.promises import check
from tests.registries import Registry, certificate
from tests.test_pull import PAUSES, alone, login  # noqa: F401 - alone is a fixture
from tests.test_push import FIRST, assert_has, keep


@pytest.fixture
def cache(directory: Path) -> Iterator[Cache]:
    with Cache.open(directory) as opened:
        keep(opened, "app:1", FIRST)
        yield opened
    check(directory)


@pytest.fixture
def remote() -> Iterator[Registry]:
    with Registry() as made:
        yield made


def test_an_upload_that_is_cut_off_goes_on_over_tls_too(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What OpenSSL says of it is not that nobody is to be trusted.
    ca, certified, key = certificate(tmp_path / "tls", "127.0.0.1")
    monkeypatch.setenv("SSL_CERT_FILE", str(ca))
    keep(cache, "huge:1", huge := make.image(9, size=30_000_000))
    with Registry(tls=(certified, key)) as remote:
        for _ in range(3):
            remote.fault(lost(3_000_000, reset=True), path="/blobs/uploads/.*state=")
        cache.push("huge:1", f"{remote.host}/huge:1", plain_http=False)
        assert_has(remote, "huge", "1", huge)
    assert PAUSES


def test_credentials_go_where_the_connection_goes(cache: Cache, tmp_path: Path) -> None:
    # Parsers of URLs differ in where the host ends: at the backslash, or before the last @.
    with Registry(auth="basic") as remote, Registry() as storage, Registry() as other:
        name, authfile = remote.add(FIRST, "app", "1"), login(tmp_path / "auth.json", remote.host)
        remote.fault(redirect(storage.url), method="GET", path="/blobs/", times=99)
        storage.fault(answer(307, {"Location": f"http://{other.host}\\@{remote.host}/x"}), times=99)
        cache.remove_manifest("app:1")
        cache.collect_garbage()
        with pytest.raises(RegistryError):
            cache.pull(name, authfile=authfile)
        assert all("authorization" not in request.headers for request in [*storage.requests, *other.requests])


@pytest.mark.parametrize("port", ["", ":443"])
def test_a_port_that_is_left_out_is_the_usual_one(port: str) -> None:
    assert client._origin(f"https://registry.example.org{port}/v2/") == ("https", "registry.example.org", 443)


@pytest.mark.parametrize(
    "after", ["²", "Wed, 21 Oct 99999 07:28:00 GMT", "Wed, 21 Oct 2015 07:28:00 +99999999999999999999", "-1", "soon"]
)
def test_a_time_to_wait_that_is_none_is_not_waited_for(cache: Cache, remote: Registry, after: str) -> None:
    remote.fault(answer(503, {"Retry-After": after}), method="PUT", path="/blobs/")
    cache.push("app:1", f"{remote.host}/app:1")
    assert_has(remote, "app", "1", FIRST)
    assert len(PAUSES) == 1


def test_a_long_challenge_costs_no_time() -> None:
    began = time.monotonic()
    assert client._CHALLENGE.findall("a" * 60_000) == []
    assert time.monotonic() - began < 2  # and a minute if it is tried from each letter on
