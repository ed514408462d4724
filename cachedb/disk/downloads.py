"""Find and remove partial downloads in ``ingest/partial/``, which a later process can resume."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cachedb.disk import single_flight
from cachedb.disk.folders import Folders, set_aside
from cachedb.disk.layout import partial_digest
from cachedb.disk.waiting import LOG
from cachedb.errors import explain, ignore_os_errors, os_errors
from cachedb.oci.digests import Digest

__all__ = ["are_running", "claim_key", "find_resumable_bytes", "is_stale", "measure_fresh", "remove_stale_downloads"]


_KEY_PREFIX = "blob "
_STALE_SECONDS = 24 * 60 * 60  # a download that no process has resumed for so long is removed
_UNOPENABLE_ERRNOS = (errno.ELOOP, errno.EACCES, errno.ENXIO)  # for a symbolic link, another user's file and a socket


def claim_key(digest: Digest) -> str:
    """Return the key of the claim on a blob's download; only the holder of the claim writes to the file."""
    return f"{_KEY_PREFIX}{digest}"


def are_running(directory: Path) -> bool:
    """Return whether a process is downloading a blob; False if the claims cannot be read."""
    with ignore_os_errors():
        return any(claim.key.startswith(_KEY_PREFIX) for claim in single_flight.list_claims(directory))
    return False


def find_resumable_bytes(folder: int, name: str, size: int) -> int:
    """Return how many bytes of a download can be resumed; unlink a file that cannot be resumed.

    A process that lost its claim may still write to the file. Then the file is unlinked, and that process continues
    with a file without a name. No link is followed, because other users may be able to put one there.

    Args:
        folder: descriptor of ``ingest/partial/``.
        name: of the file.
        size: of the whole blob, in bytes.

    Raises:
        StorageError: if the file can be neither opened nor unlinked.
    """
    with os_errors("write to the cache"):
        try:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except FileNotFoundError:
            return 0
        except OSError as error:
            if error.errno not in _UNOPENABLE_ERRNOS:
                raise
            _unlink(name, folder)
            return 0
        try:
            found = os.fstat(file)
            # A second name means that a killed process stored the file, or that somebody linked another file here.
            if found.st_nlink > 1 or found.st_size > size or not _is_our_file(found) or _has_writer(file):
                _unlink(name, folder)
                return 0
            os.fchmod(file, 0o600)
            return found.st_size
        finally:
            os.close(file)


def _unlink(name: str, folder: int) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except IsADirectoryError:
        set_aside(folder, name)


def _is_our_file(found: os.stat_result) -> bool:
    """Return whether this is a regular file of our user; other users could write to theirs later."""
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()


def _has_writer(file: int) -> bool:
    """Return whether `receive` has this file open in another process or thread."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(file, fcntl.LOCK_UN)  # a child forked just now may have a copy of the descriptor
    except BlockingIOError:
        return True
    return False


def measure_fresh(path: Path) -> int:
    """Return the bytes of a partial download that `remove_stale_downloads` keeps; 0 if there is none."""
    with ignore_os_errors():
        found = path.lstat()
        return found.st_size if time.time() - found.st_mtime < _STALE_SECONDS else 0
    return 0


def remove_stale_downloads(folders: Folders, *, age: float = _STALE_SECONDS, user: int | None = None) -> bool:
    """Remove partial downloads that no process has resumed for a day.

    Args:
        folders: of the cache.
        age: seconds without a change, instead of a day.
        user: the id of the user whose files to remove; None for all users.

    Returns:
        Whether one was removed.
    """
    found = False
    with os_errors("clean up after a download"), suppress(FileNotFoundError), folders.open("ingest/partial") as partial:
        for name, digest in _list_stale(partial, age, user):
            with (
                suppress(FileNotFoundError),
                single_flight.try_claim(folders.directory, claim_key(digest)) as has_claim,
            ):
                if has_claim and _try_unlink(name, partial):
                    found = True
    return found


def _try_unlink(name: str, folder: int) -> bool:
    """Unlink a file, and return whether that was possible; another user's file in a sticky folder stays."""
    try:
        os.unlink(name, dir_fd=folder)
    except PermissionError as error:
        LOG.info("a stale download stays: %s", explain(error))
        return False
    return True


def is_stale(name: str, status: os.stat_result, *, age: float = _STALE_SECONDS) -> bool:
    """Return whether a file in ``ingest/partial/`` is one that `remove_stale_downloads` removes.

    Args:
        name: of the file.
        status: of the file itself, not of what a link leads to.
        age: seconds without a change.
    """
    return partial_digest(name) is not None and stat.S_ISREG(status.st_mode) and time.time() - status.st_mtime >= age


def _list_stale(partial: int, age: float, user: int | None) -> Iterator[tuple[str, Digest]]:
    """Yield the name and digest of each old partial download of a user; None means all users."""
    for name in os.listdir(partial):
        with suppress(FileNotFoundError):
            status = os.stat(name, dir_fd=partial, follow_symlinks=False)
            if is_stale(name, status, age=age) and user in (None, status.st_uid):
                digest = partial_digest(name)
                assert digest is not None
                yield name, digest
