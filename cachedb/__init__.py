"""A local cache of container images that many processes share, with an index in SQL.

    from cachedb import Cache

    with Cache.open() as cache:
        cache.cache_from_tar("app.tar")
        for image in cache.list_manifests():
            print(image.name, image.size)

`Cache` has every operation; what it raises is under `CacheError`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from cachedb.errors import (
    Busy,
    CacheError,
    CacheReplaced,
    DamagedIndex,
    DigestMismatch,
    IncompleteImage,
    InvalidArchive,
    InvalidDigest,
    InvalidManifest,
    InvalidName,
    InvalidQuery,
    InvalidRevision,
    NotACache,
    NotInCache,
    NotOurs,
    ReentrantCall,
    RegistryError,
    RegistryUnavailable,
    SchemaMismatch,
    StorageError,
)

if TYPE_CHECKING:
    from cachedb.activity import Activity, SessionInfo
    from cachedb.adopt import Adoption, LeftOut
    from cachedb.cache import Cache, Stats
    from cachedb.collection import Collected
    from cachedb.copy_cache import Copied
    from cachedb.folders import Leftover
    from cachedb.holds import HoldInfo
    from cachedb.images import BlobInfo, ImageInfo, PlatformInfo
    from cachedb.pull import Pulled
    from cachedb.push import Pushed
    from cachedb.query import Answer, View
    from cachedb.reference import Digest, Name
    from cachedb.usage import Share, Usage
    from cachedb.verify import Problem, Verification

__version__ = "0.1.0"

__all__ = [
    "Activity",
    "Adoption",
    "Answer",
    "BlobInfo",
    "Busy",
    "Cache",
    "CacheError",
    "CacheReplaced",
    "Collected",
    "Copied",
    "DamagedIndex",
    "Digest",
    "DigestMismatch",
    "HoldInfo",
    "ImageInfo",
    "IncompleteImage",
    "InvalidArchive",
    "InvalidDigest",
    "InvalidManifest",
    "InvalidName",
    "InvalidQuery",
    "InvalidRevision",
    "LeftOut",
    "Leftover",
    "Name",
    "NotACache",
    "NotInCache",
    "NotOurs",
    "PlatformInfo",
    "Problem",
    "Pulled",
    "Pushed",
    "ReentrantCall",
    "RegistryError",
    "RegistryUnavailable",
    "SchemaMismatch",
    "SessionInfo",
    "Share",
    "Stats",
    "StorageError",
    "Usage",
    "Verification",
    "View",
    "__version__",
]

# Imported when first asked for: `cachedb --help` must not wait for SQLAlchemy.
_HOMES = {
    "Activity": "cachedb.activity",
    "Adoption": "cachedb.adopt",
    "Answer": "cachedb.query",
    "BlobInfo": "cachedb.images",
    "Cache": "cachedb.cache",
    "Collected": "cachedb.collection",
    "Copied": "cachedb.copy_cache",
    "Digest": "cachedb.reference",
    "HoldInfo": "cachedb.holds",
    "ImageInfo": "cachedb.images",
    "LeftOut": "cachedb.adopt",
    "Leftover": "cachedb.folders",
    "Name": "cachedb.reference",
    "PlatformInfo": "cachedb.images",
    "Problem": "cachedb.verify",
    "Pulled": "cachedb.pull",
    "Pushed": "cachedb.push",
    "SessionInfo": "cachedb.activity",
    "Share": "cachedb.usage",
    "Stats": "cachedb.cache",
    "Usage": "cachedb.usage",
    "Verification": "cachedb.verify",
    "View": "cachedb.query",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
