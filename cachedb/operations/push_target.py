"""Upload blobs to the repository that an image is pushed to.

Nothing here needs SQLAlchemy, so a command can start to upload a complete image while SQLAlchemy is imported and the
cache is opened. An uploaded blob belongs to no image until a manifest references it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from cachedb import oci
from cachedb.disk.layout import REVISION
from cachedb.disk.reader import open_blob, read_small_blob
from cachedb.errors import (
    IncompleteImage,
    InvalidName,
    NotInCache,
    RegistryError,
    RegistryUnavailable,
    StorageError,
    ignore_os_errors,
)
from cachedb.index.sqlite.peek import CONTENTS, REPOSITORIES, query_index
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import Descriptor
from cachedb.oci.names import Name
from cachedb.progress import Advance
from cachedb.threads import Once, in_threads, start, stop_thread
from cachedb.transports.registry.places import place
from cachedb.transports.registry.repository import Repository

__all__ = ["PARALLEL_UPLOADS", "Outcome", "Repositories", "Target"]


Outcome = Literal["uploaded", "mounted", "existing"]
"""How a blob got into a repository."""

Repositories = Callable[[Digest], Iterable[str]]
"""Returns the repositories of the images in the cache that use a blob."""

PARALLEL_UPLOADS = 4  # parallel uploads
_SOURCES = 3  # repositories to try to mount a blob from
_POLL_SECONDS = 0.05  # between checks of another thread's progress


class Target:
    """A repository that images are pushed to; a context manager, safe to use from several threads."""

    def __init__(
        self,
        directory: Path,
        name: Name,
        *,
        plain_http: bool | None = None,
        authfile: str | os.PathLike[str] | None = None,
    ) -> None:
        """Create a target without sending anything.

        Args:
            directory: the cache directory.
            name: the name at the registry.
            plain_http: use HTTP if True, HTTPS if False; the default is HTTP only for localhost.
            authfile: a file of credentials; the default is those of podman and Docker.
        """
        self.name = name
        self.repository = Repository(place(name, plain_http=plain_http), authfile=authfile, push=True)
        self._directory = directory
        self._blobs = Once()
        self._sent: dict[Digest, int] = {}  # bytes sent by uploads that `begin` started
        self._guard, self._reported = threading.RLock(), set[Digest]()  # blobs whose outcome was returned
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop_thread(self._thread, self.repository.stop)
        self.repository.close()

    def send(self, blob: Descriptor, repositories: Repositories, advance: Advance) -> Outcome:
        """Ensure that the repository has a blob: mount or upload it if necessary.

        Args:
            blob: a stored blob.
            repositories: returns the repositories of images that use the blob; it may be mounted from them.
            advance: called with the bytes done.

        Returns:
            How the blob got there; ``existing`` for all but the first call.

        Raises:
            DigestMismatch: if the blob's file has other content.
            RegistryError: if the registry refuses or fails.
            StorageError: if the blob's file is missing or too short.
        """
        seen = 0

        def sent(count: int) -> None:
            nonlocal seen
            seen += count
            advance(count)

        future = self._start_sending(blob, repositories, sent)
        while wait([future], _POLL_SECONDS).not_done:
            sent(self._sent.get(blob.digest, 0) - seen)
        outcome = future.result()
        sent(blob.size - seen)
        with self._guard:
            known = blob.digest in self._reported
            self._reported.add(blob.digest)
        return "existing" if known else outcome

    def _start_sending(self, blob: Descriptor, repositories: Repositories, advance: Advance) -> Future[Outcome]:
        """Send a blob, unless another thread does; return the future of the outcome."""
        return self._blobs.run(blob.digest, lambda: self._send(blob, repositories, advance), retry_if=_is_retryable)

    def _send(self, blob: Descriptor, repositories: Repositories, advance: Advance) -> Outcome:
        if self.repository.has("blobs", blob.digest):
            return "existing"
        for source in self._find_mount_sources(repositories(blob.digest))[:_SOURCES]:
            if self.repository.mount(blob.digest, source):
                return "mounted"
        try:
            file = open_blob(self._directory, blob.digest)
        except NotInCache:
            raise StorageError(f"the file of {blob.digest} is missing: run `cachedb verify`") from None
        with file:
            self.repository.put_blob(blob.digest, blob.size, file, advance)
        return "uploaded"

    def _find_mount_sources(self, repositories: Iterable[str]) -> list[str]:
        """Return the repositories of the same registry, to mount from, that correspond to these in the cache."""
        ours, found = self.repository.place, set[str]()
        for repository in repositories:
            with suppress(InvalidName):  # a name that no registry can have
                other = place(Name(repository, "latest"))
                if other.registry == ours.registry:
                    found.add(other.repository)
        return sorted(found - {ours.repository})

    # Before the index is open

    def begin(self, source: Name) -> None:
        """Start uploading the blobs of an image in a thread, if the image is complete.

        A failure is raised to callers of `send` that wait for the blob, and a later call retries. A refusal of the
        registry is final, because a retry would use the same credentials.

        Args:
            source: the image's name in the cache.
        """
        with ignore_os_errors():  # a directory that cannot be read is reported when it is opened
            if (self._directory / "index.db").exists():
                self._thread = threading.Thread(target=self._begin, args=(source,), daemon=True)
                start(self._thread)  # if it cannot start, the push does all the work

    def _begin(self, source: Name) -> None:
        # A damaged index may cause any error; opening the cache reports it. `send` reports blobs that fail.
        with suppress(Exception):
            blobs = sorted(self._read_contents(source), key=lambda blob: -blob.size)
            in_threads(self._begin_upload, blobs, lambda _: None, threads=PARALLEL_UPLOADS)

    def _read_contents(self, source: Name) -> Iterable[Descriptor]:
        """Return the configs and layers of an image.

        Raises:
            NotInCache: if there is no such image, or it cannot have the target's name.
            IncompleteImage: if one of its blobs is missing.
        """
        # With another schema this finds no rows; opening the cache reports that.
        rows = query_index(self._directory, CONTENTS, source.repository, source.reference, REVISION)
        if not rows or self.name.digest not in (None, rows[0][0]):
            raise NotInCache(str(source), name=source)
        if not all(stored for *_, stored in rows):
            raise IncompleteImage(str(source))
        held = {Digest(digest) for *_, digest, _ in rows}

        def read(blob: Descriptor) -> bytes:
            data = read_small_blob(self._directory, blob.digest, blob.size)
            if data is None:
                raise IncompleteImage(str(source))
            return data

        def choose(children: list[Descriptor]) -> list[Descriptor]:
            if not held.issuperset(child.digest for child in children):
                raise IncompleteImage(str(source))
            return children

        digest, size, media_type, *_ = rows[0]
        closure = {
            blob.digest: blob for blob in oci.walk(oci.root_descriptor(Digest(digest), size, media_type), read, choose)
        }
        return [blob for blob in closure.values() if blob.role not in ("manifest", "index")]

    def _begin_upload(self, blob: Descriptor, _advance: Advance) -> None:
        self._sent[blob.digest] = 0

        def count(new: int) -> None:
            self._sent[blob.digest] += new

        # A failure is raised here, so that no more uploads start.
        self._start_sending(blob, self._find_repositories, count).result()

    def _find_repositories(self, digest: Digest) -> list[str]:
        with suppress(StorageError):
            return [repository for (repository,) in query_index(self._directory, REPOSITORIES, digest)]
        return []


def _is_retryable(error: BaseException) -> bool:
    """Return whether a later call may retry after an error: not if the registry has refused."""
    return not isinstance(error, RegistryError) or isinstance(error, RegistryUnavailable)
