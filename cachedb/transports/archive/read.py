"""Read the images of an archive or a folder.

The formats are docker-archive, OCI archive, OCI image layout, and skopeo's directory format. Nothing is copied: the
content of an image is returned as sections of files. Archives are untrusted. Every name, link, size and document is
checked, and an archive with one invalid part is refused.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from cachedb.errors import InvalidArchive
from cachedb.oci.digests import Digest
from cachedb.oci.platforms import is_for
from cachedb.text import shorten
from cachedb.transports.archive.directory import open_directory
from cachedb.transports.archive.docker import read_config, read_docker, read_entries, read_repo_tags
from cachedb.transports.archive.files import Files
from cachedb.transports.archive.layout import find_children, open_layout, read_layout
from cachedb.transports.archive.model import DAMAGE_ERRORS, ArchivedImage, FoundImage, NamedImage, read_document
from cachedb.transports.archive.names import Wanted, name_images, parse_digest_prefix, qualify

__all__ = ["read_images"]


def read_images(files: Files, wanted: Wanted) -> list[NamedImage]:
    """Return the images of an archive that are wanted.

    An archive may have both index.json and manifest.json. Then this reads index.json first, which has the digests, and
    takes from manifest.json what index.json lacks.

    Args:
        files: the files of the archive.
        wanted: which images to import, and how to name them.

    Raises:
        InvalidArchive: if it is not an image archive or is incomplete; if a name is missing or ambiguous.
        InvalidManifest: if a manifest is invalid.
        DigestMismatch: if a manifest or config does not match its digest or size.
    """
    found, other_platforms = _find_images(files, wanted)
    if not found and other_platforms:
        known = ", ".join(sorted(other_platforms))
        raise InvalidArchive(
            f"the archive has no image for platform {shorten(wanted.platform)}, but for {known}: "
            "choose one with --platform"
        )
    if not found:
        raise InvalidArchive("the archive holds no image")
    return name_images(found, wanted)


def _find_images(files: Files, wanted: Wanted) -> tuple[list[FoundImage], set[str]]:
    """Return the images for the wanted platform, and the platforms of the other images."""
    index, manifest = files.find("index.json"), files.find("manifest.json")
    if index is None and manifest is None:
        raise InvalidArchive(
            "the archive has neither index.json nor manifest.json: make an image archive with "
            "`docker save`, `podman save` or `skopeo copy`"
        )
    document = read_document(manifest, "manifest.json") if manifest else []
    if manifest and index is None and isinstance(document, dict):
        contents, root = open_directory(files, manifest, document, wanted.platform)
        image = contents.read_image(root)
        return [] if image is None else [FoundImage(image, [], [])], contents.other_platforms
    contents = open_layout(files, wanted.platform)
    found: list[FoundImage] = []
    if index is not None:
        # The manifests of several platforms become one image, unless one of them is selected.
        as_one, may_be_damaged = wanted.name is not None and wanted.select is None, wanted.select is not None
        found = read_layout(contents, index, as_one=as_one, may_be_damaged=may_be_damaged)
    found = _add_docker_images(files, found, document, wanted, contents.other_platforms)
    if wanted.select and (prefix := parse_digest_prefix(wanted.select)):
        found += find_children(contents, found, prefix)
    return found, contents.other_platforms


def _add_docker_images(
    files: Files, found: list[FoundImage], document: object, wanted: Wanted, other_platforms: set[str]
) -> list[FoundImage]:
    """Add to the images of index.json their names in manifest.json, and the images only listed there.

    Args:
        files: the files of the archive.
        found: the images in index.json.
        document: manifest.json.
        wanted: which images to import.
        other_platforms: this function adds the platforms of images that are not for the wanted platform.
    """
    entries: dict[str, list[dict[str, Any]]] = {}  # by the path of the config
    for entry in read_entries(document):
        entries.setdefault(entry["Config"], []).append(entry)
    covered = {blob.digest for item in found for blob in item.image.blobs}
    tags: dict[Digest, list[str]] = {}
    others: list[FoundImage] = []
    for path, named in entries.items():
        texts = [text for entry in named for text in read_repo_tags(entry)]
        try:
            config = read_config(files, path, covered)
            if config.digest in covered:
                tags.setdefault(config.digest, []).extend(texts)
            elif wanted.platform and config.platform and not is_for(config.platform, wanted.platform):
                other_platforms.add(config.platform)
            else:
                others += [
                    FoundImage(read_docker(files, entry["Layers"], config), read_repo_tags(entry), [])
                    for entry in named
                ]
        except DAMAGE_ERRORS as error:
            if wanted.select is None:
                raise
            others.append(FoundImage(ArchivedImage(None, []), texts, [], error))
    named_images = _add_repo_tags(found, tags)
    if wanted.name is None and wanted.select is None:
        _check_repo_tags(named_images, tags)
    return [*named_images, *others]


def _add_repo_tags(found: list[FoundImage], tags: dict[Digest, list[str]]) -> list[FoundImage]:
    """Add to the images of index.json their names in manifest.json, unless these are ambiguous.

    If both files have a name, the spelling of manifest.json is used, because Docker writes no registry there.

    Args:
        found: the images in index.json.
        tags: the names in manifest.json, by the digest of the config.
    """
    reached = Counter(digest for item in found for digest in {blob.digest for blob in item.image.blobs})
    spelled = {qualify(text): text for texts in tags.values() for text in texts}
    result = []
    for item in found:
        names = [spelled.get(qualify(text), text) for text in item.names]
        configs = [digest for digest in {blob.digest: None for blob in item.image.blobs} if digest in tags]
        names += [text for config in configs if reached[config] == 1 for text in tags[config]]
        # Docker writes the tag alone to index.json, and the whole name to manifest.json.
        whole = {text.rpartition(":")[2] for text in names}
        result.append(
            item._replace(names=list(dict.fromkeys(names)), tags=[tag for tag in item.tags if tag not in whole])
        )
    return result


def _check_repo_tags(found: list[FoundImage], tags: dict[Digest, list[str]]) -> None:
    """Raise `InvalidArchive` if a name in manifest.json fits several images, which have the same config."""
    known = {qualify(text) for item in found for text in item.names}
    for text in (text for texts in tags.values() for text in texts if qualify(text) not in known):
        raise InvalidArchive(
            f"manifest.json gives the name {shorten(text)} to several images in index.json, which have one config: "
            "choose one with --select DIGEST, and give NAME"
        )
