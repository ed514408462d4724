"""Pushing: an image goes to a registry, and of it what is not there.

The blobs go first, then the manifests, each after those it names, and under the image's name last of all: whoever
finds the name there finds all of the image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from graphlib import TopologicalSorter
from typing import NamedTuple

from cachedb import oci
from cachedb.errors import IncompleteImage, InvalidName
from cachedb.index import images
from cachedb.index.images import BlobInfo
from cachedb.index.sqlite.database import Database
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import Descriptor
from cachedb.oci.names import Name
from cachedb.operations.push_target import AT_ONCE, Outcome, Target
from cachedb.progress import Advance, BlobProgress, Progress, blob_reporter, summed
from cachedb.threads import in_threads

__all__ = ["Pushed", "push"]


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
    target: Target,
    name: Name,
    root: Descriptor,
    manifests: dict[Digest, bytes],
    contents: Iterable[BlobInfo],
    read: Callable[[Digest], bytes],
    *,
    progress: Progress | None = None,
    blob_progress: BlobProgress | None = None,
) -> Pushed:
    """Send an image that is held and complete.

    Args:
        database: of the cache.
        target: where it goes.
        name: that it gets there.
        root: its manifest or index.
        manifests: the bytes of the manifests and indexes that it reaches, as far as they are here; verified.
        contents: what the image is associated with; what refers to it among that goes with it.
        read: returns the bytes of a manifest, verified.
        progress: is told how far it is, in bytes.
        blob_progress: is told how far it is with each blob.

    Raises:
        InvalidName: if the target is by another digest; nothing is sent then.
        IncompleteImage: if the index names what is neither here nor at the registry; nor then.
        DigestMismatch: if a manifest's file is damaged; nor then. If a blob's is, no manifest is sent.
        StorageError: if a blob's file is gone, or was cut short.
        RegistryError: if the registry does not take it.
    """
    if name.digest not in (None, root.digest):
        raise InvalidName(f"{name} cannot be the name of {root.digest}: its digest is another")
    repository = target.repository
    closure, documents = _all(root, manifests, contents, read)
    wanted = {blob.digest: blob for blob in closure if _is_document(blob)}
    parts = {blob.digest: blob for blob in closure if not _is_document(blob)}  # a manifest can be some other's layer
    for blob in wanted.values():
        if blob.digest not in documents and not repository.has("manifests", blob.digest):
            raise IncompleteImage(
                f"{name} is for {blob.platform or blob.digest} too, which is not here: pull it with --all-platforms, "
                "or push one platform with --platform"
            )

    def repositories(digest: Digest) -> list[str]:
        with database.read() as connection:
            return images.repositories_with(connection, digest)

    def send(blob: Descriptor, advance: Advance) -> tuple[Outcome, int]:
        report = blob_reporter(blob.digest, blob.size, blob_progress, advance)
        return target.send(blob, repositories, report), blob.size

    rest = sorted(parts.values(), key=lambda blob: -blob.size)
    advance = summed(sum(blob.size for blob in rest), progress)
    done = in_threads(send, rest, advance, threads=AT_ONCE, stop=repository.stop)
    named = {
        digest: [child.digest for child in oci.descriptors(data, wanted[digest].media_type)]
        for digest, data in documents.items()
    }
    for digest in TopologicalSorter(named).static_order():
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
