"""Export an image to an archive or an image layout folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from cachedb import oci
from cachedb.content.documents import read_attached, read_closure, read_document
from cachedb.content.held import hold_images
from cachedb.content.session import Session
from cachedb.disk.layout import check_destination
from cachedb.disk.reader import read_small_blob
from cachedb.disk.waiting import LOG
from cachedb.errors import CacheError, InvalidManifest, InvalidName
from cachedb.index.filters import Filters
from cachedb.index.patterns import is_pattern
from cachedb.index.records import BlobInfo, ImageInfo
from cachedb.index.sqlite.database import Database
from cachedb.oci.closure import Closure
from cachedb.oci.conversion import convert_to_oci
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import Descriptor
from cachedb.oci.names import Name
from cachedb.oci.platforms import host_platform, is_for
from cachedb.progress import Progress, sum_progress
from cachedb.text import shorten
from cachedb.transports.archive.entries import Entry, list_entries, merge_entries
from cachedb.transports.archive.formats import FOLDER_FORMATS, FORMATS, MANIFEST_FORMATS
from cachedb.transports.archive.write_layout import write_layout
from cachedb.transports.archive.write_tar import write_tar

__all__ = ["export_archive"]


def export_archive(
    database: Database,
    session: Session,
    wanted: Sequence[str | Name],
    destination: Path | BinaryIO,
    *,
    filters: Filters | None = None,
    ignore_missing: bool = False,
    format: str,
    tag: str | None,
    platform: str | None,
    link: bool,
    referrers: bool,
    convert: str | None,
    progress: Progress | None,
) -> list[Name]:
    """Export images, as `Cache.export` does, and return their names."""
    _check_options(format, destination, tag, link=link, referrers=referrers, convert=convert)
    if isinstance(destination, Path):
        check_destination(database.directory, destination)
    with hold_images(database, session, *wanted, filters=filters, ignore_missing=ignore_missing) as held:
        if len(held) > 1 and (tag is not None or format == "dir"):
            what = "a tag names one image" if tag is not None else "the format dir holds one image"
            raise CacheError(f"{what}, but {len(held)} are exported: export them one by one")
        # A digest may select an image that has a tag. The archive still has the name that the caller gave.
        given = wanted[0] if len(wanted) == 1 and not is_pattern(wanted[0]) else None
        names = [info.name if given is None else Name.parse(given) for info, _ in held]
        if not names:
            return []
        files = merge_entries(
            _list_image_entries(
                database.directory,
                name,
                info,
                blobs,
                format=format,
                tag=tag,
                platform=platform,
                referrers=referrers,
                convert=convert,
            )
            for name, (info, blobs) in zip(names, held, strict=True)
        )
        if isinstance(destination, Path):
            database.reserve.check(destination)
        advance = sum_progress(sum(entry.size for entry in files if isinstance(entry.content, str)), progress)
        if format not in FOLDER_FORMATS:
            write_tar(database.directory, files, destination, advance)
            return names
        assert isinstance(destination, Path)
        seconds = database.wait_seconds
        write_layout(database.directory, files, destination, link=link, wait_seconds=seconds, progress=advance)
        return names


def _list_image_entries(
    directory: Path,
    name: Name,
    info: ImageInfo,
    blobs: list[BlobInfo],
    *,
    format: str,
    tag: str | None,
    platform: str | None,
    referrers: bool,
    convert: str | None,
) -> list[Entry]:
    """Return the files of an archive with one image.

    Args:
        directory: of the cache.
        name: of the image.
        info: the image, which the caller must hold.
        blobs: of the image.
        format: as in `Cache.export`, like the arguments below.
    """
    named = name if tag is None else _parse_tag(name, tag, format)
    read = partial(read_document, directory)
    whole = closure = read_closure(directory, name, info, blobs)
    if platform is not None or format in MANIFEST_FORMATS:
        closure = closure.for_platform(name, platform, read)
    else:
        closure = closure.keep_present({blob.digest for blob in blobs})
    if convert:
        closure = convert_to_oci(closure)
    elif format not in MANIFEST_FORMATS and closure.root.media_type in (oci.DOCKER_MANIFEST, oci.DOCKER_LIST):
        LOG.warning("skopeo cannot find %s by name, because it has Docker media types: add --convert oci", name)
    if tag is not None and named.digest not in (None, closure.root.digest):
        raise InvalidName(f"{named} names another digest than {closure.root.digest}: use a tag or this digest")
    if format == "docker-archive" and (kind := closure.find_artifact_type(closure.root)):
        raise CacheError(
            f"{name} is an artifact of type {shorten(kind)}, which a docker-archive cannot hold: "
            "use the format oci-archive"
        )
    if format == "docker-archive" and closure.lacks_layers(closure.root):
        raise CacheError(f"{name} lacks foreign layers, which a docker-archive must hold: use the format oci-archive")
    docker_image = _choose_docker_image(closure, read) if format == "docker" else None
    attached: list[Closure] = []
    if referrers:
        attached = _find_referrers(directory, name, whole, closure, blobs)
    else:
        _warn_of_referrers(directory, name, whole, blobs, format)
    return list_entries(named, closure, format, ref_name=tag, docker_image=docker_image, referrers=attached)


def _check_options(
    format: str, destination: object, tag: str | None, *, link: bool, referrers: bool, convert: str | None
) -> None:
    """Raise `CacheError` if there is no such format or conversion, or the format does not allow an option."""
    if format not in FORMATS:
        raise CacheError(f"{shorten(format)} is not a format: use one of {', '.join(FORMATS)}")
    if format in FOLDER_FORMATS and not isinstance(destination, Path):
        raise CacheError(f"the format {format} writes a folder: give its path")
    if tag is not None and format == "dir":
        raise CacheError(f"the format dir stores no tag: leave out the tag {shorten(tag)}")
    if link and format not in FOLDER_FORMATS:
        raise CacheError(
            f"only a folder can have links: use the format {' or '.join(FOLDER_FORMATS)}, or leave out --link"
        )
    if convert not in (None, "oci"):
        raise CacheError(f"images cannot be converted to {shorten(convert)}: use oci")
    if convert and format == "docker-archive":
        raise CacheError("a docker-archive has no manifest to convert: use another format, or leave out --convert")
    if referrers and format in MANIFEST_FORMATS:
        raise CacheError(f"a {format} cannot hold referrers: use another format, or leave out --referrers")


def _parse_tag(name: Name, tag: str, format: str) -> Name:
    """Return the name that a tag gives to an image in an archive.

    Args:
        name: of the image in the cache.
        tag: a name; or, in an image layout, only a tag.
        format: one of `FORMATS`.

    Raises:
        InvalidName: if the tag is invalid.
    """
    is_name = format == "docker-archive" or any(sign in tag for sign in ":/@")
    return Name.parse(tag if is_name else f"{name.repository}:{tag}")


def _choose_docker_image(closure: Closure, read: Callable[[Digest], bytes]) -> Descriptor | None:
    """Choose the image for `docker load`: for the host's platform, else the first; None without one.

    Images that lack foreign layers are skipped, because `docker load` needs all layers.

    Args:
        closure: of the image.
        read: returns the bytes of a config, which states the platform if no index does.
    """
    images = [
        image
        for image in closure.images
        if closure.find_artifact_type(image) is None and not closure.lacks_layers(image)
    ]
    if len(images) > 1:
        platforms = closure.read_platforms(read)
        images.sort(key=lambda image: not is_for(platforms[image], host_platform()))
    return next(iter(images), None)


def _find_referrers(
    directory: Path, name: Name, whole: Closure, exported: Closure, blobs: list[BlobInfo]
) -> list[Closure]:
    """Return the referrers of an image to export; warn about attached blobs that are left out.

    Args:
        directory: of the cache.
        name: of the image, for the warning.
        whole: the closure of the image.
        exported: the closure that is exported.
        blobs: of the image.

    Raises:
        DigestMismatch: if the file of a referrer's manifest is damaged.
        InvalidManifest: if a referrer's manifest is invalid.
    """
    attached = read_attached(whole, blobs, partial(read_document, directory))
    found, referrers = exported.find_referrers(attached), whole.find_referrers(attached)
    _warn_of_left_out(name, len(referrers) - len(found), "referrer", "their subjects are not exported")
    _warn_of_others(name, whole, referrers, blobs)
    return found


def _warn_of_referrers(directory: Path, name: Name, closure: Closure, blobs: list[BlobInfo], format: str) -> None:
    """Warn that the referrers of an image, and other attached blobs, are not exported."""
    sizes = {blob.digest: blob.size for blob in blobs}

    def read(digest: Digest) -> bytes:
        return read_small_blob(directory, digest, sizes[digest]) or b""  # damage is no error: it is not exported

    hint = f"a {format} cannot hold them" if format in MANIFEST_FORMATS else "add them with --referrers"
    with suppress(InvalidManifest):
        referrers = closure.find_referrers(read_attached(closure, blobs, read))
        _warn_of_left_out(name, len(referrers), "referrer", hint)
        _warn_of_others(name, closure, referrers, blobs)


def _warn_of_others(name: Name, closure: Closure, referrers: list[Closure], blobs: list[BlobInfo]) -> None:
    """Warn about the blobs of an image that neither its closure nor a referrer contains."""
    known = {blob.digest for part in (closure, *referrers) for blob in part.blobs}
    hint = "no format has a place for them: save them with `cachedb blob cat`"
    _warn_of_left_out(name, len({blob.digest for blob in blobs} - known), "other attached blob", hint)


def _warn_of_left_out(name: Name, count: int, what: str, hint: str) -> None:
    if count:
        LOG.warning("the export of %s lacks %d %s%s: %s", name, count, what, "s" if count > 1 else "", hint)
