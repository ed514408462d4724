"""Parse the names of images.

The grammar is that of the OCI distribution specification (v1.1, "Pulling manifests"). A registry's ``host[:port]/``
may precede the repository; its case does not matter. Digests follow the OCI image specification (v1.1, descriptor.md,
"Digests").
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from cachedb.errors import InvalidDigest, InvalidName
from cachedb.oci.digests import Digest, parse_digest
from cachedb.text import shorten

__all__ = ["HUB", "HUB_HOSTS", "Name", "RemoteName", "is_tag", "parse_repository", "strip_transport"]


HUB: Final = "docker.io"
HUB_HOSTS: Final = frozenset({HUB, "index.docker.io", "registry-1.docker.io"})
"""The hosts that mean Docker Hub in a name."""

_TRANSPORT = "docker://"
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST = r"(?:[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:]+\])(?::[0-9]{1,5})?"
_REPOSITORY = re.compile(rf"(?:{_HOST}/)?{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_REPOSITORY_LIMIT = 255  # characters; Docker and registries have the same limit


class Name(NamedTuple):
    """An image's name: a repository with a tag or a digest, kept as given; only its host gets lower case."""

    repository: str
    reference: str

    @classmethod
    def parse(cls, text: str | Name) -> Name:
        """Parse ``repository[:tag]`` or ``repository@digest``; the default tag is ``latest``.

        Raises:
            InvalidName: if ``text`` does not match the grammar.
        """
        if isinstance(text, Name):
            text = str(text)
        if not isinstance(text, str):
            raise InvalidName(f"a name must be a string, not {type(text).__name__!r}")
        repository, at, reference = text.partition("@")
        if at:
            try:
                if ":" not in reference:
                    raise InvalidDigest(f"{shorten(reference)} has no algorithm: write sha256: in front")
                reference = parse_digest(reference)
            except InvalidDigest as error:
                raise InvalidName(f"{shorten(text)} is not a name: {error}") from error
        else:
            # A colon after the last slash starts the tag; an earlier one starts a registry's port.
            head, colon, tail = text.rpartition(":")
            repository, reference = (head, tail) if colon and "/" not in tail else (text, "latest")
            if not is_tag(reference):
                raise InvalidName(
                    f"{shorten(text)} is not a name: a tag has up to 128 letters, digits and _.-, "
                    "and does not start with . or -"
                )
        host, slash, path = repository.partition("/")
        if slash and _is_host(lower := host.lower()) and host.isascii():
            repository = f"{lower}/{path}"
        if len(repository) > _REPOSITORY_LIMIT:
            raise InvalidName(
                f"{shorten(text)} is not a name: its repository is longer than {_REPOSITORY_LIMIT} characters"
            )
        if not _REPOSITORY.fullmatch(repository):
            hint = "use lower case" if re.search("[A-Z]", repository) else "expected app or registry:5000/team/app"
            if at and ":" in repository.rpartition("/")[2]:
                hint = "give either a tag or a digest: only a pull takes both, and keeps the tag"
            raise InvalidName(f"{shorten(text)} is not a name: {shorten(repository)} is not a repository: {hint}")
        return cls(repository, reference)

    @property
    def digest(self) -> Digest | None:
        """The digest if the reference is one, else None."""
        return Digest(self.reference) if ":" in self.reference else None

    def __str__(self) -> str:
        return f"{self.repository}{'@' if self.digest else ':'}{self.reference}"

    def __repr__(self) -> str:
        return f"Name({str(self)!r})"

    # A name is equal to its text, so it has the hash of its text.

    def __eq__(self, other: object) -> bool:
        return str(self) == other if isinstance(other, str) else tuple.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(str(self))

    def qualified(self) -> str:
        """Return the full name as Docker writes it, such as ``docker.io/library/app:1`` for ``app:1``."""
        host, slash, path = self.repository.partition("/")
        if not (slash and _is_host(host)):
            host, path = HUB, self.repository
        if host in HUB_HOSTS:
            host, path = HUB, path if "/" in path else f"library/{path}"
        return f"{host}/{path}{'@' if self.digest else ':'}{self.reference}"


def _is_host(first: str) -> bool:
    """Return whether the first part of a repository with several parts is a registry's host, as in Docker."""
    return first == "localhost" or "." in first or ":" in first


class RemoteName(NamedTuple):
    """An image at a registry: the name that the cache keeps, and the digest that is requested."""

    name: Name
    digest: Digest | None  # None: the digest that the tag points to

    @classmethod
    def parse(cls, text: str | Name) -> RemoteName:
        """Parse ``[docker://]repository[:tag][@digest]``.

        If the text has a tag and a digest, the digest is requested, as in Docker, and the cache keeps the tag.

        Raises:
            InvalidName: if ``text`` does not match the grammar.
        """
        text = strip_transport(text)
        if isinstance(text, str):
            head, at, digest = text.partition("@")
            repository, colon, tail = head.rpartition(":")
            if at and colon and "/" not in tail:
                return cls(Name.parse(head), Name.parse(f"{repository}@{digest}").digest)
        name = Name.parse(text)
        return cls(name, name.digest)

    @property
    def exact_name(self) -> Name:
        """The name with the digest, if there is one."""
        return self.name._replace(reference=self.digest) if self.digest else self.name

    def __str__(self) -> str:
        return f"{self.name}@{self.digest}" if self.digest and not self.name.digest else str(self.name)


def is_tag(text: str) -> bool:
    """Return whether a text has the grammar of a tag."""
    return _TAG.fullmatch(text) is not None


def strip_transport(text: str | Name) -> str | Name:
    """Return a name without ``docker://``, which skopeo and podman put before names at a registry."""
    return text.removeprefix(_TRANSPORT) if isinstance(text, str) else text


def parse_repository(text: str) -> str:
    """Return a repository, without ``docker://`` and with its host in lower case.

    Raises:
        InvalidName: if the text is not a repository, or has a tag or a digest.
    """
    name = Name.parse(strip_transport(text))
    if "@" in text or ":" in text.rpartition("/")[2]:
        raise InvalidName(f"{shorten(text)} has a tag or a digest: name the repository alone")
    return name.repository
