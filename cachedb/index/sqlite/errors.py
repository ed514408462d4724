"""The error codes and texts of SQLite, and which of our errors they are."""

from __future__ import annotations

import errno
import re
import sqlite3

from cachedb.disk import marker
from cachedb.errors import (
    StorageError,
)

__all__ = ["DAMAGED_TEXTS", "FAILURES", "NO_ROOM", "PASSING", "is_full"]


NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # a file cannot be made or extended, and may be read
PASSING = re.compile(rf"{marker.UNFINISHED.pattern}|index\.db-test-.*")  # while another process makes the cache
DAMAGED_TEXTS = (
    "no such ",
    "unsupported file format",
    "malformed ",
    "Could not decode to UTF-8",
)  # these have no own code
FAILURES = (sqlite3.DatabaseError, UnicodeDecodeError)  # the second where a message quotes what is damaged


def is_full(error: StorageError) -> bool:
    """Return whether the file system has no space or no inode left, or the quota is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
