"""Taking over a cache whose index is one ``index.json``.

    DIR/manifests/{repository}/{reference}   the manifest's bytes
    DIR/blobs/sha256/{hex}                   a blob
    DIR/index.json                           what the cache said of them, by "{repository}/{reference}"

The files come before the index, which was often cut short or out of date: an image's name is where its manifest lies,
its blobs are what its manifest names, and a blob is what its content says. The index adds blobs that were attached to
an image, and what lies elsewhere in DIR. All of it comes from strangers, and nothing outside DIR is read.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sqlalchemy import Connection

from cachedb.content import publish, save
from cachedb.content.publish import Received
from cachedb.content.save import ImageInfo, NewImage
from cachedb.content.session import Hold, Session
from cachedb.disk import reader, writer
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
from cachedb.index.sqlite.database import Database, batched
from cachedb.oci import manifests as oci
from cachedb.oci.manifests import DOCUMENT_LIMIT, Descriptor
from cachedb.oci.names import Digest, Name, digest_of, parse_digest, shorten
from cachedb.threads import Advance, Progress, in_threads, summed

__all__ = ["HOWS", "KINDS", "Adoption", "LeftOut", "adopt"]


HOWS = ("copy", "link", "move")
"""How blobs come: as copies; as hard links, where the file system can; or so that the other cache has them no more."""

KINDS = ("name", "manifest", "missing", "corrupt", "unreadable", "exists", "stray")
"""What is left out: a file in ``manifests/`` whose path is no name; a manifest that is none; an image lacks a manifest
or blob that is not there; content has another digest than it should; a file cannot be read; the name is another
image's in this cache; what lies in ``blobs/`` is no blob."""

_TOGETHER = 200  # blobs that are brought before the images that need them are saved in one transaction,
_BYTES_TOGETHER = 1024**3  # or bytes
_INDEX_LIMIT = 1024**3  # bytes


class LeftOut(NamedTuple):
    """Something that could not be taken over."""

    kind: str  # one of KINDS
    name: str | None  # of the image that is not there for it, or is incomplete
    digest: Digest | None  # of the blob, where it is about one
    path: Path | None  # of the file, where there is one
    detail: str


class Adoption(NamedTuple):
    """What was taken over."""

    images: list[ImageInfo]  # those in both caches now, also if they were before
    blobs: int  # that this cache did not have
    bytes: int  # of those
    unused: int  # of those, the ones that no image uses: `gc` frees them
    index_damage: str | None  # what is wrong with index.json, if it could not be used
    left_out: list[LeftOut]  # by name, then digest; last what belongs to no image


def adopt(
    database: Database, session: Session, directory: Path, *, how: str = "copy", progress: Progress | None = None
) -> Adoption:
    """Take over a cache whose index is one ``index.json``; what is here already is not read again.

    Args:
        database: of this cache.
        session: to work in.
        directory: of the other.
        how: one of `HOWS`. ``move`` takes away from the directory what is in this cache once all of it is.
        progress: is told how far it is, in bytes of blobs.

    Raises:
        NotACache: if the directory is no such cache.
        NotOurs: to move, if it is another user's, or a folder in it leads elsewhere.
        StorageError: if it cannot be listed, or nothing can be written.
    """
    return _Adopter(database, session, _OldCache(directory, database.directory), how, progress).run()


class _Unreadable(CacheError):
    """A file of the other cache cannot be read."""


