"""The marker: a file that identifies a directory as a cache.

It is the first file of a cache, and is synced before any other file is made. In a directory without a marker, nothing
is repaired, swept or collected. Its id distinguishes the cache from another one that takes its place later.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from cachedb.disk.listing import list_names
from cachedb.errors import NotACache, SchemaMismatch

__all__ = [
    "MARKER",
    "UNFINISHED_MARKER",
    "Marker",
    "count_links",
    "marker_identity",
    "read",
    "refresh",
    "renew",
    "write",
]


MARKER = "cachedb.json"
"""The name of the marker in the cache directory."""

UNFINISHED_MARKER = re.compile(r"\.cachedb-[0-9a-f]{16}\.marker")
"""Matches the name of an unfinished marker, which stays if its writer dies."""

_OPEN_MARKER = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_REASONS = {
    errno.EACCES: "Permission denied: its owner can run `chmod -R a+rX` on the directory, or `cachedb init --shared`",
    errno.ELOOP: "it is a symbolic link: put the file that it leads to in its place",
}
_FORMAT = 1  # of the directory: which file is where; the schema of the index has its own number
_WRITING_SECONDS = 10  # the longest time to write and sync a marker
_MAX_BYTES = 4096  # a longer marker is invalid
_ID = re.compile(r"[0-9a-f]{32}")
_BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")
_GET_GENERATION = 0x80007601 | struct.calcsize("l") << 16  # FS_IOC_GETVERSION, ioctl_iflags(2)


class Marker(NamedTuple):
    """The contents of a marker."""

    format: int
    id: str  # 32 hexadecimal digits, chosen at random
    inode: int | None  # of the marker's file, to detect copies; None if the cache may be a copy
    directory: int | None = None  # its inode; None in a marker of an older release
    file_system: str | None = None  # of the directory, from `_file_system_id`
    boot: str | None = None  # the host's boot id when the marker was written
    generation: int | None = None  # of the inode, whose number another file may get; None if it is unknown
    written: int | None = None  # when, in nanoseconds since 1970; None in a marker of an older release

    def is_of(self, folder: int) -> bool | None:
        """Return whether the marker was written in this directory; None if an old marker cannot tell."""
        file = os.open(MARKER, _OPEN_MARKER, dir_fd=folder)
        try:
            inode, generation = os.fstat(file).st_ino, _read_generation(file)
        finally:
            os.close(file)
        if self.inode != inode or (None not in (self.generation, generation) and self.generation != generation):
            return False
        if self.directory is None:
            return None
        found = _describe_place(folder)
        # The id of a file system may change when the host restarts, so it only counts within one boot.
        same_boot = self.boot is not None and self.boot == found["boot"]
        return self.directory == found["directory"] and not (same_boot and self.file_system != found["file_system"])

    def is_overwritten(self, folder: int) -> bool:
        """Return whether the file was changed after it was written.

        `cp -a BACKUP/. CACHE` changes it, and so does `chown -R`.
        """
        changed = os.stat(MARKER, dir_fd=folder, follow_symlinks=False).st_ctime_ns
        return self.written is not None and changed - self.written > _WRITING_SECONDS * 1_000_000_000

    def is_outdated(self, folder: int) -> bool:
        """Return whether `refresh` would change the marker, because the host has restarted."""
        return self.inode is not None and self.boot != _read_boot_id()


def read(folder: int | Path) -> Marker | None:
    """Return the marker of a cache directory; None if it has none.

    Args:
        folder: the directory, or a descriptor of it.

    Raises:
        NotACache: if the file is not a valid marker, or cannot be opened.
        SchemaMismatch: if a newer release has written it.
    """
    try:
        if isinstance(folder, int):
            file = os.open(MARKER, _OPEN_MARKER, dir_fd=folder)
        else:
            file = os.open(folder / MARKER, _OPEN_MARKER)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror)
        raise NotACache(f"{MARKER!r} in the cache directory cannot be opened: {reason}") from error
    try:
        with suppress(OSError):  # raised if it is a folder
            return _parse(os.read(file, _MAX_BYTES))
    finally:
        os.close(file)
    return _parse(b"")


def _parse(data: bytes) -> Marker:
    try:
        found = json.loads(data)
        marker = Marker(
            found["format"],
            found["id"],
            found.get("inode"),
            found.get("directory"),
            found.get("file_system"),
            found.get("boot"),
            found.get("generation"),
            found.get("written"),
        )
        is_valid = type(marker.format) is int and marker.format > 0 and bool(_ID.fullmatch(marker.id))
        numbers = (marker.inode, marker.directory, marker.generation, marker.written)
        is_valid = is_valid and all(number is None or type(number) is int for number in numbers)
        is_valid = is_valid and all(s is None or type(s) is str for s in (marker.file_system, marker.boot))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_valid = False
    if not is_valid:
        raise NotACache(f"{MARKER!r} is not a marker of cachedb: delete it if the directory is a cache, and try again")
    if marker.format > _FORMAT:
        raise SchemaMismatch(f"{MARKER!r} is from a newer release: use a newer release of cachedb")
    return marker


def write(folder: int, settle: Callable[[int], object], *, is_sound: bool = True) -> Marker:
    """Write a marker, unless another process has written one; return the directory's marker.

    Args:
        folder: a descriptor of the directory.
        settle: sets the owner and mode of a new file.
        is_sound: False if the directory has an index already, which may be part of a copy without its marker.
    """
    with (
        _new_marker(folder, settle, is_sound=is_sound) as part,
        suppress(FileExistsError),
    ):  # another process was first, and its marker stays
        os.link(part, MARKER, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    found = read(folder)
    assert found is not None
    return found


def renew(folder: int, settle: Callable[[int], object]) -> None:
    """Replace a copy's marker by one with a new id and inode, so that the copy becomes a cache.

    Args:
        folder: as for `write`.
        settle: as for `write`.
    """
    _replace(folder, settle, secrets.token_hex(16))


def refresh(folder: int, settle: Callable[[int], object], found: Marker) -> None:
    """Replace the marker by one with the same id and the present place of the cache.

    Args:
        folder: as for `write`.
        settle: as for `write`.
        found: the present marker, which is not a copy.
    """
    _replace(folder, settle, found.id)


def count_links(folder: int, status: os.stat_result) -> int:
    """Return how many names a marker has, not counting the names of unfinished markers."""
    while status.st_nlink > 1:
        count = status.st_nlink
        for name in filter(UNFINISHED_MARKER.fullmatch, list_names(folder)):
            with suppress(FileNotFoundError):
                count -= os.stat(name, dir_fd=folder, follow_symlinks=False).st_ino == status.st_ino
        before, status = status, os.stat(MARKER, dir_fd=folder, follow_symlinks=False)
        # Otherwise another process has finished the marker meanwhile.
        if (status.st_ino, status.st_nlink) == (before.st_ino, before.st_nlink):
            return count
    return 1


def _replace(folder: int, settle: Callable[[int], object], cache_id: str) -> None:
    with _new_marker(folder, settle, is_sound=True, cache_id=cache_id) as part:
        second = f".cachedb-{secrets.token_hex(8)}.marker"
        os.link(part, second, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        os.rename(second, MARKER, src_dir_fd=folder, dst_dir_fd=folder)


@contextmanager
def _new_marker(
    folder: int, settle: Callable[[int], object], *, is_sound: bool, cache_id: str | None = None
) -> Iterator[str]:
    """Yield the temporary name of a new, synced marker, which the block links or renames; then sync that."""
    part = f".cachedb-{secrets.token_hex(8)}.marker"
    file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        try:
            content = {
                "format": _FORMAT,
                "id": cache_id or secrets.token_hex(16),
                "inode": os.fstat(file).st_ino if is_sound else None,
                "generation": _read_generation(file),
                "written": time.time_ns(),
                **_describe_place(folder),
            }
            os.write(file, f"{json.dumps(content)}\n".encode())
            settle(file)
            os.fsync(file)
        finally:
            os.close(file)
        yield part
    finally:
        os.unlink(part, dir_fd=folder)
    os.fsync(folder)


def _describe_place(folder: int) -> dict[str, int | str | None]:
    """Return the values of a marker that differ between a cache and its copy."""
    return {"directory": os.fstat(folder).st_ino, "file_system": _file_system_id(folder), "boot": _read_boot_id()}


def _file_system_id(folder: int) -> str:
    """Return an id that identifies a mounted file system until the host restarts.

    Most file systems keep their id after a restart. Some have no id, or derive it from their device number.
    """
    number = os.fstatvfs(folder).f_fsid
    return f"id {number:x}" if number else f"device {os.fstat(folder).st_dev}"


def _read_generation(file: int) -> int | None:
    """Return the generation of an inode; a new file with its number has another. None if unknown."""
    with suppress(OSError):
        (number,) = struct.unpack("i", fcntl.ioctl(file, _GET_GENERATION, bytes(struct.calcsize("l")))[:4])
        return int(number)
    return None


def _read_boot_id() -> str | None:
    with suppress(OSError):
        return _BOOT_ID_FILE.read_text(encoding="utf-8").strip()
    return None


def marker_identity(folder: int) -> tuple[int, int, int, int] | None:
    """Return values that change if the marker is replaced or linked; None if there is no marker."""
    try:
        status = os.stat(MARKER, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_nlink
