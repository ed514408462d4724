"""Offer the ORM classes of the index publicly; see `cachedb.index.models` and `cachedb.index.views`."""

from cachedb.index.models import *  # noqa: F403
from cachedb.index.models import __all__ as _tables
from cachedb.index.views import *  # noqa: F403
from cachedb.index.views import __all__ as _views

__all__ = [*_tables, *_views]
