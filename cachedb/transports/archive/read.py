"""Images in archives: docker-archive, OCI archive, and OCI image layout folder.

A reader finds what is in an archive without copying anything: images with their names, and for each the
content it needs, as sections of files. Nothing here writes to the cache. Archives come from strangers: every
name, link, size and document is checked, and an archive with anything odd in it is refused whole.
"""

from __future__ import annotations

from collections.abc import Iterable

from cachedb.errors import InvalidArchive, InvalidName
from cachedb.oci.names import Name
from cachedb.transports.archive.docker import read_docker, read_entries, repo_tags
from cachedb.transports.archive.files import Files
from cachedb.transports.archive.layout import read_layout
from cachedb.transports.archive.model import ArchivedImage, check_rows

__all__ = ["read_images"]


def read_images(files: Files, name: Name | None = None) -> list[ArchivedImage]:
    """Return the images in an archive: the OCI side of one that is both, so that digests are kept.

    Args:
        files: the archive's.
        name: instead of the names in it, of which none need be valid then.

    Raises:
        InvalidArchive: if it is no image archive, or lacks something; if it holds several images and a name is
            given, or none is and an image in it has none.
        InvalidManifest: if a manifest in it is invalid.
        DigestMismatch: if a manifest in it has another digest or size than it should.
    """
    index, docker = files.find("index.json"), files.find("manifest.json")
    if index is not None:
        found = read_layout(files, index, repo_tags(files, docker) if docker else {})
    elif docker is not None:
        found = [(entry.get("RepoTags") or [], read_docker(files, entry)) for entry in read_entries(docker)]
    else:
        raise InvalidArchive(
            "the archive has neither index.json nor manifest.json: not an image; make one with "
            "`docker save`, `podman save` or `skopeo copy`"
        )
    if not found:
        raise InvalidArchive("the archive holds no image")
    if name is not None and len(found) > 1:
        raise InvalidArchive(f"the archive holds {len(found)} images, and one NAME was given; leave it out")
    images = [image._replace(names=_parse_names(texts) if name is None else [name]) for texts, image in found]
    _check_names(images)
    return images


def _check_names(images: list[ArchivedImage]) -> None:
    named: dict[Name, object] = {}
    for image in images:
        if not image.names:
            which = f" ({image.root.digest})" if image.root and len(images) > 1 else ""
            raise InvalidArchive(
                f"an image in the archive has no name{which}; give one, as in: cachedb import SOURCE NAME"
            )
        for name in image.names:
            # Of two, one would be stored and lost at once.
            if named.setdefault(name, image.identity) != image.identity:
                raise InvalidArchive(f"two images in the archive have the name {name}")
    check_rows(sum(len(image.names) * len(image.blobs) for image in images))


def _parse_names(texts: Iterable[object]) -> list[Name]:
    names = []
    for text in texts:
        try:
            names.append(Name.parse(text))  # type: ignore[arg-type]
        except InvalidName as error:
            raise InvalidArchive(f"a name in the archive is invalid: {error}; give another as NAME") from error
    return list(dict.fromkeys(names))
