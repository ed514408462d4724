"""Receive content: hash bytes while they are written to a file, then sync the file.

Each buffer is read once, then hashed and written. Nothing here uses the index, so a download need not wait for it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO, RawIOBase
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO, NamedTuple, Protocol

from cachedb.arguments import (
    check_readable,
)
from cachedb.disk.folders import give_to_folder_owner
from cachedb.errors import CacheError, DigestMismatch, StorageError, ignore_os_errors, os_errors
from cachedb.oci.digests import Digest, parse_digest, split_digest
from cachedb.progress import Advance
from cachedb.threads import start

__all__ = [
    "CHUNK_BYTES",
    "WRITE_BACK_BYTES",
    "Content",
    "Data",
    "Hasher",
    "Readable",
    "Received",
    "check_part",
    "discard",
    "file_identity",
    "hash_chunks",
    "open_data",
    "receive",
    "write_all",
    "write_back",
]


CHUNK_BYTES = 1024 * 1024  # bytes read, hashed and written at a time
WRITE_BACK_BYTES = 8 * CHUNK_BYTES  # bytes written back to the disk at a time
_FULL_PIPE_POLL_SECONDS = 0.01
_BUFFER_COUNT = 4  # chunks of one blob in memory: one is read or written while others are hashed


class Readable(Protocol):
    """A source of bytes."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill the front of the buffer and return the number of bytes; 0 at the end."""


class Hasher(Protocol):
    """An object that gets every chunk, such as a hash."""

    def update(self, data: memoryview, /) -> None:
        """Take the next chunk."""


class Content(NamedTuple):
    """The digest and size of received and verified content."""

    digest: Digest
    size: int  # bytes
    inode: int = 0  # of the written file; 0 if none was written


