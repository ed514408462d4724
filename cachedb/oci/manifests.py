"""Manifests and indexes: what they say, which blobs they reach, and how one is made.

After the OCI image specification v1.1 (manifest.md, image-index.md, descriptor.md) and Docker's image
manifest version 2, schema 2. Everything here comes from strangers, so it is checked before it is used.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Container, Iterable, Iterator
from datetime import UTC, datetime
from itertools import compress
from typing import Any, Final, NamedTuple

from cachedb.errors import CacheError, InvalidDigest, InvalidManifest
from cachedb.oci.names import Digest, parse_digest, shorten

__all__ = [
    "Descriptor",
    "ImageConfig",
    "among",
    "build_manifest",
    "child",
    "choose",
    "descriptors",
    "host_platform",
    "is_compressed",
    "is_for",
    "load_json",
    "manifest_media_type",
    "parse_config",
    "platform_label",
    "root",
    "subject_of",
    "walk",
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

ROLES: Final = ("manifest", "index", "config", "layer", "other")
"""What a blob is to an image."""

DOCUMENT_LIMIT: Final = 4 * 1024 * 1024
"""The size in bytes over which a manifest, index or config is refused, as registries do."""

CONFIG_LIMIT: Final = 256 * 1024
"""Characters that the labels of one config, keys and values, may have in all, and so may its commands.

Of each, in the config's order, what does not fit beside what came before it is left out.
"""

_ARCHITECTURES = {"x86_64": "amd64", "i686": "386", "aarch64": "arm64", "armv7l": "arm/v7", "armv6l": "arm/v6"}
_SIZE_LIMIT = 16 * 1024**4  # bytes: no file is larger, and the sizes of all that an image names can be summed
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}")
_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,20})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)  # RFC 3339, 5.6
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # JSON can spell half a character, and SQL's text ends at a NUL
_PLATFORM_PART = re.compile(r"[A-Za-z0-9._-]{0,64}")  # it ends up in messages and beside a name


class Descriptor(NamedTuple):
    """What a manifest or index says of a blob (image specification, descriptor.md), and its role there."""

    digest: Digest
    size: int  # bytes
    media_type: str
    role: str
    platform: str | None = None  # os/architecture[/variant], of an index's child that has one


class ImageConfig(NamedTuple):
    """What an image's config says (image specification, config.md), as far as it can be understood."""

    architecture: str | None
    os: str | None
    variant: str | None
    created: datetime | None  # UTC
    author: str | None
    labels: dict[str, str]
    layers: list[tuple[Digest | None, str | None]]  # of each layer its diff id, and the command that made it


def load_json(data: bytes, what: str, error: type[CacheError] = InvalidManifest) -> Any:  # noqa: ANN401
    """Parse JSON that a stranger wrote.

    Args:
        data: the document's bytes.
        what: how to call the document in an error.
        error: the class to raise.

    Raises:
        error: if the document is over 4 MiB, or is not JSON as RFC 8259 has it.
    """
    if len(data) > DOCUMENT_LIMIT:
        raise error(f"{what} is {len(data)} bytes; more than {DOCUMENT_LIMIT} are refused")
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise error(f"{what} is nested too deep") from None
    except ValueError as problem:  # JSONDecodeError, UnicodeDecodeError, integers of thousands of digits
        raise error(f"{what} is not JSON: {shorten(str(problem))}") from problem


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def check_media_type(value: object, what: str) -> str:
    """Return ``value`` if it is a media type (RFC 6838, section 4.2), else raise `InvalidManifest`."""
    if not isinstance(value, str) or not _MEDIA_TYPE.fullmatch(value):
        raise InvalidManifest(f"{what} has {shorten(value)} as its media type")
    return value


def is_compressed(media_type: str) -> bool:
    """Say whether a layer of this media type is compressed."""
    return media_type.endswith(("gzip", "zstd"))


def role_of(media_type: str) -> str:
    """Return the role that a blob of this media type has where an index or an archive names it."""
    if media_type in INDEX_TYPES:
        return "index"
    return "manifest" if media_type in MANIFEST_TYPES else "other"


def manifest_media_type(data: bytes, declared: str | None = None) -> str:
    """Return the media type of a manifest or index.

    Args:
        data: the manifest's exact bytes.
        declared: what a descriptor, a header or a caller says it is, if anything does.

    Raises:
        InvalidManifest: if it is neither an image manifest nor an index, or says something else of itself.
    """
    return _media_type(load_json(data, "the manifest"), declared)


