"""The layout of the cache directory: its location, and the names and paths of files in it."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from cachedb.arguments import check_paths
from cachedb.disk.folders import FOLDERS, Folders
from cachedb.disk.marker import MARKER
from cachedb.errors import (
    CacheError,
    DamagedIndex,
    InvalidDigest,
    NotACache,
    os_errors,
)
from cachedb.oci.digests import Digest, is_digest, parse_digest

__all__ = [
    "OLDEST",
    "POLICY_FILE",
    "REVISION",
    "UNFINISHED_INDEX",
    "blob_file",
    "blob_path",
    "check_destination",
    "choose_directory",
    "default_directory",
    "has_blobs",
    "is_inside",
    "is_received",
    "is_session",
    "list_blob_files",
    "lock_kind",
    "partial_digest",
    "partial_path",
    "partials_folder",
    "quarantine_path",
    "received_digest",
    "trash_digest",
    "trash_name",
]


REVISION = "0007"
"""The newest migration; it is here and not in `cachedb.index`, to be read without SQLAlchemy."""

OLDEST = 7
"""The oldest schema whose releases can use an index of this revision.

It is the ``oldest`` of the newest migration.
"""

POLICY_FILE = "policy.toml"
"""The file in the cache directory that says which images to keep and to remove."""

UNFINISHED_INDEX = ".cachedb-copy"
"""The name of the index in a directory that `cachedb copy` has not finished."""


_OWN_NAMES = re.compile(
    "|".join(map(re.escape, (*FOLDERS, "quarantine", POLICY_FILE, MARKER)))
    + r"|index\.db(-wal|-shm|-journal)?|reserve(\.inodes)?"
)
"""Matches the names of a cache's own files and folders in its directory."""


def check_destination(directory: Path, destination: Path) -> None:
    """Raise if a file to write is the cache's own, or is in one of its folders.

    A link or a bind mount may lead there.

    Args:
        directory: of the cache.
        destination: the path of the file to write, or of the folder to write files to.

    Raises:
        CacheError: if it is.
    """
    root, own = _identify(Path(os.path.realpath(directory))), _identify_folders(directory)
    path, inner = Path(os.path.realpath(destination)), None
    for folder in (path, *path.parents):
        found = _identify(folder)
        is_own_name = inner is None or _OWN_NAMES.fullmatch(inner.name)
        if found is not None and (found in own or (found == root and is_own_name)):
            raise CacheError(f"{str(destination)!r} belongs to the cache itself: name a path elsewhere")
        inner = folder


def is_inside(directory: Path, path: Path) -> bool:
    """Return whether a path is a cache directory or in it, perhaps through a link or a bind mount.

    Args:
        directory: of the cache.
        path: need not exist.
    """
    root, resolved = _identify(Path(os.path.realpath(directory))), Path(os.path.realpath(path))
    own = {root, *_identify_folders(directory)} - {None}
    return any(_identify(folder) in own for folder in (resolved, *resolved.parents))


def _identify_folders(directory: Path) -> set[tuple[int, int]]:
    """Return the device and inode of each folder of a cache: a bind mount gives it a second path."""
    paths = [directory / name for name in (*FOLDERS, "quarantine", "reserve.inodes", "ingest/partial")]
    with suppress(OSError):
        paths += [directory / "ingest" / name for name in filter(is_session, os.listdir(directory / "ingest"))]
    return {found for path in paths if (found := _identify(path))}


def _identify(path: Path) -> tuple[int, int] | None:
    """Return the device and inode of a file; None if there is none, or its folder cannot be searched."""
    with suppress(OSError):
        status = os.lstat(path)
        return status.st_dev, status.st_ino
    return None


def default_directory() -> Path:
    """Return the cache directory: ``CACHEDB_DIR``, else the user's cache directory of the platform."""
    if directory := os.environ.get("CACHEDB_DIR"):
        return Path(directory)
    import platformdirs

    return Path(platformdirs.user_cache_dir("cachedb"))


def choose_directory(directory: str | os.PathLike[str] | None) -> Path:
    """Return the given directory, or the default one, as an absolute path.

    Raises:
        NotACache: if its name is empty, or relative to a deleted working directory.
    """
    check_paths(directory=directory, optional=True)
    if directory is not None and not os.fspath(directory):
        raise NotACache("the name of the cache directory is empty: name a directory, or leave it out for the default")
    path = default_directory() if directory is None else Path(directory)
    try:
        return path.absolute()
    except FileNotFoundError:
        raise NotACache(
            f"{str(path)!r} is relative to a working directory that was deleted: change to another one, or give an "
            "absolute path"
        ) from None


