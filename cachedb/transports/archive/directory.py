"""Read an image in the directory format of skopeo's ``dir:`` and podman's ``docker-dir``.

The folder has the manifest as ``manifest.json``, and each blob as a file named by the hex part of its digest.
https://github.com/containers/image/blob/main/docs/containers-transports.5.md
"""

from __future__ import annotations

from cachedb import oci
from cachedb.disk.waiting import LOG
from cachedb.errors import InvalidArchive, InvalidManifest
from cachedb.oci.digests import digest_of, split_digest
from cachedb.oci.manifests import Descriptor, read_media_type
from cachedb.transports.archive.contents import Contents
from cachedb.transports.archive.files import Files, Section
from cachedb.transports.archive.model import read_small

__all__ = ["open_directory"]


_VERSION = b"Directory Transport Version: 1."


def open_directory(
    files: Files, manifest: Section, document: object, platform: str | None
) -> tuple[Contents, Descriptor]:
    """Return the blobs of the folder and its manifest or index, after a check of its version.

    Args:
        files: the files of the folder.
        manifest: manifest.json.
        document: manifest.json, parsed.
        platform: the only platform to import; None for all.
    """
    version = files.find("version")
    if version is None or not version.head(len(_VERSION)).startswith(_VERSION):
        raise InvalidArchive(
            "the folder has a manifest, but no file `version` of Directory Transport Version 1.x: copy the folder whole"
        )
    if files.find("signature-1") is not None:
        LOG.warning("not imported: the signatures in the folder (signature-1, ...)")
    data = read_small(manifest, "manifest.json", InvalidManifest)
    root = oci.root_descriptor(digest_of(data), len(data), read_media_type(document, None))

    def find(blob: Descriptor) -> Section | None:
        if blob.digest == root.digest:
            return manifest
        encoded = split_digest(blob.digest)[1]
        return files.find(f"{encoded}.manifest.json" if blob.is_document else encoded)

    return Contents(find, platform, has_end=files.has_end), root
