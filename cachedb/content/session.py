"""Sessions: the lock file, folder and leases of a process that works with a cache.

A session ends with its process: the kernel releases the lock when the process dies. The folder is in ``ingest/``. The
leases protect digests from collection. A session begins when its lock file, folder or leases are first needed.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection, Delete, Insert, bindparam, delete, insert

from cachedb.disk import forks, lock_holders, locks
from cachedb.disk.folders import FOLDERS, Folders, Leftover, OpenFolder, is_shared
from cachedb.disk.layout import is_received, is_session, lock_kind, received_digest
from cachedb.disk.reserve import find_quota_user, is_full
from cachedb.disk.waiting import Wait
from cachedb.disk.writer import discard
from cachedb.errors import CacheError, CacheReplaced, NotOurs, StorageError, explain, is_callers, os_errors
from cachedb.index.sqlite.database import CLOSED, Database
from cachedb.index.tables import LEASES
from cachedb.oci.digests import Digest
from cachedb.reentry import not_reentered

__all__ = [
    "NO_HOLD",
    "Hold",
    "Session",
    "find_unfinished_digests",
    "list_sessions_with_locks",
    "lock_dead_sessions",
    "lock_path",
    "remove_folder",
]


_LOCK_SUFFIX = ".session"
_NUMBER_BITS = 64  # of a file's name, so that no other user can guess the name and put a file there
_NEW_INDEX = re.compile(
    r"cachedb\.json|\.cachedb-[0-9a-f]{16}\.marker|index\.db(-wal|-shm|-journal)?|index\.db-test-[0-9a-f]{12}(-2)?\.test"
    r"|reserve|locks/(write\.(lock|queue)|[0-9a-f]{64}\.producing)|backups/(\.lock|\.backup-[0-9a-f]{32}(-journal)?)"
    r"|backups/[0-9]{6,}-[0-9]{4}-before-[0-9]{4}\.db"
)
"""The files in a folder where a rebuild or a restored backup makes a new index."""


class Hold(NamedTuple):
    """A set of leases: its session, its number in that session, and the digests."""

    session: str
    number: int
    digests: frozenset[Digest]


NO_HOLD = Hold("", 0, frozenset())


def lock_path(directory: Path, session: str) -> Path:
    """Return the path of a session's lock file."""
    return directory / "locks" / f"{session}{_LOCK_SUFFIX}"


def list_sessions_with_locks(directory: Path) -> set[str]:
    """Return the sessions that have a lock file, alive or not."""
    return {name.removesuffix(_LOCK_SUFFIX) for name in os.listdir(directory / "locks") if lock_kind(name) == "session"}


def find_unfinished_digests(directory: Path) -> set[Digest]:
    """Return the digests named in any session's folder, including those of interrupted publications."""
    folders = [entry.path for entry in os.scandir(directory / "ingest") if entry.is_dir(follow_symlinks=False)]
    found: set[Digest] = set()
    for folder in folders:
        with suppress(FileNotFoundError):
            found.update(digest for name in os.listdir(folder) if (digest := received_digest(name)))
    return found


