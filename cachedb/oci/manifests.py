"""Parse, check and build manifests and indexes.

They follow the OCI image specification v1.1 (manifest.md, image-index.md, descriptor.md) and Docker's image manifest
version 2, schema 2. All input is untrusted, so it is checked before it is used.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, Literal, NamedTuple

from cachedb.errors import CacheError, InvalidDigest, InvalidManifest
from cachedb.oci.digests import Digest, parse_digest
from cachedb.oci.platforms import platform_label
from cachedb.text import shorten

__all__ = [
    "CONFIG_TYPES",
    "DOCKER_CONFIG",
    "DOCKER_LIST",
    "DOCKER_MANIFEST",
    "DOCUMENT_LIMIT",
    "INDEX_TYPES",
    "MANIFEST_TYPES",
    "OCI_CONFIG",
    "OCI_INDEX",
    "OCI_LAYER",
    "OCI_MANIFEST",
    "ROLES",
    "Descriptor",
    "Role",
    "artifact_type",
    "build_index",
    "build_manifest",
    "check_document_size",
    "check_media_type",
    "descriptors",
    "find_compression",
    "is_compressed",
    "load_json",
    "manifest_media_type",
    "parse_entry",
    "read_descriptors",
    "read_media_type",
    "read_subject",
    "replace_entry",
    "role_of",
    "root_descriptor",
    "subject_of",
]


OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
OCI_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
DOCKER_CONFIG: Final = "application/vnd.docker.container.image.v1+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"

CONFIG_TYPES: Final = frozenset({OCI_CONFIG, DOCKER_CONFIG})
MANIFEST_TYPES: Final = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
INDEX_TYPES: Final = frozenset({OCI_INDEX, DOCKER_LIST})

Role = Literal["manifest", "index", "config", "layer", "other"]
ROLES: Final = ("manifest", "index", "config", "layer", "other")
"""The roles a blob can have in an image."""

DOCUMENT_LIMIT: Final = 4 * 1024 * 1024
"""The largest accepted manifest, index or config in bytes; registries have the same limit."""
_DEPTH_LIMIT = 256  # lists and objects in one another; a caller's stack must not decide whether a document is valid
_SIZE_LIMIT = 16 * 1024**4  # bytes: no file is larger, and sums of sizes stay within 64 bits
_UNKNOWN_TYPE = "application/octet-stream"  # for content of an unknown type (RFC 2046, section 4.5.1)
_MEDIA_TYPE = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}(?:[ \t]*;[ -~]{0,255})?"
)


class Descriptor(NamedTuple):
    """A reference to a blob in a manifest or index (image specification, descriptor.md), and its role."""

    digest: Digest
    size: int  # bytes
    media_type: str
    role: str
    platform: str | None = None  # os/architecture[/variant], if an index states it
    urls: tuple[str, ...] = ()  # other places to download the blob from

    @property
    def is_document(self) -> bool:
        """Whether it is a manifest or index, which references other blobs."""
        return self.role in ("manifest", "index")

    @property
    def is_foreign(self) -> bool:
        """Whether it is a foreign layer: it has URLs, so that a registry or an archive may lack it.

        Its media type is one of layer.md, "Non-Distributable Layers", or Docker's type of a foreign layer.
        """
        is_foreign_type = ".nondistributable." in self.media_type or ".foreign." in self.media_type
        return self.role == "layer" and bool(self.urls) and is_foreign_type


def load_json(data: bytes, what: str, error: type[CacheError] = InvalidManifest) -> Any:  # noqa: ANN401
    """Parse untrusted JSON.

    Args:
        data: the document's bytes.
        what: the name of the document in errors.
        error: the class of the errors.

    Raises:
        error: if the document is larger than 4 MiB, is not valid JSON (RFC 8259), or is nested over 256 levels deep.
    """
    check_document_size(len(data), what, error)
    try:
        document = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise error(f"{what} is nested too deeply") from None
    except ValueError as problem:  # JSONDecodeError, UnicodeDecodeError, integers of thousands of digits
        raise error(f"{what} is not JSON: {shorten(str(problem))}") from problem
    if data.count(b"[") + data.count(b"{") > _DEPTH_LIMIT and _is_too_deep(document):
        raise error(f"{what} is nested too deeply")
    return document


def _is_too_deep(document: object) -> bool:
    level = [document]
    for _ in range(_DEPTH_LIMIT):
        level = [
            child
            for value in level
            if isinstance(value, (dict, list))
            for child in (value.values() if isinstance(value, dict) else value)
        ]
    return any(isinstance(value, (dict, list)) for value in level)


def check_document_size(size: int, what: str, error: type[CacheError] = InvalidManifest) -> None:
    """Raise ``error`` if a manifest, index or config has too many bytes."""
    if size > DOCUMENT_LIMIT:
        raise error(f"{what} is {size} bytes: more than {DOCUMENT_LIMIT} are refused")


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def check_media_type(value: object, what: str) -> str:
    """Return ``value`` if it is a media type, which may have parameters, else raise `InvalidManifest`.

    RFC 6838, section 4.2, defines media types, and RFC 2045, section 5.1, their parameters.
    """
    if not isinstance(value, str) or not _MEDIA_TYPE.fullmatch(value):
        raise InvalidManifest(f"{what} has the invalid media type {shorten(value)}")
    return value


def is_compressed(media_type: str) -> bool:
    """Return whether a layer of this media type is compressed."""
    return find_compression(media_type) is not None


def find_compression(media_type: str) -> str | None:
    """Return the compression that a layer's media type names, ``gzip`` or ``zstd``, or None."""
    kind = media_type.partition(";")[0].rstrip()
    return next((name for name in ("gzip", "zstd") if kind.endswith(name)), None)


