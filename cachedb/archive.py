"""Reading image archives: docker-archive, OCI archive, and OCI image layout folder.

A reader finds what is in an archive without copying anything: images with their names, and for each the
content it needs, as sections of files. Nothing here writes to the cache. Archives come from strangers: every
name, link, size and document is checked, and an archive with anything odd in it is refused whole.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import stat
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from cachedb import oci
from cachedb.errors import CacheError, DigestMismatch, InvalidArchive, InvalidManifest, InvalidName, os_errors
from cachedb.oci import Descriptor, load_json
from cachedb.reference import Digest, Name, parse_digest, shorten, split_digest

__all__ = ["ArchivedImage", "Content", "Decompressor", "DiffId", "layout_path", "open_files", "read_images"]

REF_NAME = "org.opencontainers.image.ref.name"  # image specification, annotations.md
CONTAINERD_NAME = "io.containerd.image.name"  # containerd's and Docker's: the full name

_MEMBERS_LIMIT = 100_000
_NAME_LIMIT = 4096  # bytes, a path's limit on Linux
_HEADER_LIMIT = 1024 * 1024  # bytes: of a tar's extended header
_PART = 1024 * 1024  # bytes that are decompressed at a time
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2"}


class Section:
    """Consecutive bytes of an open file; several may be read at once, for each keeps its own place."""

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        self._descriptor, self._offset, self.size = descriptor, offset, size
        self._done = 0

    @property
    def place(self) -> tuple[int, int]:
        """What tells it from others: the file and where it begins there."""
        return self._descriptor, self._offset

    def again(self) -> Section:
        """Return the same section, to be read from its beginning."""
        return Section(self._descriptor, self._offset, self.size)

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill the front of the buffer; return the number of bytes, 0 at the end."""
        count = min(len(buffer), self.size - self._done)
        if count == 0:
            return 0
        with os_errors("read the archive"):
            read = os.preadv(self._descriptor, [buffer[:count]], self._offset + self._done)
        if read == 0:
            raise InvalidArchive("the archive is cut short")
        self._done += read
        return read

    def head(self, count: int) -> bytes:
        """Return the first bytes, without moving on."""
        buffer = bytearray(min(count, self.size))
        section = self.again()
        view = memoryview(buffer)
        while view:
            view = view[section.readinto(view) :]
        return bytes(buffer)


class Files(Protocol):
    """The files of an archive or a folder."""

    def find(self, name: str) -> Section | None:
        """Return a file's content, or None if there is no such file."""

    def close(self) -> None:
        """Close what is open."""


class Folder:
    """The files below a folder, such as an OCI image layout."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: dict[str, tuple[int, int]] = {}

    def find(self, name: str) -> Section | None:
        """Return a file's content, or None if there is no such file."""
        name = _safe(name)
        if name not in self._open:
            try:
                # Not blocking: a fifo in the folder must not hold us up.
                descriptor = os.open(self._path / name, os.O_RDONLY | os.O_NONBLOCK)
            except (FileNotFoundError, NotADirectoryError):
                return None
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                os.close(descriptor)
                raise InvalidArchive(f"{shorten(name)} in the image layout is not a file")
            self._open[name] = (descriptor, status.st_size)
        descriptor, size = self._open[name]
        return Section(descriptor, 0, size)

    def close(self) -> None:
        """Close all files."""
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()


