"""Read images from an older cache whose index is one index.json."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from cachedb import oci
from cachedb.disk import layout, reader, writer
from cachedb.disk.existence import exists
from cachedb.disk.folders import Folders
from cachedb.disk.layout import blob_file
from cachedb.errors import (
    CacheError,
    DigestMismatch,
    InvalidDigest,
    InvalidManifest,
    InvalidName,
    NotACache,
    StorageError,
    explain,
    ignore_os_errors,
    is_callers,
    os_errors,
)
from cachedb.oci.digests import Digest, digest_of, parse_digest
from cachedb.oci.manifests import DOCUMENT_LIMIT, Descriptor
from cachedb.oci.names import Name
from cachedb.text import shorten

__all__ = [
    "KINDS",
    "LeftOut",
    "OldCache",
    "OldFile",
    "OldImage",
    "UnreadableEntry",
    "is_intact",
    "open_bounded",
    "read_blobs",
    "read_role_and_media_type",
]


KINDS = ("name", "manifest", "missing", "corrupt", "unreadable", "exists", "stray")
"""Why a file or an image is left out:

- name: the path of a file in ``manifests/`` is not a name.
- manifest: a manifest is invalid.
- missing: a manifest or blob of an image does not exist.
- corrupt: content does not match its digest.
- unreadable: a file cannot be read.
- exists: the name belongs to another image in this cache.
- stray: a file in ``blobs/`` is not a blob.
"""
_INDEX_LIMIT = 1024**3  # bytes


class LeftOut(NamedTuple):
    """A file or an image that was not adopted."""

    kind: str  # one of KINDS
    name: str | None  # of the image that is left out or incomplete
    digest: Digest | None  # of the blob, if any
    path: Path | None  # of the file, if any
    detail: str


class UnreadableEntry(CacheError):
    """A file of the older cache cannot be read."""


class OldCache:
    """The older cache: the files in its folders and the entries of its index."""

    def __init__(self, directory: Path, ours: Path) -> None:
        self.directory, self._ours = directory, ours
        with os_errors("read the cache to adopt"):
            found = any(exists(directory / name) for name in ("manifests", "blobs", "index.json"))
        if not found:
            raise NotACache(f"{str(directory)!r} has no manifests, blobs or index.json: there is nothing to adopt")
        if exists(directory / "index.db") or directory.resolve() == ours.resolve():
            raise NotACache(f"{str(directory)!r} is already a cache of cachedb: use it with --dir")
        if exists(directory / "oci-layout"):
            raise NotACache(f"{str(directory)!r} is an OCI image layout: use `cachedb import`")
        self.left_out: list[LeftOut] = []
        self.damage: str | None = None
        self._index_file = self._identify_index()
        self.entries = self._read_index()
        self.blobs, strays = layout.list_blob_files(directory) if exists(directory / "blobs") else ({}, [])
        self.left_out += [LeftOut("stray", None, None, path, "it is not a blob") for path in strays]
        self.paths = {digest: blob_file(directory, digest) for digest in self.blobs}
        self.manifests = dict(self._find_manifests())
        for name, entry in self.entries.items():
            if name not in self.manifests and (path := self._find_inside(entry.get("manifest_path"))):
                self.manifests[name] = path
            for digest, blob in read_blobs(entry).items():
                if digest not in self.paths and (path := self._find_inside(blob.get("path"))):
                    self.paths[digest] = str(path)

    def _read_index(self) -> dict[Name, dict[str, Any]]:
        """Return the index's entries by name; none if it is damaged."""
        path = self.directory / "index.json"
        try:
            document = json.loads(_read(path, _INDEX_LIMIT))
        except (CacheError, ValueError, RecursionError) as error:
            self.damage = str(error)
            return {}
        if not isinstance(document, dict):
            self.damage = "it is not a JSON object"
            return {}
        entries = {}
        for key, value in document.items():
            entry = value if isinstance(value, dict) else {}
            repository, _, reference = key.rpartition("/")
            try:
                name = _parse_name(entry.get("repository", repository), entry.get("reference", reference))
            except InvalidName as error:
                self.left_out.append(LeftOut("name", key, None, path, str(error)))
            else:
                entries[name] = entry
        return entries

    def _identify_index(self) -> tuple[int, int, int] | None:
        with suppress(OSError):
            return writer.file_identity(os.lstat(self.directory / "index.json"))
        return None

    def is_index_unchanged(self) -> bool:
        """Return whether nobody has written to index.json since it was read."""
        return self._identify_index() == self._index_file

    def has_digest(self, path: Path, digest: Digest | None) -> bool:
        """Return whether a manifest's file still has the adopted manifest; False if none was adopted."""
        with suppress(CacheError):
            return digest is not None and digest_of(_read(path), digest) == digest
        return False

    def _find_manifests(self) -> Iterator[tuple[Name, Path]]:
        """Yield the name and path of each file in ``manifests/``; leave out those without a valid name."""
        top = self.directory / "manifests"

        def leave_out(kind: str, path: Path, detail: str) -> None:
            self.left_out.append(LeftOut(kind, path.relative_to(top).as_posix(), None, path, detail))

        def report(error: OSError) -> None:
            if exists(top):
                leave_out("unreadable", Path(error.filename), explain(error))

        for folder, folders, files in os.walk(top, onerror=report):
            folders.sort()
            for path in (path for name in folders if (path := Path(folder, name)).is_symlink()):
                leave_out("stray", path, "it is a symbolic link, which is not followed")
            for path in (Path(folder, name) for name in sorted(files)):
                try:
                    yield _parse_name(path.parent.relative_to(top).as_posix(), path.name), path
                except InvalidName as error:
                    leave_out("name", path, str(error))

    def _find_inside(self, recorded: object) -> Path | None:
        """Return the file of a recorded path if it is in this directory.

        The path is absolute, or relative to the working directory of the program that wrote the index.
        """
        if not isinstance(recorded, str) or "\0" in recorded:
            return None
        parts = PurePosixPath(recorded).parts
        tails = [parts[parts.index(top) :] for top in ("manifests", "blobs") if top in parts]
        for path in (self.directory.parent / recorded, *(self.directory.joinpath(*tail) for tail in tails)):
            with ignore_os_errors():
                inside = path.resolve().is_relative_to(self.directory.resolve())
                if inside and stat.S_ISREG(path.lstat().st_mode):
                    return path
        return None

    def check_ours(self) -> None:
        """Raise if files must not be moved out of this directory.

        Raises:
            NotACache: if there is neither a manifest nor an index entry, so it may be another program's directory; or
                if a folder is one of this cache, through a bind mount.
            NotOurs: if it belongs to another user, or a folder in it leads out of it.
        """
        if self.paths and not self.manifests and not self.entries:
            raise NotACache(
                f"{str(self.directory)!r} has neither manifests nor a readable index.json, so nothing is moved: "
                "adopt it without --move"
            )
        for folder in {*map(os.path.dirname, self.paths.values()), *(str(p.parent) for p in self.manifests.values())}:
            if layout.is_inside(self._ours, Path(folder)):
                raise NotACache(f"{folder!r} is a folder of this cache, so nothing is moved: adopt it without --move")
        with os_errors("open the cache to adopt"):
            self._folders = Folders(self.directory)
            self._folders.check_owner()
            for name in ("blobs", "manifests"):
                with suppress(FileNotFoundError), self._folders.open(name):
                    pass

    def remove(self, path: str | Path) -> None:
        """Unlink a file of the cache, after `check_ours`; of a link, not the target."""
        path = Path(path)
        folder = path.parent.resolve().relative_to(self.directory.resolve())
        self._folders.remove((folder / path.name).as_posix())

    @cached_property
    def _manifests_by_digest(self) -> dict[Digest, Path]:
        found = {}
        for path in self.manifests.values():
            with suppress(CacheError):
                found[digest_of(_read(path))] = path
        return found

    def read_child(self, blob: Descriptor) -> bytes | None:
        """Return the bytes of an index's child, or None if it is missing or invalid.

        The child may be stored only in ``manifests/``.
        """
        path = self.paths.get(blob.digest) or self._manifests_by_digest.get(blob.digest)
        if path is None:
            return None
        self.paths[blob.digest] = str(path)
        with suppress(CacheError):
            data = _read(path)
            if digest_of(data, blob.digest) == blob.digest:
                oci.descriptors(data, oci.manifest_media_type(data, blob.media_type))
                return data
        return None

    def image(self, name: Name) -> OldImage:
        """Return an image with the known part of its closure.

        Raises:
            UnreadableEntry: if its manifest cannot be read.
            DigestMismatch: if the name has another digest.
            InvalidManifest: if its manifest is invalid.
        """
        data = _read(self.manifests[name])
        digest = digest_of(data, name.digest)
        if name.digest not in (None, digest):
            raise DigestMismatch(f"the manifest should have digest {name.digest}, and has {digest}")
        media_type = oci.manifest_media_type(data)
        root = oci.root_descriptor(digest, len(data), media_type)
        closure = list(oci.walk(root, lambda blob: data if blob is root else self.read_child(blob)))
        attached = read_blobs(self.entries.get(name, {}))
        for blob in closure:
            attached.pop(blob.digest, None)
        wanted = dict.fromkeys([*(blob.digest for blob in closure if blob.digest != digest), *attached])
        return OldImage(name, data, digest, media_type, closure, list(wanted), attached)


