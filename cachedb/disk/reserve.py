"""Reserve space and inodes on the disk, and free them when it is full."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from cachedb import space
from cachedb.disk import downloads
from cachedb.disk.existence import exists
from cachedb.disk.folders import Folders
from cachedb.errors import CacheError, StorageError, ignore_os_errors, os_errors

__all__ = ["NO_ROOM_ERRNOS", "RESERVE_BYTES", "Reserve", "find_quota_user", "is_full"]

T = TypeVar("T")

NO_ROOM_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
)  # no file can be made or extended; reading may work
RESERVE_BYTES = 1024 * 1024
_LEAST_BYTES = RESERVE_BYTES // 4  # a smaller part of the reserve would not hold the WAL of a removal
# SQLite needs two for index.db-wal and index.db-shm, a session needs two, and locks need the rest.
_RESERVE_INODES = 8


class Reserve:
    """The files ``reserve`` and ``reserve.inodes/`` of a cache."""

    def __init__(self, directory: Path, open_folders: Callable[[], Folders]) -> None:
        """Prepare the reserve of a cache, but make no files.

        Args:
            directory: of the cache.
            open_folders: returns its open folders, or raises if the cache cannot be written to.
        """
        self._directory = directory
        self._open_folders = open_folders
        self._gave_up = False
        self._gave_up_space = False

    def keep(self) -> None:
        """Make the missing files of the reserve, if the disk has room for them."""
        self._keep_bytes()
        with suppress(CacheError), ignore_os_errors():
            self._keep_inodes()

    def refill(self) -> None:
        """Reserve again the inodes that this process gave up; call it when SQLite has removed its files."""
        if self._gave_up:
            self._gave_up = False
            self.keep()

    def check(self, path: Path | None = None) -> None:
        """Raise if new content would use the space of the reserve, which SQLite needs to free a full disk.

        Opening the cache on a full disk gives up the reserve.

        Args:
            path: of the content, in an existing folder; on another file system it uses no reserve. None for the cache.

        Raises:
            StorageError: if this process gave up the reserve, and the disk has no room for it now.
        """
        if self._gave_up_space and (path is None or self._is_beside(path)):
            self._keep_bytes()
            if self._gave_up_space:
                with os_errors("write to the cache"):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _is_beside(self, path: Path) -> bool:
        """Return whether the folder of a path is on the file system of the cache."""
        with suppress(OSError):
            return os.stat(path.parent).st_dev == os.stat(self._directory).st_dev
        return False

    def _keep_inodes(self) -> None:
        if os.path.lexists(self._directory / "reserve.inodes" / str(_RESERVE_INODES)):  # the last one made
            return
        folders = self._open_folders()
        folders.make("reserve.inodes")
        for number in range(1, _RESERVE_INODES + 1):
            os.close(folders.make_file(f"reserve.inodes/{number}"))

    def give_up_inodes(self, user: int | None = None) -> bool:
        """Unlink the reserved inodes; return whether the file system has room now.

        Args:
            user: whose files to unlink, as from `find_quota_user`.
        """
        found = False
        with suppress(CacheError), ignore_os_errors(), self._open_folders().open("reserve.inodes") as folder:
            for number in range(_RESERVE_INODES, 0, -1):
                if _unlink(str(number), folder, user):
                    found = self._gave_up = True
        # Another process may have given up the same inodes just now.
        return found or not space.find_shortage(self._directory, RESERVE_BYTES)

    def _keep_bytes(self) -> None:
        path = self._directory / "reserve"
        with ignore_os_errors():
            if exists(path) and path.stat().st_size >= RESERVE_BYTES:
                self._gave_up_space = False
                return
            descriptor = self._open_folders().make_file("reserve")
            try:
                if os.fstat(descriptor).st_nlink > 1:
                    return  # somebody linked another file here
                self._gave_up_space = not _allocate(descriptor)
            except OSError as error:
                # EFBIG is a limit on our file sizes; the disk may not be full.
                if error.errno != errno.EFBIG or not os.fstat(descriptor).st_size:
                    path.unlink()
            finally:
                os.close(descriptor)

    def run(self, work: Callable[[], T], again: Callable[[], T] | None = None) -> T:
        """Call a function; if the disk is full, free the reserve and call it or another function again.

        Without free space, SQLite can neither delete rows nor read, because it needs room for its WAL. First the
        reserved inodes are freed, which may be enough. Then the reserved space and partial downloads are freed.

        Args:
            work: the function.
            again: called instead of ``work`` the second time; None for ``work`` itself.

        Raises:
            StorageError: if the disk is still full.
        """
        try:
            return work()
        except StorageError as error:
            if not is_full(error):
                raise
            user = find_quota_user(error)
            if self.give_up_inodes(user):
                try:
                    return again() if again else work()
                except StorageError as still:
                    if not is_full(still):
                        raise
            freed = False
            with suppress(CacheError), ignore_os_errors():
                freed = downloads.remove_stale_downloads(self._open_folders(), age=0, user=user)
            with ignore_os_errors():
                folders = self._open_folders()  # keeps its descriptor open
                if _unlink("reserve", folders.root, user):
                    freed = self._gave_up_space = True
            if freed:
                return (again or work)()
            raise


def is_full(error: StorageError) -> bool:
    """Return whether the file system has no space or no inode left, or the quota is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def find_quota_user(error: StorageError) -> int | None:
    """Return the id of the user whose quota is used up; None if no quota is the reason.

    Only files of this user take space from the quota. Without a quota, the files of all users take the space.
    """
    return os.geteuid() if error.errno == errno.EDQUOT else None


def _allocate(file: int, size: int = RESERVE_BYTES) -> bool:
    """Allocate the space of the reserve, or a part if there is no room for all; return whether it is all.

    Raises:
        OSError: if the disk has too little room, or the file system cannot allocate space.
    """
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or size == _LEAST_BYTES:
            raise
        _allocate(file, size // 2)
        return False
    return True


def _unlink(name: str, folder: int, user: int | None) -> bool:
    """Unlink a file of a user, None for any; return whether it was there."""
    with suppress(FileNotFoundError):
        if user in (None, os.stat(name, dir_fd=folder, follow_symlinks=False).st_uid):
            os.unlink(name, dir_fd=folder)
            return True
    return False
