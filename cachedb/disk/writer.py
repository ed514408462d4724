"""Receiving: bytes are hashed on their way to a file, and are on the disk when they are said to be there.

What is hashed is what is written: the same buffers, each read once. Nothing here knows the index, so that a download
need not wait for it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO, NamedTuple, Protocol

from cachedb.arguments import (
    check_readable,
)
from cachedb.disk.folders import give
from cachedb.errors import DigestMismatch, StorageError, ignore_os_errors, os_errors
from cachedb.oci.digests import Digest, parse_digest, split_digest
from cachedb.progress import Advance
from cachedb.threads import start

__all__ = [
    "CHUNK",
    "WRITTEN_BACK",
    "Content",
    "Data",
    "Hasher",
    "Readable",
    "Received",
    "discard",
    "hashing",
    "identity",
    "open_data",
    "receive",
    "write_back",
]


CHUNK = 1024 * 1024  # bytes read, hashed and written at a time
WRITTEN_BACK = 8 * CHUNK  # bytes of which the disk is told at a time
_BUFFERS = 4  # chunks under way in one blob: one read and written while others are hashed


class Readable(Protocol):
    """Where bytes come from."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill the front of the buffer and return how many bytes there were; 0 is the end."""


class Hasher(Protocol):
    """What looks at every chunk on its way."""

    def update(self, data: memoryview, /) -> None:
        """Take the next chunk."""


class Content(NamedTuple):
    """What was received, and verified."""

    digest: Digest
    size: int  # bytes
    inode: int = 0  # of the file that it was written to


