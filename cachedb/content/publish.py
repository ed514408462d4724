"""Publish blobs: receive them into ``ingest/``, then store them in ``blobs/`` and in the index.

Each buffer is read once, then hashed and written. A file that is linked must not change while it is hashed. A blob
gets its name in ``blobs/`` only when its file is whole and synced. Its row says "stored" only when that name is synced.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection

from cachedb import oci
from cachedb.content.save import associate_waiting, save_image
from cachedb.content.session import NO_HOLD, Hold, Session
from cachedb.disk import writer
from cachedb.disk.folders import rename_over
from cachedb.disk.layout import blob_file, received_digest
from cachedb.disk.single_flight import ClaimLost
from cachedb.disk.writer import Content, Data, Hasher, Readable, Received, discard, file_identity, open_data
from cachedb.errors import (
    CacheError,
    StorageError,
    ignore_os_errors,
    os_errors,
)
from cachedb.index.blobs import read_stored_sizes, set_stored
from cachedb.index.images import is_associated, read_image
from cachedb.index.records import ImageInfo
from cachedb.index.sqlite.database import Database
from cachedb.oci.digests import Digest, split_digest
from cachedb.oci.manifests import (
    DOCUMENT_LIMIT,
)
from cachedb.oci.names import Name
from cachedb.progress import Advance

__all__ = [
    "FileReplaced",
    "find_intact",
    "hold_stored",
    "publish",
    "publish_blobs",
    "receive",
    "receive_and_save",
    "receive_download",
    "receive_linked",
    "release_after_error",
    "release_hold",
    "retract",
    "store_blob",
    "store_manifest",
]


T = TypeVar("T")


_NO_HARD_LINK_ERRNOS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP)


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
    """Read a blob to its end, verify it, and write it durably to the session's folder.

    Args:
        session: its folder gets the file.
        source: where the bytes come from.
        digest: the expected digest; None if it is unknown.
        size: the expected size in bytes; None if it is unknown.
        algorithm: computes the digest if it is unknown.
        write: False to verify only, because the blob is stored and held.
        also: another hasher that gets every chunk.
        progress: called with the bytes of each chunk.
        what: the name of the blob in errors.

    Raises:
        DigestMismatch: if the content has another digest or size.
        StorageError: if the file cannot be written.
    """
    if write:
        session.check_reserve()
    path, opened = (session.new_path(digest), session.opened) if write else (None, None)
    folder = opened.descriptor if opened else None
    try:
        content = writer.receive(
            source,
            path.name if path else None,
            folder=folder,
            digest=digest,
            size=size,
            algorithm=algorithm,
            also=also,
            progress=progress,
            what=what,
        )
        if path is None or digest is not None:
            return Received(content.digest, content.size, path)  # the file name has the digest already
        named = session.new_path(content.digest)
        with os_errors("write to the cache"):
            os.rename(path.name, named.name, src_dir_fd=folder, dst_dir_fd=folder)
        return Received(content.digest, content.size, named)
    except BaseException:
        session.discard(path)
        raise


class FileReplaced(StorageError):
    """A file was replaced or written to while it was read."""


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
    """Verify a file and receive a hard link to it, or a copy.

    It is copied if it cannot be linked, belongs to another user, or can be written by other users. A file that becomes
    read-only is copied if it has other names. Otherwise a shared cache also copies a file whose mode is not 0444.

    Args:
        session: as for `receive`.
        source: returns a stream that reads the file from its beginning.
        file: its descriptor.
        path: its path.
        digest: as for `receive`.
        size: as for `receive`.
        read_only: make the file read-only before it is linked.
        progress: as for `receive`.
        what: as for `receive`.

    Raises:
        DigestMismatch: as for `receive`.
        FileReplaced: if the file was replaced or written to meanwhile.
        StorageError: if the file can be neither linked nor copied.
    """
    before = os.fstat(file)
    # With an access control list, the group bits are its mask: the most that a named user or a group may do.
    if before.st_uid != os.geteuid() or before.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        # Other users could change the content later. Only this process's own user is trusted not to do so.
        return receive(session, source(), digest=digest, size=size, progress=progress, what=what)
    if read_only and before.st_nlink > 1:
        # The other names are not moved, and would become read-only too.
        return receive(session, source(), digest=digest, size=size, progress=progress, what=what)
    if session.is_shared and not read_only and stat.S_IMODE(before.st_mode) != 0o444:
        # The group cannot read the file, or must trust its owner not to write to it.
        return receive(session, source(), digest=digest, size=size, progress=progress, what=what)
    verified = receive(session, source(), digest=digest, size=size, write=False, progress=progress, what=what)
    named, opened = session.new_path(digest), session.opened
    folder = opened.descriptor
    with os_errors("link to a blob"):
        if read_only:
            with ignore_os_errors():  # this fails for an immutable file, which cannot be linked either
                os.fchmod(file, 0o444)
        os.fsync(file)
        try:
            os.link(path, named.name, dst_dir_fd=folder, follow_symlinks=False)
        except OSError as error:
            if error.errno in _NO_HARD_LINK_ERRNOS:
                return receive(session, source(), digest=digest, size=size, what=what)
            raise
        found = os.stat(named.name, dir_fd=folder, follow_symlinks=False)
        if file_identity(found) != file_identity(before):
            os.unlink(named.name, dir_fd=folder)
            if stat.S_ISLNK(found.st_mode):
                return receive(session, source(), digest=digest, size=size, what=what)
            raise FileReplaced(f"{what} was replaced or written to while it was read")
    return verified._replace(path=named)


def receive_download(session: Session, path: Path, content: Content) -> Received:
    """Receive a downloaded and verified blob; it keeps its name in ``ingest/partial`` until it is stored.

    Raises:
        ClaimLost: if another process has replaced the download with its own.
    """
    named, opened = session.new_path(content.digest), session.opened
    folder = opened.descriptor
    with os_errors("write to the cache"):
        os.link(path, named.name, dst_dir_fd=folder, follow_symlinks=False)
        if os.stat(named.name, dir_fd=folder, follow_symlinks=False).st_ino != content.inode:
            os.unlink(named.name, dir_fd=folder)
            raise ClaimLost(f"the download of {content.digest} was replaced by another process")
    return Received(content.digest, content.size, named)


@contextmanager
def publish_blobs(database: Database, session: Session, received: Iterable[Received]) -> Iterator[Connection]:
    """Store received blobs in one write transaction, which the block may extend.

    Either everything is stored or nothing, even after a crash. The order ensures this: first, a file in the session's
    folder is named by its digest. Then it gets a second name in ``blobs/``. Then its row is set to stored. If a later
    open finds such a file without the row, it removes the name in ``blobs/`` (`retract`).
    """
    files = {blob.path: blob for blob in received if blob.path is not None}
    opened_folder = session.opened if files else None
    received_in = opened_folder.descriptor if opened_folder else None
    if received_in is not None:
        with os_errors("write to the cache"):
            os.fsync(received_in)
    has_begun = False
    try:
        with database.write() as connection:
            has_begun = True
            known = find_intact(connection, database.directory, [blob.digest for blob in files.values()])
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
                        os.link(
                            path.name,
                            name,
                            src_dir_fd=received_in,
                            dst_dir_fd=folders[algorithm],
                            follow_symlinks=False,
                        )
                    except FileExistsError:
                        # The existing file belongs to a removed blob or has the wrong size: replace it.
                        second = session.new_path().name
                        os.link(
                            path.name, second, src_dir_fd=received_in, dst_dir_fd=received_in, follow_symlinks=False
                        )
                        assert received_in is not None
                        rename_over(second, received_in, name, folders[algorithm])
                for folder in folders.values():
                    os.fsync(folder)
            set_stored(connection, [blob for _, blob in new.values()])
            yield connection
    except BaseException:
        if received_in is not None and has_begun:
            with suppress(CacheError):  # the next open removes the rest; the first error is raised
                retract(database, received_in, [path.name for path in files])
        elif received_in is not None:  # nothing was published, so do not wait for the write lock again
            for path in files:
                discard(path.name, received_in)
        raise
    for path in files:
        session.discard(path)


def retract(database: Database, folder: int, names: Iterable[str]) -> None:
    """Remove the names in ``blobs/`` of a publication that was not committed, and its received files.

    Args:
        database: of the cache.
        folder: descriptor of a session's folder in ``ingest/``.
        names: the files in it.
    """
    published = {name: digest for name in names if (digest := received_digest(name))}
    if published:
        with database.write() as connection:
            known = read_stored_sizes(connection, published.values())
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
        discard(name, folder)


def find_intact(connection: Connection, directory: Path, digests: Iterable[Digest]) -> dict[Digest, int]:
    """Return the stored blobs whose files exist and have the right size; the others can be stored again."""
    found = {}
    for digest, size in read_stored_sizes(connection, digests).items():
        with suppress(FileNotFoundError):
            if os.stat(blob_file(directory, digest)).st_size == size:
                found[digest] = size
    return found


def hold_stored(database: Database, session: Session, digests: Iterable[Digest]) -> Hold:
    """Hold the digests whose blobs are stored and whose files have the right size."""
    wanted = list(digests)
    with database.read() as connection:
        found = read_stored_sizes(connection, wanted)
    if found:
        with database.write() as connection:
            return session.lease(connection, find_intact(connection, database.directory, found))
    return NO_HOLD


@contextmanager
def publish(database: Database, session: Session, received: Iterable[writer.Received]) -> Iterator[Connection]:
    """Store received blobs as `publish_blobs` does, and update the images that reference them."""
    received = list(received)
    with publish_blobs(database, session, received) as connection:
        documents = [blob.digest for blob in received if blob.path is not None and blob.size <= DOCUMENT_LIMIT]
        associate_waiting(connection, database.directory, documents)
        yield connection


def receive_and_save(
    database: Database,
    session: Session,
    digests: Iterable[Digest],
    receive: Callable[[Hold, dict[object, writer.Received]], None],
    save: Callable[[Connection], T],
) -> T:
    """Receive blobs and save the images that need them; do all of it or nothing.

    Args:
        database: of the cache.
        session: to work in.
        digests: the blobs of the images; the stored ones are held, and need not be received.
        receive: called with that hold; it puts the received blobs into the dictionary, under any key.
        save: called in the transaction that stores the received blobs; it saves the images.

    Returns:
        What ``save`` returns.
    """
    hold = hold_stored(database, session, digests)
    received: dict[object, writer.Received] = {}
    try:
        try:
            receive(hold, received)
        except BaseException:
            for blob in list(received.values()):  # threads may still add to it after a second signal
                session.discard(blob.path)
            raise
        # From here on, file names in the session's folder tell `retract` what to undo.
        with publish(database, session, received.values()) as connection:
            result = save(connection)
            session.release(connection, hold)
            return result
    except BaseException:
        release_after_error(database, session, hold)
        raise


def release_hold(database: Database, session: Session, hold: Hold) -> None:
    """Release a hold, in a transaction of its own."""
    if hold.digests:
        with database.write() as connection:
            session.release(connection, hold)


def release_after_error(database: Database, session: Session, hold: Hold) -> None:
    """Release a hold after an error; if that fails too, the hold ends with the session."""
    with suppress(CacheError):
        release_hold(database, session, hold)


def store_blob(
    database: Database,
    session: Session,
    data: Data,
    *,
    digest: Digest | None = None,
    algorithm: str = "sha256",
) -> Received:
    """Store a blob; lease it until an image of this session references it.

    Args:
        database: of the cache.
        session: takes the lease.
        data: the content.
        digest: the expected digest; None if it is unknown.
        algorithm: computes the digest if it is unknown.

    Raises:
        DigestMismatch: if the content has another digest.
    """
    with open_data(data) as source:
        hold = hold_stored(database, session, [digest] if digest else [])
        write = digest not in hold.digests
        try:
            received = receive(session, source, digest=digest, algorithm=algorithm, write=write)
        except BaseException:
            release_after_error(database, session, hold)
            raise
        expected = session.expects(received.digest)
        if write:
            with publish(database, session, [received]) as connection:
                # An image of another session does not keep the blob, because it may be removed before ours is saved.
                if not (expected and is_associated(connection, received.digest)):
                    hold = session.lease(connection, [received.digest])
        elif expected:
            with database.write() as connection:
                if is_associated(connection, received.digest):
                    session.release(connection, hold)
                    hold = NO_HOLD
        session.keep_until_saved(hold)
    return received


def store_manifest(
    database: Database,
    session: Session,
    name: Name,
    manifest: bytes,
    media_type: str | None,
    *,
    ttl: float | None = None,
) -> ImageInfo:
    """Store a manifest or index under a name; its config and layers are associated at once, stored or not.

    The name expires after ``ttl`` seconds, or never.

    Raises:
        InvalidManifest: if it is not a manifest or index.
        InvalidName: if the name has another digest than the manifest.
    """
    media_type = oci.manifest_media_type(manifest, media_type)
    oci.descriptors(manifest, media_type)
    algorithm = split_digest(name.digest)[0] if name.digest else "sha256"
    received = receive(session, io.BytesIO(manifest), algorithm=algorithm)
    with publish(database, session, [received]) as connection:
        image_id = save_image(connection, database.directory, name, received.digest, media_type, ttl=ttl)
        info, contents = read_image(connection, database.directory, image_id)
        session.release_saved(connection, [blob.digest for blob in contents])
        session.expect(blob.digest for blob in contents if not blob.stored)
        return info
