"""Define `Cache`, which has a method for each operation on a cache; the command line calls them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Literal, Self

from sqlalchemy import Connection, select

from cachedb import oci
from cachedb.arguments import (
    check_characters,
    check_functions,
    check_lifetime,
    check_mapping,
    check_numbers,
    check_pair,
    check_paths,
    check_positive,
    check_readable,
    check_text,
    check_writable,
)
from cachedb.content import collect, publish, save
from cachedb.content.collect import Collected, Removed
from cachedb.content.details import read_details, read_platforms
from cachedb.content.held import find_hold_name, find_images_and_digests, hold_images
from cachedb.content.last_used import Uses
from cachedb.content.session import Session
from cachedb.disk import reader, single_flight
from cachedb.disk.folders import Leftover
from cachedb.disk.layout import POLICY_FILE, blob_path, choose_directory
from cachedb.disk.writer import Data
from cachedb.errors import (
    CacheError,
    DamagedIndex,
    InvalidManifest,
    NotInCache,
    SchemaMismatch,
    StorageError,
    os_errors,
)
from cachedb.index import blobs, descriptions, holds, images, lifetimes
from cachedb.index.filters import Filters, complete_name, find_images, has_short_digest, narrow, parse_wanted
from cachedb.index.holds import HoldInfo
from cachedb.index.patterns import rename_all
from cachedb.index.records import BlobDetails, BlobInfo, ImageDetails, ImageInfo, ImportedImage, PlatformInfo
from cachedb.index.sqlite.database import CLOSED, Database
from cachedb.index.tables import BLOBS
from cachedb.oci.digests import Algorithm, Digest, is_digest, parse_digest, parse_digest_prefix
from cachedb.oci.manifests import Role
from cachedb.oci.names import Name, RemoteName, parse_repository, strip_transport
from cachedb.operations.room import Room
from cachedb.operations.upgrade import prepare as prepare_schema
from cachedb.progress import BlobProgress, Progress
from cachedb.reports.usage import Stats
from cachedb.text import shorten

if TYPE_CHECKING:
    from cachedb.index.sqlite.query import Answer
    from cachedb.operations.adopt import Adoption, How
    from cachedb.operations.copy import Copied
    from cachedb.operations.inspect import RemoteImage
    from cachedb.operations.plan import Explanation, Plan, PlannedImage
    from cachedb.operations.policy import Policy
    from cachedb.operations.prune import Pruned
    from cachedb.operations.pull import Pulled, PullPlan
    from cachedb.operations.push import Pushed
    from cachedb.operations.verify import Verification
    from cachedb.reports.sessions import SessionInfo
    from cachedb.reports.usage import SelectedUsage, Usage
    from cachedb.reports.views import View
    from cachedb.transports.archive.formats import Format
    from cachedb.transports.registry.access import Access

__all__ = ["Cache", "Progress"]


class Cache:
    """A cache of container images in a directory that many processes share.

    Open one with `Cache.open`, and use it as a context manager or `close` it. Several threads may use it at once, and
    so may a forked child.

    A name is a `Name`, or a string ``repository[:tag]`` or ``repository@digest``. A digest is ``sha256:...`` or
    ``sha512:...``; bare hexadecimal digits are a sha256 digest. To find what is in the cache, the first 12 digits or
    more of a digest are enough, if no other digest starts with them. All methods raise `InvalidName` for an invalid
    name, `InvalidDigest` for an invalid or ambiguous digest, and `StorageError` if the file system fails.
    """

    def __init__(self, database: Database) -> None:
        uses = Uses(database)
        self._parts = database, Session(database), uses, Room(database, uses)
        self._leftovers: list[Leftover] = []
        self._closed = False
        self._to_close = [self._parts]  # `close` empties it, so that only one thread or signal handler closes the parts

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str] | None = None,
        *,
        create: bool = True,
        upgrade: bool = False,
        damaged: bool = False,
        wait: float | None = None,
        trust: bool = False,
    ) -> Self:
        """Open a cache, or create it; also clean up after processes that died while they used it.

        The clean-up never waits for another process: if one is writing to the cache, a later open does the rest.

        Args:
            directory: the cache directory; the default is ``CACHEDB_DIR``, else the user's cache directory.
            create: create the cache, and its directory, if there is none.
            upgrade: upgrade an older index to the newest schema. ``CACHEDB_AUTO_UPGRADE=1`` does the same.
            wait: seconds to wait for a lock of another process, or for work of another process that makes no progress.
                After that a method raises `Busy`, which names the process. 0 never waits; inf waits forever. The
                default is ``CACHEDB_WAIT``, else 60.
            damaged: open the cache even if its index is lost, damaged, or has another schema. Then use only `verify`.
            trust: write to another user's cache even if it is not shared. ``CACHEDB_TRUST=1`` does the same.

        Raises:
            NotACache: if the directory is not a cache and cannot become one.
            NotInCache: if there is no cache, and ``create`` is false.
            NotOurs: if another user owns the directory or a folder in it, or such a folder is a link.
            DamagedIndex: if the index is lost or damaged, and ``damaged`` is false.
            SchemaMismatch: if the schema is too new for this release, or older and ``upgrade`` is false; not if
                ``damaged`` is true.
            StorageError: if the directory cannot be created or read, or is on a file system that several hosts share.
        """
        database = Database(choose_directory(directory), wait=wait, trust=trust)
        upgrade = upgrade or os.environ.get("CACHEDB_AUTO_UPGRADE") == "1"

        def prepare() -> list[Leftover]:
            prepare_schema(database, create=create, upgrade=upgrade)
            if database.read_only:
                return []
            leftovers = collect.recover_without_waiting(database)
            database.reserve.keep()
            return leftovers

        cache = cls(database)
        try:
            cache._leftovers = database.reserve.run(prepare)
        except (DamagedIndex, SchemaMismatch):
            if not damaged:
                database.close()
                raise
        except StorageError as error:
            if not database.make_read_only(error):
                database.close()
                raise
            try:
                prepare_schema(database, create=create, upgrade=upgrade)
            except BaseException:
                database.close()
                raise
        except BaseException:
            database.close()
            raise
        return cache

    def __reduce__(self) -> tuple[Callable[[str], Cache], tuple[str]]:
        """Pickle a call that opens the same cache in a new session; the receiver must close that cache."""
        return partial(type(self).open, wait=self._parts[0].wait_seconds), (str(self.directory),)

    def __repr__(self) -> str:
        return f"<Cache {str(self.directory)!r}{', closed' if self._closed else ''}>"

    def close(self) -> None:
        """Close the cache. From now on a collection may free blobs that were stored but belong to no image.

        All other methods raise `CacheError` then, even one that another thread is executing. Closing a cache twice
        does nothing.
        """
        self._closed = True
        try:
            database, session, uses, _ = self._to_close.pop()
        except IndexError:
            return
        with ExitStack() as stack:  # a failure of one part must not keep the others open
            stack.callback(database.end)
            stack.callback(session.close)
            uses.write()

    def _check_open(self) -> None:
        if self._closed:
            raise CacheError(CLOSED)

    # Methods use these properties, because they check that the cache is open.

    @property
    def _database(self) -> Database:
        self._check_open()
        return self._parts[0]

    @property
    def _session(self) -> Session:
        self._check_open()
        return self._parts[1]

    @property
    def _uses(self) -> Uses:
        self._check_open()
        return self._parts[2]

    @property
    def _room(self) -> Room:
        self._check_open()
        return self._parts[3]

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def share(self, group: str | None = None) -> str:
        """Share the cache with a group of users, who may then all read and write it.

        Folders get the setgid bit. The group can write to the index and the lock files; nobody can write to blobs.
        Files that are created later get the same modes, whatever the umask of the process.

        Args:
            group: name or number of the group; the default is the current group of a shared cache, else the process's.

        Returns:
            The name of the group.

        Raises:
            CacheError: if there is no such group.
            StorageError: if this user does not own the cache, or is not a member of the group.
        """
        from cachedb.operations.share import share

        check_text(optional=True, group=group)
        check_characters(group=group)
        return share(self._database.folders, group)

    @property
    def directory(self) -> Path:
        """The cache directory."""
        return self._parts[0].directory

    # Blobs

    def save_blob(self, digest: str, data: Data) -> Digest:
        """Store a blob with a known digest, which is verified.

        The blob is kept from collection until this `Cache` saves an image that contains it, or is closed. If a saved
        image already references the blob, the blob belongs to that image at once.

        Args:
            digest: the digest that the content must have.
            data: the content.

        Returns:
            The digest with its algorithm.

        Raises:
            DigestMismatch: if the content has another digest.
        """
        return self._store_blob(data, digest=parse_digest(digest))

    def add_blob(self, data: Data, *, algorithm: Algorithm = "sha256") -> Digest:
        """Compute the digest of a blob and store it, as `save_blob` does.

        Args:
            data: the content.
            algorithm: ``sha256`` or ``sha512``.

        Returns:
            The digest.
        """
        if algorithm not in ("sha256", "sha512"):
            raise CacheError(f"{shorten(algorithm)} is not a digest algorithm: use sha256 or sha512")
        return self._store_blob(data, algorithm=algorithm)

    def _store_blob(self, data: Data, *, digest: Digest | None = None, algorithm: str = "sha256") -> Digest:
        room = self._room
        room.prepare(data)
        stored = publish.store_blob(self._database, self._session, data, digest=digest, algorithm=algorithm)
        room.keep_limits()
        return stored.digest

    def has_blob(self, digest: str) -> bool:
        """Return whether a blob is stored."""
        try:
            return blobs.read_stored_size(self._database, self._find_digest(digest)) is not None
        except NotInCache:
            return False

    def list_blobs(self, prefix: str = "") -> list[Digest]:
        """Return the digests of stored blobs that start with ``prefix``, sorted."""
        check_text(prefix=prefix)
        check_characters(prefix=prefix)
        query = select(BLOBS.c.digest).where(BLOBS.c.stored_at.is_not(None)).order_by(BLOBS.c.digest)
        with self._database.read() as connection:
            if prefix:
                query = query.where(BLOBS.c.digest >= prefix, BLOBS.c.digest < f"{prefix}~")
            return [Digest(digest) for digest in connection.execute(query).scalars()]

    def get_blob_size(self, digest: str) -> int:
        """Return a stored blob's size in bytes.

        Raises:
            NotInCache: if the blob is not stored.
        """
        wanted = self._find_digest(digest)
        size = blobs.read_stored_size(self._database, wanted)
        if size is None:
            raise NotInCache(f"{wanted} is not in the cache", name=wanted)
        return size

    def get_blob_path(self, digest: str) -> Path:
        """Return the path of a stored blob's file, for reading only; `hold` the blob to keep the path valid.

        Raises:
            NotInCache: if the blob is not stored.
        """
        self.get_blob_size(digest := self._find_digest(digest))
        return blob_path(self.directory, digest)

    def open_blob(self, digest: str) -> BinaryIO:
        """Open a stored blob for reading; the stream stays readable even if the blob is collected.

        Raises:
            NotInCache: if the blob is not stored.
        """
        self.get_blob_size(digest := self._find_digest(digest))
        return reader.open_blob(self.directory, digest)

    def get_blob(self, digest: str) -> bytes:
        """Read a stored blob into memory, for example a config; use `open_blob` for a large blob.

        Raises:
            NotInCache: if the blob is not stored.
        """
        with self.open_blob(digest) as file, os_errors("read a blob"):
            return file.read()

    def get_blob_details(self, digest: str) -> BlobDetails:
        """Return a blob, stored or not, with the images that have it, read at one moment.

        Raises:
            NotInCache: if the blob is neither stored nor in an image.
        """
        wanted = self._find_digest(digest)
        with self._database.read() as connection:
            found = blobs.read_blob_details(connection, self.directory, wanted)
        if found is None:
            raise NotInCache(f"{wanted} is neither stored nor in an image", name=wanted)
        return found

    def _find_digest(self, text: str) -> Digest:
        prefix = parse_digest_prefix(text)
        if prefix is None or is_digest(prefix):
            return parse_digest(text)
        with self._database.read() as connection:
            found = blobs.find_digest(connection, text)
        if found is None:
            raise NotInCache(f"no digest in the cache starts with {prefix}", name=text)
        return found

    @contextmanager
    def hold(self, *names_or_digests: str | Name) -> Iterator[None]:
        """Keep blobs from collection during a block, so that their paths stay valid.

        A blob that an image gains during the block, for example because its name moves, is not held.

        Args:
            names_or_digests: blobs and images; all blobs of an image are held.

        Raises:
            NotInCache: if an image is not in the cache, or a blob is not stored.
        """
        with hold_images(self._database, self._session, *names_or_digests):
            yield

    def add_hold(
        self,
        *names_or_digests: str | Name,
        seconds: float | None = None,
        filters: Filters | None = None,
        ignore_missing: bool = False,
    ) -> list[HoldInfo]:
        """Keep blobs from collection even after this process ends.

        Args:
            names_or_digests: blobs and images, which may be patterns; all present blobs of an image are held.
            seconds: how long to hold, by the host's clock; None holds until `release_hold`.
            filters: conditions that the images must fulfil too. Without names, they choose from all images.
            ignore_missing: skip names, patterns and digests that match nothing.

        Returns:
            The new holds, one for each name or digest.

        Raises:
            NotInCache: if an image is not in the cache, or a blob is not stored.
            CacheError: if ``seconds`` is not positive, or more than a hundred years.
        """
        check_numbers(seconds=seconds)
        with self._database.write() as connection:
            added = []
            for found in find_images_and_digests(connection, names_or_digests, filters, ignore_missing=ignore_missing):
                if isinstance(found, str):
                    name, digests = str(found), {found}
                else:
                    contents = images.read_image_blobs(connection, self.directory, found.id)
                    name, digests = str(found.name), {blob.digest for blob in contents}
                added.append(holds.add(connection, name, digests, seconds))
            return [hold for hold in holds.read_holds(connection) if hold.id in added]

    def list_holds(self) -> list[HoldInfo]:
        """Return the holds that `add_hold` made and that have not ended, oldest first."""
        with self._database.read() as connection:
            return holds.read_holds(connection)

    def release_hold(self, *holds_or_names: str | Name) -> int:
        """Release holds that `add_hold` made: all of them, or none.

        Args:
            holds_or_names: ids of holds, or held names and digests; all holds of such a name or digest are released.

        Returns:
            The number of released holds.

        Raises:
            NotInCache: if there is no hold of one of them.
        """

        def release() -> int:
            with self._database.write() as connection:
                return holds.release(connection, *(find_hold_name(connection, text) for text in holds_or_names))

        return self._database.reserve.run(release)  # on a full disk, what is held keeps `gc` from freeing space

    def sessions(self) -> list[SessionInfo]:
        """Return the processes that use the cache, each with what it does or waits for, and since when.

        A process that only reads has no session, and is not listed.
        """
        from cachedb.reports.sessions import list_sessions

        self._check_open()
        return list_sessions(self.directory)

    @contextmanager
    def producing(
        self, name: str | Name, *, is_working: Callable[[], bool] = lambda: True
    ) -> Iterator[ImageInfo | None]:
        """Produce an image in a block, or wait for another process that produces it.

        The block gets the image if it is complete in the cache. Otherwise it gets None and the claim to produce the
        image under this name. Other processes that want the image wait until the block ends. Then they get the image,
        or one of them gets the claim if the image is still not complete. A claim also ends with its process.

            with cache.producing("app:1") as image:
                if image is None:
                    image = build_and_save("app:1")

        Args:
            name: the image's name.
            is_working: called every second in a thread; returns whether the block makes progress. Other processes wait
                as long as the block makes progress. Without progress, they wait the seconds given to their `open`.

        Raises:
            Busy: if the process that produces the image makes no progress for the seconds given to `open`.
            CacheError: if this thread is already in such a block for the same name.
        """
        check_functions(is_working=is_working)
        wanted = Name.parse(name)

        def find() -> ImageInfo | None:
            try:
                image = self.get_image(wanted)
            except NotInCache:
                return None
            return image if image.complete else None

        with single_flight.claim_or_find(
            self.directory, str(wanted), find, seconds=self._database.wait_seconds, is_working=is_working
        ) as found:
            if found:
                self._uses.note(wanted)
            yield found

    @contextmanager
    def producing_blob(self, digest: str) -> Iterator[bool]:
        """Store a blob in a block, or wait for another process that stores it, like `producing`.

        The block gets whether the blob is stored; if not, the block has the claim to store it.

        Args:
            digest: the blob's digest.
        """
        wanted = parse_digest(digest)
        find = lambda: self.has_blob(wanted) or None  # noqa: E731
        with single_flight.claim_or_find(self.directory, wanted, find, seconds=self._database.wait_seconds) as found:
            yield bool(found)

    # Images

    def _parse_name(self, text: str | Name) -> Name:
        if not has_short_digest(text):
            return Name.parse(text)
        with self._database.read() as connection:
            return complete_name(connection, text)

    @staticmethod
    def _find(connection: Connection, name: str | Name) -> int:
        return images.find(connection, complete_name(connection, name)).id

    def save_manifest(
        self, name: str | Name, manifest: bytes, media_type: str | None = None, *, ttl: float | None = None
    ) -> ImageInfo:
        """Store a manifest or index under a name, and associate its config and layers, stored or not.

        If the name pointed to another manifest, the name moves in the same transaction.

        Args:
            name: the image's name; a digest in it must be the manifest's.
            manifest: the exact bytes.
            media_type: the manifest's media type, if known; the default is its ``mediaType``, else its shape decides.
            ttl: seconds after which `prune` removes the image; None lets it stay, even if it had a lifetime before.

        Raises:
            InvalidManifest: if the bytes are not a valid manifest or index.
            InvalidName: if the name has another digest.
        """
        parsed = Name.parse(name)
        if not isinstance(manifest, (bytes, bytearray)):
            raise TypeError(f"manifest is of type {type(manifest).__name__!r}: give its bytes")
        check_text(media_type=media_type, optional=True)
        check_lifetime(ttl=ttl)
        room = self._room
        room.prepare()
        stored = publish.store_manifest(self._database, self._session, parsed, manifest, media_type, ttl=ttl)
        room.keep_limits([stored.name])
        return stored

    def get_manifest(self, name: str | Name) -> bytes:
        """Return the exact bytes of an image's manifest or index, verified against its digest.

        Raises:
            NotInCache: if there is no such image.
            DigestMismatch: if the manifest's file is damaged.
        """
        parsed, tried = self._parse_name(name), None
        while True:
            with self._database.read() as connection:
                digest = images.find(connection, parsed).digest
            try:
                data = reader.read_verified(self.directory, digest)
            except NotInCache:
                # Since the look-up, the name may have moved and the manifest may have been collected: look once more.
                if digest == tried:
                    raise
                tried = digest
            else:
                self._uses.note(parsed)
                return data

    def get_image(self, name: str | Name) -> ImageInfo:
        """Return an image.

        Raises:
            NotInCache: if there is no such image.
        """
        with self._database.read() as connection:
            return images.read_image(connection, self.directory, self._find(connection, name))[0]

    def get_details(self, name: str | Name) -> ImageDetails:
        """Return an image with its blobs, labels and platforms, all read at one moment.

        Raises:
            NotInCache: if there is no such image.
        """
        with self._database.read() as connection:
            return read_details(connection, self.directory, self._find(connection, name))

    def list_manifests(
        self, *names: str | Name, filters: Filters | None = None, ignore_missing: bool = False
    ) -> list[ImageInfo]:
        """Return all images, or some of them, sorted by name or as the filters say.

        Args:
            names: names of images, and patterns such as ``team/*``, in which ``*`` also matches a slash.
            filters: conditions that the images must fulfil too.
            ignore_missing: skip names and patterns that match no image.

        Raises:
            NotInCache: if a name or a pattern matches no image, whatever the filters.
        """
        wanted = parse_wanted(names)
        with self._database.read() as connection:
            if not wanted and filters is None:
                return images.read_images(connection)
            chosen = partial(narrow, connection, wanted=wanted, filters=filters, ignore_missing=ignore_missing)
            return images.read_images(connection, chosen)

    def list_names(
        self, *names: str | Name, filters: Filters | None = None, ignore_missing: bool = False
    ) -> list[Name]:
        """Return the names of all images, or of some of them; the arguments are those of `list_manifests`."""
        if not names and filters is None:
            return images.read_names(self._database)
        wanted = parse_wanted(names)
        with self._database.read() as connection:
            found = find_images(connection, wanted, filters, ignore_missing=ignore_missing, by_default_all=True)
            return [image.name for image in found]

    def get_image_blobs(self, name: str | Name) -> list[BlobInfo]:
        """Return an image's blobs in the order of their positions: the manifest, the config, the layers.

        Raises:
            NotInCache: if there is no such image.
        """
        parsed = self._parse_name(name)
        found = images.look_up_image_blobs(self._database, parsed)
        if found:
            return found
        with self._database.read() as connection:
            return images.read_image_blobs(connection, self.directory, images.find(connection, parsed).id)

    def get_platforms(self, name: str | Name) -> list[PlatformInfo]:
        """Return the children of an image's index, and whether each is complete; none without an index.

        Raises:
            NotInCache: if there is no such image.
        """
        with self._database.read() as connection:
            return read_platforms(connection, self.directory, self._find(connection, name))

    def is_image_complete(self, name: str | Name) -> bool:
        """Return whether an image and all its blobs are stored; False if there is no such image.

        If the image is complete, the call counts as a use of it, as do `get_manifest`, `hold`, `export`, `push`, `pull`
        and `producing`. ``last_used_at`` in the index is accurate to five minutes.
        """
        try:
            complete = self.get_image(name).complete
        except NotInCache:
            return False
        if complete:
            self._uses.note(self._parse_name(name))
        return complete

    def associate_blob_with_image(
        self, name: str | Name, digest: str, role: Role = "other", media_type: str = "application/octet-stream"
    ) -> None:
        """Attach a stored blob to an image, so that it stays as long as the image does.

        Args:
            name: the image's name.
            digest: the blob's digest.
            role: ``manifest``, ``index``, ``config``, ``layer`` or ``other``.
            media_type: the blob's media type.

        Raises:
            NotInCache: if there is no such image, or the blob is not stored.
            InvalidManifest: if the role or the media type is invalid.
        """
        if role not in oci.ROLES:
            raise InvalidManifest(f"{shorten(role)} is not a role: use one of {', '.join(oci.ROLES)}")
        oci.check_media_type(media_type, "the blob")
        blob = parse_digest(digest)
        with self._database.write() as connection:
            save.attach(connection, self.directory, Name.parse(name), blob, role, media_type)
            self._session.release_saved(connection, [blob])

    def tag(self, source: str | Name, target: str | Name) -> ImageInfo:
        """Give an image another name, which never expires.

        If the name already points to an image, the name moves, and keeps its pin.

        Args:
            source: a name of the image.
            target: the other name; a digest in it must be the image's.

        Returns:
            The image under its other name.

        Raises:
            NotInCache: if there is no image with the name ``source``.
            InvalidName: if the target has another digest.
        """
        with self._database.write() as connection:
            image_id = save.tag(connection, complete_name(connection, source), Name.parse(target))
            return images.read_image(connection, self.directory, image_id)[0]

    def tag_images(
        self, source: str | Name, target: str, *, filters: Filters | None = None, ignore_missing: bool = False
    ) -> list[ImageInfo]:
        """Give several images another name, all of them or none.

        Args:
            source: a name, or a pattern such as ``ci/*:1``.
            target: the other name; each ``*`` in it is what the ``*`` of the pattern matched.
            filters: conditions that the images must fulfil too.
            ignore_missing: return no image if none matches the source.

        Returns:
            The images under their other names.

        Raises:
            NotInCache: if no image matches the source, whatever the filters.
            InvalidName: if a new name is invalid or has another digest.
            InvalidQuery: if source and target differ in their number of ``*``, or a new name is given twice or is
                one of the old ones.
        """
        wanted = parse_wanted([source])
        check_text(target=target)
        with self._database.write() as connection:
            found = find_images(connection, wanted, filters, ignore_missing=ignore_missing)
            targets = rename_all([image.name for image in found], str(source), target)
            tagged = [save.tag(connection, image.name, new) for image, new in zip(found, targets, strict=True)]
            return [images.read_image(connection, self.directory, image_id)[0] for image_id in tagged]

    def remove_manifest(
        self,
        *names: str | Name,
        filters: Filters | None = None,
        ignore_missing: bool = False,
        dry_run: bool = False,
    ) -> Removed:
        """Remove images, all of them or none, and free the blobs that only they used.

        The images are chosen and removed in one transaction. So the filters see the last use and
        the digest that each image has at that moment.

        Args:
            names: names of images, and patterns such as ``team/*``.
            filters: conditions that the images must fulfil too. Without names, they choose from all images; without
                names and conditions, nothing is removed.
            ignore_missing: skip names and patterns that match no image.
            dry_run: remove nothing, and return what would be removed and freed.

        Returns:
            The number and bytes of the freed blobs; its attribute ``images`` has the names of the removed images.

        Raises:
            NotInCache: if a name or a pattern matches no image, whatever the filters.
        """
        wanted = parse_wanted(names)
        if filters is not None:
            self._uses.write()  # what this process has just used is not unused

        if dry_run:
            with self._database.read() as connection:
                found = find_images(connection, wanted, filters, exact=True, ignore_missing=ignore_missing)
                freed = collect.sum_freed(connection, [row.id for row in found])
                return Removed(freed, [image.name for image in found])

        def remove_rows() -> Removed:
            with self._database.write() as connection:
                found = find_images(connection, wanted, filters, exact=True, ignore_missing=ignore_missing)
                freed = collect.delete_unreferenced(connection, images.remove(connection, [row.id for row in found]))
                return Removed(freed, [image.name for image in found])

        removed = self._database.reserve.run(remove_rows)
        self._database.reserve.run(lambda: collect.empty_trash(self._database))
        return removed

    def pin(self, *names: str | Name, filters: Filters | None = None, ignore_missing: bool = False) -> list[Name]:
        """Pin the names of images, all of them or none.

        `prune` removes no pinned image, whatever its lifetime.

        A pin belongs to the name. It stays if the name moves to another image, until `unpin` or `remove_manifest`.

        Args:
            names: names of images, and patterns such as ``team/*``.
            filters: conditions that the images must fulfil too. Without names, they choose from all images; without
                names and conditions, nothing is pinned.
            ignore_missing: skip names and patterns that match no image.

        Returns:
            The pinned names, with those that were pinned before.

        Raises:
            NotInCache: if a name or a pattern matches no image, whatever the filters.
        """
        wanted = parse_wanted(names)
        with self._database.write() as connection:
            found = find_images(connection, wanted, filters, exact=True, ignore_missing=ignore_missing)
            lifetimes.pin(connection, [row.id for row in found])
            return [image.name for image in found]

    def unpin(self, *names: str | Name, filters: Filters | None = None, ignore_missing: bool = False) -> list[Name]:
        """Remove the pins of images, all of them or none; the arguments and the result are those of `pin`."""
        wanted = parse_wanted(names)

        def unpin() -> list[Name]:
            with self._database.write() as connection:
                found = find_images(connection, wanted, filters, exact=True, ignore_missing=ignore_missing)
                lifetimes.unpin(connection, [row.id for row in found])
                return [image.name for image in found]

        return self._database.reserve.run(unpin)  # on a full disk, what is pinned keeps `prune` from freeing space

    def collect_garbage(self, *, dry_run: bool = False) -> Collected:
        """Free every blob that no image, hold or session uses.

        Args:
            dry_run: free nothing, and return what would be freed.

        Returns:
            The number and bytes of the freed blobs.
        """
        if not dry_run:
            return collect.collect_all(self._database)
        with self._database.read() as connection:
            return collect.sum_unreferenced(connection)

    def plan_prune(self, policy: Policy | None = None, *, to_free: int | None = None) -> Plan:
        """Plan what `prune` would remove now; nothing is removed, and no lock is held.

        Images whose lifetime has ended go first, even without any rule. Then rules remove images, in their order. Then
        the limits remove the least recently used images, and no more of them than they need. An image stays if a keep
        rule selects it, if it is pinned, or if a hold or a process keeps it. Without a ``used-within``, an image that
        was used in the last 10 minutes stays too.

        Args:
            policy: the rules and limits; None for those in the file ``policy.toml`` of the cache.
            to_free: bytes to free in any case, garbage included.

        Raises:
            InvalidPolicy: if the policy is invalid.
            InvalidQuery: if the query of a rule is invalid.
        """
        from cachedb.operations.plan import make_plan
        from cachedb.operations.policy_file import load_policy
        from cachedb.operations.prune import check_arguments

        check_arguments(policy, to_free)
        self._uses.write()
        return make_plan(self._database, load_policy(self.directory) if policy is None else policy, to_free=to_free)

    def prune(
        self,
        policy: Policy | None = None,
        *,
        to_free: int | None = None,
        plan: Sequence[PlannedImage] | None = None,
        progress: Progress | None = None,
    ) -> Pruned:
        """Collect garbage, then remove the images that a policy removes. One process prunes at a time.

        An image that was used, moved, pinned or held since it was planned stays. If a limit is missed then, other
        images are planned. Other processes can write between two batches. If the policy of the cache has limits,
        `pull`, `cache_from_tar`, `adopt` and the methods that save do this by themselves;
        docs/reference/configuration.md says when.

        Args:
            policy: as for `plan_prune`.
            to_free: as for `plan_prune`.
            plan: the images to remove, of an earlier `plan_prune`; then ``policy`` and ``to_free`` have no effect,
                and no other images are planned.
            progress: called with the bytes that the images have freed so far, and that they free in all.

        Returns:
            The removed images, those that stayed, and what was freed.

        Raises:
            InvalidPolicy: if the policy is invalid.
            InvalidQuery: if the query of a rule is invalid.
            Busy: if another process prunes for too long.
        """
        from cachedb.operations.policy import Policy
        from cachedb.operations.policy_file import load_policy
        from cachedb.operations.prune import check_arguments, prune

        check_arguments(policy, to_free, plan)
        check_functions(progress=progress)
        self._uses.write()
        if policy is None:
            policy = load_policy(self.directory) if plan is None else Policy()
        return prune(self._database, policy, to_free=to_free, plan=plan, progress=progress)

    def explain_prune(
        self, name: str | Name, policy: Policy | None = None, *, to_free: int | None = None
    ) -> Explanation:
        """Return what keeps an image, or what would remove it now; its text is one sentence.

        Args:
            name: of the image.
            policy: as for `plan_prune`.
            to_free: as for `plan_prune`.

        Raises:
            NotInCache: if there is no such image.
            InvalidPolicy: if the policy is invalid.
        """
        from cachedb.operations.plan import explain
        from cachedb.operations.policy_file import load_policy
        from cachedb.operations.prune import check_arguments

        check_arguments(policy, to_free)
        self._uses.write()
        policy = load_policy(self.directory) if policy is None else policy
        return explain(self._database, policy, name, to_free=to_free)

    def get_labels(self, name: str | Name) -> dict[str, str]:
        """Return the labels in an image's config; for several platforms, those that all configs share.

        Raises:
            NotInCache: if there is no such image.
        """
        with self._database.read() as connection:
            return descriptions.read_labels(connection, self._find(connection, name))

    @contextmanager
    def sql(
        self,
        query: str,
        parameters: Mapping[str, int | float | str | None] | None = None,
        *,
        timeout: float | None = None,
        stream: bool = False,
    ) -> Iterator[Answer]:
        """Query the index with SQL; docs/reference/sql.md describes its tables and views.

            with cache.sql("SELECT name, unique_size FROM image_usage WHERE size > :size", {"size": 10**9}) as answer:
                for name, unique_size in answer.rows:
                    ...

        The query sees the index as of one moment, and blocks no writer. All rows are read before the block begins, so
        that a fork need not wait for the block. Many rows are kept in a temporary file of at most 1 GiB. SQLite's own
        temporary files for sorts and joins in this process are limited to 1 GiB, too.

        Args:
            query: SQL as SQLite understands it, with the extra functions ``human(bytes)`` and ``ago(time)``.
            parameters: a value for each ``:name`` in the query.
            timeout: seconds after which the query is stopped. SQLite checks this between its steps, and a step on
                values of megabytes can take seconds.
            stream: return each row as soon as it is found, and keep none. A fork of this process ends the answer;
                reading the next row then raises CacheError.

        Raises:
            InvalidQuery: if the query is invalid, or would do more than read.
            CacheError: if the query takes longer than ``timeout``, or its temporary files are too large.
        """
        from cachedb.index.sqlite.query import run_query

        check_text(query=query)
        check_mapping(parameters=parameters)
        check_numbers(timeout=timeout)
        with run_query(self._database, query, parameters, timeout, stream=stream) as found:
            yield found

    @contextmanager
    def run_report(
        self,
        name: str,
        parameters: Mapping[str, int | float | str] | None = None,
        *,
        timeout: float | None = None,
        stream: bool = False,
    ) -> Iterator[Answer]:
        """Run a named report, as `cachedb report` does; `cachedb report --list` lists all reports.

            with cache.run_report("freed-by", {"names": "app:1 team/*"}) as answer:
                ((blobs, size, images),) = answer.rows

        Args:
            name: the report's name.
            parameters: values that replace the defaults of its parameters.
            timeout: seconds after which the query is stopped, as in `sql`.
            stream: return each row as soon as it is found, as in `sql`.

        Raises:
            NotInCache: if there is no such report.
            InvalidName: if a value is not the valid name of an image, and should be.
            InvalidQuery: if a value is missing or has the wrong type, an image is not in the cache, or the report's
                SQL is invalid.
            StorageError: if the report's file cannot be read.
            CacheError: as in `sql`.
        """
        from cachedb.index.sqlite.query import run_query
        from cachedb.reports.named import load_report

        check_text(name=name)
        check_mapping(parameters=parameters)
        check_numbers(timeout=timeout)
        report = load_report(name)
        given = {key: str(value) for key, value in (parameters or {}).items()}
        values = report.fill_parameters(given, self._database)
        with run_query(self._database, report.query, values, timeout, stream=stream) as found:
            yield found

    def list_views(self) -> list[View]:
        """Return the views of the index, which queries can use."""
        from cachedb.reports.views import list_views

        return list_views(self._database)

    def get_leftovers(self) -> list[Leftover]:
        """Return the leftovers of dead processes that opening this cache could not clean up, with reasons."""
        self._check_open()
        return [leftover for leftover in self._leftovers if os.path.lexists(leftover.path)]

    def get_usage(self, *, by_image: bool = False) -> Usage:
        """Return the disk usage of the cache: unique, shared, held and reclaimable blobs, and other files.

        Args:
            by_image: also return the usage of each image, from the same moment.
        """
        from cachedb.reports.usage import measure_usage

        return measure_usage(self._database, by_image=by_image)

    def get_selected_usage(
        self, *names: str | Name, filters: Filters | None = None, ignore_missing: bool = False
    ) -> SelectedUsage:
        """Return what some images take together; the arguments are those of `list_manifests`."""
        from cachedb.reports.usage import measure_selected

        return measure_selected(self._database, names, filters, ignore_missing=ignore_missing)

    def get_html_report(self) -> str:
        """Return a self-contained HTML page that shows disk usage, sharing, growth and unused images."""
        from cachedb.reports import page

        with self._database.read() as connection:
            return page.render(connection, self.directory)

    def get_stats(self) -> Stats:
        """Return the totals of the cache."""
        from cachedb.reports.usage import count_totals

        return count_totals(self._database)

    def verify(self, *, quick: bool = False, repair: bool = False, progress: Progress | None = None) -> Verification:
        """Check that files match their digests, the index is sound, and both agree.

        Other processes may keep using the cache, except while a lost or damaged index is rebuilt.

        Args:
            quick: check only that files exist and have the right size.
            repair: repair what can be repaired. A file that does not match its digest moves to ``quarantine/``; its
                images are incomplete until they are imported or pulled again. An intact file without a row becomes a
                blob. A lost or damaged index is rebuilt.
            progress: called with the bytes read so far and the total.

        Returns:
            The number of checked files, and the problems, each with its repair.
        """
        from cachedb.operations.verify import verify

        check_functions(progress=progress)
        leftovers = self.get_leftovers()
        return verify(self._database, self._session, quick=quick, repair=repair, leftovers=leftovers, progress=progress)

    def adopt(
        self,
        directory: str | os.PathLike[str],
        *,
        how: How = "copy",
        ttl: float | None = None,
        progress: Progress | None = None,
    ) -> Adoption:
        """Adopt the named images and the blobs of an older cache that has one ``index.json``.

        Intact content is adopted, some images in each transaction; the result lists the rest. Every new blob is
        verified. An image that lacks a blob is incomplete afterwards. A name that points to another image in this cache
        stays as it is. Adopting again changes nothing but lifetimes.

        Args:
            directory: the directory of the older cache.
            how: ``copy``, ``link`` or ``move``. ``link`` makes hard links where the file system allows them; nobody may
                write to the older cache afterwards. ``move`` deletes adopted files from the older cache once all of
                them are stored here.
            ttl: seconds after which `prune` removes the images, also those that were here already; None lets them stay,
                even if they had a lifetime before.
            progress: called with the bytes read so far and the total.

        Raises:
            NotACache: if the directory is not such a cache.
            CacheError: if ``how`` is invalid.
        """
        from cachedb.operations.adopt import HOWS, adopt

        check_paths(directory=directory)
        check_functions(progress=progress)
        check_lifetime(ttl=ttl)
        if how not in HOWS:
            raise CacheError(f"{shorten(how)} is not a way to adopt: use one of {', '.join(HOWS)}")
        room = self._room
        room.prepare()
        adopted = adopt(self._database, self._session, Path(directory).absolute(), how=how, ttl=ttl, progress=progress)
        room.keep_limits([image.name for image in adopted.images])
        return adopted

    def copy(
        self, directory: str | os.PathLike[str], *, verify: bool = True, progress: Progress | None = None
    ) -> Copied:
        """Copy the cache, as of one moment, into a new or empty directory.

        Other processes may keep using the cache. Blobs become reflinks where the file system supports them, else hard
        links, else copies; their digests are verified. The directory becomes a cache only at the end; the next attempt
        deletes what an interrupted one left. Holds and the policy are copied; ``quarantine/`` and ``backups/`` are not.

        Args:
            directory: the directory of the copy, which is created if it is missing.
            verify: read and verify reflinks and hard links too.
            progress: called with the bytes of blobs done so far and the total.

        Raises:
            NotACache: if the directory is not empty, or is inside the cache.
            DigestMismatch: if a blob's file does not match its digest.
            StorageError: if a blob's file is missing or has another size, or the copy cannot be written.
        """
        from cachedb.operations.copy import copy

        self._uses.write()
        check_paths(directory=directory)
        check_functions(progress=progress)
        return copy(self._database, self._session, choose_directory(directory), verify=verify, progress=progress)

    # Policy

    def get_policy(self) -> Policy:
        """Return the policy in the cache's ``policy.toml``; an empty one if there is no such file.

        Raises:
            InvalidPolicy: if it is invalid; the message names the line.
        """
        from cachedb.operations.policy_file import load_policy

        return load_policy(self._database.directory)

    def check_policy(self, text: str, *, source: str = POLICY_FILE) -> Policy:
        """Parse a policy without installing it, and check that its queries run on this cache.

        Args:
            text: the policy, in TOML.
            source: the name of its file, for errors.

        Raises:
            InvalidPolicy: if it is invalid; the message names the line.
            CacheError: if a query takes over a minute.
        """
        from cachedb.operations.policy import check_policy

        check_text(text=text, source=source)
        return check_policy(self._database, text, source)

    def set_policy(self, text: str) -> Policy:
        """Make a text the policy of the cache, in its ``policy.toml``; all processes apply it from now on.

        Args:
            text: the policy, in TOML.

        Raises:
            InvalidPolicy: if it is invalid; then nothing changes.
        """
        from cachedb.operations.policy_file import install_policy

        check_text(text=text)
        check_characters(text=text)
        return install_policy(self._database, text)

    # Registries

    def pull(
        self,
        name: str | Name,
        *,
        platform: str | None = None,
        all_platforms: bool = False,
        if_missing: bool = False,
        allow_stale: bool = False,
        referrers: bool = False,
        foreign_layers: bool = False,
        ttl: float | None = None,
        plain_http: bool | None = None,
        tls_verify: bool | None = None,
        authfile: str | os.PathLike[str] | None = None,
        credentials: tuple[str, str] | None = None,
        timeout: float = 600.0,
        progress: Progress | None = None,
        blob_progress: BlobProgress | None = None,
    ) -> Pulled:
        """Pull an image from its registry: download missing blobs, verify them, resume interrupted downloads.

        The image appears in one transaction, when it is complete. If several processes want the same image or the same
        layer, one downloads it and the others wait.

        Args:
            name: the image's name, which is stored as given. It leads to the same registry as in Docker; a name without
                a registry belongs to Docker Hub. ``docker://`` may precede it. A name with a tag and a digest pulls the
                digest, and is stored with the tag.
            platform: ``os/architecture[/variant]``; the default is the host's. An index is stored whole; its other
                platforms become part of the image when they are pulled.
            all_platforms: pull all platforms of an index.
            if_missing: do not contact the registry for an image that is complete here, even if its tag has moved.
            allow_stale: use the cached image if no registry is reachable.
            referrers: also pull the image's referrers and attach them: signatures, SBOMs, attestations (distribution
                specification, "Listing Referrers"). The registry is asked for them even if the image is complete here,
                unless ``if_missing`` is set.
            foreign_layers: download foreign layers that the registry lacks from the URLs in the manifest. By default,
                the image is stored without them. Windows images have such layers.
            ttl: seconds after which `prune` removes the image, also if it was here already; None lets it stay, even if
                it had a lifetime before.
            plain_http: use HTTP if True, HTTPS if False; the default is HTTP only for localhost.
            tls_verify: if False, accept any certificate, and use HTTP if HTTPS fails; the default is to verify, except
                for what is ``insecure`` in registries.conf.
            authfile: a file of credentials; the default is the files of podman and Docker.
            credentials: the user and the password; they replace the files, and are not sent to mirrors.
            timeout: seconds to wait for the first byte of an answer.
            progress: called with the bytes done so far and the total.
            blob_progress: called with the progress of each blob.

        Raises:
            RegistryError: if the registry refuses or fails.
            NotInCache: if the image does not have the platform.
            InvalidManifest: if one of the image's manifests is invalid.
            DigestMismatch: if downloaded content has a wrong digest or size.
            NoRoom: if the image does not fit into the limits of the cache, and nothing more may be removed.
        """
        from cachedb.operations.pull import pull

        check_text(platform=platform, optional=True)
        access = _check_access(plain_http, tls_verify, authfile, credentials, timeout)
        check_functions(progress=progress, blob_progress=blob_progress)
        check_lifetime(ttl=ttl)
        wanted, room = RemoteName.parse(name), self._room
        pulled = pull(
            self._database,
            self._session,
            wanted,
            platform=platform,
            all_platforms=all_platforms,
            if_missing=if_missing,
            allow_stale=allow_stale,
            referrers=referrers,
            foreign_layers=foreign_layers,
            ttl=ttl,
            access=access,
            room=room,
            progress=progress,
            blob_progress=blob_progress,
        )
        self._uses.note(wanted.name)
        room.keep_limits([wanted.name])  # other pulls may have made room at the same time
        return pulled

    def plan_pull(
        self,
        name: str | Name,
        *,
        platform: str | None = None,
        all_platforms: bool = False,
        referrers: bool = False,
        foreign_layers: bool = False,
        plain_http: bool | None = None,
        tls_verify: bool | None = None,
        authfile: str | os.PathLike[str] | None = None,
        credentials: tuple[str, str] | None = None,
        timeout: float = 600.0,
    ) -> PullPlan:
        """Return what `pull` would download. Only manifests are read from the registry, and nothing is stored.

        Args:
            name: as for `pull`.
            platform: as for `pull`.
            all_platforms: as for `pull`.
            referrers: as for `pull`.
            foreign_layers: as for `pull`.
            plain_http: as for `pull`.
            tls_verify: as for `pull`.
            authfile: as for `pull`.
            credentials: as for `pull`.
            timeout: as for `pull`.

        Raises:
            RegistryError: if the registry refuses or fails.
            NotInCache: if the image does not have the platform.
            InvalidManifest: if one of the image's manifests is invalid.
        """
        from cachedb.operations.pull import plan_pull

        check_text(platform=platform, optional=True)
        access = _check_access(plain_http, tls_verify, authfile, credentials, timeout)
        return plan_pull(
            self._database,
            self._session,
            RemoteName.parse(name),
            platform=platform,
            all_platforms=all_platforms,
            referrers=referrers,
            foreign_layers=foreign_layers,
            access=access,
        )

    def get_remote_digest(
        self,
        name: str | Name,
        *,
        plain_http: bool | None = None,
        tls_verify: bool | None = None,
        authfile: str | os.PathLike[str] | None = None,
        credentials: tuple[str, str] | None = None,
        timeout: float = 600.0,
    ) -> Digest:
        """Return the digest that a name has at its registry, with one request for a tag.

        Args:
            name: as for `pull`. If it has a digest, the manifest is downloaded and verified.
            plain_http: as for `pull`.
            tls_verify: as for `pull`.
            authfile: as for `pull`.
            credentials: as for `pull`.
            timeout: as for `pull`.

        Raises:
            RegistryError: if the registry refuses or fails, or has no such image.
            DigestMismatch: if the manifest has another digest than the name.
        """
        from cachedb.operations.inspect import resolve_digest

        access = _check_access(plain_http, tls_verify, authfile, credentials, timeout)
        self._check_open()
        return resolve_digest(self.directory, RemoteName.parse(name), access)

    def list_remote_tags(
        self,
        repository: str,
        *,
        plain_http: bool | None = None,
        tls_verify: bool | None = None,
        authfile: str | os.PathLike[str] | None = None,
        credentials: tuple[str, str] | None = None,
        timeout: float = 600.0,
    ) -> list[str]:
        """Return the tags of a repository at its registry, in the registry's order.

        Args:
            repository: the repository, without a tag; ``docker://`` may precede it.
            plain_http: as for `pull`.
            tls_verify: as for `pull`.
            authfile: as for `pull`.
            credentials: as for `pull`.
            timeout: as for `pull`.

        Raises:
            InvalidName: if the repository has a tag or a digest.
            RegistryError: if the registry refuses or fails, or has no such repository.
        """
        from cachedb.operations.inspect import list_tags

        access = _check_access(plain_http, tls_verify, authfile, credentials, timeout)
        self._check_open()
        return list_tags(parse_repository(repository), access)

    def inspect_remote(
        self,
        name: str | Name,
        *,
        platform: str | None = None,
        plain_http: bool | None = None,
        tls_verify: bool | None = None,
        authfile: str | os.PathLike[str] | None = None,
        credentials: tuple[str, str] | None = None,
        timeout: float = 600.0,
    ) -> RemoteImage:
        """Return what the manifest and the config of an image at its registry say; nothing is stored.

        Args:
            name: as for `pull`.
            platform: ``os/architecture[/variant]`` of the image to describe; the default is the host's.
            plain_http: as for `pull`.
            tls_verify: as for `pull`.
            authfile: as for `pull`.
            credentials: as for `pull`.
            timeout: as for `pull`.

        Raises:
            RegistryError: if the registry refuses or fails, or has no such image.
            NotInCache: if the image does not have the platform.
            InvalidManifest: if a manifest or the config is invalid.
            DigestMismatch: if downloaded content has a wrong digest or size.
        """
        from cachedb.operations.inspect import inspect_image

        check_text(platform=platform, optional=True)
        access = _check_access(plain_http, tls_verify, authfile, credentials, timeout)
        self._check_open()
        return inspect_image(self.directory, RemoteName.parse(name), platform, access)

    def push(
        self,
        name: str | Name,
        target: str | Name | None = None,
        *,
        platform: str | None = None,
        plain_http: bool | None = None,
        tls_verify: bool | None = None,
        authfile: str | os.PathLike[str] | None = None,
        credentials: tuple[str, str] | None = None,
        timeout: float = 600.0,
        progress: Progress | None = None,
        blob_progress: BlobProgress | None = None,
    ) -> Pushed:
        """Push an image and its stored referrers to a registry, uploading only missing blobs.

        The image keeps its digest. Its name at the registry points to it only after all its blobs are there.

        Args:
            name: the image's name in the cache.
            target: the name to push to; the default is the image's name. It leads to the same registry as in Docker.
                ``docker://`` may precede it.
            platform: ``os/architecture[/variant]``, to push one platform of an index as an image of its own.
            plain_http: use HTTP if True, HTTPS if False; the default is HTTP only for localhost.
            tls_verify: if False, accept any certificate, and use HTTP if HTTPS fails; the default is to verify, except
                for what is ``insecure`` in registries.conf.
            authfile: a file of credentials; the default is the files of podman and Docker.
            credentials: the user and the password; they replace the files.
            timeout: seconds to wait for the first byte of an answer.
            progress: called with the bytes done so far and the total.
            blob_progress: called with the progress of each blob.

        Raises:
            NotInCache: if there is no such image, or the image does not have the platform.
            IncompleteImage: if a blob is not stored, or a platform is neither stored nor at the registry.
            InvalidName: if the target has another digest.
            DigestMismatch: if the file of a manifest or of an uploaded blob is damaged.
            StorageError: if a blob's file is missing or too short.
            RegistryError: if the registry refuses or fails.
        """
        from cachedb.operations.push import Target, push_image

        check_text(platform=platform, optional=True)
        access = _check_access(plain_http, tls_verify, authfile, credentials, timeout)
        check_functions(progress=progress, blob_progress=blob_progress)
        source = self._parse_name(name)
        pushed_name = Name.parse(strip_transport(target)) if target is not None else source
        with closing(Target(self.directory, pushed_name, access=access)) as pushed_to:
            return push_image(
                self._database,
                self._session,
                source,
                pushed_to,
                pushed_name,
                platform=platform,
                progress=progress,
                blob_progress=blob_progress,
            )

    def push_tags(
        self,
        repository: str,
        target: str | None = None,
        *,
        plain_http: bool | None = None,
        tls_verify: bool | None = None,
        authfile: str | os.PathLike[str] | None = None,
        credentials: tuple[str, str] | None = None,
        timeout: float = 600.0,
        progress: Progress | None = None,
        blob_progress: BlobProgress | None = None,
    ) -> Iterator[Pushed]:
        """Push all tags of a repository, as `push` does, and yield the result of each push.

        Args:
            repository: the repository in the cache, without a tag.
            target: the repository to push to, without a tag; the default is the same repository.
            plain_http: as for `push`.
            tls_verify: as for `push`.
            authfile: as for `push`.
            credentials: as for `push`.
            timeout: as for `push`.
            progress: called for each image with the bytes done so far and the total.
            blob_progress: called with the progress of each blob.

        Raises:
            NotInCache: if the repository has no tags in the cache.
            InvalidName: if a repository has a tag or a digest.
            IncompleteImage: as for `push`.
            RegistryError: as for `push`.
        """
        from cachedb.operations.push import Target, push_image

        access = _check_access(plain_http, tls_verify, authfile, credentials, timeout)
        check_functions(progress=progress, blob_progress=blob_progress)
        repository = parse_repository(repository)
        target = repository if target is None else parse_repository(target)
        with self._database.read() as connection:
            names = images.read_tags(connection, repository)
        if not names:
            raise NotInCache(f"{repository} has no tags in the cache: `cachedb ls` lists all images", name=repository)
        target_names = [name._replace(repository=target) for name in names]
        with closing(Target(self.directory, target_names[0], access=access)) as pushed_to:
            for name, target_name in zip(names, target_names, strict=True):
                yield push_image(
                    self._database,
                    self._session,
                    name,
                    pushed_to,
                    target_name,
                    progress=progress,
                    blob_progress=blob_progress,
                )

    # Archives

    def cache_from_tar(
        self,
        source: str | os.PathLike[str] | BinaryIO,
        name: str | Name | None = None,
        *,
        repository: str | None = None,
        select: str | None = None,
        platform: str | None = None,
        replace: bool = True,
        link: bool = False,
        max_unpacked: int | None = None,
        ttl: float | None = None,
        progress: Progress | None = None,
    ) -> list[ImportedImage]:
        """Import the images of an archive: a docker-archive, an OCI archive, or a folder with an image layout.

        A folder may also have skopeo's ``dir:`` format. All images are saved in one transaction, or none. Every blob is
        verified, even if it is stored already. The log has a warning for each part that is not imported.

        Args:
            source: a path, or a file open for reading in binary mode, which need not be seekable.
            name: a name that replaces the one in an archive of one image. Manifests for several platforms that the
                archive lists without an index become one image.
            repository: of images that have only a tag in the archive, or no name; the latter are named by digest.
            select: imports one image: a name in the archive, or a digest of a manifest or config, or the first 12
                digits or more of its hex part.
            platform: ``os/architecture[/variant]``, to import only this platform of each image.
            replace: False to refuse the archive if one of its names belongs to another image in the cache.
            link: hard-link the files of a layout folder if the file system allows it, and no other user can write to
                them. Nobody may write to these files afterwards.
            max_unpacked: the most bytes that a compressed archive may unpack to, or all compressed layers of a
                docker-archive together. The default is ``CACHEDB_MAX_UNPACKED``, else 64 GiB, or 100 times the
                compressed size if that is less, but at least 256 MiB.
            ttl: seconds after which `prune` removes the images; None lets them stay, even if their names had a lifetime
                before.
            progress: called with the bytes read so far and the total.

        Returns:
            The images, one for each name.

        Raises:
            InvalidArchive: if the source is not such an archive, is damaged, has no image that can be named, or unpacks
                to more than the limit.
            InvalidManifest: if a manifest in the archive is invalid.
            NameInUse: if a name belongs to another image in the cache, and ``replace`` is false or the archive gives
                the name only as a tag.
            DigestMismatch: if content of the archive has a wrong digest or size.
        """
        from cachedb.operations.import_archive import import_archive
        from cachedb.transports.archive.names import Wanted

        check_readable(source=source)
        check_functions(progress=progress)
        check_text(repository=repository, select=select, platform=platform, optional=True)
        check_lifetime(ttl=ttl)
        parsed = Name.parse(name) if name is not None else None
        if repository is not None:
            Name.parse(f"{repository}:latest")
        opened = Path(source) if isinstance(source, (str, os.PathLike)) else source
        room = self._room
        room.prepare(opened)
        imported = import_archive(
            self._database,
            self._session,
            opened,
            Wanted(parsed, repository, select, platform),
            replace=replace,
            link=link,
            max_unpacked=max_unpacked,
            ttl=ttl,
            progress=progress,
        )
        room.keep_limits([image.name for image in imported])
        return imported

    def export(
        self,
        name: str | Name | Sequence[str | Name],
        destination: str | os.PathLike[str] | BinaryIO,
        *,
        format: Format = "docker",
        tag: str | None = None,
        platform: str | None = None,
        link: bool = False,
        referrers: bool = False,
        convert: Literal["oci"] | None = None,
        filters: Filters | None = None,
        ignore_missing: bool = False,
        progress: Progress | None = None,
    ) -> list[Name]:
        """Export an image, or several, to one archive or folder.

        Every blob is verified. A file gets its name only when it is complete. The same image gives the same bytes on
        all hosts of one platform.

        Args:
            name: the image's name, or a pattern, or a sequence of both.
            destination: a path; or a file open for writing in binary mode, for the formats of archives.
            format: ``docker`` for an OCI archive that ``docker load`` reads too, ``docker-archive``, ``oci-archive``,
                or ``oci-dir`` for an image layout folder. An existing image layout gains the image. A
                ``docker-archive`` holds one platform of an index: the host's. In a ``docker`` archive, the classic
                ``docker load`` finds the host's platform, or else the first. ``dir`` is the folder of skopeo's
                transport of that name, which holds one platform too, and no name.
            tag: the name of the only image in the archive, instead of its own. For an image layout, this may be only a
                tag, which skopeo then finds.
            platform: ``os/architecture[/variant]``, to export one platform of an index as an image of its own.
            link: hard-link the cache's files into a folder where the file system allows it.
            referrers: also export the referrers (signatures, SBOMs) that a pull has attached to the image. Without
                it, the logger ``cachedb`` gets a warning that says how many are left out.
            convert: ``oci`` to replace Docker's media types in the manifests by those of OCI. The digests of changed
                manifests differ from those in the cache; configs and layers stay the same. Without it, the logger
                ``cachedb`` gets a warning for an image whose name in a layout skopeo cannot find.
            filters: conditions that the images must fulfil too. Without names, they choose from all images.
            ignore_missing: skip names and patterns that match no image.
            progress: called with the bytes written so far and the total.

        Returns:
            The names of the exported images; without any, nothing is written.

        Raises:
            NotInCache: if there is no such image, or the image does not have the platform.
            IncompleteImage: if a blob is not stored.
            DigestMismatch: if a blob's file is damaged; a file is then neither created nor replaced.
            CacheError: if the format cannot hold the image: a ``docker-archive`` holds no artifacts, such as Helm
                charts. If the options contradict each other, or the destination is a file or folder of the cache.
            InvalidName: if the tag is invalid, or has another digest.
            InvalidManifest: if the manifest of a referrer is invalid.
        """
        from cachedb.operations.export_archive import export_archive

        check_writable(destination=destination)
        check_text(tag=tag, platform=platform, convert=convert, optional=True)
        check_functions(progress=progress)
        path = Path(destination) if isinstance(destination, (str, os.PathLike)) else destination
        return export_archive(
            self._database,
            self._session,
            parse_wanted([name] if isinstance(name, (str, Name)) else name),
            path,
            filters=filters,
            ignore_missing=ignore_missing,
            format=format,
            tag=tag,
            platform=platform,
            link=link,
            referrers=referrers,
            convert=convert,
            progress=progress,
        )


def _check_access(
    plain_http: bool | None,
    tls_verify: bool | None,
    authfile: str | os.PathLike[str] | None,
    credentials: tuple[str, str] | None,
    timeout: float,
) -> Access:
    """Return how to reach a registry, after a check of the arguments that say so."""
    from cachedb.transports.registry.access import Access

    check_paths(authfile=authfile, optional=True)
    check_pair(credentials=credentials)
    check_positive(timeout=timeout)
    return Access(plain_http, tls_verify, authfile, credentials, timeout)
