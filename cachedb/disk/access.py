"""Whether this process may change a cache directory, and the open folders to change it in."""

from __future__ import annotations

import os
from pathlib import Path

from cachedb import space
from cachedb.disk.folders import Folders, find_links
from cachedb.disk.reserve import RESERVE_BYTES
from cachedb.errors import NotOurs, StorageError, os_errors

__all__ = ["Access"]


class Access:
    """What this process may do with a cache directory: change it, or only read it."""

    def __init__(self, directory: Path, index: Path, *, trust: bool, search_links: bool = True) -> None:
        """Find out whether the directory can be changed; nothing is opened yet.

        Args:
            directory: of the cache.
            index: the database to open; if it is missing, the directory must be changed.
            trust: change the directory of another user.
            search_links: only read the directory if its index has hard links elsewhere.
        """
        self._directory, self._trust = directory, trust
        self._folders: Folders | None = None
        self._shortage: StorageError | None = None
        with os_errors("use the cache directory"):
            self.read_only = index.exists() and not os.access(directory, os.W_OK)
            self._refusal = find_links(directory) if search_links and not self.read_only else None
        self.read_only = self.read_only or self._refusal is not None

    @property
    def folders(self) -> Folders:
        """The open cache directory, for changes.

        Raises:
            NotOurs: if it is another user's, and neither shared nor trusted; or a copy by hard links.
            StorageError: if it cannot be opened, or only be read.
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
        """Raise `CacheReplaced` if the open directory was moved, removed or replaced."""
        if self._folders is not None:
            self._folders.check()

    def only_read(self, shortage: StorageError) -> None:
        """Only read the directory until its file system has room again.

        Args:
            shortage: the error to raise for changes until then.
        """
        self.read_only, self._shortage = True, shortage

    def end_shortage(self) -> bool:
        """End a shortage that is over; return whether there was one. If it goes on, raise its error."""
        if self._shortage is None:
            return False
        if space.find_shortage(self._directory, RESERVE_BYTES):
            raise StorageError(str(self._shortage), errno=self._shortage.errno) from self._shortage
        self.read_only, self._shortage = False, None
        return True

    def close(self) -> None:
        """Close the directory; a call in progress keeps it open."""
        self._folders = None
