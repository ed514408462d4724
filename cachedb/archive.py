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
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from io import RawIOBase
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
_LINKS_LIMIT = 40  # links followed from one name, as many as Linux follows
_HEADER_LIMIT = 1024 * 1024  # bytes: of a tar's extended header
_HEADERS_LIMIT = 64 * _HEADER_LIMIT  # bytes: of all of them
_ROWS_LIMIT = 100_000  # blobs in an archive's images, counted once for each name that an image has
_IMAGES_LIMIT = 1000
_BLOCK = 512  # bytes, of a tar
_SLICE = 64 * 1024  # bytes that a decompressor is given at a time, of which it may hand most back
_PART = 1024 * 1024  # bytes that are decompressed at a time
_MAGIC = {b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz"}
# Longer than "BZh", with which a file's name can begin, and so an uncompressed layer.
_MAGIC.update({b"BZh%d1AY&SY" % level: "bzip2" for level in range(1, 10)})
_MAGIC_LENGTH = max(map(len, _MAGIC))


class Section:
    """Consecutive bytes of a file; several may be read at once, for each keeps its own place."""

    def __init__(self, file: int | Path, offset: int, size: int) -> None:
        self._file, self._offset, self.size = file, offset, size
        self._done = 0

    @property
    def place(self) -> tuple[int | Path, int]:
        """What tells it from others: the file and where it begins there."""
        return self._file, self._offset

    def again(self) -> Section:
        """Return the same section, to be read from its beginning."""
        return Section(self._file, self._offset, self.size)

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill the front of the buffer; return the number of bytes, 0 at the end."""
        count = min(len(buffer), self.size - self._done)
        if count == 0:
            return 0
        with os_errors("read the archive"), _descriptor(self._file) as descriptor:
            read = os.preadv(descriptor, [buffer[:count]], self._offset + self._done)
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


@contextmanager
def _descriptor(file: int | Path) -> Iterator[int]:
    """Open a file that is not open: a folder may hold more of them than a process may have open."""
    if isinstance(file, int):
        yield file
        return
    # Not blocking: a fifo in the folder must not hold us up.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class Files(Protocol):
    """The files of an archive or a folder."""

    def find(self, name: str) -> Section | None:
        """Return a file's content, or None if there is no such file."""


class Folder:
    """The files below a folder, such as an OCI image layout."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def find(self, name: str) -> Section | None:
        """Return a file's content, or None if there is no such file."""
        path = self._path / _safe(name)
        with os_errors("read the image layout"):
            try:
                with _descriptor(path) as descriptor:
                    status = os.fstat(descriptor)
            except (FileNotFoundError, NotADirectoryError):
                return None
        if not stat.S_ISREG(status.st_mode):
            raise InvalidArchive(f"{shorten(name)} in the image layout is not a file")
        return Section(path, 0, status.st_size)


class Tar:
    """The files in a tar, found by one pass over its headers."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._files: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        names_length = 0
        for member in _members(descriptor):
            names_length += len(member.name) + len(member.link)
            if len(self._files) + len(self._links) > _MEMBERS_LIMIT or names_length > 16 * 1024 * 1024:
                raise InvalidArchive(f"the archive has more than {_MEMBERS_LIMIT} members: not an image")
            self._add(member)
        for name in self._links:
            self._resolve(name)

    def find(self, name: str) -> Section | None:
        """Return a file's content, or None if there is no such file; links are followed."""
        place = self._files.get(self._resolve(_safe(name)))
        return None if place is None else Section(self._descriptor, *place)

    def _resolve(self, name: str) -> str:
        for _ in range(_LINKS_LIMIT):
            if name not in self._links:
                return name
            name = self._links[name]
        raise InvalidArchive(f"links in the archive go in a circle at {shorten(name)}")

    def _add(self, member: _Member) -> None:
        name = _safe(member.name)
        self._files.pop(name, None)  # of two members of one name, the later is meant
        self._links.pop(name, None)
        if member.kind == b"2":
            self._links[name] = _safe(posixpath.join(posixpath.dirname(name), member.link), link=name)
        elif member.kind == b"1":
            self._links[name] = _safe(member.link, link=name)
        elif member.kind in _REGULAR:
            self._files[name] = (member.offset, member.size)
        elif member.kind != b"5":
            raise InvalidArchive(f"{shorten(member.name)} in the archive is a device, a fifo, or of an odd kind")


_REGULAR = (b"0", b"\0", b"7")


class _Member(NamedTuple):
    """A file, folder or link in a tar."""

    name: str
    kind: bytes  # the header's type flag
    link: str
    offset: int  # of the content
    size: int  # bytes


def _members(descriptor: int) -> Iterator[_Member]:
    """Yield the members of a tar (POSIX.1-2017, "pax", with GNU's long names), without reading their content.

    The standard library's `tarfile` would do for honest archives. Of a stranger's headers, releases of it that are
    still in use read some in time and memory that grow with the square of their size.
    """
    total = os.fstat(descriptor).st_size
    offset = extended_length = 0
    extended: dict[bytes, bytes] = {}
    while any(block := os.pread(descriptor, _BLOCK, offset)):
        _check_header(block, offset)
        kind, size, start = block[156:157], _number(block[124:136], offset), offset + _BLOCK
        if kind in (b"x", b"X", b"g", b"L", b"K"):
            extended_length += size + _BLOCK
            if size > _HEADER_LIMIT or extended_length > _HEADERS_LIMIT:
                raise InvalidArchive("the archive has a header of over 1 MiB, or too many: not an image")
            data = os.pread(descriptor, size, start)
            if len(data) < size:
                raise InvalidArchive(f"the archive is cut short at byte {start + len(data)}")
            extended.update(_extended(kind, data, offset))
            offset = start + _padded(size)
            continue
        member = _member(block, extended, offset)
        if start + member.size > total:
            raise InvalidArchive(f"the archive is cut short in {shorten(member.name)}")
        yield member
        extended = {}
        offset = start + _padded(member.size)
    # Two blocks of zeros end every tar; without them the rest of it may be lost.
    if not offset:
        raise InvalidArchive("the archive is not a tar")
    if extended or os.pread(descriptor, 2 * _BLOCK, offset) != bytes(2 * _BLOCK):
        raise InvalidArchive(f"the archive is cut short, or not a tar, at byte {offset}")


def _check_header(block: bytes, offset: int) -> None:
    if len(block) < _BLOCK:
        raise InvalidArchive(f"the archive is cut short at byte {offset + len(block)}" if offset else _NOT_A_TAR)
    others = block[:148] + b" " * 8 + block[156:]
    # Old tools summed signed bytes.
    if _octal(block[148:156]) not in (sum(others), sum(others) - 256 * sum(byte > 127 for byte in others)):
        raise InvalidArchive(f"the archive is damaged at byte {offset}" if offset else _NOT_A_TAR)


_NOT_A_TAR = "the archive is not a tar"


def _member(block: bytes, extended: dict[bytes, bytes], offset: int) -> _Member:
    """Return what a header and the extended headers before it say."""
    if any(key.startswith(b"GNU.sparse.") for key in extended):
        raise InvalidArchive(f"the archive has a sparse file at byte {offset}: not an image")
    name, link, kind = block[:100], block[157:257], block[156:157]
    if block[257:263] == b"ustar\0" and block[345]:
        name = _string(block[345:500]) + b"/" + _string(name)
    name = extended.get(b"path") or _string(name)
    link = extended.get(b"linkpath") or _string(link)
    if kind == b"\0" and name.endswith(b"/"):
        kind = b"5"  # as tars older than POSIX have it
    size = 0  # of all but regular files the field means nothing
    if kind in _REGULAR:
        size = _decimal(extended[b"size"], offset) if b"size" in extended else _number(block[124:136], offset)
    return _Member(os.fsdecode(name), kind, os.fsdecode(link), offset + _BLOCK, size)


def _extended(kind: bytes, data: bytes, offset: int) -> dict[bytes, bytes]:
    """Return what an extended header says of the member after it."""
    if kind in (b"L", b"K"):
        return {b"path" if kind == b"L" else b"linkpath": _string(data)}
    found: dict[bytes, bytes] = {}
    position = 0
    while position < len(data):  # records of "length key=value\n", the length that of all of it
        space = data.find(b" ", position, position + 20)
        end = position + _decimal(data[position : max(space, position)], offset)
        key, equals, value = data[space + 1 : end].partition(b"=")
        if not equals or end > len(data) or not value.endswith(b"\n"):
            raise InvalidArchive(f"the archive is damaged at byte {offset}")
        if key in (b"path", b"linkpath", b"size") or key.startswith(b"GNU.sparse."):
            found[key] = value[:-1]
        position = end
    if kind == b"g" and found:
        raise InvalidArchive(f"the archive has one name or size for all members at byte {offset}")
    return {key: value for key, value in found.items() if value}


def _string(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _decimal(digits: bytes, offset: int) -> int:
    if not digits.isdigit() or len(digits) > 19:
        raise InvalidArchive(f"the archive is damaged at byte {offset}")
    return int(digits)


def _number(field: bytes, offset: int) -> int:
    """Return a header's number: octal, or, with the first bit set, base 256."""
    number = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field)
    if number is None:  # or negative, in base 256
        raise InvalidArchive(f"the archive is damaged at byte {offset}")
    return number


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0") or b"0"
    return None if digits.strip(b"01234567") else int(digits, 8)


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
            else:
                file = stack.enter_context(source.open("rb")) if isinstance(source, Path) else source
                if not _is_regular(file) or _compression(os.pread(file.fileno(), _MAGIC_LENGTH, 0)):
                    stack.callback(spool.unlink, missing_ok=True)
                    # Not buffered: closing must not fail a second time on a full disk.
                    spooled = stack.enter_context(spool.open("wb+", buffering=0))
                    _copy_decompressed(file, spooled)
                    file = spooled
                files = Tar(file.fileno())
        yield files


def _is_regular(file: BinaryIO) -> bool:
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode) and file.tell() == 0
    except (OSError, ValueError, AttributeError):
        return False


