"""Select images by name, pattern and property: the filters that several commands share.

`narrow` adds the conditions to a query of the table of images. So a command selects and changes images in one
transaction, and no image changes in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, Connection, Select, and_, false, func, or_, select

from cachedb.errors import InvalidQuery, NotInCache
from cachedb.index.blobs import ambiguous_error, starts_with
from cachedb.index.images import find
from cachedb.index.lifetimes import is_expired, is_pinned
from cachedb.index.patterns import full_name, is_like, is_pattern
from cachedb.index.sqlite.batches import are_among
from cachedb.index.tables import BLOBS, IMAGE_BLOBS, IMAGE_LABELS, IMAGE_PLATFORMS, IMAGES
from cachedb.oci.digests import Digest, is_digest, parse_digest_prefix
from cachedb.oci.names import Name
from cachedb.oci.platforms import is_for, join_platform
from cachedb.text import parse_duration, shorten

__all__ = [
    "KEYS",
    "Filters",
    "FoundImage",
    "build_conditions",
    "complete_name",
    "find_images",
    "has_short_digest",
    "narrow",
    "parse_filters",
    "parse_label",
    "parse_wanted",
    "subtract_seconds",
]


_PATTERNS_LIMIT = 500  # in one statement; SQLite limits the depth of an expression to 1000


class Filters(NamedTuple):
    """Conditions that all selected images fulfil, with their order and number."""

    labels: tuple[tuple[str, str | None], ...] = ()  # keys with their values; None allows any value
    platforms: tuple[str, ...] = ()  # each os/architecture[/variant]; an image must be for all of them
    unused_for: float | None = None  # at least so many seconds since the last use
    added_before: datetime | None = None  # the name came here before this time; a naive time is UTC
    base: str | None = None  # the name of an image that the image is built on, directly or not
    incomplete: bool | None = None  # True: lacks a blob; False: lacks none
    digest: str | None = None  # of the manifest or index, or at least its first 12 digits
    pinned: bool | None = None  # True: has a pin; False: has none
    expired: bool | None = None  # True: its lifetime has ended; False: it has not, or the image has none
    sort: str | None = None  # name, size, created, added or used; - in front reverses the order; None sorts by name
    limit: int | None = None  # the maximum number of images

    @property
    def has_conditions(self) -> bool:
        """Whether a condition may exclude an image."""
        return self._replace(sort=None, limit=None) != Filters()


class FoundImage(NamedTuple):
    """The row of a selected image."""

    id: int
    name: Name


# Parsing

KEYS: Final = ("label", "platform", "unused-for", "added-before", "base", "incomplete", "digest", "pinned", "expired")
"""The keys of filters in text: ``KEY=VALUE``."""
_FLAGS: Final = ("incomplete", "pinned", "expired")  # without a value they are true


def parse_filters(texts: Iterable[str], *, sort: str | None = None, limit: int | None = None) -> Filters:
    """Parse filters such as ``label=team=web``, ``unused-for=7d`` and ``incomplete``.

    Args:
        texts: the filters; all of them must hold.
        sort: as in `Filters`.
        limit: as in `Filters`.

    Raises:
        InvalidQuery: if one of them is invalid, or a key that allows one value is given twice.
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, _, value = text.partition("=")
        if key not in KEYS:
            raise InvalidQuery(f"{shorten(text)} is not a filter: use one of {', '.join(KEYS)}")
        if not value and key not in _FLAGS:
            raise InvalidQuery(f"the filter {key} has no value: write {key}=VALUE")
        field = {"label": "labels", "platform": "platforms"}.get(key, key.replace("-", "_"))
        parsed = _parse_value(key, value)
        if field in ("labels", "platforms"):
            found[field] = (*found.get(field, ()), parsed)
        elif field in found:
            raise InvalidQuery(f"the filter {key} is given twice: give it once")
        else:
            found[field] = parsed
    return Filters(**found, sort=sort, limit=limit)


def _parse_value(key: str, value: str) -> object:
    if key == "label":
        return parse_label(value)
    if key == "unused-for":
        seconds = parse_duration(value)
        if seconds is None:
            raise InvalidQuery(f"{key}: {shorten(value)} is not a duration: write one as in unused-for=7d")
        return seconds
    if key == "added-before":
        return _parse_time(value)
    if key in _FLAGS:
        if value not in ("", "true", "false"):
            raise InvalidQuery(f"{key}: {shorten(value)} is neither true nor false: write {key}, or {key}=false")
        return value != "false"
    return value


