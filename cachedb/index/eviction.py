"""Rank the images that an eviction may remove, and measure what the removal of each frees.

A blob dies with the last of the images that have it. So its bytes count for the image with the highest place among
them. They count for none if one of these images stays, or if a hold or a process has a lease on the blob.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import datetime
from functools import cache
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    CTE,
    ColumnElement,
    Connection,
    Select,
    and_,
    bindparam,
    case,
    except_,
    func,
    literal,
    or_,
    select,
)

from cachedb.index.holds import is_id
from cachedb.index.lifetimes import is_expired, is_pinned
from cachedb.index.tables import BLOBS, HOLDS, IMAGE_BLOBS, IMAGES, LEASES
from cachedb.oci.digests import Digest
from cachedb.oci.names import Name

__all__ = [
    "EXPIRED",
    "HELD",
    "IN_USE",
    "PINNED",
    "RECENT",
    "Mark",
    "RankedImage",
    "Rules",
    "are_among",
    "find_removable",
    "is_among_newest",
    "rank_images",
    "read_contents",
    "read_mark",
    "read_sizes",
    "read_users",
    "sum_kept",
    "sum_stored",
    "sum_unleased_garbage",
]


PINNED, HELD, IN_USE, RECENT = -3, -2, -1, 0
"""What keeps an image, if no rule does: a pin, a hold, a lease of a process, or a use a moment ago."""
EXPIRED = 0
"""The rule that removes images whose lifetime has ended; it comes before the rules of a policy."""

_NEVER: Final = 1 << 62  # the place of an image that stays
_UNKEPT: Final = 1 << 32  # more than the number of any rule


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


class RankedImage(NamedTuple):
    """An image that can be removed, in the order of removal."""

    id: int
    name: Name
    digest: Digest
    last_used_at: datetime
    rule: int | None  # None: only a limit removes it
    freed_size: int  # bytes that its removal frees, after the removals before it
    total_freed_size: int  # bytes that all removals up to and with it free


# Conditions


def are_among(column: ColumnElement[Any], values: Iterable[object]) -> ColumnElement[bool]:
    """Return the condition that a column has one of the values; there may be any number of them."""
    return column.in_(select(func.json_each(json.dumps(list(values))).table_valued("value").c.value))


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


def rank_images(connection: Connection, rules: Rules, needed_size: int) -> list[RankedImage]:
    """Return the images to remove in their order: those that a rule removes, then the least recently used.

    Images that no rule removes follow only until all removals free the needed bytes.

    Args:
        connection: to the index.
        rules: what keeps and removes images.
        needed_size: bytes to free; 0 removes only what rules remove.
    """
    marked = _mark(rules)
    is_candidate: ColumnElement[bool] = marked.c.kept_by.is_(None)
    if needed_size <= 0:
        is_candidate = and_(is_candidate, marked.c.rule.is_not(None))
    order = [is_candidate.desc(), func.coalesce(marked.c.rule, _UNKEPT), marked.c.last_used_at, marked.c.id]
    place = case((is_candidate, func.row_number().over(order_by=order)), else_=literal(_NEVER))
    ranked = select(marked.c.id, marked.c.rule, place.label("place")).cte("ranked").prefix_with("MATERIALIZED")
    deaths = (
        select(IMAGE_BLOBS.c.blob_id, func.max(ranked.c.place).label("place"))
        .select_from(IMAGE_BLOBS.join(ranked, ranked.c.id == IMAGE_BLOBS.c.image_id))
        .group_by(IMAGE_BLOBS.c.blob_id)
        .having(func.max(ranked.c.place) < _NEVER)
        .subquery("deaths")
    )
    freed = (
        select(deaths.c.place, func.sum(BLOBS.c.size).label("size"))
        .select_from(deaths.join(BLOBS, BLOBS.c.id == deaths.c.blob_id))
        .where(BLOBS.c.stored_at.is_not(None), BLOBS.c.id.not_in(_select_leased_ids(rules)))
        .group_by(deaths.c.place)
        .cte("freed")
        .prefix_with("MATERIALIZED")
    )
    size = func.coalesce(freed.c.size, 0)
    running = (
        select(
            ranked.c.id,
            ranked.c.rule,
            ranked.c.place,
            size.label("size"),
            func.sum(size).over(order_by=ranked.c.place).label("total"),
        )
        .select_from(ranked.outerjoin(freed, freed.c.place == ranked.c.place))
        .where(ranked.c.place < _NEVER)
        .subquery("running")
    )
    query = (
        select(
            running.c.id,
            IMAGES.c.repository,
            IMAGES.c.reference,
            BLOBS.c.digest,
            IMAGES.c.last_used_at,
            running.c.rule,
            running.c.size,
            running.c.total,
        )
        .join(IMAGES, IMAGES.c.id == running.c.id)
        .join(BLOBS, BLOBS.c.id == IMAGES.c.manifest_id)
        .where(or_(running.c.rule.is_not(None), running.c.total - running.c.size < needed_size))
        .order_by(running.c.place)
    )
    return [
        RankedImage(image_id, Name(repository, reference), Digest(digest), *rest)
        for image_id, repository, reference, digest, *rest in connection.execute(query)
    ]


def read_mark(connection: Connection, rules: Rules, image_id: int) -> Mark:
    """Return what keeps an image and what would remove it."""
    marked = _mark(rules)
    query = select(marked.c.kept_by, marked.c.rule).where(marked.c.id == image_id)
    return Mark(*connection.execute(query).one())


# Contents


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


def read_users(connection: Connection, blob_ids: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield the ids of blobs, each with the id of an image that has it."""
    query = select(IMAGE_BLOBS.c.blob_id, IMAGE_BLOBS.c.image_id).where(are_among(IMAGE_BLOBS.c.blob_id, blob_ids))
    yield from connection.execute(query)


