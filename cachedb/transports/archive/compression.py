"""Decompress gzip, zstd, bzip2 and xz streams."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from typing import Any

from cachedb.disk.writer import CHUNK
from cachedb.errors import InvalidArchive

__all__ = ["MAGIC", "MAGIC_LENGTH", "Decompressor", "compression_of"]


_SLICE = 64 * 1024  # bytes that a decompressor is given at a time, of which it may hand most back
MAGIC = {b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz"}
MAGIC |= {b"BZh%d1AY&SY" % level: "bzip2" for level in range(1, 10)}
MAGIC_LENGTH = max(map(len, MAGIC))
"""How many of the first bytes `compression_of` needs."""


def compression_of(head: bytes) -> str | None:
    """Return what compression content of these first bytes has: ``gzip``, ``zstd``, ``xz``, ``bzip2``, or None."""
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)


class Decompressor:
    """Decompresses a stream in parts of bounded size, over as many members or frames as it has."""

    def __init__(self, compression: str) -> None:
        self._compression = compression
        self._stream: Any = None
        self.ended = False
        """Whether the stream is at the end of a member: it may end here."""

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        """Take compressed bytes and yield what they hold.

        Raises:
            InvalidArchive: if they are damaged.
        """
        for start in range(0, len(data), _SLICE):
            yield from self._feed(bytes(data[start : start + _SLICE]))

    def _feed(self, pending: bytes) -> Iterator[bytes]:
        try:
            while True:
                if self._stream is None or self.ended:
                    if not pending.lstrip(b"\0"):  # tapes and tools pad with zeros
                        return
                    self._stream, self.ended = self._begin(), False
                part = self._stream.decompress(pending, CHUNK)
                self.ended = self._stream.eof
                pending = self._stream.unused_data if self.ended else self._unconsumed()
                if part:
                    yield part
                if not self.ended and not pending and len(part) < CHUNK:
                    return
        except InvalidArchive:
            raise
        except Exception as error:  # each library has an error of its own, and one of them none in common
            raise InvalidArchive(f"{self._compression} data in the archive is damaged: {error}") from error

    def _begin(self) -> Any:  # noqa: ANN401
        if self._compression == "gzip":
            return zlib.decompressobj(zlib.MAX_WBITS | 16)
        if self._compression == "xz":
            import lzma

            return lzma.LZMADecompressor(memlimit=96 * 1024 * 1024)
        if self._compression == "bzip2":
            import bz2

            return bz2.BZ2Decompressor()
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
        return zstd.ZstdDecompressor()

    def _unconsumed(self) -> bytes:
        # zlib hands back what it did not come to; the others keep it.
        return bytes(self._stream.unconsumed_tail) if self._compression == "gzip" else b""
