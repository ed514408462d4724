"""Choose as few of the ranked images as a limit requires."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sqlalchemy import Connection

from cachedb.index import eviction
from cachedb.index.eviction import RankedImage, Rules

__all__ = ["choose_least"]


_FIRST_CONTENTS, _MOST_CONTENTS = 50, 2000  # images whose blobs are read at a time


def choose_least(
    connection: Connection, rules: Rules, ranked: Sequence[RankedImage], needed_size: int
) -> list[RankedImage]:
    """Return the images without those that the needed bytes do not require; images of rules stay in the plan.

    The images are tried from the last to the first. One pass is enough: to keep an image takes at least as much from
    what may be kept as from what another image would free.
    """
    freed_sizes = [image.freed_size for image in ranked]
    spare_size = max(0, ranked[-1].total_freed_size - needed_size) if ranked else 0
    contents = _Contents(connection, rules, ranked)
    kept_places, kept_blobs = set[int](), set[int]()
    for place in reversed(range(len(ranked))):
        # Its own bytes are those of blobs that no later image has, so they are the least that it frees.
        if ranked[place].rule is not None or freed_sizes[place] > spare_size:
            continue
        blobs = [blob for blob in contents.read(place, spare_size) if blob.id not in kept_blobs]
        if (lost_size := sum(blob.size for blob in blobs)) <= spare_size:
            spare_size -= lost_size
            kept_places.add(place)
            for blob in blobs:
                kept_blobs.add(blob.id)
                freed_sizes[blob.last_place] -= blob.size
    if not kept_places:
        return list(ranked)
    chosen, total_size = [], 0
    for place, (image, freed_size) in enumerate(zip(ranked, freed_sizes, strict=True)):
        if place not in kept_places:
            total_size += freed_size
            chosen.append(RankedImage(*image[:-2], freed_size, total_size))
    return chosen


class _DyingBlob(NamedTuple):
    """A blob that the removal of all ranked images frees."""

    id: int
    size: int  # bytes
    last_place: int  # of the last image that has it


class _Contents:
    """The dying blobs of ranked images, read for many images at a time."""

    def __init__(self, connection: Connection, rules: Rules, ranked: Sequence[RankedImage]) -> None:
        self._connection, self._rules, self._ranked = connection, rules, ranked
        self._places = {image.id: place for place, image in enumerate(ranked)}
        self._last_places: dict[int, int | None] = {}  # by blob; None: another image keeps it
        self._found: dict[int, list[_DyingBlob]] = {}
        self._count = _FIRST_CONTENTS

    def read(self, place: int, spare_size: int) -> list[_DyingBlob]:
        """Return the dying blobs of the image at a place; also read those of images before it that may be kept."""
        if place not in self._found:
            places = []
            for earlier in range(place, -1, -1):
                image = self._ranked[earlier]
                if image.rule is None and image.freed_size <= spare_size:
                    places.append(earlier)
                if len(places) == self._count:
                    break
            self._count = min(2 * self._count, _MOST_CONTENTS)
            self._read_all(places)
        return self._found.pop(place)

    def _read_all(self, places: Sequence[int]) -> None:
        ids = [self._ranked[place].id for place in places]
        rows = list(eviction.read_contents(self._connection, self._rules, ids))
        self._find_last_places({blob_id for _, blob_id, _ in rows} - self._last_places.keys())
        self._found.update((place, []) for place in places)
        for image_id, blob_id, size in rows:
            last_place = self._last_places[blob_id]
            if last_place is not None:
                self._found[self._places[image_id]].append(_DyingBlob(blob_id, size, last_place))

    def _find_last_places(self, blob_ids: Iterable[int]) -> None:
        for blob_id, image_id in eviction.read_users(self._connection, blob_ids):
            place, last_place = self._places.get(image_id), self._last_places.get(blob_id, -1)
            self._last_places[blob_id] = None if place is None or last_place is None else max(place, last_place)
