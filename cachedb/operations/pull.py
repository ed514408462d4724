"""Pull an image from a registry, downloading only missing blobs.

Each blob is stored as soon as its download is complete, so that waiting processes can use it. An interrupted download
resumes where it stopped. The image appears only when it is complete.
"""

from __future__ import annotations

import time
from contextlib import closing, suppress
from functools import partial
from io import BytesIO
from typing import NamedTuple

from sqlalchemy import Connection

from cachedb import oci
from cachedb.content import publish, save
from cachedb.content.session import Hold, Session
from cachedb.disk import downloads, reader, single_flight
from cachedb.disk.layout import partial_path
from cachedb.disk.reserve import find_quota_user, is_full
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
from cachedb.index import images, lifetimes
from cachedb.index.blobs import read_stored_sizes
from cachedb.index.records import ImageInfo
from cachedb.index.sqlite.database import Database
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import Descriptor
from cachedb.oci.names import Name, RemoteName
from cachedb.operations.fetch_blob import fetch_blob
from cachedb.operations.room import Room
from cachedb.progress import Advance, BlobProgress, Progress, blob_reporter, sum_progress
from cachedb.text import shorten
from cachedb.threads import in_threads
from cachedb.transports.registry.access import DEFAULT_ACCESS, Access
from cachedb.transports.registry.source import Root, Source

__all__ = ["PullPlan", "Pulled", "plan_pull", "pull"]


_PARALLEL_DOWNLOADS = 4
_MAX_MANIFESTS = 1000  # allowed for an image and its referrers


class Pulled(NamedTuple):
    """The result of a pull."""

    image: ImageInfo
    blobs: int  # downloaded by this process or another one
    bytes: int  # of those blobs
    stale: str | None  # why the registry was unavailable, if the cached image is used instead
    up_to_date: bool = False  # whether the image was complete here, so that nothing was downloaded
    resumed: int = 0  # of the bytes, those that an interrupted pull had downloaded
    seconds: float = 0.0
    left_out: int = 0  # foreign layers that are left out, because the registry lacks them


class PullPlan(NamedTuple):
    """What a pull would download."""

    name: Name  # in the cache
    digest: Digest  # of the manifest or index
    blobs: int  # that would be downloaded, without manifests
    bytes: int  # of those blobs
    up_to_date: bool  # whether the image is complete here


def plan_pull(
    database: Database,
    session: Session,
    wanted: RemoteName,
    *,
    platform: str | None = None,
    all_platforms: bool = False,
    referrers: bool = False,
    foreign_layers: bool = False,
    access: Access = DEFAULT_ACCESS,
) -> PullPlan:
    """Return what a pull would download; only manifests are read, and nothing is stored.

    Args:
        database: the index of the cache.
        session: a session of the cache.
        wanted: the image's name, and its digest if a certain one is wanted.
        platform: as for `pull`.
        all_platforms: as for `pull`.
        referrers: as for `pull`.
        foreign_layers: as for `pull`.
        access: how to reach the registry.

    Raises:
        RegistryError: if the registry refuses or fails.
        NotInCache: if the image does not have the platform.
        InvalidManifest: if one of its manifests is invalid.
    """
    with closing(
        Source(
            database.directory,
            wanted,
            platform=platform,
            all_platforms=all_platforms,
            foreign_layers=foreign_layers,
            access=access,
        )
    ) as source:
        return _Pull(database, session, source, platform, referrers, None, None, None).plan()


