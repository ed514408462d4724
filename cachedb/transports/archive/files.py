"""Find the files in an archive or a folder by name, and read them in parts.

A tar is not unpacked: its files are sections of it. A stream or a compressed archive is first copied to a temporary
file, decompressed.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO, RawIOBase
from pathlib import Path
from typing import BinaryIO, Protocol

from cachedb.disk.waiting import LOG
from cachedb.disk.writer import CHUNK_BYTES, check_part, write_all
from cachedb.errors import InvalidArchive, StorageError, os_errors
from cachedb.text import format_size, shorten
from cachedb.transports.archive import tar
from cachedb.transports.archive.compression import MAGIC_LENGTH, Decompressor, detect_compression
from cachedb.transports.archive.unpack_limit import UnpackLimit

__all__ = ["Files", "Section", "descriptor", "open_files"]


_MEMBERS_LIMIT = 100_000
_NAMES_LIMIT = 16 * 1024 * 1024  # characters in the names and links of all members
_NAME_LIMIT = 4096  # bytes, the limit of a path on Linux
_LINKS_LIMIT = 40  # links to follow from one name, the limit on Linux
_SPACE_CHECK_BYTES = 8 * CHUNK_BYTES  # unpacked between two checks of the free space
_SPACE_SHARE = 3  # unpacked bytes allowed per free byte


class Section:
    """Range of bytes in a file or in memory, with its own position."""

    def __init__(self, file: int | Path | bytes, offset: int, size: int) -> None:
        self._file, self._offset, self.size = file, offset, size
        self._done = 0

    @property
    def place(self) -> tuple[int | Path | bytes, int]:
        """The file and the offset in it, which identify the section."""
        return self._file, self._offset

    @property
    def path(self) -> Path | None:
        """The path of the file if it is in a folder, else None."""
        return self._file if isinstance(self._file, Path) else None

    def again(self) -> Section:
        """Return the same section, positioned at its start."""
        return Section(self._file, self._offset, self.size)

    def readinto(self, buffer: memoryview, /) -> int:
        """Read into the start of the buffer and return the number of bytes; 0 is the end."""
        count = min(len(buffer), self.size - self._done)
        if count == 0:
            return 0
        read = self._read_into(buffer[:count], self._offset + self._done)
        if read == 0:
            raise InvalidArchive(f"the archive is cut short: {tar.SAVE_AGAIN}")
        self._done += read
        return read

    def _read_into(self, buffer: memoryview, offset: int) -> int:
        if isinstance(self._file, bytes):
            buffer[:] = self._file[offset : offset + len(buffer)]
            return len(buffer)
        with os_errors("read the archive"), descriptor(self._file) as file:
            return os.preadv(file, [buffer], offset)

    def head(self, count: int) -> bytes:
        """Return the first bytes without changing the position."""
        buffer = bytearray(min(count, self.size))
        section = self.again()
        view = memoryview(buffer)
        while view:
            view = view[section.readinto(view) :]
        return bytes(buffer)


@contextmanager
def descriptor(file: int | Path) -> Iterator[int]:
    """Yield a descriptor of a file; open a path only for this block.

    A folder may hold more files than a process may have open.
    """
    if isinstance(file, int):
        yield file
        return
    # O_NONBLOCK, because the path may be a fifo.
    opened = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield opened
    finally:
        os.close(opened)


class Files(Protocol):
    """The files of an archive or a folder."""

    has_end: bool
    """False for a tar without the blocks that end it, which may be cut short between two files."""

    def find(self, name: str) -> Section | None:
        """Return a file's content, or None if there is no such file."""


