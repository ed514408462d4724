"""Plan which images a prune removes, and explain what keeps an image.

Images are chosen in one read transaction, without a lock. The SQL of rules runs before it. ``freed_size`` is exact: the
files in ``blobs/`` shrink by so many bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection

from cachedb.disk.sizes import FileSizes, measure_file_system, measure_files
from cachedb.index import eviction, images
from cachedb.index.eviction import Details, Rules
from cachedb.index.filters import complete_name
from cachedb.index.sqlite.database import Database
from cachedb.oci.digests import Digest
from cachedb.oci.names import Name
from cachedb.operations.kept_sizes import sum_kept
from cachedb.operations.least import ChosenImage, choose_least
from cachedb.operations.policy import Limits, Policy
from cachedb.operations.rules import RECENT_SECONDS, build_rules, run_queries
from cachedb.text import format_size

__all__ = ["Explanation", "Plan", "PlannedImage", "explain", "explain_unmet", "make_plan", "sort_sizes"]


_REASONS = {
    eviction.PINNED: "pinned",
    eviction.HELD: "held",
    eviction.IN_USE: "in use",
    eviction.RECENT: f"used within {RECENT_SECONDS / 60:g} minutes",
}
_EXPIRED = "expired"


class PlannedImage(NamedTuple):
    """An image that a plan removes."""

    name: Name
    digest: Digest  # of its manifest or index
    last_used_at: datetime  # UTC
    size: int  # bytes of its blobs
    freed_size: int  # bytes that its removal frees, after the removals before it
    total_freed_size: int  # bytes that the plan frees up to and including it
    rule: str  # ``remove 2`` for the second rule that removes, ``expired``, ``max-size``, ``min-free`` or ``to-free``


class Plan(NamedTuple):
    """What a prune removes."""

    images: list[PlannedImage]  # in the order of removal
    freed_size: int  # bytes that the images free
    needed_size: int  # bytes that the limits require to free, garbage included; 0 without limits
    garbage_sizes: dict[str, int]  # bytes freed before the images: ``reclaimable`` blobs and some files
    kept_sizes: dict[str, int]  # bytes that a prune cannot free, by what keeps them; empty if the limits can be met
    recent_images: int = 0  # images that a rule would remove, but that were used in the last `RECENT_SECONDS`

    @property
    def garbage_size(self) -> int:
        """The bytes that are freed before the images."""
        return sum(self.garbage_sizes.values())

    @property
    def unmet_size(self) -> int:
        """The bytes that the limits require beyond what the plan frees."""
        return max(0, self.needed_size - self.garbage_size - self.freed_size)


class Explanation(NamedTuple):
    """What keeps an image, or what removes it."""

    name: Name
    digest: Digest  # of its manifest or index
    last_used_at: datetime  # UTC
    kept_by: str | None  # such as ``keep 1``, ``pinned`` or ``used within 10 minutes``; None if nothing keeps it
    rule: str | None  # the first rule that removes it unless it is kept, such as ``remove 2`` or ``expired``
    planned: PlannedImage | None  # its removal, if a prune would remove it now

    def __str__(self) -> str:
        if self.planned is not None:
            reason = ": it has expired" if self.planned.rule == _EXPIRED else f" by {self.planned.rule}"
            return f"{self.name} would be removed{reason}"
        if self.kept_by is None:
            return f"{self.name} stays: no rule removes it, and no limit requires it"
        spared = {None: "", _EXPIRED: ", though it has expired"}.get(self.rule, f", though {self.rule} selects it")
        return f"{self.name} is kept: {self.kept_by}{spared}"


def make_plan(
    database: Database,
    policy: Policy,
    *,
    to_free: int | None = None,
    incoming_size: int = 0,
    spared: Collection[Name] = (),
) -> Plan:
    """Plan a prune: the images that the policy's rules remove, and as few others as the limits require.

    Args:
        database: of the cache.
        policy: the rules and limits.
        to_free: bytes to free in any case, garbage included.
        incoming_size: bytes that will be stored, for which the limits must have room.
        spared: images that stay, because the caller works with them.

    Raises:
        InvalidPolicy: if a rule has no condition.
        InvalidQuery: if the query of a rule is invalid.
        CacheError: if the query of a rule takes too long.
    """
    answers, files = run_queries(database, policy), measure_files(database.directory)
    with database.read() as connection:
        rules = build_rules(connection, database, policy, answers, spared)
        return _make_plan(connection, database, rules, policy.limits, files, to_free, incoming_size)


def _make_plan(
    connection: Connection,
    database: Database,
    rules: Rules,
    limits: Limits,
    files: FileSizes,
    to_free: int | None,
    incoming_size: int = 0,
) -> Plan:
    ranking = eviction.rank_images(connection, rules)
    totals = eviction.sum_blobs(connection, rules)
    garbage_sizes = {"reclaimable": totals.garbage_size, **files.freed}
    total_size = totals.stored_size + files.total_size
    limit, needed_size = _find_need(database, limits, total_size, incoming_size, to_free)
    image_size = max(0, needed_size - sum(garbage_sizes.values()))  # to free by removing images
    chosen = choose_least(connection, rules, ranking, image_size)
    planned = list(_describe(chosen, eviction.read_details(connection, [image.id for image in chosen]), limit))
    freed_size = planned[-1].total_freed_size if planned else 0
    kept_sizes: dict[str, int] = {}
    if freed_size < image_size:
        kept = sum_kept(connection, rules, ranking)
        kept_sizes = {_name_reason(number): size for number, size in kept.items()} | files.kept
    return Plan(planned, freed_size, needed_size, garbage_sizes, kept_sizes, len(ranking.recent))


def _find_need(
    database: Database, limits: Limits, total_size: int, incoming_size: int, to_free: int | None
) -> tuple[str, int]:
    """Return the limit that requires the most bytes to be freed, and these bytes."""
    needs = {"to-free": to_free or 0}
    if limits.max_size is not None and total_size + incoming_size > limits.max_size:
        needs["max-size"] = total_size + incoming_size - int(limits.max_size * limits.down_to)
    if limits.min_free is not None:
        found = measure_file_system(database.directory)
        needs["min-free"] = limits.choose_free_size(found.size) + incoming_size - found.free
    limit = max(needs, key=needs.__getitem__)
    return limit, max(0, needs[limit])


def _describe(chosen: Iterable[ChosenImage], details: Mapping[int, Details], limit: str) -> Iterator[PlannedImage]:
    for image in chosen:
        rule = _name_rule(image.rule) or limit
        yield PlannedImage(*details[image.id], image.freed_size, image.total_freed_size, rule)


def _name_reason(number: int) -> str:
    return _REASONS.get(number, f"keep {number}")


def _name_rule(number: int | None) -> str | None:
    return None if number is None else _EXPIRED if number == eviction.EXPIRED else f"remove {number}"


def sort_sizes(sizes: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return the sizes that are not 0 with their names, the largest first."""
    return sorted(((name, size) for name, size in sizes.items() if size), key=lambda pair: -pair[1])


