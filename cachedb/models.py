"""The public name of the index's ORM models; see `cachedb.index.models`."""

from cachedb.index.models import *  # noqa: F403
from cachedb.index.models import __all__ as __all__