def role_of(media_type: str) -> str:
    """Return the role of a blob of this media type that an index or archive references."""
    if media_type in INDEX_TYPES:
        return "index"
    return "manifest" if media_type in MANIFEST_TYPES else "other"


def manifest_media_type(data: bytes, declared: str | None = None) -> str:
    """Return the media type of a manifest or index.

    Args:
        data: the manifest's exact bytes.
        declared: the media type given by a descriptor, a header or a caller, if any.

    Raises:
        InvalidManifest: if the document is neither an image manifest nor an index, or contradicts ``declared``.
    """
    return read_media_type(load_json(data, "the manifest"), declared)


def read_media_type(document: object, declared: str | None) -> str:
    """Return the media type of a parsed manifest or index; see `manifest_media_type`."""
    if not isinstance(document, dict):
        raise InvalidManifest("the manifest is not a JSON object")
    own = document.get("mediaType")
    if own is not None and not isinstance(own, str):
        raise InvalidManifest(f"the manifest has the invalid media type {shorten(own)}")
    if own is not None and declared is not None and own != declared:
        raise InvalidManifest(f"the manifest has media type {shorten(own)}, but was declared as {shorten(declared)}")
    # OCI makes the field optional; then the fields decide (manifest.md and image-index.md, "mediaType").
    kind = own if own is not None else declared or (OCI_INDEX if "manifests" in document else OCI_MANIFEST)
    if kind not in MANIFEST_TYPES | INDEX_TYPES:
        raise InvalidManifest(
            f"a manifest of type {shorten(kind)} cannot be stored: "
            "convert it to OCI or Docker schema 2, for example with skopeo"
        )
    return kind


def descriptors(data: bytes, media_type: str, what: str = "the manifest") -> list[Descriptor]:
    """Return the descriptors in a manifest (the config, then the layers) or in an index, in order.

    Args:
        data: the manifest's exact bytes.
        media_type: the manifest's media type, from `manifest_media_type`.
        what: the name of the manifest in errors.

    Raises:
        InvalidManifest: if the manifest does not match its media type.
    """
    return read_descriptors(load_json(data, what), media_type, what)


def read_descriptors(document: object, media_type: str, what: str) -> list[Descriptor]:
    """Return the descriptors in a parsed manifest or index; see `descriptors`."""
    if not isinstance(document, dict) or document.get("schemaVersion") != 2:
        raise InvalidManifest(f"{what} is not an object with schemaVersion 2")
    if media_type in INDEX_TYPES:
        if "config" in document or "layers" in document:
            raise InvalidManifest(f"{what} is an index, but has config or layers")
        return [parse_entry(entry, what) for entry in _get_list(document, "manifests", what)]
    if "manifests" in document:
        raise InvalidManifest(f"{what} is an image manifest, but has manifests")
    config = _parse_descriptor(document.get("config"), "config", f"the config in {what}")
    return [
        config,
        *(_parse_descriptor(layer, "layer", f"a layer in {what}") for layer in _get_list(document, "layers", what)),
    ]