def receive(
    source: Readable,
    path: Path | str | None,
    *,
    folder: int | None = None,
    digest: Digest | None = None,
    size: int | None = None,
    algorithm: str = "sha256",
    resume: bool = False,
    also: Hasher | None = None,
    progress: Advance | None = None,
    what: str = "the content",
) -> Content:
    """Read a blob to its end, verify it, and write it durably to a file.

    Args:
        source: where the bytes come from.
        path: of the new file; None to verify only.
        folder: descriptor of the folder that the path is relative to.
        digest: the expected digest; None if it is unknown.
        size: the expected size in bytes; None if it is unknown.
        algorithm: computes the digest if it is unknown.
        resume: the file may have the first bytes of the blob, and ``source`` continues after them. The file is
            locked, because a process that lost its claim may still have it open.
        also: another hasher that gets every chunk.
        progress: called with the bytes of each chunk.
        what: the name of the blob in errors.

    Raises:
        DigestMismatch: if the content has another digest or size.
        StorageError: if the file cannot be written.
    """
    hasher = hashlib.new(split_digest(digest)[0] if digest else algorithm)
    hashers: list[Hasher] = [hasher, also] if also else [hasher]
    with os_errors("write to the cache"):
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | (0 if resume else os.O_EXCL)
        target = os.open(path, flags, 0o600, dir_fd=folder) if path else None
    process = os.getpid()
    try:
        if resume and target is not None:
            _check_partial(target)
            with os_errors("write to a download that another process writes to"):
                fcntl.flock(target, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if target is not None and path is not None and os.geteuid() == 0:
            give_to_folder_owner(target, os.stat(os.path.dirname(path)) if folder is None else os.fstat(folder))
        resumed_from = _hash_existing(target, hashers) if resume and target is not None else 0
        rest = None if size is None else size - resumed_from
        length = resumed_from + _copy_and_hash(source, target, hashers, rest, progress)
        if size is not None and length != size:
            more = "more" if length > size else f"{length} bytes"
            raise DigestMismatch(f"{what} should have {size} bytes, and has {more}")
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
            if resume and os.getpid() == process:
                fcntl.flock(target, fcntl.LOCK_UN)  # a child forked meanwhile has a copy of the descriptor
            os.close(target)


def _check_partial(file: int) -> None:
    """Check that a download's file is a regular file of our user with one name.

    Raises:
        StorageError: if it is another kind of file, which some other program has put there.
    """
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink > 1:
        raise StorageError("another program has put a file into ingest/partial during the download: try again")


def _hash_existing(file: int, hashers: Sequence[Hasher]) -> int:
    """Hash the bytes of a file; return their number, and leave the file position at the end."""
    buffer, length = memoryview(bytearray(CHUNK_BYTES)), 0
    with os_errors("read from the cache"):
        while count := os.readv(file, [buffer]):
            length += count
            for hasher in hashers:
                hasher.update(buffer[:count])
    return length


def discard(path: Path | str, folder: int | None = None) -> None:
    """Unlink a file; raise no error, because it would hide the error that came first.

    Args:
        path: of the file.
        folder: descriptor of the folder that the path is relative to.
    """
    with ignore_os_errors():
        os.unlink(path, dir_fd=folder)


def file_identity(status: os.stat_result) -> tuple[int, int, int]:
    """Return values that change if a file is replaced or written to."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def _copy_and_hash(
    source: Readable,
    target: int | None,
    hashers: Sequence[Hasher],
    limit: int | None,
    progress: Advance | None,
) -> int:
    """Copy and hash a source to its end, or until it exceeds ``limit``; return the bytes read."""
    length = written = 0
    # A small blob gets a small buffer: clearing a large one takes longer than the rest of the work.
    if limit is None and isinstance(source, BytesIO):
        expected = len(source.getbuffer())
    else:
        expected = CHUNK_BYTES if limit is None else limit
    chunk_size = min(CHUNK_BYTES, expected + 1)
    with hash_chunks(hashers, chunk_size, hash_in_thread=target is not None) as (buffers, hash_chunk):
        while True:
            chunk = _fill_buffer(source, next(buffers))
            length += len(chunk)
            if limit is not None and length > limit:
                return length
            hash_chunk(chunk)
            if target is not None:
                _write_chunk(target, chunk)
                if length - written >= WRITE_BACK_BYTES:
                    write_back(target, length - written)
                    written = length
            if progress is not None:
                progress(len(chunk))
            if len(chunk) < chunk_size:
                return length


@contextmanager
def hash_chunks(
    hashers: Sequence[Hasher], size: int, *, hash_in_thread: bool
) -> Iterator[tuple[Iterator[memoryview], Callable[[memoryview], None]]]:
    """Yield buffers to fill, and a function that hashes them in order; all are hashed when the block ends.

    Args:
        hashers: get each chunk.
        size: of a buffer, in bytes.
        hash_in_thread: hash full chunks in a thread, while the block does other work with them; both release the
            interpreter's lock.
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
        nonlocal thread, hash_in_thread
        if thread is None and hash_in_thread and len(chunk) == size:
            thread = threading.Thread(target=run)
            if not start(thread):
                thread, hash_in_thread = None, False
        if thread is None:
            hash_now(chunk)
            free.put(chunk)
        else:
            full.put(chunk)

    def buffers() -> Iterator[memoryview]:
        for _ in range(_BUFFER_COUNT if hash_in_thread else 1):
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
            with suppress(RuntimeError):  # an interrupt came before the thread started
                thread.join()
    while not free.empty():
        finished(free.get())


def _fill_buffer(source: Readable, buffer: memoryview) -> memoryview:
    filled = 0
    while filled < len(buffer):
        count = source.readinto(buffer[filled:])
        if not count:
            break
        filled += count
    return buffer[:filled]


def _write_chunk(target: int, chunk: memoryview) -> None:
    with os_errors("write to the cache"):
        while chunk:
            chunk = chunk[os.write(target, chunk) :]


def write_all(stream: BinaryIO | RawIOBase, data: bytes | bytearray | memoryview) -> None:
    """Write all bytes to a stream, which may take only a part of them at a time."""
    view = memoryview(data)
    while view:
        count = stream.write(view)
        if count is None and isinstance(stream, io.RawIOBase):
            time.sleep(_FULL_PIPE_POLL_SECONDS)  # a full pipe that does not block has taken nothing
            continue
        # A caller's class often returns None, as paramiko's files do: it has taken everything.
        view = view[len(view) if count is None else count :]


def write_back(file: int, count: int, end: int | None = None) -> None:
    """Let the disk begin to write the last bytes of a file, so that the fsync at the end is short.

    With this advice, Linux begins to write the pages. It does not drop them from memory, because they are dirty.

    Args:
        file: a descriptor.
        count: the number of bytes.
        end: where they end in the file; None for the file position.
    """
    with ignore_os_errors():  # a file system may not support this hint
        if end is None:
            end = os.lseek(file, 0, os.SEEK_CUR)  # not the number of bytes read: a resumed file has more
        os.posix_fadvise(file, end - count, count, os.POSIX_FADV_DONTNEED)


class Received(NamedTuple):
    """A received and verified blob."""

    digest: Digest
    size: int  # bytes
    path: Path | None  # its file in ``ingest/``; None if the cache has the blob already


Data = bytes | bytearray | memoryview | BinaryIO | os.PathLike[str]
"""The content of a blob: bytes, a binary file open for reading, or a `Path`; never an ambiguous str."""


@contextmanager
def open_data(data: Data) -> Iterator[Readable]:
    """Open bytes, a path or a file as a source of bytes.

    Raises:
        TypeError: if the data is a str or another unsupported type.
        StorageError: if the path cannot be opened.
    """
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
    """A file of the caller that has `read`, and perhaps `readinto`."""

    def __init__(self, file: BinaryIO | io.RawIOBase) -> None:
        self._file = file

    def readinto(self, buffer: memoryview, /) -> int:
        with os_errors("read the content"):
            if hasattr(self._file, "readinto"):
                count = self._file.readinto(buffer)
                if count is None:
                    raise BlockingIOError(errno.EAGAIN, "a non-blocking file has no data yet")
                return int(count)
            data = self._file.read(len(buffer))
            check_part(data, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def check_part(data: object, most: int | None = None) -> None:
    """Check what a caller's file has returned from `read`.

    Args:
        data: what it has returned.
        most: the requested number of bytes; None to allow more.

    Raises:
        BlockingIOError: if the file has no data yet.
        TypeError: if it is not bytes.
        CacheError: if there are too many bytes.
    """
    if data is None:
        raise BlockingIOError(errno.EAGAIN, "a non-blocking file has no data yet")
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"the file's read() returned a value of type {type(data).__name__!r}: open it in binary mode")
    if most is not None and len(data) > most:
        raise CacheError(f"the file's read({most}) returned {len(data)} bytes: give a file that returns no more")
