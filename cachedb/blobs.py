"""Blobs on disk: received under ``ingest/``, published into ``blobs/``, read from there.

What is hashed is what is written: the same buffers, each read once. A blob's name never appears in
``blobs/`` before all of it is there and on disk, and its row never says "stored" before its name is.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

from sqlalchemy import Connection, Select, bindparam, select
from sqlalchemy.dialects.sqlite import Insert, insert

from cachedb.database import Database, sync_folder
from cachedb.errors import CacheError, DigestMismatch, InvalidDigest, NotInCache, os_errors
from cachedb.oci import DOCUMENT_LIMIT
from cachedb.parallel import Advance
from cachedb.reference import Digest, digest_of, parse_digest, split_digest
from cachedb.sessions import NO_HOLD, Hold, Session, received_digest
from cachedb.tables import BLOBS

__all__ = [
    "Received",
    "batched",
    "blob_file",
    "blob_path",
    "discard",
    "document",
    "hold_stored",
    "intact",
    "on_disk",
    "open_blob",
    "publish",
    "receive",
    "retract",
    "set_stored",
    "size_of",
    "stored",
]

CHUNK = 1024 * 1024  # bytes read, hashed and written at a time
_BUFFERS = 4  # chunks under way in one blob: one read and written while others are hashed
BATCH = 500  # digests in one statement

T = TypeVar("T")


class Readable(Protocol):
    """Where bytes come from."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill the front of the buffer and return how many bytes there were; 0 is the end."""


class Hasher(Protocol):
    """What looks at every chunk on its way."""

    def update(self, data: memoryview, /) -> None:
        """Take the next chunk."""


class Received(NamedTuple):
    """A blob whose content was verified; its file is None where the cache had it already."""

    digest: Digest
    size: int  # bytes
    path: Path | None


def blob_path(directory: Path, digest: Digest) -> Path:
    """Return where a blob lies, if it is stored."""
    return Path(blob_file(directory, digest))


def blob_file(directory: Path, digest: Digest) -> str:
    """Return the same as text: to make a `Path` for each of many blobs takes longer than what is done with it."""
    return f"{directory}/blobs/{digest.replace(':', '/')}"


def receive(
    session: Session,
    source: Readable,
    *,
    digest: Digest | None = None,
    size: int | None = None,
    algorithm: str = "sha256",
    write: bool = True,
    also: Hasher | None = None,
    partial: Path | None = None,
    progress: Advance | None = None,
    what: str = "the content",
) -> Received:
    """Read a blob to its end, verify it, and write it to the session's folder, durably.

    Args:
        session: whose folder to write to.
        source: where the bytes come from.
        digest: the digest it must have, if that is known.
        size: the size in bytes it must have, if that is known.
        algorithm: to compute the digest with, if none is known.
        write: False to verify only: the cache has the blob, and a lease on it.
        also: is shown every chunk as well.
        partial: a file that has what came of it before, which ``source`` goes on from. It is kept, also when all of it
            has come: for the caller to remove once the blob is stored.
        progress: is told of every chunk.
        what: how to call the blob in an error.

    Raises:
        DigestMismatch: if the content has another digest or size.
        StorageError: if it cannot be written.
    """
    hasher = hashlib.new(split_digest(digest)[0] if digest else algorithm)
    hashers: list[Hasher] = [hasher, also] if also else [hasher]
    path = (partial or session.new_path(digest)) if write else None
    try:
        with os_errors("write to the cache"):
            target = os.open(path, os.O_RDWR | os.O_CREAT | (0 if partial else os.O_EXCL), 0o600) if path else None
        try:
            begun = _hash(target, hashers) if partial and target is not None else 0
            rest = None if size is None else size - begun
            length = begun + _copy(source, target, hashers, rest, progress)
            if size is not None and length != size:
                more = "more" if length > size else f"{length} bytes"
                raise DigestMismatch(f"{what} should be {size} bytes, and is {more}")
            actual = parse_digest(f"{hasher.name}:{hasher.hexdigest()}")
            if digest is not None and actual != digest:
                raise DigestMismatch(f"{what} should have digest {digest}, and has {actual}")
            if target is None or path is None:
                return Received(actual, length, None)
            with os_errors("write to the cache"):
                os.fchmod(target, 0o444)
                os.fsync(target)
        finally:
            if target is not None:
                os.close(target)
        if digest is not None and partial is None:
            return Received(actual, length, path)  # it has its name already
        named = session.new_path(actual)
        with os_errors("write to the cache"):
            if partial:
                os.link(path, named)
            else:
                os.rename(path, named)  # `Path.rename` makes a third path
        return Received(actual, length, named)
    except BaseException as error:
        if partial is None or isinstance(error, DigestMismatch):
            discard(path)
        raise


