"""Copy blobs into an archive, and verify the bytes that are copied."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection
from pathlib import Path

from cachedb.disk.reader import REPAIR_ADVICE, damaged_error, open_blob
from cachedb.disk.writer import CHUNK_BYTES, WRITE_BACK_BYTES, hash_chunks, write_back
from cachedb.errors import CacheError, os_errors
from cachedb.oci.digests import Digest, split_digest
from cachedb.progress import Advance
from cachedb.threads import in_threads
from cachedb.transports.archive.entries import Entry

__all__ = [
    "FileWriter",
    "check_size",
    "copy_blob",
    "copy_in_threads",
    "read_blob",
    "write_at",
]


def copy_in_threads(blobs: Collection[Entry], copy: Callable[[Entry, Advance, bool], None], progress: Advance) -> None:
    """Copy several blobs at once, because hashing a blob takes longer than copying it.

    Args:
        blobs: in any order; the largest are copied first, so that all threads end at about the same time.
        copy: copies a blob; it gets the entry, a function that takes the bytes copied, and whether to hash in a
            second thread, which is faster only for a blob larger than one core's share of the bytes.
        progress: takes the bytes copied.
    """
    share = sum(entry.size for entry in blobs) / (os.cpu_count() or 1)

    def copy_one(entry: Entry, advance: Advance) -> None:
        copy(entry, advance, entry.size > share)

    in_threads(copy_one, sorted(blobs, key=lambda entry: -entry.size), progress)


class FileWriter:
    """Writes to a part of a file, from its own offset on."""

    def __init__(self, file: int, offset: int) -> None:
        self._file, self._offset, self._pending = file, offset, 0

    def write(self, data: memoryview) -> None:
        """Write all bytes at the offset, and move the offset behind them."""
        write_at(self._file, self._offset, data)
        self._offset += len(data)
        self._pending += len(data)
        if self._pending >= WRITE_BACK_BYTES:
            write_back(self._file, self._pending, self._offset)
            self._pending = 0


def write_at(file: int, offset: int, data: memoryview) -> None:
    """Write all bytes to a file at an offset."""
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count


def copy_blob(
    directory: Path,
    entry: Entry,
    write: Callable[[memoryview], None],
    progress: Advance,
    *,
    hash_in_thread: bool,
) -> None:
    """Copy a blob, and verify the bytes that are written: the same buffers are hashed.

    Args:
        directory: of the cache.
        entry: of the blob.
        write: takes the next bytes.
        progress: takes the number of bytes copied.
        hash_in_thread: hash in a second thread.

    Raises:
        DigestMismatch: if the blob's file is damaged.
        StorageError: if it cannot be read.
        CacheError: if it is missing or has another size.
    """
    digest = entry.content
    assert isinstance(digest, str)
    with open_blob(directory, digest) as blob:
        check_size(entry, os.fstat(blob.fileno()).st_size)
        read_blob(entry, blob.fileno(), write, progress, hash_in_thread=hash_in_thread)


def check_size(entry: Entry, size: int) -> None:
    """Raise `CacheError` unless a blob's file has the size that its manifest gives.

    Args:
        entry: of the blob.
        size: of the file, in bytes.
    """
    if size != entry.size:
        raise CacheError(
            f"the file of {entry.content!s} has {size} bytes, but {entry.size} in its manifest: import the image again"
        )


def read_blob(
    entry: Entry,
    file: int,
    write: Callable[[memoryview], None] | None,
    progress: Advance,
    *,
    hash_in_thread: bool = False,
) -> None:
    """Read the file of a blob, pass on its bytes, and verify their digest.

    Args:
        entry: of the blob.
        file: a descriptor of the file.
        write: takes the next bytes; None only verifies.
        progress: takes the number of bytes read.
        hash_in_thread: hash in a second thread.
    """
    digest = Digest(str(entry.content))
    hasher, done, length = hashlib.new(split_digest(digest)[0]), 0, min(CHUNK_BYTES, entry.size)
    with hash_chunks([hasher], length, hash_in_thread=hash_in_thread) as (buffers, hash_chunk):
        while done < entry.size:
            chunk = next(buffers)[: entry.size - done]
            filled = 0
            while filled < len(chunk):
                with os_errors("read a blob"):
                    count = os.preadv(file, [chunk[filled:]], done + filled)
                if not count:
                    raise CacheError(f"the file of {digest} was cut short while it was read: {REPAIR_ADVICE}")
                filled += count
            hash_chunk(chunk)
            if write is not None:
                write(chunk)
            done += filled
            progress(filled)
    if f"{hasher.name}:{hasher.hexdigest()}" != digest:
        raise damaged_error(digest)
