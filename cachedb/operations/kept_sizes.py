"""Sum the bytes that a prune cannot free, by what keeps them."""

from __future__ import annotations

from collections import defaultdict
from typing import Final

from sqlalchemy import Connection

from cachedb.index import eviction
from cachedb.index.eviction import HELD, Ranking, Rules
from cachedb.index.sqlite.batches import split_batches

__all__ = ["sum_kept"]


_MOST_IMAGES: Final = 2000  # images whose blobs are read at a time


def sum_kept(connection: Connection, rules: Rules, ranking: Ranking) -> dict[int, int]:
    """Return the bytes that no removal frees, by the mark of what keeps them: see `eviction.Mark`.

    A blob of several kept images counts once, for the lowest of their marks. A blob that only a lease keeps counts as
    held.

    Args:
        connection: to the index.
        rules: those of the ranking.
        ranking: tells which images stay.
    """
    sizes = defaultdict[int, int](int)
    image_ids = defaultdict[int, list[int]](list)
    for image_id, kept_by in ranking.kept.items():
        image_ids[kept_by].append(image_id)
    counted = set[int]()
    for kept_by in sorted(image_ids):
        for part in split_batches(image_ids[kept_by], _MOST_IMAGES):
            for contents in eviction.read_contents(connection, part).values():
                sizes[kept_by] += sum(size for blob_id, size in contents.items() if blob_id not in counted)
                counted.update(contents)
    leased = eviction.read_leased_sizes(connection, rules)
    sizes[HELD] += sum(size for blob_id, size in leased.items() if blob_id not in counted)
    return {kept_by: size for kept_by, size in sizes.items() if size}
