"""Adopt an older cache whose index is one ``index.json``.

    DIR/manifests/{repository}/{reference}   the manifest's bytes
    DIR/blobs/sha256/{hex}                   a blob
    DIR/index.json                           the index entries, by "{repository}/{reference}"

The files are trusted before the index, which was often truncated or out of date. An image's name is the path of its
manifest, the manifest lists its blobs, and each blob is verified. The index adds blobs that were attached to an image,
and files elsewhere in DIR. All input is untrusted, and nothing outside DIR is read.
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
from cachedb.index import lifetimes
from cachedb.index.images import look_up, look_up_all, read_image_blobs, read_images
from cachedb.index.records import ImageInfo
from cachedb.index.sqlite.batches import split_batches
from cachedb.index.sqlite.database import Database
from cachedb.oci.digests import Digest
from cachedb.oci.names import Name
from cachedb.progress import Advance, Progress, sum_progress
from cachedb.threads import in_threads
from cachedb.transports.json_cache import (
    LeftOut,
    OldCache,
    OldFile,
    OldImage,
    UnreadableEntry,
    is_intact,
    open_bounded,
    read_blobs,
    read_role_and_media_type,
)

__all__ = ["HOWS", "Adoption", "How", "adopt"]


How = Literal["copy", "link", "move"]
HOWS: Final[tuple[How, ...]] = ("copy", "link", "move")
"""How to adopt blobs: copy them, hard-link them where possible, or move them out of the older cache."""

_BATCH = 200  # manifests and blobs to adopt in one transaction
_BATCH_BYTES = 1024**3  # blobs to adopt in one transaction


class Adoption(NamedTuple):
    """The result of an adoption."""

    images: list[ImageInfo]  # the images now in both caches, new or not
    blobs: int  # new blobs in this cache
    bytes: int  # of the new blobs
    unused: int  # new blobs that no image uses; `gc` frees them
    index_damage: str | None  # why index.json could not be used, if so
    left_out: list[LeftOut]  # by name, then digest; those without an image last


def adopt(
    database: Database,
    session: Session,
    directory: Path,
    *,
    how: How = "copy",
    ttl: float | None = None,
    progress: Progress | None = None,
) -> Adoption:
    """Adopt an older cache whose index is one ``index.json``; blobs already stored are not read again.

    Args:
        database: the index of this cache.
        session: the session that receives the blobs.
        directory: the older cache.
        how: one of `HOWS`; ``move`` deletes adopted files from the directory at the end.
        ttl: seconds until the names expire, whether they were here or not; None for never.
        progress: called with the bytes of blobs done and the total.

    Raises:
        NotACache: if the directory is not such a cache.
        NotOurs: for ``move``, if the directory belongs to another user, or a folder in it leads out of it.
        StorageError: if the directory cannot be listed, or this cache cannot be written.
    """
    return _Adopter(database, session, OldCache(directory, database.directory), how, ttl, progress).run()


class _Adopter:
    """The state of one adoption."""

    def __init__(
        self,
        database: Database,
        session: Session,
        old: OldCache,
        how: How,
        ttl: float | None,
        progress: Progress | None,
    ) -> None:
        self._database, self._session, self._old, self._how, self._ttl = database, session, old, how, ttl
        self._advance = sum_progress(sum(old.blobs.values()), progress)
        self._guard = threading.Lock()
        self._counted: set[Digest] = set()  # blobs already counted in the progress
        self._unreported = 0  # bytes of stored blobs that are not yet reported to `_advance`
        self._left_out = old.left_out
        self._here: set[Digest] = set()  # blobs stored in this cache
        self._bad: dict[Digest, tuple[str, str]] = {}  # unusable blobs: kind and detail
        self._unwanted: set[Digest] = set()  # blobs of images that are left out
        self._new: dict[Digest, int] = {}  # new blobs and their sizes in bytes
        self._names: set[Name] = set()  # of images now in both caches
        self._settled: dict[Name, Digest] = {}  # of these, the images that were complete here before

    def run(self) -> Adoption:
        if self._how == "move":
            self._old.check_ours()
        # One thread reads a part while the other saves one. More threads would only wait for the write lock.
        in_threads(self._adopt_part, self._read_parts(), self._advance, threads=2)
        used = len(self._new)
        done = self._here | self._bad.keys() | self._unwanted
        rest = (digest for digest in self._old.blobs if digest not in done)
        for part in split_batches(rest, _BATCH):
            self._adopt_part([], self._advance, part)
        reported = {item.digest for item in self._left_out}
        for digest, (kind, detail) in self._bad.items():
            if digest not in reported:
                self._leave_out(kind, None, detail, digest)
        self._leave_out_lost()
        found = self._set_lifetimes(self._read_adopted())
        if self._how == "move":
            self._delete_adopted({image.name: image.digest for image in found})
        unused = len(self._new) - used
        left_out = sorted(
            self._left_out, key=lambda item: (not item.name, item.name, item.digest or "", str(item.path))
        )
        return Adoption(found, len(self._new), sum(self._new.values()), unused, self._old.damage, left_out)

    def _leave_out(self, kind: str, name: Name | None, detail: str, digest: Digest | None = None) -> None:
        path = self._old.paths.get(digest) if digest else self._old.manifests.get(name) if name else None
        self._left_out.append(LeftOut(kind, name and str(name), digest, Path(path) if path else None, detail))

    def _read_parts(self) -> Iterator[list[OldImage]]:
        """Yield the images that are not complete here, in parts that are saved together."""
        part: list[OldImage] = []
        wanted: dict[Digest, int] = {}
        for name, is_here in self._look_up_names():
            try:
                image = self._old.image(name)
            except (UnreadableEntry, DigestMismatch, InvalidManifest) as error:
                kind = {UnreadableEntry: "unreadable", DigestMismatch: "corrupt"}.get(type(error), "manifest")
                self._leave_out(kind, name, str(error))
                continue
            if is_here:
                with self._database.read() as connection:
                    is_settled = self._is_settled(connection, image)
                self._report_stored()
                if is_settled:
                    continue
            part.append(image)
            wanted.update(
                (digest, self._old.blobs.get(digest, 0)) for digest in image.wanted if digest not in self._here
            )
            if len(part) + len(wanted) >= _BATCH or sum(wanted.values()) >= _BATCH_BYTES:
                yield part
                part, wanted = [], {}
        if part:
            yield part

    def _look_up_names(self) -> Iterator[tuple[Name, bool]]:
        """Yield each name and whether this cache has it; the names are looked up in batches for speed."""
        for names in split_batches(self._old.manifests):
            with self._database.read() as connection:
                here = look_up_all(connection, names)
            yield from ((name, name in here) for name in names)

    def _is_settled(self, connection: Connection, image: OldImage) -> bool:
        """Return whether nothing is left to do for an image: it is complete here, or its name is taken."""
        found = look_up(connection, image.name)
        if found is None:
            return False
        if found.digest != image.digest:
            detail = f"in this cache the name points to {found.digest}: remove it first with `cachedb rm`"
            self._leave_out("exists", image.name, detail)
            self._unwanted.update(image.wanted)
            return True
        contents = read_image_blobs(connection, self._database.directory, found.id)
        if not {blob.digest for blob in contents if blob.stored}.issuperset([image.digest, *image.wanted]):
            return False
        self._names.add(image.name)
        self._settled[image.name] = image.digest
        self._record_stored(image.wanted)
        return True

    def _record_stored(self, digests: Iterable[Digest]) -> None:
        """Record blobs that are stored here already."""
        for digest in digests:
            self._here.add(digest)
            if self._is_first(digest):
                with self._guard:
                    self._unreported += self._old.blobs.get(digest, 0)

    def _report_stored(self) -> None:
        """Report the bytes of stored blobs, outside of transactions: this calls the caller's function."""
        with self._guard:
            count, self._unreported = self._unreported, 0
        if count:
            self._advance(count)

    def _is_first(self, digest: Digest) -> bool:
        """Return whether to count a blob: only at the first call, because two parts may read the same blob."""
        with self._guard:
            known = digest in self._counted
            self._counted.add(digest)
            return not known

    def _adopt_part(self, part: list[OldImage], advance: Advance, more: Iterable[Digest] = ()) -> None:
        """Adopt some images with their blobs, or blobs without an image, in one transaction."""
        manifests = {image.digest: image.manifest for image in part}
        wanted = dict.fromkeys([*(digest for image in part for digest in image.wanted), *more, *manifests])

        def receive(hold: Hold, received: dict[object, Received]) -> None:
            self._record_stored(hold.digests)
            self._report_stored()
            rest = [digest for digest in wanted if digest not in hold.digests and digest not in self._bad]

            def receive_one(digest: Digest, advance: Advance) -> None:
                if digest in manifests:
                    data = manifests[digest]
                    received[digest] = publish.receive(self._session, BytesIO(data), digest=digest, size=len(data))
                else:
                    is_first = self._is_first(digest)
                    self._receive(received, digest, lambda count: advance(count if is_first else 0))

            in_threads(receive_one, rest, advance)
            self._here.update(blob.digest for blob in received.values())
            self._new.update({blob.digest: blob.size for blob in received.values()})

        publish.receive_and_save(
            self._database, self._session, wanted, receive, lambda connection: self._save(connection, part)
        )
        self._report_stored()

    def _receive(self, received: dict[object, Received], digest: Digest, advance: Advance) -> None:
        """Receive a blob, or record why it is unusable."""
        path = self._old.paths.get(digest)
        if path is None:
            return
        try:
            with open_bounded(path) as file:
                size = os.fstat(file).st_size

                def source() -> OldFile:
                    os.lseek(file, 0, os.SEEK_SET)
                    return OldFile(file)

                if self._how == "copy":
                    found = publish.receive(self._session, source(), digest=digest, size=size, progress=advance)
                else:
                    move, session = self._how == "move", self._session
                    found = publish.receive_linked(
                        session, source, file, path, digest=digest, size=size, read_only=move, progress=advance
                    )
                received[digest] = found
        except (UnreadableEntry, publish.FileReplaced) as error:
            self._bad[digest] = ("unreadable", str(error))
        except DigestMismatch as error:
            self._bad[digest] = ("corrupt", str(error))

    def _save(self, connection: Connection, part: list[OldImage]) -> None:
        """Save images, and leave out those that are refused."""
        ours = self._database.directory
        here = look_up_all(connection, [image.name for image in part])
        rest = [image for image in part if image.name not in here or not self._is_settled(connection, image)]
        new = [_to_new_image(image) for image in rest if image.name not in here]
        refused = save_new(connection, ours, new, ttl=self._ttl)
        for image in rest:
            if image.name in here:  # the image is here, but incomplete
                try:
                    save_image(connection, ours, image.name, image.digest, image.media_type, ttl=self._ttl)
                except InvalidManifest as error:
                    refused[image.name] = error
            if image.name in refused:
                self._leave_out("manifest", image.name, str(refused[image.name]))
            else:
                self._complete(connection, image)

    def _complete(self, connection: Connection, image: OldImage) -> None:
        """Attach to a saved image the blobs that only index.json lists; record its missing blobs."""
        for digest, entry in image.attached.items():
            if digest in self._here:
                attached = (image.name, digest, *read_role_and_media_type(entry))
                attach(connection, self._database.directory, *attached)
        self._names.add(image.name)
        for digest in image.wanted:
            if digest not in self._here:
                kind, detail = self._bad.get(digest, ("missing", "its file does not exist"))
                self._leave_out(kind, image.name, detail, digest)

    def _leave_out_lost(self) -> None:
        """Leave out index entries without a manifest file, unless an earlier adoption stored their image."""
        path = self._old.directory / "index.json"
        for name, entry in self._old.entries.items():
            if name in self._old.manifests:
                continue
            with self._database.read() as connection:
                found = look_up(connection, name)
                contents = read_image_blobs(connection, self._database.directory, found.id) if found else []
                if found and {blob.digest for blob in contents if blob.stored}.issuperset(read_blobs(entry)):
                    self._names.add(name)
                    self._settled[name] = found.digest
                    continue
            detail = "index.json names the image, but its manifest is missing"
            self._left_out.append(LeftOut("missing", str(name), None, path, detail))

    def _read_adopted(self) -> list[ImageInfo]:
        with self._database.read() as connection:
            return [image for image in read_images(connection) if image.name in self._names]

    def _set_lifetimes(self, found: list[ImageInfo]) -> list[ImageInfo]:
        """Set the lifetimes of images that were complete here before; return all adopted images."""
        changed = [
            image.name
            for image in found
            if image.name in self._settled and not (self._ttl is None and image.expires_at is None)
        ]
        for names in split_batches(changed):
            with self._database.write() as connection:
                for name, row in look_up_all(connection, names).items():
                    if row.digest == self._settled[name]:
                        lifetimes.set_lifetime(connection, row.id, self._ttl)
        return self._read_adopted() if changed else found

    def _delete_adopted(self, adopted: dict[Name, Digest]) -> None:
        """Delete the adopted files from the older cache, including those of an interrupted adoption.

        A manifest or an index that was written meanwhile stays.

        Args:
            adopted: the images now in both caches, with the digests of their manifests.
        """
        ours = self._database.directory
        with self._database.read() as connection:
            stored = publish.find_intact(connection, ours, self._old.paths)
        with os_errors("delete the adopted files"):
            for digest in stored:
                if digest in self._new or is_intact(ours, digest):
                    self._old.remove(self._old.paths[digest])
            for name, path in self._old.manifests.items():
                if self._old.has_digest(path, adopted.get(name)):
                    self._old.remove(path)
            for folder, _, _ in os.walk(self._old.directory / "manifests", topdown=False):
                if Path(folder) != self._old.directory / "manifests":
                    with ignore_os_errors():
                        os.rmdir(folder)
            if not self._left_out and self._old.is_index_unchanged():
                self._old.remove(self._old.directory / "index.json")


def _to_new_image(image: OldImage) -> NewImage:
    """Convert an image of the older cache; an index gets its closure later, from its adopted children."""
    contents = image.closure if oci.role_of(image.media_type) == "manifest" else None
    return NewImage(image.name, image.digest, image.media_type, contents)
