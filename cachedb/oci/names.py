"""Parse the names of images.

The grammar is that of the OCI distribution specification (v1.1, "Pulling manifests"). A registry's ``host[:port]/``
may precede the repository. Digests follow the OCI image specification (v1.1, descriptor.md, "Digests").
"""

from __future__ import annotations

import re
from typing import NamedTuple

from cachedb.errors import InvalidDigest, InvalidName
from cachedb.oci.digests import Digest, parse_digest
from cachedb.text import shorten

__all__ = ["Name"]


_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST = r"(?:[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:]+\])(?::[0-9]{1,5})?"
_REPOSITORY = re.compile(rf"(?:{_HOST}/)?{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_REPOSITORY_LIMIT = 255  # characters; Docker and registries have the same limit


class Name(NamedTuple):
    """An image's name: a repository with a tag or a digest, kept exactly as given."""

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
            if not _TAG.fullmatch(reference):
                raise InvalidName(
                    f"{shorten(text)} is not a name: a tag has up to 128 letters, digits and _.-, "
                    "and does not start with . or -"
                )
        if len(repository) > _REPOSITORY_LIMIT:
            raise InvalidName(
                f"{shorten(text)} is not a name: its repository is longer than {_REPOSITORY_LIMIT} characters"
            )
        if not _REPOSITORY.fullmatch(repository):
            hint = "use lower case" if re.search("[A-Z]", repository) else "expected app or registry:5000/team/app"
            if at and ":" in repository.rpartition("/")[2]:
                hint = "give either a tag or a digest, not both"
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
        first, slash, _ = self.repository.partition("/")
        if slash and (first == "localhost" or "." in first or ":" in first):
            return str(self)
        return f"docker.io/{self}" if slash else f"docker.io/library/{self}"
