"""Choose the places from which an image is pulled, or to which it is pushed: mirrors, locations, TLS."""

from __future__ import annotations

from typing import NamedTuple

from cachedb.errors import InvalidName, RegistryError
from cachedb.oci.names import Name
from cachedb.text import shorten
from cachedb.transports.registry.access import Access
from cachedb.transports.registry.places import Place, build_place, mirrors, place
from cachedb.transports.registry.registries_conf import Configuration, Registry, read_configuration

__all__ = ["Route", "pull_routes", "push_place"]


class Route(NamedTuple):
    """A place from which an image is pulled, and how to reach it."""

    place: Place
    access: Access


def pull_routes(name: Name, access: Access) -> list[Route]:
    """Return the places of an image in the order in which they are asked; the registry itself is the last.

    The mirrors of ``CACHEDB_MIRRORS`` come first, then those of registries.conf. Credentials that were given for the
    registry are not for its mirrors.

    Args:
        name: the image's name; it may be an alias of registries.conf.
        access: how to reach the registry.

    Raises:
        InvalidName: if the name, or ``CACHEDB_MIRRORS``, has an invalid place.
        RegistryError: if registries.conf is invalid, or blocks the registry.
    """
    configuration = read_configuration()
    name = _resolve_alias(name, configuration)
    origin = place(name, plain_http=access.plain_http)
    full = _format_reference(origin, name)
    registry, found, is_insecure = _find_allowed(configuration, full), mirrors(origin), False
    # Mirrors have their own settings, but --tls-verify=true applies to all of them.
    of_mirrors = access._replace(plain_http=None, tls_verify=access.tls_verify or None, credentials=None)
    if registry:
        is_insecure, rest = registry.insecure, full[registry.match(full) :]
        for mirror in registry.mirrors:
            if mirror.pull_by in ("all", "digest-only" if name.digest else "tag-only"):
                where = _locate(f"{mirror.location}{rest}", name, registry, plain_http=None)
                found.append(_secure(where, of_mirrors, insecure=mirror.insecure))
        if registry.location:
            origin = _locate(f"{registry.location}{rest}", name, registry, plain_http=access.plain_http)
    routes = [Route(where, of_mirrors) for where in found]
    return [*routes, Route(_secure(origin, access, insecure=is_insecure), access)]


def push_place(name: Name, access: Access) -> Place:
    """Return the place to which an image is pushed: its registry, without mirrors, locations and aliases.

    Raises:
        InvalidName: if the name has an invalid place.
        RegistryError: if registries.conf is invalid, or blocks the registry.
    """
    origin = place(name, plain_http=access.plain_http)
    registry = _find_allowed(read_configuration(), _format_reference(origin, name))
    return _secure(origin, access, insecure=bool(registry and registry.insecure))


def _resolve_alias(name: Name, configuration: Configuration) -> Name:
    alias = configuration.aliases.get(name.repository)
    return name if alias is None else name._replace(repository=alias)


def _format_reference(where: Place, name: Name) -> str:
    """Return ``registry/repository`` with a tag or a digest, as registries.conf may name it."""
    return f"{where.registry}/{where.repository}{_format_suffix(name)}"


def _format_suffix(name: Name) -> str:
    return f"{'@' if name.digest else ':'}{name.reference}"


def _find_allowed(configuration: Configuration, full: str) -> Registry | None:
    """Return the configuration of a name, or None if there is none; raise if it is blocked."""
    registry = configuration.find(full)
    if registry and registry.blocked:
        raise RegistryError(
            f"{full} is blocked: {registry.file!r} blocks {registry.prefix!r}: use another registry, or change the file"
        )
    return registry


def _locate(location: str, name: Name, registry: Registry, *, plain_http: bool | None) -> Place:
    """Return the place of a location in registries.conf.

    Args:
        location: ``registry/repository``, with a tag or a digest unless the prefix has one.
        name: the image's name.
        registry: its table of registries.conf.
        plain_http: as for `place`.
    """
    host, _, repository = location.removesuffix(_format_suffix(name)).partition("/")
    try:
        if ":" in repository or "@" in repository:
            raise InvalidName(f"{shorten(location)} is for another tag or digest: leave the tag out of the location")
        return build_place(host, repository, plain_http=plain_http)
    except InvalidName as error:
        raise RegistryError(f"{registry.file!r} has the location {shorten(location)}: {error}") from None


def _secure(where: Place, access: Access, *, insecure: bool) -> Place:
    """Return a place with the rules for its certificate.

    An insecure place is asked over HTTPS without verification, and over HTTP if that fails, as by skopeo and podman.
    """
    if access.tls_verify or (access.tls_verify is None and not insecure):
        return where
    if access.plain_http is not None:
        return where._replace(is_verified=False)
    return where._replace(url=f"https://{where.url.partition('://')[2]}", is_verified=False, allows_http=True)
