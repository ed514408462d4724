"""Prune a cache: remove the images of a plan, and only those.

A removal checks each image again under the write lock, and skips what has changed since the plan.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Final, NamedTuple, TypeVar

from cachedb.arguments import check_positive
from cachedb.content import collect
from cachedb.content.collect import Collected
from cachedb.disk import single_flight
from cachedb.disk.sizes import measure_files
from cachedb.index import eviction, images
from cachedb.index.blobs import sum_sizes
from cachedb.index.sqlite.database import Database
from cachedb.oci.names import Name
from cachedb.operations.plan import Plan, PlannedImage, make_plan
from cachedb.operations.policy import Keep, Limits, Policy, Remove
from cachedb.progress import Progress, sum_progress

__all__ = ["CLAIM_KEY", "Pruned", "SkippedImage", "apply_plan", "check_arguments", "claim", "prune", "remove_planned"]


T = TypeVar("T")

CLAIM_KEY: Final = "prune"
"""The key of the claim of the process that prunes."""

_MOST_PLANS = 10  # of one prune; it plans again if planned images were used meanwhile
_BATCH_SECONDS = 0.02  # of removals under one write lock; the commit takes as long again


class SkippedImage(NamedTuple):
    """An image that is not removed, and why."""

    name: Name
    reason: str  # such as ``used since the plan``, ``now another image`` or ``held``


class Pruned(NamedTuple):
    """What a prune has removed."""

    images: list[Name]  # in the order of removal
    skipped: list[SkippedImage]  # planned images that have changed since, or are held now
    blobs: int  # blobs that the images freed
    freed_size: int  # bytes of these blobs
    garbage: Collected = Collected(0, 0)  # blobs of no image that were freed before the images
    garbage_sizes: Mapping[str, int] = MappingProxyType({})  # bytes freed before the images: see `Plan`
    used_size: int = 0  # bytes of all files of the cache afterwards
    unmet_size: int = 0  # bytes that the limits require, but that were not freed
    kept_sizes: Mapping[str, int] = MappingProxyType({})  # bytes that nothing may free: see `Plan`
    recent_images: int = 0  # images that a rule would have removed: see `Plan`


def check_arguments(policy: Policy | None, to_free: float | None, plan: Sequence[PlannedImage] | None = None) -> None:
    """Check the arguments of a prune.

    Raises:
        TypeError: if one has a wrong type.
        CacheError: if ``to_free`` is not above 0.
    """
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(f"policy is of type {type(policy).__name__!r}: give a Policy, or None")
    if policy is not None:
        if not isinstance(policy.limits, Limits):
            raise TypeError(f"limits is of type {type(policy.limits).__name__!r}: give Limits")
        _check_rules("keep", policy.keep, Keep)
        _check_rules("remove", policy.remove, Remove)
    if to_free is not None:
        check_positive(to_free=to_free)
    is_plan = isinstance(plan, (list, tuple)) and all(isinstance(image, PlannedImage) for image in plan)
    if plan is not None and not is_plan:
        raise TypeError("plan is not a list of PlannedImage: give the images of a plan, or None")


def _check_rules(name: str, rules: object, kind: type) -> None:
    # Rules are read more than once: a generator would have none left, and keep nothing.
    if not isinstance(rules, (list, tuple)) or not all(isinstance(rule, kind) for rule in rules):
        raise TypeError(f"{name} is not a tuple of {kind.__name__}: give the rules in a tuple")


def prune(
    database: Database,
    policy: Policy,
    *,
    to_free: int | None = None,
    plan: Iterable[PlannedImage] | None = None,
    progress: Progress | None = None,
) -> Pruned:
    """Collect garbage, then remove what a policy removes, or the images of a plan.

    One process prunes at a time. If a limit is missed because planned images have changed and stay, other images are
    planned.

    Args:
        database: of the cache.
        policy: the rules and limits.
        to_free: as for `make_plan`.
        plan: images to remove, instead of those that a new plan has.
        progress: called with the bytes that the images have freed so far, and that they free in all.

    Raises:
        Busy: if another process prunes for too long.
    """
    database.folders.check()  # a read-only cache fails here
    with claim(database, lambda: None):
        if plan is None:
            pruned = _plan_and_remove(database, policy, to_free, progress)
        else:
            pruned = remove_planned(database, Plan(list(plan), 0, 0, {}, {}), progress)
    return pruned._replace(used_size=_measure_used(database))


@contextmanager
def claim(database: Database, find: Callable[[], T | None]) -> Iterator[T | None]:
    """Yield the result of ``find``; if it is None, no other process prunes during the block.

    Raises:
        Busy: if another process prunes for too long.
    """
    with ExitStack() as block:
        claiming = partial(
            single_flight.claim_or_find, database.directory, CLAIM_KEY, find, seconds=database.wait_seconds
        )
        # A full disk is a reason to prune, so the reserve has room for the claim's file.
        yield database.reserve.run(lambda: block.enter_context(claiming()))


def _plan_and_remove(database: Database, policy: Policy, to_free: int | None, progress: Progress | None) -> Pruned:
    """Plan and remove; repeat while a limit is missed because planned images have changed."""
    pruned = Pruned([], [], 0, 0)
    for _ in range(_MOST_PLANS):
        freed_size = pruned.freed_size + sum(pruned.garbage_sizes.values())
        rest = None if to_free is None else max(0, to_free - freed_size)
        # Plan before the collection, because garbage counts as freed.
        made = database.reserve.run(partial(make_plan, database, policy, to_free=rest))
        last = remove_planned(database, made, _shift(progress, pruned.freed_size))
        pruned = _add(pruned, last)
        if last.unmet_size <= made.unmet_size:
            break
    return pruned


def _shift(progress: Progress | None, size: int) -> Progress | None:
    """Return a function that reports bytes in addition to those of earlier plans."""
    return None if progress is None else lambda done, total: progress(size + done, size + total)


def _add(first: Pruned, second: Pruned) -> Pruned:
    """Add up the results of two plans, the second after the first."""
    images = first.images + second.images
    skipped = {image.name: image for image in first.skipped + second.skipped if image.name not in second.images}
    sizes = Counter(first.garbage_sizes) + Counter(second.garbage_sizes)
    return second._replace(
        images=images,
        skipped=list(skipped.values()),
        blobs=first.blobs + second.blobs,
        freed_size=first.freed_size + second.freed_size,
        garbage=Collected(*map(sum, zip(first.garbage, second.garbage, strict=True))),
        garbage_sizes={key: sizes[key] for key in second.garbage_sizes},
    )


def remove_planned(database: Database, made: Plan, progress: Progress | None = None) -> Pruned:
    """Collect garbage, then remove the images of a plan; the caller has the claim on `CLAIM_KEY`.

    Args:
        database: of the cache.
        made: the plan.
        progress: as for `prune`.
    """
    files = measure_files(database.directory)
    garbage = collect.collect_all(database)
    pruned = apply_plan(database, made.images, progress)
    return pruned._replace(
        garbage=garbage,
        garbage_sizes={"reclaimable": garbage.bytes, **files.freed},
        unmet_size=max(0, made.needed_size - made.garbage_size - pruned.freed_size),
        kept_sizes=made.kept_sizes,
        recent_images=made.recent_images,
    )


def _measure_used(database: Database) -> int:
    with database.read() as connection:
        return sum_sizes(connection).stored_size + measure_files(database.directory).total_size


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
    """Remove as many of the first images as one short transaction can."""
    removed, skipped = list[Name](), list[SkippedImage]()
    blobs = freed_size = 0
    with database.write() as connection:
        end = time.monotonic() + _BATCH_SECONDS
        for image in planned:
            found = eviction.find_removable(connection, image.name, image.digest, image.last_used_at)
            if isinstance(found, str):
                skipped.append(SkippedImage(image.name, found))
            else:
                freed = collect.delete_unreferenced(connection, images.remove(connection, [found]))
                removed.append(image.name)
                blobs, freed_size = blobs + freed.blobs, freed_size + freed.bytes
            if time.monotonic() > end:
                break
    return Pruned(removed, skipped, blobs, freed_size)
