"""Open the cache that a command uses."""

from __future__ import annotations

import gc as gc_
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from cachedb.errors import NotInCache

if TYPE_CHECKING:
    from pathlib import Path

    from cachedb.cache import Cache

__all__ = ["cache_directory", "open_cache"]


def cache_directory() -> Path:
    """Return the directory given by --dir or CACHEDB_DIR, or the default."""
    from cachedb.disk.layout import choose_directory

    return choose_directory(click.get_current_context().find_root().params["directory"])


@contextmanager
def open_cache(*, damaged: bool = False, existing: bool = False) -> Iterator[Cache]:
    """Open the cache of this command.

    Args:
        damaged: open the cache even if its index is damaged.
        existing: raise an error instead of creating a cache.

    Raises:
        NotInCache: if ``existing`` is set and there is no cache.
    """
    import logging

    from cachedb.cache import Cache

    if existing and not any((cache_directory() / name).exists() for name in ("index.db", "blobs")):
        raise NotInCache(f"there is no cache in {str(cache_directory())!r}: check --dir and CACHEDB_DIR")
    gc_.freeze()
    gc_.enable()
    # An interrupt while SQLAlchemy closes a connection is raised anyway, so hide the traceback that it also logs.
    logging.getLogger("sqlalchemy").addHandler(logging.NullHandler())
    with Cache.open(cache_directory(), damaged=damaged) as cache:
        yield cache
