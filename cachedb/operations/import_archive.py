"""Import all images of an archive or an image layout folder, or none if one is invalid."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import Connection

from cachedb import oci
from cachedb.content import publish
from cachedb.content.save import save_image
from cachedb.content.session import Hold, Session
from cachedb.disk.writer import Received
from cachedb.errors import CacheError, os_errors
from cachedb.index import images
from cachedb.index.records import ImageInfo
from cachedb.index.sqlite.database import Database
from cachedb.oci.digests import Digest
from cachedb.oci.names import Name
from cachedb.progress import Advance, Progress, sum_progress
from cachedb.threads import in_threads
from cachedb.transports.archive import files, model
from cachedb.transports.archive.diff_ids import DiffId
from cachedb.transports.archive.read import read_images

__all__ = ["import_archive"]


def import_archive(
    database: Database,
    session: Session,
    source: Path | BinaryIO,
    name: Name | None,
    *,
    link: bool,
    max_unpacked: int | None,
    progress: Progress | None,
) -> list[ImageInfo]:
    """Import the images of an archive, as `Cache.cache_from_tar` does."""
    if link and not (isinstance(source, Path) and (source.is_dir() or not source.exists())):
        raise CacheError("only an image layout folder can be imported with links: leave out --link")
    max_bytes = files.read_max_unpacked() if max_unpacked is None else max_unpacked
    with files.open_files(source, session.new_file, max_bytes) as opened_files:
        return _import(database, session, read_images(opened_files, name), progress, max_bytes, link=link)


def _import(
    database: Database,
    session: Session,
    found: list[model.ArchivedImage],
    progress: Progress | None,
    max_bytes: int | None,
    *,
    link: bool,
) -> list[ImageInfo]:
    # Images may share a blob. Its key is its digest or its place in the archive.
    wanted = {blob.key: blob for image in found for blob in image.blobs}
    digests = {blob.digest for blob in wanted.values() if blob.digest}
    roots: list[tuple[Digest, str]] = []

    def receive(hold: Hold, received: dict[object, Received]) -> None:
        _receive(session, wanted, hold, received, progress, max_bytes, link=link)
        roots.extend(_find_root(session, image, received) for image in found)

    def save_all(connection: Connection) -> list[ImageInfo]:
        ids = [
            save_image(connection, database.directory, name, digest, media_type)
            for image, (digest, media_type) in zip(found, roots, strict=True)
            for name in image.names
        ]
        return [images.read_image(connection, database.directory, image_id)[0] for image_id in dict.fromkeys(ids)]

    return publish.receive_and_save(database, session, digests, receive, save_all)


def _receive(
    session: Session,
    wanted: dict[object, model.ArchivedBlob],
    hold: Hold,
    received: dict[object, Received],
    progress: Progress | None,
    max_bytes: int | None,
    *,
    link: bool,
) -> None:
    """Receive an archive's blobs in several threads; blobs that are stored already are only verified."""
    compressed = sum(blob.size for blob in wanted.values() if blob.diff_id)
    limit = files.UnpackLimit("the layers in the archive unpack", compressed, max_bytes)

    def receive_linked(blob: model.ArchivedBlob, digest: Digest, path: Path, advance: Advance) -> Received:
        with os_errors("read the archive"), files.descriptor(path) as file:
            return publish.receive_linked(
                session,
                lambda: files.Section(file, 0, os.fstat(file).st_size),  # the file may have grown meanwhile
                file,
                str(path),
                digest=digest,
                size=blob.size,
                progress=advance,
                what=blob.what,
            )

    def receive(blob: model.ArchivedBlob, advance: Advance) -> None:
        if link and blob.digest and blob.section.path and blob.digest not in hold.digests:
            received[blob.key] = receive_linked(blob, blob.digest, blob.section.path, advance)
            return
        diff_id = DiffId(*blob.diff_id, blob.what, limit) if blob.diff_id else None
        received[blob.key] = publish.receive(
            session,
            blob.section.again(),
            digest=blob.digest,
            size=blob.size,
            write=blob.digest not in hold.digests,
            also=diff_id,
            progress=advance,
            what=blob.what,
        )
        if diff_id:
            diff_id.check()

    # Large blobs first, so that all threads finish at about the same time.
    order = sorted(wanted.values(), key=lambda blob: -blob.size)
    in_threads(receive, order, sum_progress(sum(blob.size for blob in order), progress))


def _find_root(session: Session, image: model.ArchivedImage, received: dict[object, Received]) -> tuple[Digest, str]:
    """Return the digest and media type of an image's root; build the manifest that a docker-archive lacks."""
    if image.root:
        return image.root.digest, image.root.media_type
    manifest = image.manifest([received[blob.key].digest for blob in image.blobs])
    built = publish.receive(session, io.BytesIO(manifest))
    # An archive may list an image twice. Then its manifest is built twice, so only the path is a unique key.
    received[built.path] = built
    return built.digest, oci.OCI_MANIFEST