class OldImage(NamedTuple):
    """An image of the older cache."""

    name: Name
    manifest: bytes
    digest: Digest
    media_type: str
    closure: list[Descriptor]
    wanted: list[Digest]  # its blobs except the manifest
    attached: dict[Digest, dict[str, Any]]  # the index entries of its blobs that no manifest references


class OldFile:
    """An open file of the older cache."""

    def __init__(self, file: int) -> None:
        self._file = file

    def readinto(self, buffer: memoryview, /) -> int:
        """Read into the start of the buffer and return the number of bytes; 0 is the end."""
        with _reading():
            return os.readv(self._file, [buffer])


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if is_callers(error):
            raise
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise StorageError(f"cannot read the cache to adopt: {explain(error)}") from error
        raise UnreadableEntry(explain(error)) from error


@contextmanager
def open_bounded(path: Path | str) -> Iterator[int]:
    """Open a regular file without following a link, and without blocking on a fifo."""
    with _reading():
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise UnreadableEntry("it is not a regular file")
        yield file
    finally:
        os.close(file)


def _read(path: Path | str, limit: int = DOCUMENT_LIMIT) -> bytes:
    """Return the content of a small file."""
    with open_bounded(path) as file:
        if (size := os.fstat(file).st_size) > limit:
            raise InvalidManifest(f"it is {size} bytes; more than {limit} are refused")
        with _reading():
            return os.pread(file, size, 0)


