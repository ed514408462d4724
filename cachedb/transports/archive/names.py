"""Choose the images of an archive to import, and the names to save them under."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from cachedb.disk.waiting import LOG
from cachedb.errors import InvalidArchive, InvalidName
from cachedb.oci.names import Name
from cachedb.text import shorten, shorten_digest
from cachedb.transports.archive.model import FoundImage, NamedImage, check_blob_count

__all__ = ["Wanted", "name_images", "parse_digest_prefix", "qualify"]


_DIGEST_PREFIX = re.compile(r"(?:sha256:)?([0-9a-f]{12,64})|sha512:[0-9a-f]{12,128}")
_LISTED_LIMIT = 10  # images in an error


class Wanted(NamedTuple):
    """Which images of an archive to import, and how to name them."""

    name: Name | None = None  # replaces the names of the only image
    repository: str | None = None  # for tags without a repository, and for images without a name
    select: str | None = None  # a name in the archive, or a digest or at least 12 of its digits
    platform: str | None = None  # the only one to import; None for all


def name_images(found: list[FoundImage], wanted: Wanted) -> list[NamedImage]:
    """Return the images to import, with their names.

    If some images have names, those without are left out with a warning.

    Raises:
        InvalidArchive: if a name is invalid; if two images have the same name; if one name was given for several
            images, or none for images without a name; if no image was selected.
    """
    if wanted.select is not None:
        selected = _select(found, wanted.select)
        if selected.error:
            raise selected.error
        for item in found:
            if item.error:
                LOG.warning("not imported: %s: %s", _identify(item), item.error)
        found = [selected]
    if wanted.name is not None:
        if len(found) > 1:
            raise InvalidArchive(
                f"the archive holds {len(found)} images, but one NAME was given: leave it out, "
                f"or choose one with --select: {_list_images(found)}"
            )
        images = [NamedImage(found[0].image, [wanted.name])]
    else:
        images = [_name_image(item, wanted.repository) for item in found]
        images = _leave_out_unnamed(images, found)
    _check_names(images)
    return images


def qualify(text: str) -> str:
    """Return a name as Docker writes it in full; the text itself if it is no name."""
    try:
        return Name.parse(text).qualified()
    except InvalidName:
        return text


def _select(found: list[FoundImage], text: str) -> FoundImage:
    """Return the image with a name or a digest; an image that is selected by a name keeps only this one."""
    named = {item.image.identity: kept for item in found if (kept := _keep_name(item, text))}
    if len(named) > 1:
        raise InvalidArchive(
            f"{len(named)} images in the archive have the name {shorten(text)}: select one by its digest: "
            f"{_list_images([item._replace(names=[], tags=[]) for item in named.values()])}"
        )
    if named:
        return next(iter(named.values()))
    tagged = [(item, name) for item in found for name in item.names if name.rpartition(":")[2] == text]
    if len(tagged) == 1:  # skopeo selects an image by its tag alone
        return tagged[0][0]._replace(names=[tagged[0][1]], tags=[])
    if tagged:
        names = ", ".join(shorten(name) for _, name in tagged[:_LISTED_LIMIT])
        raise InvalidArchive(f"{len(tagged)} names in the archive have the tag {shorten(text)}: select one of {names}")
    if prefix := parse_digest_prefix(text):
        chosen = [item for item in found if _has_digest(item, prefix)]
        if len(chosen) == 1:
            return chosen[0]
        if chosen:
            raise InvalidArchive(
                f"{len(chosen)} images in the archive have the digest {shorten(text)}: give more digits"
            )
    raise InvalidArchive(f"the archive has no image {shorten(text)}: select one of {_list_images(found)}")


def parse_digest_prefix(text: str) -> str | None:
    """Return a digest, or the start of one, with its algorithm; None if the text is neither."""
    match = _DIGEST_PREFIX.fullmatch(text)
    return match and (f"sha256:{match[1]}" if match[1] else text)


def _keep_name(item: FoundImage, text: str) -> FoundImage | None:
    """Return an image with only this name; None if the image does not have it."""
    for name in item.names:
        if text == name or qualify(text) == qualify(name):
            return item._replace(names=[name], tags=[])
    return item._replace(names=[], tags=[text]) if text in item.tags else None


def _has_digest(item: FoundImage, prefix: str) -> bool:
    """Return whether the digest of the manifest or the config, Docker's image id, has a prefix."""
    if item.image.root and item.image.root.digest.startswith(prefix):
        return True
    return any(blob.role == "config" and (blob.digest or "").startswith(prefix) for blob in item.image.blobs)


