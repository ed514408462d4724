"""Certificates come from certs.d, for a registry and the hosts that it leads to; unusable files are named."""

from __future__ import annotations

import json
import logging
import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from urllib3.exceptions import SSLError

from cachedb import Cache, RegistryError
from cachedb.transports.registry import connections, tls
from cachedb.transports.registry.tls import Certificates, advise_on_tls, find_certificates, make_tls_context
from tests.support import make
from tests.support.faults import Server, redirect
from tests.support.registries import (  # noqa: F401 - isolate_client is a fixture
    PASSWORD,
    USER,
    Registry,
    certificate,
    isolate_client,
)

IMAGE = make.image(1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Make an authority, and the certificate and key of 127.0.0.1."""
    return certificate(tmp_path_factory.mktemp("tls"), "127.0.0.1")


@pytest.fixture
def certs_d(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "certificates"
    monkeypatch.setattr(tls, "_CERTIFICATES", (str(folder),))
    return folder


@pytest.fixture
def remote(pair: tuple[Path, Path, Path]) -> Iterator[Registry]:
    with Registry(auth="bearer", tls=pair[1:]) as made:
        made.add(IMAGE, "app", "1")
        yield made


@pytest.fixture
def other(pair: tuple[Path, Path, Path]) -> Iterator[Registry]:
    """Run a token server and blob store with a certificate of the same authority."""
    with Registry(tls=pair[1:]) as made:
        made.add(IMAGE, "app", "1")
        yield made


@pytest.fixture
def authfile(remote: Registry, tmp_path: Path) -> Path:
    path = tmp_path / "auth.json"
    path.write_text(json.dumps({"auths": {remote.host: {"username": USER, "password": PASSWORD}}}))
    return path


def trust(certs_d: Path, server: Server, authority: Path) -> None:
    (certs_d / server.host).mkdir(parents=True)
    shutil.copy(authority, certs_d / server.host / "ca.crt")


def lead_to(remote: Registry, other: Registry) -> None:
    """Make the other server the token server and the blob store of the registry."""
    other.fault(lambda call: remote._grant_token(call), path="/token", times=9)
    remote.realm = f"{other.url}/token"
    remote.fault(redirect(other.url), method="GET", path="/blobs/", times=99)


def test_the_authority_of_a_registry_is_trusted_for_the_hosts_that_it_leads_to(
    cache: Cache, remote: Registry, other: Registry, certs_d: Path, pair: tuple[Path, Path, Path], authfile: Path
) -> None:
    lead_to(remote, other)
    trust(certs_d, remote, pair[0])
    cache.pull(f"{remote.host}/app:1", plain_http=False, authfile=authfile)
    assert cache.is_image_complete(f"{remote.host}/app:1")
    assert other.count(path="/token")
    assert other.count(path="/blobs/")


def test_the_folders_of_certificates_are_listed_once(
    cache: Cache,
    remote: Registry,
    certs_d: Path,
    pair: tuple[Path, Path, Path],
    authfile: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trust(certs_d, remote, pair[0])
    listed: list[str] = []

    def note(registry: str, host: str | None = None) -> Certificates:
        listed.append(host or registry)
        return find_certificates(registry, host)

    monkeypatch.setattr(connections, "find_certificates", note)
    cache.pull(f"{remote.host}/app:1", plain_http=False, authfile=authfile)
    assert listed == [remote.host]


def test_another_host_may_have_its_own_authority(
    cache: Cache,
    remote: Registry,
    other: Registry,
    certs_d: Path,
    pair: tuple[Path, Path, Path],
    authfile: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lead_to(remote, other)
    trust(certs_d, other, pair[0])
    certificates = find_certificates(remote.host, other.host)
    assert certificates.authorities == (certs_d / other.host / "ca.crt",)
    monkeypatch.setenv("SSL_CERT_FILE", str(pair[0]))
    assert find_certificates(remote.host).authorities == ()
    cache.pull(f"{remote.host}/app:1", plain_http=False, authfile=authfile)
    assert cache.is_image_complete(f"{remote.host}/app:1")


def test_a_client_certificate_is_for_its_own_host_only(certs_d: Path) -> None:
    for host in ("registry.test", "store.test:9000"):
        make.write(certs_d, {f"{host}/client.cert": b"", f"{host}/client.key": b""})
    assert find_certificates("registry.test").clients == (certs_d / "registry.test" / "client.cert",)
    assert find_certificates("registry.test", "store.test:9000").clients == (
        certs_d / "store.test:9000" / "client.cert",
    )
    assert find_certificates("registry.test", "other.test").clients == ()


@pytest.mark.parametrize(("file", "lacks"), [("client.cert", "has no key"), ("client.key", "has no certificate")])
def test_half_of_a_client_certificate_is_an_error(certs_d: Path, file: str, lacks: str) -> None:
    make.write(certs_d, {f"registry.test/{file}": b""})
    with pytest.raises(RegistryError, match=rf"{certs_d}/registry.test/{file}' {lacks}: put it into client\."):
        find_certificates("registry.test")


def test_a_client_certificate_that_cannot_be_used_is_named(certs_d: Path, pair: tuple[Path, Path, Path]) -> None:
    authority, certified, _ = pair
    folder = certs_d / "registry.test"
    folder.mkdir(parents=True)
    shutil.copy(certified, folder / "client.cert")
    shutil.copy(authority.with_name("authority-key.pem"), folder / "client.key")
    with pytest.raises(RegistryError, match=rf"{folder}/client.cert' and its key .*: the key is for another"):
        make_tls_context(find_certificates("registry.test"))
    (folder / "client.key").write_text("no key")
    with pytest.raises(RegistryError, match=rf"{folder}/client.cert' and its key .* in PEM format"):
        make_tls_context(find_certificates("registry.test"))


def test_a_file_without_a_certificate_is_named_and_the_others_are_used(
    cache: Cache,
    remote: Registry,
    certs_d: Path,
    pair: tuple[Path, Path, Path],
    authfile: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make.write(certs_d, {f"{remote.host}/a.crt": b"no certificate"})
    with pytest.raises(RegistryError, match=rf"cannot be trusted: .*: repair '{certs_d}/{remote.host}/a.crt'"):
        cache.pull(f"{remote.host}/app:1", plain_http=False, authfile=authfile)
    shutil.copy(pair[0], certs_d / remote.host / "ca.crt")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "cachedb"):
        cache.pull(f"{remote.host}/app:1", plain_http=False, authfile=authfile)
    assert cache.is_image_complete(f"{remote.host}/app:1")
    assert f"'{certs_d}/{remote.host}/a.crt' is not used: it has no certificate" in caplog.text


def test_a_server_that_wants_a_client_certificate_is_explained() -> None:
    refused = ssl.SSLError(1, "[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert certificate required")
    refused.reason = "TLSV13_ALERT_CERTIFICATE_REQUIRED"
    advice = advise_on_tls("registry.test", tls.Certificates((), ()), SSLError(refused))
    assert "certs.d/registry.test/client.cert" in advice
