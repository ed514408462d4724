"""Limit the size of unpacked content: an attacker's small archive may unpack to terabytes."""

from __future__ import annotations

import os
import threading

from cachedb.errors import CacheError, InvalidArchive
from cachedb.text import format_size, parse_size

__all__ = ["UnpackLimit", "read_max_unpacked"]


_UNPACKED_LIMIT = 64 * 1024**3  # unpacked bytes allowed whatever the compressed size
_RATIO_LIMIT = 100  # unpacked bytes allowed per compressed byte
_RATIO_FREE = 256 * 1024**2  # unpacked bytes allowed whatever the ratio


def read_max_unpacked() -> int | None:
    """Return the size in ``CACHEDB_MAX_UNPACKED`` in bytes; None if it is not set.

    Raises:
        CacheError: if it is not a size.
    """
    text = os.environ.get("CACHEDB_MAX_UNPACKED")
    if not text:
        return None
    size = parse_size(text)
    if size is None:
        raise CacheError(f"CACHEDB_MAX_UNPACKED is {text!r}: write a size such as 500MB or 64GiB")
    return size


class UnpackLimit:
    """Limit on the size of unpacked content that belongs together; safe to use from several threads."""

    def __init__(self, what: str, compressed: int, most: int | None) -> None:
        """Create a limit; the default is 100 times the compressed size, at least 256 MiB and at most 64 GiB.

        Args:
            what: the start of an error, such as ``the layers in the archive unpack``.
            compressed: the compressed size in bytes, as far as it is known.
            most: the limit in bytes, whatever the ratio; None for the default.
        """
        self._what, self._compressed, self._most = what, compressed, most
        self._guard, self._unpacked = threading.Lock(), 0

    def add_compressed(self, count: int) -> None:
        """Add to the compressed size, if it was not known at the start."""
        self._compressed += count

    def add(self, count: int) -> None:
        """Add to the unpacked size.

        Raises:
            InvalidArchive: if it exceeds the limit.
        """
        with self._guard:
            self._unpacked += count
            unpacked = self._unpacked
        by_ratio = max(_RATIO_FREE, _RATIO_LIMIT * self._compressed)
        if self._most is not None or by_ratio > _UNPACKED_LIMIT:
            cap = _UNPACKED_LIMIT if self._most is None else self._most
            why = "the cap on unpacked bytes"
        else:
            cap, why = by_ratio, f"the cap of {_RATIO_LIMIT} times the compressed size"
            if cap == _RATIO_FREE:
                why = f"the cap for content over {_RATIO_LIMIT} times the compressed size"
        if unpacked > cap:
            raise InvalidArchive(
                f"{self._what} to more than {format_size(cap)}, {why}: "
                "if you trust it, raise the cap with --max-unpacked SIZE or CACHEDB_MAX_UNPACKED=SIZE"
            )
