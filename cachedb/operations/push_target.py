"""Where images go: a repository at a registry, and the upload of what is not there.

Nothing here needs SQLAlchemy. So a command begins to upload while that is imported and the cache is opened: what the
image had a moment ago, if all of it was here. Until a manifest names it a blob is of nobody's image.
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
from cachedb.disk.reader import document, open_blob
from cachedb.errors import (
    IncompleteImage,
    InvalidName,
    NotInCache,
    RegistryError,
    RegistryUnavailable,
    StorageError,
    ignore_os_errors,
)
from cachedb.index.sqlite.peek import CONTENTS, REPOSITORIES, look
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import Descriptor
from cachedb.oci.names import Name
from cachedb.progress import Advance
from cachedb.threads import Once, in_threads, start, stop_thread
from cachedb.transports.registry.places import place
from cachedb.transports.registry.repository import Repository

__all__ = ["AT_ONCE", "Outcome", "Repositories", "Target"]


Outcome = Literal["uploaded", "mounted", "existing"]
"""How a blob came to be in a repository."""

Repositories = Callable[[Digest], Iterable[str]]
"""Returns the repositories of images in the cache that have a blob."""

AT_ONCE = 4  # blobs that are asked for and sent at the same time
_SOURCES = 3  # repositories that a blob is tried to be mounted from
_NAP = 0.05  # seconds between two looks at how far another thread is


class Target:
    """A repository that images are pushed to; a context manager. Usable from several threads."""

    def __init__(
        self,
        directory: Path,
        name: Name,
        *,
        plain_http: bool | None = None,
        authfile: str | os.PathLike[str] | None = None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            directory: of the cache.
            name: that an image is to get.
            plain_http: speak HTTP and not HTTPS; unless given, with this host alone.
            authfile: to take credentials from, instead of the files that podman and Docker keep.
        """
        self.name = name
        self.repository = Repository(place(name, plain_http=plain_http), authfile=authfile, push=True)
        self._directory = directory
        self._blobs = Once()
        self._sent: dict[Digest, int] = {}  # bytes of those that are on their way
        self._guard, self._told = threading.RLock(), set[Digest]()  # of which somebody has been told what came of it
        self._begun: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop_thread(self._begun, self.repository.stop)
        self.repository.close()

    def send(self, blob: Descriptor, repositories: Repositories, advance: Advance) -> Outcome:
        """See to it that the repository has a blob.

        Args:
            blob: of the cache.
            repositories: of images in the cache: where the registry has them, it may take the blob from there.
            advance: is told of the bytes that are done.

        Returns:
            What was done for that; ``existing`` to all but the first who asks.

        Raises:
            DigestMismatch: if its file has another content.
            RegistryError: if the registry does not take it.
            StorageError: if its file is gone, or was cut short.
        """
        seen = 0

        def sent(count: int) -> None:
            nonlocal seen
            seen += count
            advance(count)

        future = self._sending(blob, repositories, sent)
        while wait([future], _NAP).not_done:
            sent(self._sent.get(blob.digest, 0) - seen)
        outcome = future.result()
        sent(blob.size - seen)
        with self._guard:
            known = blob.digest in self._told
            self._told.add(blob.digest)
        return "existing" if known else outcome

    def _sending(self, blob: Descriptor, repositories: Repositories, advance: Advance) -> Future[Outcome]:
        """Send a blob, unless another thread does; return what comes of it."""
        return self._blobs.run(blob.digest, lambda: self._send(blob, repositories, advance), retry_if=_may_pass)

    def _send(self, blob: Descriptor, repositories: Repositories, advance: Advance) -> Outcome:
        if self.repository.has("blobs", blob.digest):
            return "existing"
        for source in self._elsewhere(repositories(blob.digest))[:_SOURCES]:
            if self.repository.mount(blob.digest, source):
                return "mounted"
        try:
            file = open_blob(self._directory, blob.digest)
        except NotInCache:
            raise StorageError(f"the file of {blob.digest} is gone: run `cachedb verify`") from None
        with file:
            self.repository.put_blob(blob.digest, blob.size, file, advance)
        return "uploaded"

    def _elsewhere(self, repositories: Iterable[str]) -> list[str]:
        """Return the other repositories of the registry that these are, if they are what they were here."""
        ours, found = self.repository.place, set[str]()
        for repository in repositories:
            with suppress(InvalidName):  # a name for the cache alone
                other = place(Name(repository, "latest"))
                if other.registry == ours.registry:
                    found.add(other.repository)
        return sorted(found - {ours.repository})

    # Before the index is open

    def begin(self, source: Name) -> None:
        """Begin to upload the blobs of an image in a thread, if all of it is here.

        What fails is told to who waits for it, and tried again for who comes later; unless the registry refuses it: it
        is asked once, with the same credentials.

        Args:
            source: the image's name.
        """
        with ignore_os_errors():  # of what cannot be looked at: who opens the cache says so
            if (self._directory / "index.db").exists():
                self._begun = threading.Thread(target=self._begin, args=(source,), daemon=True)
                start(self._begun)  # or all of it is for whoever wants it

    def _begin(self, source: Name) -> None:
        # A damaged index has values of any type: who opens it says so. Of a blob that fails, who waits for it is told.
        with suppress(Exception):
            blobs = sorted(self._contents(source), key=lambda blob: -blob.size)
            in_threads(self._begin_upload, blobs, lambda _: None, threads=AT_ONCE)

    def _contents(self, source: Name) -> Iterable[Descriptor]:
        """Return the configs and layers of an image.

        Raises:
            NotInCache: if there is no such image, or it cannot have the target's name.
            IncompleteImage: if anything of it is not here.
        """
        # In another schema it may be nothing to send: who opens the cache says what to do.
        rows = look(self._directory, CONTENTS, source.repository, source.reference, REVISION)
        if not rows or self.name.digest not in (None, rows[0][0]):
            raise NotInCache(str(source), name=source)
        if not all(stored for *_, stored in rows):
            raise IncompleteImage(str(source))
        held = {Digest(digest) for *_, digest, _ in rows}

        def read(blob: Descriptor) -> bytes:
            data = document(self._directory, blob.digest, blob.size)
            if data is None:
                raise IncompleteImage(str(source))
            return data

        def choose(children: list[Descriptor]) -> list[Descriptor]:
            if not held.issuperset(child.digest for child in children):
                raise IncompleteImage(str(source))
            return children

        digest, size, media_type, *_ = rows[0]
        closure = {blob.digest: blob for blob in oci.walk(oci.root(Digest(digest), size, media_type), read, choose)}
        return [blob for blob in closure.values() if blob.role not in ("manifest", "index")]

    def _begin_upload(self, blob: Descriptor, _advance: Advance) -> None:
        self._sent[blob.digest] = 0

        def count(new: int) -> None:
            self._sent[blob.digest] += new

        self._sending(blob, self._repositories, count).result()  # after a failure the others need not be begun

    def _repositories(self, digest: Digest) -> list[str]:
        with suppress(StorageError):
            return [repository for (repository,) in look(self._directory, REPOSITORIES, digest)]
        return []


def _may_pass(error: BaseException) -> bool:
    """Say whether who comes later is to try again: not where the registry has refused."""
    return not isinstance(error, RegistryError) or isinstance(error, RegistryUnavailable)
