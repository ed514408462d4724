"""Authorization: where challenges come from, how tokens are requested, and to whom credentials are sent."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from cachedb import Cache, RegistryError
from cachedb.oci.names import Name
from cachedb.transports.registry import authorization, credentials
from cachedb.transports.registry.access import Access
from cachedb.transports.registry.places import place
from cachedb.transports.registry.repository import Repository
from tests.conftest import Run
from tests.support import make
from tests.support.faults import Answer, Call, answer, redirect
from tests.support.registries import (  # noqa: F401 - isolate_client is a fixture
    PASSWORD,
    REFRESH_TOKEN,
    USER,
    Registry,
    basic,
    certificate,
    isolate_client,
)

IMAGE = make.image(1, 2)


@pytest.fixture
def remote() -> Iterator[Registry]:
    with Registry() as made:
        made.add(IMAGE, "app", "1")
        yield made


@pytest.fixture
def guarded() -> Iterator[Registry]:
    with Registry(auth="bearer") as made:
        made.add(IMAGE, "app", "1")
        yield made


def write_login(tmp_path: Path, remote: Registry, **entry: str) -> Path:
    path = tmp_path / "auth.json"
    path.write_text(json.dumps({"auths": {remote.host: entry or {"username": USER, "password": PASSWORD}}}))
    return path


# Challenges


class HidingRegistry(Registry):
    """A registry that sends a challenge only at its base URL."""

    def __init__(self, status: int) -> None:
        super().__init__(auth="basic")
        self.status = status

    def refuse(self, call: Call) -> Answer | None:
        refused = super().refuse(call)
        return Answer(self.status) if refused and call.path != "/v2/" else refused


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_hidden_repository_is_read_after_the_challenge_of_the_base_url(
    cache: Cache, tmp_path: Path, status: int
) -> None:
    with HidingRegistry(status) as remote:
        name, authfile = remote.add(IMAGE, "app", "1"), write_login(tmp_path, remote)
        cache.pull(name, authfile=authfile)
        assert cache.is_image_complete(name)
        cache.push(name, f"{remote.host}/new:1", authfile=authfile)
        assert ("new", "1") in remote.manifests
        assert [request.path for request in remote.requests].count("/v2/") == 2, "one for the pull, one for the push"


def test_without_credentials_the_base_url_is_not_asked(cache: Cache, tmp_path: Path) -> None:
    with HidingRegistry(404) as remote:
        with pytest.raises(RegistryError, match="has no app:1"):
            cache.pull(remote.add(IMAGE, "app", "1"))
        assert remote.count(path="/v2/$") == 0


def test_an_image_that_an_open_registry_lacks_costs_one_more_request(
    cache: Cache, remote: Registry, tmp_path: Path
) -> None:
    authfile = write_login(tmp_path, remote)
    with pytest.raises(RegistryError, match=r"has no app:2 \(404"):
        cache.pull(f"{remote.host}/app:2", authfile=authfile)
    assert [request.path for request in remote.requests].count("/v2/") == 1
    remote.requests.clear()
    remote.referrers = False
    cache.pull(f"{remote.host}/app:1", authfile=authfile, referrers=True)
    assert remote.count(path="/v2/$") == 0, "the repository is open"


def test_credentials_are_read_once_until_they_are_refused(
    cache: Cache, guarded: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    find = credentials.find

    def note(registry: str, *arguments: Any, **options: Any) -> Any:
        read.append(registry)
        return find(registry, *arguments, **options)

    monkeypatch.setattr(authorization, "find", note)
    with HidingRegistry(404) as remote:
        name, authfile = remote.add(IMAGE, "app", "1"), write_login(tmp_path, remote)
        cache.pull(name, authfile=authfile)
        assert read == [remote.host]
        read.clear()
        remote.fault(answer(404), times=3, first=True)
        with pytest.raises(RegistryError):
            cache.pull(remote.add(IMAGE, "app", "2"), authfile=authfile, referrers=True)
        assert len(read) <= 1
    read.clear()
    with closing(
        Repository(place(Name(f"{guarded.host}/app", "1")), Access(authfile=write_login(tmp_path, guarded)))
    ) as repository:
        for count in (1, 2):
            repository.digest("1")
            assert len(read) == count, "a helper may return a new token, so a refusal reads credentials again"
            guarded.tokens.clear()


@pytest.mark.parametrize(
    "challenge",
    [
        'Bearer realm="{realm}",service="s", Basic realm="x"',
        'Basic realm="x", Bearer realm="{realm}",service="s"',
        'Bearer\trealm="{realm}",\tservice="s"',
        'Negotiate, Bearer realm="{realm}"',
    ],
)
def test_the_token_server_is_found_among_other_challenges(cache: Cache, guarded: Registry, challenge: str) -> None:
    guarded.anonymous = True
    header = {"WWW-Authenticate": challenge.format(realm=guarded.realm)}
    guarded.fault(answer(401, header), path="/manifests/", first=True)
    cache.pull(f"{guarded.host}/app:1")
    assert guarded.count(path="/token") == 1


# Tokens


def test_a_mount_requests_each_scope_as_a_parameter(
    cache: Cache, guarded: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = list[str]()

    def record(values: object) -> str:
        queries.append(urlencode(values))  # type: ignore[arg-type]
        return queries[-1]

    monkeypatch.setattr("cachedb.transports.registry.urls.urlencode", record)
    authfile = write_login(tmp_path, guarded)
    cache.pull(f"{guarded.host}/app:1", authfile=authfile)
    pushed = cache.push(f"{guarded.host}/app:1", f"{guarded.host}/new:1", authfile=authfile)
    assert pushed.mounted == 3
    assert any(
        re.fullmatch(r"service=registry.test&scope=repository%3Anew%3A.*&scope=repository%3Aapp%3Apull", query)
        for query in queries
    )


def test_a_registry_token_is_sent_as_it_is(cache: Cache, guarded: Registry, tmp_path: Path) -> None:
    guarded.tokens["given"] = float("inf"), {("app", "pull")}
    cache.pull(f"{guarded.host}/app:1", authfile=write_login(tmp_path, guarded, registrytoken="given"))
    assert cache.is_image_complete(f"{guarded.host}/app:1")
    assert guarded.count(path="/token") == 0


def test_a_registry_token_that_is_refused_is_an_error(cache: Cache, guarded: Registry, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="refuses app") as raised:
        cache.pull(f"{guarded.host}/app:1", authfile=write_login(tmp_path, guarded, registrytoken="stale-token"))
    assert "stale-token" not in str(raised.value)
    assert guarded.count(path="/manifests/") == 2, "one request without the token, one with it"


# Redirects of the token server


@pytest.mark.parametrize("entry", [{}, {"identitytoken": REFRESH_TOKEN}])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_of_the_token_server_is_followed(
    cache: Cache, guarded: Registry, tmp_path: Path, entry: dict[str, str], status: int
) -> None:
    guarded.realm = f"{guarded.url}/old"

    def lead(call: Call) -> Answer:
        return Answer(status, {"Location": f"/token?{urlencode(call.query)}"})

    guarded.fault(lead, path="^/old", first=True)
    cache.pull(f"{guarded.host}/app:1", authfile=write_login(tmp_path, guarded, **entry))
    assert cache.is_image_complete(f"{guarded.host}/app:1")


def test_a_password_is_not_sent_along_a_redirect_to_another_host(
    cache: Cache, guarded: Registry, remote: Registry, tmp_path: Path
) -> None:
    guarded.tokens["T"] = float("inf"), {("app", "pull")}
    guarded.fault(redirect(remote.url), path="/token")
    remote.fault(answer(200, body=b'{"token": "T"}'), path="/token")
    cache.pull(f"{guarded.host}/app:1", authfile=write_login(tmp_path, guarded))
    assert guarded.requests[1].headers["authorization"] == basic()
    (request,) = remote.requests
    assert "authorization" not in request.headers


def test_a_refresh_token_is_not_sent_along_a_redirect_to_another_host(
    cache: Cache, guarded: Registry, remote: Registry, tmp_path: Path
) -> None:
    guarded.fault(redirect(remote.url), path="/token")
    with pytest.raises(RegistryError, match="its token server redirects a secret to another host"):
        cache.pull(f"{guarded.host}/app:1", authfile=write_login(tmp_path, guarded, identitytoken=REFRESH_TOKEN))
    assert remote.requests == []


def test_a_token_server_cannot_redirect_from_https_to_http(
    cache: Cache, remote: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, *pair = certificate(tmp_path / "tls", "127.0.0.1")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    with Registry(auth="bearer", tls=(pair[0], pair[1])) as guarded:
        guarded.fault(redirect(remote.url), path="/token")
        with pytest.raises(RegistryError, match="redirect to a URL whose scheme is not allowed"):
            cache.pull(guarded.add(IMAGE, "app", "1"), plain_http=False, authfile=write_login(tmp_path, guarded))
    assert remote.requests == []


# Given credentials


@pytest.mark.slow
def test_given_credentials_replace_the_files(cachedb: Run, guarded: Registry, tmp_path: Path) -> None:
    name, authfile = f"{guarded.host}/app:1", str(write_login(tmp_path, guarded, username="other", password="wrong"))
    good = f"--creds={USER}:{PASSWORD}"
    assert cachedb("pull", "-q", "--authfile", authfile, name).returncode == 1
    assert cachedb("pull", "-q", "--authfile", authfile, good, name).returncode == 0
    assert cachedb("pull", "-q", "--dry-run", "--authfile", authfile, good, name).returncode == 0
    assert cachedb("push", "-q", good, name, f"{guarded.host}/new:1").returncode == 0
    assert cachedb("push", "-q", "--all-tags", good, f"{guarded.host}/app", f"{guarded.host}/all").returncode == 0
    for wrong in ("secret-word", ":secret-word"):
        refused = cachedb("pull", "--creds", wrong, name)
        assert refused.returncode == 2
        assert "secret-word" not in refused.stderr


def test_given_credentials_are_not_sent_to_a_mirror(
    cache: Cache, guarded: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Registry(auth="basic") as mirror:
        mirror.add(IMAGE, "app", "1")
        monkeypatch.setenv("CACHEDB_MIRRORS", f"{guarded.host}={mirror.host}")
        cache.pull(f"{guarded.host}/app:1", credentials=(USER, PASSWORD))
        assert mirror.requests
        assert all("authorization" not in request.headers for request in mirror.requests)
