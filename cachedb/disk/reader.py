"""Open and read the files of stored blobs; nothing here uses the index."""

from __future__ import annotations

from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Final

from cachedb.disk.layout import blob_file
from cachedb.disk.regular import open_regular
from cachedb.errors import CacheError, DigestMismatch, NotInCache, StorageError, os_errors
from cachedb.oci.digests import Digest, digest_of
from cachedb.oci.manifests import DOCUMENT_LIMIT

__all__ = ["REPAIR_ADVICE", "damaged_error", "missing_file_error", "open_blob", "read_small_blob", "read_verified"]


REPAIR_ADVICE: Final = "run `cachedb verify --repair`, then import or pull the image again"
"""What to do about a blob whose file is damaged or missing."""


def open_blob(directory: Path, digest: Digest) -> BufferedReader:
    """Open a stored blob's file; the stream stays valid if the blob is collected meanwhile.

    Raises:
        NotInCache: if the file does not exist.
        StorageError: if it cannot be opened, or is not a regular file.
        DamagedIndex: if the digest is invalid.
    """
    with os_errors("read a blob"):
        try:
            return open(blob_file(directory, digest), "rb", opener=open_regular)
        except FileNotFoundError:
            raise NotInCache(f"{digest} is not in the cache", name=digest) from None


def read_verified(directory: Path, digest: Digest) -> bytes:
    """Return the content of a manifest or config, verified against its digest.

    Raises:
        NotInCache: if the file does not exist.
        DigestMismatch: if the file is damaged.
        StorageError: if it cannot be read.
    """
    with open_blob(directory, digest) as file, os_errors("read a blob"):
        data = file.read()
    if digest_of(data, digest) != digest:
        raise damaged_error(digest)
    return data


def read_small_blob(directory: Path, digest: Digest, size: int) -> bytes | None:
    """Return a small blob's content; None if it is missing, too large, unreadable or damaged.

    Args:
        directory: the cache directory.
        digest: the blob's digest.
        size: the blob's size in bytes, from the index.
    """
    if size > DOCUMENT_LIMIT:
        return None
    with suppress(CacheError), open_blob(directory, digest) as file, os_errors("read a blob"):
        data = file.read(DOCUMENT_LIMIT + 1)
        return data if digest_of(data, digest) == digest else None
    return None


def damaged_error(digest: Digest) -> DigestMismatch:
    """Return the error for a blob whose file has the wrong content."""
    return DigestMismatch(f"the file of {digest} is damaged: its content has another digest: {REPAIR_ADVICE}")


def missing_file_error(digest: Digest) -> StorageError:
    """Return the error for a stored blob whose file is gone."""
    return StorageError(f"the file of {digest} is missing: {REPAIR_ADVICE}")
