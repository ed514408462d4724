"""Offer the tables of the index under their public name; see `cachedb.index.tables`."""

from cachedb.index.tables import *  # noqa: F403
from cachedb.index.tables import __all__ as __all__