def _media_type(document: object, declared: str | None) -> str:
    if not isinstance(document, dict):
        raise InvalidManifest("the manifest is not a JSON object")
    own = document.get("mediaType")
    if own is not None and not isinstance(own, str):
        raise InvalidManifest(f"the manifest has {shorten(own)} as its media type")
    if own is not None and declared is not None and own != declared:
        raise InvalidManifest(f"the manifest says it is {shorten(own)}, and was said to be {shorten(declared)}")
    # OCI leaves the field optional; then the shape tells (manifest.md and image-index.md, "mediaType").
    kind = own if own is not None else declared or (OCI_INDEX if "manifests" in document else OCI_MANIFEST)
    if kind not in MANIFEST_TYPES | INDEX_TYPES:
        raise InvalidManifest(
            f"{shorten(kind)} is not a manifest that can be kept: "
            "OCI manifests and indexes and Docker's schema 2 are; convert it, with skopeo for instance"
        )
    return kind


def descriptors(data: bytes, media_type: str, what: str = "the manifest") -> list[Descriptor]:
    """Return what a manifest or index names, in its order: the config first, then the layers.

    Args:
        data: the manifest's exact bytes.
        media_type: what it is, as `manifest_media_type` has it.
        what: how to call it in an error.

    Raises:
        InvalidManifest: if it is not what its media type says.
    """
    return _descriptors(load_json(data, what), media_type, what)


def _descriptors(document: object, media_type: str, what: str) -> list[Descriptor]:
    if not isinstance(document, dict) or document.get("schemaVersion") != 2:
        raise InvalidManifest(f"{what} is not an object with schemaVersion 2")
    if media_type in INDEX_TYPES:
        if "config" in document or "layers" in document:
            raise InvalidManifest(f"{what} is an index, and has a manifest's config or layers")
        return [child(entry, what) for entry in _list(document, "manifests", what)]
    if "manifests" in document:
        raise InvalidManifest(f"{what} is an image manifest, and has an index's manifests")
    config = _descriptor(document.get("config"), "config", f"the config in {what}")
    return [
        config,
        *(_descriptor(layer, "layer", f"a layer in {what}") for layer in _list(document, "layers", what)),
    ]


def _list(document: dict[str, Any], key: str, what: str) -> list[Any]:
    value = document.get(key)
    if not isinstance(value, list):
        raise InvalidManifest(f"{what} has no list of {key}")
    return value


def _descriptor(value: object, role: str, what: str) -> Descriptor:
    if not isinstance(value, dict):
        raise InvalidManifest(f"{what} is not a descriptor")
    size = value.get("size")
    if type(size) is not int or not 0 <= size <= _SIZE_LIMIT:
        raise InvalidManifest(f"{what} has {shorten(size)} as its size")
    try:
        digest = parse_digest(value.get("digest", ""))
    except InvalidDigest as error:
        raise InvalidManifest(f"{what}: {error}") from error
    return Descriptor(digest, size, check_media_type(value.get("mediaType"), what), role)


def child(value: object, what: str) -> Descriptor:
    """Return an entry of an index as a descriptor, with the platform it is for (image-index.md)."""
    child = _descriptor(value, "other", f"an entry of {what}")
    assert isinstance(value, dict)
    return child._replace(role=role_of(child.media_type), platform=platform_label(value.get("platform")))


def root(digest: Digest, size: int, media_type: str) -> Descriptor:
    """Return a manifest or index as a descriptor, without one that names it."""
    return Descriptor(digest, size, media_type, role_of(media_type))


def subject_of(data: bytes) -> Digest | None:
    """Return the digest of the manifest that a manifest or index refers to as its subject (manifest.md, "subject")."""
    try:
        return parse_digest(load_json(data, "the manifest")["subject"]["digest"])
    except (InvalidManifest, InvalidDigest, LookupError, TypeError):
        return None


def platform_label(said: object) -> str | None:
    """Return ``os/architecture[/variant]`` of an index's platform, or of a config, which has the same fields."""
    if not isinstance(said, dict):
        return None
    parts = [said.get(key) or "" for key in ("os", "architecture", "variant")]
    if not all(isinstance(part, str) and _PLATFORM_PART.fullmatch(part) for part in parts):
        return None
    return "/".join(part for part in parts if part) or None


def host_platform() -> str:
    """Return the host's platform in the words of images, which are Go's."""
    machine = platform.machine().lower()
    return f"linux/{_ARCHITECTURES.get(machine, machine)}"


def is_for(label: str | None, wanted: str) -> bool:
    """Say whether a platform is the one asked for; the variant may be left out, and v8 is arm64's own."""
    return f"{label}/".startswith(f"{wanted.removesuffix('/v8')}/")