class _OldCache:
    """The other cache: what lies in its folders, and what its index says."""

    def __init__(self, directory: Path, ours: Path) -> None:
        self.directory = directory
        if not any((directory / name).exists() for name in ("manifests", "blobs", "index.json")):
            raise NotACache(f"{str(directory)!r} has no manifests, blobs or index.json: there is nothing to adopt")
        if (directory / "index.db").exists() or directory.resolve() == ours.resolve():
            raise NotACache(f"{str(directory)!r} is a cache of this kind already: use it with --dir")
        if (directory / "oci-layout").exists():
            raise NotACache(f"{str(directory)!r} is an OCI image layout: use `cachedb import`")
        self.left_out: list[LeftOut] = []
        self.damage: str | None = None
        self.entries = self._read_index()
        self.blobs, strays = publish.on_disk(directory) if (directory / "blobs").exists() else ({}, [])
        self.left_out += [LeftOut("stray", None, None, path, "it is no blob") for path in strays]
        self.paths = {digest: blob_file(directory, digest) for digest in self.blobs}
        self.manifests = dict(self._find_manifests())
        for name, entry in self.entries.items():
            if name not in self.manifests and (path := self._inside(entry.get("manifest_path"))):
                self.manifests[name] = path
            for digest, said in _blobs_of(entry).items():
                if digest not in self.paths and (path := self._inside(said.get("path"))):
                    self.paths[digest] = str(path)

    def _read_index(self) -> dict[Name, dict[str, Any]]:
        """Return the index's entries by name; where it is damaged, none."""
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
                name = _name(entry.get("repository", repository), entry.get("reference", reference))
            except InvalidName as error:
                self.left_out.append(LeftOut("name", key, None, path, str(error)))
            else:
                entries[name] = entry
        return entries

    def _find_manifests(self) -> Iterator[tuple[Name, Path]]:
        top = self.directory / "manifests"

        def leave(kind: str, path: Path, detail: str) -> None:
            self.left_out.append(LeftOut(kind, path.relative_to(top).as_posix(), None, path, detail))

        def failed(error: OSError) -> None:
            if top.exists():
                leave("unreadable", Path(error.filename), explain(error))

        for folder, folders, files in os.walk(top, onerror=failed):
            folders.sort()
            for path in (path for name in folders if (path := Path(folder, name)).is_symlink()):
                leave("stray", path, "it is a link, which is not followed")
            for path in (Path(folder, name) for name in sorted(files)):
                try:
                    yield _name(path.parent.relative_to(top).as_posix(), path.name), path
                except InvalidName as error:
                    leave("name", path, str(error))

    def _inside(self, said: object) -> Path | None:
        """Return the file that is meant by a path, absolute or relative to where its writer ran, if it is in DIR."""
        if not isinstance(said, str) or "\0" in said:
            return None
        parts = PurePosixPath(said).parts
        tails = [parts[parts.index(top) :] for top in ("manifests", "blobs") if top in parts]
        for path in (self.directory.parent / said, *(self.directory.joinpath(*tail) for tail in tails)):
            with ignore_os_errors():
                inside = path.resolve().is_relative_to(self.directory.resolve())
                if inside and stat.S_ISREG(path.lstat().st_mode):
                    return path
        return None

    def check_ours(self) -> None:
        """Refuse to take away from a directory that may be something else, which has blobs as well.

        Raises:
            NotACache: if neither a manifest nor an entry of the index says that it is such a cache.
            NotOurs: if it is another user's, or a folder in it leads elsewhere.
        """
        if self.paths and not self.manifests and not self.entries:
            raise NotACache(
                f"{str(self.directory)!r} has neither manifests nor a readable index.json, so nothing is moved out of "
                "it: adopt it without --move"
            )
        with os_errors("open the cache to adopt"):
            self._folders = Folders(self.directory)
            self._folders.check_owner()
            for name in ("blobs", "manifests"):
                with suppress(FileNotFoundError), self._folders.open(name):
                    pass

    def remove(self, path: str | Path) -> None:
        """Unlink a file of the cache, after `check_ours`."""
        self._folders.remove(str(Path(path).resolve().relative_to(self.directory.resolve())))

    @cached_property
    def _manifests_by_digest(self) -> dict[Digest, Path]:
        found = {}
        for path in self.manifests.values():
            with suppress(CacheError):
                found[digest_of(_read(path))] = path
        return found

    def child(self, blob: Descriptor) -> bytes | None:
        """Return what a child of an index has, if it is there and good; it may lie among the manifests only."""
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

    def image(self, name: Name) -> _Image:
        """Return an image, with as much of its closure as is known.

        Raises:
            _Unreadable: if its manifest cannot be read.
            DigestMismatch: if the name is by another digest.
            InvalidManifest: if it is no manifest.
        """
        data = _read(self.manifests[name])
        digest = digest_of(data, name.digest)
        if name.digest not in (None, digest):
            raise DigestMismatch(f"the manifest should have digest {name.digest}, and has {digest}")
        media_type = oci.manifest_media_type(data)
        root = oci.root(digest, len(data), media_type)
        closure = list(oci.walk(root, lambda blob: data if blob is root else self.child(blob)))
        attached = _blobs_of(self.entries.get(name, {}))
        for blob in closure:
            attached.pop(blob.digest, None)
        wanted = dict.fromkeys([*(blob.digest for blob in closure if blob.digest != digest), *attached])
        return _Image(name, data, digest, media_type, closure, list(wanted), attached)


