"""Read a docker-archive: https://github.com/moby/docker-image-spec"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, NamedTuple

from cachedb import oci
from cachedb.errors import CacheError, DigestMismatch, InvalidArchive
from cachedb.oci.digests import Digest, digest_of, parse_digest, split_digest
from cachedb.oci.manifests import load_json
from cachedb.text import shorten
from cachedb.transports.archive.compression import MAGIC_LENGTH, detect_compression
from cachedb.transports.archive.files import Files, Section
from cachedb.transports.archive.model import ArchivedBlob, ArchivedImage, check_image_count, read_small

__all__ = ["Config", "read_config", "read_docker", "read_entries", "read_repo_tags"]


def read_entries(entries: object) -> list[dict[str, Any]]:
    """Check a parsed manifest.json, and return its entries, one for each image."""
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise InvalidArchive("manifest.json is not a list of images")
    check_image_count(entries)
    for entry in entries:
        if isinstance(entry, dict) and "Layers" in entry and entry["Layers"] is None:
            entry["Layers"] = []  # Docker writes null for an image without layers
        layers = entry.get("Layers") if isinstance(entry, dict) else None
        texts = [entry.get("Config"), *layers] if isinstance(layers, list) else [None]
        tags = (entry.get("RepoTags") or []) if isinstance(entry, dict) else None
        if not isinstance(tags, list) or not all(isinstance(text, str) for text in [*texts, *tags]):
            raise InvalidArchive("manifest.json has an entry with a missing or invalid Config, Layers or RepoTags")
    return entries


def read_repo_tags(entry: dict[str, Any]) -> list[str]:
    """Return the names in an entry of manifest.json, unparsed."""
    return [text for text in entry.get("RepoTags") or [] if text not in ("", "<none>:<none>")]


def _find_required(files: Files, name: str) -> Section:
    section = files.find(name)
    if section is None:
        raise InvalidArchive(
            f"{shorten(name)} is named in manifest.json, but is not in the archive: save the image again"
        )
    return section


class Config(NamedTuple):
    """A config in the archive; several entries of manifest.json may name it."""

    digest: Digest
    blob: ArchivedBlob
    diff_ids: object = None  # of the layers, unchecked; None if the config has none
    platform: str | None = None


def read_config(files: Files, path: str, known: Container[Digest | None]) -> Config:
    """Return the config at a path in the archive; a config whose digest is known is not parsed."""
    section = _find_required(files, path)
    data = read_small(section, "the config", InvalidArchive)
    digest = digest_of(data)
    blob = ArchivedBlob(section, "the config", len(data), digest, oci.OCI_CONFIG, "config")
    if digest in known:
        return Config(digest, blob)
    config = load_json(data, "the config", InvalidArchive)
    # Docker names the config's file by its digest. If the name is a digest, it must match.
    stem = path.rpartition("/")[2].removesuffix(".json").removeprefix("sha256:")
    if len(stem) == 64 and set(stem) <= set("0123456789abcdef") and stem != split_digest(digest)[1]:
        raise DigestMismatch(f"the config {shorten(path)} has digest {digest}")
    rootfs = config.get("rootfs") if isinstance(config, dict) else None
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    return Config(digest, blob, diff_ids, oci.platform_label(config))


def read_docker(files: Files, layers: list[str], config: Config) -> ArchivedImage:
    """Return the image of a config and the layers at these paths in the archive."""
    diff_ids = [] if config.diff_ids is None and not layers else config.diff_ids
    if not isinstance(diff_ids, list) or len(diff_ids) != len(layers):
        raise InvalidArchive("the config (rootfs.diff_ids) and manifest.json have different numbers of layers")
    blobs = [config.blob]
    for name, diff_id in zip(layers, diff_ids, strict=True):
        try:
            expected = parse_digest(diff_id)
        except CacheError as error:
            raise InvalidArchive(f"the config's diff id {error}") from error
        layer, what = _find_required(files, name), f"layer {shorten(name)}"
        compression = detect_compression(layer.head(MAGIC_LENGTH))
        if compression is None:
            blobs.append(ArchivedBlob(layer, what, layer.size, expected, oci.OCI_LAYER, "layer"))
        elif compression in ("gzip", "zstd"):
            media_type = f"{oci.OCI_LAYER}+{compression}"
            blobs.append(ArchivedBlob(layer, what, layer.size, None, media_type, "layer", (compression, expected)))
        else:
            raise InvalidArchive(f"{what} is compressed with {compression}: use gzip, zstd or no compression")
    return ArchivedImage(None, blobs)
