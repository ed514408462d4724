"""Send a blob's file in request bodies, the last bytes only if the whole digest matches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import BinaryIO

from cachedb.disk.reader import REPAIR_ADVICE, damaged_error
from cachedb.disk.writer import CHUNK_BYTES
from cachedb.errors import StorageError, os_errors
from cachedb.oci.digests import Digest, split_digest
from cachedb.progress import Advance

__all__ = ["Part", "VerifiedFile"]


_WRITE_BYTES = 256 * 1024  # written at once, small enough for the timeout of a slow network


class VerifiedFile:
    """File of a blob, read in parts; its last bytes are returned only if the whole digest matches."""

    def __init__(self, file: BinaryIO, digest: Digest, size: int) -> None:
        """Create a file of a blob.

        Args:
            file: the open file.
            digest: the digest that the content must have.
            size: the blob's size in bytes.
        """
        self._file, self._digest, self._size = file, digest, size
        self._hasher, self._hashed = hashlib.new(split_digest(digest)[0]), 0
        self._verify()

    def read(self, start: int, count: int) -> bytes:
        """Return bytes of the file from an offset.

        Raises:
            DigestMismatch: if these are the last bytes and the content does not match the digest.
            StorageError: if the file cannot be read or is too short.
        """
        while self._hashed < start:  # a registry may claim to have more bytes than were sent
            self._hash(self._hashed, self._read(self._hashed, min(CHUNK_BYTES, start - self._hashed)))
        data = self._read(start, count)
        self._hash(start, data)
        return data

    def _read(self, start: int, count: int) -> bytes:
        with os_errors("read a blob"):
            self._file.seek(start)
            data = self._file.read(count)
        if not data:
            raise StorageError(f"the file of a blob was cut short: {REPAIR_ADVICE}")
        return data

    def _hash(self, start: int, data: bytes) -> None:
        """Hash the bytes that are not hashed yet; bytes that are sent again are hashed already."""
        new = memoryview(data)[max(self._hashed - start, 0) :]
        self._hasher.update(new)
        self._hashed += len(new)
        self._verify()

    def _verify(self) -> None:
        if self._hashed == self._size and f"{self._hasher.name}:{self._hasher.hexdigest()}" != self._digest:
            raise damaged_error(self._digest)


class Part:
    """Part of a file as a request body; each iteration starts at its beginning."""

    def __init__(self, file: VerifiedFile, start: int, size: int, advance: Advance) -> None:
        """Create a body.

        Args:
            file: the file of the blob.
            start: where the part begins, in bytes.
            size: the part's size in bytes.
            advance: called with the bytes sent, and with a negative number for bytes that must be sent again.
        """
        self.size = size
        self._file, self._start, self._advance, self._sent = file, start, advance, 0

    def take_back(self) -> None:
        """Subtract the bytes sent so far from the progress."""
        self._advance(-self._sent)
        self._sent = 0

    def __iter__(self) -> Iterator[bytes]:
        """Yield the bytes of the part, from its beginning."""
        self.take_back()
        while self._sent < self.size:
            data = self._file.read(self._start + self._sent, min(_WRITE_BYTES, self.size - self._sent))
            yield data
            self._sent += len(data)
            self._advance(len(data))
