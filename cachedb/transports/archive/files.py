"""The files in an archive or a folder, however it is packed: found by their names, read in parts.

A tar is not unpacked: its files are sections of it. What cannot be sought in, or is compressed, is spooled first.
"""

from __future__ import annotations

import os
import posixpath
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO, RawIOBase
from pathlib import Path
from typing import BinaryIO, Protocol

from cachedb.disk.writer import CHUNK
from cachedb.errors import CacheError, InvalidArchive, StorageError, os_errors
from cachedb.text import human, parse_size, shorten
from cachedb.transports.archive import tar
from cachedb.transports.archive.compression import MAGIC_LENGTH, Decompressor, compression_of

__all__ = ["Files", "Section", "UnpackLimit", "descriptor", "max_unpacked", "open_files"]


_MEMBERS_LIMIT = 100_000
_NAME_LIMIT = 4096  # bytes, a path's limit on Linux
_LINKS_LIMIT = 40  # links followed from one name, as many as Linux follows
_UNPACKED_LIMIT = 64 * 1024**3  # bytes that compressed content may hold
_RATIO_LIMIT = 100  # times its compressed size
_RATIO_FREE = 256 * 1024**2  # bytes that are no bomb, whatever the ratio
_SPACE_LOOK = 8 * CHUNK  # bytes unpacked between two looks at the free space
_SPACE_SHARE = 3  # times the space that is left, unpacked content may take
# Longer than "BZh", with which a file's name can begin, and so an uncompressed layer.


class Section:
    """Consecutive bytes of a file; several may be read at once, for each keeps its own place."""

    def __init__(self, file: int | Path, offset: int, size: int) -> None:
        self._file, self._offset, self.size = file, offset, size
        self._done = 0

    @property
    def place(self) -> tuple[int | Path, int]:
        """What tells it from others: the file and where it begins there."""
        return self._file, self._offset

    @property
    def path(self) -> Path | None:
        """The file, if it is one of a folder."""
        return self._file if isinstance(self._file, Path) else None

    def again(self) -> Section:
        """Return the same section, to be read from its beginning."""
        return Section(self._file, self._offset, self.size)

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill the front of the buffer; return the number of bytes, 0 at the end."""
        count = min(len(buffer), self.size - self._done)
        if count == 0:
            return 0
        with os_errors("read the archive"), descriptor(self._file) as file:
            read = os.preadv(file, [buffer[:count]], self._offset + self._done)
        if read == 0:
            raise InvalidArchive("the archive is cut short")
        self._done += read
        return read

    def head(self, count: int) -> bytes:
        """Return the first bytes, without moving on."""
        buffer = bytearray(min(count, self.size))
        section = self.again()
        view = memoryview(buffer)
        while view:
            view = view[section.readinto(view) :]
        return bytes(buffer)


@contextmanager
def descriptor(file: int | Path) -> Iterator[int]:
    """Open a file that is not open: a folder may hold more of them than a process may have open."""
    if isinstance(file, int):
        yield file
        return
    # Not blocking: a fifo in the folder must not hold us up.
    opened = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield opened
    finally:
        os.close(opened)


class Files(Protocol):
    """The files of an archive or a folder."""

    def find(self, name: str) -> Section | None:
        """Return a file's content, or None if there is no such file."""


class Folder:
    """The files below a folder, such as an OCI image layout."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def find(self, name: str) -> Section | None:
        """Return a file's content, or None if there is no such file."""
        path = self._path / _safe(name)
        with os_errors("read the image layout"):
            try:
                with descriptor(path) as file:
                    status = os.fstat(file)
            except (FileNotFoundError, NotADirectoryError):
                return None
        if not stat.S_ISREG(status.st_mode):
            raise InvalidArchive(f"{shorten(name)} in the image layout is not a file")
        return Section(path, 0, status.st_size)