class Session:
    """The session of one open cache, safe to use from several threads; a forked child begins its own."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._closed = False
        forks.reset_after_fork(self)
        self.forked()

    def forked(self) -> None:
        """Become a new session that has not begun."""
        self._guard = threading.RLock()  # a signal handler may use the cache while its thread holds this
        self._id: str | None = None
        self._lock: FileIO | None = None
        self._opened: OpenFolder | None = None
        self._numbers = itertools.count(1)
        self._leased = False
        self._unsaved: dict[Digest, list[Hold]] = {}
        self._expected: set[Digest] = set()

    @property
    def id(self) -> str:
        """The session's name; reading it begins the session."""
        with self._guard:
            if self._closed:
                raise CacheError(CLOSED)
            if self._id is None:
                name = f"{os.getpid()}-{secrets.token_hex(6)}"
                with not_reentered(f"session {id(self)}", "beginning to write to the cache"):
                    try:
                        lock, opened = self._begin(name)
                    except StorageError as error:
                        user = find_quota_user(error)
                        if not is_full(error) or not self._database.reserve.give_up_inodes(user):
                            raise
                        lock, opened = self._begin(name)
                self._id, self._lock, self._opened = name, lock, opened
            return self._id

    def _begin(self, name: str) -> tuple[FileIO, OpenFolder]:
        """Make the session's lock file and its folder; return the lock and the open folder."""
        path = lock_path(self._database.directory, name)
        # Take the lock first, because the next open removes the files of a session without a lock.
        with os_errors("begin a session in the cache"):
            lock = locks.acquire(path, wait=Wait("the lock of a new session", self._database.wait_seconds))
        assert lock is not None
        try:
            lock_holders.write_record(lock.fileno())
            opened = self._make_folder(name)
        except BaseException:
            with suppress(OSError, CacheError), self._database.folders.open("ingest") as ingest:
                os.rmdir(name, dir_fd=ingest)
            with suppress(OSError):
                path.unlink()
            locks.release(lock)
            raise
        return lock, opened

    def _make_folder(self, name: str) -> OpenFolder:
        with os_errors("begin a session in the cache"), self._database.folders.open("ingest") as ingest:
            self._database.folders.make(f"ingest/{name}")
            with self._database.folders.open(f"ingest/{name}") as folder:
                opened = OpenFolder(folder)
            os.fsync(ingest)
        return opened

    @property
    def folder(self) -> Path:
        """The folder for the files that this session receives."""
        return Path(f"{self._database.directory}/ingest/{self.id}")

    @property
    def opened(self) -> OpenFolder:
        """The same folder, open: file names are relative to it, so that no link leads elsewhere.

        Raises:
            CacheReplaced: if the folder and the session's lock file were removed.
        """
        with self._guard:
            name = self.id
            assert self._opened is not None
            if self._opened.is_removed:  # by a cleaner of empty folders
                self._check_lock()
                self._opened = self._make_folder(name)
            return self._opened

    @property
    def is_shared(self) -> bool:
        """Whether a group shares the cache, so that the group must be able to read its files."""
        return is_shared(os.fstat(self._database.folders.root))  # an administrator may share the cache while it is open

    def check_reserve(self) -> None:
        """Raise `StorageError` if new content would use the reserve of the cache."""
        self._database.reserve.check()

    def discard(self, path: Path | None) -> None:
        """Remove a file of this session; a failure is not raised, and a parent process's file stays."""
        with self._guard:
            opened, session = self._opened, self._id
        if path is not None and opened is not None and path.parent.name == session:
            discard(path.name, opened.descriptor)

    def new_file(self) -> FileIO:
        """Return a new file without a name; the kernel deletes it when it is closed.

        Raises:
            OSError: if the file cannot be made.
        """
        folder, flags = self.opened, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        name = self.new_path().name
        file = FileIO(os.open(name, flags, 0o600, dir_fd=folder.descriptor), "rb+")
        discard(name, folder.descriptor)
        return file

    def new_path(self, digest: Digest | None = None) -> Path:
        """Return a new path in the folder; a digest in it tells a later open what was being published."""
        number = secrets.randbits(_NUMBER_BITS)
        name = f"{number}.{digest.replace(':', '-')}" if digest else f"{number}"
        return Path(f"{self._database.directory}/ingest/{self.id}/{name}")  # making a Path is slow, so make only one

    def new_folder(self) -> Path:
        """Make a folder for a new index, and return its path.

        Raises:
            NotOurs: if the path leads to another folder.
            StorageError: if the folder cannot be made.
        """
        path, opened = self.new_path(), self.opened
        with os_errors("make a folder for a new index"):
            os.mkdir(path.name, 0o700, dir_fd=opened.descriptor)
            created = os.stat(path.name, dir_fd=opened.descriptor, follow_symlinks=False)
            with self._database.folders.open(f"ingest/{path.parent.name}/{path.name}") as found:
                if not os.path.samestat(os.fstat(found), created):
                    raise NotOurs(f"{str(path)!r} was replaced by another folder: try again")
        return path

    def lease(self, connection: Connection, digests: Iterable[Digest]) -> Hold:
        """Keep digests from collection, from the commit of this transaction until `release`.

        Raises:
            CacheReplaced: if the session's lock file was removed or renamed.
        """
        hold = Hold(self.id, next(self._numbers), frozenset(digests))
        if hold.digests:
            self._check_lock()
            self._leased = True
            rows = [{"digest": digest, "session": hold.session, "hold": hold.number} for digest in hold.digests]
            connection.execute(_build_leases_insert(), rows)
        return hold

    def release(self, connection: Connection, hold: Hold) -> None:
        """Release a hold of this session; do nothing with a hold of a parent process.

        Raises:
            CacheReplaced: if the session's lock file was removed or renamed, or its leases were removed.
        """
        if hold.session == self._id:
            self._check_lock()
            deleted = connection.execute(_build_holds_delete(), {"of": hold.session, "numbers": [hold.number]}).rowcount
            if deleted < len(hold.digests):
                raise _hold_lost("its leases were removed")

    def _check_lock(self) -> None:
        """Check that the session has its lock file; without it other processes remove the leases.

        Raises:
            CacheReplaced: if the lock file was removed or renamed.
        """
        if self._lock is None or self._id is None:
            return
        if not locks.leads_to(lock_path(self._database.directory, self._id), self._lock.fileno()):
            raise _hold_lost("its lock file was removed or renamed")

    def keep_until_saved(self, hold: Hold) -> None:
        """Keep the hold on a new blob until this session associates an image with the blob."""
        with self._guard:
            for digest in hold.digests:
                self._unsaved.setdefault(digest, []).append(hold)

    def release_saved(self, connection: Connection, digests: Iterable[Digest]) -> None:
        """Release the holds of `keep_until_saved`, in the transaction that associates an image with the blobs.

        Each digest is released once: another thread may have stored the same blob for an image it will save later.
        """
        with self._guard:
            holds = [unsaved.pop() for digest in set(digests) if (unsaved := self._unsaved.get(digest))]
        # As in `release`, holds of a parent process stay.
        numbers = [hold.number for hold in holds if hold.session == self._id]
        if numbers:
            self._check_lock()
            connection.execute(_build_holds_delete(), {"of": self._id, "numbers": numbers})

    def expect(self, digests: Iterable[Digest]) -> None:
        """Note the blobs that an image saved by this session still lacks."""
        with self._guard:
            self._expected.update(digests)

    def expects(self, digest: Digest) -> bool:
        """Return whether this session has saved an image that lacked this blob."""
        with self._guard:
            return digest in self._expected

    def close(self) -> None:
        """End the session for good, and remove its folder, leases and lock file."""
        with self._guard:
            self._closed = True
            session, lock = self._id, self._lock
        if session is None or lock is None:
            return
        folder = self._database.directory / "ingest" / session
        try:
            # A file named by its digest may be an interrupted publication, which the next open retracts.
            if not any(received_digest(name) for name in os.listdir(folder)):
                remove_folder(self._database.folders, session)
                if self._leased:
                    with self._database.write() as connection:
                        connection.execute(delete(LEASES).where(LEASES.c.session == session))
                with self._database.folders.open("locks") as locks_folder:
                    os.unlink(f"{session}{_LOCK_SUFFIX}", dir_fd=locks_folder)
        except (CacheError, OSError) as error:
            if is_callers(error):
                raise
            # The next open removes the rest, as after a killed process.
        finally:
            locks.release(lock)
            self.forked()


