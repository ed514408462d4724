"""Export an image to an archive or an image layout folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import BinaryIO

from cachedb.content.documents import read_closure, read_document
from cachedb.content.held import hold_images
from cachedb.content.session import Session
from cachedb.errors import CacheError
from cachedb.index.sqlite.database import Database
from cachedb.oci.names import Name
from cachedb.progress import Progress, sum_progress
from cachedb.text import shorten
from cachedb.transports.archive.entries import list_entries
from cachedb.transports.archive.formats import FORMATS
from cachedb.transports.archive.write_layout import write_layout
from cachedb.transports.archive.write_tar import write_tar

__all__ = ["export_archive"]


def export_archive(
    database: Database,
    session: Session,
    name: Name,
    destination: Path | BinaryIO,
    *,
    format: str,
    platform: str | None,
    link: bool,
    progress: Progress | None,
) -> None:
    """Export an image, as `Cache.export` does."""
    if format not in FORMATS:
        raise CacheError(f"{shorten(format)} is not a format: use one of {', '.join(FORMATS)}")
    if link and format != "oci-dir":
        raise CacheError("only a folder can have links: use the format oci-dir, or leave out --link")
    read = partial(read_document, database.directory)
    with hold_images(database, session, name) as ((info, blobs),):
        closure = read_closure(database.directory, name, info, blobs)
        if platform is not None or format == "docker-archive":
            closure = closure.for_platform(name, platform, read)
        else:
            closure = closure.keep_present({blob.digest for blob in blobs})
        files = list_entries(name, closure, format)
        advance = sum_progress(sum(entry.size for entry in files if isinstance(entry.content, str)), progress)
        if format != "oci-dir":
            write_tar(database.directory, files, destination, advance)
        elif isinstance(destination, Path):
            seconds = database.wait_seconds
            write_layout(database.directory, files, destination, link=link, wait_seconds=seconds, progress=advance)
        else:
            raise CacheError("the format oci-dir writes a folder: give its path")
