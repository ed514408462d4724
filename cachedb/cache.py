"""`Cache`: every operation on a cache, as a method. The command line parses, calls one of them, and prints."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

from sqlalchemy import select

from cachedb import oci
from cachedb.arguments import (
    check_functions,
    check_mapping,
    check_numbers,
    check_paths,
    check_readable,
    check_text,
    check_writable,
)
from cachedb.content import collect, publish, save
from cachedb.content.collect import Collected
from cachedb.content.held import find_held, held, hold_name
from cachedb.content.last_used import Uses
from cachedb.content.session import Session
from cachedb.disk import reader, single_flight
from cachedb.disk.folders import Leftover
from cachedb.disk.layout import blob_path, chosen
from cachedb.errors import (
    CacheError,
    DamagedIndex,
    InvalidManifest,
    InvalidName,
    NotInCache,
    StorageError,
    os_errors,
)
from cachedb.index import blobs, descriptions, holds, images
from cachedb.index.holds import HoldInfo
from cachedb.index.records import BlobInfo, ImageDetails, ImageInfo, PlatformInfo
from cachedb.index.sqlite.database import CLOSED, Database
from cachedb.index.tables import BLOBS
from cachedb.oci.digests import Algorithm, Digest, parse_digest
from cachedb.oci.manifests import Role
from cachedb.oci.names import Name
from cachedb.operations.upgrade import prepare as prepare_schema
from cachedb.progress import BlobProgress, Progress
from cachedb.text import shorten

if TYPE_CHECKING:
    from cachedb.index.sqlite.query import Answer
    from cachedb.operations.adopt import Adoption, How
    from cachedb.operations.copy import Copied
    from cachedb.operations.pull import Pulled
    from cachedb.operations.pull_source import Source
    from cachedb.operations.push import Pushed
    from cachedb.operations.push_target import Target
    from cachedb.operations.verify import Verification
    from cachedb.reports.sessions import SessionInfo
    from cachedb.reports.usage import Usage
    from cachedb.reports.views import View
    from cachedb.transports.archive.formats import Format
from cachedb.disk.writer import Data
from cachedb.reports.usage import Stats

__all__ = ["Cache", "Progress"]


class Cache:
    """A cache of container images in a directory that many processes share.

    Open one with `Cache.open`, use it as a context manager or `close` it. It may be used from several threads at
    once, and by a child that is forked. A name is a string, ``repository[:tag]`` or ``repository@digest``, or a
    `Name`; a digest is ``sha256:...`` or ``sha512:...``, or bare hexadecimal for sha256. All methods raise
    `InvalidName` or `InvalidDigest` for one that is neither, and `StorageError` when the file system fails.
    """

    def __init__(self, database: Database) -> None:
        self._parts = database, Session(database), Uses(database)
        self._leftovers: list[Leftover] = []
        self._closed = False
        self._to_close = [self._parts]  # empty once somebody closes it: a thread, or a signal handler meanwhile

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str] | None = None,
        *,
        upgrade: bool = False,
        damaged: bool = False,
        wait: float | None = None,
        trust: bool = False,
    ) -> Self:
        """Open a cache, or create it; clean up after processes that died while they worked with it.

        Nothing is cleaned up while another process writes to the cache, which is not waited for.

        Args:
            directory: the cache directory; by default ``CACHEDB_DIR``, else the user's cache directory.
            upgrade: bring the index to the newest schema if it has an older one, as ``CACHEDB_AUTO_UPGRADE=1`` in the
                environment does.
            wait: seconds to wait for what another process has, or for its work if that makes no progress; by default
                ``CACHEDB_WAIT``, else 60. Then `Busy` is raised, which names the process. 0 is not to wait, and inf to
                wait as long as it takes.
            damaged: open a cache whose index is lost or damaged too, to `verify` it; nothing else will work.
            trust: write to a directory of another user, though it is not shared, as ``CACHEDB_TRUST=1`` in the
                environment does.

        Raises:
            NotACache: if the directory is something else.
            NotOurs: if it is another user's, or a folder in it leads elsewhere.
            DamagedIndex: if the index is lost or damaged, and ``damaged`` is false.
            SchemaMismatch: if the index has a newer schema, or an older one and ``upgrade`` is false.
            StorageError: if the directory cannot be made or read, or is on a file system that several hosts share.
        """
        database = Database(chosen(directory), wait=wait, trust=trust)
        upgrade = upgrade or os.environ.get("CACHEDB_AUTO_UPGRADE") == "1"

        def prepare() -> list[Leftover]:
            prepare_schema(database, upgrade=upgrade)
            if database.read_only:
                return []
            left = collect.recover_at_once(database)
            database.reserve.keep()
            return left

        cache = cls(database)
        try:
            cache._leftovers = database.reserve.run(prepare)
        except DamagedIndex:
            if not damaged:
                database.close()
                raise
        except StorageError as error:
            if not database.only_read(error):
                database.close()
                raise
            try:
                prepare_schema(database, upgrade=upgrade)
            except BaseException:
                database.close()
                raise
        except BaseException:
            database.close()
            raise
        return cache

    def __reduce__(self) -> tuple[Callable[[str], Cache], tuple[str]]:
        """Open the same cache where this one is sent, in a session of its own; it is for the receiver to close."""
        return partial(type(self).open, wait=self._parts[0].wait_seconds), (str(self.directory),)

    def __repr__(self) -> str:
        return f"<Cache {str(self.directory)!r}{', closed' if self._closed else ''}>"

    def close(self) -> None:
        """End the session with the cache: what was stored and not associated may be collected from now on.

        All other methods raise `CacheError` then, also where another thread is in the middle of one. To close a cache
        again does nothing.
        """
        self._closed = True
        try:
            database, session, uses = self._to_close.pop()
        except IndexError:
            return
        with ExitStack() as ending:  # all of it, whatever fails
            ending.callback(database.end)
            ending.callback(session.close)
            uses.write()

    def _check_open(self) -> None:
        if self._closed:
            raise CacheError(CLOSED)

    # Every method asks for one of these first.

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

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def share(self, group: str | None = None) -> str:
        """Share the cache with a group of users, who may all read and write it from now on.

        Folders get the setgid bit, the index and the lock files can be written to by the group, and blobs by nobody;
        what is made later follows, whatever the umask of its maker.

        Args:
            group: name or number of the group; by default the process's own.

        Returns:
            The name of the group.

        Raises:
            CacheError: if there is no such group.
            StorageError: if this user does not own the cache, or is no member of the group.
        """
        from cachedb.operations.share import share

        check_text(optional=True, group=group)
        return share(self._database.folders, group)

    @property
    def directory(self) -> Path:
        """The cache directory."""
        return self._parts[0].directory

    # Blobs

    def save_blob(self, digest: str, data: Data) -> Digest:
        """Store a blob whose digest is known.

        It is kept from collection until an image that is saved is associated with it, or this cache is closed. One that
        an image saved before is waiting for is that image's at once.

        Args:
            digest: that the content must have.
            data: the content.

        Returns:
            The digest, in full.

        Raises:
            DigestMismatch: if the content has another digest.
        """
        return publish.store_blob(self._database, self._session, data, digest=parse_digest(digest)).digest

    def add_blob(self, data: Data, *, algorithm: Algorithm = "sha256") -> Digest:
        """Store a blob, as `save_blob` does, and compute its digest.

        Args:
            data: the content.
            algorithm: ``sha256`` or ``sha512``.

        Returns:
            The digest.
        """
        if algorithm not in ("sha256", "sha512"):
            raise CacheError(f"{shorten(algorithm)} is not an algorithm of digests: use sha256 or sha512")
        return publish.store_blob(self._database, self._session, data, algorithm=algorithm).digest

    def has_blob(self, digest: str) -> bool:
        """Say whether the blob of a digest is stored."""
        return blobs.size_of(self._database, parse_digest(digest)) is not None

    def list_blobs(self, prefix: str = "") -> list[Digest]:
        """Return the stored blobs whose digest begins with ``prefix``, in order."""
        check_text(prefix=prefix)
        query = select(BLOBS.c.digest).where(BLOBS.c.stored_at.is_not(None)).order_by(BLOBS.c.digest)
        with self._database.read() as connection:
            if prefix:
                query = query.where(BLOBS.c.digest >= prefix, BLOBS.c.digest < f"{prefix}~")
            return [Digest(digest) for digest in connection.execute(query).scalars()]

    def get_blob_size(self, digest: str) -> int:
        """Return a stored blob's size in bytes.

        Raises:
            NotInCache: if it is not stored.
        """
        wanted = parse_digest(digest)
        size = blobs.size_of(self._database, wanted)
        if size is None:
            raise NotInCache(f"{wanted} is not in the cache", name=wanted)
        return size

    def get_blob_path(self, digest: str) -> Path:
        """Return the path of a stored blob's file; `hold` the blob to keep the path valid. Never write to it.

        Raises:
            NotInCache: if it is not stored.
        """
        self.get_blob_size(digest)
        return blob_path(self.directory, parse_digest(digest))

    def open_blob(self, digest: str) -> BinaryIO:
        """Open a stored blob for reading; the stream stays good whatever happens to the blob.

        Raises:
            NotInCache: if it is not stored.
        """
        self.get_blob_size(digest)
        return reader.open_blob(self.directory, parse_digest(digest))

    def get_blob(self, digest: str) -> bytes:
        """Return a stored blob's content, all of it in memory: for a config or manifest; see `open_blob`.

        Raises:
            NotInCache: if it is not stored.
        """
        with self.open_blob(digest) as file, os_errors("read a blob"):
            return file.read()

    @contextmanager
    def hold(self, *names_or_digests: str | Name) -> Iterator[None]:
        """Keep blobs from collection inside the block, so that their paths stay valid.

        What an image gets later, because its name moves or a blob of it arrives, is not held.

        Args:
            names_or_digests: images, of which all blobs are held, and blobs.

        Raises:
            NotInCache: if one of them is not in the cache.
        """
        with held(self._database, self._session, *names_or_digests):
            yield

    def add_hold(self, *names_or_digests: str | Name, seconds: float | None = None) -> list[HoldInfo]:
        """Keep blobs from collection beyond the life of this process.

        Args:
            names_or_digests: images, of which all blobs are held as they are now, and blobs.
            seconds: how long, by the clock of the host; None until `release_hold`.

        Returns:
            The holds, one for each name or digest.

        Raises:
            NotInCache: if one of them is not in the cache.
            CacheError: if the time is none at all, negative or endless.
        """
        check_numbers(seconds=seconds)
        with self._database.write() as connection:
            made = []
            for wanted in names_or_digests:
                there = find_held(connection, wanted)
                if isinstance(there, str):
                    name, digests = str(there), {there}
                else:
                    contents = images.image_blobs(connection, self.directory, there)
                    name, digests = str(Name.parse(wanted)), {blob.digest for blob in contents}
                made.append(holds.add(connection, name, digests, seconds))
            return [hold for hold in holds.holds(connection) if hold.id in made]

    def list_holds(self) -> list[HoldInfo]:
        """Return the holds that outlive their process, the oldest first."""
        with self._database.read() as connection:
            return holds.holds(connection)

    def release_hold(self, *holds_or_names: str | Name) -> int:
        """End holds that were made by `add_hold`; all of them or none.

        Args:
            holds_or_names: ids of holds, or what was held: a name or a digest, all holds of which end.

        Returns:
            The number of holds that ended.

        Raises:
            NotInCache: if there is no such hold.
        """
        with self._database.write() as connection:
            return holds.release(connection, *map(hold_name, holds_or_names))

    def sessions(self) -> list[SessionInfo]:
        """Return the processes that work with the cache, and what each does or waits for, since when.

        A process that only reads has no session, and is not among them.
        """
        from cachedb.reports.sessions import sessions

        self._check_open()
        return sessions(self.directory)

    @contextmanager
    def producing(
        self, name: str | Name, *, is_working: Callable[[], bool] = lambda: True
    ) -> Iterator[ImageInfo | None]:
        """Have one process on the host make an image that several want.

        The block gets the image if it is in the cache and complete. Otherwise it gets None, and with it the right to
        make the image under this name: whoever else asks for it waits until the block ends, and then gets the image, or
        the right if there is none still. The right ends with the process that has it, too.

            with cache.producing("app:1") as image:
                if image is None:
                    image = build_and_save("app:1")

        Args:
            name: of the image.
            is_working: is asked every second, in a thread, whether the block makes progress. Others wait for as long
                as it does, and for as long as `open` says once it does not.

        Raises:
            Busy: if another process that makes the image makes no progress for as long as `open` says.
            CacheError: if this thread is in such a block for the same name already.
        """
        check_functions(is_working=is_working)
        wanted = Name.parse(name)

        def find() -> ImageInfo | None:
            try:
                image = self.get_image(wanted)
            except NotInCache:
                return None
            return image if image.complete else None

        with single_flight.once(
            self.directory, str(wanted), find, seconds=self._database.wait_seconds, is_working=is_working
        ) as found:
            if found:
                self._uses.note(wanted)
            yield found

    @contextmanager
    def producing_blob(self, digest: str) -> Iterator[bool]:
        """Have one process on the host bring a blob that several want; as `producing` does for an image.

        The block gets whether the blob is stored; if it is not, it is this block's to store it.

        Args:
            digest: of the blob.
        """
        wanted = parse_digest(digest)
        find = lambda: self.has_blob(wanted) or None  # noqa: E731
        with single_flight.once(self.directory, wanted, find, seconds=self._database.wait_seconds) as found:
            yield bool(found)

    # Images

    def save_manifest(self, name: str | Name, manifest: bytes, media_type: str | None = None) -> ImageInfo:
        """Store a manifest or index under a name; its config and layers are associated at once, stored or not.

        What the name pointed to before is let go, in the same transaction.

        Args:
            name: of the image; one by digest must name the manifest's.
            manifest: its exact bytes.
            media_type: what it is, if that is known from elsewhere; else its own ``mediaType`` or shape tells.

        Raises:
            InvalidManifest: if it is no manifest or index.
            InvalidName: if the name is by another digest than the manifest's.
        """
        parsed = Name.parse(name)
        if not isinstance(manifest, (bytes, bytearray)):
            raise TypeError(f"manifest is of type {type(manifest).__name__!r}: give its bytes")
        check_text(media_type=media_type, optional=True)
        return publish.store_manifest(self._database, self._session, parsed, manifest, media_type)

    def get_manifest(self, name: str | Name) -> bytes:
        """Return the exact bytes of an image's manifest or index.

        Raises:
            NotInCache: if there is no such image.
        """
        parsed, tried = Name.parse(name), None
        while True:
            with self._database.read() as connection:
                digest = images.find(connection, parsed).digest
            try:
                with reader.open_blob(self.directory, digest) as file, os_errors("read a manifest"):
                    self._uses.note(parsed)
                    return file.read()
            except NotInCache:
                # The name may have moved, and the manifest been collected, since we looked.
                if digest == tried:
                    raise
                tried = digest

    def get_image(self, name: str | Name) -> ImageInfo:
        """Return an image.

        Raises:
            NotInCache: if there is no such image.
        """
        with self._database.read() as connection:
            return images.image(connection, self.directory, images.find(connection, Name.parse(name)).id)[0]

    def get_details(self, name: str | Name) -> ImageDetails:
        """Return an image with its blobs, labels and platforms, all of them as they are at one moment.

        Raises:
            NotInCache: if there is no such image.
        """
        with self._database.read() as connection:
            return save.details(connection, self.directory, images.find(connection, Name.parse(name)).id)

    def list_manifests(self) -> list[ImageInfo]:
        """Return all images, in the order of their names."""
        with self._database.read() as connection:
            return images.images(connection)

    def list_names(self) -> list[Name]:
        """Return the names of all images, in order."""
        return images.names(self._database)

    def get_image_blobs(self, name: str | Name) -> list[BlobInfo]:
        """Return an image's blobs in the order of their positions: the manifest, the config, the layers.

        Raises:
            NotInCache: if there is no such image.
        """
        parsed = Name.parse(name)
        found = images.blobs_of(self._database, parsed)
        if found:
            return found
        with self._database.read() as connection:
            return images.image_blobs(connection, self.directory, images.find(connection, parsed).id)

    def get_platforms(self, name: str | Name) -> list[PlatformInfo]:
        """Return what an image's index names, and which of that is here; nothing for an image that has no index.

        Raises:
            NotInCache: if there is no such image.
        """
        with self._database.read() as connection:
            return save.platforms(connection, self.directory, images.find(connection, Name.parse(name)).id)

    def is_image_complete(self, name: str | Name) -> bool:
        """Say whether an image is in the cache with its manifest and all its blobs; False if it is not there.

        Like `get_manifest`, `hold`, `export`, `push` and `pull` it is a use of the image: ``last_used_at`` in the index
        is true to five minutes.
        """
        try:
            complete = self.get_image(name).complete
        except NotInCache:
            return False
        if complete:
            self._uses.note(Name.parse(name))
        return complete

    def associate_blob_with_image(
        self, name: str | Name, digest: str, role: Role = "other", media_type: str = "application/octet-stream"
    ) -> None:
        """Attach a stored blob to an image: it stays as long as the image does.

        Args:
            name: of the image.
            digest: of the blob.
            role: ``manifest``, ``index``, ``config``, ``layer`` or ``other``.
            media_type: of the blob.

        Raises:
            NotInCache: if the image is not there, or the blob is not stored.
            InvalidManifest: if the role or the media type is none.
        """
        if role not in oci.ROLES:
            raise InvalidManifest(f"{shorten(role)} is not a role: use one of {', '.join(oci.ROLES)}")
        oci.check_media_type(media_type, "the blob")
        blob = parse_digest(digest)
        with self._database.write() as connection:
            save.attach(connection, self.directory, Name.parse(name), blob, role, media_type)
            self._session.release_saved(connection, [blob])

    def tag(self, source: str | Name, target: str | Name) -> ImageInfo:
        """Give an image a second name; what the target pointed to before is let go.

        Args:
            source: a name of the image.
            target: its second name; one by digest must name the image's.

        Raises:
            NotInCache: if there is no source.
            InvalidName: if the target is by another digest.
        """
        with self._database.write() as connection:
            image_id = save.tag(connection, Name.parse(source), Name.parse(target))
            return images.image(connection, self.directory, image_id)[0]

    def remove_manifest(self, *names: str | Name, dry_run: bool = False) -> Collected:
        """Remove images, all of them or none, and free what only they used.

        Args:
            names: of the images.
            dry_run: remove nothing, and return what would be freed.

        Returns:
            The blobs and bytes freed.

        Raises:
            NotInCache: if one of them is not there.
        """
        parsed = [Name.parse(name) for name in names]

        def forget() -> Collected:
            with self._database.write() as connection:
                freed = collect.forget(connection, images.remove(connection, parsed))
                if dry_run:
                    connection.rollback()
                return freed

        freed = self._database.reserve.run(forget)
        if not dry_run:
            self._database.reserve.run(lambda: collect.empty_trash(self._database))
        return freed

    def collect_garbage(self, *, dry_run: bool = False) -> Collected:
        """Free every blob that no image is associated with and no session works with.

        Args:
            dry_run: free nothing, and return what would be freed.

        Returns:
            The blobs and bytes freed.
        """
        if not dry_run:
            freed: list[Collected] = []
            self._database.reserve.run(
                lambda: freed.extend(collect.collect(self._database)),
                lambda: freed.extend(collect.collect(self._database, batch=collect.SMALL_BATCH)),
            )
            return Collected(sum(part.blobs for part in freed), sum(part.bytes for part in freed))
        with self._database.read() as connection:
            return collect.unreferenced(connection)

    def get_labels(self, name: str | Name) -> dict[str, str]:
        """Return an image's labels, as its config says; of an image for several platforms, those that all of them have.

        Raises:
            NotInCache: if there is no such image.
        """
        with self._database.read() as connection:
            return descriptions.labels(connection, images.find(connection, Name.parse(name)).id)

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

        It sees the index at one moment, and holds up no writer. All rows are read before the block begins, and many are
        kept in a temporary file: so no fork waits for the block.

        Args:
            query: in SQLite's SQL, with the functions ``human(bytes)`` and ``ago(time)`` besides.
            parameters: for what the query has as ``:name``.
            timeout: seconds after which it is stopped.
            stream: give each row as soon as it is found, and keep none. A fork of this process ends the answer: the
                next row is a CacheError then.

        Raises:
            InvalidQuery: if it is no query, or would do something else than read.
            CacheError: if it takes too long.
        """
        from cachedb.index.sqlite.query import answer

        check_text(query=query)
        check_mapping(parameters=parameters)
        check_numbers(timeout=timeout)
        with answer(self._database, query, parameters, timeout, stream=stream) as found:
            yield found

    def list_views(self) -> list[View]:
        """Return the views of the index, which are there to be asked."""
        from cachedb.reports.views import views

        return views(self._database)

    def get_leftovers(self) -> list[Leftover]:
        """Return what dead processes left and could not be cleaned up when this cache was opened, and why not."""
        self._check_open()
        return [leftover for leftover in self._leftovers if os.path.lexists(leftover.path)]

    def get_usage(self, *, by_image: bool = False) -> Usage:
        """Return what the cache takes on the disk: unique, shared, held, reclaimable.

        Args:
            by_image: also list what each image takes, as it is at the same moment.
        """
        from cachedb.reports.usage import usage

        return usage(self._database, by_image=by_image)

    def get_html_report(self) -> str:
        """Return a page of HTML that shows the cache, complete in itself: what is on the disk, and who shares it."""
        from cachedb.reports import page

        with self._database.read() as connection:
            return page.render(connection, self.directory)

    def get_stats(self) -> Stats:
        """Return the cache's totals."""
        from cachedb.reports.usage import stats

        return stats(self._database)

    def verify(self, *, quick: bool = False, repair: bool = False, progress: Progress | None = None) -> Verification:
        """Check that every file is what its name says, the index is sound, and the two agree.

        Other processes may work meanwhile, but for the time in which a lost or damaged index is rebuilt.

        Args:
            quick: look at the presence and size of files, and not into them.
            repair: put right what can be: a file that is not what its name says is moved to ``quarantine/`` and its
                images are incomplete until they are imported or pulled again; a good file that the index does not know
                becomes a blob of the cache; an index that is lost or damaged is rebuilt.
            progress: is told how far the reading is.

        Returns:
            How many files there are, and the problems, with what was done about each.
        """
        from cachedb.operations.verify import verify

        check_functions(progress=progress)
        left = self.get_leftovers()
        return verify(self._database, self._session, quick=quick, repair=repair, left=left, progress=progress)

    def adopt(
        self, directory: str | os.PathLike[str], *, how: How = "copy", progress: Progress | None = None
    ) -> Adoption:
        """Take over a cache whose index is one ``index.json``: images with their names, and their blobs.

        What is good is taken, in transactions of some images each, and the rest is told. Every blob is verified. An
        image that lacks a blob is incomplete here. A name that is another image's here is not touched. Doing it again
        changes nothing.

        Args:
            directory: of the other cache.
            how: ``copy``; ``link`` for hard links where the file system can, after which nobody may write to the other
                cache; or ``move``, which takes away from it what is in this cache, once all of it is.
            progress: is told how far the reading is.

        Raises:
            NotACache: if the directory is no such cache.
        """
        from cachedb.operations.adopt import HOWS, adopt

        check_paths(directory=directory)
        check_functions(progress=progress)
        if how not in HOWS:
            raise CacheError(f"{shorten(how)} is not a way to adopt: use one of {', '.join(HOWS)}")
        return adopt(self._database, self._session, Path(directory).absolute(), how=how, progress=progress)

    def copy(
        self, directory: str | os.PathLike[str], *, verify: bool = True, progress: Progress | None = None
    ) -> Copied:
        """Copy the cache into a new or empty directory as it is at one moment, also while other processes use it.

        No process holds up another for it. Blobs come as reflinks where the file system can, else as hard links, else
        as copies; their digests are verified. The directory becomes a cache at the end: what an interrupted copy leaves
        is no cache, and the next attempt deletes it. Holds are copied; ``quarantine/`` and ``backups/`` are not.

        Args:
            directory: of the copy; made if it is not there.
            verify: read and verify reflinks and hard links too.
            progress: is told how far it is.

        Raises:
            NotACache: if the directory is not empty, or is inside the cache.
            DigestMismatch: if a blob's content is not what its name says.
            StorageError: if a blob's file is missing or has another size, or the copy cannot be written.
        """
        from cachedb.operations.copy import copy

        self._uses.write()
        check_paths(directory=directory)
        check_functions(progress=progress)
        return copy(self._database, self._session, chosen(directory), verify=verify, progress=progress)

    # Registries

    def pull(
        self,
        name: str | Name | Source,
        *,
        platform: str | None = None,
        all_platforms: bool = False,
        if_missing: bool = False,
        allow_stale: bool = False,
        referrers: bool = False,
        plain_http: bool | None = None,
        authfile: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
        blob_progress: BlobProgress | None = None,
    ) -> Pulled:
        """Bring an image from its registry: what is not here of it, verified, and resumed where it was cut off.

        It appears in one transaction when it is complete. Of several processes that want the same image, or images
        that share layers, one downloads what the others wait for.

        Args:
            name: of the image; where it is on the wire is as Docker has it, and the name is kept as it is given. A
                `Source` may have begun before the cache was open; ``all_platforms``, ``plain_http`` and
                ``authfile`` are its own then.
            platform: ``os/architecture[/variant]``; the host's unless given. An index is kept whole, and what it names
                for other platforms is not part of the image until it is pulled.
            all_platforms: bring all that an index names.
            if_missing: ask no registry if the image is here and complete, whatever its tag points to by now.
            allow_stale: where no registry can be reached, take the image that is here.
            referrers: attach to the image what the registry lists as referring to it: signatures, SBOMs, attestations
                (distribution specification, "Listing Referrers"). They are asked for each time, also if the image is
                here, but for ``if_missing``.
            plain_http: speak HTTP and not HTTPS; unless given, with this host alone.
            authfile: to take credentials from, instead of the files that podman and Docker keep.
            progress: is told how far the download is.
            blob_progress: is told how far each blob is.

        Raises:
            RegistryError: if it cannot be had.
            NotInCache: if it is not for that platform.
            InvalidManifest: if a manifest of it is invalid.
            DigestMismatch: if what comes has another digest or size than it should.
        """
        from cachedb.operations.pull import pull
        from cachedb.operations.pull_source import Source

        check_text(platform=platform, optional=True)
        check_paths(authfile=authfile, optional=True)
        check_functions(progress=progress, blob_progress=blob_progress)
        with ExitStack() as opened:
            if isinstance(name, Source):
                source = name
            else:
                source = opened.enter_context(
                    Source(
                        self.directory,
                        Name.parse(name),
                        platform=platform,
                        all_platforms=all_platforms,
                        plain_http=plain_http,
                        authfile=authfile,
                    )
                )
            pulled = pull(
                self._database,
                self._session,
                source,
                platform=platform,
                if_missing=if_missing,
                allow_stale=allow_stale,
                referrers=referrers,
                progress=progress,
                blob_progress=blob_progress,
            )
        self._uses.note(source.name)
        return pulled

    def push(
        self,
        name: str | Name,
        target: str | Name | Target | None = None,
        *,
        platform: str | None = None,
        plain_http: bool | None = None,
        authfile: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
        blob_progress: BlobProgress | None = None,
    ) -> Pushed:
        """Send an image to a registry: what is not there of it, and what refers to it; it has the same digest there.

        Its name points to it there when all of it has come.

        Args:
            name: of the image.
            target: the name to push it to, unless that is its own; where it is on the wire is as Docker has it. A
                `Target` may have begun before the cache was open; ``plain_http`` and ``authfile`` are its own then.
            platform: ``os/architecture[/variant]``, to push one platform of an index as an image of its own.
            plain_http: speak HTTP and not HTTPS; unless given, with this host alone.
            authfile: to take credentials from, instead of the files that podman and Docker keep.
            progress: is told how far the upload is.
            blob_progress: is told how far each blob is.

        Raises:
            NotInCache: if there is no such image, or it is not for that platform.
            IncompleteImage: if a blob of it is not stored, or a platform is neither here nor at the registry.
            InvalidName: if the target is by another digest.
            DigestMismatch: if the file of a manifest or of a blob that is sent is damaged.
            StorageError: if a blob's file is gone, or was cut short.
            RegistryError: if the registry does not take it.
        """
        from cachedb.operations.push import push_image
        from cachedb.operations.push_target import Target

        check_text(platform=platform, optional=True)
        check_paths(authfile=authfile, optional=True)
        check_functions(progress=progress, blob_progress=blob_progress)
        source = Name.parse(name)
        with ExitStack() as opened:
            if isinstance(target, Target):
                there = target
            else:
                parsed = Name.parse(target) if target is not None else source
                there = opened.enter_context(Target(self.directory, parsed, plain_http=plain_http, authfile=authfile))
            return push_image(
                self._database,
                self._session,
                source,
                there,
                there.name,
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
        authfile: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
        blob_progress: BlobProgress | None = None,
    ) -> Iterator[Pushed]:
        """Send all images that a repository has by tag, as `push` does, and yield each once it is there.

        Args:
            repository: a name without a tag.
            target: the repository to push them to, under their tags, unless that is their own.
            plain_http: as for `push`.
            authfile: as for `push`.
            progress: is told how far the upload of an image is.
            blob_progress: is told how far each blob is.

        Raises:
            NotInCache: if there is none.
            InvalidName: if a name has a tag or a digest.
            IncompleteImage: as for `push`.
            RegistryError: as for `push`.
        """
        from cachedb.operations.push import push_image
        from cachedb.operations.push_target import Target

        check_paths(authfile=authfile, optional=True)
        check_functions(progress=progress, blob_progress=blob_progress)
        for named in filter(None, (repository, target)):
            if Name.parse(named).repository != named:
                raise InvalidName(f"{shorten(named)} has a tag or a digest: name the repository alone")
        with self._database.read() as connection:
            names = images.tags(connection, repository)
        if not names:
            raise NotInCache(f"{repository} has no tags in the cache; `cachedb ls` lists what is", name=repository)
        theirs = [name._replace(repository=target or repository) for name in names]
        with Target(self.directory, theirs[0], plain_http=plain_http, authfile=authfile) as there:
            for name, called in zip(names, theirs, strict=True):
                yield push_image(
                    self._database, self._session, name, there, called, progress=progress, blob_progress=blob_progress
                )

    # Archives

    def cache_from_tar(
        self,
        source: str | os.PathLike[str] | BinaryIO,
        name: str | Name | None = None,
        *,
        link: bool = False,
        max_unpacked: int | None = None,
        progress: Progress | None = None,
    ) -> list[ImageInfo]:
        """Import the images of a docker-archive, an OCI archive or an OCI image layout folder.

        All of them are saved in one transaction, or none. Every blob is verified, also one that is stored already.

        Args:
            source: a path, or a file open for reading in binary, which need not be seekable.
            name: instead of the names in the archive, where it holds one image.
            link: of a layout folder, make hard links to its files, where the file system can and no other user could
                write to them. Nobody may from then on.
            max_unpacked: bytes that a compressed archive, or all compressed layers of a docker-archive, may unpack to.
                Unless given ``CACHEDB_MAX_UNPACKED``, else 64 GiB and, beyond 256 MiB, 100 times the compressed size.
            progress: is told how far the reading is.

        Returns:
            The images, one for each name.

        Raises:
            InvalidArchive: if it is no such archive, or something is wrong with it, or it gives an image no name, or
                it unpacks to more than may be.
            InvalidManifest: if a manifest in it is invalid.
            DigestMismatch: if content in it has another digest or size than it should.
        """
        from cachedb.operations.import_archive import import_archive

        check_readable(source=source)
        check_functions(progress=progress)
        parsed = Name.parse(name) if name is not None else None
        opened = Path(source) if isinstance(source, (str, os.PathLike)) else source
        return import_archive(
            self._database, self._session, opened, parsed, link=link, max_unpacked=max_unpacked, progress=progress
        )

    def export(
        self,
        name: str | Name,
        destination: str | os.PathLike[str] | BinaryIO,
        *,
        format: Format = "docker",
        platform: str | None = None,
        link: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Write an image to an archive or a folder; the same image gives the same bytes.

        A file appears under its name when all of it is there, and every blob in it is verified.

        Args:
            name: of the image.
            destination: a path; or a file open for writing in binary, for every format but ``oci-dir``.
            format: ``docker`` for an OCI archive that ``docker load`` takes too, ``docker-archive``,
                ``oci-archive``, or ``oci-dir`` for an image layout folder, which may exist: then the image is added.
            platform: ``os/architecture[/variant]``, to export one platform of an index as an image of its own.
            link: in an ``oci-dir``, make hard links to the cache's files where the file system can.
            progress: is told how far the writing is.

        Raises:
            NotInCache: if there is no such image, or it is not for that platform.
            IncompleteImage: if a blob of it is not stored.
            DigestMismatch: if the file of a blob is damaged; then nothing is under the destination's name.
        """
        from cachedb.operations.export_archive import export_archive

        check_writable(destination=destination)
        check_text(platform=platform, optional=True)
        check_functions(progress=progress)
        path = Path(destination) if isinstance(destination, (str, os.PathLike)) else destination
        export_archive(
            self._database,
            self._session,
            Name.parse(name),
            path,
            format=format,
            platform=platform,
            link=link,
            progress=progress,
        )