def _hold_lost(reason: str) -> CacheReplaced:
    return CacheReplaced(
        f"this session ended early because {reason}, and the blobs that it held may have been collected: "
        "open the cache again, and keep cleaners of old files out of it"
    )


@cache
def _build_leases_insert() -> Insert:
    return insert(LEASES)


@cache
def _build_holds_delete() -> Delete:
    return delete(LEASES).where(
        LEASES.c.session == bindparam("of"), LEASES.c.hold.in_(bindparam("numbers", expanding=True))
    )


def remove_folder(folders: Folders, session: str) -> None:
    """Remove a session's folder in ``ingest/`` and the files that the session wrote; other files stay.

    Raises:
        OSError: if a file or folder cannot be removed, or a file that is not ours is in the folder.
        NotOurs: if the folder is a symbolic link, another user's, or on another file system.
    """
    with folders.open("ingest") as ingest:
        with folders.open(f"ingest/{session}") as folder:
            for name in filter(is_received, os.listdir(folder)):
                try:
                    os.unlink(name, dir_fd=folder)
                except IsADirectoryError:
                    if name.isdecimal():
                        _remove_new_index(folders, f"ingest/{session}/{name}")
        os.rmdir(session, dir_fd=ingest)


def _remove_new_index(folders: Folders, name: str) -> None:
    """Remove the folder of a new index, unless it holds other files.

    Args:
        folders: of the cache.
        name: of the folder, relative to the cache directory.

    Raises:
        OSError: if a file or folder cannot be removed.
        NotOurs: if a folder is a symbolic link, another user's, or on another file system.
    """
    found = {"": True}  # for each path below the folder, whether it is a folder
    for folder in ("", *FOLDERS):
        if not found.get(folder):
            continue
        with folders.open(f"{name}/{folder}".rstrip("/")) as opened, os.scandir(opened) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}".lstrip("/")
                found[path] = entry.is_dir(follow_symlinks=False)
                if path not in FOLDERS if found[path] else not _is_file_of_new_index(path, entry):
                    return  # not a file of ours
    for path in reversed(found):
        outer, _, last = f"{name}/{path}".rstrip("/").rpartition("/")
        with folders.open(outer) as opened:
            if found[path]:
                os.rmdir(last, dir_fd=opened)
            else:
                os.unlink(last, dir_fd=opened)


def _is_file_of_new_index(path: str, entry: os.DirEntry[str]) -> bool:
    return _NEW_INDEX.fullmatch(path) is not None and entry.is_file(follow_symlinks=False)


def lock_dead_sessions(folders: Folders, left: list[Leftover]) -> Iterator[str]:
    """Yield the dead sessions that left files; hold the lock of each until the next is wanted.

    Args:
        folders: of the cache.
        left: gets the sessions that cannot be examined, such as another user's.
    """
    directory = folders.directory
    with folders.open("ingest") as ingest:
        names = list_sessions_with_locks(directory) | set(filter(is_session, os.listdir(ingest)))
    for session in sorted(names):
        path = lock_path(directory, session)
        try:
            # The lock file is made if it is missing, so that only one process removes the session.
            lock = locks.acquire(path, wait=False)
        except OSError as error:
            left.append(Leftover(path, explain(error)))
            continue
        if lock is None:
            continue
        try:
            yield session
            with folders.open("locks") as folder, suppress(FileNotFoundError):
                os.unlink(path.name, dir_fd=folder)
        except OSError as error:
            left.append(Leftover(path, explain(error)))
        finally:
            locks.release(lock)
