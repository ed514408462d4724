"""Parse and compute digests (OCI image specification, descriptor.md, "Digests")."""

from __future__ import annotations

import hashlib
import re
from typing import Literal, NewType

from cachedb.errors import InvalidDigest
from cachedb.text import shorten

__all__ = [
    "HEX_LENGTH",
    "Algorithm",
    "Digest",
    "digest_of",
    "is_digest",
    "parse_digest",
    "parse_digest_prefix",
    "split_digest",
]


Algorithm = Literal["sha256", "sha512"]

Digest = NewType("Digest", str)
"""A digest validated by `parse_digest`: safe in a path and in SQL."""

HEX_LENGTH = {"sha256": 64, "sha512": 128}
"""The supported algorithms, each with its number of hexadecimal digits."""

_DIGEST = re.compile(r"(?:(?:sha256:)?[0-9a-f]{64}|sha512:[0-9a-f]{128})")
_PREFIX = re.compile(r"(?:sha256:|sha512:)?[0-9a-f]{12,128}")


def parse_digest(text: str) -> Digest:
    """Return ``text`` as a digest; 64 bare hexadecimal digits are read as sha256.

    Raises:
        InvalidDigest: if ``text`` is not a digest.
    """
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise InvalidDigest(
            f"{shorten(text)} is not a digest: expected sha256: and 64, or sha512: and 128, digits of 0-9a-f"
        )
    return Digest(text if ":" in text else f"sha256:{text}")


def parse_digest_prefix(text: str) -> str | None:
    """Return a digest, or at least 12 of its first digits, with the algorithm; None for other text.

    Bare digits are read as sha256.
    """
    if not isinstance(text, str) or not _PREFIX.fullmatch(text):
        return None
    return text if ":" in text else f"sha256:{text}"


def is_digest(text: str) -> bool:
    """Return whether ``text`` is a digest with its algorithm; a damaged index may have a path instead."""
    return ":" in text and _DIGEST.fullmatch(text) is not None


def split_digest(digest: Digest) -> tuple[str, str]:
    """Return a digest's algorithm and its hexadecimal part."""
    algorithm, _, encoded = digest.partition(":")
    return algorithm, encoded


def digest_of(data: bytes, like: Digest | None = None) -> Digest:
    """Compute the digest of content with the algorithm of ``like``, or with sha256."""
    algorithm = split_digest(like)[0] if like else "sha256"
    return Digest(f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}")
