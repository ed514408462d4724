"""Remember for five minutes, in all processes, that something has failed.

A failure is an empty file in ``locks/``. Its modification time is the time of the failure. If the file is lost, a
process only tries again too early. A sweep removes old files.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cachedb.disk.folders import Folders, Leftover
from cachedb.disk.layout import lock_kind
from cachedb.errors import CacheError, explain, ignore_os_errors

__all__ = ["forget_failure", "has_failed", "note_failure", "sweep_failures"]


_SECONDS = 300.0  # how long a failure is remembered
_SUFFIX = ".failed"


def _file_name(key: str) -> str:
    return f"{hashlib.sha256(key.encode()).hexdigest()}{_SUFFIX}"


def note_failure(directory: Path, key: str) -> None:
    """Remember a failure; do nothing if the cache cannot be written to.

    Args:
        directory: of the cache.
        key: names what has failed.
    """
    with suppress(CacheError), ignore_os_errors():
        file = Folders(directory).make_file(f"locks/{_file_name(key)}")
        try:
            os.utime(file)
        finally:
            os.close(file)


def has_failed(directory: Path, key: str) -> bool:
    """Return whether a failure was noted in the last five minutes; times in the future do not count."""
    with ignore_os_errors():
        return _is_recent((directory / "locks" / _file_name(key)).lstat())
    return False


def forget_failure(directory: Path, key: str) -> None:
    """Forget a failure, because a new attempt has succeeded."""
    with suppress(CacheError), ignore_os_errors():
        Folders(directory).remove(f"locks/{_file_name(key)}")


def _is_recent(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) and 0 <= time.time() - found.st_mtime < _SECONDS


def sweep_failures(folders: Folders) -> Iterator[Leftover]:
    """Remove the files of old failures; yield those that cannot be removed."""
    with folders.open("locks") as folder:
        for name in os.listdir(folder):
            if lock_kind(name) != "failure":
                continue
            try:
                with suppress(FileNotFoundError):
                    if not _is_recent(os.stat(name, dir_fd=folder, follow_symlinks=False)):
                        os.unlink(name, dir_fd=folder)
            except OSError as error:
                yield Leftover(folders.directory / "locks" / name, explain(error))
