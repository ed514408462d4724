"""Import all images of an archive or an image layout folder, or none if one is invalid."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import Connection

from cachedb import oci
from cachedb.content import publish
from cachedb.content.save import attach_referrers, find_stored_part, save_image
from cachedb.content.session import Hold, Session
from cachedb.disk.existence import exists
from cachedb.disk.writer import Received
from cachedb.errors import CacheError, NameInUse, os_errors
from cachedb.index import images
from cachedb.index.records import ImageInfo, ImportedImage
from cachedb.index.sqlite.database import Database
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import Descriptor
from cachedb.oci.names import Name
from cachedb.progress import Advance, Progress, sum_progress
from cachedb.threads import in_threads
from cachedb.transports.archive import files, model, unpack_limit
from cachedb.transports.archive.diff_ids import DiffId
from cachedb.transports.archive.names import Wanted
from cachedb.transports.archive.read import read_images

__all__ = ["import_archive"]


def import_archive(
    database: Database,
    session: Session,
    source: Path | BinaryIO,
    wanted: Wanted,
    *,
    replace: bool,
    link: bool,
    max_unpacked: int | None,
    ttl: float | None,
    progress: Progress | None,
) -> list[ImportedImage]:
    """Import the images of an archive, as `Cache.cache_from_tar` does."""
    if link and not (isinstance(source, Path) and (source.is_dir() or not exists(source))):
        raise CacheError("only an image layout folder can be imported with links: import an archive without them")
    if wanted.name is not None and wanted.repository is not None:
        raise CacheError("a name and a repository were given: give one of them")
    max_bytes = unpack_limit.read_max_unpacked() if max_unpacked is None else max_unpacked
    with files.open_files(source, session.new_file, max_bytes) as opened_files:
        found = read_images(opened_files, wanted)
        return _import(database, session, found, progress, max_bytes, ttl, replace=replace, link=link)


def _import(
    database: Database,
    session: Session,
    found: list[model.NamedImage],
    progress: Progress | None,
    max_bytes: int | None,
    ttl: float | None,
    *,
    replace: bool,
    link: bool,
) -> list[ImportedImage]:
    # Images may share a blob. Its key is its digest or its place in the archive.
    blobs = {blob.key: blob for item in found for blob in (*item.image.blobs, *item.image.referrers)}
    digests = {blob.digest for blob in blobs.values() if blob.digest}
    roots: list[tuple[Digest, str]] = []

    def receive(hold: Hold, received: dict[object, Received]) -> None:
        _receive(session, blobs, hold, received, progress, max_bytes, link=link)
        roots.extend(_find_or_build_root(session, item.image, received) for item in found)

    def save_all(connection: Connection) -> list[ImportedImage]:
        saved: dict[Name, ImportedImage] = {}
        for item, (digest, media_type) in zip(found, roots, strict=True):
            for name in item.names or [Name(str(item.repository), digest)]:
                if name not in saved:
                    replaced = _find_replaced(connection, name, digest, item, replace=replace)
                    info = _save(connection, database.directory, name, digest, media_type, item.image, ttl)
                    saved[name] = ImportedImage(info, replaced)
        return list(saved.values())

    return publish.receive_and_save(database, session, digests, receive, save_all)


def _find_replaced(
    connection: Connection, name: Name, digest: Digest, item: model.NamedImage, *, replace: bool
) -> Digest | None:
    """Return the digest that a name points to before the import replaces it; None if it points to none.

    Raises:
        NameInUse: if it must not be replaced.
    """
    row = images.look_up(connection, name)
    if row is None or row.digest == digest:
        return None
    if name in item.bare:
        raise NameInUse(
            f"the archive gives the tag {str(name).partition(':')[0]!r} without a repository, and {name} is another "
            "image in the cache: give a repository with `cachedb import SOURCE REPOSITORY:`"
        )
    if not replace:
        raise NameInUse(f"{name} names another image in the cache: import without --no-replace, or under another name")
    return row.digest


def _save(
    connection: Connection,
    directory: Path,
    name: Name,
    digest: Digest,
    media_type: str,
    image: model.ArchivedImage,
    ttl: float | None,
) -> ImageInfo:
    """Point a name to a stored image, and attach its referrers."""
    choose = None
    if image.chosen is not None:
        choose = oci.choose_among(image.chosen | find_stored_part(connection, directory, name, digest))
    image_id = save_image(connection, directory, name, digest, media_type, choose, ttl=ttl)
    referrers = [
        Descriptor(blob.digest, blob.size, blob.media_type, blob.role) for blob in image.referrers if blob.digest
    ]
    attach_referrers(connection, directory, name, referrers)
    return images.read_image(connection, directory, image_id)[0]


def _receive(
    session: Session,
    blobs: dict[object, model.ArchivedBlob],
    hold: Hold,
    received: dict[object, Received],
    progress: Progress | None,
    max_bytes: int | None,
    *,
    link: bool,
) -> None:
    """Receive an archive's blobs in several threads; blobs that are stored already are only verified."""
    compressed = sum(blob.size for blob in blobs.values() if blob.diff_id)
    limit = unpack_limit.UnpackLimit("the layers in the archive unpack", compressed, max_bytes)

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
    order = sorted(blobs.values(), key=lambda blob: -blob.size)
    in_threads(receive, order, sum_progress(sum(blob.size for blob in order), progress))


def _find_or_build_root(
    session: Session, image: model.ArchivedImage, received: dict[object, Received]
) -> tuple[Digest, str]:
    """Return the digest and media type of an image's root; build the manifest that a docker-archive lacks."""
    if image.root:
        return image.root.digest, image.root.media_type
    manifest = image.build_manifest([received[blob.key].digest for blob in image.blobs])
    built = publish.receive(session, io.BytesIO(manifest))
    # An archive may list an image twice. Then its manifest is built twice, so only the path is a unique key.
    received[built.path] = built
    return built.digest, oci.OCI_MANIFEST