def pull(
    database: Database,
    session: Session,
    wanted: RemoteName,
    *,
    platform: str | None = None,
    all_platforms: bool = False,
    if_missing: bool = False,
    allow_stale: bool = False,
    referrers: bool = False,
    foreign_layers: bool = False,
    ttl: float | None = None,
    access: Access = DEFAULT_ACCESS,
    room: Room | None = None,
    progress: Progress | None = None,
    blob_progress: BlobProgress | None = None,
) -> Pulled:
    """Pull an image; of several processes that want the same image, one pulls and the others wait.

    Args:
        database: the index of the cache.
        session: the session that receives the blobs.
        wanted: the image's name, and its digest if a certain one is wanted.
        platform: ``os/architecture[/variant]``; the default is the host's.
        all_platforms: pull all platforms of an index.
        if_missing: do not contact the registry for an image that is complete here, even if its tag has moved.
        allow_stale: use the cached image if no registry is reachable.
        referrers: also pull the image's referrers and attach them.
        foreign_layers: download foreign layers that the registry lacks from their URLs.
        ttl: seconds until the name expires, whether it was here or not; None for never.
        access: how to reach the registry.
        room: makes room before the first byte of a blob.
        progress: called with the bytes done and the total.
        blob_progress: called with the progress of each blob.

    Raises:
        RegistryError: if the registry refuses or fails.
        NotInCache: if the image does not have the platform.
        InvalidManifest: if one of its manifests is invalid.
        DigestMismatch: if downloaded content has a wrong digest or size.
        NoRoom: if the image does not fit into the limits of the cache.
    """
    started = time.monotonic()
    with closing(
        Source(
            database.directory,
            wanted,
            platform=platform,
            all_platforms=all_platforms,
            foreign_layers=foreign_layers,
            access=access,
        )
    ) as source:
        work = _Pull(database, session, source, platform, referrers, room, progress, blob_progress, ttl)

        def find() -> Pulled | None:
            here = work.find_complete() if if_missing or (wanted.digest and not referrers) else None
            here = here and work.set_lifetime(here)
            return here and Pulled(here, 0, 0, None, up_to_date=True)

        # A waiting process may take over from one that makes no progress. Then both go on, and share the blobs.
        with single_flight.claim_or_find(
            database.directory, source.key, find, seconds=database.wait_seconds, may_take_over=True, is_working=None
        ) as found:
            pulled = found or work.run(allow_stale)
            return pulled._replace(seconds=round(time.monotonic() - started, 3))


