"""The proxy of a URL is the one that Go's clients use."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator

import pytest

from cachedb import Cache, RegistryError
from cachedb.transports.registry.proxies import find_proxy
from tests.support import make
from tests.support.faults import Answer, Call
from tests.support.registries import Registry, isolate_client  # noqa: F401 - isolate_client is a fixture

IMAGE = make.image(1)
PROXY = "http://proxy.test:3128"


@pytest.fixture(autouse=True)
def proxies(monkeypatch: pytest.MonkeyPatch, isolate_client: None) -> None:  # noqa: F811 - the fixture
    monkeypatch.setenv("http_proxy", PROXY)
    monkeypatch.setenv("https_proxy", PROXY)


def is_proxied(url: str) -> bool:
    return find_proxy(url) is not None


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:5000", "127.0.0.1", "127.8.9.1:5000", "[::1]:5000", "[::ffff:127.0.0.1]"]
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_loopback_has_no_proxy(host: str, scheme: str) -> None:
    assert not is_proxied(f"{scheme}://{host}/v2/")
    assert is_proxied(f"{scheme}://localhost.example.test/v2/")


@pytest.mark.parametrize(
    ("listed", "excluded", "proxied"),
    [
        ("*", ["registry.test", "10.0.0.1"], []),
        ("registry.test", ["registry.test", "REGISTRY.test", "a.registry.test:5000"], ["aregistry.test", "test"]),
        ("Registry.Test", ["registry.test"], []),
        (".registry.test", ["a.registry.test", "a.b.registry.test"], ["registry.test"]),
        ("*.registry.test", ["a.registry.test"], ["registry.test", "aregistry.test"]),
        ("registry.test:5000", ["registry.test:5000", "a.registry.test:5000"], ["registry.test", "registry.test:50"]),
        ("registry.test:443", ["registry.test"], ["registry.test:5000"]),
        ("10.0.0.1", ["10.0.0.1", "10.0.0.1:5000"], ["10.0.0.10", "1.10.0.0.1.test"]),
        ("10.0.0.1:5000", ["10.0.0.1:5000"], ["10.0.0.1"]),
        ("10.0.0.0/8", ["10.255.0.1:5000"], ["11.0.0.1", "10.0.0.0.test", "[fd00::1]"]),
        ("10.1.2.3/8", ["10.255.0.1"], []),
        ("fd00::/8", ["[fd12::1]:5000"], ["10.0.0.1", "[fe80::1]"]),
        ("fd00::1", ["[fd00::1]", "[fd00:0::1]:5000"], ["[fd00::2]"]),
        ("[fd00::1]:5000", ["[fd00::1]:5000"], ["[fd00::1]"]),
        (" other.test , registry.test", ["registry.test", "other.test"], ["third.test"]),
        ("other.test registry.test", ["registry.test"], []),
        ("10.0.0.0/99,/,:,*.,,registry.test", ["registry.test"], ["third.test", "10.0.0.1"]),
    ],
)
def test_a_host_that_no_proxy_lists_has_no_proxy(
    monkeypatch: pytest.MonkeyPatch, listed: str, excluded: list[str], proxied: list[str]
) -> None:
    monkeypatch.setenv("no_proxy", listed)
    assert [host for host in excluded if is_proxied(f"https://{host}/")] == []
    assert [host for host in proxied if not is_proxied(f"https://{host}/")] == []


def test_each_scheme_has_its_variable_and_upper_case_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://upper.test:1")
    monkeypatch.setenv("NO_PROXY", "excluded.test")
    monkeypatch.setenv("no_proxy", "*")
    found = find_proxy("https://registry.test/")
    assert found is not None
    assert (found.url, found.variable) == ("http://upper.test:1", "HTTPS_PROXY")
    assert not is_proxied("https://excluded.test/")
    monkeypatch.setenv("HTTPS_PROXY", "")
    found = find_proxy("https://registry.test/")
    assert found is not None
    assert (found.url, found.variable) == (PROXY, "https_proxy")
    monkeypatch.delenv("http_proxy")
    assert not is_proxied("http://registry.test/")


def test_a_cgi_script_ignores_http_proxy_in_upper_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("http_proxy")
    monkeypatch.setenv("HTTP_PROXY", PROXY)
    assert is_proxied("http://registry.test/")
    monkeypatch.setenv("REQUEST_METHOD", "GET")
    assert not is_proxied("http://registry.test/")


@pytest.mark.parametrize(
    ("value", "url", "login"),
    [
        ("proxy.test:3128", PROXY, None),
        ("proxy.test", "http://proxy.test", None),
        ("https://proxy.test:3128/", "https://proxy.test:3128", None),
        ("http://us%20er:p%40s%3As@proxy.test:3128", PROXY, "us er:p@s:s"),
        ("user:a:b@proxy.test:3128", PROXY, "user:a:b"),
        ("us%C3%A9r@proxy.test:3128", PROXY, "usér:"),
    ],
)
def test_a_proxy_is_read_with_its_login(
    monkeypatch: pytest.MonkeyPatch, value: str, url: str, login: str | None
) -> None:
    monkeypatch.setenv("https_proxy", value)
    found = find_proxy("https://registry.test/")
    assert found is not None
    assert found.url == url
    assert found.authorization == ("Basic " + base64.b64encode(login.encode()).decode() if login else "")
    assert not login or found.authorization not in repr(found)


@pytest.mark.parametrize("value", ["socks5://user:secret@proxy.test", "http://user:secret@:1:2", "http://"])
def test_the_error_of_an_invalid_proxy_names_its_variable_and_no_secret(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("https_proxy", value)
    with pytest.raises(RegistryError, match=r"^https_proxy names no HTTP proxy: expected") as raised:
        find_proxy("https://registry.test/")
    assert "secret" not in str(raised.value)


class ProxyServer(Registry):
    """A proxy in front of a registry that only it can reach."""

    def respond(self, call: Call) -> Answer:
        self.logins = [*getattr(self, "logins", []), call.headers.get("proxy-authorization")]
        call.path = re.sub(r"^http://registry\.test", "", call.path)
        return super().respond(call)


@pytest.fixture
def server() -> Iterator[ProxyServer]:
    with ProxyServer() as made:
        made.add(IMAGE, "app", "1")
        yield made


def test_an_image_is_pulled_through_a_proxy_with_a_login(
    cache: Cache, server: ProxyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"us%20er:p%40ss@{server.host}")
    cache.pull("registry.test/app:1", plain_http=True)
    assert cache.is_image_complete("registry.test/app:1")
    assert set(server.logins) == {"Basic " + base64.b64encode(b"us er:p@ss").decode()}


def test_a_registry_on_loopback_is_reached_without_a_proxy(cache: Cache, server: ProxyServer) -> None:
    cache.pull(f"{server.host}/app:1")
    assert cache.is_image_complete(f"{server.host}/app:1")
