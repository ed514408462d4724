"""Read the images of a docker-archive, an OCI archive or an OCI image layout folder.

Nothing is copied: the content of an image is returned as sections of files. Archives are untrusted. Every name, link,
size and document is checked, and an archive with one invalid part is refused.
"""

from __future__ import annotations

from collections.abc import Iterable

from cachedb.errors import InvalidArchive, InvalidName
from cachedb.oci.names import Name
from cachedb.transports.archive.docker import read_docker, read_entries, read_repo_tags
from cachedb.transports.archive.files import Files
from cachedb.transports.archive.layout import read_layout
from cachedb.transports.archive.model import ArchivedImage, check_blob_count

__all__ = ["read_images"]


def read_images(files: Files, name: Name | None = None) -> list[ArchivedImage]:
    """Return the images in an archive.

    If an archive has both formats, this reads its OCI image layout, which keeps the digests.

    Args:
        files: the files of the archive.
        name: the name of the image; the names in the archive are then ignored, even if they are invalid.

    Raises:
        InvalidArchive: if it is not an image archive or is incomplete; if a name is given for several images; if no
            name is given for an image that has none.
        InvalidManifest: if a manifest is invalid.
        DigestMismatch: if a manifest or config does not match its digest or size.
    """
    index, docker = files.find("index.json"), files.find("manifest.json")
    if index is not None:
        found = read_layout(files, index, read_repo_tags(files, docker) if docker else {})
    elif docker is not None:
        found = [(entry.get("RepoTags") or [], read_docker(files, entry)) for entry in read_entries(docker)]
    else:
        raise InvalidArchive(
            "the archive has neither index.json nor manifest.json: make an image archive with "
            "`docker save`, `podman save` or `skopeo copy`"
        )
    if not found:
        raise InvalidArchive("the archive holds no image")
    if name is not None and len(found) > 1:
        raise InvalidArchive(f"the archive holds {len(found)} images, but one NAME was given: leave it out")
    images = [image._replace(names=_parse_names(texts) if name is None else [name]) for texts, image in found]
    _check_names(images)
    return images


def _check_names(images: list[ArchivedImage]) -> None:
    named: dict[Name, object] = {}
    for image in images:
        if not image.names:
            which = f" ({image.root.digest})" if image.root and len(images) > 1 else ""
            raise InvalidArchive(
                f"an image in the archive has no name{which}: give one with `cachedb import SOURCE NAME`"
            )
        for name in image.names:
            # The second image would replace the first.
            if named.setdefault(name, image.identity) != image.identity:
                raise InvalidArchive(f"two images in the archive have the name {name}")
    check_blob_count(sum(len(image.names) * len(image.blobs) for image in images))


def _parse_names(texts: Iterable[object]) -> list[Name]:
    names = []
    for text in texts:
        try:
            names.append(Name.parse(text))  # type: ignore[arg-type]
        except InvalidName as error:
            raise InvalidArchive(f"a name in the archive is invalid: {error}: give another name as NAME") from error
    return list(dict.fromkeys(names))
