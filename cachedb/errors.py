"""Define the errors that callers can catch; all are subclasses of `CacheError`.

CacheError
├── Busy                 another process holds a lock, and the time to wait for it is over
├── InvalidName          a name is not ``repository[:tag]`` or ``repository@digest``
├── NameInUse            a name belongs to another image in the cache, and must not be replaced
├── InvalidDigest        a digest is not ``sha256:<64 hex>`` or ``sha512:<128 hex>``
├── NotInCache           the requested image or blob is not in the cache
├── InvalidQuery         an SQL query is invalid, or would do more than read
├── InvalidPolicy        a policy, or a plan to apply, is invalid
├── InvalidManifest      a manifest, index or config cannot be used
├── InvalidArchive       an archive or image layout cannot be used
├── DigestMismatch       content differs from its declared digest or size
├── IncompleteImage      a blob that the operation needs is not stored
├── NoRoom               an image does not fit into the limits of the cache, and nothing more may be removed
├── NotACache            the directory is not a cache and cannot become one
├── NotOurs              a directory or file may be under the control of others: it belongs to another user, is a link
│                        or has hard links, was replaced, or is on another file system; nothing in it is changed
├── ReentrantCall        a signal handler, finalizer or callback needs a lock that its own thread already holds
├── RegistryError        a registry refused a request or failed, or the network failed
│   └── RegistryUnavailable  the registry is unreachable or overloaded; a retry may succeed
├── SchemaMismatch       this release cannot use the schema of the index
│   └── InvalidRevision  a given schema revision does not exist
└── StorageError         an operation of the operating system or of SQLite failed
    ├── CacheReplaced    the cache directory was moved, removed or replaced while it was open
    └── DamagedIndex     the index or a backup of it is lost or damaged; `Cache.verify(repair=True)` rebuilds the
                         index

A message is one line: what is wrong and, if possible, what to do.
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
    "InvalidPolicy",
    "InvalidQuery",
    "InvalidRevision",
    "NameInUse",
    "NoRoom",
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

_CALLER_MARK = "_cachedb_callers_own"  # an attribute that marks errors of the caller's own code


class CacheError(Exception):
    """The root of all errors that cachedb raises on purpose, except `TypeError`."""


class Busy(CacheError):
    """Another process holds a lock, and the time to wait for it is over."""

    def __init__(self, message: str, holder: str = "another process") -> None:
        super().__init__(message)
        self.holder = holder  # the process, as the message names it


class InvalidName(CacheError):
    """A name is not ``repository[:tag]`` or ``repository@digest``."""


class NameInUse(CacheError):
    """A name belongs to another image in the cache, and must not be replaced."""


class InvalidDigest(CacheError):
    """A digest is not ``sha256:<64 hex>`` or ``sha512:<128 hex>``."""


class InvalidQuery(CacheError):
    """An SQL query is invalid, or would do more than read."""

    def __init__(self, message: str, place: tuple[int, int] | None = None) -> None:
        super().__init__(message)
        self.place = place  # start and end of the error in the query, in characters, if known


class InvalidPolicy(CacheError):
    """A policy, or a plan to apply, is invalid.

    Attributes:
        line: the line of the mistake, if known.
    """

    def __init__(self, message: str, *, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


class NotInCache(CacheError):
    """The requested image or blob is not in the cache.

    Attributes:
        name: the image's name or the blob's digest; empty if the request had neither.
    """

    def __init__(self, message: str, *, name: object = "") -> None:
        super().__init__(message)
        self.name = str(name)


class InvalidManifest(CacheError):
    """A manifest, index or config cannot be used."""


class InvalidArchive(CacheError):
    """An archive or image layout cannot be used."""


class DigestMismatch(CacheError):
    """Content differs from its declared digest or size."""


class IncompleteImage(CacheError):
    """A blob that the operation needs is not stored."""


class NoRoom(CacheError):
    """An image does not fit into the limits of the cache, and nothing more may be removed."""


class NotACache(CacheError):
    """The directory is not a cache and cannot become one."""


class NotOurs(CacheError):
    """A directory or file may be under the control of others; nothing in it is changed.

    It belongs to another user, is a link or has hard links, was replaced, or is on another file system.
    """


class ReentrantCall(CacheError):
    """A signal handler, finalizer or callback needs a lock that its own thread already holds."""


class RegistryError(CacheError):
    """A registry refused a request or failed, or the network failed."""


class RegistryUnavailable(RegistryError):
    """A registry is unreachable or overloaded; a retry may succeed."""


class SchemaMismatch(CacheError):
    """This release cannot use the schema of the index."""


class InvalidRevision(SchemaMismatch):
    """This release does not know a given schema revision."""


class StorageError(CacheError):
    """An operation of the operating system or of SQLite failed.

    Attributes:
        errno: the operating system's error number, if known.
    """

    def __init__(self, *args: object, errno: int | None = None) -> None:
        super().__init__(*args)
        self.errno = errno


class CacheReplaced(StorageError):
    """The cache directory was moved, removed or replaced while it was open."""


class DamagedIndex(StorageError):
    """The index or a backup of it is lost or damaged; `Cache.verify(repair=True)` rebuilds the index."""


_ADVICE = {
    errno.ENOSPC: "free some space (`cachedb gc` may help) and try again",
    errno.EDQUOT: "the disk quota is used up: free some space and try again",
    errno.EACCES: "check the owner and mode of the directory",
    errno.EPERM: "check the owner and mode of the directory",
    errno.EROFS: "the file system is mounted read-only",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.EFBIG: "the file system does not allow a file of this size",
    errno.EIO: "the disk may be failing: see the kernel's log",
}


@contextmanager
def os_errors(action: str) -> Iterator[None]:
    """Turn an `OSError` in the block into a `StorageError`: "cannot ACTION: reason: file: advice".

    An error raised by the caller's own code passes unchanged; see `is_callers`.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of our output is gone; storage did not fail
    except OSError as error:
        if is_callers(error):
            raise
        raise StorageError(f"cannot {action}: {explain(error)}", errno=error.errno) from error