class _Pull:
    """The state of one pull."""

    def __init__(
        self,
        database: Database,
        session: Session,
        source: Source,
        platform: str | None,
        referrers: bool,
        room: Room | None,
        progress: Progress | None,
        blob_progress: BlobProgress | None,
        ttl: float | None = None,
    ) -> None:
        self._database, self._session, self._source, self._name = database, session, source, source.name
        self._platform, self._referrers, self._room = platform, referrers, room
        self._progress, self._blob_progress, self._ttl = progress, blob_progress, ttl
        self._holds: list[Hold] = []  # on blobs stored before the image is complete
        self._downloaded: dict[Digest, int] = {}

    def run(self, allow_stale: bool) -> Pulled:
        here = self.find_complete()
        try:
            digest = self._source.digest()
            if here and here.digest == digest and not self._referrers and (image := self.set_lifetime(here)):
                return Pulled(image, 0, 0, None, up_to_date=True)
            return self._download_image(self._read_root(digest))
        except RegistryUnavailable as error:
            if here and allow_stale and (image := self.set_lifetime(here)):
                return Pulled(image, 0, 0, str(error))
            raise

    def set_lifetime(self, here: ImageInfo) -> ImageInfo | None:
        """Set the lifetime of an image that is complete here; return it, or None if it has changed."""
        database = self._database
        if self._ttl is None and (here.expires_at is None or database.read_only):
            return here  # most pulls of a complete image write nothing
        with database.write() as connection:
            found = images.look_up(connection, self._name)
            if found is None or found.digest != here.digest:
                return None
            lifetimes.set_lifetime(connection, found.id, self._ttl)
            return images.read_image(connection, database.directory, found.id)[0]

    def plan(self) -> PullPlan:
        """Return what `run` would download."""
        here, digest = self.find_complete(), self._source.digest()
        if here and here.digest == digest and not self._referrers:
            return PullPlan(self._name, digest, 0, 0, up_to_date=True)
        closure, _ = self._read_closure(self._read_root(digest))
        blobs = {blob.digest: blob for blob in [*closure, *(self._find_referrers(closure) if self._referrers else [])]}
        with self._database.read() as connection:
            stored = read_stored_sizes(connection, blobs)
        known = {*stored, *self._source.documents, *self._find_left_out(closure)}
        absent = [blob.size for digest, blob in blobs.items() if digest not in known]
        return PullPlan(
            self._name, digest, len(absent), sum(absent), up_to_date=bool(here) and stored.keys() >= blobs.keys()
        )

    def find_complete(self) -> ImageInfo | None:
        """Return the image if all its wanted parts are stored, else None."""
        with self._database.read() as connection:
            found = images.look_up(connection, self._name)
            if found is None:
                return None
            info, contents = images.read_image(connection, self._database.directory, found.id)
            if self._source.expected not in (None, info.digest):
                return None
            root = images.read_root(connection, found.id)
            known = {blob.digest for blob in contents if blob.stored}
            with suppress(InvalidManifest, NotInCache):
                choose = partial(self._source.choose, list_children=self._list_stored_children)
                closure = save.closure(connection, self._database.directory, root, choose)
                return (
                    info
                    if known.issuperset(blob.digest for blob in closure if self._is_needed(blob))
                    and self._has_wanted_platform(root, info)
                    else None
                )
        return None

    def _list_stored_children(self, index: Descriptor) -> list[Descriptor]:
        """Return the children of a stored index; none of another, because no platform of it is stored."""
        data = reader.read_small_blob(self._database.directory, index.digest, index.size)
        return [] if data is None else oci.descriptors(data, index.media_type)

    def _is_needed(self, blob: Descriptor) -> bool:
        """Return whether this pull must have the blob to complete the image."""
        return self._source.foreign_layers or not blob.is_foreign

    def _find_left_out(self, closure: list[Descriptor]) -> set[Digest]:
        """Return the foreign layers that this pull leaves out."""
        foreign = {blob.digest: blob for blob in closure if blob.is_foreign}
        with self._database.read() as connection:
            stored = read_stored_sizes(connection, foreign)
        return self._source.find_unavailable(blob for digest, blob in foreign.items() if digest not in stored)

    def _read_root(self, digest: Digest) -> Root:
        """Return the manifest or index of the name, from the cache if it has it."""
        if (data := self._read_stored(digest)) is not None:
            return Root(digest, oci.manifest_media_type(data), data)
        return self._source.root(digest)

    def _read_stored(self, digest: Digest) -> bytes | None:
        """Return a manifest's bytes if it is stored and intact, else None."""
        with self._database.read() as connection:
            size = read_stored_sizes(connection, [digest]).get(digest)
        return None if size is None else reader.read_small_blob(self._database.directory, digest, size)

    def _read_child(self, blob: Descriptor) -> bytes:
        """Return the bytes of an index's child."""
        return self._source.child(blob, self._read_stored)

    def _download_image(self, root: Root) -> Pulled:
        closure, chosen = self._read_closure(root)
        top = closure[0]
        attached = self._find_referrers(closure) if self._referrers else []
        left_out = self._find_left_out(closure)
        wanted = {blob.digest: blob for blob in [*closure, *attached] if blob.digest not in left_out}

        def receive(hold: Hold, received: dict[object, Received]) -> None:
            documents = {key: data for key, data in self._source.documents.items() if key not in hold.digests}
            known = hold.digests | self._source.documents.keys()
            rest = sorted(
                (blob for digest, blob in wanted.items() if digest not in known), key=lambda blob: -blob.size
            )  # large blobs first, so that all threads finish at about the same time
            if self._room is not None:  # only now, because the blobs that are stored are held
                self._room.make(self._name, sum(map(len, documents.values())) + sum(map(self._find_incoming, rest)))
            for digest, data in documents.items():
                received[digest] = publish.receive(self._session, BytesIO(data), digest=digest)
            advance = sum_progress(sum(blob.size for blob in rest), self._progress)
            in_threads(self._fetch, rest, advance, threads=_PARALLEL_DOWNLOADS, stop=self._source.stop)

        def save_all(connection: Connection) -> ImageInfo:
            for hold in self._holds:
                self._session.release(connection, hold)
            stored = save.find_stored_part(connection, self._database.directory, self._name, root.digest)
            among = (chosen - left_out) | stored
            is_part = left_out or (self._source.wanted_platform and top.role == "index")
            image_id = save.save_image(
                connection,
                self._database.directory,
                self._name,
                root.digest,
                root.media_type,
                oci.choose_among(among) if is_part else None,
                ttl=self._ttl,
            )
            save.attach_referrers(connection, self._database.directory, self._name, attached)
            info = images.read_image(connection, self._database.directory, image_id)[0]
            if not self._has_wanted_platform(top, info):
                asked = shorten(self._platform)
                raise NotInCache(
                    f"{self._name} is not for platform {asked}, but for {info.platform}: choose it with --platform",
                    name=self._name,
                )
            return info

        if left_out:
            LOG.warning(
                "%s: %d foreign layers are left out, because the registry lacks them: pull with --foreign-layers",
                self._name,
                len(left_out),
            )
        try:
            info = publish.receive_and_save(self._database, self._session, wanted, receive, save_all)
        except BaseException as error:
            self._give_up(error)
            raise
        return Pulled(
            info,
            len(self._downloaded),
            sum(self._downloaded.values()),
            None,
            resumed=sum(self._source.resumed.values()),
            left_out=len(left_out),
        )

    def _find_incoming(self, blob: Descriptor) -> int:
        """Return the bytes of a blob that a download adds to those on the disk."""
        return max(0, blob.size - downloads.measure_fresh(partial_path(self._database.directory, blob.digest)))

    def _read_closure(self, root: Root) -> tuple[list[Descriptor], set[Digest]]:
        """Return the wanted closure of an image, root first, and the chosen children of its indexes."""
        self._source.documents[root.digest] = root.data
        top, chosen = root.descriptor, set[Digest]()

        def choose(children: list[Descriptor]) -> list[Descriptor]:
            found = self._source.choose(children, self._list_children)
            chosen.update(child.digest for child in found)
            return found

        closure = list(oci.walk(top, lambda blob: root.data if blob is top else self._read_child(blob), choose))
        reached = {blob.digest for blob in closure}
        for digest in self._source.documents.keys() - reached:
            del self._source.documents[digest]  # an index without the platform; `receive` stores all of `documents`
        return closure, chosen

    def _list_children(self, index: Descriptor) -> list[Descriptor]:
        """Return the children of an index inside an index."""
        return oci.descriptors(self._read_child(index), index.media_type)

    def _give_up(self, error: BaseException) -> None:
        """Release the stored blobs after a failure; on a full disk also delete partial downloads."""
        for hold in self._holds:
            publish.release_after_error(self._database, self._session, hold)
        if isinstance(error, StorageError) and is_full(error):
            with suppress(CacheError), ignore_os_errors():
                # Free space matters more than a later resume.
                downloads.remove_stale_downloads(self._database.folders, age=0, user=find_quota_user(error))

    def _find_referrers(self, closure: list[Descriptor]) -> list[Descriptor]:
        """Return the blobs of the referrers (signatures, SBOMs) of a closure, and of their own referrers."""
        found: list[Descriptor] = []
        pending = [blob for blob in closure if blob.is_document]
        known = {blob.digest for blob in pending}
        while pending:
            subject = pending.pop().digest
            for root in self._source.referrers(subject):
                # Skip manifests with another subject, and those of a type that cannot be stored.
                if root.digest in known or root.role == "other" or not self._is_referrer(root, subject):
                    continue
                if len(known) >= _MAX_MANIFESTS:
                    raise RegistryError(
                        f"{self._name} has more than {_MAX_MANIFESTS} referrers: pull without --referrers"
                    )
                known.add(root.digest)
                pending.append(root)
                found += oci.walk(root, self._read_child)
        return found

    def _is_referrer(self, root: Descriptor, subject: Digest) -> bool:
        """Return whether a listed referrer has this subject; a list may name deleted or wrong manifests."""
        is_new = root.digest not in self._source.documents
        try:
            refers = oci.subject_of(self._read_child(root)) == subject
        except RegistryError:
            if self._source.registry.has("manifests", root.digest):
                raise
            return False
        if is_new and not refers:
            del self._source.documents[root.digest]  # `receive` stores all of `documents`
        return refers

    def _has_wanted_platform(self, root: Descriptor, info: ImageInfo) -> bool:
        """Return whether an image without an index has the wanted platform, or an unknown one."""
        label = info.platform
        return not (self._platform and root.role == "manifest" and label and not oci.is_for(label, self._platform))

    def _fetch(self, blob: Descriptor, advance: Advance) -> None:
        advance = blob_reporter(blob.digest, blob.size, self._blob_progress, advance)
        fetch_blob(self._database, self._session, self._source, blob, self._holds, advance)
        self._downloaded[blob.digest] = blob.size
