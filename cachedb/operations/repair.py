"""Repair a blob whose file and row disagree.

Nothing is destroyed: a file that does not match its digest moves to ``quarantine/``, and an intact file gets a row.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, delete, insert, update

from cachedb.content import save
from cachedb.disk.durable import copy_to_new, sync_folder
from cachedb.disk.folders import Folders
from cachedb.disk.hashes import Reading
from cachedb.disk.layout import blob_path, quarantine_path
from cachedb.disk.regular import open_regular
from cachedb.disk.writer import Received
from cachedb.index.blobs import read_stored_sizes, set_stored
from cachedb.index.tables import BLOBS, TRASH
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import DOCUMENT_LIMIT

__all__ = ["REPAIRS", "move_to_quarantine"]


def _add_row(connection: Connection, directory: Path, digest: Digest, reading: Reading | None) -> str | None:
    if reading is None:
        return None  # the file is new: the next verification reads it
    path = blob_path(directory, digest)
    with open(path, "rb", opener=open_regular) as file:
        if os.fstat(file.fileno()).st_mode & 0o222:
            os.fchmod(file.fileno(), 0o444)
        os.fsync(file.fileno())
    sync_folder(path.parent)
    set_stored(connection, [Received(digest, reading.size, None)])
    if reading.size <= DOCUMENT_LIMIT:
        save.associate_waiting(connection, directory, [digest])
    return "added to the index"


def _mark_missing(connection: Connection, _directory: Path, digest: Digest, _reading: Reading | None = None) -> str:
    connection.execute(update(BLOBS).where(BLOBS.c.digest == digest).values(stored_at=None))
    return "marked as not stored: import or pull it again"


def _quarantine(connection: Connection, directory: Path, digest: Digest, _reading: Reading | None) -> str:
    path = blob_path(directory, digest)
    kept = quarantine_path(directory, digest.replace(":", "-"))
    if digest not in read_stored_sizes(connection, [digest]):
        move_to_quarantine(directory, path, kept)
    else:
        # The file keeps its first name until the change of its row is committed; then the trash takes it.
        with Folders(directory).open("quarantine") as quarantine:
            try:
                os.link(path, kept.name, dst_dir_fd=quarantine, follow_symlinks=False)
            except PermissionError:  # Linux may refuse a hard link to another user's file
                with open(path, "rb", opener=open_regular) as file:
                    copy_to_new(file, kept.name, quarantine)
            os.fsync(quarantine)
        connection.execute(delete(TRASH).where(TRASH.c.digest == digest))
        connection.execute(insert(TRASH).values(digest=digest, size=path.stat().st_size))
        _mark_missing(connection, directory, digest)
    return f"moved to quarantine/{kept.name}: import or pull it again"


def move_to_quarantine(directory: Path, path: Path, kept: Path) -> None:
    """Move an entry of a folder to ``quarantine/`` durably; folders that are symbolic links are refused."""
    folders = Folders(directory)
    with (
        folders.open(str(path.parent.relative_to(directory))) as source,
        folders.open("quarantine") as quarantine,
    ):
        os.rename(path.name, kept.name, src_dir_fd=source, dst_dir_fd=quarantine)
        os.fsync(source)
        os.fsync(quarantine)


def _correct_size(connection: Connection, directory: Path, digest: Digest, reading: Reading | None) -> str | None:
    if reading is None:
        return None  # the file is new: the next verification reads it
    if reading.digest != digest:
        return _quarantine(connection, directory, digest, reading)
    set_stored(connection, [Received(digest, reading.size, None)])
    return "the size in the index was corrected; the file is intact"


REPAIRS: Final[dict[str, Callable[[Connection, Path, Digest, Reading | None], str | None]]] = {
    "missing": _mark_missing,
    "corrupt": _quarantine,
    "wrong_size": _correct_size,
    "orphan": _add_row,
}
"""The function that repairs each kind of problem.

It takes the result of hashing the file, and returns what it did; None if it did nothing.
"""
