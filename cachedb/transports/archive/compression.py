"""Decompress gzip, zstd, bzip2 and xz streams."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from typing import Any

from cachedb.disk.writer import CHUNK_BYTES
from cachedb.errors import InvalidArchive

__all__ = ["MAGIC_LENGTH", "Decompressor", "detect_compression"]


_SLICE_BYTES = 64 * 1024  # input for one call of a decompressor, which may return most of it unused
_MAGIC = {b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz"}
# The magic is longer than "BZh", because a tar begins with a file name, which may begin with these letters.
_MAGIC |= {b"BZh%d1AY&SY" % level: "bzip2" for level in range(1, 10)}
# A zstd stream may begin with a skippable frame (RFC 8878, section 3.1.2); pzstd writes one.
_MAGIC |= {bytes([0x50 + kind]) + b"\x2a\x4d\x18": "zstd" for kind in range(16)}
MAGIC_LENGTH = max(map(len, _MAGIC))
"""The number of first bytes that `detect_compression` needs."""


def detect_compression(head: bytes) -> str | None:
    """Return the compression of content with these first bytes (a value of `_MAGIC`), or None."""
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


class Decompressor:
    """Decompressor of one stream, which may have several members or frames, into parts of bounded size."""

    def __init__(self, compression: str, *, may_have_garbage: bool = False) -> None:
        """Create it.

        Args:
            compression: a result of `detect_compression`.
            may_have_garbage: ignore bytes after the last complete member, as gzip(1) does.
        """
        self._compression, self._may_have_garbage = compression, may_have_garbage
        self._stream: Any = None
        self._has_member = False  # whether a member is complete
        self.ended = False
        """Whether the stream may end here, at the end of a member."""
        self.has_garbage = False
        """Whether bytes were ignored."""

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        """Decompress the next bytes, and yield the result in parts.

        Raises:
            InvalidArchive: if the bytes are damaged.
        """
        for start in range(0, len(data), _SLICE_BYTES):
            yield from self._feed(bytes(data[start : start + _SLICE_BYTES]))

    def _feed(self, pending: bytes) -> Iterator[bytes]:
        try:
            while not self.has_garbage:
                if self._stream is None or self.ended:
                    if not pending.lstrip(b"\0"):  # some tools pad the end with zeros
                        return
                    self._stream, self.ended = self._create_stream(), False
                part = self._stream.decompress(pending, CHUNK_BYTES)
                self.ended = self._stream.eof
                self._has_member |= self.ended
                pending = self._stream.unused_data if self.ended else self._take_unconsumed()
                if part:
                    yield part
                if not self.ended and not pending and len(part) < CHUNK_BYTES:
                    return
        except InvalidArchive:
            raise
        except Exception as error:  # each library raises its own kinds of errors
            if self._may_have_garbage and self._has_member:
                self.ended = self.has_garbage = True
                return
            raise InvalidArchive(f"{self._compression} data in the archive is damaged: {error}") from error

    def _create_stream(self) -> Any:  # noqa: ANN401
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

    def _take_unconsumed(self) -> bytes:
        # zlib returns input that it has not used; the others keep it.
        return bytes(self._stream.unconsumed_tail) if self._compression == "gzip" else b""
