"""Images in archives: docker-archive, OCI archive, and OCI image layout folder.

A reader finds what is in an archive without copying anything: images with their names, and for each the
content it needs, as sections of files. Nothing here writes to the cache. Archives come from strangers: every
name, link, size and document is checked, and an archive with anything odd in it is refused whole.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from cachedb.errors import CacheError, DigestMismatch, InvalidArchive, InvalidManifest, InvalidName
from cachedb.oci import manifests
from cachedb.oci.manifests import Descriptor, load_json
from cachedb.oci.names import Digest, Name, digest_of, parse_digest, shorten, split_digest
from cachedb.transports.archive.files import MAGIC_LENGTH, Decompressor, Files, Section, UnpackLimit, compression_of

__all__ = ["ArchivedBlob", "ArchivedImage", "DiffId", "layout_path", "read_images"]


REF_NAME = "org.opencontainers.image.ref.name"  # image specification, annotations.md
CONTAINERD_NAME = "io.containerd.image.name"  # containerd's and Docker's: the full name

_ROWS_LIMIT = 100_000  # blobs in an archive's images, counted once for each name that an image has
_IMAGES_LIMIT = 1000


class DiffId:
    """Computes a compressed layer's diff id as its bytes pass: the digest of what they hold (config.md)."""

    def __init__(self, compression: str, expected: Digest, what: str, limit: UnpackLimit) -> None:
        self._decompressor = Decompressor(compression)
        self._hasher = hashlib.new(split_digest(expected)[0])
        self._expected, self._what, self._limit = expected, what, limit

    def update(self, data: memoryview, /) -> None:
        """Take the next compressed bytes."""
        for part in self._decompressor.feed(data):
            self._limit.add(len(part))
            self._hasher.update(part)

    def check(self) -> None:
        """Raise `DigestMismatch` if the layer is not the one that the config names."""
        if not self._decompressor.ended:
            raise InvalidArchive(f"{self._what} is cut short")
        if f"{self._hasher.name}:{self._hasher.hexdigest()}" != self._expected:
            raise DigestMismatch(f"{self._what} does not hold what the config says, {self._expected}")


class ArchivedBlob(NamedTuple):
    """A blob in an archive."""

    section: Section
    what: str  # how to call it in an error
    size: int  # bytes it must have
    digest: Digest | None  # that it must have; None for a compressed layer of a docker-archive
    media_type: str
    diff_id: tuple[str, Digest] | None = None  # a compressed layer's compression and diff id

    @property
    def key(self) -> object:
        """What is the same for the same content."""
        return self.digest or self.section.place


class ArchivedImage(NamedTuple):
    """An image in an archive."""

    names: list[Name]
    root: Descriptor | None  # the manifest or index; None in a docker-archive, which has none
    blobs: list[ArchivedBlob]  # the closure; of a docker-archive the config, then the layers

    @property
    def identity(self) -> object:
        """What is the same for the same image: the manifest's digest; where there is none, all blobs."""
        return self.root.digest if self.root else tuple(blob.key for blob in self.blobs)

    def manifest(self, digests: list[Digest]) -> bytes:
        """Make the manifest that a docker-archive lacks, from its blobs' digests."""
        config, *layers = (
            Descriptor(digest, blob.size, blob.media_type, "layer")
            for blob, digest in zip(self.blobs, digests, strict=True)
        )
        return manifests.build_manifest(config, layers)


def layout_path(digest: Digest) -> str:
    """Return where a blob lies in an image layout (image-layout.md, "Blobs")."""
    algorithm, encoded = split_digest(digest)
    return f"blobs/{algorithm}/{encoded}"


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
        found = _read_layout(files, index, _repo_tags(files, docker) if docker else {})
    elif docker is not None:
        found = [(entry.get("RepoTags") or [], _read_docker(files, entry)) for entry in _entries(docker)]
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
    _check_rows(sum(len(image.names) * len(image.blobs) for image in images))


def _check_rows(count: int) -> None:
    if count > _ROWS_LIMIT:
        raise InvalidArchive(f"the images in the archive have more than {_ROWS_LIMIT} blobs")


def _check_number(images: list[Any]) -> None:
    if len(images) > _IMAGES_LIMIT:
        raise InvalidArchive(f"the archive holds {len(images)} images; more than {_IMAGES_LIMIT} are refused")