def explain_unmet(unmet_size: int, kept_sizes: Mapping[str, int]) -> str:
    """Return why a limit cannot be met, as the text of an error.

    Args:
        unmet_size: bytes that the limits require, but that nothing may free.
        kept_sizes: as in `Plan`.
    """
    problem = f"cannot free {format_size(unmet_size)} more, because"
    if not kept_sizes:  # the plan was enough
        return f"{problem} images of the plan have been used or held since: prune again later"
    kept = ", ".join(f"{format_size(size)} {name}" for name, size in sort_sizes(kept_sizes))
    return (
        f"{problem} the rest stays ({kept}): raise the limit, change what the policy keeps, unpin images, or release "
        "holds"
    )


def explain(database: Database, policy: Policy, name: str | Name, *, to_free: int | None = None) -> Explanation:
    """Return what keeps an image, or what removes it now.

    Args:
        database: of the cache.
        policy: the rules and limits.
        name: of the image.
        to_free: as for `make_plan`.

    Raises:
        NotInCache: if there is no such image.
        InvalidPolicy: as `make_plan`.
        InvalidQuery: as `make_plan`.
        InvalidName: if the name is invalid.
        InvalidDigest: if several images have the digest.
    """
    answers, files = run_queries(database, policy), measure_files(database.directory)
    planned = None
    with database.read() as connection:
        found = complete_name(connection, name)
        row = images.find(connection, found, exact=True)
        rules = build_rules(connection, database, policy, answers)
        mark = eviction.read_mark(connection, rules, row.id)
        details = eviction.read_details(connection, [row.id])[row.id]
        if mark.kept_by is None:
            plan = _make_plan(connection, database, rules, policy.limits, files, to_free)
            planned = next((image for image in plan.images if image.name == found), None)
    kept_by = None if mark.kept_by is None else _name_reason(mark.kept_by)
    return Explanation(found, details.digest, details.last_used_at, kept_by, _name_rule(mark.rule), planned)
