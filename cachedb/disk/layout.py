"""The cache directory: where it is, and where in it things lie."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cachedb.arguments import check_paths
from cachedb.disk.folders import Folders
from cachedb.errors import (
    DamagedIndex,
    InvalidDigest,
    NotACache,
    os_errors,
)
from cachedb.oci.digests import Digest, is_digest, parse_digest

__all__ = [
    "REVISION",
    "UNFINISHED",
    "blob_file",
    "blob_path",
    "chosen",
    "default_directory",
    "has_blobs",
    "is_received",
    "is_session",
    "lock_kind",
    "on_disk",
    "partial_digest",
    "partial_path",
    "partials",
    "quarantine_path",
    "received_digest",
    "trash_digest",
    "trash_name",
]


REVISION = "0005"
"""The newest migration: the schema that `cachedb.index.tables` describes; here for who reads without SQLAlchemy."""

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
        NotACache: if its name is empty, or relative to a directory that was deleted.
    """
    check_paths(directory=directory, optional=True)
    if directory is not None and not os.fspath(directory):
        raise NotACache("the name of the cache directory is empty")
    path = default_directory() if directory is None else Path(directory)
    try:
        return path.absolute()
    except FileNotFoundError:
        raise NotACache(
            f"{str(path)!r} is relative to a working directory that was deleted: change to another one, or give an "
            "absolute path"
        ) from None


def blob_path(directory: Path, digest: Digest) -> Path:
    """Return where a blob lies, if it is stored."""
    return Path(blob_file(directory, digest))


def blob_file(directory: Path, digest: Digest) -> str:
    """Return the same as text: to make a `Path` for each of many blobs takes longer than what is done with it.

    Raises:
        DamagedIndex: if it is no digest but a path, which an index from elsewhere may have.
    """
    if not is_digest(digest):
        raise DamagedIndex(
            f"the index is damaged, for it has {digest!r} as a digest: run `cachedb verify --repair`, which rebuilds it"
        )
    return f"{directory}/blobs/{digest.replace(':', '/')}"


def partials(directory: Path) -> Path:
    """Return the folder in ``ingest/`` that is no session's: of downloads to be gone on with."""
    return directory / "ingest" / "partial"


def partial_path(directory: Path, digest: Digest) -> Path:
    """Return where a blob lies that is being downloaded, or was until it was cut off."""
    return partials(directory) / digest.replace(":", "-")


def trash_name(digest: Digest) -> str:
    """Return the name that the file of a forgotten blob has in ``trash/``."""
    return digest.replace(":", "-")


def trash_digest(name: str) -> Digest | None:
    """Return the digest of a forgotten blob from the name of its file in ``trash/``; None if the file is not ours."""
    try:
        digest = parse_digest(name.replace("-", ":", 1))
    except InvalidDigest:
        return None
    return digest if trash_name(digest) == name else None


partial_digest = trash_digest  # a download that was cut off is named in the same way


def received_digest(name: str) -> Digest | None:
    """Return the digest in the name of a file in a session's folder: once all of it is there, or if it was known."""
    number, _, digest = name.partition(".")
    return trash_digest(digest) if number.isdecimal() else None


def is_received(name: str) -> bool:
    """Return whether a name in a session's folder is of our form."""
    return name.isdecimal() or received_digest(name) is not None


def is_session(name: str) -> bool:
    """Return whether a name is a session's."""
    return _SESSION.fullmatch(name) is not None


def lock_kind(name: str) -> str | None:
    """Return what a file in ``locks/`` is for: ``session``, ``producing`` or ``write``; None if it is not ours."""
    stem, _, suffix = name.rpartition(".")
    if suffix == "session" and is_session(stem):
        return "session"
    if suffix == "producing" and _KEY.fullmatch(stem):
        return "producing"
    return "write" if name in ("write.lock", "write.queue") else None


_SESSION = re.compile(r"[0-9]+-[0-9a-f]{12}")
_KEY = re.compile(r"[0-9a-f]{64}")


def on_disk(directory: Path) -> tuple[dict[Digest, int], list[Path]]:
    """Return the blobs on disk with their sizes, and what is no blob and lies among them."""
    found: dict[Digest, int] = {}
    strays: list[Path] = []
    with os_errors("read the cache"):
        for folder in os.scandir(directory / "blobs"):
            if folder.name not in ("sha256", "sha512") or not folder.is_dir(follow_symlinks=False):
                strays.append(Path(folder.path))
                continue
            for entry in os.scandir(folder.path):
                try:
                    digest = parse_digest(f"{folder.name}:{entry.name}")
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # collected since
                except InvalidDigest:
                    digest = None
                if digest and entry.is_file(follow_symlinks=False):
                    found[digest] = status.st_size
                else:
                    strays.append(Path(entry.path))
    return found, strays


def quarantine_path(directory: Path, name: str, *, beside: tuple[str, ...] = ()) -> Path:
    """Return a free path in ``quarantine/``, a folder that is made when it is first needed.

    Args:
        directory: of the cache.
        name: of what is put there.
        beside: what is put at the path with these suffixes, where it is free too.
    """
    folders = Folders(directory)
    folders.make("quarantine")
    with folders.open("quarantine"):  # it is refused if it leads elsewhere
        os.fsync(folders.root)
    folder = directory / "quarantine"
    path, number = folder / name, 0
    while any(os.path.lexists(f"{path}{suffix}") for suffix in ("", *beside)):
        number += 1
        path = folder / f"{name}.{number}"
    return path


def has_blobs(directory: Path) -> bool:
    """Say whether there is anything in ``blobs/``."""
    return any(any(folder.iterdir()) for folder in (directory / "blobs").iterdir() if folder.is_dir())