def _copy_decompressed(source: BinaryIO, target: RawIOBase) -> None:
    chunk = b""
    while len(chunk) < _MAGIC_LENGTH and (more := source.read(1024 * 1024)):
        chunk += more  # a pipe may give a few bytes at first
    compression = _compression(chunk)
    unpack = Decompressor(compression) if compression else None
    while chunk:
        for part in unpack.feed(chunk) if unpack else (chunk,):
            view = memoryview(part)
            while view:
                view = view[target.write(view) :]
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
        for start in range(0, len(data), _SLICE):
            yield from self._feed(bytes(data[start : start + _SLICE]))

    def _feed(self, pending: bytes) -> Iterator[bytes]:
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

    @property
    def identity(self) -> object:
        """What is the same for the same image: the manifest's digest, or the config's where there is none."""
        return self.contents[0].digest

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


def read_images(files: Files, name: Name | None = None) -> list[ArchivedImage]:
    """Return the images in an archive: the OCI side of one that is both, so that digests are kept.

    Args:
        files: the archive's.
        name: instead of the names in it, of which none need be valid then.

    Raises:
        InvalidArchive: if it is no image archive, or lacks something; if it holds several images and a name is given.
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
        for name in image.names:
            # Of two, one would be stored and lost at once.
            if named.setdefault(name, image.identity) != image.identity:
                raise InvalidArchive(f"two images in the archive have the name {name}")
    _check_rows(sum(len(image.names) * len(image.contents) for image in images))


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
            entry = {**entry, "mediaType": oci.OCI_MANIFEST}
        root = oci.child(entry, "index.json")
        if root.role == "other":
            raise InvalidManifest(f"index.json names a {shorten(root.media_type)}, which is not an image")
        roots[root.digest] = root
        annotations = entry.get("annotations")
        if isinstance(annotations, dict) and (name := _annotated_name(annotations)):
            names.setdefault(root.digest, []).append(name)
    found: list[_Found] = []
    rows = 0
    for root in roots.values():
        closure = _closure(files, root)
        rows += len(closure)
        _check_rows(rows)
        configs = {blob.digest for blob in closure if blob.role == "config"}
        tagged = [name for config, given in tags.items() if config in configs for name in given]
        contents = [_layout_content(files, blob) for blob in dict.fromkeys(closure)]
        found.append((tagged or names.get(root.digest, []), ArchivedImage([], root, contents)))
    # Some tools list the platforms of an index beside it: without a name they are no images of their own.
    below = {content.digest for _, image in found for content in image.contents[1:]}
    return [(texts, image) for texts, image in found if texts or image.identity not in below]


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
        digest = parse_digest(hashlib.sha256(config).hexdigest())
        tags.setdefault(digest, []).extend(entry.get("RepoTags") or [])
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
        compression = _compression(layer.head(_MAGIC_LENGTH))
        if compression is None:
            contents.append(Content(layer, what, layer.size, expected, oci.OCI_LAYER))
        elif compression in ("gzip", "zstd"):
            media_type = f"{oci.OCI_LAYER}+{compression}"
            contents.append(Content(layer, what, layer.size, None, media_type, (compression, expected)))
        else:
            raise InvalidArchive(f"{what} is compressed with {compression}, which no media type of a layer names")
    return ArchivedImage([], None, contents)
