"""Pushing: an image goes to a registry, and of it what is not there.

The blobs go first, then the manifests, each after those it names, and under the image's name last of all: whoever
finds the name there finds all of the image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from graphlib import TopologicalSorter
from typing import NamedTuple

from cachedb import oci
from cachedb.content.documents import read_closure, read_document
from cachedb.content.held import held
from cachedb.content.session import Session
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

__all__ = ["Pushed", "push", "push_image"]


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
    closure: oci.Closure,
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
        closure: of its manifest or index, as far as it is here.
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
    root = closure.root
    if name.digest not in (None, root.digest):
        raise InvalidName(f"{name} cannot be the name of {root.digest}: its digest is another")
    repository = target.repository
    blobs, documents = _with_referrers(closure, contents, read)
    wanted = {blob.digest: blob for blob in blobs if _is_document(blob)}
    parts = {blob.digest: blob for blob in blobs if not _is_document(blob)}  # a manifest can be some other's layer
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


def _with_referrers(
    closure: oci.Closure, contents: Iterable[BlobInfo], read: Callable[[Digest], bytes]
) -> tuple[list[Descriptor], dict[Digest, bytes]]:
    """Return the blobs of an image and of what refers to it, and the bytes of those manifests that are here."""
    blobs = closure.blobs
    documents = {blob.digest: closure.documents[blob.digest] for blob in blobs if blob.digest in closure.documents}
    attached = {
        blob.digest: Descriptor(blob.digest, blob.size, blob.media_type, blob.role)
        for blob in contents
        if blob.role in ("manifest", "index")
        and blob.digest not in closure.documents
        and blob.size <= oci.DOCUMENT_LIMIT
    }
    others = {digest: read(digest) for digest in attached}
    while found := [
        digest for digest in others if digest not in documents and oci.subject_of(others[digest]) in documents
    ]:
        for digest in found:
            reached = list(oci.walk(attached[digest], lambda blob: others.get(blob.digest)))
            blobs += reached
            documents |= {blob.digest: others[blob.digest] for blob in reached if blob.digest in others}
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
        database: the index.
        session: of this process.
        source: the name of the image.
        target: the repository to push to.
        name: what the image is called there.
        platform: ``os/architecture[/variant]``, to push one platform of an index as an image of its own.
        progress: is called with the bytes done and in all.
        blob_progress: is called with each blob's bytes.
    """
    read = partial(read_document, database.directory)
    with held(database, session, source) as ((info, blobs),):
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
