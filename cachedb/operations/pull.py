"""Pulling: an image comes from a registry, and of it what is not here.

Each blob is stored as soon as it is all there, so that others who wait for it have it, and one that was cut off goes
on where it stopped. The image appears when it is complete.
"""

from __future__ import annotations

from contextlib import suppress
from io import BytesIO
from typing import NamedTuple

from sqlalchemy import Connection

from cachedb import oci
from cachedb.content import publish, save
from cachedb.content.session import Hold, Session
from cachedb.disk import downloads, reader, single_flight
from cachedb.disk.layout import partial_path
from cachedb.disk.reserve import is_full
from cachedb.disk.waiting import LOG
from cachedb.disk.writer import Received
from cachedb.errors import (
    CacheError,
    InvalidManifest,
    NotInCache,
    RegistryError,
    RegistryUnavailable,
    StorageError,
    ignore_os_errors,
)
from cachedb.index import images
from cachedb.index.blobs import stored
from cachedb.index.images import ImageInfo
from cachedb.index.sqlite.database import Database
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import Descriptor
from cachedb.operations.pull_source import AT_ONCE, Root, Source
from cachedb.progress import Advance, BlobProgress, Progress, blob_reporter, summed
from cachedb.text import shorten
from cachedb.threads import in_threads

__all__ = ["Pulled", "pull"]


_MANIFESTS = 1000  # that an image may have with all that refers to it


class Pulled(NamedTuple):
    """What a pull has come to."""

    image: ImageInfo
    blobs: int  # that were downloaded, or received from another process's download
    bytes: int  # of those
    stale: str | None  # why the registry was not asked, where a copy from before is what there is


def pull(
    database: Database,
    session: Session,
    source: Source,
    *,
    platform: str | None = None,
    if_missing: bool = False,
    allow_stale: bool = False,
    referrers: bool = False,
    progress: Progress | None = None,
    blob_progress: BlobProgress | None = None,
) -> Pulled:
    """Bring an image from a registry; of several processes that want the same one, one does and the others wait.

    Args:
        database: of the cache.
        session: to work in.
        source: of the image.
        platform: ``os/architecture[/variant]``, if one was asked for.
        if_missing: ask no registry if the image is here and complete, whatever its tag points to by now.
        allow_stale: where no registry can be reached, take what is here.
        referrers: attach to the image what the registry lists as referring to it.
        progress: is told how far it is, in bytes.
        blob_progress: is told how far it is with each blob.

    Raises:
        RegistryError: if it cannot be had.
        NotInCache: if it is not for that platform.
        InvalidManifest: if a manifest of it is invalid.
        DigestMismatch: if what comes has another digest or size than it should.
    """
    work = _Pull(database, session, source, platform, referrers, progress, blob_progress)

    def find() -> Pulled | None:
        here = work.here() if if_missing or (source.name.digest and not referrers) else None
        return here and Pulled(here, 0, 0, None)

    source.let_go()
    # Whoever waits takes over from one that makes no progress: both go on, and wait for each other's blobs.
    with single_flight.once(
        database.directory, source.key, find, seconds=database.wait_seconds, may_take_over=True, is_working=None
    ) as found:
        return found or work.run(allow_stale)