class Tar:
    """The files in a tar, found by one pass over its headers."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._files: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        names_length = 0
        for member in tar.members(descriptor):
            names_length += len(member.name) + len(member.link)
            if len(self._files) + len(self._links) >= _MEMBERS_LIMIT or names_length > 16 * 1024 * 1024:
                raise InvalidArchive(f"the archive has more than {_MEMBERS_LIMIT} members: not an image")
            self._add(member)
        for name in self._links:
            self._resolve(name)

    def find(self, name: str) -> Section | None:
        """Return a file's content, or None if there is no such file; links are followed."""
        place = self._files.get(self._resolve(_safe(name)))
        return None if place is None else Section(self._descriptor, *place)

    def _resolve(self, name: str) -> str:
        for _ in range(_LINKS_LIMIT + 1):
            if name not in self._links:
                return name
            name = self._links[name]
        raise InvalidArchive(f"links in the archive go in a circle at {shorten(name)}")

    def _add(self, member: tar.Member) -> None:
        name = _safe(member.name)
        self._files.pop(name, None)  # of two members of one name, the later is meant
        self._links.pop(name, None)
        if member.kind == tar.SYMBOLIC_LINK:
            self._links[name] = _safe(posixpath.join(posixpath.dirname(name), member.link), link=name)
        elif member.kind == tar.HARD_LINK:
            self._links[name] = _safe(member.link, link=name)
        elif member.kind in tar.REGULAR:
            self._files[name] = (member.offset, member.size)
        elif member.kind != tar.FOLDER:
            raise InvalidArchive(f"{shorten(member.name)} in the archive is a device, a fifo, or of an odd kind")


def _safe(name: str, link: str | None = None) -> str:
    """Return a member's name in its plain form; refuse one that leaves the archive."""
    what = f"{shorten(name)} in the archive" if link is None else f"the link {shorten(link)} in the archive"
    if len(os.fsencode(name)) > _NAME_LIMIT or "\0" in name:
        raise InvalidArchive(f"{what} has a name that no file can have")
    plain = posixpath.normpath(name)
    # A link may climb as long as it stays inside, a name may not climb at all.
    climbs = plain.startswith("../") or plain == ".." if link else ".." in name.split("/")
    if posixpath.isabs(name) or climbs:
        raise InvalidArchive(f"{what} leads out of it")
    return plain


def max_unpacked() -> int | None:
    """Return the bytes that ``CACHEDB_MAX_UNPACKED`` names; None if it is not set.

    Raises:
        CacheError: if it is no size.
    """
    text = os.environ.get("CACHEDB_MAX_UNPACKED")
    if not text:
        return None
    size = parse_size(text)
    if size is None:
        raise CacheError(f"CACHEDB_MAX_UNPACKED is {text!r}: write a size such as 500MB or 64GiB")
    return size


class UnpackLimit:
    """Caps what compressed content unpacks to; one for all that is unpacked together. Usable from several threads."""

    def __init__(self, what: str, compressed: int, most: int | None) -> None:
        """Cap at a number of bytes, or by default at 64 GiB and, beyond 256 MiB, at 100 times the compressed size.

        Args:
            what: how to call the content in an error.
            compressed: its size in bytes, as far as that is known.
            most: bytes that it may unpack to, whatever the ratio; None for the default.
        """
        self._what, self._compressed, self._most = what, compressed, most
        self._guard, self._unpacked = threading.Lock(), 0

    def read(self, count: int) -> None:
        """Note that so many more bytes of compressed content have come, where it is not known how many there are."""
        self._compressed += count

    def add(self, count: int) -> None:
        """Note that so many more bytes were unpacked.

        Raises:
            InvalidArchive: if that is more than may be.
        """
        with self._guard:
            self._unpacked += count
            unpacked = self._unpacked
        by_ratio = max(_RATIO_FREE, _RATIO_LIMIT * self._compressed)
        if self._most is not None or by_ratio > _UNPACKED_LIMIT:
            cap = _UNPACKED_LIMIT if self._most is None else self._most
            why = "the cap on unpacked bytes"
        else:
            cap, why = by_ratio, f"the cap of {_RATIO_LIMIT} times the compressed size"
            if cap == _RATIO_FREE:
                why = f"the cap on what is more than {_RATIO_LIMIT} times the compressed size"
        if unpacked > cap:
            raise InvalidArchive(
                f"{self._what} to more than {human(cap)}, {why}: "
                "if you trust it, raise the cap with --max-unpacked SIZE or CACHEDB_MAX_UNPACKED=SIZE"
            )