class Tar:
    """The files in a tar, found by one pass over its headers."""

    def __init__(self, file: BinaryIO) -> None:
        self._descriptor = file.fileno()
        self._files: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        self._read_headers(file)
        for name in self._links:
            self._resolve(name)

    def find(self, name: str) -> Section | None:
        """Return a file's content, or None if there is no such file; links are followed."""
        place = self._files.get(self._resolve(_safe(name)))
        return None if place is None else Section(self._descriptor, *place)

    def close(self) -> None:
        """Nothing is open but the tar itself, which is its opener's."""

    def _resolve(self, name: str) -> str:
        seen = {name}
        while name in self._links:
            name = self._links[name]
            if name in seen:
                raise InvalidArchive(f"links in the archive go in a circle at {shorten(name)}")
            seen.add(name)
        return name

    def _read_headers(self, file: BinaryIO) -> None:
        size = os.fstat(self._descriptor).st_size
        names_length = 0
        try:
            with tarfile.TarFile(fileobj=_Headers(file)) as tar:  # type: ignore[arg-type]
                end = -1
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]
                    if tar.offset <= end or member.size < 0:
                        raise InvalidArchive(f"the archive is damaged at byte {end}")
                    end = tar.offset
                    if member.isreg() and member.offset_data + member.size > size:
                        raise InvalidArchive(f"the archive is cut short in {shorten(member.name)}")
                    names_length += len(member.name) + len(member.linkname)
                    if len(self._files) + len(self._links) > _MEMBERS_LIMIT or names_length > 16 * 1024 * 1024:
                        raise InvalidArchive(f"the archive has more than {_MEMBERS_LIMIT} members: not an image")
                    self._add(member)
                # Two blocks of zeros end every tar; without them the rest of it may be lost.
                if os.pread(self._descriptor, 1024, tar.offset) != bytes(1024):
                    what = "cut short, or not a tar," if tar.offset else "not a tar"
                    raise InvalidArchive(f"the archive is {what} at byte {tar.offset}")
        except InvalidArchive:
            raise
        except tarfile.TarError as error:
            raise InvalidArchive(f"the archive is not a tar, or damaged: {error}") from error
        except (ValueError, OverflowError, RecursionError, KeyError, IndexError) as error:
            raise InvalidArchive(f"the archive's headers are damaged: {type(error).__name__}") from error

    def _add(self, member: tarfile.TarInfo) -> None:
        name = _safe(member.name)
        self._files.pop(name, None)  # of two members of one name, the later is meant
        self._links.pop(name, None)
        if member.isdir():
            return
        if member.issym():
            self._links[name] = _safe(posixpath.join(posixpath.dirname(name), member.linkname), link=name)
        elif member.islnk():
            self._links[name] = _safe(member.linkname, link=name)
        elif member.isreg() and not member.issparse():
            self._files[name] = (member.offset_data, member.size)
        else:
            raise InvalidArchive(f"{shorten(member.name)} in the archive is a device, a fifo, or of an odd kind")


class _Headers:
    """A tar's file as `tarfile` sees it: it may read headers, and not a "name" of gigabytes."""

    name = None

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        if not 0 <= count <= _HEADER_LIMIT:
            raise InvalidArchive("the archive has a header of over 1 MiB")
        return self._file.read(count)


def _safe(name: str, link: str | None = None) -> str:
    """Return a member's name in its plain form; refuse one that leaves the archive."""
    what = f"{shorten(name)} in the archive" if link is None else f"the link {shorten(link)} in the archive"
    if len(os.fsencode(name)) > _NAME_LIMIT or "\0" in name:
        raise InvalidArchive(f"{what} has a name that no file can have")
    plain = posixpath.normpath(name)
    # A link may climb as long as it stays inside, a name may not climb at all.
    climbs = plain.startswith("../") or plain == ".." if link else ".." in name.split("/")
    if posixpath.isabs(name) or climbs:
        raise InvalidArchive(f"{what} leads out of it")
    return plain


@contextmanager
def open_files(source: Path | BinaryIO, spool: Path) -> Iterator[Files]:
    """Open an archive or a folder for reading.

    Args:
        source: a path, or a stream, which need not be seekable.
        spool: a path at which a stream, or what a compressed archive holds, is kept meanwhile.

    Raises:
        InvalidArchive: if it is neither.
        StorageError: if it cannot be read, or not be spooled.
    """
    with ExitStack() as stack:
        with os_errors("read the archive"):
            if isinstance(source, Path) and source.is_dir():
                files: Files = Folder(source)
                stack.callback(files.close)
            else:
                file = stack.enter_context(source.open("rb")) if isinstance(source, Path) else source
                if not _is_regular(file) or _compression(os.pread(file.fileno(), 8, 0)):
                    stack.callback(spool.unlink, missing_ok=True)
                    spooled = stack.enter_context(spool.open("wb+"))
                    _copy_decompressed(file, spooled)
                    spooled.seek(0)
                    file = spooled
                files = Tar(file)
        yield files


def _is_regular(file: BinaryIO) -> bool:
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode) and file.tell() == 0
    except (OSError, ValueError, AttributeError):
        return False


def _copy_decompressed(source: BinaryIO, target: BinaryIO) -> None:
    chunk = source.read(1024 * 1024)
    compression = _compression(chunk[:8])
    unpack = Decompressor(compression) if compression else None
    while chunk:
        for part in unpack.feed(chunk) if unpack else (chunk,):
            target.write(part)
        chunk = source.read(1024 * 1024)
    if unpack and not unpack.ended:
        raise InvalidArchive(f"the {compression} compressed archive is cut short")


def _compression(head: bytes) -> str | None:
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


