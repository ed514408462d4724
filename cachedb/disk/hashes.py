"""Hash the files of blobs in several threads."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cachedb.disk.layout import blob_path
from cachedb.disk.regular import open_regular
from cachedb.disk.writer import CHUNK_BYTES, file_identity
from cachedb.errors import StorageError, explain, is_callers
from cachedb.oci.digests import Digest, split_digest
from cachedb.progress import Advance, Progress, sum_progress
from cachedb.threads import in_threads

__all__ = ["Reading", "hash_files"]


_FILES_PER_TASK = 64  # small files that a thread hashes in one task


class Reading(NamedTuple):
    """The result of hashing a file."""

    file: tuple[int, int, int]  # its identity, to notice a replacement
    size: int  # bytes
    digest: Digest | None  # None if the file could not be read
    detail: str


def hash_files(directory: Path, files: dict[Digest, int], progress: Progress | None) -> dict[Digest, Reading]:
    """Hash the files of blobs; skip those that were deleted meanwhile.

    Args:
        directory: of the cache.
        files: the size of each file in bytes, by its digest.
        progress: called with the bytes read and the total; from any thread, one call at a time.

    Raises:
        StorageError: if there are too few file descriptors, or too little memory.
    """

    def read(digests: list[Digest], advance: Advance) -> list[tuple[Digest, Reading]]:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        found = ((digest, _hash_file(blob_path(directory, digest), digest, buffer, advance)) for digest in digests)
        return [(digest, reading) for digest, reading in found if reading]

    parts = in_threads(read, _group_files(files), sum_progress(sum(files.values()), progress))
    return {digest: reading for part in parts for digest, reading in part}


def _group_files(files: dict[Digest, int]) -> Iterator[list[Digest]]:
    """Group files into tasks: large files first and alone, so that no thread works long after the others."""
    part: list[Digest] = []
    for digest in sorted(files, key=lambda digest: -files[digest]):
        part.append(digest)
        if len(part) == _FILES_PER_TASK or files[digest] > CHUNK_BYTES:
            yield part
            part = []
    if part:
        yield part


def _hash_file(path: Path, digest: Digest, buffer: memoryview, advance: Advance) -> Reading | None:
    """Hash a file; return None if it does not exist."""
    algorithm, _ = split_digest(digest)
    hasher, size = hashlib.new(algorithm), 0
    read = (0, 0, 0)
    try:
        read = file_identity(path.lstat())  # for a file that cannot be opened
        with open(path, "rb", buffering=0, opener=open_regular) as file:
            read = file_identity(os.fstat(file.fileno()))
            while count := file.readinto(buffer):
                hasher.update(buffer[:count])
                size += count
                advance(count)
    except FileNotFoundError:
        return None
    except OSError as error:
        if is_callers(error):
            raise  # the callback failed, not the file
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise StorageError(f"cannot read a blob: {explain(error)}") from error  # the file may be intact
        return Reading(read, size, None, f"the file cannot be read: {explain(error)}")
    found = Digest(f"{algorithm}:{hasher.hexdigest()}")
    return Reading(read, size, found, f"the content has digest {found}")