_Found = tuple[list[object], ArchivedImage]
"""An image with the names it is given in the archive, as they stand there."""


def _document(section: Section, what: str, error: type[CacheError] = InvalidArchive) -> Any:  # noqa: ANN401
    return load_json(_read_small(section, what, error), what, error)


def _read_small(section: Section, what: str, error: type[CacheError]) -> bytes:
    if section.size > manifests.DOCUMENT_LIMIT:
        raise error(f"{what} is {section.size} bytes; more than {manifests.DOCUMENT_LIMIT} are refused")
    return section.head(section.size)


def _parse_names(texts: Iterable[object]) -> list[Name]:
    names = []
    for text in texts:
        try:
            names.append(Name.parse(text))  # type: ignore[arg-type]
        except InvalidName as error:
            raise InvalidArchive(f"a name in the archive is invalid: {error}; give another as NAME") from error
    return list(dict.fromkeys(names))


# The OCI side: image-layout.md.


def _read_layout(files: Files, section: Section, tags: dict[Digest, list[object]]) -> list[_Found]:
    layout = files.find("oci-layout")
    if layout is not None:
        version = _document(layout, "oci-layout")
        if not isinstance(version, dict) or not str(version.get("imageLayoutVersion")).startswith("1."):
            raise InvalidArchive("oci-layout names no version 1.x of the image layout")
    index = _document(section, "index.json")
    entries = index.get("manifests") if isinstance(index, dict) else None
    if not isinstance(entries, list):
        raise InvalidArchive("index.json is not an image index: it has no list of manifests")
    _check_number(entries)
    names: dict[Digest, list[object]] = {}
    roots: dict[Digest, Descriptor] = {}
    for entry in entries:
        if not isinstance(entry, dict):
            raise InvalidArchive("index.json has an entry that is not a descriptor")
        if "mediaType" not in entry:
            entry = {**entry, "mediaType": manifests.OCI_MANIFEST}
        root = manifests.child(entry, "index.json")
        if root.role == "other":
            raise InvalidManifest(f"index.json names a {shorten(root.media_type)}, which is not an image")
        roots[root.digest] = root
        annotations = entry.get("annotations")
        if isinstance(annotations, dict) and (name := _annotated_name(annotations)):
            names.setdefault(root.digest, []).append(name)
    images = []
    rows = 0
    for root in roots.values():
        closure = _closure(files, root)
        rows += len(closure)
        _check_rows(rows)
        blobs = [_layout_blob(files, blob) for blob in dict.fromkeys(closure)]
        images.append(ArchivedImage([], root, blobs))
    # Some tools list the platforms of an index beside it: without a name they are no images of their own.
    below = {blob.digest for image in images for blob in image.blobs[1:]}
    named = zip(_names_of(images, names, tags), images, strict=True)
    return [(texts, image) for texts, image in named if texts or image.identity not in below]


def _names_of(
    images: list[ArchivedImage], annotated: dict[Digest, list[object]], tags: dict[Digest, list[object]]
) -> list[list[object]]:
    """Return each image's names: as manifest.json has them, if it is clear which it means, else as index.json."""
    reached = Counter(digest for image in images for digest in {blob.digest for blob in image.blobs})
    short = {_qualified(text): text for texts in tags.values() for text in texts}
    found = []
    for image in images:
        digests = [blob.digest for blob in image.blobs if blob.digest]
        configs = [digest for digest in dict.fromkeys(digests) if digest in tags]
        tagged = [text for config in configs for text in tags[config]]
        if tagged and all(reached[config] == 1 for config in configs):
            found.append(tagged)
        else:
            found.append([short.get(_qualified(text), text) for text in annotated.get(digests[0], [])])
    return found


def _qualified(text: object) -> object:
    try:
        return Name.parse(text).qualified()  # type: ignore[arg-type]
    except InvalidName:
        return text


def _annotated_name(annotations: dict[str, Any]) -> object:
    """Return the name that a tool gave: in ref.name skopeo and podman write all of it, Docker only the tag."""
    reference, full = annotations.get(REF_NAME), annotations.get(CONTAINERD_NAME)
    if isinstance(reference, str) and (full is None or ":" in reference or "/" in reference):
        return reference
    return full


