"""Read containers-registries.conf(5), which podman, skopeo and buildah share.

This reads mirrors, locations, blocked and insecure registries, and aliases of short names, also from files of version
1. It ignores ``unqualified-search-registries``: a name without a registry belongs to Docker Hub.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from cachedb.errors import RegistryError
from cachedb.text import shorten

__all__ = ["Configuration", "Mirror", "Registry", "read_configuration"]


_SYSTEM_FOLDER = "/etc/containers"

_PULL_BY = ("all", "digest-only", "tag-only")


class Mirror(NamedTuple):
    """A mirror of a registry."""

    location: str  # HOST[:PORT][/PREFIX], which replaces the prefix of the registry
    insecure: bool
    pull_by: str  # the names it is asked for: "all", "digest-only" or "tag-only"


class Registry(NamedTuple):
    """A table of registries.conf for the names with a prefix."""

    prefix: str  # HOST[:PORT][/NAMESPACE...][:TAG|@DIGEST], or *.DOMAIN[/NAMESPACE...]
    location: str  # replaces the prefix; empty to keep it
    insecure: bool
    blocked: bool
    mirrors: tuple[Mirror, ...]
    file: str

    def match(self, name: str) -> int:
        """Return how many characters of a name its prefix matches; 0 if the name has another prefix.

        Args:
            name: ``registry/repository``, with its tag or digest.
        """
        prefix = self.prefix
        if prefix.startswith("*."):
            domain, slash, path = prefix[1:].partition("/")
            host = name.partition("/")[0]
            if not (host if ":" in domain else host.partition(":")[0]).endswith(domain):
                return 0
            prefix = f"{host}{slash}{path}"
        # A colon after a host starts a port, and after a repository a tag.
        ends = ("", "/", "@", ":") if "/" in prefix else ("", "/")
        return len(prefix) if name.startswith(prefix) and name[len(prefix) : len(prefix) + 1] in ends else 0


class Configuration(NamedTuple):
    """The content of all files."""

    registries: Mapping[str, Registry]  # by prefix
    aliases: Mapping[str, str]  # registry/repository by short name

    def find(self, name: str) -> Registry | None:
        """Return the registry with the longest prefix of ``registry/repository:tag`` or ``@digest``."""
        found = max(self.registries.values(), key=lambda registry: _rank(registry, name), default=None)
        return found if found and found.match(name) else None


def _rank(registry: Registry, name: str) -> tuple[int, int]:
    """Rank by the length of the match, then a host before a domain, then by the domain's length."""
    matched = registry.match(name)
    return matched, len(registry.prefix) if registry.prefix.startswith("*.") else len(name)


def read_configuration() -> Configuration:
    """Read the files of registries.conf.

    These are ``$CONTAINERS_REGISTRIES_CONF``, else the user's file, else the system's; then the files in the system's
    and the user's ``registries.conf.d``. A later table replaces an earlier one with the same prefix.

    Raises:
        RegistryError: if a file cannot be read or is invalid.
    """
    registries, aliases = dict[str, Registry](), dict[str, str]()
    for file in _list_files():
        document = _load(file)
        for registry in (*_parse_version_1(document, file), *_parse_tables(document, file)):
            registries[registry.prefix] = registry
        given = document.get("aliases", {})
        if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
            raise _invalid(file, "aliases are not a table of strings")
        aliases.update(given)
    # An empty value removes an alias.
    return Configuration(registries, {short: name for short, name in aliases.items() if name})


def _list_files() -> Iterator[str]:
    """Yield the files that exist, in the order in which they are read."""
    user = os.path.join(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"), "containers")
    named = os.environ.get("CONTAINERS_REGISTRIES_CONF")
    if named:
        yield named
    else:
        files = [os.path.join(folder, "registries.conf") for folder in (user, _SYSTEM_FOLDER)]
        yield from [file for file in files if os.path.exists(file)][:1]
    for folder in (_SYSTEM_FOLDER, user):
        yield from sorted(glob.glob(os.path.join(glob.escape(folder), "registries.conf.d", "*.conf")))


def _load(file: str) -> dict[str, Any]:
    import tomllib  # few hosts have such a file

    try:
        with open(file, "rb") as opened:
            return tomllib.load(opened)
    except OSError as error:
        raise RegistryError(f"cannot read {file!r}: {error.strerror}: make it readable, or remove it") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _invalid(file, str(error)) from error


def _invalid(file: str, why: str) -> RegistryError:
    return RegistryError(f"{file!r} is not a valid registries.conf: {why}: repair it, or remove it")


def _tables(document: Mapping[str, Any], key: str, file: str) -> list[dict[str, Any]]:
    found = document.get(key, [])
    if not isinstance(found, list) or not all(isinstance(table, dict) for table in found):
        raise _invalid(file, f"{key} is not a list of tables")
    return found


def _parse_version_1(document: Mapping[str, Any], file: str) -> Iterator[Registry]:
    """Yield the registries of a file of version 1: a table of lists, which older distributions install."""
    given = document.get("registries", {})
    listed = {}
    for kind in ("insecure", "block"):
        hosts = given.get(kind, {}) if isinstance(given, dict) else None
        hosts = hosts.get("registries", []) if isinstance(hosts, dict) else None
        if not isinstance(hosts, list) or not all(isinstance(host, str) and host.strip("/") for host in hosts):
            raise _invalid(file, f"registries.{kind} has no list of registries")
        listed[kind] = [host.rstrip("/") for host in hosts]
    for host in dict.fromkeys([*listed["insecure"], *listed["block"]]):
        yield Registry(host, host, host in listed["insecure"], host in listed["block"], (), file)


def _parse_tables(document: Mapping[str, Any], file: str) -> Iterator[Registry]:
    for table in _tables(document, "registry", file):
        yield _parse_registry(table, file)


def _parse_registry(table: Mapping[str, Any], file: str) -> Registry:
    location = _take(table, "location", str, file).rstrip("/")
    prefix = _take(table, "prefix", str, file).rstrip("/") or location
    if not prefix:
        raise _invalid(file, "a registry has neither a prefix nor a location")
    if not location and not prefix.startswith("*."):
        location = prefix
    only_by_digest = _take(table, "mirror-by-digest-only", bool, file)
    mirrors = [_parse_mirror(mirror, file, only_by_digest=only_by_digest) for mirror in _tables(table, "mirror", file)]
    insecure, blocked = _take(table, "insecure", bool, file), _take(table, "blocked", bool, file)
    return Registry(prefix, location, insecure, blocked, tuple(mirrors), file)


def _parse_mirror(table: Mapping[str, Any], file: str, *, only_by_digest: bool) -> Mirror:
    location = _take(table, "location", str, file).rstrip("/")
    if not location:
        raise _invalid(file, "a mirror has no location")
    pull_by = _take(table, "pull-from-mirror", str, file) or ("digest-only" if only_by_digest else "all")
    if pull_by not in _PULL_BY:
        raise _invalid(file, f"pull-from-mirror is {shorten(pull_by)}: expected one of {', '.join(_PULL_BY)}")
    return Mirror(location, _take(table, "insecure", bool, file), pull_by)


def _take(table: Mapping[str, Any], key: str, kind: type, file: str) -> Any:  # noqa: ANN401 - of the given type
    """Return the value of a key, or the type's empty value; raise if it has another type or is a URL."""
    value = table.get(key, kind())
    if not isinstance(value, kind) or (isinstance(value, str) and "://" in value):
        raise _invalid(file, f"{key} is {shorten(value)}: expected {'true or false' if kind is bool else 'HOST/PATH'}")
    return value