def _hash(file: int, hashers: Sequence[Hasher]) -> int:
    """Show the hashers what a file has; return how many bytes that is, and leave the file at its end."""
    buffer, length = memoryview(bytearray(CHUNK)), 0
    with os_errors("read from the cache"):
        while count := os.readv(file, [buffer]):
            length += count
            for hasher in hashers:
                hasher.update(buffer[:count])
    return length


def discard(path: Path | None) -> None:
    """Remove a received file. Where that fails the next open does it, and what failed before is what to speak of."""
    if path is not None:
        with suppress(OSError):
            path.unlink()


def _copy(
    source: Readable,
    target: int | None,
    hashers: Sequence[Hasher],
    limit: int | None,
    progress: Advance | None,
) -> int:
    """Copy to the end, or until ``limit`` bytes are exceeded; return the bytes read.

    Chunks are hashed in a second thread, in their order, while this one reads and writes: all of it without
    the interpreter's lock.
    """

    def hash_chunk(chunk: memoryview) -> None:
        for hasher in hashers:
            hasher.update(chunk)

    length = 0
    # To clear a buffer of a whole chunk takes longer than all else that is done with the bytes of most blobs.
    chunk_size = CHUNK if limit is None else min(CHUNK, limit + 1)
    buffers: list[memoryview] = []
    pending: list[Future[None]] = []
    with ThreadPoolExecutor(1) as hashing:  # begins a thread at the first full chunk, so not for small blobs
        while True:
            if len(buffers) < _BUFFERS:
                buffer = memoryview(bytearray(chunk_size))
                buffers.append(buffer)
            else:
                pending.pop(0).result()  # its buffer is free again
                buffer = buffers[0]
                buffers.append(buffers.pop(0))
            chunk = _fill(source, buffer)
            length += len(chunk)
            if limit is not None and length > limit:
                return length
            last = len(chunk) < chunk_size
            if last:
                for future in pending:
                    future.result()
                hash_chunk(chunk)
            else:
                pending.append(hashing.submit(hash_chunk, chunk))
            if target is not None:
                _write(target, chunk)
            if progress is not None:
                progress(len(chunk))
            if last:
                return length


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


@contextmanager
def publish(database: Database, session: Session, received: Iterable[Received]) -> Iterator[Connection]:
    """Store received blobs in one write transaction, in which the block may do more.

    Either all of it is done or nothing. Order keeps that true through a crash: a file in the session's folder
    that is named by its digest, a second name in ``blobs/``, the row. Whoever finds the first without the
    last takes the second away (`retract`).
    """
    files = {blob.path: blob for blob in received if blob.path is not None}
    if files:
        with os_errors("write to the cache"):
            sync_folder(session.folder)
    try:
        with database.write() as connection:
            known = intact(connection, database.directory, [blob.digest for blob in files.values()])
            new = {blob.digest: (path, blob) for path, blob in files.items() if blob.digest not in known}
            targets = {digest: blob_file(database.directory, digest) for digest in new}
            for digest, target in targets.items():
                try:
                    os.link(new[digest][0], target)
                except FileExistsError:
                    # A file that no row knows is a forgotten blob's, on its way to the trash, and one of another
                    # size is damaged: ours takes its place.
                    second = session.new_path()
                    os.link(new[digest][0], second)
                    os.rename(second, target)
            for folder in {os.path.dirname(target) for target in targets.values()}:
                sync_folder(folder)
            set_stored(connection, [blob for _, blob in new.values()])
            yield connection
    except BaseException:
        if files:
            with suppress(CacheError):  # what is left is for the next open, and it is the first error that counts
                retract(database, session.folder, [path.name for path in files])
        raise
    for path in files:
        discard(path)


def set_stored(connection: Connection, blobs: Iterable[Received]) -> None:
    """Note that the files of these blobs are in ``blobs/``."""
    now = datetime.now(UTC)
    rows = [{"digest": blob.digest, "size": blob.size, "stored_at": now} for blob in blobs]
    if rows:
        connection.execute(_now_stored(), rows)


@cache
def _now_stored() -> Insert:
    new = insert(BLOBS)
    return new.on_conflict_do_update(
        index_elements=[BLOBS.c.digest], set_={"size": new.excluded.size, "stored_at": new.excluded.stored_at}
    )


