"""Choose as few of the ranked images as a limit requires.

A blob is freed when the last image that has it is removed. So its bytes count for the image with the highest place in
the ranking. They count for no image if one of the images stays, or if a hold or a process has a lease on the blob.

The images are read in the order of the ranking, until they free enough. So a plan costs as much as it removes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import accumulate
from typing import Final, NamedTuple

from sqlalchemy import Connection

from cachedb.index import eviction
from cachedb.index.eviction import Ranking, Rules

__all__ = ["ChosenImage", "choose_least"]


_FIRST_IMAGES, _MOST_IMAGES = 50, 2000  # images to read at a time: at first, and at most
_STAYS: Final = sys.maxsize  # instead of a place: the blob is not freed


class ChosenImage(NamedTuple):
    """An image to remove."""

    id: int
    rule: int | None  # None: only a limit removes it
    freed_size: int  # bytes that its removal frees, after the removals before it
    total_freed_size: int  # bytes that all removals up to and with it free


def choose_least(connection: Connection, rules: Rules, ranking: Ranking, needed_size: int) -> list[ChosenImage]:
    """Return the images that rules remove, and as few others as free the needed bytes, as ranked.

    The first images that free enough are candidates. From the last to the first, an image is kept if the others still
    free enough. One pass is enough: a kept image lowers the bytes to spare by at least as much as it lowers what any
    other image frees. So an image that could not be kept before cannot be kept later.

    Args:
        connection: to the index.
        rules: those of the ranking.
        ranking: the images.
        needed_size: bytes to free; 0 removes only what rules remove.
    """
    contents = _Contents(connection, rules, ranking)
    count = total_size = 0
    while count < len(ranking.ids) and (ranking.rules[count] is not None or total_size < needed_size):
        total_size += contents.measure(count)
        count += 1
    freed_sizes = contents.freed_sizes[:count]
    spare_size = max(0, total_size - needed_size)
    kept_places, kept_blobs = set[int](), set[int]()
    for place in reversed(range(count)):
        # An image frees at least the blobs that no later image has: its own freed size.
        if ranking.rules[place] is not None or freed_sizes[place] > spare_size:
            continue
        sizes = {blob_id: size for blob_id, size in contents.list_dying(place, count) if blob_id not in kept_blobs}
        if (lost_size := sum(sizes.values())) <= spare_size:
            spare_size -= lost_size
            kept_places.add(place)
            kept_blobs.update(sizes)
            for blob_id, size in sizes.items():
                freed_sizes[contents.last_places[blob_id]] -= size
    chosen = [place for place in range(count) if place not in kept_places]
    totals = accumulate(freed_sizes[place] for place in chosen)
    return [
        ChosenImage(ranking.ids[place], ranking.rules[place], freed_sizes[place], total)
        for place, total in zip(chosen, totals, strict=True)
    ]


class _Contents:
    """The stored blobs of the first images of a ranking, read for many images at a time."""

    def __init__(self, connection: Connection, rules: Rules, ranking: Ranking) -> None:
        self.freed_sizes: list[int] = []  # for each place, the bytes of the blobs that its image is the last to have
        self.last_places: dict[int, int] = {}  # for each blob, the highest place of its images, or `_STAYS`
        self._connection, self._ranking = connection, ranking
        self._leased = eviction.read_leased_sizes(connection, rules)
        self._places = {image_id: place for place, image_id in enumerate(ranking.ids)}
        self._sizes: list[dict[int, int]] = []  # by place, the bytes of each blob; empty if a rule removes the image
        self._count = _FIRST_IMAGES  # to read next

    def measure(self, place: int) -> int:
        """Return the bytes that the removal of the image at a place frees, after all before it."""
        if place == len(self.freed_sizes):
            self._read_more()
        return self.freed_sizes[place]

    def list_dying(self, place: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield the blobs of an image, with their bytes, that the removal of ``count`` images frees."""
        return ((blob_id, size) for blob_id, size in self._sizes[place].items() if self.last_places[blob_id] < count)

    def _read_more(self) -> None:
        start = len(self.freed_sizes)
        contents = eviction.read_contents(self._connection, self._ranking.ids[start : start + self._count])
        self._find_last_places(set[int]().union(*contents.values()).difference(self.last_places))
        for place, sizes in enumerate(contents.values(), start):
            dying = [blob_id for blob_id in sizes if self.last_places[blob_id] == place]
            self.freed_sizes.append(sum(map(sizes.__getitem__, dying)))
            if self._ranking.rules[place] is None:
                self._sizes.append(sizes)
            else:  # this image is never kept, and no later image has these blobs
                self._sizes.append({})
                for blob_id in dying:
                    del self.last_places[blob_id]
        self._count = min(2 * self._count, _MOST_IMAGES)

    def _find_last_places(self, blob_ids: set[int]) -> None:
        last_places = dict.fromkeys(blob_ids, -1)
        for blob_id, image_id in eviction.read_images(self._connection, blob_ids):
            # In a damaged index, a blob may belong to an image without a row. A collection does not free it.
            place = self._places.get(image_id, _STAYS)
            if place > last_places[blob_id]:
                last_places[blob_id] = place
        last_places.update(dict.fromkeys(blob_ids & self._leased.keys(), _STAYS))
        self.last_places.update(last_places)
