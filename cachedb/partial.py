"""Downloads that were cut off: what came of them is kept in ``ingest/partial/``, to be gone on with."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from cachedb import producing
from cachedb.errors import os_errors
from cachedb.reference import Digest
from cachedb.sessions import PARTIAL

__all__ = ["key_of", "path_of", "sweep"]

_AGE = 24 * 60 * 60  # seconds after which nobody is expected to go on with one


def path_of(directory: Path, digest: Digest) -> Path:
    """Return where a blob lies that is not all there."""
    return directory / "ingest" / PARTIAL / digest.replace(":", "-")


def key_of(digest: Digest) -> str:
    """Return what `producing.once` knows the download of a blob by: whoever has that right writes to the file."""
    return f"blob {digest}"


def sweep(directory: Path) -> None:
    """Remove what nobody has gone on with for a day."""
    with os_errors("clean up after a download"), suppress(FileNotFoundError):
        for name in os.listdir(directory / "ingest" / PARTIAL):
            path = directory / "ingest" / PARTIAL / name
            if time.time() - path.lstat().st_mtime > _AGE:
                with producing.unless_made(directory, key_of(Digest(name.replace("-", ":")))) as nobody:
                    if nobody:
                        path.unlink(missing_ok=True)
