"""The cache directory and its folders, opened so that no operation can change files outside them.

The directory is opened once. Each of its folders is opened relative to it when needed. A folder is refused if it is a
symbolic link, on another file system, or another user's. Files are deleted and renamed relative to these descriptors.
So neither a planted link nor another directory in the cache's place can lead an operation elsewhere.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

from cachedb.disk import marker
from cachedb.errors import CacheReplaced, NotOurs, os_errors

__all__ = [
    "BLOB_FOLDERS",
    "FOLDERS",
    "Folders",
    "Leftover",
    "OpenFolder",
    "apply_folder_mode",
    "file_mode_in",
    "find_links",
    "give_to_folder_owner",
    "is_shared",
    "rename_over",
    "set_aside",
]


BLOB_FOLDERS = ("blobs", "blobs/sha256", "blobs/sha512")
FOLDERS = (*BLOB_FOLDERS, "ingest", "trash", "locks", "backups")
"""The folders of every cache, in the order they are made."""

_OFTEN_EMPTY = ("blobs/sha512", "ingest", "trash", "backups")
"""The folders that a cleaner of empty folders may remove while a process has the cache open."""

_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Leftover(NamedTuple):
    """A file that a dead process left behind, and that cannot be removed."""

    path: Path
    reason: str


class OpenFolder:
    """A folder of the cache that stays open while this object is referenced, even if it is moved."""

    def __init__(self, folder: int) -> None:
        """Duplicate the descriptor of an open folder.

        Args:
            folder: the descriptor, which the caller may close.
        """
        self.descriptor = os.dup(folder)
        status = os.fstat(folder)
        _close_after(self, self.descriptor, status)

    @property
    def is_removed(self) -> bool:
        """Whether the folder was removed; its descriptor is still open then."""
        with os_errors("use a folder of the cache"):  # whose descriptor a program may have closed
            return os.fstat(self.descriptor).st_nlink == 0


class Folders:
    """The open directory of one cache."""

    def __init__(self, directory: Path) -> None:
        """Open the directory, which must exist.

        Raises:
            OSError: if the directory cannot be opened.
        """
        self.directory = directory
        self.root = os.open(directory, _OPEN_FOLDER)
        found = os.fstat(self.root)
        self._identity = (found.st_dev, found.st_ino)
        _close_after(self, self.root, found)
        self._marker: tuple[tuple[int, int, int, int], str] | None = None
        self.is_copy = False
        """Whether the cache may be a copy that was made file by file, and not checked yet."""
        self.is_overwritten = False
        """Whether another program has changed the marker, and may have copied a backup over this cache."""
        self.is_outdated = False
        """Whether the marker names an earlier place of the cache: see `refresh_marker`."""
        self.had_marker = False
        """Whether the marker was there before this open; caches of older releases have none."""

    @property
    def status(self) -> os.stat_result:
        """The present owner and mode of the directory: somebody may share the cache while it is open."""
        return os.fstat(self.root)

    def check_owner(self, *, trust: bool = False) -> None:
        """Raise if the directory is another user's, and neither shared nor trusted.

        Args:
            trust: trust the directory's owner, as ``CACHEDB_TRUST=1`` does.

        Raises:
            NotOurs: if the directory is refused.
        """
        owner, trust = self.status.st_uid, trust or os.environ.get("CACHEDB_TRUST") == "1"
        if owner != os.geteuid() and not trust and not is_shared(self.status):
            raise NotOurs(
                f"{str(self.directory)!r} belongs to user {_describe_user(owner)}: share it with "
                "`cachedb init --shared` as its owner, or pass --trust if you trust whoever can write to it"
            )

    @property
    def is_marked(self) -> bool:
        """Whether the directory had a marker at the last call of `mark`."""
        return self._marker is not None

    def mark(self, *, new: bool, is_sound: bool = True) -> None:
        """Read the marker, which has the id of the cache, and remember it.

        Args:
            new: write a marker first if the directory has none.
            is_sound: as for `marker.write`.
        """
        found = marker.read(self.root)
        if found is None and new:
            found = marker.write(self.root, lambda file: apply_folder_mode(file, self.status), is_sound=is_sound)
        status = marker.marker_identity(self.root)
        if found is not None and status is not None:
            self._marker = (status, found.id)
        self.had_marker = found is not None and found.inode is not None
        self.is_copy = found is None or status is None or found.is_of(self.root) is False
        self.is_overwritten = found is not None and not self.is_copy and found.is_overwritten(self.root)
        self.is_outdated = found is not None and not self.is_copy and found.is_outdated(self.root)

    def accept_copy(self) -> None:
        """Give a checked copy its own id, or a checked cache a new marker.

        The caller must hold the write lock.
        """
        found = marker.read(self.root)
        if found is None or self.is_copy:
            marker.renew(self.root, lambda file: apply_folder_mode(file, self.status))
        else:
            marker.refresh(self.root, lambda file: apply_folder_mode(file, self.status), found)
        self.mark(new=False)

    def refresh_marker(self) -> None:
        """Write the present place of this cache into its marker; the caller must hold the write lock."""
        self.mark(new=False)
        found = marker.read(self.root)
        if self.is_outdated and found is not None:
            marker.refresh(self.root, lambda file: apply_folder_mode(file, self.status), found)
            self.mark(new=False)

    def check_links(self) -> None:
        """Raise if the cache shares its files with a copy through hard links.

        Raises:
            NotOurs: if the marker or the index has a second link.
        """
        for name in (marker.MARKER, "index.db"):
            with suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=self.root, follow_symlinks=False)
                links = marker.count_links(self.root, status) if name == marker.MARKER else status.st_nlink
                if links > 1:
                    raise NotOurs(
                        f"{self._path(name)!r} has {links} hard links, so a copy (`cp -al`, rsnapshot) shares this "
                        "file, and both caches can only be read: delete the copy, or make another with `cachedb copy`"
                    )

    def check(self) -> None:
        """Check, before each write, that the path still leads to this cache.

        Raises:
            CacheReplaced: if the directory was moved, removed or replaced while it was open.
            NotOurs: if the cache was copied by hard links while it was open.
        """
        try:
            status = os.stat(self.directory)
        except (FileNotFoundError, NotADirectoryError):
            status = None
        if status is None or (status.st_dev, status.st_ino) != self._identity:
            raise CacheReplaced(
                f"the cache directory {str(self.directory)!r} was moved, removed or replaced while it was open: "
                "open the cache again"
            )
        with os_errors("use the cache directory"):  # a program may have closed our descriptor
            identity = marker.marker_identity(self.root)
        if self._marker is None or identity == self._marker[0]:
            return
        found = marker.read(self.root)
        if found is None or found.id != self._marker[1]:
            raise CacheReplaced(
                f"{str(self.directory)!r} is another cache than the one that was opened: open the cache again"
            )
        self.check_links()
        self.mark(new=False)

    def make(self, name: str) -> None:
        """Make a folder of the cache with the mode of the directory, unless it exists."""
        outer, _, inner = name.rpartition("/")
        with self.open(outer) if outer else nullcontext(self.root) as parent:
            try:
                os.mkdir(inner, 0o700, dir_fd=parent)
            except FileExistsError:
                return
            except OSError as error:
                raise OSError(error.errno, error.strerror, self._path(name)) from error
        with self.open(name) as folder:
            apply_folder_mode(folder, self.status, is_folder=True)

    def make_file(self, path: str) -> int:
        """Make a file with the mode of the directory, or open it if it exists; return its descriptor.

        Args:
            path: relative to the cache directory.

        Raises:
            NotOurs: if a folder in the path is refused: see `open`.
            OSError: if the file cannot be made or opened, or is a symbolic link.
        """
        folder, _, name = path.rpartition("/")
        with self.open(folder) if folder else nullcontext(self.root) as parent:
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(name, flags, 0o600, dir_fd=parent)
        try:
            apply_folder_mode(file, self.status)
        except BaseException:
            os.close(file)
            raise
        return file

    def remove(self, path: str) -> None:
        """Unlink a file; do nothing if it does not exist.

        Args:
            path: relative to the cache directory.

        Raises:
            NotOurs: if a folder in the path is refused: see `open`.
            OSError: if the file cannot be unlinked.
        """
        folder, _, name = path.rpartition("/")
        with suppress(FileNotFoundError), self.open(folder) if folder else nullcontext(self.root) as parent:
            os.unlink(name, dir_fd=parent)

    @contextmanager
    def open(self, name: str) -> Iterator[int]:
        """Yield a descriptor of a folder of the cache.

        If a cleaner of empty folders has removed the folder, it is made again.

        Args:
            name: relative to the cache directory.

        Raises:
            FileNotFoundError: if the folder does not exist.
            NotOurs: if it is a symbolic link, not a folder, another user's, or on another file system.
        """
        try:
            folder = self._open(name)
        except FileNotFoundError:
            if not self.is_marked or name not in _OFTEN_EMPTY:
                raise
            self.make(name)
            folder = self._open(name)
        try:
            self._check_folder(name, os.fstat(folder))
            yield folder
        finally:
            os.close(folder)

    def _open(self, name: str) -> int:
        folder = self.root
        for part in name.split("/"):
            try:
                inner = os.open(part, _OPEN_FOLDER | os.O_NOFOLLOW, dir_fd=folder)
            except NotADirectoryError:
                found = os.stat(part, dir_fd=folder, follow_symlinks=False)
                what = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "not a folder"
                raise NotOurs(
                    f"{self._path(name)!r} is {what}: put a folder back in its place, or move the whole cache"
                ) from None
            except OSError as error:
                raise OSError(error.errno, error.strerror, self._path(name)) from error
            finally:
                if folder != self.root:
                    os.close(folder)
            folder = inner
        return folder

    def _check_folder(self, name: str, found: os.stat_result) -> None:
        if found.st_dev != self._identity[0]:
            raise NotOurs(f"{self._path(name)!r} is on another file system: move the whole cache to one file system")
        if found.st_uid == os.geteuid():
            return
        directory = self.status
        if found.st_uid != directory.st_uid and not is_shared(directory):
            raise NotOurs(
                f"{self._path(name)!r} belongs to user {_describe_user(found.st_uid)}, and the cache to user "
                f"{_describe_user(directory.st_uid)}: give it back to its owner with chown"
            )

    def _path(self, name: str) -> str:
        return f"{self.directory}/{name}"


def _close_after(owner: object, folder: int, status: os.stat_result) -> None:
    """Close a folder when its owner is gone, but not at the exit of Python: exit handlers may use it."""
    weakref.finalize(owner, _close, folder, (status.st_dev, status.st_ino)).atexit = False


def _close(folder: int, identity: tuple[int, int]) -> None:
    """Close a folder, unless a program has closed its descriptor and the number is another file now."""
    with suppress(OSError):
        status = os.fstat(folder)
        if (status.st_dev, status.st_ino) == identity:
            os.close(folder)


def set_aside(folder: int, name: str) -> None:
    """Rename an entry that has the name of a file of the cache; `verify` reports the renamed entry.

    Args:
        folder: descriptor of the folder.
        name: of the entry, which another user of a shared cache may have made.
    """
    os.rename(name, f"{name}.{secrets.token_hex(8)}", src_dir_fd=folder, dst_dir_fd=folder)


def rename_over(name: str, folder: int, new_name: str, new_folder: int) -> None:
    """Rename a file into another open folder; a folder that already has the name is set aside."""
    try:
        os.rename(name, new_name, src_dir_fd=folder, dst_dir_fd=new_folder)
    except IsADirectoryError:
        set_aside(new_folder, new_name)
        os.rename(name, new_name, src_dir_fd=folder, dst_dir_fd=new_folder)


def find_links(directory: Path) -> NotOurs | None:
    """Return the error for a cache that was copied by hard links; None for other caches."""
    with suppress(FileNotFoundError, NotADirectoryError):
        if os.lstat(directory / marker.MARKER).st_nlink == 1 == os.lstat(directory / "index.db").st_nlink:
            return None
        try:
            Folders(directory).check_links()
        except NotOurs as error:
            return error
    return None


def is_shared(folder: os.stat_result) -> bool:
    """Return whether a group shares a cache directory, by the mode that `cachedb init --shared` sets."""
    return folder.st_mode & (stat.S_ISGID | stat.S_IWGRP) == stat.S_ISGID | stat.S_IWGRP


def file_mode_in(folder: os.stat_result) -> int:
    """Return the mode of a new file in a folder: the folder's mode without the execute bits."""
    return folder.st_mode & 0o666


