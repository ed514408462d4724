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

__all__ = ["MARKER", "UNFINISHED", "Marker", "identity", "read", "renew", "write"]


MARKER = "cachedb.json"
"""The name of the marker in the cache directory."""

UNFINISHED = re.compile(r"\.cachedb-[0-9a-f]{16}\.marker")
"""The name of a marker that is being written, or was until its writer died."""

_FORMAT = 1  # of the directory as a whole: where things lie in it; the index has a schema of its own
_SIZE_LIMIT = 4096  # bytes
_ID = re.compile(r"[0-9a-f]{32}")


class Marker(NamedTuple):
    """What a marker says."""

    format: int
    id: str  # 32 hexadecimal digits, chosen at random
    inode: int | None  # of the marker when the cache was known to be sound: that of a copy differs


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
        marker = Marker(found["format"], found["id"], found.get("inode"))
        is_valid = type(marker.format) is int and marker.format > 0 and bool(_ID.fullmatch(marker.id))
        is_valid = is_valid and (marker.inode is None or type(marker.inode) is int)
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
    with _written(folder, settle, is_sound=True) as part:
        second = f".cachedb-{secrets.token_hex(8)}.marker"
        os.link(part, second, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        os.rename(second, MARKER, src_dir_fd=folder, dst_dir_fd=folder)


@contextmanager
def _written(folder: int, settle: Callable[[int], object], *, is_sound: bool) -> Iterator[str]:
    """Give the block the name of a new marker, which is on disk; what the block names it is as well at the end."""
    part = f".cachedb-{secrets.token_hex(8)}.marker"
    file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        try:
            content = {
                "format": _FORMAT,
                "id": secrets.token_hex(16),
                "inode": os.fstat(file).st_ino if is_sound else None,
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


def identity(folder: int) -> tuple[int, int, int] | None:
    """Return what changes when another file takes the marker's place; None if there is none."""
    try:
        status = os.stat(MARKER, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns
