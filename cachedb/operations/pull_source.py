"""An image where it comes from: what its registries say of it, and the download of its blobs.

Nothing here needs the index. So a command begins to download while SQLAlchemy is imported and the cache is opened: what
has no file in the cache is not stored, whatever the index says, and is surely wanted.
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

__all__ = ["AT_ONCE", "Root", "Source"]


AT_ONCE = 4  # blobs that are downloaded at the same time
_BYTES = 64 * 1024 * 1024  # of manifests, which are all in memory: those of a thousand platforms have far less

T = TypeVar("T")


class Root(NamedTuple):
    """What a name points to."""

    digest: Digest
    media_type: str
    data: bytes

    @property
    def descriptor(self) -> Descriptor:
        """The same as a manifest would name it."""
        return oci.root(self.digest, len(self.data), self.media_type)


class Source:
    """An image at its registry, and at the mirrors of that; a context manager. Usable from several threads."""

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
        """Nothing is sent yet.

        Args:
            directory: of the cache.
            name: of the image.
            platform: ``os/architecture[/variant]``; the host's unless given.
            all_platforms: of an index, what is wanted is all that it names.
            plain_http: speak HTTP and not HTTPS; unless given, with this host alone.
            authfile: to take credentials from, instead of the files that podman and Docker keep.
        """
        self.name = name
        self.wanted = None if all_platforms else (platform or oci.host_platform())
        self.documents: dict[Digest, bytes] = {}
        """The manifests and indexes that were asked for, and those that were here."""
        places = [*mirrors(name), place(name, plain_http=plain_http)]
        self.repositories: Sequence[Repository] = [Repository(where, authfile=authfile) for where in places]
        self._directory = directory
        self._once = Once()  # what the registry says
        self._begun: threading.Thread | None = None
        self._right = ExitStack()  # to pull it, while the index is not open yet
        self._ended: dict[Digest, threading.Event] = {}  # downloads that were begun before the index was open
        self._whole: dict[Digest, tuple[int, int, int] | None] = {}  # those that are all there, as `_mark` has them
        self._failed: dict[Digest, CacheError] = {}  # those that cannot be had: who wants them next is told so

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop_thread(self._begun, self.stop)
        self.let_go()
        self.close()

    def close(self) -> None:
        """Close all connections; who asks again opens others."""
        for repository in self.repositories:
            repository.close()

    def stop(self) -> None:
        """End what threads wait for, and let them ask no more."""
        for repository in self.repositories:
            repository.stop()

    # What the registry says

    def ask(self, call: Callable[[Repository], T]) -> T:
        """Ask one repository after the other, until one has an answer, and a good one."""
        for repository in self.repositories[:-1]:
            with suppress(RegistryError, DigestMismatch, InvalidManifest):
                return call(repository)
        return call(self.repositories[-1])

    def digest(self) -> Digest | None:
        """Return the digest that the name points to, by one request at most; None if no registry says.

        Raises:
            RegistryError: if that cannot be had.
        """
        ask = lambda: self.ask(lambda repository: repository.digest(self.name.reference))  # noqa: E731
        return self.name.digest or self._once.run("digest", ask).result()

    def root(self, said: Digest | None) -> Root:
        """Return the manifest or index that the name points to, from the registry.

        Args:
            said: the digest that it must have, if that is known.

        Raises:
            RegistryError: if it cannot be had.
            DigestMismatch: if what comes is something else.
        """

        def fetch(repository: Repository) -> Root:
            fetched = repository.manifest(said or self.name.reference)
            like = said or fetched.digest
            digest = digest_of(fetched.data, like)
            if like not in (None, digest):
                raise DigestMismatch(f"{self.name} should have digest {like}, and what comes has {digest}")
            return Root(digest, oci.manifest_media_type(fetched.data, fetched.media_type), fetched.data)

        return self._once.run(("root", said), lambda: self.ask(fetch)).result()

    def child(self, blob: Descriptor, stored: Callable[[Digest], bytes | None]) -> bytes:
        """Return a manifest that an index names: the one that is here, or else the registry's.

        Args:
            blob: as the index has it.
            stored: returns the one that is here, if there is one.

        Raises:
            RegistryError: if it cannot be had.
            InvalidManifest: if it is too large, or all of them together are.
            DigestMismatch: if what comes is something else.
        """
        if blob.size > DOCUMENT_LIMIT:
            raise InvalidManifest(f"manifest {blob.digest} is {blob.size} bytes; {DOCUMENT_LIMIT} at most are read")
        data = self.documents.get(blob.digest)
        if data is None and sum(map(len, self.documents.values())) + blob.size > _BYTES:
            raise InvalidManifest(f"{self.name} has manifests of more than {_BYTES} bytes in all")
        if data is None:
            data = stored(blob.digest)
        if data is None:
            fetch = lambda repository: _verified(blob, repository.manifest(blob.digest).data)  # noqa: E731
            data = self._once.run(("child", blob.digest), lambda: self.ask(fetch)).result()
        self.documents[blob.digest] = _verified(blob, data)
        return data

    def choose(self, children: list[Descriptor]) -> list[Descriptor]:
        """Return those of an index's children that are for the platform that is wanted.

        Raises:
            NotInCache: if none is.
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
        """Download a blob to where partial ones lie, from the first repository that has it; verified, and durable.

        One that was cut off is gone on with. To be called by who has the right to (`partial.key_of`).

        Raises:
            RegistryError: if it cannot be had.
            DigestMismatch: if what comes has another digest or size.
            StorageError: if it cannot be written.
            ClaimLost: if another process has taken the download over, as it came too slowly.
        """
        path, key = partial_path(self._directory, blob.digest), downloads.key_of(blob.digest)
        if failure := self._failed.pop(blob.digest, None):
            raise failure
        if (mark := self._whole.get(blob.digest)) and mark == _mark(path):
            advance(blob.size)
            return Content(blob.digest, blob.size, mark[0])

        def look(is_fast: bool) -> None:
            if not is_fast:
                single_flight.check_claim(self._directory, key)
                return
            with suppress(single_flight.ClaimLost):  # whoever pulls the same waits for our blobs
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
            begun = downloads.begun(folder, path.name, blob.size)
            try:
                return ask(folder)
            except DigestMismatch:
                if not begun:
                    raise
                return ask(folder)  # it may have been the part that was here: a power cut can spoil it

    def wait(self, blob: Descriptor, seconds: float) -> int:
        """Wait for another thread or process that downloads a blob; return the bytes of it that are there by then."""
        ended = self._ended.get(blob.digest)
        if ended is None or ended.is_set():
            time.sleep(seconds)
        else:
            ended.wait(seconds)
        with ignore_os_errors():
            return min(partial_path(self._directory, blob.digest).lstat().st_size, blob.size)
        return 0

    # Before the index is open

    def _is_ours(self) -> bool:
        """Return whether the directory is a cache that this user may write to; else opening it says why not."""
        with suppress(CacheError):
            folders = Folders(self._directory)
            folders.check_owner()
            return marker.read(folders.root) is not None
        return False

    def begin(self) -> None:
        """Begin to ask and to download in a thread, if the cache is there and nobody else pulls the same.

        What fails, fails again for who wants it. Others who pull the same wait until this is pulled, or is left; this
        thread, which would wait for itself, is refused.
        """
        with ignore_os_errors():  # of what cannot be looked at, or written to
            if (
                (self._directory / "index.db").exists()
                and self._is_ours()
                and self._right.enter_context(single_flight.unless_made(self._directory, self.key))
            ):
                self._begun = threading.Thread(target=self._begin, daemon=True)
                start(self._begun)  # or all of it is for whoever wants it

    @property
    def key(self) -> str:
        """What `producing.once` knows the pull of the image by."""
        return f"pull {self.name}"

    def let_go(self) -> None:
        """Leave the right to pull the image, which `begin` may have taken, to whoever pulls it."""
        self._right.close()

    def _begin(self) -> None:
        with suppress(CacheError, OSError):
            said = self.digest()
            if said and self._has_file(said):
                return  # it is for the index to say what is here of it
            root = self.root(said)
            if self._has_file(root.digest):
                return
            top = root.descriptor
            closure = list(oci.walk(top, lambda blob: root.data if blob is top else self._new_child(blob), self.choose))
            absent = {blob.digest: blob for blob in closure if blob.role not in ("manifest", "index")}
            large_first = sorted(absent.values(), key=lambda blob: -blob.size)
            in_threads(self._begin_download, large_first, lambda _: None, threads=AT_ONCE)

    def _new_child(self, blob: Descriptor) -> bytes | None:
        return None if self._has_file(blob.digest) else self.child(blob, lambda _: None)

    def _begin_download(self, blob: Descriptor, advance: Advance) -> None:
        """Download a blob, unless somebody does, or has."""
        self._ended[blob.digest] = ended = threading.Event()
        try:
            with (
                suppress(CacheError, OSError),
                single_flight.unless_made(self._directory, downloads.key_of(blob.digest)) as nobody,
            ):
                if nobody and not self._has_file(blob.digest):
                    try:
                        self.download(blob, advance)
                        self._whole[blob.digest] = _mark(partial_path(self._directory, blob.digest))
                    except (RegistryError, DigestMismatch) as error:
                        self._failed[blob.digest] = error
        finally:
            ended.set()

    def _has_file(self, digest: Digest) -> bool:
        return blob_path(self._directory, digest).exists()


