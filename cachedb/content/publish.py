"""Blobs on disk: received under ``ingest/``, published into ``blobs/``, read from there.

What is hashed is what is written: the same buffers, each read once; or what is linked, if nobody has written to it
meanwhile. A blob's name never appears in ``blobs/`` before all of it is there and on disk, and its row never says
"stored" before its name is.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, bindparam, select
from sqlalchemy.dialects.sqlite import Insert, insert

from cachedb.content.session import NO_HOLD, Hold, Session
from cachedb.disk import writer
from cachedb.disk.layout import blob_file, received_digest
from cachedb.disk.single_flight import ClaimLost
from cachedb.disk.writer import Content, Hasher, Readable, discard, identity
from cachedb.errors import CacheError, InvalidDigest, StorageError, ignore_os_errors, os_errors
from cachedb.index.sqlite.database import Database, batched, sync_folder
from cachedb.index.tables import BLOBS
from cachedb.oci.names import Digest, parse_digest, split_digest
from cachedb.threads import Advance

__all__ = [
    "Received",
    "Replaced",
    "hold_stored",
    "intact",
    "on_disk",
    "publish",
    "receive",
    "receive_linked",
    "retract",
    "set_stored",
    "size_of",
    "stored",
    "take",
]


_NOT_LINKABLE = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP)


class Received(NamedTuple):
    """A blob whose content was verified; its file is None where the cache had it already."""

    digest: Digest
    size: int  # bytes
    path: Path | None


def receive(
    session: Session,
    source: Readable,
    *,
    digest: Digest | None = None,
    size: int | None = None,
    algorithm: str = "sha256",
    write: bool = True,
    also: Hasher | None = None,
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
        progress: is told of every chunk.
        what: how to call the blob in an error.

    Raises:
        DigestMismatch: if the content has another digest or size.
        StorageError: if it cannot be written.
    """
    path = session.new_path(digest) if write else None
    try:
        content = writer.receive(
            source, path, digest=digest, size=size, algorithm=algorithm, also=also, progress=progress, what=what
        )
        if path is None or digest is not None:
            return Received(content.digest, content.size, path)  # it has its name already
        named = session.new_path(content.digest)
        with os_errors("write to the cache"):
            os.rename(path, named)  # `Path.rename` makes a third path
        return Received(content.digest, content.size, named)
    except BaseException:
        discard(path)
        raise


class Replaced(StorageError):
    """Under the name of a file that was read there is another one by now, or another content."""


def receive_linked(
    session: Session,
    source: Callable[[], Readable],
    file: int,
    path: str,
    *,
    digest: Digest,
    size: int,
    read_only: bool = False,
    progress: Advance | None = None,
    what: str = "the content",
) -> Received:
    """Verify a file, and receive it as a hard link to it; as a copy where the file system cannot, or others may write.

    Args:
        session: as for `receive`.
        source: returns what reads the file from its beginning.
        file: its descriptor.
        path: its name.
        digest: as for `receive`.
        size: as for `receive`.
        read_only: nobody may write to it from now on, if it is linked.
        progress: as for `receive`.
        what: as for `receive`.

    Raises:
        DigestMismatch: as for `receive`.
        Replaced: if the name is another file's by now, or somebody has written to it meanwhile.
        StorageError: if it cannot be linked, for another reason, nor be copied.
    """
    before = os.fstat(file)
    # Where a file has an access control list, the bits of the group say what any other user may do at most.
    if before.st_uid != os.geteuid() or before.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        # What others may write to is no blob: its content could change. Its owner must take care not to write to it.
        return receive(session, source(), digest=digest, size=size, progress=progress, what=what)
    verified = receive(session, source(), digest=digest, size=size, write=False, progress=progress, what=what)
    named = session.new_path(digest)
    with os_errors("link to a blob"):
        if read_only:
            with ignore_os_errors():  # it may be one that nobody can change, which cannot be linked either
                os.fchmod(file, 0o444)
        os.fsync(file)
        try:
            os.link(path, named, follow_symlinks=False)
        except OSError as error:
            if error.errno in _NOT_LINKABLE:
                return receive(session, source(), digest=digest, size=size, what=what)
            raise
        found = named.lstat()
        if identity(found) != identity(before):
            named.unlink()
            if stat.S_ISLNK(found.st_mode):
                return receive(session, source(), digest=digest, size=size, what=what)
            raise Replaced(f"{what} was replaced or written to while it was read")
    return verified._replace(path=named)


def take(session: Session, path: Path, content: Content) -> Received:
    """Receive a blob that was downloaded, and verified: it keeps its name there, until it is stored.

    Raises:
        ClaimLost: if another process has put its own download there.
    """
    named = session.new_path(content.digest)
    with os_errors("write to the cache"):
        os.link(path, named)
        if named.stat().st_ino != content.inode:
            named.unlink()
            raise ClaimLost(f"the download of {content.digest} was replaced by another process")
    return Received(content.digest, content.size, named)


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
            with ExitStack() as opened:
                algorithms = {split_digest(digest)[0] for digest in new}
                folders = {
                    algorithm: opened.enter_context(database.folders.open(f"blobs/{algorithm}"))
                    for algorithm in algorithms
                }
                for digest, (path, _) in new.items():
                    algorithm, name = split_digest(digest)
                    try:
                        os.link(path, name, dst_dir_fd=folders[algorithm], follow_symlinks=False)
                    except FileExistsError:
                        # A file that no row knows is a forgotten blob's, on its way to the trash, and one of another
                        # size is damaged: ours takes its place.
                        second = session.new_path()
                        os.link(path, second)
                        os.rename(second, name, dst_dir_fd=folders[algorithm])
                for folder in folders.values():
                    os.fsync(folder)
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
            with ExitStack() as opened:
                folders: dict[str, int] = {}
                for digest in set(published.values()) - known.keys():
                    algorithm, orphan = split_digest(digest)
                    if algorithm not in folders:
                        folders[algorithm] = opened.enter_context(database.folders.open(f"blobs/{algorithm}"))
                    with suppress(FileNotFoundError):
                        os.unlink(orphan, dir_fd=folders[algorithm])
                for opened_folder in folders.values():
                    os.fsync(opened_folder)
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