@contextmanager
def open_files(source: Path | BinaryIO, new_spool: Callable[[], FileIO], most: int | None = None) -> Iterator[Files]:
    """Open an archive or a folder for reading.

    Args:
        source: a path, or a stream, which need not be seekable.
        new_spool: makes a file for a stream, or for what a compressed archive holds. It goes when it is closed.
        most: bytes that a compressed archive may unpack to; None for the default of `UnpackLimit`.

    Raises:
        InvalidArchive: if it is neither.
        StorageError: if it cannot be read, or not be spooled.
    """
    with ExitStack() as stack:
        with os_errors("read the archive"):
            if isinstance(source, Path) and source.is_dir():
                files: Files = Folder(source)
            else:
                file = stack.enter_context(source.open("rb")) if isinstance(source, Path) else source
                if not _is_regular(file) or compression_of(os.pread(file.fileno(), MAGIC_LENGTH, 0)):
                    # Not buffered: closing must not fail a second time on a full disk.
                    spooled = stack.enter_context(new_spool())
                    _copy_decompressed(file, spooled, most)
                    file = spooled
                files = Tar(file.fileno())
        yield files


def _is_regular(file: BinaryIO, *, anywhere: bool = False) -> bool:
    """Say whether this is a regular file, to be read from its beginning, or from anywhere."""
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode) and (anywhere or file.tell() == 0)
    except (OSError, ValueError, AttributeError):
        return False


def _copy_decompressed(source: BinaryIO, target: RawIOBase, most: int | None) -> None:
    chunk = b""
    while len(chunk) < MAGIC_LENGTH and (more := source.read(CHUNK)):
        chunk += more  # a pipe may give a few bytes at first
    compression = compression_of(chunk)
    unpack = Decompressor(compression) if compression else None
    known = os.fstat(source.fileno()).st_size if _is_regular(source, anywhere=True) else 0
    limit = UnpackLimit(f"the {compression} compressed archive unpacks", known, most)
    looked = 0
    while chunk:
        if not known:
            limit.read(len(chunk))
        for part in unpack.feed(chunk) if unpack else (chunk,):
            written = target.tell()
            if written == 0 and len(part) >= tar.BLOCK:
                tar.check_header(part[: tar.BLOCK], 0)  # or an endless stream of something else would fill the disk
            if unpack:
                limit.add(len(part))
                if written - looked >= _SPACE_LOOK:
                    _leave_space(target.fileno(), written)
                    looked = written
            view = memoryview(part)
            while view:
                view = view[target.write(view) :]
        chunk = source.read(CHUNK)
    if unpack and not unpack.ended:
        raise InvalidArchive(f"the {compression} compressed archive is cut short")


def _leave_space(file: int, written: int) -> None:
    """Raise `StorageError` before unpacked content fills a file system, in which others need space too.

    What it holds is to be written once more, as blobs: where that much is not left, the import would fail anyway.
    """
    status = os.fstatvfs(file)
    left = status.f_bavail * status.f_frsize
    if written > _SPACE_SHARE * left:
        raise StorageError(
            f"the archive unpacks to more than {human(written)}, and the file system of the cache has {human(left)} "
            "left, the cap by free space: free some space, or unpack the archive elsewhere and import that"
        )