class _Pull:
    """One pull: what it has learned so far."""

    def __init__(
        self,
        database: Database,
        session: Session,
        source: Source,
        platform: str | None,
        referrers: bool,
        progress: Progress | None,
        blob_progress: BlobProgress | None,
    ) -> None:
        self._database, self._session, self._source, self._name = database, session, source, source.name
        self._platform, self._referrers = platform, referrers
        self._progress, self._blob_progress = progress, blob_progress
        self._holds: list[Hold] = []  # of blobs that were stored on the way
        self._come: dict[Digest, int] = {}

    def run(self, allow_stale: bool) -> Pulled:
        here = self.here()
        try:
            said = self._source.digest()
            if here and here.digest == said and not self._referrers:
                return Pulled(here, 0, 0, None)
            return self._bring(self._root(said))
        except RegistryUnavailable as error:
            if here and allow_stale:
                return Pulled(here, 0, 0, str(error))
            raise

    def here(self) -> ImageInfo | None:
        """Return the image, if it is here with all that is wanted of it."""
        with self._database.read() as connection:
            found = images.look_up(connection, self._name)
            if found is None:
                return None
            info, contents = images.image(connection, self._database.directory, found.id)
            root = images.root_of(connection, found.id)
            known = {blob.digest for blob in contents if blob.stored}
            with suppress(InvalidManifest, NotInCache):
                closure = save.closure(connection, self._database.directory, root, self._source.choose)
                return info if known.issuperset(blob.digest for blob in closure) and self._fits(root, info) else None
        return None

    def _root(self, said: Digest | None) -> Root:
        """Return the manifest or index that the name points to."""
        if said is not None and (data := self._stored(said)) is not None:
            return Root(said, oci.manifest_media_type(data), data)
        return self._source.root(said)

    def _stored(self, digest: Digest) -> bytes | None:
        """Return a document that is in the cache already, if it is good."""
        with self._database.read() as connection:
            size = stored(connection, [digest]).get(digest)
        return None if size is None else reader.document(self._database.directory, digest, size)

    def _child(self, blob: Descriptor) -> bytes:
        """Return a manifest that an index names."""
        return self._source.child(blob, self._stored)

    def _bring(self, root: Root) -> Pulled:
        closure, chosen = self._closure(root)
        top = closure[0]
        attached = self._referring(closure) if self._referrers else []
        wanted = {blob.digest: blob for blob in [*closure, *attached]}

        def receive(hold: Hold, received: dict[object, Received]) -> None:
            for digest, data in self._source.documents.items():
                if digest not in hold.digests:
                    received[digest] = publish.receive(self._session, BytesIO(data), digest=digest)
            there = hold.digests | self._source.documents.keys()
            rest = sorted(
                (blob for digest, blob in wanted.items() if digest not in there), key=lambda blob: -blob.size
            )  # the large ones first, so that all threads come to their end together
            advance = summed(sum(blob.size for blob in rest), self._progress)
            in_threads(self._fetch, rest, advance, threads=AT_ONCE, stop=self._source.stop)

        def save_all(connection: Connection) -> ImageInfo:
            for hold in self._holds:
                self._session.release(connection, hold)
            among = chosen | self._before(connection, root.digest) if self._source.wanted else None
            image_id = save.save_image(
                connection,
                self._database.directory,
                self._name,
                root.digest,
                root.media_type,
                oci.among(among) if among and top.role == "index" else None,
            )
            for blob in attached:
                role = blob.role if blob.role in ("manifest", "index") else "other"
                save.attach(connection, self._database.directory, self._name, blob.digest, role, blob.media_type)
            info = images.image(connection, self._database.directory, image_id)[0]
            if not self._fits(top, info):
                asked = shorten(self._platform)
                raise NotInCache(f"{self._name} is not for platform {asked}, but for {info.platform}", name=self._name)
            return info

        try:
            info = publish.bring(self._database, self._session, wanted, receive, save_all)
        except BaseException as error:
            self._give_up(error)
            raise
        return Pulled(info, len(self._come), sum(self._come.values()), None)

    def _closure(self, root: Root) -> tuple[list[Descriptor], set[Digest]]:
        """Return what is wanted of an image, its root first, and which children of its indexes were chosen for that."""
        self._source.documents[root.digest] = root.data
        top, chosen = root.descriptor, set[Digest]()

        def choose(children: list[Descriptor]) -> list[Descriptor]:
            found = self._source.choose(children)
            chosen.update(child.digest for child in found)
            return found

        return list(oci.walk(top, lambda blob: root.data if blob is top else self._child(blob), choose)), chosen

    def _give_up(self, error: BaseException) -> None:
        """Let go of what was stored on the way; on a full disk, of what is left of downloads as well."""
        for hold in self._holds:
            publish.give_up(self._database, self._session, hold)
        if isinstance(error, StorageError) and is_full(error):
            with suppress(CacheError), ignore_os_errors():
                downloads.sweep(self._database.folders, age=0)  # there is more need of the space

    def _referring(self, closure: list[Descriptor]) -> list[Descriptor]:
        """Return what refers to the manifests of a closure, and to that in turn: signatures, SBOMs, attestations."""
        found: list[Descriptor] = []
        asked = [blob for blob in closure if blob.role in ("manifest", "index")]
        known = {blob.digest for blob in asked}
        while asked:
            subject = asked.pop().digest
            for root in self._listed(subject):
                # An image has no need of what is for another one, or is none that can be kept.
                if root.digest in known or root.role == "other" or not self._refers(root, subject):
                    continue
                if len(known) >= _MANIFESTS:
                    raise RegistryError(f"{self._name} has more than {_MANIFESTS} manifests that refer to it")
                known.add(root.digest)
                asked.append(root)
                found += oci.walk(root, self._child)
        return found

    def _refers(self, root: Descriptor, subject: Digest) -> bool:
        """Say whether what is listed as referring to a manifest does: not if it was deleted, and the list was not."""
        new = root.digest not in self._source.documents
        try:
            refers = oci.subject_of(self._child(root)) == subject
        except RegistryError:
            if self._source.repositories[-1].has("manifests", root.digest):
                raise
            return False
        if new and not refers:
            del self._source.documents[root.digest]  # what is there is stored
        return refers

    def _listed(self, subject: Digest) -> list[Descriptor]:
        """Return what is listed as referring to a manifest; many a mirror has the images and not their referrers."""
        for repository in self._source.repositories[:-1]:
            with suppress(RegistryError, InvalidManifest):
                if found := repository.referrers(subject):
                    return found
        return self._source.repositories[-1].referrers(subject)

    def _fits(self, root: Descriptor, info: ImageInfo) -> bool:
        """Say whether an image without an index is of the platform that was asked for, as far as its config says."""
        label = info.platform
        return not (self._platform and root.role == "manifest" and label and not oci.is_for(label, self._platform))

    def _before(self, connection: Connection, digest: Digest) -> set[Digest]:
        """Return what of an index was here already: another platform, pulled before."""
        found = images.look_up(connection, self._name)
        if found is None or found.digest != digest:
            return set()
        contents = images.image_blobs(connection, self._database.directory, found.id)
        return {blob.digest for blob in contents if blob.stored}

    def _fetch(self, blob: Descriptor, advance: Advance) -> None:
        """Download a blob, or wait for another process that does, and hold it."""
        advance = blob_reporter(blob.digest, blob.size, self._blob_progress, advance)
        while True:
            try:
                self._fetch_once(blob, advance)
            except single_flight.ClaimLost as error:
                LOG.warning("%s", error)  # now it is for us to wait
            else:
                break
        self._come[blob.digest] = blob.size

    def _fetch_once(self, blob: Descriptor, advance: Advance) -> None:
        """Do the same.

        Raises:
            ClaimLost: if another process has taken the download over.
        """
        directory = self._database.directory
        seen = done = 0

        def find() -> Hold | None:
            hold = publish.hold_stored(self._database, self._session, [blob.digest])
            return hold if hold.digests else None

        def sleep(seconds: float) -> None:
            nonlocal seen
            there = self._source.wait(blob, seconds)
            advance(there - seen)
            seen = there

        def count(new: int) -> None:
            nonlocal done
            done += new
            advance(new)

        key = downloads.key_of(blob.digest)
        with single_flight.once(
            directory,
            key,
            find,
            sleep,
            seconds=self._database.wait_seconds,
            may_take_over=True,
            is_working=None,
        ) as held:
            advance(-seen)
            if held is not None:
                self._holds.append(held)
                advance(blob.size)
                return
            path, content = partial_path(directory, blob.digest), self._source.download(blob, count)
            try:
                single_flight.check_claim(directory, key)
                received = publish.take(self._session, path, content)
            except single_flight.ClaimLost:
                advance(-done)
                raise
            with publish.publish(self._database, self._session, [received]) as connection:
                self._holds.append(self._session.lease(connection, [blob.digest]))
            with suppress(CacheError), ignore_os_errors():  # it is stored
                self._database.folders.remove(f"ingest/partial/{path.name}")
