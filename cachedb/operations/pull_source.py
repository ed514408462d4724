"""Read an image at its registry and mirrors, and download its blobs.

Nothing here needs the index, so a command can start to download while SQLAlchemy is imported and the cache is opened.
A blob without a file in the cache is not stored, whatever the index says, so it is safe to download it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from cachedb import oci
from cachedb.disk import downloads, marker, single_flight
from cachedb.disk.folders import Folders
from cachedb.disk.layout import blob_path, partial_path
from cachedb.disk.writer import Content, discard, receive
from cachedb.errors import (
    CacheError,
    DigestMismatch,
    InvalidManifest,
    NotInCache,
    RegistryError,
    ignore_os_errors,
    os_errors,
)
from cachedb.oci.digests import Digest, digest_of
from cachedb.oci.manifests import DOCUMENT_LIMIT, Descriptor
from cachedb.oci.names import Name
from cachedb.progress import Advance
from cachedb.text import shorten
from cachedb.threads import Once, in_threads, start, stop_thread
from cachedb.transports.registry.places import mirrors, place
from cachedb.transports.registry.repository import Repository

__all__ = ["PARALLEL_DOWNLOADS", "Root", "Source"]


PARALLEL_DOWNLOADS = 4  # parallel downloads
_MANIFEST_BYTES = 64 * 1024 * 1024  # the limit for all manifests of an image, which are kept in memory

T = TypeVar("T")


class Root(NamedTuple):
    """The manifest or index that a name points to."""

    digest: Digest
    media_type: str
    data: bytes

    @property
    def descriptor(self) -> Descriptor:
        """The root as a descriptor."""
        return oci.root_descriptor(self.digest, len(self.data), self.media_type)


class Source:
    """An image at its registry and mirrors; a context manager, safe to use from several threads."""

    def __init__(
        self,
        directory: Path,
        name: Name,
        *,
        platform: str | None = None,
        all_platforms: bool = False,
        plain_http: bool | None = None,
        authfile: str | os.PathLike[str] | None = None,
    ) -> None:
        """Create a source without sending anything.

        Args:
            directory: the cache directory.
            name: the image's name.
            platform: ``os/architecture[/variant]``; the default is the host's.
            all_platforms: pull all children of an index.
            plain_http: use HTTP if True, HTTPS if False; the default is HTTP only for localhost.
            authfile: a file of credentials; the default is those of podman and Docker.
        """
        self.name = name
        self.wanted = None if all_platforms else (platform or oci.host_platform())
        self.documents: dict[Digest, bytes] = {}
        """The bytes of the manifests and indexes read so far, from the registry or the cache."""
        places = [*mirrors(name), place(name, plain_http=plain_http)]
        self.repositories: Sequence[Repository] = [Repository(where, authfile=authfile) for where in places]
        self._directory = directory
        self._once = Once()  # the requests for manifests
        self._thread: threading.Thread | None = None
        self._claim = ExitStack()  # the claim on the pull, taken before the index is open
        # The downloads that `begin` started: the event of their end, the fingerprints of complete files, and errors.
        self._finished: dict[Digest, threading.Event] = {}
        self._complete: dict[Digest, tuple[int, int, int] | None] = {}
        self._failed: dict[Digest, CacheError] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_early_downloads()
        self.release_claim()
        self.close()

    def stop_early_downloads(self) -> None:
        """Cancel what `begin` started, and wait a moment for its thread to end."""
        stop_thread(self._thread, self.stop)

    def close(self) -> None:
        """Close all connections; a later request opens new ones."""
        for repository in self.repositories:
            repository.close()

    def stop(self) -> None:
        """Cancel running requests and refuse new ones."""
        for repository in self.repositories:
            repository.stop()

    # Manifests

    def ask(self, call: Callable[[Repository], T]) -> T:
        """Call a function with each repository, mirrors first, until one succeeds.

        A mirror that lacks the image, or serves other content, is skipped.
        """
        for repository in self.repositories[:-1]:
            with suppress(RegistryError, DigestMismatch, InvalidManifest):
                return call(repository)
        return call(self.repositories[-1])

    def digest(self) -> Digest | None:
        """Return the digest of the name, with one request per repository at most; None if it is not sent.

        Raises:
            RegistryError: if the registry refuses or fails.
        """
        ask = lambda: self.ask(lambda repository: repository.digest(self.name.reference))  # noqa: E731
        return self.name.digest or self._once.run("digest", ask).result()

    def root(self, expected: Digest | None) -> Root:
        """Download the manifest or index of the name.

        Args:
            expected: the digest it must have, if known.

        Raises:
            RegistryError: if the registry refuses or fails.
            DigestMismatch: if the content has another digest.
        """

        def fetch(repository: Repository) -> Root:
            fetched = repository.manifest(expected or self.name.reference)
            like = expected or fetched.digest
            digest = digest_of(fetched.data, like)
            if like not in (None, digest):
                raise DigestMismatch(f"{self.name} should have digest {like}, and has {digest}")
            return Root(digest, oci.manifest_media_type(fetched.data, fetched.media_type), fetched.data)

        return self._once.run(("root", expected), lambda: self.ask(fetch)).result()

    def child(self, blob: Descriptor, stored: Callable[[Digest], bytes | None]) -> bytes:
        """Return the bytes of an index's child, from the cache or the registry.

        Args:
            blob: the child's descriptor.
            stored: returns the bytes from the cache, or None.

        Raises:
            RegistryError: if the registry refuses or fails.
            InvalidManifest: if the child, or all manifests together, are too large.
            DigestMismatch: if the content has another digest or size.
        """
        if blob.size > DOCUMENT_LIMIT:
            raise InvalidManifest(
                f"manifest {blob.digest} is {blob.size} bytes; more than {DOCUMENT_LIMIT} are refused"
            )
        data = self.documents.get(blob.digest)
        if data is None and sum(map(len, self.documents.values())) + blob.size > _MANIFEST_BYTES:
            raise InvalidManifest(f"the manifests of {self.name} have more than {_MANIFEST_BYTES} bytes together")
        if data is None:
            data = stored(blob.digest)
        if data is None:
            fetch = lambda repository: _verify(blob, repository.manifest(blob.digest).data)  # noqa: E731
            data = self._once.run(("child", blob.digest), lambda: self.ask(fetch)).result()
        self.documents[blob.digest] = _verify(blob, data)
        return data

    def choose(self, children: list[Descriptor]) -> list[Descriptor]:
        """Return the children of an index for the wanted platform.

        Raises:
            NotInCache: if there is none.
        """
        if self.wanted is None:
            return children
        chosen = oci.choose(children, self.wanted)
        if not chosen:
            known = ", ".join(sorted({child.platform or "unknown" for child in children})) or "none"
            raise NotInCache(
                f"{self.name} is not for platform {shorten(self.wanted)}, but for {known}: choose one with --platform"
            )
        return chosen

    # Blobs

    def download(self, blob: Descriptor, advance: Advance) -> Content:
        """Download a verified and durable blob into ``ingest/partial``.

        It comes from the first repository that has it. An interrupted download resumes. The caller must have the claim
        on the blob (`downloads.claim_key`).

        Raises:
            RegistryError: if the registry refuses or fails.
            DigestMismatch: if the content has another digest or size.
            StorageError: if the file cannot be written.
            ClaimLost: if another process has taken over the download because it was too slow.
        """
        path, key = partial_path(self._directory, blob.digest), downloads.claim_key(blob.digest)
        if failure := self._failed.pop(blob.digest, None):
            raise failure
        if (mark := self._complete.get(blob.digest)) and mark == _fingerprint(path):
            advance(blob.size)
            return Content(blob.digest, blob.size, mark[0])

        def look(is_fast: bool) -> None:
            if not is_fast:
                single_flight.check_claim(self._directory, key)
                return
            with suppress(single_flight.ClaimLost):  # another process that pulls this image waits for our blobs
                single_flight.show_progress(self._directory, self.key)
            single_flight.show_progress(self._directory, key)

        def ask(folder: int) -> Content:
            single_flight.check_claim(self._directory, key)
            return self.ask(lambda repository: _download(repository, blob, folder, path.name, advance, look))

        with ExitStack() as stack:
            with os_errors("write to the cache"):
                folders = Folders(self._directory)
                folders.make("ingest/partial")
                folder = stack.enter_context(folders.open("ingest/partial"))  # a link is refused
            has_part = downloads.find_resumable_bytes(folder, path.name, blob.size)
            try:
                return ask(folder)
            except DigestMismatch:
                if not has_part:
                    raise
                return ask(folder)  # a power cut may have damaged the earlier part: start again without it

    def wait(self, blob: Descriptor, seconds: float) -> int:
        """Wait for another thread or process that downloads a blob; return the bytes downloaded so far."""
        finished = self._finished.get(blob.digest)
        if finished is None or finished.is_set():
            time.sleep(seconds)
        else:
            finished.wait(seconds)
        with ignore_os_errors():
            return min(partial_path(self._directory, blob.digest).lstat().st_size, blob.size)
        return 0

    # Before the index is open

    def _is_ours(self) -> bool:
        """Return whether the directory is a cache this user may write to; if not, opening it explains why."""
        with suppress(CacheError):
            folders = Folders(self._directory)
            folders.check_owner()
            return marker.read(folders.root) is not None
        return False

    def begin(self) -> None:
        """Start downloading in a thread, if the cache exists and no other process pulls the image.

        Errors are kept and raised by the pull itself. Other processes that pull the image wait until the claim is
        released. A second claim by this thread would deadlock, so it raises.
        """
        with ignore_os_errors():  # a directory that cannot be used is reported when it is opened
            if (
                (self._directory / "index.db").exists()
                and self._is_ours()
                and self._claim.enter_context(single_flight.try_claim(self._directory, self.key))
            ):
                self._thread = threading.Thread(target=self._begin, daemon=True)
                start(self._thread)  # if it cannot start, the pull does all the work

    @property
    def key(self) -> str:
        """The key of the claim on the pull."""
        return f"pull {self.name}"

    def release_claim(self) -> None:
        """Release the claim on the pull that `begin` may have taken."""
        self._claim.close()

    def _begin(self) -> None:
        with suppress(CacheError, OSError):
            digest = self.digest()
            if digest and self._has_file(digest):
                return  # only the index knows which blobs are missing
            root = self.root(digest)
            if self._has_file(root.digest):
                return
            top = root.descriptor
            closure = list(
                oci.walk(top, lambda blob: root.data if blob is top else self._read_new_child(blob), self.choose)
            )
            absent = {blob.digest: blob for blob in closure if blob.role not in ("manifest", "index")}
            large_first = sorted(absent.values(), key=lambda blob: -blob.size)
            in_threads(self._begin_download, large_first, lambda _: None, threads=PARALLEL_DOWNLOADS)

    def _read_new_child(self, blob: Descriptor) -> bytes | None:
        return None if self._has_file(blob.digest) else self.child(blob, lambda _: None)

    def _begin_download(self, blob: Descriptor, advance: Advance) -> None:
        """Download a blob, unless it is stored or another process downloads it."""
        self._finished[blob.digest] = finished = threading.Event()
        try:
            with (
                suppress(CacheError, OSError),
                single_flight.try_claim(self._directory, downloads.claim_key(blob.digest)) as is_claimed,
            ):
                if is_claimed and not self._has_file(blob.digest):
                    try:
                        self.download(blob, advance)
                        self._complete[blob.digest] = _fingerprint(partial_path(self._directory, blob.digest))
                    except (RegistryError, DigestMismatch) as error:
                        self._failed[blob.digest] = error
        finally:
            finished.set()

    def _has_file(self, digest: Digest) -> bool:
        return blob_path(self._directory, digest).exists()


class _ChunkObserver:
    """Calls a function for every chunk of a download, including the earlier part, which is read again."""

    def __init__(self, look: Callable[[bool], None]) -> None:
        self._look = look

    def update(self, _data: memoryview, /) -> None:
        """Report a chunk."""
        self._look(True)


def _download(
    repository: Repository,
    blob: Descriptor,
    folder: int,
    file: str,
    advance: Advance,
    look: Callable[[bool], None],
) -> Content:
    """Download a blob from one repository to a file in an open folder, resuming a partial file."""
    look(False)
    done = downloads.find_resumable_bytes(folder, file, blob.size)
    advance(done)

    def count(new: int) -> None:
        nonlocal done
        done += new
        advance(new)

    source = repository.blob(blob.digest, blob.size, done, look)
    try:
        return receive(
            source,
            file,
            folder=folder,
            digest=blob.digest,
            size=blob.size,
            go_on=True,
            also=_ChunkObserver(look),
            progress=count,
            what=f"blob {blob.digest}",
        )
    except single_flight.ClaimLost:
        advance(-done)
        raise
    except (RegistryError, DigestMismatch) as error:
        advance(-done)  # the next repository starts from the beginning
        if not done or isinstance(error, DigestMismatch):
            discard(file, folder)
        raise
    finally:
        source.close()


def _verify(blob: Descriptor, data: bytes) -> bytes:
    """Return a manifest's bytes; raise if they do not match the descriptor."""
    if digest_of(data, blob.digest) != blob.digest or len(data) != blob.size:
        raise DigestMismatch(f"manifest {blob.digest}: the content has another digest or size")
    return data


def _fingerprint(path: Path) -> tuple[int, int, int] | None:
    """Return a value that changes if the file is replaced or written to; None if it does not exist."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_ctime_ns  # a hard link changes the ctime too