class _Looking:
    """What looks at every chunk of a download, those as well that were here before: they are read again."""

    def __init__(self, look: Callable[[bool], None]) -> None:
        self._look = look

    def update(self, _data: memoryview, /) -> None:
        """Note that a chunk came."""
        self._look(True)


def _download(
    repository: Repository,
    blob: Descriptor,
    folder: int,
    file: str,
    advance: Advance,
    look: Callable[[bool], None],
) -> Content:
    """Download a blob from one repository, or what a file in an open folder has not yet of it."""
    look(False)
    done = downloads.begun(folder, file, blob.size)
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
            also=_Looking(look),
            progress=count,
            what=f"blob {blob.digest}",
        )
    except single_flight.ClaimLost:
        advance(-done)
        raise
    except (RegistryError, DigestMismatch) as error:
        advance(-done)  # the next one is asked from the beginning
        if not done or isinstance(error, DigestMismatch):
            discard(file, folder)
        raise
    finally:
        source.close()


def _verified(blob: Descriptor, data: bytes) -> bytes:
    """Return a manifest, if it is what another names."""
    if digest_of(data, blob.digest) != blob.digest or len(data) != blob.size:
        raise DigestMismatch(f"manifest {blob.digest} should be {blob.size} bytes of that digest, and is not")
    return data


def _mark(path: Path) -> tuple[int, int, int] | None:
    """Return what tells a file from another of its name, and from itself after it was written to."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_ctime_ns  # which is another, too, once it has a second name
