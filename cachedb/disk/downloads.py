"""Downloads: they go to ``ingest/partial/``, where one that was cut off is gone on with, by whoever wants it next."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from contextlib import suppress
from pathlib import Path

from cachedb.disk import single_flight
from cachedb.disk.folders import Folders
from cachedb.disk.layout import partial_digest
from cachedb.errors import os_errors
from cachedb.oci.digests import Digest

__all__ = ["begun", "key_of", "sweep"]


_AGE = 24 * 60 * 60  # seconds after which nobody is expected to go on with one


def key_of(digest: Digest) -> str:
    """Return what `producing.once` knows the download of a blob by: whoever has that right writes to the file."""
    return f"blob {digest}"


def begun(path: Path, size: int) -> int:
    """Return how much of a blob is there to go on from, in a file that may be written to; another is removed.

    One that a process still writes to whose claim was taken over is another one: the process keeps it, without a name.
    """
    with os_errors("write to the cache"):
        try:
            found = path.stat()
        except FileNotFoundError:
            return 0
        if _is_written_to(path):
            path.unlink()
            return 0
        # It was stored, by a process that was killed then; or it is another user's, who may write to it later.
        if found.st_nlink > 1 or found.st_size > size or found.st_uid != os.geteuid():
            path.unlink()
            return 0
        path.chmod(0o600)
        return found.st_size


def _is_written_to(path: Path) -> bool:
    """Return whether `receive` has a file open, in whatever process."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def sweep(folders: Folders, *, age: float = _AGE) -> bool:
    """Remove what nobody has gone on with for a day, or for another time in seconds; say whether there was any."""
    found = False
    with os_errors("clean up after a download"), suppress(FileNotFoundError), folders.open("ingest/partial") as partial:
        for name in os.listdir(partial):
            digest = partial_digest(name)
            if digest is None:
                continue  # it is none of ours
            with suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=partial, follow_symlinks=False)
                if not stat.S_ISREG(status.st_mode) or time.time() - status.st_mtime < age:
                    continue
                with single_flight.unless_made(folders.directory, key_of(digest)) as nobody:
                    if nobody:
                        os.unlink(name, dir_fd=partial)
                        found = True
    return found
