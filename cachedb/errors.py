"""Every error that cachedb raises on purpose, under one root.

CacheError
├── Busy                 another process has what is needed, and the time to wait for it is over
├── InvalidName          a name is not ``repository[:tag]`` or ``repository@digest``
├── InvalidDigest        a digest is not ``sha256:<64 hex>`` or ``sha512:<128 hex>``
├── NotInCache           the image or blob that was asked for is not here
├── InvalidQuery         a question in SQL is none, or would do something else than read
├── InvalidManifest      a manifest, index or config cannot be used
├── InvalidArchive       an archive or image layout cannot be used
├── DigestMismatch       content differs from the digest or size it was said to have
├── IncompleteImage      a blob that the operation needs is not stored
├── NotACache            the directory is not a cache and cannot become one
├── NotOurs              a directory or folder is another user's, or leads out of the cache
├── ReentrantCall        a signal handler or callback needs what its own thread holds
├── RegistryError        a registry, or the way to it, failed or refused
│   └── RegistryUnavailable  it cannot be reached now, or is overloaded: another time it may do
├── SchemaMismatch       the index has another schema than this release works with
│   └── InvalidRevision  a revision that was asked for is none
└── StorageError         the operating system or SQLite could not do what was asked
    ├── CacheReplaced    the cache directory was moved, removed or replaced while it was open
    └── DamagedIndex     index.db is lost or damaged; it can be rebuilt

A message is one line that says what is wrong and, where there is something to do about it, what.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from cachedb import space

__all__ = [
    "Busy",
    "CacheError",
    "CacheReplaced",
    "DamagedIndex",
    "DigestMismatch",
    "IncompleteImage",
    "InvalidArchive",
    "InvalidDigest",
    "InvalidManifest",
    "InvalidName",
    "InvalidQuery",
    "InvalidRevision",
    "NotACache",
    "NotInCache",
    "NotOurs",
    "ReentrantCall",
    "RegistryError",
    "RegistryUnavailable",
    "SchemaMismatch",
    "StorageError",
]


P = ParamSpec("P")
R = TypeVar("R")

_CALLERS = "_cachedb_callers_own"  # the mark


class CacheError(Exception):
    """The root of all errors that cachedb raises on purpose."""


class Busy(CacheError):
    """Another process has what is needed, and the time to wait for it is over."""

    def __init__(self, message: str, holder: str = "another process") -> None:
        super().__init__(message)
        self.holder = holder  # which process, as the message names it


class InvalidName(CacheError):
    """A name is not ``repository[:tag]`` or ``repository@digest``."""


class InvalidDigest(CacheError):
    """A digest is not ``sha256:<64 hex>`` or ``sha512:<128 hex>``."""


class InvalidQuery(CacheError):
    """A question in SQL is none, or would do something else than read."""

    def __init__(self, message: str, place: tuple[int, int] | None = None) -> None:
        super().__init__(message)
        self.place = place  # in the query, from one character to another, if that is known


class NotInCache(CacheError):
    """The image or blob that was asked for is not in the cache.

    Attributes:
        name: of the image, or the digest of the blob; empty where neither was asked for.
    """

    def __init__(self, message: str, *, name: object = "") -> None:
        super().__init__(message)
        self.name = str(name)


class InvalidManifest(CacheError):
    """A manifest, index or config cannot be used."""


class InvalidArchive(CacheError):
    """An archive or image layout cannot be used."""


class DigestMismatch(CacheError):
    """Content differs from the digest or size it was said to have."""


class IncompleteImage(CacheError):
    """A blob that the operation needs is not stored."""


class NotACache(CacheError):
    """The directory is not a cache and cannot become one."""


class NotOurs(CacheError):
    """A directory or folder is another user's, or leads out of the cache: nothing in it is changed."""


class ReentrantCall(CacheError):
    """A signal handler, a finalizer or a callback asks for what the call that it interrupts holds."""


class RegistryError(CacheError):
    """A registry, or the way to it, failed or refused."""


class RegistryUnavailable(RegistryError):
    """A registry cannot be reached now, or is overloaded: another time it may do."""


class SchemaMismatch(CacheError):
    """The index has another schema than this release works with."""


class InvalidRevision(SchemaMismatch):
    """A revision that was asked for is not one of those that this release knows."""


class StorageError(CacheError):
    """The operating system or SQLite could not do what was asked.

    Attributes:
        errno: the operating system's number for the cause, where it is known.
    """

    def __init__(self, *args: object, errno: int | None = None) -> None:
        super().__init__(*args)
        self.errno = errno


class CacheReplaced(StorageError):
    """The cache directory was moved, removed or replaced while it was open."""


class DamagedIndex(StorageError):
    """``index.db`` is lost or damaged; `Cache.verify` can rebuild it."""


_ADVICE = {
    errno.ENOSPC: "free some space (`cachedb gc` may help) and try again",
    errno.EDQUOT: "the disk quota is used up: free some space and try again",
    errno.EACCES: "check the owner and mode of the directory",
    errno.EPERM: "check the owner and mode of the directory",
    errno.EROFS: "the file system is mounted read-only",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.EFBIG: "the file system takes no file of that size",
    errno.EIO: "the disk may be failing: see the kernel's log",
}


@contextmanager
def os_errors(action: str) -> Iterator[None]:
    """Turn an `OSError` in the block into a `StorageError`: "cannot ACTION: reason: file; advice".

    One that the caller's own code raises in the block passes unchanged; see `is_callers`.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # whoever read from us went away: nothing failed
    except OSError as error:
        if is_callers(error):
            raise
        raise StorageError(f"cannot {action}: {explain(error)}", errno=error.errno) from error


def is_callers(error: BaseException) -> bool:
    """Return whether an `OSError` is the caller's own, and none of the operating system.

    It is if `callers_own` has marked it, or if it has no errno: a signal handler's `TimeoutError`, for instance.
    """
    return isinstance(error, OSError) and (error.errno is None or hasattr(error, _CALLERS))


def callers_own(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function of the caller, a progress callback, whose errors `os_errors` passes unchanged."""

    def call(*arguments: P.args, **named: P.kwargs) -> R:
        try:
            return function(*arguments, **named)
        except OSError as error:
            setattr(error, _CALLERS, True)
            raise

    return call


class ignore_os_errors:  # noqa: N801 - as `contextlib.suppress`
    """Ignore an `OSError` of the operating system in the block; the caller's own passes."""

    def __enter__(self) -> None:
        """Begin the block."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        """End the block, and the error with it."""
        return isinstance(error, OSError) and not is_callers(error)


def explain(error: OSError) -> str:
    """Return what the operating system says, with the file it is about, and what to do."""
    reason = error.strerror or str(error)
    file = "" if error.filename is None else f": {error.filename!r}"
    advice = _ADVICE.get(error.errno or 0)
    if error.errno == errno.ENOSPC and isinstance(error.filename, str) and space.has_no_inodes(error.filename):
        reason = "the file system has no free inodes"
        advice = "delete some files there (`cachedb gc` may help) and try again"
    if error.errno == errno.EFBIG and (limit := space.file_size_limit()) is not None:
        advice = f"this process may write files of {limit} bytes at most: raise the limit (`ulimit -f`)"
    return f"{reason}{file}" + (f"; {advice}" if advice else "")