def choose(children: list[Descriptor], wanted: str) -> list[Descriptor]:
    """Return the first of an index's children that is for a platform; if none is, those that do not say what for."""
    first = next((child for child in children if is_for(child.platform, wanted)), None)
    return [child for child in children if child is first or (first is None and child.platform is None)]


def walk(
    root: Descriptor,
    read: Callable[[Descriptor], bytes | None],
    choose: Callable[[list[Descriptor]], list[Descriptor]] | None = None,
) -> Iterator[Descriptor]:
    """Yield the closure of a manifest or index: itself, then all it reaches, each manifest once expanded.

    Args:
        root: the manifest to begin with.
        read: returns a manifest's bytes, or None where they are not at hand; what it names is then left out.
        choose: returns those of an index's children that are wanted; all of them unless given.

    Raises:
        InvalidManifest: if one of the manifests is not what its media type says.
    """
    stack, expanded = [root], set[Digest]()
    while stack:
        blob = stack.pop()
        yield blob
        if blob.role not in ("manifest", "index") or blob.digest in expanded:
            continue
        expanded.add(blob.digest)
        data = read(blob)
        if data is not None:
            document = load_json(data, "the manifest")
            _media_type(document, blob.media_type)
            named = _descriptors(document, blob.media_type, f"manifest {blob.digest}")
            stack.extend(reversed(choose(named) if choose and blob.role == "index" else named))


def among(digests: Container[Digest]) -> Callable[[list[Descriptor]], list[Descriptor]]:
    """Return a choice for `walk`: of an index's children those that are among the digests, or all if none is."""
    return lambda children: [child for child in children if child.digest in digests] or children


def parse_config(data: bytes, text_limit: int) -> ImageConfig:
    """Return what an image's config says; what is not as the specification has it, or over `CONFIG_LIMIT`, is left out.

    Args:
        data: the config's bytes.
        text_limit: the number of characters over which a text is left out.

    Raises:
        InvalidManifest: if it is not a JSON object.
    """
    document = load_json(data, "the config")
    if not isinstance(document, dict):
        raise InvalidManifest("the config is not a JSON object")

    def text(value: object, limit: int = text_limit) -> str | None:
        if not isinstance(value, str) or not 0 < len(value) <= limit or _NO_TEXT.search(value):
            return None
        return value

    def platform_part(key: str) -> str | None:
        value = document.get(key)
        return value if isinstance(value, str) and value and _PLATFORM_PART.fullmatch(value) else None

    labels = [
        (key, value)
        for key, value in _object(_object(document.get("config")).get("Labels")).items()
        if text(key) and (value == "" or text(value)) and isinstance(value, str)
    ]
    diff_ids = [_diff_id(value) for value in _entries(_object(document.get("rootfs")).get("diff_ids"))]
    history = [_object(entry) for entry in _entries(document.get("history"))]
    commands = [text(entry.get("created_by")) for entry in history if entry.get("empty_layer") is not True]
    if len(commands) != len(diff_ids):
        commands = [None] * len(diff_ids)  # it is not known which made which
    fitting = _fitting(len(command or "") for command in commands)
    commands = [command if fits else None for command, fits in zip(commands, fitting, strict=True)]
    return ImageConfig(
        architecture=platform_part("architecture"),
        os=platform_part("os"),
        variant=platform_part("variant"),
        created=_time(document.get("created")),
        author=text(document.get("author")),
        labels=dict(compress(labels, _fitting(len(key) + len(value) for key, value in labels))),
        layers=list(zip(diff_ids, commands, strict=True)),
    )


def _fitting(lengths: Iterable[int]) -> Iterator[bool]:
    """Say of each text whether it is within `CONFIG_LIMIT` together with those before it that are."""
    left = CONFIG_LIMIT
    for length in lengths:
        yield length <= left
        if length <= left:
            left -= length


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _entries(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _diff_id(value: object) -> Digest | None:
    try:
        return parse_digest(value)  # type: ignore[arg-type]
    except InvalidDigest:
        return None


def _time(value: object) -> datetime | None:
    """Return a time of RFC 3339 in UTC; the year 1 is what Go writes for none."""
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        return None
    try:
        time = datetime.fromisoformat(value.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return time if time.year > 1 else None


def build_manifest(config: Descriptor, layers: list[Descriptor]) -> bytes:
    """Make the manifest of an image that came without one; the same image gives the same bytes, always."""

    def entry(blob: Descriptor) -> dict[str, object]:
        return {"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size}

    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": entry(config),
        "layers": [entry(layer) for layer in layers],
    }
    return json.dumps(document, separators=(",", ":")).encode()