def retract(database: Database, folder: Path, names: Iterable[str]) -> None:
    """Take back a publication that did not come to its commit, and the received files with it.

    Args:
        database: of the cache.
        folder: a session's, under ``ingest/``.
        names: the files in it.
    """
    published = {name: digest for name in names if (digest := received_digest(name))}
    if published:
        with database.write() as connection:
            known = stored(connection, published.values())
            orphans = {blob_path(database.directory, digest) for digest in published.values() if digest not in known}
            for path in orphans:
                path.unlink(missing_ok=True)
            for parent in {path.parent for path in orphans}:
                sync_folder(parent)
    for name in published:
        discard(folder / name)


def stored(connection: Connection, digests: Iterable[Digest]) -> dict[Digest, int]:
    """Return which of the digests are stored, with their sizes in bytes."""
    found: dict[Digest, int] = {}
    for part in batched(digests):
        found.update((Digest(digest), size) for digest, size in connection.execute(_stored(), {"digests": part}))
    return found


def size_of(database: Database, digest: Digest) -> int | None:
    """Return a blob's size in bytes; None if it is not stored."""
    rows = database.rows(_size_of(), {"digest": digest})
    return rows[0][0] if rows else None


@cache
def _size_of() -> Select[*tuple[Any, ...]]:
    return select(BLOBS.c.size).where(BLOBS.c.digest == bindparam("digest"), BLOBS.c.stored_at.is_not(None))


@cache
def _stored() -> Select[*tuple[Any, ...]]:
    these = BLOBS.c.digest.in_(bindparam("digests", expanding=True))
    return select(BLOBS.c.digest, BLOBS.c.size).where(these, BLOBS.c.stored_at.is_not(None))


def batched(items: Iterable[T]) -> Iterator[list[T]]:
    """Divide items into lists of as many as one statement may name."""
    rest = list(items)
    for start in range(0, len(rest), BATCH):
        yield rest[start : start + BATCH]


def intact(connection: Connection, directory: Path, digests: Iterable[Digest]) -> dict[Digest, int]:
    """Return those of the stored blobs whose files are there, of the right size; the others can be brought anew."""
    found = {}
    for digest, size in stored(connection, digests).items():
        with suppress(FileNotFoundError):
            if os.stat(blob_file(directory, digest)).st_size == size:
                found[digest] = size
    return found


def hold_stored(database: Database, session: Session, digests: Iterable[Digest]) -> Hold:
    """Hold those of the digests that are stored, their files being there."""
    wanted = list(digests)
    with database.read() as connection:
        there = stored(connection, wanted)
    if there:
        with database.write() as connection:
            return session.lease(connection, intact(connection, database.directory, there))
    return NO_HOLD


def on_disk(directory: Path) -> tuple[dict[Digest, int], list[Path]]:
    """Return the blobs on disk with their sizes, and what is no blob and lies among them."""
    found: dict[Digest, int] = {}
    strays: list[Path] = []
    with os_errors("read the cache"):
        for folder in os.scandir(directory / "blobs"):
            if folder.name not in ("sha256", "sha512") or not folder.is_dir(follow_symlinks=False):
                strays.append(Path(folder.path))
                continue
            for entry in os.scandir(folder.path):
                try:
                    digest = parse_digest(f"{folder.name}:{entry.name}")
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # collected since
                except InvalidDigest:
                    digest = None
                if digest and entry.is_file(follow_symlinks=False):
                    found[digest] = status.st_size
                else:
                    strays.append(Path(entry.path))
    return found, strays


def open_blob(directory: Path, digest: Digest) -> BinaryIO:
    """Open a stored blob's file; the stream stays good even if the blob is collected meanwhile.

    Raises:
        NotInCache: if there is no such file.
        StorageError: if it cannot be opened, or is no regular file.
    """
    with os_errors("read a blob"):
        try:
            return open(blob_file(directory, digest), "rb", opener=_open_regular)
        except FileNotFoundError:
            raise NotInCache(f"{digest} is not in the cache") from None


def document(directory: Path, digest: Digest, size: int) -> bytes | None:
    """Return what a small blob has, if it can be read and is what its name says."""
    if size > DOCUMENT_LIMIT:
        return None
    with suppress(CacheError), open_blob(directory, digest) as file, os_errors("read a blob"):
        data = file.read(DOCUMENT_LIMIT + 1)
        return data if digest_of(data, digest) == digest else None
    return None


def _open_regular(path: str, flags: int) -> int:
    # A pipe without a writer would be waited for, maybe under the write lock.
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is no regular file", path)