def parse_label(text: str) -> tuple[str, str | None]:
    """Parse ``KEY=VALUE`` into the key and the value of a label, and ``KEY`` into a key with any value.

    Raises:
        InvalidQuery: if there is no key.
    """
    key, equals, value = text.partition("=")
    if not key:
        raise InvalidQuery(f"{shorten(text)} has no key: write it as in team=web")
    return key, value if equals else None


def _parse_time(value: str) -> datetime:
    """Return the time of an age such as 24h, or of an ISO date or time, in UTC unless it says otherwise."""
    seconds = parse_duration(value)
    if seconds is not None:
        return subtract_seconds(seconds)
    try:
        found = datetime.fromisoformat(value)
    except ValueError:
        raise InvalidQuery(
            f"added-before: {shorten(value)} is not a time: write one as in 24h, 2026-01-31 or 2026-01-31T12:00"
        ) from None
    return _make_aware(found)


def _make_aware(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def subtract_seconds(seconds: float) -> datetime:
    """Return the time some seconds ago; `datetime.min` if that is too long ago."""
    try:
        return datetime.now(UTC) - timedelta(seconds=seconds)
    except OverflowError:
        return datetime.min.replace(tzinfo=UTC)


def parse_wanted(wanted: Iterable[str | Name]) -> list[str | Name]:
    """Return patterns and names with short digests unchanged, and other texts as names.

    Raises:
        InvalidName: if a text is none of them.
    """
    return [text if is_pattern(text) or has_short_digest(text) else Name.parse(text) for text in wanted]


def complete_name(connection: Connection, text: str | Name) -> Name:
    """Parse a name, and complete a digest of which at least 12 digits are given.

    Raises:
        InvalidName: if the text is not a name.
        InvalidDigest: if several images have such digests.
        NotInCache: if no image has such a digest.
    """
    if not has_short_digest(text):
        return Name.parse(text)
    head, _, prefix = str(text).partition("@")
    repository = Name.parse(f"{head}:latest").repository
    query = (
        select(BLOBS.c.digest)
        .join(IMAGES, IMAGES.c.manifest_id == BLOBS.c.id)
        .where(IMAGES.c.repository == repository, starts_with(prefix))
    )
    found = [Digest(digest) for digest in connection.execute(query.distinct().order_by(BLOBS.c.digest)).scalars()]
    if len(found) > 1:
        raise ambiguous_error(str(text), found)
    if not found:
        raise NotInCache(f"{text} is not in the cache: `cachedb ls` lists the images", name=text)
    return Name(repository, found[0])


def has_short_digest(text: str | Name) -> bool:
    """Return whether a text has the form ``repository@digest`` with the first digits of a digest only."""
    prefix = parse_digest_prefix(text.partition("@")[2]) if isinstance(text, str) else None
    return prefix is not None and not is_digest(prefix)


# Selecting


def narrow(
    connection: Connection,
    query: Select[*tuple[Any, ...]],
    wanted: Sequence[str | Name] = (),
    filters: Filters | None = None,
    *,
    exact: bool = False,
    ignore_missing: bool = False,
) -> Select[*tuple[Any, ...]]:
    """Return a query of the table of images, limited to the images that are wanted.

    Args:
        connection: in whose transaction the query will be executed.
        query: selects from the table of images.
        wanted: names and patterns; an image must match one of them. Without any, all images are wanted.
        filters: conditions that the images must fulfil too.
        exact: whether ``repository@digest`` finds only an image of exactly this name, and not one by its tag.
        ignore_missing: skip names and patterns that match no image.

    Raises:
        NotInCache: if a name or a pattern matches no image, whatever the filters.
        InvalidQuery: if ``sort`` is not a sort key, or there are too many patterns.
    """
    filters = _check_filters(filters)
    conditions = build_conditions(connection, filters)
    if wanted:
        conditions.append(_is_wanted(connection, wanted, exact=exact, ignore_missing=ignore_missing))
    return query.where(*conditions).order_by(*_build_order(filters.sort)).limit(filters.limit)


def find_images(
    connection: Connection,
    wanted: Sequence[str | Name],
    filters: Filters | None = None,
    *,
    exact: bool = False,
    ignore_missing: bool = False,
    by_default_all: bool = False,
) -> list[FoundImage]:
    """Return the wanted images in their order; the other arguments and the errors are those of `narrow`.

    Args:
        by_default_all: True selects all images if there are no names, patterns and conditions. False selects none,
            so that an empty list removes nothing.
    """
    filters = _check_filters(filters)
    if not wanted and not filters.has_conditions and not by_default_all:
        return []
    if wanted and filters == Filters() and not any(map(is_pattern, wanted)):
        # Finding them one by one is faster.
        found = (_find_named(connection, text, exact=exact, ignore_missing=ignore_missing) for text in wanted)
        return list(dict.fromkeys(image for image in found if image))
    query = select(IMAGES.c.id, IMAGES.c.repository, IMAGES.c.reference)
    query = narrow(connection, query, wanted, filters, exact=exact, ignore_missing=ignore_missing)
    return [FoundImage(row.id, Name(row.repository, row.reference)) for row in connection.execute(query)]


def _check_filters(filters: Filters | None) -> Filters:
    if filters is None:
        return Filters()
    if not isinstance(filters, Filters):
        raise TypeError(f"filters is of type {type(filters).__name__!r}: give Filters, or None")
    return filters


def _is_wanted(
    connection: Connection, wanted: Sequence[str | Name], *, exact: bool, ignore_missing: bool
) -> ColumnElement[bool]:
    patterns = [str(text) for text in wanted if is_pattern(text)]
    if len(patterns) > _PATTERNS_LIMIT:
        raise InvalidQuery(f"there are {len(patterns)} patterns: give at most {_PATTERNS_LIMIT}")
    matches = [is_like(pattern) for pattern in patterns]
    if not ignore_missing:
        for pattern, is_match in zip(patterns, matches, strict=True):
            if connection.execute(select(IMAGES.c.id).where(is_match).limit(1)).first() is None:
                raise NotInCache(
                    f"{shorten(pattern)} matches no image: a pattern must match a whole name, such as 'team/*:1'",
                    name=pattern,
                )
    found = (
        _find_named(connection, text, exact=exact, ignore_missing=ignore_missing)
        for text in wanted
        if not is_pattern(text)
    )
    ids = [image.id for image in found if image]
    return or_(*matches, are_among(IMAGES.c.id, ids))


def _find_named(connection: Connection, text: str | Name, *, exact: bool, ignore_missing: bool) -> FoundImage | None:
    try:
        name = complete_name(connection, text)
        return FoundImage(find(connection, name, exact=exact).id, name)
    except NotInCache:
        if ignore_missing:
            return None
        raise


def build_conditions(connection: Connection, filters: Filters) -> list[ColumnElement[bool]]:
    """Return the conditions of filters on the table of images.

    Raises:
        NotInCache: if the base is not in the cache.
        InvalidDigest: if the digest is too short or invalid.
        InvalidName: if the base is not a name.
    """
    conditions = [_has_label(key, value) for key, value in filters.labels]
    conditions += [_is_for_platform(connection, platform) for platform in filters.platforms]
    if filters.unused_for is not None:
        conditions.append(IMAGES.c.last_used_at <= subtract_seconds(filters.unused_for))
    if filters.added_before is not None:
        conditions.append(IMAGES.c.added_at < _make_aware(filters.added_before))
    if filters.base is not None:
        conditions.append(_is_built_on(connection, find(connection, complete_name(connection, filters.base)).id))
    if filters.incomplete is not None:
        conditions.append(_lacks_blob() if filters.incomplete else ~_lacks_blob())
    if filters.digest is not None:
        conditions.append(IMAGES.c.manifest_id.in_(select(BLOBS.c.id).where(starts_with(filters.digest))))
    if filters.pinned is not None:
        conditions.append(is_pinned() if filters.pinned else ~is_pinned())
    if filters.expired is not None:
        conditions.append(is_expired() if filters.expired else ~is_expired())
    return conditions


def _has_label(key: str, value: str | None) -> ColumnElement[bool]:
    found = select(IMAGE_LABELS.c.image_id).where(IMAGE_LABELS.c.key == key)
    return IMAGES.c.id.in_(found if value is None else found.where(IMAGE_LABELS.c.value == value))


def _is_for_platform(connection: Connection, wanted: str) -> ColumnElement[bool]:
    # Few platforms occur in a cache, so Python chooses the fitting ones, by the rules of all other commands.
    columns = (IMAGE_PLATFORMS.c.os, IMAGE_PLATFORMS.c.architecture, IMAGE_PLATFORMS.c.variant)
    fitting = [
        and_(*(column.is_not_distinct_from(part) for column, part in zip(columns, row, strict=True)))
        for row in connection.execute(select(*columns).distinct())
        if is_for(join_platform(*row), wanted)
    ]
    return IMAGES.c.id.in_(select(IMAGE_PLATFORMS.c.image_id).where(or_(*fitting))) if fitting else false()


def _lacks_blob() -> ColumnElement[bool]:
    missing = select(IMAGE_BLOBS.c.image_id).join(BLOBS, BLOBS.c.id == IMAGE_BLOBS.c.blob_id)
    return IMAGES.c.id.in_(missing.where(BLOBS.c.stored_at.is_(None)))


def _is_built_on(connection: Connection, base_id: int) -> ColumnElement[bool]:
    """Return the condition that an image has all layers of the base first, and then more.

    Layers whose positions have gaps belong to several platforms. As in the view ``image_bases``, such an image has no
    base.
    """
    own, theirs = IMAGE_BLOBS.alias("own"), IMAGE_BLOBS.alias("theirs")
    layers = select(IMAGE_BLOBS.c.position, IMAGE_BLOBS.c.blob_id).where(
        IMAGE_BLOBS.c.image_id == base_id, IMAGE_BLOBS.c.role == "layer"
    )
    stack = connection.execute(layers.order_by(IMAGE_BLOBS.c.position)).all()
    if not stack or stack[-1].position - stack[0].position != len(stack) - 1:
        return false()
    with_top = select(own.c.image_id).where(own.c.blob_id == stack[-1].blob_id)
    longer = (
        select(own.c.image_id, func.min(own.c.position).label("first"))
        .where(own.c.role == "layer", own.c.image_id.in_(with_top))
        .group_by(own.c.image_id)
        .having(func.count() > len(stack), func.max(own.c.position) - func.min(own.c.position) == func.count() - 1)
        .subquery()
    )
    base = layers.subquery()
    is_same = and_(
        theirs.c.image_id == longer.c.image_id,
        theirs.c.blob_id == base.c.blob_id,
        theirs.c.position - longer.c.first == base.c.position - stack[0].position,
    )
    return IMAGES.c.id.in_(
        select(longer.c.image_id)
        .join(theirs, theirs.c.image_id == longer.c.image_id)
        .join(base, is_same)
        .group_by(longer.c.image_id)
        .having(func.count() == len(stack))
    )


# Ordering


@cache
def _sum_sizes() -> ColumnElement[int]:
    blobs = BLOBS.alias("sized")  # the query may have the table of blobs, too
    contents = select(IMAGE_BLOBS.c.blob_id).where(IMAGE_BLOBS.c.image_id == IMAGES.c.id).correlate(IMAGES)
    return select(func.sum(blobs.c.size)).where(blobs.c.id.in_(contents)).correlate(IMAGES).scalar_subquery()


# Building an expression takes longer than executing it, and most commands need none. So these are functions.
_SORTS: Final[dict[str, Callable[[], ColumnElement[Any]]]] = {
    "name": full_name,
    "size": _sum_sizes,
    "created": lambda: IMAGES.c.created,
    "added": lambda: IMAGES.c.added_at,
    "used": lambda: IMAGES.c.last_used_at,
}


def _build_order(sort: str | None) -> list[ColumnElement[Any]]:
    by_name: list[ColumnElement[Any]] = [IMAGES.c.repository, IMAGES.c.reference]
    if sort is None:
        return by_name
    build_column = _SORTS.get(sort.removeprefix("-"))
    if build_column is None:
        raise InvalidQuery(
            f"{shorten(sort)} is not a sort key: use one of {', '.join(_SORTS)}, with - in front to reverse it"
        )
    column = build_column()
    # Images without a time of build come last.
    return [column.is_(None), column.desc() if sort.startswith("-") else column, *by_name]
