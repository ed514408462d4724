"""The public name of the index's tables; see `cachedb.index.tables`."""

from cachedb.index.tables import *  # noqa: F403
from cachedb.index.tables import __all__ as __all__
