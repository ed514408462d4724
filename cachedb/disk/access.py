"""Decide whether this process may change a cache directory, and open its folders for changes."""

from __future__ import annotations

import os
from pathlib import Path

from cachedb import space
from cachedb.disk.existence import exists
from cachedb.disk.folders import Folders, find_links
from cachedb.disk.reserve import RESERVE_BYTES
from cachedb.errors import CacheReplaced, NotOurs, StorageError, os_errors

__all__ = ["Access"]


class Access:
    """The right of this process to change a cache directory, or only to read from it."""

    def __init__(self, directory: Path, index: Path, *, trust: bool, search_links: bool = True) -> None:
        """Find out whether the directory can be changed; nothing is opened yet.

        Args:
            directory: of the cache.
            index: the database to open; if it is missing, the directory is not read-only.
            trust: change the directory even if it belongs to another user.
            search_links: make a directory read-only if its marker or index has hard links elsewhere.
        """
        self._directory, self._trust = directory, trust
        self._folders: Folders | None = None
        self._shortage: StorageError | None = None
        self.replaced: CacheReplaced | None = None
        """Why the cache must be opened again, because it was replaced."""
        with os_errors("use the cache directory"):
            self.is_writable = os.access(directory, os.W_OK) or not exists(index)
            self._refusal = find_links(directory) if search_links and self.is_writable else None

    @property
    def read_only(self) -> bool:
        """Whether the directory is read-only for this process, for any reason."""
        return not self.is_writable or self._refusal is not None or self._shortage is not None

    @property
    def folders(self) -> Folders:
        """The open cache directory, for changes.

        Raises:
            NotOurs: if it belongs to another user, and is neither shared nor trusted; or if it is a copy by hard links.
            StorageError: if it cannot be opened, or is read-only.
        """
        if self._refusal is not None:
            raise NotOurs(str(self._refusal))
        if self.read_only:
            raise StorageError(
                f"the cache {str(self._directory)!r} can only be read: check the owner and mode of the directory, and "
                "whether its file system is mounted read-only"
            )
        if self._folders is None:
            with os_errors("open the cache directory"):
                folders = Folders(self._directory)
                folders.check_owner(trust=self._trust)
                folders.mark(new=False)
            self._folders = folders
        return self._folders

    @property
    def is_open(self) -> bool:
        """Whether the directory is open for changes."""
        return self._folders is not None

    def check(self) -> None:
        """Raise `CacheReplaced` if the open directory or its index was moved, removed or replaced."""
        if self.replaced is not None:
            raise CacheReplaced(str(self.replaced))
        if self._folders is not None:
            self._folders.check()

    def make_read_only(self, shortage: StorageError) -> None:
        """Make the directory read-only until its file system has room again.

        Args:
            shortage: the error that changes raise until then.
        """
        self._shortage = shortage

    def end_shortage(self) -> bool:
        """End a shortage that is over, and return whether there was one; raise its error if it goes on."""
        if self._shortage is None:
            return False
        if space.find_shortage(self._directory, RESERVE_BYTES):
            raise StorageError(str(self._shortage), errno=self._shortage.errno) from self._shortage
        self._shortage = None
        return True

    def close(self) -> None:
        """Close the directory; a call in progress keeps it open."""
        self._folders = None
