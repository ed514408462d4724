"""Taking over a cache whose index is one ``index.json``.

    DIR/manifests/{repository}/{reference}   the manifest's bytes
    DIR/blobs/sha256/{hex}                   a blob
    DIR/index.json                           what the cache said of them, by "{repository}/{reference}"

The files come before the index, which was often cut short or out of date: an image's name is where its manifest lies,
its blobs are what its manifest names, and a blob is what its content says. The index adds blobs that were attached to
an image, and what lies elsewhere in DIR. All of it comes from strangers, and nothing outside DIR is read.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Final, Literal, NamedTuple

from sqlalchemy import Connection

from cachedb import oci
from cachedb.content import publish
from cachedb.content.save import NewImage, attach, save_image, save_new
from cachedb.content.session import Hold, Session
from cachedb.disk.writer import Received
from cachedb.errors import (
    DigestMismatch,
    InvalidManifest,
    ignore_os_errors,
    os_errors,
)
from cachedb.index.images import ImageInfo, image_blobs, look_up, look_up_all
from cachedb.index.images import images as stored_images
from cachedb.index.sqlite.batches import batched
from cachedb.index.sqlite.database import Database
from cachedb.oci.digests import Digest
from cachedb.oci.names import Name
from cachedb.progress import Advance, Progress, summed
from cachedb.threads import in_threads
from cachedb.transports.json_cache import (
    LeftOut,
    OldBlobs,
    OldCache,
    OldImage,
    UnreadableEntry,
    is_good,
    open_bounded,
    read_blobs,
    role_and_media_type,
)

__all__ = ["HOWS", "Adoption", "How", "adopt"]


How = Literal["copy", "link", "move"]
HOWS: Final[tuple[How, ...]] = ("copy", "link", "move")
"""How blobs come: as copies; as hard links, where the file system can; or so that the other cache has them no more."""

_TOGETHER = 200  # blobs that are brought before the images that need them are saved in one transaction,
_BYTES_TOGETHER = 1024**3  # or bytes


class Adoption(NamedTuple):
    """What was taken over."""

    images: list[ImageInfo]  # those in both caches now, also if they were before
    blobs: int  # that this cache did not have
    bytes: int  # of those
    unused: int  # of those, the ones that no image uses: `gc` frees them
    index_damage: str | None  # what is wrong with index.json, if it could not be used
    left_out: list[LeftOut]  # by name, then digest; last what belongs to no image


def adopt(
    database: Database, session: Session, directory: Path, *, how: How = "copy", progress: Progress | None = None
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
    return _Adopter(database, session, OldCache(directory, database.directory), how, progress).run()


class _Adopter:
    """One adoption: what has come of it so far."""

    def __init__(
        self, database: Database, session: Session, old: OldCache, how: How, progress: Progress | None
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
            found = [image for image in stored_images(connection) if image.name in self._names]
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

    def _parts(self) -> Iterator[list[OldImage]]:
        """Divide the images that are not here into what is taken together."""
        part: list[OldImage] = []
        wanted: dict[Digest, int] = {}
        for name, is_here in self._names_to_adopt():
            try:
                image = self._old.image(name)
            except (UnreadableEntry, DigestMismatch, InvalidManifest) as error:
                kind = {UnreadableEntry: "unreadable", DigestMismatch: "corrupt"}.get(type(error), "manifest")
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
                here = look_up_all(connection, names)
            yield from ((name, name in here) for name in names)

    def _is_settled(self, connection: Connection, image: OldImage) -> bool:
        """Say whether an image is here with all its blobs; or another of its name, which is not replaced."""
        found = look_up(connection, image.name)
        if found is None:
            return False
        if found.digest != image.digest:
            detail = f"it is {found.digest} in this cache: `cachedb rm` that first, or `cachedb tag` it"
            self._leave("exists", image.name, detail)
            self._unwanted.update(image.wanted)
            return True
        contents = image_blobs(connection, self._database.directory, found.id)
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

    def _bring(self, part: list[OldImage], advance: Advance, more: Iterable[Digest] = ()) -> None:
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

        publish.bring(self._database, self._session, wanted, receive, lambda connection: self._save(connection, part))
        self._report_passed()

    def _receive(self, received: dict[object, Received], digest: Digest, advance: Advance) -> None:
        """Receive a blob, or note what is wrong with it."""
        path = self._old.paths.get(digest)
        if path is None:
            return
        try:
            with open_bounded(path) as file:
                size = os.fstat(file).st_size

                def source() -> OldBlobs:
                    os.lseek(file, 0, os.SEEK_SET)
                    return OldBlobs(file)

                if self._how == "copy":
                    found = publish.receive(self._session, source(), digest=digest, size=size, progress=advance)
                else:
                    move, session = self._how == "move", self._session
                    found = publish.receive_linked(
                        session, source, file, path, digest=digest, size=size, read_only=move, progress=advance
                    )
                received[digest] = found
        except (UnreadableEntry, publish.Replaced) as error:
            self._bad[digest] = ("unreadable", str(error))
        except DigestMismatch as error:
            self._bad[digest] = ("corrupt", str(error))

    def _save(self, connection: Connection, part: list[OldImage]) -> None:
        """Save images, and say what they lack."""
        ours = self._database.directory
        here = look_up_all(connection, [image.name for image in part])
        rest = [image for image in part if image.name not in here or not self._is_settled(connection, image)]
        refused = save_new(connection, ours, [_as_new(image) for image in rest if image.name not in here])
        for image in rest:
            if image.name in here:  # and incomplete
                try:
                    save_image(connection, ours, image.name, image.digest, image.media_type)
                except InvalidManifest as error:
                    refused[image.name] = error
            if image.name in refused:
                self._leave("manifest", image.name, str(refused[image.name]))
            else:
                self._complete(connection, image)

    def _complete(self, connection: Connection, image: OldImage) -> None:
        """Attach to an image that was saved what no manifest names, and say what it lacks."""
        for digest, said in image.attached.items():
            if digest in self._here:
                attached = (image.name, digest, *role_and_media_type(said))
                attach(connection, self._database.directory, *attached)
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
                found = look_up(connection, name)
                contents = image_blobs(connection, self._database.directory, found.id) if found else []
                if found and {blob.digest for blob in contents if blob.stored}.issuperset(read_blobs(entry)):
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
                if digest in self._new or is_good(ours, digest):
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


def _as_new(image: OldImage) -> NewImage:
    """Return an image as it is saved. How far an index reaches depends on which of its children are brought."""
    contents = image.closure if oci.role_of(image.media_type) == "manifest" else None
    return NewImage(image.name, image.digest, image.media_type, contents)
