"""An image is pulled from its mirrors and locations, and over the connection that is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachedb import Cache, RegistryError
from cachedb.oci.names import Name
from cachedb.transports.registry.access import DEFAULT_ACCESS, Access
from cachedb.transports.registry.places import Place
from cachedb.transports.registry.routes import pull_routes, push_place
from tests.conftest import Run
from tests.support import make
from tests.support.faults import redirect
from tests.support.registries import (  # noqa: F401 - isolate_client is a fixture
    PASSWORD,
    USER,
    Registry,
    certificate,
    isolate_client,
)

IMAGE = make.image(1)
INSECURE = Access(tls_verify=False)


@pytest.fixture
def configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolate_client: None) -> Path:  # noqa: F811
    path = tmp_path / "registries.conf"
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(path))
    path.write_text("")
    return path


@pytest.fixture
def remote() -> Iterator[Registry]:
    with Registry() as made:
        made.add(IMAGE, "app", "1")
        yield made


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Registry]:
    """Run a registry with a certificate that nobody trusts."""
    with Registry(auth="bearer", tls=certificate(tmp_path / "tls", "127.0.0.1")[1:]) as made:
        made.add(IMAGE, "app", "1")
        yield made


def find(name: str, access: Access = DEFAULT_ACCESS) -> list[Place]:
    return [route.place for route in pull_routes(Name.parse(name), access)]


def find_urls(name: str, access: Access = DEFAULT_ACCESS) -> list[str]:
    return [f"{where.url}/{where.repository}" for where in find(name, access)]


# Places


def test_a_prefix_with_a_tag_is_for_this_tag(configuration: Path) -> None:
    configuration.write_text(
        """
        [[registry]]
        prefix = "quay.io/team/app:1"
        location = "one.test/app"
        [[registry.mirror]]
        location = "mirror.test/app:1"
        [[registry]]
        prefix = "quay.io/team/app:2"
        location = "two.test/app:3"
        [[registry]]
        prefix = "quay.io/team/app:4"
        blocked = true
        """
    )
    assert find_urls("quay.io/team/app:1") == ["https://mirror.test/app", "https://one.test/app"]
    assert find_urls("quay.io/team/app:5") == ["https://quay.io/team/app"]
    with pytest.raises(RegistryError, match="is for another tag or digest: leave the tag out of the location"):
        find("quay.io/team/app:2")
    with pytest.raises(RegistryError, match=r"quay.io/team/app:4 is blocked: .* use another registry"):
        push_place(Name.parse("quay.io/team/app:4"), DEFAULT_ACCESS)


def test_mirrors_come_before_the_location_of_a_registry(configuration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configuration.write_text(
        """
        [[registry]]
        prefix = "docker.io/library"
        location = "hub.test/official"
        [[registry.mirror]]
        location = "mirror.test:5000/hub"
        [[registry.mirror]]
        location = "localhost:5000"
        pull-from-mirror = "tag-only"
        [[registry.mirror]]
        location = "digests.test"
        pull-from-mirror = "digest-only"
        """
    )
    monkeypatch.setenv("CACHEDB_MIRRORS", "docker.io=first.test")
    first = "https://first.test/library/alpine"
    mirror, origin = "https://mirror.test:5000/hub/alpine", "https://hub.test/official/alpine"
    assert find_urls("alpine:3") == [first, mirror, "http://localhost:5000/alpine", origin]
    assert find_urls(f"alpine@{IMAGE.digest}") == [first, mirror, "https://digests.test/alpine", origin]
    assert find_urls("team/app") == ["https://first.test/team/app", "https://registry-1.docker.io/team/app"]


def test_a_domain_keeps_its_hosts_unless_it_has_a_location(configuration: Path) -> None:
    configuration.write_text('[[registry]]\nprefix = "*.test"\n')
    assert find_urls("a.test/app") == ["https://a.test/app"]
    configuration.write_text('[[registry]]\nprefix = "*.test"\nlocation = "all.example.org/x"\n')
    assert find_urls("a.test/app") == ["https://all.example.org/x/app"]


def test_an_alias_replaces_a_short_name_of_a_pull(configuration: Path) -> None:
    configuration.write_text('[aliases]\nfedora = "registry.test/fedora"\n"ubi8/ubi" = "redhat.test/ubi8/ubi"\n')
    assert find_urls("fedora:40") == ["https://registry.test/fedora"]
    assert find_urls("ubi8/ubi") == ["https://redhat.test/ubi8/ubi"]
    assert find_urls("docker.io/library/fedora") == ["https://registry-1.docker.io/library/fedora"]
    assert find_urls("alpine") == ["https://registry-1.docker.io/library/alpine"]
    assert push_place(Name.parse("fedora:40"), DEFAULT_ACCESS).registry == "docker.io"


def test_a_blocked_registry_is_refused(configuration: Path) -> None:
    configuration.write_text('[[registry]]\nprefix = "a.test/team"\nblocked = true\n')
    for refused in (find, lambda name: push_place(Name.parse(name), DEFAULT_ACCESS)):
        with pytest.raises(
            RegistryError, match=rf"^a.test/team/app:1 is blocked: '{configuration}' blocks 'a.test/team'"
        ):
            refused("a.test/team/app:1")
    assert find_urls("a.test/other") == ["https://a.test/other"]


def test_a_location_with_an_invalid_port_is_named(configuration: Path) -> None:
    configuration.write_text('[[registry]]\nprefix = "a.test"\nlocation = "b.test:99999"\n')
    with pytest.raises(
        RegistryError, match=rf"^'{configuration}' has the location 'b.test:99999/app:latest': .* above 65535"
    ):
        find("a.test/app")


def describe(where: Place) -> tuple[str, bool, bool]:
    return where.url.partition(":")[0], where.is_verified, where.allows_http


@pytest.mark.parametrize(
    ("access", "secure", "insecure"),
    [
        (DEFAULT_ACCESS, ("https", True, False), ("https", False, True)),
        (Access(tls_verify=True), ("https", True, False), ("https", True, False)),
        (Access(tls_verify=False), ("https", False, True), ("https", False, True)),
        (Access(plain_http=True), ("http", True, False), ("http", False, False)),
        (Access(plain_http=False, tls_verify=False), ("https", False, False), ("https", False, False)),
    ],
)
def test_the_options_come_before_registries_conf(
    configuration: Path, access: Access, secure: tuple[str, bool, bool], insecure: tuple[str, bool, bool]
) -> None:
    configuration.write_text(
        '[[registry]]\nprefix = "b.test"\ninsecure = true\n[[registry.mirror]]\nlocation = "mirror.test"\n'
    )
    assert describe(find("a.test/app", access)[-1]) == secure
    assert describe(find("b.test/app", access)[-1]) == insecure
    assert describe(push_place(Name.parse("a.test/app:1"), access)) == secure
    assert describe(push_place(Name.parse("b.test/app:1"), access)) == insecure
    assert describe(find("b.test/app", access)[0]) == ("https", True, False), "a mirror has its own settings"


# Connections


def test_an_insecure_registry_may_have_any_certificate(cache: Cache, secured: Registry, tmp_path: Path) -> None:
    authfile = tmp_path / "auth.json"
    authfile.write_text(json.dumps({"auths": {secured.host: {"username": USER, "password": PASSWORD}}}))
    name = f"{secured.host}/app:1"
    for strict in (True, None):
        with pytest.raises(RegistryError, match="cannot be trusted"):
            cache.pull(name, plain_http=False, tls_verify=strict, authfile=authfile)
    with Registry(tls=(tmp_path / "tls/server.pem", tmp_path / "tls/server-key.pem")) as store:
        store.add(IMAGE, "app", "1")
        secured.fault(redirect(store.url), method="GET", path="/blobs/", times=99)
        cache.pull(name, tls_verify=False, authfile=authfile)
        assert cache.is_image_complete(name)
        assert store.count(path="/blobs/")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("option", [True, False])
def test_an_insecure_registry_without_tls_is_asked_over_http(
    cache: Cache, remote: Registry, configuration: Path, option: bool
) -> None:
    if not option:
        configuration.write_text(f'[[registry]]\nlocation = "{remote.host}"\ninsecure = true\n')
    cache.pull(f"{remote.host}/app:1", tls_verify=False if option else None)
    assert cache.is_image_complete(f"{remote.host}/app:1")
    cache.push(f"{remote.host}/app:1", f"{remote.host}/copy:1", tls_verify=False if option else None)
    assert ("copy", "1") in remote.manifests


def test_tls_without_verification_does_not_use_http(cache: Cache, remote: Registry) -> None:
    with pytest.raises(RegistryError, match="cannot be trusted"):
        cache.pull(f"{remote.host}/app:1", plain_http=False, tls_verify=False)
    assert remote.count() == 0


def test_an_image_is_pulled_from_a_mirror_of_registries_conf(
    cache: Cache, remote: Registry, configuration: Path
) -> None:
    configuration.write_text(
        f'[[registry]]\nprefix = "registry.test"\n[[registry.mirror]]\nlocation = "{remote.host}"\ninsecure = true\n'
    )
    assert str(cache.pull("registry.test/app:1").image.name) == "registry.test/app:1"


@pytest.mark.slow
def test_tls_verify_takes_true_or_false(cachedb: Run, remote: Registry) -> None:
    name = f"{remote.host}/app:1"
    assert cachedb("pull", "--tls-verify=false", "-q", name).stdout == f"{name}\n"
    assert cachedb("push", "--tls-verify", "false", "-q", name, f"{remote.host}/copy:1").returncode == 0
    assert cachedb("pull", "--tls-verify=maybe", name).returncode == 2
