"""Open the cache that a command uses."""

from __future__ import annotations

import gc as gc_
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pathlib import Path

    from cachedb.cache import Cache

__all__ = ["cache_directory", "open_cache", "open_cache_or_empty"]


def cache_directory() -> Path:
    """Return the directory given by --dir or CACHEDB_DIR, or the default."""
    from cachedb.disk.layout import choose_directory

    return choose_directory(click.get_current_context().find_root().params["directory"])


@contextmanager
def open_cache(*, create: bool = False, announce: bool = True, damaged: bool = False) -> Iterator[Cache]:
    """Open the cache of this command.

    Args:
        create: create the cache if there is none. A reading command never does: its directory may be mistyped.
        announce: say on stderr that the cache was created.
        damaged: open the cache even if its index is damaged.

    Raises:
        NotInCache: if there is no cache, and ``create`` is false.
    """
    import logging

    from cachedb.cache import Cache
    from cachedb.index.sqlite.revision import has_cache

    directory = cache_directory()
    is_new = create and not has_cache(directory)
    gc_.freeze()
    gc_.enable()
    # An interrupt while SQLAlchemy closes a connection is raised anyway, so hide the traceback that it also logs.
    logging.getLogger("sqlalchemy").addHandler(logging.NullHandler())
    with Cache.open(directory, create=create, damaged=damaged) as cache:
        if is_new and announce:
            click.echo(f"cachedb: created the cache {str(directory)!r}", err=True)
        yield cache


@contextmanager
def open_cache_or_empty() -> Iterator[Cache]:
    """Open the cache of this command; without one, open an empty one that is deleted after the block.

    It is for the commands that ask a registry, which work without a cache.
    """
    import tempfile

    from cachedb.cache import Cache
    from cachedb.index.sqlite.revision import has_cache

    if has_cache(cache_directory()):
        with open_cache() as cache:
            yield cache
        return
    with tempfile.TemporaryDirectory(prefix="cachedb-") as folder, Cache.open(folder) as cache:
        yield cache