def receive(
    source: Readable,
    path: Path | str | None,
    *,
    folder: int | None = None,
    digest: Digest | None = None,
    size: int | None = None,
    algorithm: str = "sha256",
    go_on: bool = False,
    also: Hasher | None = None,
    progress: Advance | None = None,
    what: str = "the content",
) -> Content:
    """Read a blob to its end, verify it, and write it to a file, durably.

    Args:
        source: where the bytes come from.
        path: of the file, which is new; None to verify only.
        folder: descriptor of the folder that the path is relative to.
        digest: the digest it must have, if that is known.
        size: the size in bytes it must have, if that is known.
        algorithm: to compute the digest with, if none is known.
        go_on: the file may be there, with what came of the blob before, which ``source`` goes on from. It is locked:
            a process whose claim was taken over may have it open still.
        also: is shown every chunk as well.
        progress: is told of every chunk.
        what: how to call the blob in an error.

    Raises:
        DigestMismatch: if the content has another digest or size.
        StorageError: if it cannot be written.
    """
    hasher = hashlib.new(split_digest(digest)[0] if digest else algorithm)
    hashers: list[Hasher] = [hasher, also] if also else [hasher]
    with os_errors("write to the cache"):
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | (0 if go_on else os.O_EXCL)
        target = os.open(path, flags, 0o600, dir_fd=folder) if path else None
    try:
        if go_on and target is not None:
            _check_partial(target)
            with os_errors("write to a download that another process writes to"):
                fcntl.flock(target, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if target is not None and path is not None and os.geteuid() == 0:
            give(target, os.stat(os.path.dirname(path)) if folder is None else os.fstat(folder))
        begun = _hash(target, hashers) if go_on and target is not None else 0
        rest = None if size is None else size - begun
        length = begun + _copy(source, target, hashers, rest, progress)
        if size is not None and length != size:
            more = "more" if length > size else f"{length} bytes"
            raise DigestMismatch(f"{what} should be {size} bytes, and is {more}")
        actual = parse_digest(f"{hasher.name}:{hasher.hexdigest()}")
        if digest is not None and actual != digest:
            raise DigestMismatch(f"{what} should have digest {digest}, and has {actual}")
        if target is not None:
            with os_errors("write to the cache"):
                os.fchmod(target, 0o444)
                os.fsync(target)
        return Content(actual, length, os.fstat(target).st_ino if target is not None else 0)
    finally:
        if target is not None:
            os.close(target)


def _check_partial(file: int) -> None:
    """Refuse to write to a file that has a second name or another owner: somebody may have put it there.

    Raises:
        StorageError: if it is no regular file of our user with one name.
    """
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink > 1:
        raise StorageError("another program has put a file into ingest/partial during the download: try again")


def _hash(file: int, hashers: Sequence[Hasher]) -> int:
    """Show the hashers what a file has; return how many bytes that is, and leave the file at its end."""
    buffer, length = memoryview(bytearray(CHUNK)), 0
    with os_errors("read from the cache"):
        while count := os.readv(file, [buffer]):
            length += count
            for hasher in hashers:
                hasher.update(buffer[:count])
    return length


def discard(path: Path | str, folder: int | None = None) -> None:
    """Remove a file that is not needed any more. A failure is not raised: it would hide the error that came first.

    Args:
        path: of the file.
        folder: descriptor of the folder that the path is relative to.
    """
    with ignore_os_errors():
        os.unlink(path, dir_fd=folder)


def identity(status: os.stat_result) -> tuple[int, int, int]:
    """Return what tells a file from another one, and from itself before it was written to."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def _copy(
    source: Readable,
    target: int | None,
    hashers: Sequence[Hasher],
    limit: int | None,
    progress: Advance | None,
) -> int:
    """Copy to the end, or until ``limit`` bytes are exceeded; return the bytes read."""
    length = written = 0
    # Clearing a buffer of a whole chunk takes longer than everything else that is done with a small blob's bytes.
    if limit is None and isinstance(source, BytesIO):
        expected = len(source.getbuffer())
    else:
        expected = CHUNK if limit is None else limit
    chunk_size = min(CHUNK, expected + 1)
    with hashing(hashers, chunk_size, beside=target is not None) as (buffers, hash_chunk):
        while True:
            chunk = _fill(source, next(buffers))
            length += len(chunk)
            if limit is not None and length > limit:
                return length
            hash_chunk(chunk)
            if target is not None:
                _write(target, chunk)
                if length - written >= WRITTEN_BACK:
                    write_back(target, length - written)
                    written = length
            if progress is not None:
                progress(len(chunk))
            if len(chunk) < chunk_size:
                return length


@contextmanager
def hashing(
    hashers: Sequence[Hasher], size: int, *, beside: bool
) -> Iterator[tuple[Iterator[memoryview], Callable[[memoryview], None]]]:
    """Give the block buffers to fill, and what hashes them in their order; all are hashed when it ends.

    Args:
        hashers: that are shown each chunk.
        size: of a buffer, in bytes.
        beside: the block has other work to do with a chunk: full ones are hashed in a thread of their own meanwhile,
            both of it without the interpreter's lock.
    """
    full, free = SimpleQueue[memoryview | None](), SimpleQueue[memoryview | BaseException]()
    thread: threading.Thread | None = None

    def hash_now(chunk: memoryview) -> None:
        for hasher in hashers:
            hasher.update(chunk)

    def run() -> None:
        try:
            while (chunk := full.get()) is not None:
                hash_now(chunk)
                free.put(chunk)
        except BaseException as error:
            free.put(error)

    def hash_chunk(chunk: memoryview) -> None:
        nonlocal thread, beside
        if thread is None and beside and len(chunk) == size:
            thread = threading.Thread(target=run)
            if not start(thread):
                thread, beside = None, False
        if thread is None:
            hash_now(chunk)
            free.put(chunk)
        else:
            full.put(chunk)

    def buffers() -> Iterator[memoryview]:
        for _ in range(_BUFFERS if beside else 1):
            yield memoryview(bytearray(size))
        while True:
            yield finished(free.get())

    def finished(chunk: memoryview | BaseException) -> memoryview:
        if isinstance(chunk, BaseException):
            raise chunk
        return chunk

    try:
        yield buffers(), hash_chunk
    finally:
        full.put(None)
        if thread is not None:
            with suppress(RuntimeError):  # an interrupt came before it was begun
                thread.join()
    while not free.empty():
        finished(free.get())


def _fill(source: Readable, buffer: memoryview) -> memoryview:
    filled = 0
    while filled < len(buffer):
        count = source.readinto(buffer[filled:])
        if not count:
            break
        filled += count
    return buffer[:filled]


def _write(target: int, chunk: memoryview) -> None:
    with os_errors("write to the cache"):
        while chunk:
            chunk = chunk[os.write(target, chunk) :]


def write_back(file: int, count: int, end: int | None = None) -> None:
    """Have the disk begin with the bytes last written to a file, while more is; fsync would be waited for otherwise.

    Linux does so when it is told that the pages are not needed. It does not drop them, for they are dirty.
    """
    with ignore_os_errors():  # it is a hint, of which a file system may know nothing
        if end is None:
            end = os.lseek(file, 0, os.SEEK_CUR)  # not how much we have read: a download may be gone on with
        os.posix_fadvise(file, end - count, count, os.POSIX_FADV_DONTNEED)


class Received(NamedTuple):
    """A blob whose content was verified; its file is None where the cache had it already."""

    digest: Digest
    size: int  # bytes
    path: Path | None


Data = bytes | bytearray | memoryview | BinaryIO | os.PathLike[str]
"""The content of a blob: bytes, a file open for reading in binary, or a `Path`. A text may be either: it is refused."""


@contextmanager
def open_data(data: Data) -> Iterator[Readable]:
    """Open bytes, a path or a file as a source of content."""
    if isinstance(data, str):
        raise TypeError("data is a str: give bytes, or a Path to a file")
    if isinstance(data, os.PathLike):
        with os_errors("read the content"):
            file = Path(data).open("rb", buffering=0)  # noqa: SIM115 - the caller closes it
        with file:
            yield _Reader(file)
    elif isinstance(data, (bytes, bytearray, memoryview)):
        yield io.BytesIO(data)
    else:
        check_readable(data=data)
        yield _Reader(data)


class _Reader:
    """A file that others opened, of which we know only that it can `read`."""

    def __init__(self, file: BinaryIO | io.RawIOBase) -> None:
        self._file = file

    def readinto(self, buffer: memoryview, /) -> int:
        with os_errors("read the content"):
            if hasattr(self._file, "readinto"):
                count = self._file.readinto(buffer)
                if count is None:
                    raise BlockingIOError(errno.EAGAIN, "it has nothing to read yet, and does not wait")
                return int(count)
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
