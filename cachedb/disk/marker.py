"""The marker: a file that says that a directory is a cache, and which one.

It is written before anything else is made, and it is on disk before anything else is. Without it nothing in a
directory is repaired, swept or collected. Its id tells a cache from another one that takes its place later.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from cachedb.errors import NotACache, SchemaMismatch

__all__ = ["MARKER", "UNFINISHED", "Marker", "count_links", "identity", "read", "refresh", "renew", "write"]


MARKER = "cachedb.json"
"""The name of the marker in the cache directory."""

UNFINISHED = re.compile(r"\.cachedb-[0-9a-f]{16}\.marker")
"""The name of a marker that is being written, or was until its writer died."""

_FORMAT = 1  # of the directory as a whole: where things lie in it; the index has a schema of its own
_SIZE_LIMIT = 4096  # bytes
_ID = re.compile(r"[0-9a-f]{32}")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Marker(NamedTuple):
    """What a marker says."""

    format: int
    id: str  # 32 hexadecimal digits, chosen at random
    inode: int | None  # of the marker when the cache was known to be sound: that of a copy differs
    directory: int | None = None  # the directory's inode; None in a marker of an older release
    file_system: str | None = None  # where both are, as `_file_system` says
    boot: str | None = None  # of the host

    def is_of(self, folder: int) -> bool | None:
        """Return whether the marker was written in this directory; None if a marker of an older release cannot tell."""
        status = os.stat(MARKER, dir_fd=folder, follow_symlinks=False)
        if self.inode != status.st_ino:
            return False
        if self.directory is None:
            return None
        found = _place(folder)
        # Without a restart between, one file system has one number, which another may have after a restart.
        same_boot = self.boot is not None and self.boot == found["boot"]
        return self.directory == found["directory"] and not (same_boot and self.file_system != found["file_system"])

    def is_outdated(self, folder: int) -> bool:
        """Return whether `refresh` would note more than the marker says."""
        return self.inode is not None and self.boot != _boot()


def read(folder: int | Path) -> Marker | None:
    """Return the marker of a cache directory; None if it has none.

    Args:
        folder: the directory, or a descriptor of it.

    Raises:
        NotACache: if there is a file of that name that is no marker.
        SchemaMismatch: if a newer release has made it.
    """
    try:
        if isinstance(folder, int):
            file = os.open(MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        else:
            file = os.open(folder / MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise NotACache(f"{MARKER!r} in the cache directory cannot be opened: {error.strerror}") from error
    try:
        with suppress(OSError):  # of a folder of that name
            return _parsed(os.read(file, _SIZE_LIMIT))
    finally:
        os.close(file)
    return _parsed(b"")


def _parsed(data: bytes) -> Marker:
    try:
        found = json.loads(data)
        marker = Marker(
            found["format"],
            found["id"],
            found.get("inode"),
            found.get("directory"),
            found.get("file_system"),
            found.get("boot"),
        )
        is_valid = type(marker.format) is int and marker.format > 0 and bool(_ID.fullmatch(marker.id))
        is_valid = is_valid and all(n is None or type(n) is int for n in (marker.inode, marker.directory))
        is_valid = is_valid and all(s is None or type(s) is str for s in (marker.file_system, marker.boot))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_valid = False
    if not is_valid:
        raise NotACache(f"{MARKER!r} is not a marker of cachedb: delete it if the directory is a cache, and try again")
    if marker.format > _FORMAT:
        raise SchemaMismatch(f"{MARKER!r} says that a newer release has made the cache: use a newer release of cachedb")
    return marker


def write(folder: int, settle: Callable[[int], object], *, is_sound: bool = True) -> Marker:
    """Mark a directory as a cache, unless another process has done so; return the marker that it has then.

    Args:
        folder: a descriptor of the directory.
        settle: gives a new file its owner and mode.
        is_sound: False if the directory has an index already, which may be part of a copy without its marker.
    """
    with (
        _written(folder, settle, is_sound=is_sound) as part,
        suppress(FileExistsError),
    ):  # the one who was first has chosen the id
        os.link(part, MARKER, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    found = read(folder)
    assert found is not None
    return found


def renew(folder: int, settle: Callable[[int], object]) -> None:
    """Replace the marker by one with an id and an inode of its own: what was a copy is a cache now.

    Args:
        folder: as for `write`.
        settle: as for `write`.
    """
    _replace(folder, settle, secrets.token_hex(16))


def refresh(folder: int, settle: Callable[[int], object], found: Marker) -> None:
    """Replace the marker by one with the same id that says where it is by now.

    Args:
        folder: as for `write`.
        settle: as for `write`.
        found: the marker that is there, and is no copy.
    """
    _replace(folder, settle, found.id)


def count_links(folder: int, status: os.stat_result) -> int:
    """Return how many names a marker has; one that a process which writes a marker has left does not count."""
    if status.st_nlink == 1:
        return 1
    with os.scandir(folder) as entries:
        ours = [entry for entry in entries if UNFINISHED.fullmatch(entry.name)]
        return status.st_nlink - sum(entry.inode() == status.st_ino for entry in ours)


def _replace(folder: int, settle: Callable[[int], object], cache_id: str) -> None:
    with _written(folder, settle, is_sound=True, cache_id=cache_id) as part:
        second = f".cachedb-{secrets.token_hex(8)}.marker"
        os.link(part, second, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        os.rename(second, MARKER, src_dir_fd=folder, dst_dir_fd=folder)


@contextmanager
def _written(
    folder: int, settle: Callable[[int], object], *, is_sound: bool, cache_id: str | None = None
) -> Iterator[str]:
    """Give the block the name of a new marker, which is on disk; what the block names it is as well at the end."""
    part = f".cachedb-{secrets.token_hex(8)}.marker"
    file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        try:
            content = {
                "format": _FORMAT,
                "id": cache_id or secrets.token_hex(16),
                "inode": os.fstat(file).st_ino if is_sound else None,
                **_place(folder),
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


def _place(folder: int) -> dict[str, int | str | None]:
    """Return what tells the place of a marker from that of a copy, as a marker says it."""
    return {"directory": os.fstat(folder).st_ino, "file_system": _file_system(folder), "boot": _boot()}


def _file_system(folder: int) -> str:
    """Return what tells a mounted file system from others until the host is restarted.

    Most have an id that stays the same after that too; some have none, or one that is made of their device's number.
    """
    number = os.fstatvfs(folder).f_fsid
    return f"id {number:x}" if number else f"device {os.fstat(folder).st_dev}"


def _boot() -> str | None:
    with suppress(OSError):
        return _BOOT_ID.read_text(encoding="utf-8").strip()
    return None


def identity(folder: int) -> tuple[int, int, int, int] | None:
    """Return what changes when another file takes the marker's place, or it gets a link; None if there is none."""
    try:
        status = os.stat(MARKER, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_nlink