def is_intact(directory: Path, digest: Digest) -> bool:
    """Read a blob of this cache, and return whether it matches its digest."""
    try:
        with reader.open_blob(directory, digest) as file, os_errors("read a blob"):
            writer.receive(file, None, digest=digest)
    except CacheError:
        return False
    return True


def _parse_name(repository: object, reference: object) -> Name:
    if not isinstance(repository, str) or not isinstance(reference, str):
        raise InvalidName(f"{shorten(repository)} and {shorten(reference)} do not form a name")
    return Name.parse(Name(repository, reference))


def read_blobs(entry: dict[str, Any]) -> dict[Digest, dict[str, Any]]:
    """Return the blobs of an index entry by digest."""
    found = {}
    blobs = entry.get("blobs")
    for digest, blob in blobs.items() if isinstance(blobs, dict) else ():
        with suppress(InvalidDigest):
            found[parse_digest(digest)] = blob if isinstance(blob, dict) else {}
    return found


def read_role_and_media_type(entry: dict[str, Any]) -> tuple[str, str]:
    """Return the role and media type in the index entry of a blob that no manifest references."""
    media_type = entry.get("media_type") or "application/octet-stream"
    with suppress(InvalidManifest):
        return "config" if entry.get("is_config") is True else "other", oci.check_media_type(media_type, "a blob")
    return "other", "application/octet-stream"
