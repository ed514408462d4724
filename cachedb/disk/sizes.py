"""Measure the files of a cache other than blobs, and its file system."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cachedb.disk.marker import MARKER
from cachedb.errors import os_errors

__all__ = ["FileSizes", "FileSystem", "measure_file_system", "measure_files"]


_FOLDERS = ("backups", "ingest", "locks", "quarantine", "trash")


class FileSizes(NamedTuple):
    """The bytes of all files of a cache except its blobs."""

    index_size: int  # of the index and the marker
    folder_sizes: dict[str, int]  # by folder; ingest includes interrupted downloads
    reserve_size: int  # released when the disk is full

    @property
    def total_size(self) -> int:
        """The bytes of all of them."""
        return self.index_size + sum(self.folder_sizes.values()) + self.reserve_size


class FileSystem(NamedTuple):
    """The size of a file system and what is free for this user, in bytes."""

    size: int
    free: int


def measure_files(directory: Path) -> FileSizes:
    """Return the sizes of the files of a cache.

    Raises:
        StorageError: if a folder of the cache cannot be read.
    """
    return FileSizes(
        sum(map(_measure_file, [*directory.glob("index.db*"), directory / MARKER])),
        {name: sum(map(_measure_file, _walk_files(directory / name))) for name in _FOLDERS},
        _measure_file(directory / "reserve"),
    )


def measure_file_system(directory: Path) -> FileSystem:
    """Return the size and the free space of the file system of a directory.

    Raises:
        StorageError: if the directory cannot be read.
    """
    with os_errors("read the cache"):
        found = os.statvfs(directory)
    return FileSystem(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)


def _walk_files(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        for name in names:
            yield Path(place, name)


def _measure_file(path: Path) -> int:
    with os_errors("read the cache"):
        try:
            return path.lstat().st_size
        except FileNotFoundError:
            return 0