class _Image(NamedTuple):
    """An image of the other cache."""

    name: Name
    manifest: bytes
    digest: Digest
    media_type: str
    closure: list[Descriptor]
    wanted: list[Digest]  # the blobs of it, but for the manifest
    attached: dict[Digest, dict[str, Any]]  # those of them that no manifest names, as the index has them

    def as_new(self) -> NewImage:
        """Return it as it is saved. How far an index reaches depends on which of its children are brought."""
        contents = self.closure if oci.role_of(self.media_type) == "manifest" else None
        return NewImage(self.name, self.digest, self.media_type, contents)


class _Adopter:
    """One adoption: what has come of it so far."""

    def __init__(
        self, database: Database, session: Session, old: _OldCache, how: str, progress: Progress | None
    ) -> None:
        self._database, self._session, self._old, self._how = database, session, old, how
        self._advance = summed(sum(old.blobs.values()), progress)
        self._guard = threading.Lock()
        self._counted: set[Digest] = set()  # blobs that are in what `_advance` was told, once each
        self._passed = 0  # bytes of blobs that are here, and that `_advance` is still to be told
        self._left_out = old.left_out
        self._here: set[Digest] = set()  # blobs that this cache had, or was brought
        self._bad: dict[Digest, tuple[str, str]] = {}  # blobs that are of no use: kind and detail
        self._unwanted: set[Digest] = set()  # blobs of images that are left out
        self._new: dict[Digest, int] = {}
        self._names: set[Name] = set()  # of images that are in both caches now

    def run(self) -> Adoption:
        if self._how == "move":
            self._old.check_ours()
        # While one part is saved another is read; more would only wait for the write lock.
        in_threads(self._bring, self._parts(), self._advance, threads=2)
        used = len(self._new)
        done = self._here | self._bad.keys() | self._unwanted
        rest = (digest for digest in self._old.blobs if digest not in done)
        for part in batched(rest, _TOGETHER):
            self._bring([], self._advance, part)
        told = {item.digest for item in self._left_out}
        for digest, (kind, detail) in self._bad.items():
            if digest not in told:
                self._leave(kind, None, detail, digest)
        self._look_for_lost()
        with self._database.read() as connection:
            found = [image for image in save.images(connection) if image.name in self._names]
        if self._how == "move":
            self._take_away()
        unused = len(self._new) - used
        left_out = sorted(
            self._left_out, key=lambda item: (not item.name, item.name, item.digest or "", str(item.path))
        )
        return Adoption(found, len(self._new), sum(self._new.values()), unused, self._old.damage, left_out)

    def _leave(self, kind: str, name: Name | None, detail: str, digest: Digest | None = None) -> None:
        path = self._old.paths.get(digest) if digest else self._old.manifests.get(name) if name else None
        self._left_out.append(LeftOut(kind, name and str(name), digest, Path(path) if path else None, detail))

    def _parts(self) -> Iterator[list[_Image]]:
        """Divide the images that are not here into what is taken together."""
        part: list[_Image] = []
        wanted: dict[Digest, int] = {}
        for name, is_here in self._names_to_adopt():
            try:
                image = self._old.image(name)
            except (_Unreadable, DigestMismatch, InvalidManifest) as error:
                kind = {_Unreadable: "unreadable", DigestMismatch: "corrupt"}.get(type(error), "manifest")
                self._leave(kind, name, str(error))
                continue
            if is_here:
                with self._database.read() as connection:
                    settled = self._is_settled(connection, image)
                self._report_passed()
                if settled:
                    continue
            part.append(image)
            wanted.update(
                (digest, self._old.blobs.get(digest, 0)) for digest in image.wanted if digest not in self._here
            )
            if len(part) + len(wanted) >= _TOGETHER or sum(wanted.values()) >= _BYTES_TOGETHER:
                yield part
                part, wanted = [], {}
        if part:
            yield part

    def _names_to_adopt(self) -> Iterator[tuple[Name, bool]]:
        """Yield the names of the images, and whether one of that name is here; to ask for each would take longer."""
        for names in batched(self._old.manifests):
            with self._database.read() as connection:
                here = save.look_up_all(connection, names)
            yield from ((name, name in here) for name in names)

    def _is_settled(self, connection: Connection, image: _Image) -> bool:
        """Say whether an image is here with all its blobs; or another of its name, which is not replaced."""
        found = save.look_up(connection, image.name)
        if found is None:
            return False
        if found.digest != image.digest:
            detail = f"it is {found.digest} in this cache: `cachedb rm` that first, or `cachedb tag` it"
            self._leave("exists", image.name, detail)
            self._unwanted.update(image.wanted)
            return True
        contents = save.image_blobs(connection, self._database.directory, found.id)
        if not {blob.digest for blob in contents if blob.stored}.issuperset([image.digest, *image.wanted]):
            return False
        self._names.add(image.name)
        self._pass(image.wanted)
        return True

    def _pass(self, digests: Iterable[Digest]) -> None:
        """Note blobs that are here."""
        for digest in digests:
            self._here.add(digest)
            if self._is_first(digest):
                with self._guard:
                    self._passed += self._old.blobs.get(digest, 0)

    def _report_passed(self) -> None:
        """Report the bytes of the blobs that are here; in no transaction, for it calls a function of our caller."""
        with self._guard:
            passed, self._passed = self._passed, 0
        if passed:
            self._advance(passed)

    def _is_first(self, digest: Digest) -> bool:
        """Say whether a blob is to be counted: both of two parts may read one that is in both."""
        with self._guard:
            known = digest in self._counted
            self._counted.add(digest)
            return not known

    def _bring(self, part: list[_Image], advance: Advance, more: Iterable[Digest] = ()) -> None:
        """Bring images and their blobs, or blobs that belong to none, in one transaction."""
        manifests = {image.digest: image.manifest for image in part}
        wanted = dict.fromkeys([*(digest for image in part for digest in image.wanted), *more, *manifests])

        def receive(hold: Hold, received: dict[object, Received]) -> None:
            self._pass(hold.digests)
            self._report_passed()
            rest = [digest for digest in wanted if digest not in hold.digests and digest not in self._bad]

            def receive_one(digest: Digest, advance: Advance) -> None:
                if digest in manifests:
                    data = manifests[digest]
                    received[digest] = publish.receive(self._session, BytesIO(data), digest=digest, size=len(data))
                else:
                    counted = self._is_first(digest)
                    self._receive(received, digest, lambda count: advance(count if counted else 0))

            in_threads(receive_one, rest, advance)
            self._here.update(blob.digest for blob in received.values())
            self._new.update({blob.digest: blob.size for blob in received.values()})

        save.bring(self._database, self._session, wanted, receive, lambda connection: self._save(connection, part))
        self._report_passed()

    def _receive(self, received: dict[object, Received], digest: Digest, advance: Advance) -> None:
        """Receive a blob, or note what is wrong with it."""
        path = self._old.paths.get(digest)
        if path is None:
            return
        try:
            with _opened(path) as file:
                size = os.fstat(file).st_size

                def source() -> _Source:
                    os.lseek(file, 0, os.SEEK_SET)
                    return _Source(file)

                if self._how == "copy":
                    found = publish.receive(self._session, source(), digest=digest, size=size, progress=advance)
                else:
                    move, session = self._how == "move", self._session
                    found = publish.receive_linked(
                        session, source, file, path, digest=digest, size=size, read_only=move, progress=advance
                    )
                received[digest] = found
        except (_Unreadable, publish.Replaced) as error:
            self._bad[digest] = ("unreadable", str(error))
        except DigestMismatch as error:
            self._bad[digest] = ("corrupt", str(error))

    def _save(self, connection: Connection, part: list[_Image]) -> None:
        """Save images, and say what they lack."""
        ours = self._database.directory
        here = save.look_up_all(connection, [image.name for image in part])
        rest = [image for image in part if image.name not in here or not self._is_settled(connection, image)]
        refused = save.save_new(connection, ours, [image.as_new() for image in rest if image.name not in here])
        for image in rest:
            if image.name in here:  # and incomplete
                try:
                    save.save(connection, ours, image.name, image.digest, image.media_type)
                except InvalidManifest as error:
                    refused[image.name] = error
            if image.name in refused:
                self._leave("manifest", image.name, str(refused[image.name]))
            else:
                self._complete(connection, image)

    def _complete(self, connection: Connection, image: _Image) -> None:
        """Attach to an image that was saved what no manifest names, and say what it lacks."""
        for digest, said in image.attached.items():
            if digest in self._here:
                attached = (image.name, digest, *_role_and_media_type(said))
                save.attach(connection, self._database.directory, *attached)
        self._names.add(image.name)
        for digest in image.wanted:
            if digest not in self._here:
                kind, detail = self._bad.get(digest, ("missing", "it is not there"))
                self._leave(kind, image.name, detail, digest)

    def _look_for_lost(self) -> None:
        """Leave out what the index has and the folders have not, unless it is here from an earlier adoption."""
        path = self._old.directory / "index.json"
        for name, entry in self._old.entries.items():
            if name in self._old.manifests:
                continue
            with self._database.read() as connection:
                found = save.look_up(connection, name)
                contents = save.image_blobs(connection, self._database.directory, found.id) if found else []
                if found and {blob.digest for blob in contents if blob.stored}.issuperset(_blobs_of(entry)):
                    self._names.add(name)
                    continue
            detail = "index.json names it, and its manifest is not there"
            self._left_out.append(LeftOut("missing", str(name), None, path, detail))

    def _take_away(self) -> None:
        """Delete from the other cache what is in this one: also what an adoption that was cut off has left."""
        ours = self._database.directory
        with self._database.read() as connection:
            stored = publish.intact(connection, ours, self._old.paths)
        with os_errors("take away what was adopted"):
            for digest in stored:
                if digest in self._new or _is_good(ours, digest):
                    self._old.remove(self._old.paths[digest])
            for name, path in self._old.manifests.items():
                if name in self._names:
                    self._old.remove(path)
            for folder, _, _ in os.walk(self._old.directory / "manifests", topdown=False):
                if Path(folder) != self._old.directory / "manifests":
                    with ignore_os_errors():
                        os.rmdir(folder)
            if not self._left_out:
                self._old.remove(self._old.directory / "index.json")


