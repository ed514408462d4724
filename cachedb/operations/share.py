"""Share a cache with a group of users by changing the group and mode of its folders and files."""

from __future__ import annotations

import grp
import os
import stat
from collections.abc import Callable

from cachedb.disk.folders import FOLDERS, Folders, is_shared
from cachedb.disk.listing import list_names
from cachedb.errors import CacheError, StorageError, os_errors
from cachedb.text import shorten

__all__ = ["share"]


_FOLDER_MODE = 0o2770  # setgid: new files and folders get the folder's group
_FILE_MODE = 0o660
_GROUP_DIGITS = 10  # of the largest number of a group; Python refuses to parse very long numbers


def share(folders: Folders, group: str | None = None) -> str:
    """Let a group read and write a cache: its folders, index and lock files; blobs stay read-only.

    Later files follow the mode of their folder, whatever the umask. The mode of the cache directory marks the cache as
    shared. It is changed last, so an interrupted call leaves the cache unshared.

    Args:
        folders: the folders of the cache.
        group: name or number of the group; the default is the current group of a shared cache, else the process's.

    Returns:
        The name of the group.

    Raises:
        CacheError: if there is no such group.
        StorageError: if this user does not own the cache and its files, or is not a member of the group.
    """
    gid = _find_group_id(folders, group)
    with os_errors("share the cache"):
        # Otherwise a file of another user would leave a part of the cache to each of the two groups.
        for change in (_check_owner, _set_group_and_mode):
            for name in (*FOLDERS, "quarantine", "reserve.inodes", "ingest/partial"):
                folders.make(name)  # otherwise a member could make it unreadable for the others
                with folders.open(name) as folder:
                    _share_files(folder, gid, change)
                    change(folder, gid, _FOLDER_MODE)
            _share_files(folders.root, gid, change)
            change(folders.root, gid, _FOLDER_MODE)
    return _find_group_name(gid)


def _share_files(folder: int, gid: int, change: Callable[[int, int, int], None]) -> None:
    """Let the group write to the files of a folder that their owner can write to; blobs are read-only."""
    for name in list_names(folder):
        try:
            # O_PATH, because opening and closing the index would release SQLite's locks of this process.
            file = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        except FileNotFoundError:
            continue  # deleted meanwhile
        try:
            found = os.fstat(file)
            if stat.S_ISREG(found.st_mode) and found.st_mode & stat.S_IWUSR and found.st_nlink == 1:
                change(file, gid, _FILE_MODE)
        finally:
            os.close(file)


def _check_owner(file: int, gid: int, mode: int) -> None:
    """Raise if this user cannot give a file the group and mode.

    Raises:
        StorageError: if the file belongs to another user.
    """
    found = os.fstat(file)
    if (found.st_gid, stat.S_IMODE(found.st_mode)) != (gid, mode) and os.geteuid() not in (0, found.st_uid):
        path = os.readlink(f"/proc/self/fd/{file}")
        raise StorageError(f"{path!r} belongs to user {found.st_uid}, so nothing was shared: run the command as root")


def _set_group_and_mode(file: int, gid: int, mode: int) -> None:
    found, path = os.fstat(file), f"/proc/self/fd/{file}"
    if found.st_gid != gid:
        os.chown(path, -1, gid)
    if stat.S_IMODE(found.st_mode) != mode:
        os.chmod(path, mode)


def _find_group_id(folders: Folders, group: str | None) -> int:
    if group is None:
        return folders.status.st_gid if is_shared(folders.status) else os.getegid()
    try:
        if not group.isdecimal():
            return grp.getgrnam(group).gr_gid
        if len(group) <= _GROUP_DIGITS and (number := int(group)) < 2**32 - 1:
            return number
        raise KeyError(group)
    except KeyError:
        raise CacheError(f"there is no group {shorten(group)}: name one that `getent group` lists") from None


def _find_group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
