"""The cache that a command works on."""

from __future__ import annotations

import gc as gc_
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from cachedb.errors import (
    NotInCache,
)

if TYPE_CHECKING:
    from pathlib import Path

    from cachedb.cache import Cache


__all__ = ["cache_directory", "open_cache"]


def cache_directory() -> Path:
    """Return the directory that --dir or CACHEDB_DIR names, or the default."""
    from cachedb.disk.layout import chosen

    return chosen(click.get_current_context().find_root().params["directory"])


@contextmanager
def open_cache(*, damaged: bool = False, existing: bool = False) -> Iterator[Cache]:
    """Open the cache of this command; raise `NotInCache` if it must exist and does not."""
    import logging

    from cachedb.cache import Cache

    if existing and not any((cache_directory() / name).exists() for name in ("index.db", "blobs")):
        raise NotInCache(f"there is no cache in {str(cache_directory())!r}")
    gc_.freeze()
    gc_.enable()
    # SQLAlchemy logs an interrupt that comes while it closes a connection, with a traceback, and raises it as well.
    logging.getLogger("sqlalchemy").addHandler(logging.NullHandler())
    with Cache.open(cache_directory(), damaged=damaged) as cache:
        yield cache