class _Source:
    """A file of the other cache that is being read."""

    def __init__(self, file: int) -> None:
        self._file = file

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill the front of the buffer and return how many bytes there were; 0 is the end."""
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
        raise _Unreadable(explain(error)) from error


@contextmanager
def _opened(path: Path | str) -> Iterator[int]:
    """Open a regular file, and no link to one. A fifo must not hold us up."""
    with _reading():
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise _Unreadable("it is no file")
        yield file
    finally:
        os.close(file)


def _read(path: Path | str, limit: int = DOCUMENT_LIMIT) -> bytes:
    """Return what a small file has."""
    with _opened(path) as file:
        if (size := os.fstat(file).st_size) > limit:
            raise InvalidManifest(f"it is {size} bytes; more than {limit} are refused")
        with _reading():
            return os.pread(file, size, 0)


def _is_good(directory: Path, digest: Digest) -> bool:
    """Read a blob of this cache, and say whether it is what its name says."""
    try:
        with reader.open_blob(directory, digest) as file, os_errors("read a blob"):
            writer.receive(file, None, digest=digest)
    except CacheError:
        return False
    return True


def _name(repository: object, reference: object) -> Name:
    if not isinstance(repository, str) or not isinstance(reference, str):
        raise InvalidName(f"{shorten(repository)} and {shorten(reference)} are no name")
    return Name.parse(Name(repository, reference))


def _blobs_of(entry: dict[str, Any]) -> dict[Digest, dict[str, Any]]:
    """Return the blobs that an entry of the index has, by their digests."""
    found = {}
    said = entry.get("blobs")
    for digest, blob in said.items() if isinstance(said, dict) else ():
        with suppress(InvalidDigest):
            found[parse_digest(digest)] = blob if isinstance(blob, dict) else {}
    return found


def _role_and_media_type(said: dict[str, Any]) -> tuple[str, str]:
    """Return what the index says of a blob that no manifest names."""
    media_type = said.get("media_type") or "application/octet-stream"
    with suppress(InvalidManifest):
        return "config" if said.get("is_config") is True else "other", oci.check_media_type(media_type, "a blob")
    return "other", "application/octet-stream"
