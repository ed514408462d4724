"""Reading: the file of a stored blob, opened with care. Nothing here knows the index."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

from cachedb.disk.layout import blob_file
from cachedb.errors import CacheError, DigestMismatch, NotInCache, os_errors
from cachedb.oci.digests import Digest, digest_of
from cachedb.oci.manifests import DOCUMENT_LIMIT

__all__ = ["damaged", "document", "open_blob", "open_regular"]


def open_blob(directory: Path, digest: Digest) -> BufferedReader:
    """Open a stored blob's file; the stream stays good even if the blob is collected meanwhile.

    Raises:
        NotInCache: if there is no such file.
        StorageError: if it cannot be opened, or is no regular file.
    """
    with os_errors("read a blob"):
        try:
            return open(blob_file(directory, digest), "rb", opener=open_regular)
        except FileNotFoundError:
            raise NotInCache(f"{digest} is not in the cache", name=digest) from None


def document(directory: Path, digest: Digest, size: int) -> bytes | None:
    """Return what a small blob has, if it can be read and is what its name says."""
    if size > DOCUMENT_LIMIT:
        return None
    with suppress(CacheError), open_blob(directory, digest) as file, os_errors("read a blob"):
        data = file.read(DOCUMENT_LIMIT + 1)
        return data if digest_of(data, digest) == digest else None
    return None


def open_regular(path: str, flags: int) -> int:
    """Open a regular file, for `open`; raise `OSError` for anything else, a symbolic link included."""
    try:
        # A pipe without a writer would be waited for, maybe under the write lock.
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.EINVAL, "it is a symbolic link, and no regular file", path) from None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is no regular file", path)


def damaged(digest: Digest) -> DigestMismatch:
    """Return the error for a blob whose file has another content."""
    return DigestMismatch(
        f"the file of {digest} is damaged, its content has another digest: run `cachedb verify --repair`, "
        "then import or pull the image again"
    )
