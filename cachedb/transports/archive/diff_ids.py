"""Check the diff ids of compressed layers."""

from __future__ import annotations

import hashlib

from cachedb.errors import DigestMismatch, InvalidArchive
from cachedb.oci.digests import Digest, split_digest
from cachedb.transports.archive.compression import Decompressor
from cachedb.transports.archive.tar import SAVE_AGAIN
from cachedb.transports.archive.unpack_limit import UnpackLimit

__all__ = ["DiffId"]


class DiffId:
    """Check of a compressed layer's diff id, the digest of its uncompressed content (config.md)."""

    def __init__(self, compression: str, expected: Digest, what: str, limit: UnpackLimit) -> None:
        self._decompressor = Decompressor(compression)
        self._hasher = hashlib.new(split_digest(expected)[0])
        self._expected, self._what, self._limit = expected, what, limit

    def update(self, data: memoryview, /) -> None:
        """Add the next compressed bytes."""
        for part in self._decompressor.feed(data):
            self._limit.add(len(part))
            self._hasher.update(part)

    def check(self) -> None:
        """Raise if the layer is incomplete or does not match its diff id.

        Raises:
            InvalidArchive: if the compressed layer is cut short.
            DigestMismatch: if the content has another digest.
        """
        if not self._decompressor.ended:
            raise InvalidArchive(f"{self._what} is cut short: {SAVE_AGAIN}")
        if f"{self._hasher.name}:{self._hasher.hexdigest()}" != self._expected:
            raise DigestMismatch(f"{self._what} does not match its diff id {self._expected} in the config")