def _closure(files: Files, root: Descriptor) -> list[Descriptor]:
    def read(blob: Descriptor) -> bytes:
        found = _layout_blob(files, blob)
        data = _read_small(found.section, found.what, InvalidManifest)
        if len(data) != blob.size:
            raise DigestMismatch(f"{found.what} should be {blob.size} bytes, and is {len(data)}")
        if digest_of(data, blob.digest) != blob.digest:
            raise DigestMismatch(f"{found.what} in the archive has another digest")
        return data

    return list(manifests.walk(root, read))


def _layout_blob(files: Files, blob: Descriptor) -> ArchivedBlob:
    what = f"{blob.role} {blob.digest}"
    section = files.find(layout_path(blob.digest))
    if section is None:
        raise InvalidArchive(f"{what} is named in the archive, and not there")
    return ArchivedBlob(section, what, blob.size, blob.digest, blob.media_type)


# The docker side: manifest.json of `docker save`.


def _entries(section: Section) -> list[dict[str, Any]]:
    entries = _document(section, "manifest.json")
    if not isinstance(entries, list) or not entries:
        raise InvalidArchive("manifest.json is not a list of images")
    _check_number(entries)
    for entry in entries:
        if isinstance(entry, dict) and "Layers" in entry and entry["Layers"] is None:
            entry["Layers"] = []  # Docker writes null for an image without layers
        layers = entry.get("Layers") if isinstance(entry, dict) else None
        texts = [entry.get("Config"), *layers] if isinstance(layers, list) else [None]
        tags = (entry.get("RepoTags") or []) if isinstance(entry, dict) else None
        if not isinstance(tags, list) or not all(isinstance(text, str) for text in texts):
            raise InvalidArchive("manifest.json has an entry without Config, Layers or RepoTags as they should be")
    return entries


def _required(files: Files, name: str) -> Section:
    section = files.find(name)
    if section is None:
        raise InvalidArchive(f"{shorten(name)} is named in manifest.json, and not in the archive")
    return section


def _repo_tags(files: Files, section: Section) -> dict[Digest, list[object]]:
    """Return the names in manifest.json, as the person gave them, by the digest of the config.

    Docker's index.json has them with its registry put in front.
    """
    tags: dict[Digest, list[object]] = {}
    for entry in _entries(section):
        config = _read_small(_required(files, entry["Config"]), "the config", InvalidArchive)
        tags.setdefault(digest_of(config), []).extend(entry.get("RepoTags") or [])
    return tags


def _read_docker(files: Files, entry: dict[str, Any]) -> ArchivedImage:
    section = _required(files, entry["Config"])
    data = _read_small(section, "the config", InvalidArchive)
    config = load_json(data, "the config", InvalidArchive)
    rootfs = config.get("rootfs") if isinstance(config, dict) else None
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if diff_ids is None and not entry["Layers"]:
        diff_ids = []
    if not isinstance(diff_ids, list) or len(diff_ids) != len(entry["Layers"]):
        raise InvalidArchive("the config names another number of layers (rootfs.diff_ids) than manifest.json")
    digest = digest_of(data)
    # Docker names the config's file by its digest; what it says must hold.
    stem = entry["Config"].rpartition("/")[2].removesuffix(".json").removeprefix("sha256:")
    if len(stem) == 64 and set(stem) <= set("0123456789abcdef") and stem != split_digest(digest)[1]:
        raise DigestMismatch(f"the config {shorten(entry['Config'])} has digest {digest}")
    blobs = [ArchivedBlob(section, "the config", len(data), digest, manifests.OCI_CONFIG)]
    for name, diff_id in zip(entry["Layers"], diff_ids, strict=True):
        try:
            expected = parse_digest(diff_id)
        except CacheError as error:
            raise InvalidArchive(f"the config's diff id {error}") from error
        layer, what = _required(files, name), f"layer {shorten(name)}"
        compression = compression_of(layer.head(MAGIC_LENGTH))
        if compression is None:
            blobs.append(ArchivedBlob(layer, what, layer.size, expected, manifests.OCI_LAYER))
        elif compression in ("gzip", "zstd"):
            media_type = f"{manifests.OCI_LAYER}+{compression}"
            blobs.append(ArchivedBlob(layer, what, layer.size, None, media_type, (compression, expected)))
        else:
            raise InvalidArchive(f"{what} is compressed with {compression}, which no media type of a layer names")
    return ArchivedImage([], None, blobs)
