"""Prune a cache: plan which images to remove, explain it, and remove only what was planned.

A plan is made in one transaction and without a lock. Its bytes are exact: they are those that the files in ``blobs/``
lose. A removal checks each image again under the write lock, and skips what has changed since the plan.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, and_, or_, select

from cachedb.arguments import check_positive
from cachedb.content import collect
from cachedb.content.collect import Collected
from cachedb.content.session import lock_path
from cachedb.disk import locks, single_flight
from cachedb.disk.downloads import sum_stale_downloads
from cachedb.disk.sizes import measure_file_system, measure_files
from cachedb.errors import InvalidPolicy
from cachedb.index import eviction, holds, images
from cachedb.index.eviction import RankedImage, Rules
from cachedb.index.filters import (
    Filters,
    build_conditions,
    complete_name,
    is_like,
    is_pattern,
    is_repository_like,
    subtract_seconds,
)
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.query import run_query
from cachedb.index.tables import IMAGES
from cachedb.oci.digests import Digest
from cachedb.oci.names import Name
from cachedb.operations.policy import EXPRESSION, Keep, Limits, Policy, Remove
from cachedb.progress import Progress, sum_progress

__all__ = [
    "RECENT_SECONDS",
    "Explanation",
    "KeptImage",
    "Plan",
    "PlannedImage",
    "Pruned",
    "apply_plan",
    "check_arguments",
    "explain",
    "make_plan",
    "prune",
]


RECENT_SECONDS = 600.0
"""An image that was used in so many seconds is kept, unless a rule of the policy says ``used-within``."""

_BATCH_SECONDS = 0.05  # of removing images under one write lock
_QUERY_SECONDS = 60.0  # that a query of a rule may take
_FIRST_CONTENTS, _MOST_CONTENTS = 50, 2000  # images whose blobs are read at a time
_REASONS = {
    eviction.HELD: "held",
    eviction.IN_USE: "in use",
    eviction.RECENT: f"used within {RECENT_SECONDS / 60:g} minutes",
}


class PlannedImage(NamedTuple):
    """An image that a plan removes."""

    name: Name
    digest: Digest  # of its manifest or index
    last_used_at: datetime  # UTC
    size: int  # bytes of its blobs
    freed_size: int  # bytes that its removal frees, after the removals before it
    total_freed_size: int  # bytes that the plan frees up to and with it
    rule: str  # ``remove 2`` for the second rule that removes, or the limit: ``max-size``, ``min-free`` or ``to-free``


class KeptImage(NamedTuple):
    """An image that is not removed, and why."""

    name: Name
    reason: str  # such as ``used since the plan``, ``now another image`` or ``held``


class Plan(NamedTuple):
    """What a prune removes."""

    images: list[PlannedImage]  # in the order of removal
    freed_size: int  # bytes that the images free
    needed_size: int  # bytes that the limits require to free, garbage included; 0 without limits
    garbage_size: int  # bytes that are freed before the images: garbage, old partial downloads and the trash
    kept_sizes: dict[str, int]  # bytes that nothing may free, by what keeps them; empty if the limits can be met

    @property
    def missing_size(self) -> int:
        """The bytes that the limits require, but that nothing may free."""
        return max(0, self.needed_size - self.garbage_size - self.freed_size)


class Explanation(NamedTuple):
    """What keeps an image, or what removes it."""

    name: Name
    digest: Digest  # of its manifest or index
    last_used_at: datetime  # UTC
    kept_by: str | None  # such as ``keep 1``, ``held`` or ``used within 10 minutes``; None if nothing keeps it
    rule: str | None  # the first rule that removes it unless it is kept, such as ``remove 2``
    planned: PlannedImage | None  # its removal, if a prune would remove it now

    def __str__(self) -> str:
        if self.planned is not None:
            return f"{self.name} would be removed by {self.planned.rule}"
        if self.kept_by is None:
            return f"{self.name} stays: no rule removes it, and no limit requires it"
        spared = f", though {self.rule} selects it" if self.rule else ""
        return f"{self.name} is kept: {self.kept_by}{spared}"


class Pruned(NamedTuple):
    """What a prune has removed."""

    images: list[Name]  # in the order of removal
    skipped: list[KeptImage]  # planned images that have changed since, or are held now
    blobs: int  # that the images freed
    freed_size: int  # bytes of those
    garbage: Collected = Collected(0, 0)  # what was freed before the images
    used_size: int = 0  # bytes of all files of the cache afterwards
    missing_size: int = 0  # bytes that the limits require, but that were not freed
    kept_sizes: Mapping[str, int] = MappingProxyType({})  # bytes that nothing may free: see `Plan`


# Checking


def check_arguments(policy: Policy | None, to_free: float | None, plan: Sequence[PlannedImage] | None = None) -> None:
    """Raise `TypeError` if an argument of a prune has a wrong type, and `CacheError` if no bytes are to be freed."""
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(f"policy is of type {type(policy).__name__!r}: give a Policy, or None")
    if to_free is not None:
        check_positive(to_free=to_free)
    is_plan = isinstance(plan, (list, tuple)) and all(isinstance(image, PlannedImage) for image in plan)
    if plan is not None and not is_plan:
        raise TypeError("plan is not a list of PlannedImage: give the images of a plan, or None")


# Conditions


def _list_rules(policy: Policy) -> list[Keep | Remove]:
    return [*policy.keep, *policy.remove]


def _run_queries(database: Database, policy: Policy) -> dict[str, list[str]]:
    """Return the names in the first column of the result of each query of a policy."""
    found: dict[str, list[str]] = {}
    for rule in _list_rules(policy):
        if rule.sql is not None and rule.sql not in found:
            with run_query(database, rule.sql, timeout=_QUERY_SECONDS) as answer:
                found[rule.sql] = [row[0] for row in answer.rows if isinstance(row[0], str)]
    return found


def _build_rules(connection: Connection, database: Database, policy: Policy, answers: Mapping[str, list[str]]) -> Rules:
    known = {str(Name(*row[1:])): row[0] for row in _read_names(connection, policy)}

    def build(rule: Keep | Remove) -> ColumnElement[bool]:
        return _build_rule(connection, rule, known, answers)

    is_recent = None
    if all(rule.used_within is None for rule in policy.keep):
        is_recent = IMAGES.c.last_used_at > subtract_seconds(RECENT_SECONDS)
    # The leases of a dead process or an expired hold keep nothing: the next collection deletes them.
    dead = {
        session
        for session in holds.read_lapsed(connection)
        if not locks.is_held(lock_path(database.directory, session))
    }
    return Rules(list(map(build, policy.keep)), list(map(build, policy.remove)), is_recent, dead)


def _read_names(connection: Connection, policy: Policy) -> Iterable[tuple[int, str, str]]:
    """Return the ids and names of all images, if a rule needs them."""
    rules = _list_rules(policy)
    if any(rule.sql is not None or any(text.startswith(EXPRESSION) for text in rule.names) for rule in rules):
        for row in connection.execute(select(IMAGES.c.id, IMAGES.c.repository, IMAGES.c.reference)):
            yield row.id, row.repository, row.reference


def _build_rule(
    connection: Connection, rule: Keep | Remove, known: Mapping[str, int], answers: Mapping[str, list[str]]
) -> ColumnElement[bool]:
    """Return the condition that a rule selects an image.

    Raises:
        InvalidPolicy: if the rule has no condition.
    """
    if rule == type(rule)():
        raise InvalidPolicy("a rule of the policy has no condition: give one, or remove the rule")
    filters = Filters(labels=rule.labels, platforms=() if rule.platform is None else (rule.platform,))
    if isinstance(rule, Remove):
        filters = filters._replace(unused_for=rule.unused_for, incomplete=rule.incomplete)
    conditions = build_conditions(connection, filters)
    if rule.names:
        conditions.append(or_(*(_build_name_condition(text, known) for text in rule.names)))
    if rule.repository is not None:
        conditions.append(is_repository_like(rule.repository))
    if rule.sql is not None:
        ids = [known[name] for name in answers[rule.sql] if name in known]
        conditions.append(eviction.are_among(IMAGES.c.id, ids))
    if isinstance(rule, Remove):
        if rule.added_before is not None:
            conditions.append(IMAGES.c.added_at <= subtract_seconds(rule.added_before))
        if rule.newest is not None:
            conditions.append(~eviction.is_among_newest(rule.newest, conditions))
    else:
        if rule.used_within is not None:
            conditions.append(IMAGES.c.last_used_at > subtract_seconds(rule.used_within))
        if rule.added_within is not None:
            conditions.append(IMAGES.c.added_at > subtract_seconds(rule.added_within))
        if rule.newest is not None:
            conditions.append(eviction.is_among_newest(rule.newest, conditions))
    return and_(*conditions)


def _build_name_condition(text: str, known: Mapping[str, int]) -> ColumnElement[bool]:
    if text.startswith(EXPRESSION):
        expression = re.compile(text.removeprefix(EXPRESSION))
        return eviction.are_among(IMAGES.c.id, [row_id for name, row_id in known.items() if expression.search(name)])
    if is_pattern(text):
        return is_like(text)
    name = Name.parse(text)
    return (IMAGES.c.repository == name.repository) & (IMAGES.c.reference == name.reference)


# Planning


def make_plan(database: Database, policy: Policy, *, to_free: int | None = None) -> Plan:
    """Plan which images a prune removes: those that the policy's rules remove, and as few as the limits require.

    Args:
        database: of the cache.
        policy: the rules and limits.
        to_free: bytes to free in any case, garbage included.

    Raises:
        InvalidPolicy: if a rule has no condition.
        InvalidQuery: if the query of a rule is invalid.
        CacheError: if the query of a rule takes too long.
    """
    answers = _run_queries(database, policy)
    files, stale_size = measure_files(database.directory), sum_stale_downloads(database.directory)
    with database.read() as connection:
        rules = _build_rules(connection, database, policy, answers)
        garbage_size = eviction.sum_unleased_garbage(connection, rules) + files.folder_sizes["trash"] + stale_size
        total_size = eviction.sum_stored(connection) + files.total_size
        limit, needed_size = _find_need(database, policy.limits, total_size, to_free)
        image_size = max(0, needed_size - garbage_size)  # to free by removing images
        ranked = eviction.rank_images(connection, rules, image_size)
        chosen = _choose_needed(connection, rules, ranked, image_size)
        sizes = eviction.read_sizes(connection, [image.id for image in chosen])
        planned = list(_describe(chosen, sizes, limit))
        freed_size = planned[-1].total_freed_size if planned else 0
        kept_sizes: dict[str, int] = {}
        if freed_size < image_size:
            kept_sizes = {_name_reason(number): size for number, size in eviction.sum_kept(connection, rules).items()}
            kept_sizes["other files"] = files.total_size - files.folder_sizes["trash"] - stale_size
    return Plan(planned, freed_size, needed_size, garbage_size, kept_sizes)


def _find_need(database: Database, limits: Limits, total_size: int, to_free: int | None) -> tuple[str, int]:
    """Return the limit that requires the most bytes to be freed, and these bytes."""
    needs = {"to-free": to_free or 0}
    if limits.max_size is not None and total_size > limits.max_size:
        needs["max-size"] = total_size - int(limits.max_size * limits.down_to)
    if limits.min_free is not None:
        found = measure_file_system(database.directory)
        wanted = limits.min_free if isinstance(limits.min_free, int) else int(limits.min_free * found.size)
        needs["min-free"] = wanted - found.free
    limit = max(needs, key=needs.__getitem__)
    return limit, max(0, needs[limit])


def _choose_needed(
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


def _describe(chosen: Iterable[RankedImage], sizes: Mapping[int, int], limit: str) -> Iterator[PlannedImage]:
    for image in chosen:
        rule = limit if image.rule is None else f"remove {image.rule}"
        size = sizes.get(image.id, 0)
        yield PlannedImage(
            image.name, image.digest, image.last_used_at, size, image.freed_size, image.total_freed_size, rule
        )


def _name_reason(number: int) -> str:
    return _REASONS.get(number, f"keep {number}")


def explain(database: Database, policy: Policy, name: str | Name, *, to_free: int | None = None) -> Explanation:
    """Return what keeps an image, or what removes it now.

    Raises:
        NotInCache: if there is no such image.
    """
    answers = _run_queries(database, policy)
    with database.read() as connection:
        found = complete_name(connection, name)
        row = images.find(connection, found, exact=True)
        rules = _build_rules(connection, database, policy, answers)
        mark = eviction.read_mark(connection, rules, row.id)
        query = select(IMAGES.c.last_used_at).where(IMAGES.c.id == row.id)
        last_used_at = connection.execute(query).scalar_one()
    planned = None
    if mark.kept_by is None:
        plan = make_plan(database, policy, to_free=to_free)
        planned = next((image for image in plan.images if image.name == found), None)
    kept_by = None if mark.kept_by is None else _name_reason(mark.kept_by)
    rule = None if mark.rule is None else f"remove {mark.rule}"
    return Explanation(found, row.digest, last_used_at, kept_by, rule, planned)


# Removing


def prune(
    database: Database,
    policy: Policy,
    *,
    to_free: int | None = None,
    plan: Iterable[PlannedImage] | None = None,
    progress: Progress | None = None,
) -> Pruned:
    """Collect garbage, then remove what a policy removes, or exactly what was planned; one process does at a time.

    Args:
        database: of the cache.
        policy: the rules and limits.
        to_free: as for `make_plan`.
        plan: images to remove, instead of those that a new plan has.
        progress: called with the bytes that the images have freed so far, and that they free in all.

    Raises:
        Busy: if another process prunes for too long.
    """
    database.folders.check()  # a cache that can only be read fails here
    with single_flight.claim_or_find(database.directory, "prune", lambda: None, seconds=database.wait_seconds):
        if plan is None:  # before the collection, because garbage counts as freed
            made = database.reserve.run(lambda: make_plan(database, policy, to_free=to_free))
        else:
            made = Plan(list(plan), 0, 0, 0, {})
        garbage = collect.collect_all(database)
        pruned = apply_plan(database, made.images, progress)
    return pruned._replace(
        garbage=garbage,
        used_size=_measure_used(database),
        missing_size=max(0, made.needed_size - made.garbage_size - pruned.freed_size),
        kept_sizes=made.kept_sizes,
    )


def _measure_used(database: Database) -> int:
    with database.read() as connection:
        return eviction.sum_stored(connection) + measure_files(database.directory).total_size


def apply_plan(database: Database, planned: Iterable[PlannedImage], progress: Progress | None = None) -> Pruned:
    """Remove the planned images that have not been used or moved since, and that nothing holds.

    Other writers get the write lock between two batches.

    Args:
        database: of the cache.
        planned: the images, in the order of removal.
        progress: called with the bytes freed so far, and the bytes that the plan frees.

    Raises:
        StorageError: if the file system fails; the images of earlier batches stay removed.
    """
    rest, pruned = deque(planned), Pruned([], [], 0, 0)
    advance = sum_progress(sum(image.freed_size for image in rest), progress)
    while rest:
        batch = database.reserve.run(lambda: _remove_batch(database, rest))
        for _ in range(len(batch.images) + len(batch.skipped)):
            rest.popleft()
        pruned = Pruned(
            pruned.images + batch.images,
            pruned.skipped + batch.skipped,
            pruned.blobs + batch.blobs,
            pruned.freed_size + batch.freed_size,
        )
        database.reserve.run(lambda: collect.empty_trash(database))
        advance(batch.freed_size)
    return pruned


def _remove_batch(database: Database, planned: Iterable[PlannedImage]) -> Pruned:
    """Remove the first images, as many as a short transaction can."""
    removed, skipped = list[Name](), list[KeptImage]()
    blobs = freed_size = 0
    with database.write() as connection:
        end = time.monotonic() + _BATCH_SECONDS
        for image in planned:
            found = eviction.find_removable(connection, image.name, image.digest, image.last_used_at)
            if isinstance(found, str):
                skipped.append(KeptImage(image.name, found))
            else:
                freed = collect.delete_unreferenced(connection, images.remove(connection, [found]))
                removed.append(image.name)
                blobs, freed_size = blobs + freed.blobs, freed_size + freed.bytes
            if time.monotonic() > end:
                break
    return Pruned(removed, skipped, blobs, freed_size)