class Decompressor:
    """Decompresses a stream in parts of bounded size, over as many members or frames as it has."""

    def __init__(self, compression: str) -> None:
        self._compression = compression
        self._stream: Any = None
        self.ended = False
        """Whether the stream is at the end of a member: it may end here."""

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        """Take compressed bytes and yield what they hold.

        Raises:
            InvalidArchive: if they are damaged.
        """
        pending = bytes(data)
        try:
            while True:
                if self._stream is None or self.ended:
                    if not pending.lstrip(b"\0"):  # tapes and tools pad with zeros
                        return
                    self._stream, self.ended = self._begin(), False
                part = self._stream.decompress(pending, _PART)
                self.ended = self._stream.eof
                pending = self._stream.unused_data if self.ended else self._unconsumed()
                if part:
                    yield part
                if not self.ended and not pending and len(part) < _PART:
                    return
        except InvalidArchive:
            raise
        except Exception as error:  # each library has an error of its own, and one of them none in common
            raise InvalidArchive(f"{self._compression} data in the archive is damaged: {error}") from error

    def _begin(self) -> Any:  # noqa: ANN401
        if self._compression == "gzip":
            return zlib.decompressobj(zlib.MAX_WBITS | 16)
        if self._compression == "xz":
            import lzma

            return lzma.LZMADecompressor(memlimit=96 * 1024 * 1024)
        if self._compression == "bzip2":
            import bz2

            return bz2.BZ2Decompressor()
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
        return zstd.ZstdDecompressor()

    def _unconsumed(self) -> bytes:
        # zlib hands back what it did not come to; the others keep it.
        return bytes(self._stream.unconsumed_tail) if self._compression == "gzip" else b""


class DiffId:
    """Computes a compressed layer's diff id as its bytes pass: the digest of what they hold (config.md)."""

    def __init__(self, compression: str, expected: Digest, what: str) -> None:
        self._decompressor = Decompressor(compression)
        self._hasher = hashlib.new(split_digest(expected)[0])
        self._expected, self._what = expected, what

    def update(self, data: memoryview, /) -> None:
        """Take the next compressed bytes."""
        for part in self._decompressor.feed(data):
            self._hasher.update(part)

    def check(self) -> None:
        """Raise `DigestMismatch` if the layer is not the one that the config names."""
        if not self._decompressor.ended:
            raise InvalidArchive(f"{self._what} is cut short")
        if f"{self._hasher.name}:{self._hasher.hexdigest()}" != self._expected:
            raise DigestMismatch(f"{self._what} does not hold what the config says, {self._expected}")


class Content(NamedTuple):
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
    contents: list[Content]  # the closure; of a docker-archive the config, then the layers

    def manifest(self, digests: list[Digest]) -> bytes:
        """Make the manifest that a docker-archive lacks, from its contents' digests."""
        blobs = [
            Descriptor(digest, content.size, content.media_type, "layer")
            for content, digest in zip(self.contents, digests, strict=True)
        ]
        return oci.build_manifest(blobs[0], blobs[1:])


def layout_path(digest: Digest) -> str:
    """Return where a blob lies in an image layout (image-layout.md, "Blobs")."""
    algorithm, encoded = split_digest(digest)
    return f"blobs/{algorithm}/{encoded}"


def read_images(files: Files) -> list[ArchivedImage]:
    """Return the images in an archive: the OCI side of one that is both, so that digests are kept.

    Raises:
        InvalidArchive: if it is no image archive, or lacks something.
        InvalidManifest: if a manifest in it is invalid.
        DigestMismatch: if a manifest in it has another digest or size than it should.
    """
    index, docker = files.find("index.json"), files.find("manifest.json")
    if index is not None:
        found = _read_layout(files, index, _repo_tags(files, docker) if docker else {})
    elif docker is not None:
        found = [_read_docker(files, entry) for entry in _entries(docker)]
    else:
        raise InvalidArchive(
            "the archive has neither index.json nor manifest.json: not an image; make one with "
            "`docker save`, `podman save` or `skopeo copy`"
        )
    if not found:
        raise InvalidArchive("the archive holds no image")
    return found


def _document(section: Section, what: str, error: type[CacheError] = InvalidArchive) -> Any:  # noqa: ANN401
    return load_json(_read_small(section, what, error), what, error)


def _read_small(section: Section, what: str, error: type[CacheError]) -> bytes:
    if section.size > oci.DOCUMENT_LIMIT:
        raise error(f"{what} is {section.size} bytes; more than {oci.DOCUMENT_LIMIT} are refused")
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