class Folder:
    """The files in a folder, such as an OCI image layout."""

    has_end = True

    def __init__(self, path: Path) -> None:
        self._path = path

    def find(self, name: str) -> Section | None:
        """Return a file's content, or None if there is no such file."""
        path = self._path / _normalize_name(name)
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
    """The files in a tar, which one pass over its headers finds.

    It warns about links and names that other programs may read in another way.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._files: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        self._outside: set[str] = set()  # links that lead out of the archive, which are never followed
        self._targets_from_top: dict[str, str] = {}  # of symbolic links, read as paths from the top of the archive
        self._absolute: list[str] = []
        name_characters = end = 0
        for member in tar.read_members(descriptor):
            name_characters += len(member.name) + len(member.link)
            if len(self._files) + len(self._links) + len(self._outside) >= _MEMBERS_LIMIT:
                raise InvalidArchive(f"the archive has more than {_MEMBERS_LIMIT} members: it is not an image")
            if name_characters > _NAMES_LIMIT:
                raise InvalidArchive(f"the archive has names of more than {_NAMES_LIMIT} characters: not an image")
            self._add_member(member)
            end = member.end
        self.has_end = tar.has_end(descriptor, end)
        _warn_of(self._absolute, "the / at the start of names is left out")
        _warn_of(self._outside, "links that lead out of the archive are not followed")
        _warn_of(self._mend_links(), "links are followed from the top of the archive, because they lead nowhere else")
        self._folder = self._find_folder()

    def find(self, name: str) -> Section | None:
        """Return the content of a file or link, or None if there is no such file."""
        last = self._follow_links(f"{self._folder}{_normalize_name(name)}")
        if last in self._outside:
            raise InvalidArchive(f"the link {shorten(last)} leads out of the archive: replace the link with the file")
        place = self._files.get(last)
        return None if place is None else Section(self._descriptor, *place)

    def _follow_links(self, name: str) -> str:
        """Return the name of the file that a name leads to."""
        for _ in range(_LINKS_LIMIT + 1):
            if name not in self._links:
                return name
            name = self._links[name]
        raise InvalidArchive(f"links in the archive form a loop, or a chain that is too long, at {shorten(name)}")

    def _mend_links(self) -> list[str]:
        """Read links that lead nowhere as paths from the top of the archive; return the names of these links.

        Some vendors write such links to layers. The diff id of the layer is checked as usual.

        Raises:
            InvalidArchive: if links form a loop.
        """
        mended = []
        for name in self._links:
            target = self._targets_from_top.get(name)
            if self._follow_links(name) not in self._files and target in self._files:
                self._links[name] = target
                mended.append(name)
        return mended

    def _find_folder(self) -> str:
        """Return the folder that holds all files, with a slash, if it is an image layout, else an empty text.

        ``tar -cf app.tar layout/`` makes such an archive.
        """
        names = self._files.keys() | self._links.keys()
        folder = min(names, default="").partition("/")[0]
        if {f"{folder}/oci-layout", f"{folder}/index.json"} <= names and all(
            name.startswith(f"{folder}/") for name in names
        ):
            LOG.warning("the image layout is read from the folder %s in the archive", shorten(folder))
            return f"{folder}/"
        return ""

    def _add_member(self, member: tar.Member) -> None:
        name = _normalize_name(member.name.lstrip("/"))
        if member.name.startswith("/"):
            self._absolute.append(name)
        if member.kind == tar.HARD_LINK and name in self._files and name == _resolve_link(name, member.link):
            return  # GNU tar writes such a link for a file that it was given twice
        # A later member replaces an earlier one of the same name.
        for known in (self._files, self._links, self._targets_from_top):
            known.pop(name, None)
        self._outside.discard(name)
        if member.kind == tar.SYMBOLIC_LINK:
            self._add_link(name, posixpath.join(posixpath.dirname(name), member.link))
            self._targets_from_top[name] = posixpath.normpath(member.link)
        elif member.kind == tar.HARD_LINK:
            self._add_link(name, member.link.lstrip("/"))  # GNU tar and Docker leave out the slash here, too
        elif member.kind in tar.REGULAR:
            self._files[name] = (member.offset, member.size)
        elif member.kind != tar.FOLDER:
            raise InvalidArchive(f"{shorten(member.name)} in the archive is neither a file, a folder nor a link")

    def _add_link(self, name: str, target: str) -> None:
        resolved = _resolve_link(name, target)
        if resolved is None:
            self._outside.add(name)
        else:
            self._links[name] = resolved


def _warn_of(names: Collection[str], what: str) -> None:
    if names:
        LOG.warning("%s: %s%s", what, shorten(next(iter(names))), ", ..." if len(names) > 1 else "")


def _is_file_name(name: str) -> bool:
    with suppress(UnicodeEncodeError):  # JSON can have half of a surrogate pair
        return len(os.fsencode(name)) <= _NAME_LIMIT and "\0" not in name
    return False


def _normalize_name(name: str) -> str:
    """Return a member's name in its normal form; raise if it leads out of the archive."""
    if not _is_file_name(name):
        raise InvalidArchive(f"{shorten(name)} in the archive has an invalid file name")
    if posixpath.isabs(name) or ".." in name.split("/"):
        raise InvalidArchive(f"{shorten(name)} in the archive leads out of it")
    return posixpath.normpath(name)


