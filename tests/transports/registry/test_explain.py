"""An error names the host that failed; warnings of a registry are shown."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from cachedb import Cache, RegistryError, RegistryUnavailable
from tests.conftest import Run
from tests.support import make
from tests.support.faults import ALWAYS, Answer, Call, Server, answer, change_answer, change_headers, redirect
from tests.support.registries import (  # noqa: F401 - isolate_client is a fixture
    SKIPPED_PAUSE_SECONDS,
    Registry,
    isolate_client,
)

IMAGE = make.image(1)
DEAD = "127.0.0.1:1"


@pytest.fixture
def remote() -> Iterator[Registry]:
    with Registry() as made:
        made.add(IMAGE, "app", "1")
        yield made


def test_a_redirect_target_that_is_down_is_named(cache: Cache, remote: Registry) -> None:
    remote.fault(redirect(f"http://{DEAD}"), path="/blobs/", times=ALWAYS)
    message = f"^{DEAD} \\(named by {remote.host}\\) cannot be reached: "
    with pytest.raises(RegistryUnavailable, match=message):
        cache.pull(f"{remote.host}/app:1")


@pytest.mark.parametrize(
    ("status", "message"),
    [(403, r"refuses blob .*\(403\): the link may have expired"), (404, "has no blob"), (503, "is overloaded")],
)
def test_a_redirect_target_that_refuses_is_named(cache: Cache, remote: Registry, status: int, message: str) -> None:
    with Server() as store:
        store.fault(answer(status), times=ALWAYS)
        remote.fault(redirect(store.url), path="/blobs/", times=ALWAYS)
        with pytest.raises(RegistryError, match=f"^{store.host} \\(named by {remote.host}\\) {message}"):
            cache.pull(f"{remote.host}/app:1")


def test_a_redirect_target_that_interrupts_is_named(cache: Cache, remote: Registry) -> None:
    with Registry() as store:
        store.add(IMAGE, "app", "1")
        store.fault(change_answer(cut=1), path="/blobs/", times=ALWAYS)
        remote.fault(redirect(store.url), path="/blobs/", times=ALWAYS)
        message = f"^{store.host} \\(named by {remote.host}\\) keeps interrupting"
        with pytest.raises(RegistryError, match=message):
            cache.pull(f"{remote.host}/app:1")


def test_a_token_server_is_named(cache: Cache) -> None:
    with Registry(auth="bearer") as remote, Server() as tokens:
        name = remote.add(IMAGE, "app", "1")
        tokens.fault(answer(401), path="/token")
        remote.realm = f"{tokens.url}/token"
        message = rf"^{tokens.host} \(token server of {remote.host}\) refuses a token .* log in with `skopeo login "
        with pytest.raises(RegistryError, match=f"{message}{remote.host}`"):
            cache.pull(name)
        remote.realm = f"http://{DEAD}/token"
        with pytest.raises(RegistryUnavailable, match=rf"^{DEAD} \(token server of {remote.host}\) cannot be reached"):
            cache.pull(name)
        remote.realm = f"{remote.url}/token"
        with pytest.raises(RegistryError, match=f"^{remote.host} refuses a token"):
            cache.pull(name)


def test_a_proxy_that_is_down_is_named_at_once(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", f"http://user:pass-word@{DEAD}")
        message = rf"^{DEAD} \(proxy for registry.test\) fails: .*refused: check {scheme}_proxy, or add"
        with pytest.raises(RegistryUnavailable, match=message) as raised:
            cache.pull("registry.test/app:1", plain_http=scheme == "http")
        assert "pass-word" not in str(raised.value)
    assert SKIPPED_PAUSE_SECONDS == []


class Proxy(Server):
    """A proxy that wants a login."""

    def serve(self, call: Call) -> Answer:
        return Answer(407)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_wants_a_login_is_named_at_once(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setattr("tests.support.faults._Handler.do_CONNECT", lambda self: self._handle(), raising=False)
    with Proxy() as proxy:
        monkeypatch.setenv(f"{scheme}_proxy", proxy.host)
        message = (
            rf"^{proxy.host} \(proxy for registry.test\) refuses: .*407.*: put USER:PASSWORD@ .* in {scheme}_proxy"
        )
        with pytest.raises(RegistryError, match=message):
            cache.pull("registry.test/app:1", plain_http=scheme == "http")
    assert SKIPPED_PAUSE_SECONDS == []


# Warnings


def test_a_warning_of_a_registry_is_shown_once(
    cache: Cache, remote: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    warning = '299 - "this tag \\"1\\" will be deleted", 199 - "other", 299 - "second" "Wed, 21 Oct 2015 07:28:00 GMT"'
    remote.fault(change_headers({"Warning": warning}), times=ALWAYS)
    with caplog.at_level(logging.WARNING, "cachedb"):
        cache.pull(f"{remote.host}/app:1")
    assert [record.getMessage() for record in caplog.records] == [
        f'{remote.host} warns: this tag "1" will be deleted',
        f"{remote.host} warns: second",
    ]


def test_a_redirect_target_cannot_warn(cache: Cache, remote: Registry, caplog: pytest.LogCaptureFixture) -> None:
    with Registry() as store:
        store.add(IMAGE, "app", "1")
        store.fault(change_headers({"Warning": '299 - "no"'}), times=ALWAYS)
        remote.fault(redirect(store.url), path="/blobs/", times=ALWAYS)
        cache.pull(f"{remote.host}/app:1")
    assert caplog.records == []


@pytest.mark.usefixtures("cache")
def test_a_warning_is_printed_on_stderr(cachedb: Run, remote: Registry) -> None:
    remote.fault(change_headers({"Warning": '299 - "the limit is near\x1b[2J"'}), times=ALWAYS)
    done = cachedb("pull", "-q", f"{remote.host}/app:1")
    assert done.stdout == f"{remote.host}/app:1\n"
    assert re.fullmatch(rf"cachedb: {remote.host} warns: the limit is near\?\[2J\n", done.stderr)