def read_sizes(connection: Connection, image_ids: Iterable[int]) -> dict[int, int]:
    """Return the bytes of the blobs of each image, as `ImageInfo.size` counts them."""
    wanted = func.json_each(json.dumps(sorted(image_ids))).table_valued("value")
    contents = select(IMAGE_BLOBS.c.blob_id).where(IMAGE_BLOBS.c.image_id == wanted.c.value).correlate(wanted)
    size = select(func.sum(BLOBS.c.size)).where(BLOBS.c.id.in_(contents)).correlate(wanted).scalar_subquery()
    return {image_id: size or 0 for image_id, size in connection.execute(select(wanted.c.value, size))}


# Sums


def sum_stored(connection: Connection) -> int:
    """Return the bytes of all stored blobs."""
    query = select(func.coalesce(func.sum(BLOBS.c.size), 0)).where(BLOBS.c.stored_at.is_not(None))
    return int(connection.execute(query).scalar_one())


def sum_unleased_garbage(connection: Connection, rules: Rules) -> int:
    """Return the bytes of the stored blobs that no image has and no live session or hold has a lease on."""
    # Both indexes are ordered by id, so SQLite reads each of them once from end to end.
    unused = except_(select(BLOBS.c.id.label("id")), select(IMAGE_BLOBS.c.blob_id)).order_by("id").subquery()
    query = (
        select(func.coalesce(func.sum(BLOBS.c.size), 0))
        .select_from(unused.join(BLOBS, BLOBS.c.id == unused.c.id))
        .where(BLOBS.c.stored_at.is_not(None), BLOBS.c.id.not_in(_select_leased_ids(rules)))
    )
    return int(connection.execute(query).scalar_one())


def sum_kept(connection: Connection, rules: Rules) -> dict[int, int]:
    """Return the bytes of stored blobs that stay when all images are removed that can be, by what keeps them.

    A blob that several kept images have counts once, for the first of what keeps them. `HELD` has the leased blobs of
    no kept image, too.
    """
    marked, leased = _mark(rules), _select_leased_ids(rules)
    kept_by = (
        select(IMAGE_BLOBS.c.blob_id, func.min(marked.c.kept_by).label("kept_by"))
        .select_from(IMAGE_BLOBS.outerjoin(marked, marked.c.id == IMAGE_BLOBS.c.image_id))
        .group_by(IMAGE_BLOBS.c.blob_id)
        .subquery()
    )
    reason = func.coalesce(kept_by.c.kept_by, HELD)
    query = (
        select(reason, func.sum(BLOBS.c.size))
        .select_from(BLOBS.outerjoin(kept_by, kept_by.c.blob_id == BLOBS.c.id))
        .where(BLOBS.c.stored_at.is_not(None), or_(kept_by.c.kept_by.is_not(None), BLOBS.c.id.in_(leased)))
        .group_by(reason)
    )
    return {int(number): int(size) for number, size in connection.execute(query)}


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