def is_callers(error: BaseException) -> bool:
    """Return whether an `OSError` comes from the caller's code.

    True if `mark_callers_errors` marked the error, or if it has no errno, such as a `TimeoutError` that a signal
    handler raises.
    """
    return isinstance(error, OSError) and (error.errno is None or hasattr(error, _CALLER_MARK))


def mark_callers_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a caller's function, such as a progress callback, so its errors pass `os_errors` unchanged."""

    def call(*arguments: P.args, **named: P.kwargs) -> R:
        try:
            return function(*arguments, **named)
        except OSError as error:
            setattr(error, _CALLER_MARK, True)
            raise

    return call


class ignore_os_errors:  # noqa: N801 - named like `contextlib.suppress`
    """Ignore an `OSError` of the operating system in the block; errors of the caller's code pass."""

    def __enter__(self) -> None:
        """Enter the block."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        """Leave the block and suppress an error of the operating system."""
        return isinstance(error, OSError) and not is_callers(error)


def query_timeout_error(seconds: float) -> CacheError:
    """Return the error for a query that took longer than its time limit, in seconds."""
    return CacheError(f"the query took over {seconds:g} s: narrow it, or give it more time")


def explain(error: OSError) -> str:
    """Return an operating system error as text: the reason, the file, and advice."""
    reason = error.strerror or str(error)
    named = isinstance(error.filename, (str, bytes))  # not a descriptor, such as os.listdir's
    file = f": {error.filename!r}" if named else ""
    advice = _ADVICE.get(error.errno or 0)
    if error.errno == errno.ENOSPC and isinstance(error.filename, str) and space.has_no_inodes(error.filename):
        reason = "the file system has no free inodes"
        advice = "delete some files there (`cachedb gc` may help) and try again"
    if error.errno == errno.EFBIG and (limit := space.file_size_limit()) is not None:
        advice = f"this process may write files of {limit} bytes at most: raise the limit (`ulimit -f`)"
    return f"{reason}{file}" + (f": {advice}" if advice else "")
