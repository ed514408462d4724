"""Rank the images that an eviction may remove, and measure what the removal of each frees.

A blob dies with the last of the images that have it. So its bytes count for the image with the highest place among
them. They count for none if one of these images stays, or if a hold or a process has a lease on the blob.

`measure_blobs` reads all associations once. SQLite returns them in JSON arrays, because a row of a result costs ten
times as much as a number in an array.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import datetime
from functools import cache
from itertools import repeat
from typing import Any, Final, NamedTuple

from sqlalchemy import CTE, ColumnElement, Connection, Select, bindparam, case, func, select

from cachedb.index.holds import is_id
from cachedb.index.lifetimes import is_expired, is_pinned
from cachedb.index.sqlite.batches import are_among
from cachedb.index.tables import BLOBS, HOLDS, IMAGE_BLOBS, IMAGES, LEASES
from cachedb.oci.digests import Digest
from cachedb.oci.names import Name

__all__ = [
    "EXPIRED",
    "HELD",
    "IN_USE",
    "PINNED",
    "RECENT",
    "BlobSizes",
    "Details",
    "Mark",
    "Ranking",
    "Rules",
    "find_removable",
    "is_among_newest",
    "measure_blobs",
    "rank_images",
    "read_contents",
    "read_details",
    "read_mark",
]


PINNED, HELD, IN_USE, RECENT = -3, -2, -1, 0
"""What keeps an image, if no rule does: a pin, a hold, a lease of a process, or a use a moment ago."""
EXPIRED = 0
"""The rule that removes images whose lifetime has ended; it comes before the rules of a policy."""

_UNKEPT: Final = 1 << 32  # more than the number of any rule

# Instead of the place of an image, for blobs that no removal frees. Images that stay come after all others.
_STAYS: Final = 1 << 61  # minus the number of what keeps the image, so that the first of several comes last
_LEASED: Final = 1 << 60
_UNUSED: Final = -1

_BATCH_BLOBS: Final = 50_000  # whose associations are read at a time


class Rules(NamedTuple):
    """Conditions on the table of images, in the order of a policy; what keeps an image always wins."""

    keeps: Sequence[ColumnElement[bool]] = ()
    removes: Sequence[ColumnElement[bool]] = ()
    is_recent: ColumnElement[bool] | None = None  # keeps images that were used a moment ago
    spared: Collection[int] = ()  # ids of images that the caller works with; they count as in use
    dead_sessions: Collection[str] = ()  # sessions and holds whose leases have ended


class Mark(NamedTuple):
    """What keeps an image, and what would remove it."""

    kept_by: int | None  # the number of the first rule, from 1, or one of `PINNED` to `RECENT`
    rule: int | None  # the number of the first rule that removes it, from 1, or `EXPIRED`


class Ranking(NamedTuple):
    """The images that can be removed in their order: those that a rule removes, then the least recently used."""

    ids: list[int]
    rules: list[int | None]  # for each, the number of the first rule that removes it, from 1
    kept: dict[int, int]  # the other images, by id, with what keeps them: see `Mark`


class BlobSizes(NamedTuple):
    """The bytes of all stored blobs, each counted once."""

    freed: list[int]  # for each place of a ranking, by the removal of its image after those before it
    kept: dict[int, int]  # that no removal frees, by what keeps them: see `Mark`
    garbage: int  # that no image has, and on which no live session or hold has a lease
    last_places: dict[int, int]  # of the blobs that several images have

    @property
    def stored(self) -> int:
        """All of them."""
        return sum(self.freed) + sum(self.kept.values()) + self.garbage


class Details(NamedTuple):
    """What a plan says of an image."""

    name: Name
    digest: Digest
    last_used_at: datetime
    size: int  # bytes of its blobs, as `ImageInfo.size` counts them


# Conditions


def is_among_newest(count: int, conditions: Sequence[ColumnElement[bool]]) -> ColumnElement[bool]:
    """Return the condition that an image is one of the newest of its repository, among those with some conditions."""
    newest_first = (IMAGES.c.added_at.desc(), IMAGES.c.id.desc())
    place = func.row_number().over(partition_by=IMAGES.c.repository, order_by=newest_first)
    numbered = select(IMAGES.c.id, place.label("place")).where(*conditions).subquery()
    return IMAGES.c.id.in_(select(numbered.c.id).where(numbered.c.place <= count))


def _is_live(rules: Rules) -> list[ColumnElement[bool]]:
    return [~are_among(LEASES.c.session, rules.dead_sessions)] if rules.dead_sessions else []


def _select_leased_ids(rules: Rules, *conditions: ColumnElement[bool]) -> Select[int]:
    leases = select(BLOBS.c.id).join(LEASES, LEASES.c.digest == BLOBS.c.digest)
    return leases.where(*_is_live(rules), *conditions)


# Ranking


def _mark(rules: Rules) -> CTE:
    """Return the images, each with its `Mark`."""
    is_hold = LEASES.c.session.in_(select(HOLDS.c.id))
    kept: list[tuple[ColumnElement[bool], int]] = [
        (is_pinned(), PINNED),
        (IMAGES.c.manifest_id.in_(_select_leased_ids(rules, is_hold)), HELD),
        (IMAGES.c.manifest_id.in_(_select_leased_ids(rules, ~is_hold)), IN_USE),
        (are_among(IMAGES.c.id, rules.spared), IN_USE),
        *((condition, number) for number, condition in enumerate(rules.keeps, 1)),
    ]
    if rules.is_recent is not None:
        kept.append((rules.is_recent, RECENT))
    removed = [(condition, number) for number, condition in enumerate([is_expired(), *rules.removes], EXPIRED)]
    marked = select(
        IMAGES.c.id,
        IMAGES.c.last_used_at,
        case(*kept).label("kept_by"),
        case(*removed).label("rule"),
    )
    return marked.cte("marked").prefix_with("MATERIALIZED")


def rank_images(connection: Connection, rules: Rules) -> Ranking:
    """Return the images that can be removed, in their order."""
    marked = _mark(rules)
    order = func.coalesce(marked.c.rule, _UNKEPT), marked.c.last_used_at, marked.c.id
    ranking = Ranking([], [], {})
    for image_id, kept_by, rule in connection.execute(
        select(marked.c.id, marked.c.kept_by, marked.c.rule).order_by(*order)
    ).all():
        if kept_by is None:
            ranking.ids.append(image_id)
            ranking.rules.append(rule)
        else:
            ranking.kept[image_id] = kept_by
    return ranking


def read_mark(connection: Connection, rules: Rules, image_id: int) -> Mark:
    """Return what keeps an image and what would remove it."""
    marked = _mark(rules)
    query = select(marked.c.kept_by, marked.c.rule).where(marked.c.id == image_id)
    return Mark(*connection.execute(query).one())


# Blobs


def measure_blobs(connection: Connection, rules: Rules, ranking: Ranking) -> BlobSizes:
    """Return the bytes that removals in the order of a ranking free, and those that stay.

    A blob that several kept images have counts for the first of what keeps them. The blobs that only leases keep count
    as held.
    """
    places = {image_id: _STAYS - kept_by for image_id, kept_by in ranking.kept.items()}
    places.update((image_id, place) for place, image_id in enumerate(ranking.ids))
    leased = set(connection.execute(_select_leased_ids(rules)).scalars())
    sizes, last_places = defaultdict[int, int](int), dict[int, int]()
    for stored_sizes, blob_ids, image_ids in _read_associations(connection):
        last = dict.fromkeys(leased.intersection(stored_sizes), _LEASED)
        shared = set()
        # A collection does not free a blob that an image without a row has, in a damaged index.
        for blob_id, place in zip(blob_ids, map(places.get, image_ids, repeat(_LEASED)), strict=True):
            if blob_id not in last:
                last[blob_id] = place
            else:
                shared.add(blob_id)
                if place > last[blob_id]:
                    last[blob_id] = place
        for place, size in zip(map(last.get, stored_sizes, repeat(_UNUSED)), stored_sizes.values(), strict=True):
            sizes[place] += size
        last_places.update((blob_id, last[blob_id]) for blob_id in shared)
    freed = [sizes.pop(place, 0) for place in range(len(ranking.ids))]
    garbage, leased_size = sizes.pop(_UNUSED, 0), sizes.pop(_LEASED, 0)
    kept = {_STAYS - place: size for place, size in sizes.items()}
    if leased_size:
        kept[HELD] = kept.get(HELD, 0) + leased_size
    return BlobSizes(freed, kept, garbage, last_places)


def _read_associations(connection: Connection) -> Iterator[tuple[dict[int, int], list[int], list[int]]]:
    """Yield the sizes of some stored blobs, the ids of these and other blobs, and for each an image that has it."""
    after = -1
    while True:
        blobs = connection.execute(_select_blobs(), {"after": after}).one()
        if blobs.last is None:
            return
        stored_sizes = dict(zip(json.loads(blobs.ids), json.loads(blobs.sizes), strict=True))
        found = connection.execute(_select_associations(), {"after": after, "last": blobs.last}).one()
        yield stored_sizes, json.loads(found.blob_ids), json.loads(found.image_ids)
        after = blobs.last


@cache
def _select_blobs() -> Select[*tuple[Any, ...]]:
    stored = select(BLOBS.c.id, BLOBS.c.size).where(BLOBS.c.id > bindparam("after"), BLOBS.c.stored_at.is_not(None))
    some = stored.order_by(BLOBS.c.id).limit(_BATCH_BLOBS).subquery()
    ids, sizes = func.json_group_array(some.c.id), func.json_group_array(some.c.size)
    return select(ids.label("ids"), sizes.label("sizes"), func.max(some.c.id).label("last"))


@cache
def _select_associations() -> Select[*tuple[Any, ...]]:
    # The index of the associations by blob has both columns.
    return select(
        func.json_group_array(IMAGE_BLOBS.c.blob_id).label("blob_ids"),
        func.json_group_array(IMAGE_BLOBS.c.image_id).label("image_ids"),
    ).where(IMAGE_BLOBS.c.blob_id > bindparam("after"), IMAGE_BLOBS.c.blob_id <= bindparam("last"))


def read_contents(connection: Connection, rules: Rules, image_ids: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """Yield the stored blobs of images on which nothing has a lease: the image's id, the blob's id and its bytes."""
    query = (
        select(IMAGE_BLOBS.c.image_id, IMAGE_BLOBS.c.blob_id, BLOBS.c.size)
        .join(BLOBS, BLOBS.c.id == IMAGE_BLOBS.c.blob_id)
        .where(
            are_among(IMAGE_BLOBS.c.image_id, image_ids),
            BLOBS.c.stored_at.is_not(None),
            BLOBS.c.id.not_in(_select_leased_ids(rules)),
        )
        .distinct()
    )
    yield from connection.execute(query)


def read_details(connection: Connection, image_ids: Iterable[int]) -> dict[int, Details]:
    """Return the details of images, by id."""
    contents = select(IMAGE_BLOBS.c.blob_id).where(IMAGE_BLOBS.c.image_id == IMAGES.c.id).correlate(IMAGES)
    manifest = BLOBS.alias()
    size = select(func.sum(BLOBS.c.size)).where(BLOBS.c.id.in_(contents)).correlate(IMAGES).scalar_subquery()
    query = (
        select(IMAGES.c.id, IMAGES.c.repository, IMAGES.c.reference, manifest.c.digest, IMAGES.c.last_used_at, size)
        .join(manifest, manifest.c.id == IMAGES.c.manifest_id)
        .where(are_among(IMAGES.c.id, image_ids))
    )
    return {
        image_id: Details(Name(repository, reference), Digest(digest), last_used_at, size or 0)
        for image_id, repository, reference, digest, last_used_at, size in connection.execute(query).all()
    }


# Removing


def find_removable(connection: Connection, name: Name, digest: Digest, last_used_at: datetime) -> int | str:
    """Return the id of an image, or what forbids its removal, in the transaction that removes it.

    Args:
        connection: to the index, under the write lock.
        name: of the image.
        digest: of the manifest that it had when the removal was planned.
        last_used_at: its last use when the removal was planned.
    """
    row = connection.execute(_select_current(), name._asdict()).first()
    if row is None:
        return "no longer in the cache"
    image_id, current_digest, used_at, pinned, session = row
    if current_digest != digest:
        return "now another image"
    if used_at != last_used_at:
        return "used since the plan"
    if pinned:
        return "pinned"
    if session is not None:
        return "held" if is_id(session) else "in use"
    return int(image_id)


@cache
def _select_current() -> Select[*tuple[Any, ...]]:
    # Building a statement takes longer than executing it, and a removal executes this for each image.
    session = select(LEASES.c.session).where(LEASES.c.digest == BLOBS.c.digest).limit(1).scalar_subquery()
    return (
        select(IMAGES.c.id, BLOBS.c.digest, IMAGES.c.last_used_at, is_pinned(), session)
        .join(BLOBS, BLOBS.c.id == IMAGES.c.manifest_id)
        .where(IMAGES.c.repository == bindparam("repository"), IMAGES.c.reference == bindparam("reference"))
    )
