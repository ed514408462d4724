"""Measure the files of a cache other than blobs, and its file system."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from cachedb.disk.downloads import is_stale
from cachedb.disk.layout import POLICY_FILE, trash_digest
from cachedb.disk.marker import MARKER
from cachedb.errors import os_errors

__all__ = ["FileSizes", "FileSystem", "measure_file_system", "measure_files"]


_KEPT: Final = (
    "index",
    "policy",
    "partial downloads",
    "ingest",
    "locks",
    "quarantine",
    "backups",
    "reserve",
    "other files",
)
_FREED: Final = ("old partial downloads", "trash")


class FileSizes(NamedTuple):
    """The bytes of all files of a cache except its blobs, by kind; `df` and plans use the same words."""

    kept: dict[str, int]  # files that stay
    freed: dict[str, int]  # files that a prune or a collection removes

    @property
    def total_size(self) -> int:
        """The bytes of all these files."""
        return sum(self.kept.values()) + self.freed_size

    @property
    def freed_size(self) -> int:
        """The bytes that a prune or a collection frees."""
        return sum(self.freed.values())


class FileSystem(NamedTuple):
    """The size of a file system and what is free for this user, in bytes."""

    size: int
    free: int


def measure_files(directory: Path) -> FileSizes:
    """Return the sizes of the files of a cache outside ``blobs/``, as far as this user can read folders.

    A file with several names counts once. A downloaded blob has two names until it is stored.

    Raises:
        StorageError: if a file of the cache cannot be read.
    """
    sizes, linked = dict.fromkeys((*_KEPT, *_FREED), 0), set[int]()
    for folder, name in _walk_files(directory):
        with os_errors("read the cache"):
            try:
                status = Path(directory, folder, name).lstat()
            except FileNotFoundError:
                continue
            if status.st_nlink > 1:
                if status.st_ino in linked:
                    continue
                linked.add(status.st_ino)
            sizes[_classify(folder, name, status)] += status.st_size
    return FileSizes({kind: sizes[kind] for kind in _KEPT}, {kind: sizes[kind] for kind in _FREED})


def measure_file_system(directory: Path) -> FileSystem:
    """Return the size and the free space of the file system of a directory.

    Raises:
        StorageError: if the directory cannot be read.
    """
    with os_errors("read the cache"):
        found = os.statvfs(directory)
    return FileSystem(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)


def _walk_files(directory: Path) -> Iterator[tuple[str, str]]:
    """Yield the folder and the name of each file outside ``blobs/``; the folder is relative to the cache."""
    for place, folders, names in os.walk(directory):
        folder = os.path.relpath(place, directory)
        if folder == ".":
            folder = ""
            folders[:] = [name for name in folders if name != "blobs"]
        for name in names:
            yield folder, name


def _classify(folder: str, name: str, status: os.stat_result) -> str:
    """Return the kind of a file: one of the words of `_KEPT` and `_FREED`."""
    first = folder.partition("/")[0]
    if not folder:
        if name.startswith("index.db") or name == MARKER:
            return "index"
        return {POLICY_FILE: "policy", "reserve": "reserve"}.get(name, "other files")
    if folder == "ingest/partial":
        return "old partial downloads" if is_stale(name, status) else "partial downloads"
    if folder == "trash" and trash_digest(name) is None:
        return "other files"  # not ours, so it stays
    if first == "reserve.inodes":
        return "reserve"
    return first if first in ("backups", "ingest", "locks", "quarantine", "trash") else "other files"
