"""A local cache of container images that many processes share, with an index in SQL.

    from cachedb import Cache

    with Cache.open() as cache:
        cache.cache_from_tar("app.tar")
        for image in cache.list_manifests():
            print(image.name, image.size)

`Cache` has a method for every operation. Its errors are subclasses of `CacheError`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from cachedb import errors
from cachedb.errors import *  # noqa: F403

if TYPE_CHECKING:
    from cachedb.cache import Cache as Cache
    from cachedb.content.collect import Collected as Collected
    from cachedb.content.collect import Removed as Removed
    from cachedb.disk.folders import Leftover as Leftover
    from cachedb.disk.writer import Data as Data
    from cachedb.index.filters import Filters as Filters
    from cachedb.index.holds import HoldInfo as HoldInfo
    from cachedb.index.records import BlobDetails as BlobDetails
    from cachedb.index.records import BlobInfo as BlobInfo
    from cachedb.index.records import BlobUse as BlobUse
    from cachedb.index.records import ImageDetails as ImageDetails
    from cachedb.index.records import ImageInfo as ImageInfo
    from cachedb.index.records import ImportedImage as ImportedImage
    from cachedb.index.records import PlatformInfo as PlatformInfo
    from cachedb.index.sqlite.query import Answer as Answer
    from cachedb.oci.digests import Digest as Digest
    from cachedb.oci.names import Name as Name
    from cachedb.operations.adopt import Adoption as Adoption
    from cachedb.operations.copy import Copied as Copied
    from cachedb.operations.inspect import RemoteBlob as RemoteBlob
    from cachedb.operations.inspect import RemoteImage as RemoteImage
    from cachedb.operations.inspect import RemotePlatform as RemotePlatform
    from cachedb.operations.plan import Explanation as Explanation
    from cachedb.operations.plan import Plan as Plan
    from cachedb.operations.plan import PlannedImage as PlannedImage
    from cachedb.operations.policy import Keep as Keep
    from cachedb.operations.policy import Limits as Limits
    from cachedb.operations.policy import Policy as Policy
    from cachedb.operations.policy import Remove as Remove
    from cachedb.operations.prune import Pruned as Pruned
    from cachedb.operations.prune import SkippedImage as SkippedImage
    from cachedb.operations.pull import Pulled as Pulled
    from cachedb.operations.pull import PullPlan as PullPlan
    from cachedb.operations.push import Pushed as Pushed
    from cachedb.operations.verify import Problem as Problem
    from cachedb.operations.verify import Verification as Verification
    from cachedb.progress import BlobProgress as BlobProgress
    from cachedb.progress import Progress as Progress
    from cachedb.reports.sessions import Activity as Activity
    from cachedb.reports.sessions import SessionInfo as SessionInfo
    from cachedb.reports.usage import ImageUsage as ImageUsage
    from cachedb.reports.usage import SelectedUsage as SelectedUsage
    from cachedb.reports.usage import Share as Share
    from cachedb.reports.usage import Stats as Stats
    from cachedb.reports.usage import Usage as Usage
    from cachedb.reports.views import View as View
    from cachedb.transports.json_cache import LeftOut as LeftOut

__version__ = "0.1.0"

_MODULES = {
    "Activity": "cachedb.reports.sessions",
    "Adoption": "cachedb.operations.adopt",
    "Answer": "cachedb.index.sqlite.query",
    "BlobDetails": "cachedb.index.records",
    "BlobInfo": "cachedb.index.records",
    "BlobProgress": "cachedb.progress",
    "BlobUse": "cachedb.index.records",
    "Cache": "cachedb.cache",
    "Collected": "cachedb.content.collect",
    "Copied": "cachedb.operations.copy",
    "Data": "cachedb.disk.writer",
    "Digest": "cachedb.oci.digests",
    "Explanation": "cachedb.operations.plan",
    "Filters": "cachedb.index.filters",
    "HoldInfo": "cachedb.index.holds",
    "ImageDetails": "cachedb.index.records",
    "ImageInfo": "cachedb.index.records",
    "ImageUsage": "cachedb.reports.usage",
    "ImportedImage": "cachedb.index.records",
    "Keep": "cachedb.operations.policy",
    "LeftOut": "cachedb.transports.json_cache",
    "Leftover": "cachedb.disk.folders",
    "Limits": "cachedb.operations.policy",
    "Name": "cachedb.oci.names",
    "Plan": "cachedb.operations.plan",
    "PlannedImage": "cachedb.operations.plan",
    "PlatformInfo": "cachedb.index.records",
    "Policy": "cachedb.operations.policy",
    "Problem": "cachedb.operations.verify",
    "Progress": "cachedb.progress",
    "Pruned": "cachedb.operations.prune",
    "PullPlan": "cachedb.operations.pull",
    "Pulled": "cachedb.operations.pull",
    "Pushed": "cachedb.operations.push",
    "RemoteBlob": "cachedb.operations.inspect",
    "RemoteImage": "cachedb.operations.inspect",
    "RemotePlatform": "cachedb.operations.inspect",
    "Remove": "cachedb.operations.policy",
    "Removed": "cachedb.content.collect",
    "SelectedUsage": "cachedb.reports.usage",
    "SessionInfo": "cachedb.reports.sessions",
    "Share": "cachedb.reports.usage",
    "SkippedImage": "cachedb.operations.prune",
    "Stats": "cachedb.reports.usage",
    "Usage": "cachedb.reports.usage",
    "Verification": "cachedb.operations.verify",
    "View": "cachedb.reports.views",
}
"""The module of each name that is imported at first use: `cachedb --help` needs no SQLAlchemy."""

__all__ = [*errors.__all__, *_MODULES, "__version__"]

if not TYPE_CHECKING:  # hidden from type checkers, so that a misspelt name is an error for them

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)

    def __dir__() -> list[str]:
        return sorted(__all__)