def _list_images(found: list[FoundImage]) -> str:
    """Return the names, or the digests, of images for an error."""
    texts = [_identify(item) for item in found[:_LISTED_LIMIT]]
    return ", ".join(texts) + (", ..." if len(found) > _LISTED_LIMIT else "")


def _identify(item: FoundImage) -> str:
    """Return a name of an image, or the start of its digest; `--select` takes both."""
    if names := item.names or item.tags:
        return shorten(names[0])
    digest = item.image.root.digest if item.image.root else next((blob.digest for blob in item.image.blobs), None)
    return shorten_digest(digest) if digest else "an image without a name"


def _name_image(item: FoundImage, repository: str | None) -> NamedImage:
    """Return an image with its names in the archive, which may be none."""
    names = _parse_names(item.names)
    if item.image.root is None and (by_digest := [name for name in names if name.digest]):
        names = [name for name in names if not name.digest]
        LOG.warning("the archive lacks the manifest of %s: the image gets a digest of its own", by_digest[0])
        if not (names or item.tags):
            return NamedImage(item.image, [], by_digest[0].repository)
    if repository is None:
        bare = [name for name in _parse_names(item.tags) if name not in names]
        return NamedImage(item.image, [*names, *bare], bare=tuple(bare))
    names += _parse_names(f"{repository}:{tag}" for text in item.tags for tag in text.split(","))
    return NamedImage(item.image, list(dict.fromkeys(names)), repository if not names else None)


def _leave_out_unnamed(images: list[NamedImage], found: list[FoundImage]) -> list[NamedImage]:
    """Return the images that have a name; warn about the others.

    Raises:
        InvalidArchive: if no image has a name.
    """
    unnamed = [item for image, item in zip(images, found, strict=True) if not (image.names or image.repository)]
    if len(unnamed) == len(images) == 1:
        raise InvalidArchive("the image in the archive has no name: give one with `cachedb import SOURCE NAME`")
    if len(unnamed) == len(images):
        raise InvalidArchive(
            f"the {len(images)} images in the archive have no name: give --repository to name them by digest, "
            f"or choose one with --select and give NAME: {_list_images(unnamed)}"
        )
    if unnamed:
        LOG.warning(
            "not imported, because they have no name: %s: give --repository to name them by digest",
            _list_images(unnamed),
        )
    return [image for image in images if image.names or image.repository]


def _check_names(images: list[NamedImage]) -> None:
    named: dict[Name, object] = {}
    for image in images:
        for name in image.names:
            # The second image would replace the first.
            if named.setdefault(name, image.image.identity) != image.image.identity:
                raise InvalidArchive(f"two images in the archive have the name {name}: choose one with --select DIGEST")
    check_blob_count(sum(max(len(item.names), 1) * len([*item.image.blobs, *item.image.referrers]) for item in images))


def _parse_names(texts: Iterable[str]) -> list[Name]:
    """Return the valid names of an image; warn about the others.

    Raises:
        InvalidArchive: if all are invalid.
    """
    names: list[Name] = []
    errors: list[InvalidName] = []
    for text in texts:
        for part in text.split(","):  # BuildKit joins several names
            try:
                names.append(Name.parse(_without_digest(part)))
            except InvalidName as error:
                errors.append(error)
    if errors and not names:
        raise InvalidArchive(
            f"a name in the archive is invalid: {errors[0]}: give another name as NAME, with --select if the "
            "archive has several images"
        ) from errors[0]
    for invalid in errors:
        LOG.warning("not imported: a name in the archive is invalid: %s", invalid)
    return list(dict.fromkeys(names))


def _without_digest(text: str) -> str:
    """Return ``repository:tag`` of ``repository:tag@digest``; other names are unchanged."""
    name, at, _ = text.partition("@")
    return name if at and ":" in name.rpartition("/")[2] else text
