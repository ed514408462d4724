"""Write an archive as a tar: for `docker load`, and for tools that read OCI archives."""

from __future__ import annotations

import errno
import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

from cachedb.disk.durable import atomic_file, remove_leftovers, sync_folder
from cachedb.disk.existence import exists
from cachedb.disk.writer import write_all
from cachedb.errors import os_errors
from cachedb.progress import Advance
from cachedb.transports.archive.copy_blob import (
    FileWriter,
    copy_blob,
    copy_in_threads,
    write_at,
)
from cachedb.transports.archive.entries import Entry

__all__ = ["write_tar"]


_END: Final = bytes(2 * tarfile.BLOCKSIZE)  # of a tar


def write_tar(directory: Path, files: list[Entry], destination: Path | BinaryIO, progress: Advance) -> None:
    """Write a tar to a stream or a file; a file appears when all of it is verified and on disk.

    If a blob is damaged, the tar in a stream stays without its end, so that no reader accepts it.

    Args:
        directory: of the cache.
        files: from `list_entries`.
        destination: a path or an open binary stream.
        progress: takes the bytes written.

    Raises:
        DigestMismatch: if a blob's file is damaged.
        StorageError: if it cannot be written.
    """
    with os_errors("write the export"):
        if not isinstance(destination, Path):
            destination.flush()
            unbuffered = destination.raw if type(destination) is io.BufferedWriter else destination
            _write_members(directory, files, unbuffered, progress)
            destination.flush()
        elif exists(destination) and not destination.is_file():  # a device or a fifo
            with destination.open("wb", buffering=0) as stream:
                _write_members(directory, files, stream, progress)
        else:
            path = destination.resolve()
            if not path.parent.is_dir():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
            remove_leftovers(path.parent)
            with atomic_file(path) as file:
                _write_members_at_once(directory, files, file.fileno(), progress)
            sync_folder(path.parent)


def _write_members(directory: Path, files: list[Entry], stream: BinaryIO, progress: Advance) -> None:
    """Write a tar from its beginning to its end."""
    for entry, header in _headers(files):
        write_all(stream, header)
        if isinstance(entry.content, bytes):
            write_all(stream, entry.content)
        else:
            copy_blob(directory, entry, partial(write_all, stream), progress, hash_in_thread=True)
        write_all(stream, bytes(-entry.size % tarfile.BLOCKSIZE))
    write_all(stream, _END)


def _write_members_at_once(directory: Path, files: list[Entry], file: int, progress: Advance) -> None:
    """Write a tar to a new file, several blobs at once."""
    offsets: dict[Entry, int] = {}
    offset = 0
    for entry, header in _headers(files):
        write_at(file, offset, memoryview(header))
        offset += len(header)
        if isinstance(entry.content, bytes):
            write_at(file, offset, memoryview(entry.content))
        else:
            offsets[entry] = offset
        offset += entry.size + -entry.size % tarfile.BLOCKSIZE  # a gap in a file reads as zeros
    write_at(file, offset, memoryview(_END))

    def copy(entry: Entry, advance: Advance, hash_in_thread: bool) -> None:
        copy_blob(directory, entry, FileWriter(file, offsets[entry]).write, advance, hash_in_thread=hash_in_thread)

    copy_in_threads(offsets, copy, progress)


def _headers(files: Iterable[Entry]) -> Iterator[tuple[Entry, bytes]]:
    """Yield each entry and its header, after the headers of the folders that first appear with it."""
    known = {""}
    for entry in files:
        headers = []
        # skopeo fails as an ordinary user if the tar has no members for the folders.
        for folder in _folders(entry.path, known):
            member = tarfile.TarInfo(folder)
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            headers.append(member.tobuf(tarfile.PAX_FORMAT))
        member = tarfile.TarInfo(entry.path)
        member.size, member.mode = entry.size, 0o644
        yield entry, b"".join([*headers, member.tobuf(tarfile.PAX_FORMAT)])


def _folders(path: str, known: set[str]) -> list[str]:
    """Return the folders of a path that are not in ``known``, the outermost first, and add them to it."""
    new: list[str] = []
    while (path := os.path.dirname(path)) not in known:
        known.add(path)
        new.insert(0, path)
    return new
