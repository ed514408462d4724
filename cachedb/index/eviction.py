"""Rank the images that an eviction may remove, and read their blobs and details.

SQLite returns long lists of numbers in JSON arrays. A row of a result costs ten times as much as a number in an array.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import datetime
from functools import cache
from typing import Any, Final, NamedTuple

from sqlalchemy import CTE, ColumnElement, Connection, Select, bindparam, case, except_, func, select

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
    "BlobTotals",
    "Details",
    "Mark",
    "Ranking",
    "Rules",
    "find_removable",
    "is_among_newest",
    "rank_images",
    "read_contents",
    "read_details",
    "read_images",
    "read_leased_sizes",
    "read_mark",
    "sum_blobs",
]


PINNED, HELD, IN_USE, RECENT = -3, -2, -1, 0
"""What keeps an image that no rule keeps: a pin, a hold, a lease of a process, or a recent use."""
EXPIRED = 0
"""The rule that removes images whose lifetime has ended; it comes before the rules of a policy."""

_UNKEPT: Final = 1 << 32  # more than the number of any rule


class Rules(NamedTuple):
    """Conditions on the table of images, in the order of a policy; a condition that keeps always wins."""

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
    """The images that can be removed, in order: those that a rule removes, then the least recently used."""

    ids: list[int]
    rules: list[int | None]  # for each, the number of the first rule that removes it, from 1
    kept: dict[int, int]  # the other images, by id, with what keeps them: see `Mark`
    recent: list[int]  # ids of kept images that a rule would remove, but that were used a moment ago


class BlobTotals(NamedTuple):
    """The bytes of all stored blobs, and of those that a collection frees."""

    stored_size: int
    garbage_size: int  # bytes of blobs of no image, on which no live session or hold has a lease


class Details(NamedTuple):
    """What a plan says about an image."""

    name: Name
    digest: Digest
    last_used_at: datetime
    size: int  # bytes of its blobs, as `ImageInfo.size` counts them


# Conditions


def is_among_newest(count: int, conditions: Sequence[ColumnElement[bool]]) -> ColumnElement[bool]:
    """Return the condition that an image is one of the newest of its repository that meet conditions."""
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
    ranking = Ranking([], [], {}, [])
    for image_id, kept_by, rule in connection.execute(
        select(marked.c.id, marked.c.kept_by, marked.c.rule).order_by(*order)
    ).all():
        if kept_by is None:
            ranking.ids.append(image_id)
            ranking.rules.append(rule)
        else:
            ranking.kept[image_id] = kept_by
            if kept_by == RECENT and rule is not None:
                ranking.recent.append(image_id)
    return ranking


def read_mark(connection: Connection, rules: Rules, image_id: int) -> Mark:
    """Return what keeps an image and what would remove it."""
    marked = _mark(rules)
    query = select(marked.c.kept_by, marked.c.rule).where(marked.c.id == image_id)
    return Mark(*connection.execute(query).one())


# Blobs


def read_leased_sizes(connection: Connection, rules: Rules) -> dict[int, int]:
    """Return the bytes of the stored blobs on which a live session or a hold has a lease, by id."""
    leased = select(BLOBS.c.id, BLOBS.c.size).where(BLOBS.c.id.in_(_select_leased_ids(rules)))
    return {row.id: row.size for row in connection.execute(leased.where(BLOBS.c.stored_at.is_not(None)))}


def sum_blobs(connection: Connection, rules: Rules) -> BlobTotals:
    """Return the bytes of all stored blobs, and of the garbage among them."""
    size = func.coalesce(func.sum(BLOBS.c.size), 0)
    stored = select(size).where(BLOBS.c.stored_at.is_not(None))
    # All three tables are ordered by id, so SQLite reads each from end to end, without look-ups.
    unused = (
        except_(select(BLOBS.c.id), select(IMAGE_BLOBS.c.blob_id), _select_leased_ids(rules)).order_by("id").subquery()
    )
    garbage = select(size).join_from(unused, BLOBS, BLOBS.c.id == unused.c.id).where(BLOBS.c.stored_at.is_not(None))
    return BlobTotals(connection.execute(stored).scalar_one(), connection.execute(garbage).scalar_one())


def read_contents(connection: Connection, image_ids: Iterable[int]) -> dict[int, dict[int, int]]:
    """Return the stored blobs of images: for each image, the bytes of each blob by id."""
    contents: dict[int, dict[int, int]] = {image_id: {} for image_id in image_ids}
    columns = IMAGE_BLOBS.c.image_id, IMAGE_BLOBS.c.blob_id, BLOBS.c.size
    query = (
        select(*map(func.json_group_array, columns))
        .join_from(IMAGE_BLOBS, BLOBS, BLOBS.c.id == IMAGE_BLOBS.c.blob_id)
        .where(are_among(IMAGE_BLOBS.c.image_id, contents), BLOBS.c.stored_at.is_not(None))
    )
    for image_id, blob_id, size in zip(*map(json.loads, connection.execute(query).one()), strict=True):
        contents[image_id][blob_id] = size
    return contents


def read_images(connection: Connection, blob_ids: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield the images that have blobs: for each association, the blob's id and the image's."""
    columns = IMAGE_BLOBS.c.blob_id, IMAGE_BLOBS.c.image_id
    query = select(*map(func.json_group_array, columns)).where(are_among(IMAGE_BLOBS.c.blob_id, blob_ids))
    return zip(*map(json.loads, connection.execute(query).one()), strict=True)


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
    """Return the id of an image to remove, or why it must not be removed.

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