def give_to_folder_owner(file: int, folder: os.stat_result) -> None:
    """Give a file that root made in another user's folder to that user.

    Root may lack the permission, as in a rootless container. Then the members of a shared cache can still use the file.

    Raises:
        OSError: if root lacks the permission, and the folder is not shared.
    """
    if folder.st_uid != 0 and os.geteuid() == 0:
        try:
            os.fchown(file, folder.st_uid, folder.st_gid)
        except OSError as error:
            # EINVAL means that the owner has no number in this user namespace.
            if error.errno not in (errno.EPERM, errno.EINVAL) or not is_shared(folder):
                raise


def apply_folder_mode(file: int, folder: os.stat_result, *, is_folder: bool = False) -> None:
    """Give a new file or folder the mode of its folder; if root made it, also the owner."""
    found = os.fstat(file)
    if found.st_uid != os.geteuid():
        return  # another user's process has made it meanwhile
    if found.st_nlink > 1 and not is_folder:
        return  # somebody linked another file here
    give_to_folder_owner(file, folder)
    if folder.st_mode & stat.S_ISGID and found.st_gid != folder.st_gid:
        os.fchown(file, -1, folder.st_gid)  # it was made in another folder
    mode = stat.S_IMODE(folder.st_mode) if is_folder else file_mode_in(folder)
    if stat.S_IMODE(found.st_mode) != mode:
        os.fchmod(file, mode)


def _describe_user(uid: int) -> str:
    import pwd

    try:
        return f"{pwd.getpwuid(uid).pw_name!r} (uid {uid})"
    except KeyError:
        return str(uid)
