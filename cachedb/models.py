"""Offer the ORM models of the index under their public name; see `cachedb.index.models`."""

from cachedb.index.models import *  # noqa: F403
from cachedb.index.models import __all__ as __all__
