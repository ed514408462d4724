"""Choose as few of the ranked images as a limit requires."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from sqlalchemy import Connection

from cachedb.index import eviction
from cachedb.index.eviction import BlobSizes, Ranking, Rules

__all__ = ["ChosenImage", "choose_least"]


_FIRST_CONTENTS, _MOST_CONTENTS = 50, 2000  # images whose blobs are read at a time


class ChosenImage(NamedTuple):
    """An image to remove."""

    id: int
    rule: int | None  # None: only a limit removes it
    freed_size: int  # bytes that its removal frees, after the removals before it
    total_freed_size: int  # bytes that all removals up to and with it free


def choose_least(
    connection: Connection, rules: Rules, ranking: Ranking, sizes: BlobSizes, needed_size: int
) -> list[ChosenImage]:
    """Return the images that rules remove, and those that the needed bytes require, in the order of the ranking.

    The first images that free enough are tried from the last to the first. One pass is enough: to keep an image takes
    at least as much from what may be kept as from what another image would free.

    Args:
        connection: to the index.
        rules: those of the ranking.
        ranking: the images.
        sizes: what their removals free.
        needed_size: bytes to free; 0 removes only what rules remove.
    """
    count, total_size = _count_first(ranking, sizes.freed, needed_size)
    freed_sizes = sizes.freed[:count]
    spare_size = max(0, total_size - needed_size)
    contents = _Contents(connection, rules, ranking, sizes, count)
    kept_places, kept_blobs = set[int](), set[int]()
    for place in reversed(range(count)):
        # Its own bytes are those of blobs that no later image has, so they are the least that it frees.
        if ranking.rules[place] is not None or freed_sizes[place] > spare_size:
            continue
        blobs = [blob for blob in contents.read(place, spare_size) if blob.id not in kept_blobs]
        if (lost_size := sum(blob.size for blob in blobs)) <= spare_size:
            spare_size -= lost_size
            kept_places.add(place)
            for blob in blobs:
                kept_blobs.add(blob.id)
                freed_sizes[blob.last_place] -= blob.size
    chosen = [place for place in range(count) if place not in kept_places]
    totals = accumulate(freed_sizes[place] for place in chosen)
    return [
        ChosenImage(ranking.ids[place], ranking.rules[place], freed_sizes[place], total)
        for place, total in zip(chosen, totals, strict=True)
    ]


def _count_first(ranking: Ranking, freed_sizes: Sequence[int], needed_size: int) -> tuple[int, int]:
    """Return the number of images up to the one that reaches the needed bytes, and the bytes that these free."""
    total_size = 0
    for place, (rule, freed_size) in enumerate(zip(ranking.rules, freed_sizes, strict=True)):
        if rule is None and total_size >= needed_size:
            return place, total_size
        total_size += freed_size
    return len(ranking.ids), total_size


class _DyingBlob(NamedTuple):
    """A blob that the removal of all tried images frees."""

    id: int
    size: int  # bytes
    last_place: int  # of the last image that has it


class _Contents:
    """The dying blobs of the first images of a ranking, read for many images at a time."""

    def __init__(self, connection: Connection, rules: Rules, ranking: Ranking, sizes: BlobSizes, count: int) -> None:
        self._connection, self._rules, self._ranking = connection, rules, ranking
        self._sizes, self._count = sizes, count
        self._found: dict[int, list[_DyingBlob]] = {}  # by place
        self._most = _FIRST_CONTENTS

    def read(self, place: int, spare_size: int) -> list[_DyingBlob]:
        """Return the dying blobs of the image at a place; also read those of images before it that may be kept."""
        if place not in self._found:
            places = []
            for earlier in range(place, -1, -1):
                if self._ranking.rules[earlier] is None and self._sizes.freed[earlier] <= spare_size:
                    places.append(earlier)
                if len(places) == self._most:
                    break
            self._most = min(2 * self._most, _MOST_CONTENTS)
            self._read_all(places)
        return self._found.pop(place)

    def _read_all(self, places: Sequence[int]) -> None:
        self._found.update((place, []) for place in places)
        places_by_id = {self._ranking.ids[place]: place for place in places}
        for image_id, blob_id, size in eviction.read_contents(self._connection, self._rules, places_by_id):
            place = places_by_id[image_id]
            last_place = self._sizes.last_places.get(blob_id, place)
            if last_place < self._count:  # otherwise an image that stays has it
                self._found[place].append(_DyingBlob(blob_id, size, last_place))
