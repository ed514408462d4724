"""registries.conf is read as podman reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cachedb import RegistryError
from cachedb.transports.registry.registries_conf import read_configuration
from tests.support.registries import isolate_client  # noqa: F401 - isolate_client is a fixture


@pytest.fixture
def etc(tmp_path: Path, isolate_client: None) -> Path:  # noqa: F811 - the fixture
    (tmp_path / "etc" / "registries.conf.d").mkdir(parents=True)
    return tmp_path / "etc"


@pytest.fixture
def user(tmp_path: Path, isolate_client: None) -> Path:  # noqa: F811 - the fixture
    folder = tmp_path / "home" / ".config" / "containers"
    (folder / "registries.conf.d").mkdir(parents=True)
    return folder


def find_prefix(name: str) -> str | None:
    found = read_configuration().find(name)
    return found.prefix if found else None


def test_without_a_file_nothing_is_configured(etc: Path, user: Path) -> None:
    assert read_configuration() == ({}, {})


def test_the_longest_prefix_counts(etc: Path) -> None:
    prefixes = "quay.io", "quay.io/team", "quay.io/team/app", "*.test", "*.example.test", "a.example.test"
    (etc / "registries.conf").write_text("".join(f'[[registry]]\nprefix = "{prefix}"\n' for prefix in prefixes))
    expected = {
        "quay.io/other": "quay.io",
        "quay.io/teams": "quay.io",
        "quay.io/team/x": "quay.io/team",
        "quay.io/team/app": "quay.io/team/app",
        "quay.io/team/app2": "quay.io/team",
        "quay.io.org/team": None,
        "quay.io:5000/team": None,
        "a.test:5000/x": "*.test",
        "test/x": None,
        "b.example.test/x": "*.example.test",
        "a.example.test/x": "a.example.test",
    }
    assert {name: find_prefix(name) for name in expected} == expected


def test_a_prefix_may_have_a_tag_or_a_digest_and_a_domain_a_namespace(etc: Path) -> None:
    prefixes = "quay.io/app", "quay.io/app:1", "quay.io/app@sha256:0", "*.example.test/team", "*.example.test:5000"
    (etc / "registries.conf").write_text("".join(f'[[registry]]\nprefix = "{prefix}"\n' for prefix in prefixes))
    expected = {
        "quay.io/app:1": "quay.io/app:1",
        "quay.io/app:11": "quay.io/app",
        "quay.io/app:2": "quay.io/app",
        "quay.io/app2:1": None,
        "quay.io/app@sha256:0": "quay.io/app@sha256:0",
        "quay.io/app@sha256:1": "quay.io/app",
        "a.example.test/team/app:1": "*.example.test/team",
        "a.example.test/team:1": "*.example.test/team",
        "a.example.test/teams:1": None,
        "a.example.test/app:1": None,
        "a.example.test:5000/app:1": "*.example.test:5000",
    }
    assert {name: find_prefix(name) for name in expected} == expected


def test_a_file_of_version_1_is_read(etc: Path) -> None:
    (etc / "registries.conf").write_text(
        """
        [registries.search]
        registries = ["docker.io"]
        [registries.insecure]
        registries = ["old.test:5000", "both.test/"]
        [registries.block]
        registries = ["both.test", "bad.test"]
        """
    )
    found = read_configuration().registries
    assert {prefix: (registry.insecure, registry.blocked) for prefix, registry in found.items()} == {
        "old.test:5000": (True, False),
        "both.test": (True, True),
        "bad.test": (False, True),
    }


def test_a_registry_has_all_its_settings(etc: Path) -> None:
    (etc / "registries.conf").write_text(
        """
        unqualified-search-registries = ["example.test"]
        [[registry]]
        location = "quay.io/"
        insecure = true
        blocked = true
        [[registry.mirror]]
        location = "mirror.test:5000/quay"
        insecure = true
        [[registry.mirror]]
        location = "second.test"
        pull-from-mirror = "tag-only"
        [[registry]]
        prefix = "docker.io"
        location = "hub.test/library"
        mirror-by-digest-only = true
        [[registry.mirror]]
        location = "third.test"
        [[registry]]
        prefix = "*.test"
        """
    )
    quay, hub, domain = read_configuration().registries.values()
    assert quay == (
        "quay.io",
        "quay.io",
        True,
        True,
        (("mirror.test:5000/quay", True, "all"), ("second.test", False, "tag-only")),
        str(etc / "registries.conf"),
    )
    assert (hub.prefix, hub.location, hub.mirrors) == (
        "docker.io",
        "hub.test/library",
        (("third.test", False, "digest-only"),),
    )
    assert domain[:5] == ("*.test", "", False, False, ())


def test_the_files_are_read_in_order(etc: Path, user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(file: Path, number: int, more: str = "") -> None:
        text = f'[[registry]]\nprefix = "quay.io"\nlocation = "{number}.test"\n[aliases]\napp = "{number}.test/app"\n'
        file.write_text(text + more)

    def find_location() -> tuple[str, str | None]:
        configuration = read_configuration()
        return configuration.registries["quay.io"].location, configuration.aliases.get("app")

    write(etc / "registries.conf", 1, 'other = "1.test/other"')
    assert find_location() == ("1.test", "1.test/app")
    write(user / "registries.conf", 2)
    assert find_location() == ("2.test", "2.test/app")
    assert "other" not in read_configuration().aliases, "the user's file replaces the system's"
    write(tmp_path / "named.conf", 3)
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(tmp_path / "named.conf"))
    assert find_location() == ("3.test", "3.test/app")
    write(etc / "registries.conf.d" / "20.conf", 5)
    write(etc / "registries.conf.d" / "10.conf", 4)
    (etc / "registries.conf.d" / "30.txt").write_text("not read")
    assert find_location() == ("5.test", "5.test/app")
    (user / "registries.conf.d" / "00.conf").write_text('[aliases]\napp = ""\n')
    assert find_location() == ("5.test", None)
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(tmp_path / "none.conf"))
    with pytest.raises(RegistryError, match=rf"^cannot read '{tmp_path}/none.conf': No such file"):
        read_configuration()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[[registry", "Expected"),
        ("registry = 1", "registry is not a list of tables"),
        ("registry = [1]", "registry is not a list of tables"),
        ("[[registry]]\ninsecure = true", "a registry has neither a prefix nor a location"),
        ('[[registry]]\nprefix = "a.test"\ninsecure = "yes"', "insecure is 'yes': expected true or false"),
        ("[[registry]]\nprefix = 1", "prefix is 1: expected HOST/PATH"),
        ('[[registry]]\nlocation = "https://a.test"', "location is 'https://a.test': expected HOST/PATH"),
        ('[[registry]]\nprefix = "a.test"\n[[registry.mirror]]\ninsecure = true', "a mirror has no location"),
        (
            '[[registry]]\nprefix = "a.test"\n[[registry.mirror]]\nlocation = "b.test"\npull-from-mirror = "no"',
            "pull-from-mirror is 'no': expected one of all, digest-only, tag-only",
        ),
        ("registries = 1", "registries.insecure has no list of registries"),
        ("[registries]\ninsecure = []", "registries.insecure has no list of registries"),
        ("[registries.block]\nregistries = [1]", "registries.block has no list of registries"),
        ("aliases = 1", "aliases are not a table of strings"),
        ("[aliases]\na = 1", "aliases are not a table of strings"),
        ("\xff", "can't decode"),
    ],
)
def test_an_invalid_file_is_named(etc: Path, text: str, why: str) -> None:
    (etc / "registries.conf").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        RegistryError, match=rf"^'{etc}/registries.conf' is not a valid registries.conf: .*{why}.*repair"
    ):
        read_configuration()
