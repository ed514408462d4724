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
    from cachedb.cache import Cache
    from cachedb.content.collect import Collected
    from cachedb.disk.folders import Leftover
    from cachedb.index.holds import HoldInfo
    from cachedb.index.images import BlobInfo, ImageInfo, PlatformInfo
    from cachedb.index.sqlite.query import Answer
    from cachedb.oci.digests import Digest
    from cachedb.oci.names import Name
    from cachedb.operations.adopt import Adoption
    from cachedb.operations.copy import Copied
    from cachedb.operations.pull import Pulled
    from cachedb.operations.push import Pushed
    from cachedb.operations.verify import Problem, Verification
    from cachedb.reports.sessions import Activity, SessionInfo
    from cachedb.reports.usage import Share, Stats, Usage
    from cachedb.reports.views import View
    from cachedb.transports.json_cache import LeftOut

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
    "Activity": "cachedb.reports.sessions",
    "Adoption": "cachedb.operations.adopt",
    "Answer": "cachedb.index.sqlite.query",
    "BlobInfo": "cachedb.content.save",
    "Cache": "cachedb.cache",
    "Collected": "cachedb.content.collect",
    "Copied": "cachedb.operations.copy",
    "Digest": "cachedb.oci.names",
    "HoldInfo": "cachedb.index.holds",
    "ImageInfo": "cachedb.content.save",
    "LeftOut": "cachedb.operations.adopt",
    "Leftover": "cachedb.disk.folders",
    "Name": "cachedb.oci.names",
    "PlatformInfo": "cachedb.content.save",
    "Problem": "cachedb.operations.verify",
    "Pulled": "cachedb.operations.pull",
    "Pushed": "cachedb.operations.push",
    "SessionInfo": "cachedb.reports.sessions",
    "Share": "cachedb.reports.usage",
    "Stats": "cachedb.cache",
    "Usage": "cachedb.reports.usage",
    "Verification": "cachedb.operations.verify",
    "View": "cachedb.index.sqlite.query",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
