"""Downloads in ``ingest/partial/``, where an interrupted one stays until a process resumes it."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from contextlib import suppress

from cachedb.disk import single_flight
from cachedb.disk.folders import Folders
from cachedb.disk.layout import partial_digest
from cachedb.errors import os_errors
from cachedb.oci.digests import Digest

__all__ = ["begun", "key_of", "sweep"]


_AGE = 24 * 60 * 60  # seconds after which no process is expected to resume one
_NOT_OPENED = (errno.ELOOP, errno.EACCES, errno.ENXIO)  # a symbolic link, another user's file, a socket


def key_of(digest: Digest) -> str:
    """Return the key of the claim on a blob's download; only the owner of the claim writes to the file."""
    return f"blob {digest}"


def begun(folder: int, name: str, size: int) -> int:
    """Return how many bytes of a download are there to resume from; unlink a file that cannot be resumed.

    A file that another process still writes to, because its claim was taken over, is unlinked: that process keeps it
    without a name. Whoever can write to the folder may have put a link there, so no link is followed.

    Args:
        folder: descriptor of ``ingest/partial/``.
        name: of the file.
        size: of the whole blob, in bytes.

    Raises:
        StorageError: if the file can be neither resumed nor unlinked.
    """
    with os_errors("write to the cache"):
        try:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except FileNotFoundError:
            return 0
        except OSError as error:
            if error.errno not in _NOT_OPENED:
                raise
            os.unlink(name, dir_fd=folder)
            return 0
        try:
            found = os.fstat(file)
            # A second name means that a killed process has stored it, or that somebody has linked another file here.
            if found.st_nlink > 1 or found.st_size > size or not _is_our_file(found) or _is_written_to(file):
                os.unlink(name, dir_fd=folder)
                return 0
            os.fchmod(file, 0o600)
            return found.st_size
        finally:
            os.close(file)


def _is_our_file(found: os.stat_result) -> bool:
    """Return whether this is a regular file of our user; another user may write to his own later."""
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()


def _is_written_to(file: int) -> bool:
    """Return whether `receive` has this file open in any process."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def sweep(folders: Folders, *, age: float = _AGE) -> bool:
    """Remove partial downloads that no process has resumed for a day, or for ``age`` seconds.

    Returns:
        Whether one was removed.
    """
    found = False
    with os_errors("clean up after a download"), suppress(FileNotFoundError), folders.open("ingest/partial") as partial:
        for name in os.listdir(partial):
            digest = partial_digest(name)
            if digest is None:
                continue  # not a download of ours
            with suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=partial, follow_symlinks=False)
                if not stat.S_ISREG(status.st_mode) or time.time() - status.st_mtime < age:
                    continue
                with single_flight.unless_made(folders.directory, key_of(digest)) as nobody:
                    if nobody:
                        os.unlink(name, dir_fd=partial)
                        found = True
    return found