def _read_layout(files: Files, section: Section, tags: dict[Digest, list[Name]]) -> list[ArchivedImage]:
    layout = files.find("oci-layout")
    if layout is not None:
        version = _document(layout, "oci-layout")
        if not isinstance(version, dict) or not str(version.get("imageLayoutVersion")).startswith("1."):
            raise InvalidArchive("oci-layout names no version 1.x of the image layout")
    index = _document(section, "index.json")
    entries = index.get("manifests") if isinstance(index, dict) else None
    if not isinstance(entries, list):
        raise InvalidArchive("index.json is not an image index: it has no list of manifests")
    names: dict[Digest, list[Name]] = {}
    roots: dict[Digest, Descriptor] = {}
    for entry in entries:
        if not isinstance(entry, dict):
            raise InvalidArchive("index.json has an entry that is not a descriptor")
        if "mediaType" not in entry:
            entry = {**entry, "mediaType": oci.OCI_MANIFEST}
        root = oci.child(entry, "index.json")
        if root.role == "other":
            raise InvalidManifest(f"index.json names a {shorten(root.media_type)}, which is not an image")
        roots[root.digest] = root
        annotations = entry.get("annotations")
        if isinstance(annotations, dict) and (name := _annotated_name(annotations)):
            names.setdefault(root.digest, []).append(*_parse_names([name]))
    found = []
    for root in roots.values():
        closure = _closure(files, root)
        configs = {blob.digest for blob in closure if blob.role == "config"}
        tagged = [name for config, given in tags.items() if config in configs for name in given]
        contents = [_layout_content(files, blob) for blob in dict.fromkeys(closure)]
        given = list(dict.fromkeys(tagged or names.get(root.digest, [])))
        found.append(ArchivedImage(given, root, contents))
    return found


def _annotated_name(annotations: dict[str, Any]) -> object:
    """Return the name that a tool gave: in ref.name skopeo and podman write all of it, Docker only the tag."""
    reference, full = annotations.get(REF_NAME), annotations.get(CONTAINERD_NAME)
    if isinstance(reference, str) and (full is None or ":" in reference or "/" in reference):
        return reference
    return full


def _closure(files: Files, root: Descriptor) -> list[Descriptor]:
    def read(blob: Descriptor) -> bytes:
        what = f"{blob.role} {blob.digest}"
        section = files.find(layout_path(blob.digest))
        if section is None:
            raise InvalidArchive(f"{what} is named in the archive, and not there")
        data = _read_small(section, what, InvalidManifest)
        if len(data) != blob.size:
            raise DigestMismatch(f"{what} should be {blob.size} bytes, and is {len(data)}")
        algorithm, encoded = split_digest(blob.digest)
        if hashlib.new(algorithm, data).hexdigest() != encoded:
            raise DigestMismatch(f"{what} in the archive has another digest")
        return data

    return list(oci.walk(root, read))


def _layout_content(files: Files, blob: Descriptor) -> Content:
    what = f"{blob.role} {blob.digest}"
    section = files.find(layout_path(blob.digest))
    if section is None:
        raise InvalidArchive(f"{what} is named in the archive, and not there")
    if section.size != blob.size:
        raise DigestMismatch(f"{what} should be {blob.size} bytes, and is {section.size}")
    return Content(section, what, blob.size, blob.digest, blob.media_type)


# The docker side: manifest.json of `docker save`.


def _entries(section: Section) -> list[dict[str, Any]]:
    entries = _document(section, "manifest.json")
    if not isinstance(entries, list) or not entries:
        raise InvalidArchive("manifest.json is not a list of images")
    for entry in entries:
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


def _repo_tags(files: Files, section: Section) -> dict[Digest, list[Name]]:
    """Return the names in manifest.json, as the person gave them, by the digest of the config.

    Docker's index.json has them with its registry put in front.
    """
    tags: dict[Digest, list[Name]] = {}
    for entry in _entries(section):
        config = _read_small(_required(files, entry["Config"]), "the config", InvalidArchive)
        digest = parse_digest(hashlib.sha256(config).hexdigest())
        tags.setdefault(digest, []).extend(_parse_names(entry.get("RepoTags") or []))
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
    digest = parse_digest(hashlib.sha256(data).hexdigest())
    # Docker names the config's file by its digest; what it says must hold.
    stem = entry["Config"].rpartition("/")[2].removesuffix(".json").removeprefix("sha256:")
    if len(stem) == 64 and set(stem) <= set("0123456789abcdef") and stem != digest.partition(":")[2]:
        raise DigestMismatch(f"the config {shorten(entry['Config'])} has digest {digest}")
    contents = [Content(section, "the config", len(data), digest, oci.OCI_CONFIG)]
    for name, diff_id in zip(entry["Layers"], diff_ids, strict=True):
        try:
            expected = parse_digest(diff_id)
        except CacheError as error:
            raise InvalidArchive(f"the config's diff id {error}") from error
        layer, what = _required(files, name), f"layer {shorten(name)}"
        compression = _compression(layer.head(8))
        if compression is None:
            contents.append(Content(layer, what, layer.size, expected, oci.OCI_LAYER))
        elif compression in ("gzip", "zstd"):
            media_type = f"{oci.OCI_LAYER}+{compression}"
            contents.append(Content(layer, what, layer.size, None, media_type, (compression, expected)))
        else:
            raise InvalidArchive(f"{what} is compressed with {compression}, which no media type of a layer names")
    return ArchivedImage(_parse_names(entry.get("RepoTags") or []), None, contents)
