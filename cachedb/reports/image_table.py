"""Fetch the images of the HTML page: the rows of its tables, and the data of its search.

The tables have the largest images and layers. The data has all images, so that the search and the counters cover them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, bindparam, text

from cachedb.reports.image_rows import ImageRow
from cachedb.reports.words import (
    AGE_DAYS,
    UNKNOWN_PLATFORM,
    Row,
    clean_text,
    fetch_rows,
    format_age_group,
    format_platform,
)
from cachedb.text import shorten_digest

__all__ = ["FACTS", "LINKED", "TABLE_ROWS", "Images", "ListedImage", "ListedLayer", "fetch_images", "fetch_layers"]


TABLE_ROWS: Final = 1000  # of a table; this keeps the page to a few MB
FACTS: Final = ("incomplete", "held", "duplicate", "outdated")
"""The words that the search finds after ``is:``; the data has a bit for each."""

LINKED: Final = 5  # layers and labels of an image that its row lists


class ListedImage(NamedTuple):
    """A row of the table of images."""

    usage: ImageRow
    platforms: list[str]
    labels: Sequence[Row]
    layers: list[int]  # the numbers of its layers in the table of layers
    facts: list[str]
    base: str


class ListedLayer(NamedTuple):
    """A row of the table of layers."""

    usage: Row  # a row of the view layers
    name: str  # the largest image that has it


class Images(NamedTuple):
    """The images of a cache."""

    listed: list[ListedImage]
    layers: list[ListedLayer]
    numbers: dict[str, int]  # the index of each listed image
    names: set[str]  # of all images
    platforms: list[list[str]]  # of each image
    by_digest: dict[str, list[str]]  # the names of each manifest
    held: int  # images that a hold or a process keeps
    data: dict[str, Any]  # for the search; see `_make_data`


def fetch_layers(connection: Connection) -> Sequence[Row]:
    """Return the largest layers."""
    return fetch_rows(
        connection,
        "SELECT digest, size, stored, images, substr(created_by, 1, 200) AS created_by FROM layers "
        "ORDER BY size DESC, digest LIMIT :limit",
        limit=TABLE_ROWS,
    )


def fetch_images(
    connection: Connection,
    rows: Sequence[ImageRow],
    layers: Sequence[Row],
    bases: Sequence[Row],
    outdated: set[str],
) -> Images:
    """Return the images, each with its layers.

    Args:
        connection: a connection in a read transaction.
        rows: all images, largest first.
        layers: the layers that the page lists.
        bases: rows of the view ``image_bases``.
        outdated: the names of images that have an outdated base.
    """
    by_digest = _group((row.digest, row.name) for row in rows)
    held = set(connection.exec_driver_sql("SELECT DISTINCT digest FROM leases").scalars())
    base_of = {row.name: row.base for row in bases}
    platforms = _fetch_platforms(connection)
    layers_of = _fetch_layers_of_images(connection, layers)
    labels_of = _fetch_labels(connection, rows[:TABLE_ROWS])
    images = []
    for row in rows:
        has = (not row.complete, row.digest in held, len(by_digest[row.digest]) > 1, row.name in outdated)
        facts = [fact for fact, is_so in zip(FACTS, has, strict=True) if is_so]
        base = base_of.get(row.name, "")
        name = row.repository, row.reference
        images.append(
            ListedImage(row, platforms.get(row.name, [UNKNOWN_PLATFORM]), labels_of[name], layers_of[name], facts, base)
        )
    names_of: dict[int, str] = {}
    for image in images:
        for layer in image.layers:
            names_of.setdefault(layer, image.usage.name)
    return Images(
        images[:TABLE_ROWS],
        [ListedLayer(row, names_of.get(number, "")) for number, row in enumerate(layers)],
        {image.usage.name: number for number, image in enumerate(images[:TABLE_ROWS])},
        {image.usage.name for image in images},
        [image.platforms for image in images],
        by_digest,
        sum("held" in image.facts for image in images),
        _make_data(images, layers),
    )


def _group(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for key, value in pairs:
        found[key].append(value)
    return found


def _fetch_platforms(connection: Connection) -> dict[str, list[str]]:
    """Return the known platforms of images, by the image's name; an image without one is left out."""
    rows = fetch_rows(connection, "SELECT name, os, architecture, variant FROM platforms")
    found = _group((row.name, format_platform(row)) for row in rows)
    return {name: sorted(set(platforms)) for name, platforms in found.items()}


def _fetch_layers_of_images(connection: Connection, layers: Sequence[Row]) -> dict[tuple[str, str], list[int]]:
    """Return the numbers of each image's layers in this list, by the image's repository and reference."""
    numbers = {layer.digest: number for number, layer in enumerate(layers)}
    query = text(
        "SELECT DISTINCT i.repository, i.reference, b.digest FROM blobs AS b "
        "JOIN image_blobs AS o ON o.blob_id = b.id AND o.role = 'layer' JOIN images AS i ON i.id = o.image_id "
        "WHERE b.digest IN :digests"
    ).bindparams(bindparam("digests", expanding=True))
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row in connection.execute(query, {"digests": list(numbers)}):
        found[row.repository, row.reference].append(numbers[row.digest])
    for indexes in found.values():
        indexes.sort()
    return found


def _fetch_labels(connection: Connection, images: Sequence[ImageRow]) -> Mapping[tuple[str, str], Sequence[Row]]:
    """Return the labels of images, by repository and reference."""
    query = """
        SELECT substr(l."key", 1, 200) AS "key", substr(l.value, 1, 200) AS value
        FROM image_labels AS l JOIN images AS i ON i.id = l.image_id
        WHERE i.repository = :repository AND i.reference = :reference ORDER BY l."key"
    """
    found: dict[tuple[str, str], Sequence[Row]] = defaultdict(list)
    for row in images:
        found[row.repository, row.reference] = fetch_rows(
            connection, query, repository=row.repository, reference=row.reference
        )
    return found


def _make_data(images: Sequence[ListedImage], layers: Sequence[Row]) -> dict[str, Any]:
    """Return the data of all images for the script of the page; numbers stand for repeated texts."""
    repositories, platforms, bases = _Numbers(), _Numbers(), _Numbers()
    rows = [
        [
            repositories.number(image.usage.repository),
            clean_text(image.usage.name[len(image.usage.repository) :], 400),
            shorten_digest(image.usage.digest).removeprefix("sha256:"),
            [platforms.number(platform) for platform in image.platforms],
            image.usage.size,
            image.usage.missing_size,
            image.usage.unique_size,
            image.usage.shared_size,
            *(_make_day(time) for time in (image.usage.created, image.usage.added_at, image.usage.last_used_at)),
            image.usage.age,
            sum(1 << FACTS.index(fact) for fact in image.facts),
            bases.number(image.base),
            image.layers,
        ]
        for image in images
    ]
    return {
        "facts": FACTS,
        "ages": [format_age_group(number) for number in range(len(AGE_DAYS) + 1)],
        "repositories": repositories.list_texts(),
        "platforms": platforms.list_texts(),
        "bases": bases.list_texts(),
        "layers": [shorten_digest(layer.digest) for layer in layers],
        "images": rows,
    }


class _Numbers:
    """Number texts in the order in which they first occur."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        return self._numbers.setdefault(text, len(self._numbers))

    def list_texts(self) -> list[str]:
        return [clean_text(text, 400) for text in self._numbers]


def _make_day(time: str | None) -> int:
    """Return the day of a time of the index as a number: 20260131; 0 if there is none."""
    digits = (time or "")[:10].replace("-", "")
    return int(digits) if digits.isascii() and digits.isdecimal() else 0