def _get_list(document: dict[str, Any], key: str, what: str) -> list[Any]:
    value = document.get(key)
    if value is None and key in document:
        return []  # Go writes null for an empty list
    if not isinstance(value, list):
        raise InvalidManifest(f"{what} has no list of {key}")
    return value


def _parse_descriptor(value: object, role: str, what: str) -> Descriptor:
    if not isinstance(value, dict):
        raise InvalidManifest(f"{what} is not a descriptor")
    size = value.get("size")
    if type(size) is not int or not 0 <= size <= _SIZE_LIMIT:
        raise InvalidManifest(f"{what} has the invalid size {shorten(size)}")
    try:
        digest = parse_digest(value.get("digest", ""))
    except InvalidDigest as error:
        raise InvalidManifest(f"{what}: {error}") from error
    urls = value.get("urls")
    texts = tuple(url for url in urls if isinstance(url, str)) if isinstance(urls, list) else ()
    return Descriptor(digest, size, _read_content_type(value.get("mediaType"), what), role, urls=texts)


def _read_content_type(value: object, what: str) -> str:
    """Return the media type in a descriptor, or a general one if it is empty or odd.

    The role of the content follows from its place in the manifest. Podman, skopeo and containerd also accept layers
    with an empty or odd media type.
    """
    if value is not None and not isinstance(value, str):
        raise InvalidManifest(f"{what} has the invalid media type {shorten(value)}")
    return value if value and _MEDIA_TYPE.fullmatch(value) else _UNKNOWN_TYPE


def parse_entry(value: object, what: str) -> Descriptor:
    """Return an entry of an index as a descriptor with its platform (image-index.md)."""
    child = _parse_descriptor(value, "other", f"an entry of {what}")
    assert isinstance(value, dict)
    return child._replace(role=role_of(child.media_type), platform=platform_label(value.get("platform")))


def root_descriptor(digest: Digest, size: int, media_type: str) -> Descriptor:
    """Return the descriptor of a manifest or index that nothing else references."""
    return Descriptor(digest, size, media_type, role_of(media_type))


def subject_of(data: bytes) -> Digest | None:
    """Return the digest of the subject of a manifest or index (manifest.md, "subject"), or None."""
    try:
        return read_subject(load_json(data, "the manifest"))
    except InvalidManifest:
        return None


def read_subject(document: Any) -> Digest | None:  # noqa: ANN401
    """Return the digest of the subject of a parsed manifest or index; see `subject_of`."""
    try:
        return parse_digest(document["subject"]["digest"])
    except (InvalidDigest, LookupError, TypeError):
        return None


def artifact_type(document: dict[str, Any]) -> str | None:
    """Return the artifact type of a manifest or index, as lists of referrers state it; None without.

    It is the type of the config if the manifest states none (distribution specification v1.1, "Listing Referrers").
    """
    config = document.get("config")
    kinds = (document.get("artifactType"), config.get("mediaType") if isinstance(config, dict) else None)
    return next((kind for kind in kinds if isinstance(kind, str) and kind), None)


def build_manifest(config: Descriptor, layers: list[Descriptor]) -> bytes:
    """Build a manifest for an image that has none; the same config and layers give the same bytes."""

    def entry(blob: Descriptor) -> dict[str, object]:
        return {"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size}

    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": entry(config),
        "layers": [entry(layer) for layer in layers],
    }
    return json.dumps(document, separators=(",", ":")).encode()


def replace_entry(entry: dict[str, Any], child: Descriptor) -> dict[str, Any]:
    """Return an entry of a manifest or index for a child that replaces the one it lists.

    The content that the entry embeds is that of the old child, so it is left out.
    """
    kept = {key: value for key, value in entry.items() if key != "data" or entry["digest"] == child.digest}
    return {**kept, "mediaType": child.media_type, "digest": child.digest, "size": child.size}


def build_index(entries: list[dict[str, Any]]) -> bytes:
    """Build an index from its entries; the same entries give the same bytes."""
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    return json.dumps(document, separators=(",", ":")).encode()