def blob_path(directory: Path, digest: Digest) -> Path:
    """Return the path of a stored blob."""
    return Path(blob_file(directory, digest))


def blob_file(directory: Path, digest: Digest) -> str:
    """Return the path of a stored blob as text; for many blobs this is faster than `blob_path`.

    Raises:
        DamagedIndex: if the digest is invalid; a forged index may have a path there.
    """
    if not is_digest(digest):
        raise DamagedIndex(
            f"the index is damaged: its digest {digest!r} is invalid: run `cachedb verify --repair` to rebuild it"
        )
    return f"{directory}/blobs/{digest.replace(':', '/')}"


def partials_folder(directory: Path) -> Path:
    """Return the folder in ``ingest/`` for partial downloads, which belongs to no session."""
    return directory / "ingest" / "partial"


def partial_path(directory: Path, digest: Digest) -> Path:
    """Return the path of a blob's running or interrupted download."""
    return partials_folder(directory) / digest.replace(":", "-")


def trash_name(digest: Digest) -> str:
    """Return the name of a deleted blob's file in ``trash/``."""
    return digest.replace(":", "-")


def trash_digest(name: str) -> Digest | None:
    """Return the digest in the name of a file in ``trash/``; None if the file is not ours."""
    try:
        digest = parse_digest(name.replace("-", ":", 1))
    except InvalidDigest:
        return None
    return digest if trash_name(digest) == name else None


partial_digest = trash_digest  # partial downloads have the same names


def received_digest(name: str) -> Digest | None:
    """Return the digest in the name of a file in a session's folder; None if it has none.

    If the digest is known before, the name has it from the start. Otherwise it gets it when the file is whole.
    """
    number, _, digest = name.partition(".")
    return trash_digest(digest) if number.isdecimal() else None


def is_received(name: str) -> bool:
    """Return whether a name has the form of a file's name in a session's folder."""
    return name.isdecimal() or received_digest(name) is not None


def is_session(name: str) -> bool:
    """Return whether a name has the form of a session's name."""
    return _SESSION_NAME.fullmatch(name) is not None


def lock_kind(name: str) -> str | None:
    """Return the kind of a file in ``locks/``: session, producing, failure, write; None for others."""
    stem, _, suffix = name.rpartition(".")
    if suffix == "session" and is_session(stem):
        return "session"
    if suffix in ("producing", "failed") and _CLAIM_KEY.fullmatch(stem):
        return "producing" if suffix == "producing" else "failure"
    return "write" if name in ("write.lock", "write.queue") else None


_SESSION_NAME = re.compile(r"[0-9]+-[0-9a-f]{12}")
_CLAIM_KEY = re.compile(r"[0-9a-f]{64}")


def list_blob_files(directory: Path) -> tuple[dict[Digest, int], list[Path]]:
    """Return the blobs on disk with their sizes, and the other files among them."""
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
                    continue  # collected meanwhile
                except InvalidDigest:
                    digest = None
                if digest and entry.is_file(follow_symlinks=False):
                    found[digest] = status.st_size
                else:
                    strays.append(Path(entry.path))
    return found, strays


def quarantine_path(directory: Path, name: str, *, beside: tuple[str, ...] = ()) -> Path:
    """Return a free path in ``quarantine/``; make the folder if it is missing.

    Args:
        directory: of the cache.
        name: of the file to put there.
        beside: suffixes; the path is free with each of them too.
    """
    folders = Folders(directory)
    folders.make("quarantine")
    with folders.open("quarantine"):  # raises if the folder leads out of the cache
        os.fsync(folders.root)
    folder = directory / "quarantine"
    path, number = folder / name, 0
    while any(os.path.lexists(f"{path}{suffix}") for suffix in ("", *beside)):
        number += 1
        path = folder / f"{name}.{number}"
    return path


def has_blobs(directory: Path) -> bool:
    """Return whether a folder in ``blobs/`` has entries."""
    return any(any(folder.iterdir()) for folder in (directory / "blobs").iterdir() if folder.is_dir())