def _resolve_link(name: str, target: str) -> str | None:
    """Return the name that a link leads to, or None if that is outside the archive.

    Args:
        name: of the link.
        target: a path from the top of the archive; it may contain "..".
    """
    if not _is_file_name(target):
        raise InvalidArchive(f"the link {shorten(name)} in the archive has an invalid file name")
    normal = posixpath.normpath(target)
    return None if posixpath.isabs(normal) or normal == ".." or normal.startswith("../") else normal


@contextmanager
def open_files(source: Path | BinaryIO, new_spool: Callable[[], FileIO], most: int | None = None) -> Iterator[Files]:
    """Open an archive or a folder, and yield its files.

    Args:
        source: a path, or a stream, which need not be seekable.
        new_spool: creates a temporary file for a stream or a compressed archive; closing it must delete it.
        most: the bytes that a compressed archive may unpack to; None for the default of `UnpackLimit`.

    Raises:
        InvalidArchive: if the source is neither a folder nor a tar, is damaged, or unpacks to too many bytes.
        StorageError: if the source cannot be read, or the temporary file cannot be written.
    """
    with ExitStack() as stack:
        with os_errors("read the archive"):
            if isinstance(source, Path) and source.is_dir():
                files: Files = Folder(source)
            else:
                file = stack.enter_context(source.open("rb")) if isinstance(source, Path) else source
                has_garbage = False
                if not _is_regular(file) or detect_compression(os.pread(file.fileno(), MAGIC_LENGTH, 0)):
                    # The file is unbuffered, so that closing it cannot fail on a full disk.
                    spooled = stack.enter_context(new_spool())
                    has_garbage = _copy_decompressed(file, spooled, most)
                    file = spooled
                files = Tar(file.fileno())
                if has_garbage and not files.has_end:
                    raise InvalidArchive(f"the gzip compressed archive is damaged, or cut short: {tar.SAVE_AGAIN}")
        yield files


def _is_regular(file: BinaryIO, *, anywhere: bool = False) -> bool:
    """Return whether this is a regular file, positioned at its start unless ``anywhere``."""
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode) and (anywhere or file.tell() == 0)
    except (OSError, ValueError, AttributeError):
        return False


def _read_part(source: BinaryIO) -> bytes:
    part = source.read(CHUNK_BYTES)
    check_part(part)  # None is not the end
    return part


def _copy_decompressed(source: BinaryIO, target: RawIOBase, most: int | None) -> bool:
    """Copy a stream to a file, decompressed; return whether it has garbage at its end."""
    chunk = b""
    while len(chunk) < MAGIC_LENGTH and (more := _read_part(source)):
        chunk += more  # a pipe may return fewer bytes than requested
    compression = detect_compression(chunk)
    unpack = Decompressor(compression, may_have_garbage=compression == "gzip") if compression else None
    compressed = os.fstat(source.fileno()).st_size if _is_regular(source, anywhere=True) else 0
    limit = UnpackLimit(f"the {compression} compressed archive unpacks", compressed, most)
    checked = 0  # bytes written at the last check of the free space
    while chunk:
        if not compressed:
            limit.add_compressed(len(chunk))
        for part in unpack.feed(chunk) if unpack else (chunk,):
            written = target.tell()
            if written == 0 and len(part) >= tar.BLOCK:
                tar.check_header(part[: tar.BLOCK], 0)  # refuse other content before it fills the disk
            if unpack:
                limit.add(len(part))
                if written - checked >= _SPACE_CHECK_BYTES:
                    _check_space(target.fileno(), written)
                    checked = written
            write_all(target, part)
        chunk = _read_part(source)
    if unpack and not unpack.ended:
        raise InvalidArchive(f"the {compression} compressed archive is cut short: {tar.SAVE_AGAIN}")
    if unpack and unpack.has_garbage:
        LOG.warning("the garbage at the end of the gzip compressed archive is not read")
        return True
    return False


def _check_space(file: int, written: int) -> None:
    """Raise `StorageError` if unpacked content takes too large a share of the free space.

    Other processes need space too, and the import writes the content once more, as blobs.
    """
    status = os.fstatvfs(file)
    left = status.f_bavail * status.f_frsize
    if written > _SPACE_SHARE * left:
        raise StorageError(
            f"the archive unpacks to more than {format_size(written)}, but the file system of the cache has only "
            f"{format_size(left)} left: free some space, or unpack the archive elsewhere and import the result"
        )
