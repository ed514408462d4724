"""Read an image at its registry and mirrors, and download its blobs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from cachedb import oci
from cachedb.disk import downloads, failures, single_flight
from cachedb.disk.folders import Folders
from cachedb.disk.layout import partial_path
from cachedb.disk.waiting import LOG
from cachedb.disk.writer import Content, discard, receive
from cachedb.errors import DigestMismatch, InvalidManifest, NotInCache, RegistryError, RegistryUnavailable, os_errors
from cachedb.oci.digests import Digest, digest_of
from cachedb.oci.manifests import Descriptor, check_document_size
from cachedb.oci.names import RemoteName
from cachedb.progress import Advance
from cachedb.text import shorten
from cachedb.transports.registry.access import DEFAULT_ACCESS, Access
from cachedb.transports.registry.client import TRIES
from cachedb.transports.registry.download import Download
from cachedb.transports.registry.repository import Repository
from cachedb.transports.registry.routes import pull_routes

__all__ = ["Root", "Source"]


_MANIFEST_BYTES = 64 * 1024 * 1024  # the limit for all manifests of an image, which are kept in memory
_MIRROR_SECONDS = 60.0  # to wait for the first byte of a mirror's answer

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
    """An image at its registry and mirrors; safe to use from several threads."""

    def __init__(
        self,
        directory: Path,
        wanted: RemoteName,
        *,
        platform: str | None = None,
        all_platforms: bool = False,
        foreign_layers: bool = False,
        access: Access = DEFAULT_ACCESS,
    ) -> None:
        """Create a source without sending anything.

        Args:
            directory: the cache directory.
            wanted: the image's name, and its digest if a certain one is wanted.
            platform: ``os/architecture[/variant]``; the default is the host's.
            all_platforms: pull all children of an index.
            foreign_layers: download foreign layers that the registry lacks from their URLs.
            access: how to reach the registry.
        """
        self.name, self.expected = wanted
        self.foreign_layers = foreign_layers
        self.wanted_platform = None if all_platforms else (platform or oci.host_platform())
        self.documents: dict[Digest, bytes] = {}
        """The bytes of the manifests and indexes read so far, from the registry or the cache."""
        *mirrors, registry = pull_routes(wanted.exact_name, access)
        self.registry = Repository(*registry)
        # A mirror gets one short try, because there is another place to ask.
        self._mirrors = [
            Repository(where, how._replace(timeout=min(how.timeout, _MIRROR_SECONDS)), tries=1)
            for where, how in mirrors
        ]
        self._skipped = {mirror for mirror in self._mirrors if failures.has_failed(directory, _failure_key(mirror))}
        self._directory = directory
        self.resumed: dict[Digest, int] = {}
        """For each downloaded blob, the bytes that an interrupted download had left."""

    @property
    def key(self) -> str:
        """The key of the claim on the pull."""
        return f"pull {self.name}"

    def close(self) -> None:
        """Close all connections; a later request opens new ones."""
        for repository in (*self._mirrors, self.registry):
            repository.close()

    def stop(self) -> None:
        """Cancel running requests and refuse new ones."""
        for repository in (*self._mirrors, self.registry):
            repository.stop()

    # Manifests

    def ask(self, call: Callable[[Repository], T]) -> T:
        """Call a function with each repository, mirrors first, until one succeeds.

        A mirror that lacks the image is skipped. This pull does not ask a mirror again that serves other content. No
        pull asks an unavailable mirror again for five minutes, unless the registry is unavailable too.
        """
        for mirror in self._mirrors:
            if mirror in self._skipped:
                continue
            try:
                return call(mirror)
            except RegistryUnavailable as error:
                LOG.warning("skipping the mirror %s for five minutes: %s", mirror.place.registry, error)
                failures.note_failure(self._directory, _failure_key(mirror))
                self._skipped.add(mirror)
            except (DigestMismatch, InvalidManifest):
                self._skipped.add(mirror)
            except RegistryError:
                pass
        try:
            return call(self.registry)
        except RegistryUnavailable:
            for mirror in list(self._skipped):
                with suppress(RegistryError, DigestMismatch, InvalidManifest):
                    mirror.tries = TRIES
                    found = call(mirror)
                    failures.forget_failure(self._directory, _failure_key(mirror))
                    self._skipped.discard(mirror)
                    return found
            raise

    def digest(self) -> Digest:
        """Return the digest of the image, with one request for headers if its tag must be looked up.

        Raises:
            RegistryError: if the registry refuses or fails.
        """
        return self.expected or self.ask(lambda repository: repository.digest(self.name.reference))

    def root(self, expected: Digest) -> Root:
        """Download the manifest or index of the name.

        Args:
            expected: the digest it must have.

        Raises:
            RegistryError: if the registry refuses or fails.
            DigestMismatch: if the content has another digest.
        """

        def fetch(repository: Repository) -> Root:
            fetched = repository.manifest(expected)
            digest = digest_of(fetched.data, expected)
            if digest != expected:
                raise DigestMismatch(f"{self.name} should have digest {expected}, and has {digest}")
            return Root(digest, oci.manifest_media_type(fetched.data, fetched.media_type), fetched.data)

        return self.ask(fetch)

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
        check_document_size(blob.size, f"manifest {blob.digest}")
        data = self.documents.get(blob.digest)
        if data is None:
            if sum(map(len, self.documents.values())) + blob.size > _MANIFEST_BYTES:
                raise InvalidManifest(f"the manifests of {self.name} have more than {_MANIFEST_BYTES} bytes together")
            data = stored(blob.digest)
        if data is None:
            data = self.ask(lambda repository: _verify(blob, repository.manifest(blob.digest).data))
        self.documents[blob.digest] = _verify(blob, data)
        return data

    def read_config(self, blob: Descriptor) -> bytes:
        """Return the bytes of a config.

        Raises:
            RegistryError: if the registry refuses or fails.
            InvalidManifest: if the config is too large.
            DigestMismatch: if the content has another digest or size.
        """
        check_document_size(blob.size, f"config {blob.digest}")

        def fetch(repository: Repository) -> bytes:
            buffer, done = memoryview(bytearray(blob.size)), 0
            with closing(repository.blob(blob.digest, blob.size)) as stream:
                while done < blob.size and (count := stream.readinto(buffer[done:])):
                    done += count
            return _verify(blob, bytes(buffer))

        return self.ask(fetch)

    def referrers(self, subject: Digest) -> list[Descriptor]:
        """Return the listed referrers of a manifest, from the registry if no mirror lists any.

        Raises:
            RegistryError: if the registry refuses or fails.
            InvalidManifest: if the list is not an index.
        """

        def fetch(repository: Repository) -> list[Descriptor]:
            found = repository.referrers(subject)
            if not found and repository is not self.registry:
                raise RegistryError(f"the mirror {repository.place.registry} lists no referrers of {subject}")
            return found

        return self.ask(fetch)

    def choose(
        self, children: list[Descriptor], list_children: Callable[[Descriptor], list[Descriptor]]
    ) -> list[Descriptor]:
        """Return the children of an index for the wanted platform.

        Args:
            children: the children of the index.
            list_children: returns the children of an index inside it, as for `oci.choose`.

        Raises:
            NotInCache: if there is none.
        """
        if self.wanted_platform is None:
            return children
        chosen = oci.choose(children, self.wanted_platform, list_children)
        if not chosen:
            inner = [found for child in children if child.role == "index" for found in list_children(child)]
            known = ", ".join(sorted({child.platform or "unknown" for child in inner or children})) or "none"
            asked = shorten(self.wanted_platform)
            raise NotInCache(f"{self.name} is not for platform {asked}, but for {known}: choose one with --platform")
        return chosen

    # Blobs

    def find_unavailable(self, layers: Iterable[Descriptor]) -> set[Digest]:
        """Return the foreign layers that a pull leaves out, because the registry lacks them.

        Args:
            layers: the foreign layers that are not stored.

        Raises:
            RegistryError: if the registry fails.
        """
        if self.foreign_layers:
            return set()
        return {layer.digest for layer in layers if not self.registry.has("blobs", layer.digest)}

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

        def look(is_fast: bool) -> None:
            if not is_fast:
                single_flight.check_claim(self._directory, key)
                return
            with suppress(single_flight.ClaimLost):  # the process that took over the image waits for our blobs
                single_flight.show_progress(self._directory, self.key)
            single_flight.show_progress(self._directory, key)

        def fetch(repository: Repository, url: str | None = None) -> Content:
            look(False)
            done = downloads.find_resumable_bytes(folder, path.name, blob.size)
            with closing(repository.blob(blob.digest, blob.size, done, look, url)) as stream:
                content = _receive(stream, blob, folder, path.name, done, advance, look)
            self.resumed[blob.digest] = stream.resumed
            return content

        def fetch_from_any() -> Content:
            single_flight.check_claim(self._directory, key)
            try:
                return self.ask(fetch)
            except RegistryError as error:
                urls = [url for url in blob.urls if url.startswith(("https://", "http://"))]
                if not (self.foreign_layers and blob.is_foreign and urls):
                    raise
                for url in urls:
                    with suppress(RegistryError):
                        return fetch(self.registry, url)
                raise RegistryError(
                    f"{error}, and none of its {len(urls)} URLs has it: pull without --foreign-layers"
                ) from error

        with ExitStack() as stack:
            with os_errors("write to the cache"):
                folders = Folders(self._directory)
                folders.make("ingest/partial")
                folder = stack.enter_context(folders.open("ingest/partial"))  # a link is refused
            has_part = downloads.find_resumable_bytes(folder, path.name, blob.size)
            try:
                return fetch_from_any()
            except DigestMismatch:
                if not has_part:
                    raise
                return fetch_from_any()  # the earlier part may be damaged, as by a power cut: start again without it


class _ChunkObserver:
    """Calls a function for every chunk of a download; the part from an earlier download is read again."""

    def __init__(self, look: Callable[[bool], None]) -> None:
        self._look = look

    def update(self, _data: memoryview, /) -> None:
        """Report a chunk."""
        self._look(True)


def _receive(
    stream: Download,
    blob: Descriptor,
    folder: int,
    file: str,
    done: int,
    advance: Advance,
    look: Callable[[bool], None],
) -> Content:
    """Receive a download into a file in an open folder; the file has its first ``done`` bytes already."""
    advance(done)

    def count(new: int) -> None:
        nonlocal done
        done += new
        advance(new)

    try:
        return receive(
            stream,
            file,
            folder=folder,
            digest=blob.digest,
            size=blob.size,
            resume=True,
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


def _failure_key(mirror: Repository) -> str:
    return f"mirror {mirror.place.registry}"


def _verify(blob: Descriptor, data: bytes) -> bytes:
    """Return the bytes of a manifest or config; raise if they do not match the descriptor."""
    if digest_of(data, blob.digest) != blob.digest or len(data) != blob.size:
        raise DigestMismatch(f"{blob.role} {blob.digest}: the content has another digest or size")
    return data
