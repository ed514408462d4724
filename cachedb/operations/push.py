"""Push an image to a registry, uploading only missing blobs.

Blobs are uploaded first, then the manifests, each after those it references. The image's own manifest is last, so its
name never points to an incomplete image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Literal, NamedTuple

from cachedb import oci
from cachedb.content.documents import read_attached, read_closure, read_document
from cachedb.content.held import hold_images
from cachedb.content.session import Session
from cachedb.disk.reader import missing_file_error, open_blob
from cachedb.errors import IncompleteImage, InvalidName, NotInCache
from cachedb.index import images
from cachedb.index.records import BlobInfo
from cachedb.index.sqlite.database import Database
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import Descriptor
from cachedb.oci.names import Name
from cachedb.progress import Advance, BlobProgress, Progress, blob_reporter, sum_progress
from cachedb.threads import in_threads
from cachedb.transports.registry.access import DEFAULT_ACCESS, Access
from cachedb.transports.registry.places import place
from cachedb.transports.registry.repository import Repository
from cachedb.transports.registry.routes import push_place

__all__ = ["Pushed", "Target", "push", "push_image"]


_Outcome = Literal["uploaded", "mounted", "existing"]  # how a blob got into a repository
_PARALLEL_UPLOADS = 4
_MOUNT_SOURCES = 3  # repositories to try to mount a blob from


class Pushed(NamedTuple):
    """The result of a push."""

    name: Name  # at the registry
    digest: Digest  # of the manifest or index
    media_type: str
    blobs: int  # uploaded
    bytes: int  # of the uploaded blobs
    mounted: int  # blobs mounted from another repository of the registry
    existing: int  # blobs the repository already had


class Target:
    """A repository that images are pushed to; safe to use from several threads."""

    def __init__(
        self,
        directory: Path,
        name: Name,
        *,
        access: Access = DEFAULT_ACCESS,
    ) -> None:
        """Create a target without sending anything.

        Args:
            directory: the cache directory.
            name: the name at the registry.
            access: how to reach the registry.
        """
        self.repository = Repository(push_place(name, access), access, push=True)
        self._directory = directory
        self._known: set[Digest] = set()  # blobs that the repository has; the tags of a repository share blobs

    def close(self) -> None:
        """Close all connections."""
        self.repository.close()

    def send(self, blob: Descriptor, find_repositories: Callable[[Digest], list[str]], advance: Advance) -> _Outcome:
        """Ensure that the repository has a blob: mount or upload it if necessary.

        Args:
            blob: a stored blob.
            find_repositories: returns the repositories of images in the cache that use a blob; it may be mounted
                from them.
            advance: called with the bytes done.

        Returns:
            How the blob got there; ``existing`` for every later call.

        Raises:
            DigestMismatch: if the blob's file has other content.
            RegistryError: if the registry refuses or fails.
            StorageError: if the blob's file is missing or too short.
        """
        outcome: _Outcome
        if blob.digest in self._known or self.repository.has("blobs", blob.digest):
            outcome = "existing"
            advance(blob.size)
        elif self._mount(blob.digest, find_repositories(blob.digest)):
            outcome = "mounted"
            advance(blob.size)
        else:
            outcome = "uploaded"
            self._upload(blob, advance)
        self._known.add(blob.digest)
        return outcome

    def _mount(self, digest: Digest, repositories: list[str]) -> bool:
        """Mount a blob from a repository of the same registry; return whether it worked."""
        ours, sources = self.repository.place, set[str]()
        for repository in repositories:
            with suppress(InvalidName):  # a name that no registry can have
                other = place(Name(repository, "latest"))
                if other.registry == ours.registry:
                    sources.add(other.repository)
        tried = sorted(sources - {ours.repository})[:_MOUNT_SOURCES]
        return any(self.repository.mount(digest, source) for source in tried)

    def _upload(self, blob: Descriptor, advance: Advance) -> None:
        try:
            file = open_blob(self._directory, blob.digest)
        except NotInCache:
            raise missing_file_error(blob.digest) from None
        with file:
            self.repository.put_blob(blob.digest, blob.size, file, advance)


def push(
    database: Database,
    target: Target,
    name: Name,
    closure: oci.Closure,
    contents: Iterable[BlobInfo],
    read: Callable[[Digest], bytes],
    *,
    progress: Progress | None = None,
    blob_progress: BlobProgress | None = None,
) -> Pushed:
    """Push an image, which the caller must hold.

    Args:
        database: the index of the cache.
        target: the repository to push to.
        name: the name at the registry.
        closure: of the image's manifest or index, as far as it is stored.
        contents: the blobs of the image; referrers among them are pushed too.
        read: returns the verified bytes of a manifest.
        progress: called with the bytes done and the total.
        blob_progress: called with the progress of each blob.

    Raises:
        InvalidName: if the name has another digest; nothing is sent.
        IncompleteImage: if a manifest is neither stored nor at the registry; nothing is sent.
        DigestMismatch: if a manifest's file is damaged (nothing is sent) or a blob's file is (no manifest is sent).
        StorageError: if a blob's file is missing or too short.
        RegistryError: if the registry refuses or fails.
    """
    root = closure.root
    if name.digest not in (None, root.digest):
        raise InvalidName(f"{name} names another digest than {root.digest}: use a tag or this digest")
    repository = target.repository
    blobs, documents = _add_referrers(closure, contents, read)
    # Divide by role: a manifest may also be a layer of another one.
    wanted = {blob.digest: blob for blob in blobs if blob.is_document}
    parts = {blob.digest: blob for blob in blobs if not blob.is_document}
    for blob in wanted.values():
        if blob.digest not in documents and not repository.has("manifests", blob.digest):
            raise IncompleteImage(
                f"{name} has {blob.platform or blob.digest}, which is not in the cache: pull it with --all-platforms, "
                "or push one platform with --platform"
            )

    def find_repositories(digest: Digest) -> list[str]:
        with database.read() as connection:
            return images.find_repositories(connection, digest)

    def send(blob: Descriptor, advance: Advance) -> tuple[_Outcome, int]:
        report = blob_reporter(blob.digest, blob.size, blob_progress, advance)
        return target.send(blob, find_repositories, report), blob.size

    rest = sorted(parts.values(), key=lambda blob: -blob.size)
    advance = sum_progress(sum(blob.size for blob in rest), progress)
    done = in_threads(send, rest, advance, threads=_PARALLEL_UPLOADS, stop=repository.stop)
    references = {
        digest: [child.digest for child in oci.descriptors(data, wanted[digest].media_type)]
        for digest, data in documents.items()
    }
    for digest in TopologicalSorter(references).static_order():
        if digest in documents and digest != root.digest:
            repository.put_manifest(digest, wanted[digest].media_type, documents[digest])
    repository.put_manifest(name.reference, root.media_type, documents[root.digest])
    uploaded = [size for outcome, size in done if outcome == "uploaded"]
    count = Counter(outcome for outcome, _ in done)
    return Pushed(
        name,
        root.digest,
        root.media_type,
        len(uploaded),
        sum(uploaded),
        mounted=count["mounted"],
        existing=count["existing"],
    )


def _add_referrers(
    closure: oci.Closure, contents: Iterable[BlobInfo], read: Callable[[Digest], bytes]
) -> tuple[list[Descriptor], dict[Digest, bytes]]:
    """Return the blobs of an image and its stored referrers, and the bytes of their stored manifests."""
    blobs = closure.blobs
    documents = {blob.digest: closure.documents[blob.digest] for blob in blobs if blob.digest in closure.documents}
    for referrer in closure.find_referrers(read_attached(closure, contents, read)):
        blobs += referrer.blobs
        documents |= referrer.documents
    return blobs, documents


def push_image(
    database: Database,
    session: Session,
    source: Name,
    target: Target,
    name: Name,
    *,
    platform: str | None = None,
    progress: Progress | None = None,
    blob_progress: BlobProgress | None = None,
) -> Pushed:
    """Push an image, as `Cache.push` does.

    Args:
        database: the index of the cache.
        session: the session that holds the image.
        source: the name of the image in the cache.
        target: the repository to push to.
        name: the name at the registry.
        platform: ``os/architecture[/variant]``, to push one platform of an index as an image of its own.
        progress: called with the bytes done and the total.
        blob_progress: called with the progress of each blob.
    """
    read = partial(read_document, database.directory)
    with hold_images(database, session, source) as ((info, blobs),):
        closure = read_closure(database.directory, source, info, blobs)
        if platform is not None:
            closure = closure.for_platform(source, platform, read)
        return push(
            database,
            target,
            name,
            closure,
            blobs,
            read,
            progress=progress,
            blob_progress=blob_progress,
        )
