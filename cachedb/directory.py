"""The cache directory: where it is, and where in it things lie."""

from __future__ import annotations

import os
from pathlib import Path

from cachedb.errors import NotACache
from cachedb.reference import Digest

__all__ = [
    "REVISION",
    "UNFINISHED",
    "blob_file",
    "blob_path",
    "chosen",
    "default_directory",
    "partial_path",
    "partials",
]

REVISION = "0005"
"""The newest migration: the schema that `cachedb.tables` describes; here for who reads without SQLAlchemy."""

UNFINISHED = ".cachedb-copy"
"""The name of the index in a directory that `cachedb copy` has not come to the end of."""


def default_directory() -> Path:
    """Return the cache directory: ``CACHEDB_DIR``, else the user's cache directory of the platform."""
    if directory := os.environ.get("CACHEDB_DIR"):
        return Path(directory)
    import platformdirs

    return Path(platformdirs.user_cache_dir("cachedb"))


def chosen(directory: str | os.PathLike[str] | None) -> Path:
    """Return the directory that was chosen, or the default, as an absolute path.

    Raises:
        NotACache: if its name is empty.
    """
    if directory is not None and not os.fspath(directory):
        raise NotACache("the name of the cache directory is empty")
    return (default_directory() if directory is None else Path(directory)).absolute()


def blob_path(directory: Path, digest: Digest) -> Path:
    """Return where a blob lies, if it is stored."""
    return Path(blob_file(directory, digest))


def blob_file(directory: Path, digest: Digest) -> str:
    """Return the same as text: to make a `Path` for each of many blobs takes longer than what is done with it."""
    return f"{directory}/blobs/{digest.replace(':', '/')}"


def partials(directory: Path) -> Path:
    """Return the folder in ``ingest/`` that is no session's: of downloads to be gone on with."""
    return directory / "ingest" / "partial"


def partial_path(directory: Path, digest: Digest) -> Path:
    """Return where a blob lies that is being downloaded, or was until it was cut off."""
    return partials(directory) / digest.replace(":", "-")
