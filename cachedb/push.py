"""Pushing: an image goes to a registry, and of it what is not there.

The blobs go first, then the manifests, each after those it names, and under the image's name last of all: whoever
finds the name there finds all of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from graphlib import TopologicalSorter
from typing import NamedTuple

from cachedb import blobs, images, oci
from cachedb.database import Database
from cachedb.errors import IncompleteImage, InvalidName, NotInCache, StorageError
from cachedb.images import BlobInfo
from cachedb.oci import Descriptor
from cachedb.parallel import Advance, BlobProgress, Progress, in_threads, summed, told
from cachedb.reference import Digest, Name
from cachedb.registry import Repository, place

__all__ = ["Pushed", "push"]

_AT_ONCE = 4  # blobs that are asked for and sent at the same time
_SOURCES = 3  # repositories that a blob is tried to be mounted from


class Pushed(NamedTuple):
    """What a push has come to."""

    name: Name  # at the registry
    digest: Digest  # of the manifest or index
    media_type: str
    blobs: int  # that were uploaded
    bytes: int  # of those
    mounted: int  # blobs that the registry took from another of its repositories
    existing: int  # blobs that it had already


def push(
    database: Database,
    target: Name,
    repository: Repository,
    root: Descriptor,
    manifests: dict[Digest, bytes],
    contents: Iterable[BlobInfo],
    read: Callable[[Digest], bytes],
    there: set[Digest],
    *,
    progress: Progress | None = None,
    blob_progress: BlobProgress | None = None,
) -> Pushed:
    """Send an image that is held and complete.

    Args:
        database: of the cache.
        target: the name that it gets.
        repository: of that name.
        root: its manifest or index.
        manifests: the bytes of the manifests and indexes that it reaches, as far as they are here; verified.
        contents: what the image is associated with; what refers to it among that goes with it.
        read: returns the bytes of a manifest, verified.
        there: blobs known to be in the repository; those that are found there or sent are added.
        progress: is told how far it is, in bytes.
        blob_progress: is told how far it is with each blob.

    Raises:
        InvalidName: if the target is by another digest; nothing is sent then.
        IncompleteImage: if the index names what is neither here nor at the registry; nor then.
        DigestMismatch: if a manifest's file is damaged; nor then.
        StorageError: if a blob's file is gone, or was cut short.
        RegistryError: if the registry does not take it.
    """
    if target.digest not in (None, root.digest):
        raise InvalidName(f"{target} cannot be the name of {root.digest}: its digest is another")
    closure, documents = _all(root, manifests, contents, read)
    wanted = {blob.digest: blob for blob in closure if _is_document(blob)}
    parts = {blob.digest: blob for blob in closure if not _is_document(blob)}  # a manifest can be some other's layer
    for blob in wanted.values():
        if blob.digest not in documents and not repository.has("manifests", blob.digest):
            raise IncompleteImage(
                f"{target} is for {blob.platform or blob.digest} too, which is not here: pull it with --all-platforms, "
                "or push one platform with --platform"
            )
    work = _Push(database, repository, there, blob_progress)
    rest = sorted(parts.values(), key=lambda blob: -blob.size)
    advance = summed(sum(blob.size for blob in rest), progress)
    in_threads(work.send, rest, advance, threads=_AT_ONCE, stop=repository.stop)
    named = {
        digest: [child.digest for child in oci.descriptors(data, wanted[digest].media_type)]
        for digest, data in documents.items()
    }
    for digest in TopologicalSorter(named).static_order():
        if digest in documents and digest != root.digest:
            repository.put_manifest(digest, wanted[digest].media_type, documents[digest])
    repository.put_manifest(target.reference, root.media_type, documents[root.digest])
    uploaded = work.uploaded
    return Pushed(target, root.digest, root.media_type, len(uploaded), sum(uploaded), work.mounted, work.found)


def _is_document(blob: Descriptor) -> bool:
    return blob.role in ("manifest", "index")


def _all(
    root: Descriptor,
    manifests: dict[Digest, bytes],
    contents: Iterable[BlobInfo],
    read: Callable[[Digest], bytes],
) -> tuple[list[Descriptor], dict[Digest, bytes]]:
    """Return what a manifest reaches, with what refers to it, and of that the manifests that are here."""
    closure = list(oci.walk(root, lambda blob: manifests.get(blob.digest)))
    documents = {blob.digest: manifests[blob.digest] for blob in closure if blob.digest in manifests}
    attached = {
        blob.digest: Descriptor(blob.digest, blob.size, blob.media_type, blob.role)
        for blob in contents
        if blob.role in ("manifest", "index") and blob.digest not in manifests and blob.size <= oci.DOCUMENT_LIMIT
    }
    others = {digest: read(digest) for digest in attached}
    while found := [
        digest for digest in others if digest not in documents and oci.subject_of(others[digest]) in documents
    ]:
        for digest in found:
            reached = list(oci.walk(attached[digest], lambda blob: others.get(blob.digest)))
            closure += reached
            documents |= {blob.digest: others[blob.digest] for blob in reached if blob.digest in others}
    return closure, documents


class _Push:
    """The blobs of one push: which of them were sent so far."""

    def __init__(
        self,
        database: Database,
        repository: Repository,
        there: set[Digest],
        blob_progress: BlobProgress | None,
    ) -> None:
        self._database, self._repository = database, repository
        self._there, self._blob_progress = there, blob_progress
        self.uploaded: list[int] = []  # bytes of each
        self.mounted, self.found = 0, 0

    def send(self, blob: Descriptor, advance: Advance) -> None:
        """See to it that the registry has a blob."""
        advance = told(blob.digest, blob.size, self._blob_progress, advance)
        if blob.digest in self._there or self._repository.has("blobs", blob.digest):
            self.found += 1
            advance(blob.size)
        elif any(self._repository.mount(blob.digest, source) for source in self._sources(blob.digest)):
            self.mounted += 1
            advance(blob.size)
        else:
            try:
                file = blobs.open_blob(self._database.directory, blob.digest)
            except NotInCache:
                raise StorageError(f"the file of {blob.digest} is gone: run `cachedb verify`") from None
            with file:
                self._repository.put_blob(blob.digest, blob.size, file, advance)
            self.uploaded.append(blob.size)
        self._there.add(blob.digest)

    def _sources(self, digest: Digest) -> list[str]:
        """Return other repositories of the registry that have a blob, if they are what they were here."""
        with self._database.read() as connection:
            known = [place(Name(repository, "latest")) for repository in images.repositories_with(connection, digest)]
        ours = self._repository.place
        found = {other.repository for other in known if other.registry == ours.registry} - {ours.repository}
        return sorted(found)[:_SOURCES]
