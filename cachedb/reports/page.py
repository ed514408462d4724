"""A cache as one HTML page: what fills the disk, what is shared, what came when, and what nobody uses any more.

The figures are those of the views. The page is whole for a reader without JavaScript, which sorts, searches and zooms.
It loads nothing: no font, no script, no picture. What strangers wrote (names, labels, commands, authors) is escaped by
the template, and a Content-Security-Policy keeps the browser from running any script but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import Connection, text

from cachedb.reports import usage
from cachedb.text import cut, human, printable, short

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["render"]


# What limits the page: some MB and some seconds, however large the cache is.
_ROWS: Final = 1000  # of a table
_TILES: Final = 2000  # a rectangle of the treemap has at least this part of it, or is drawn with others
_DAYS: Final = 120  # of the growth
_SHARING: Final = 12  # images or repositories in the matrix
_LIST: Final = 12  # rows of a short list
_LABELS: Final = 5  # of an image
_TEXT: Final = 160  # characters of a text that a stranger wrote, of which 200 are read
_AGES: Final = (7, 30, 90, 180)  # days without use, between the colours

_WIDTH, _HEIGHT = 1200.0, 620.0  # px, about what the treemap has on a screen; it is drawn in percents

Row = Any  # of a view: SQLAlchemy's, by the names of its columns


def render(connection: Connection, directory: Path) -> str:
    """Return the page of a cache.

    Args:
        connection: in a read transaction, so that all figures are of one moment.
        directory: the cache's, for the title.
    """
    now = datetime.now(UTC)
    repositories = _rows(connection, "SELECT * FROM repository_usage ORDER BY size DESC, repository")
    age, limits = _age_of("last_used_at", now)
    ages = _rows(
        connection,
        f"""
        SELECT repository, {age} AS age, count(*) AS images, sum(unique_size) AS unique_size,
            sum(CASE WHEN complete THEN 0 ELSE 1 END) AS incomplete
        FROM image_usage GROUP BY repository, {age} ORDER BY age
        """,  # noqa: S608
        **limits,
    )
    totals = _totals(connection, repositories, ages)
    return _template().render(
        directory=str(directory),
        now=now,
        ages=_AGES,
        rows=_ROWS,
        totals=totals,
        tiles=_treemap(connection, totals, repositories, ages, now),
        growth=_growth(connection, now),
        uses=_uses(connection, ages, now),
        sharing=_sharing(connection, totals, repositories),
        bases=_rows(
            connection,
            "SELECT base, base_layers, count(*) AS images FROM image_bases GROUP BY base, base_layers "
            "ORDER BY images DESC, base LIMIT :limit",
            limit=_LIST,
        ),
        shared_layers=_rows(
            connection,
            "SELECT digest, size, images, saved_size, substr(created_by, 1, 200) AS created_by FROM shared_layers "
            "ORDER BY saved_size DESC, digest LIMIT :limit",
            limit=_LIST,
        ),
        platforms=_rows(
            connection,
            "SELECT os, architecture, variant, count(*) AS images FROM images "
            "GROUP BY os, architecture, variant ORDER BY images DESC, os, architecture, variant LIMIT :limit",
            limit=_LIST,
        ),
        labels=_label_keys(connection),
        images=_images(connection),
        layers=_rows(
            connection,
            "SELECT digest, size, stored, images, substr(created_by, 1, 200) AS created_by FROM layers "
            "ORDER BY size DESC, digest LIMIT :limit",
            limit=_ROWS,
        ),
        repositories=repositories[:_ROWS],
    )


def _template() -> Template:
    from jinja2 import Environment, StrictUndefined  # late: it is needed here alone

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters.update(
        clean=_clean,
        count=_count,
        exact=lambda size: f"{size:,} bytes",
        grouped=lambda number: f"{number:,}",
        human=human,
        platform=_platform,
        policy=_policy,
        short=short,
    )
    return environment.from_string(Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8"))


def _rows(connection: Connection, query: str, **parameters: object) -> Sequence[Row]:
    return connection.execute(text(query), parameters).all()


def _totals(connection: Connection, repositories: Sequence[Row], ages: Sequence[Row]) -> dict[str, int]:
    """Return the sums: what is stored is unique, shared, held or garbage."""
    found, saved = usage.shares(connection)
    totals = {
        "repositories": len(repositories),
        "images": sum(row.images for row in ages),
        "incomplete": sum(row.incomplete for row in ages),
        "blobs": found["stored"].blobs,
        "stored": found["stored"].size,
        "unique": found["unique"].size,
        "shared_blobs": found["shared"].blobs,
        "shared": found["shared"].size,
        "saved": saved,
        "held_blobs": found["held"].blobs,
        "held": found["held"].size,
        "garbage_blobs": found["reclaimable"].blobs,
        "garbage": found["reclaimable"].size,
    }
    for query in (
        "SELECT count(*) AS missing_blobs, coalesce(sum(size), 0) AS missing "
        "FROM (SELECT DISTINCT digest, size FROM missing_blobs) AS m",
        "SELECT coalesce(sum(saved_size), 0) AS saved_by_layers FROM shared_layers",
        "SELECT count(DISTINCT blob_id) AS layers FROM image_blobs WHERE role = 'layer'",  # as many as the view has
    ):
        totals.update(connection.execute(text(query)).mappings().one())
    return totals


# The treemap


class Box(NamedTuple):
    """A place in a rectangle."""

    x: float
    y: float
    width: float
    height: float


_WHOLE: Final = Box(0, 0, 100, 100)


@dataclass
class Tile:
    """A rectangle of the treemap, with what is drawn in it; its area is its bytes."""

    name: str
    size: int
    kind: str  # its colour
    detail: str = ""
    inside: list[Tile] = field(default_factory=list)
    percent: Box = _WHOLE  # of the tile that it is in
    label: str = ""  # as much of the name as there is room for
    depth: int = 0
    drawn: bool = True


def squarify(sizes: Sequence[int], width: float, height: float) -> list[Box]:
    """Divide a rectangle among sizes, all positive and the largest first, into areas that are as square as may be.

    Rows are laid along the shorter side of what is left. A row takes sizes for as long as that makes its worst
    box no longer than it was (Bruls, Huizing and van Wijk: Squarified Treemaps).
    """
    boxes: list[Box] = []
    left, x, y = sum(sizes), 0.0, 0.0
    while len(boxes) < len(sizes):
        first = len(boxes)
        wide = width >= height
        side, depth = (height, width) if wide else (width, height)
        row, end, worst = 0, first, math.inf
        while end < len(sizes):
            thick, length = depth * (row + sizes[end]) / left, side / (row + sizes[end])
            ratio = max(length * sizes[first] / thick, thick / (length * sizes[end]))
            if ratio > worst:
                break
            row, end, worst = row + sizes[end], end + 1, ratio
        thick = depth * row / left
        done = 0
        for size in sizes[first:end]:
            start, length = side * done / row, side * size / row
            boxes.append(Box(x, y + start, thick, length) if wide else Box(x + start, y, length, thick))
            done += size
        left -= row
        if wide:
            x, width = x + thick, width - thick
        else:
            y, height = y + thick, height - thick
    return boxes


def _treemap(
    connection: Connection, totals: dict[str, int], repositories: Sequence[Row], ages: Sequence[Row], now: datetime
) -> list[Tile]:
    """Return what is stored, each byte once: repositories with their images and layers, and what belongs to several.

    A repository has what no other has, an image what no other image has: as the views count.
    """
    # What is smaller is not read but is the rest of what it is in: so this is quick with millions of blobs.
    least = max(1, totals["stored"] // _TILES)
    blobs = _blob_tiles(connection, least)
    images = _image_tiles(connection, blobs, ages, least, now)
    small = [row.unique_size for row in repositories if row.unique_size < least]
    in_several = totals["unique"] + totals["shared"] - sum(row.unique_size for row in repositories)
    others = [
        Tile(_count(len(small), "smaller repository", "smaller repositories"), sum(small), "rest"),
        Tile("shared by several repositories", in_several, "shared", "each byte once", blobs[("shared",)]),
        Tile("garbage", totals["garbage"], "garbage", "`cachedb gc` frees it", blobs[("garbage",)]),
        Tile("held, in no image", totals["held"], "held", "by a hold, or a process at work", blobs[("held",)]),
    ]
    for tile in others:
        _add_rest(tile, "smaller layers, configs and manifests", tile.kind)
    tiles = _repository_tiles(repositories, blobs, images, ages, least)
    tiles += [tile for tile in others if tile.size]
    _lay_out(tiles, _WIDTH, _HEIGHT, _WIDTH * _HEIGHT / max(1, totals["stored"]), 1)
    return tiles


def _blob_tiles(connection: Connection, least: int) -> dict[tuple[str, ...], list[Tile]]:
    """Return the blobs of at least a size, by what they are in: the kind of that, and the name where it has one."""
    rows = _rows(
        connection,
        """
        SELECT b.digest, b.size, count(DISTINCT i.id) AS images, count(DISTINCT i.repository) AS repositories,
            min(i.repository) AS repository, min(i.reference) AS reference, min(o.role) AS role,
            substr(min(o.created_by), 1, 200) AS created_by, max(CASE WHEN l.digest IS NULL THEN 0 ELSE 1 END) AS held
        FROM blobs AS b LEFT JOIN image_blobs AS o ON o.blob_id = b.id LEFT JOIN images AS i ON i.id = o.image_id
            LEFT JOIN (SELECT DISTINCT digest FROM leases) AS l ON l.digest = b.digest
        WHERE b.stored_at IS NOT NULL AND b.size >= :least
        GROUP BY b.id, b.digest, b.size
        """,
        least=least,
    )
    found: dict[tuple[str, ...], list[Tile]] = defaultdict(list)
    for blob in rows:
        place: tuple[str, ...]
        if blob.images == 1:
            place = "image", blob.repository, blob.reference
        elif blob.repositories == 1:
            place = "inner", blob.repository
        elif blob.images:
            place = ("shared",)
        else:
            place = ("held" if blob.held else "garbage",)
        where = f"in {blob.images:,} images" if blob.images > 1 else ""
        if blob.repositories > 1:
            where += f" of {blob.repositories:,} repositories"
        detail = "\n".join(filter(None, (_clean(blob.created_by or ""), blob.digest, where)))
        name = _command(blob.created_by) or blob.role or short(blob.digest)
        found[place].append(Tile(name, blob.size, place[0], detail))
    return found


def _image_tiles(
    connection: Connection,
    blobs: dict[tuple[str, ...], list[Tile]],
    ages: Sequence[Row],
    least: int,
    now: datetime,
) -> dict[str, list[Tile]]:
    """Return the images with what no other image has, by their repositories; in the colours of their ages."""
    found: dict[str, list[Tile]] = defaultdict(list)
    for image in _rows(
        connection,
        "SELECT name, repository, reference, unique_size, last_used_at FROM image_usage WHERE unique_size >= :least",
        least=least,
    ):
        kind = f"age{_age(image.last_used_at, now)}"
        detail = f"{_clean(image.name)}\nonly in this image\nlast used {image.last_used_at[:10]}"
        layers = blobs["image", image.repository, image.reference]
        tile = Tile(_clean(image.reference), image.unique_size, kind, detail, layers)
        for layer in tile.inside:
            layer.kind = kind
        _add_rest(tile, "smaller layers, configs and manifests", kind)
        found[image.repository].append(tile)
    for age in ages:
        kind = f"age{age.age}"
        drawn = [tile for tile in found[age.repository] if tile.kind == kind]
        # Many small images together still show how long ago they were used.
        if (rest := age.unique_size - sum(tile.size for tile in drawn)) >= max(1, least // 4):
            found[age.repository].append(Tile(_count(age.images - len(drawn), "smaller image"), rest, kind))
    return found


def _repository_tiles(
    repositories: Sequence[Row],
    blobs: dict[tuple[str, ...], list[Tile]],
    images: dict[str, list[Tile]],
    ages: Sequence[Row],
    least: int,
) -> list[Tile]:
    """Return the repositories of at least a size, with their images and what several of those share."""
    inner = {row.repository: row.unique_size for row in repositories}
    for age in ages:
        inner[age.repository] -= age.unique_size
    tiles: list[Tile] = []
    for repository in repositories:
        name = repository.repository
        if repository.unique_size < least:
            continue  # one tile has all of these
        inside = images[name]
        if inner[name] >= max(1, least // 4):
            detail = "by images of this repository"
            shared = Tile("shared in it", inner[name], "inner", detail, blobs["inner", name])
            _add_rest(shared, "smaller layers", "inner")
            inside.append(shared)
        detail = f"{_count(repository.images, 'image')}; not in other repositories"
        tile = Tile(_clean(name), repository.unique_size, "repository", detail, inside)
        _add_rest(tile, "smaller images", "rest")
        tiles.append(tile)
    return tiles


def _add_rest(tile: Tile, name: str, kind: str) -> None:
    """Put what is not drawn for itself into one tile, if anything else is in it."""
    rest = tile.size - sum(inside.size for inside in tile.inside)
    if tile.inside and rest > 0:
        tile.inside.append(Tile(name, rest, kind))


def _lay_out(tiles: list[Tile], width: float, height: float, scale: float, depth: int) -> None:
    """Give tiles their places, and labels where there is room: at the top, at the bottom, and between these."""
    tiles.sort(key=lambda tile: (-tile.size, tile.name))
    for tile, box in zip(tiles, squarify([tile.size for tile in tiles], width, height), strict=True):
        tile.depth = depth
        across, down = 100 / width, 100 / height
        tile.percent = Box(box.x * across, box.y * down, box.width * across, box.height * down)
        # Less than a pixel is seen as the colour behind it, which is that of what it is in.
        tile.drawn = depth == 1 or tile.size * scale >= 1
        letters = int((box.width - 12) / (8 if depth == 1 else 6.6))
        needed = (22, 22 if box.y > 20 else 40, 60)[depth - 1]
        if letters >= min(len(tile.name), 6) and box.height >= needed:
            tile.label = cut(tile.name, letters)
        _lay_out(tile.inside, box.width, box.height, scale, depth + 1)


# What else is drawn


def _growth(connection: Connection, now: datetime) -> dict[str, Any]:
    """Return the last days, those on which nothing came among them, and what came before."""
    rows = {row.day: row for row in _rows(connection, "SELECT day, images, blobs, size FROM growth ORDER BY day")}
    today = now.date()
    first = min([*map(date.fromisoformat, list(rows)[:1]), today - timedelta(days=13)])
    first = max(first, today - timedelta(days=_DAYS - 1))
    last = max([*map(date.fromisoformat, list(rows)[-1:]), today])
    last = min(last, first + timedelta(days=_DAYS))  # a clock may have been ahead
    days = [first + timedelta(days=number) for number in range((last - first).days + 1)]
    shown = [(day, rows.get(day.isoformat())) for day in days]
    return {
        "days": shown,
        "most": max((row.size for _, row in shown if row), default=0),
        "came": sum(row.size for _, row in shown if row),
        "before": sum(row.size for day, row in rows.items() if day < first.isoformat()),
    }


def _uses(connection: Connection, ages: Sequence[Row], now: datetime) -> list[dict[str, int]]:
    """Return, by the time since the last use, images, the bytes last used then, and what removing the older ones frees.

    A blob of several images was last used when the last of them was.
    """
    age, limits = _age_of("used", now)
    sizes = {
        row.age: row
        for row in _rows(
            connection,
            f"""
            SELECT {age} AS age, sum(size) AS size, sum(CASE WHEN held THEN 0 ELSE size END) AS freed
            FROM (
                SELECT b.size, max(i.last_used_at) AS used,
                    EXISTS (SELECT 1 FROM leases AS l WHERE l.digest = b.digest) AS held
                FROM blobs AS b JOIN image_blobs AS o ON o.blob_id = b.id JOIN images AS i ON i.id = o.image_id
                WHERE b.stored_at IS NOT NULL
                GROUP BY b.id, b.size, b.digest
            ) AS u
            GROUP BY 1
            """,  # noqa: S608
            **limits,
        )
    }
    found = []
    for number in range(len(_AGES) + 1):
        images = sum(row.images for row in ages if row.age == number)
        size = sizes[number].size if number in sizes else 0
        freed = sum(row.freed for other, row in sizes.items() if other >= number)
        found.append({"images": images, "size": size, "freed": freed})
    return found


def _sharing(connection: Connection, totals: dict[str, int], repositories: Sequence[Row]) -> dict[str, Any]:
    """Return who shares how much with whom: of the images, or of the repositories if there are many images."""
    if totals["images"] <= _SHARING:
        of, same = "images", "i.repository = :repository AND i.reference = :reference"
        images = _rows(
            connection,
            "SELECT name, repository, reference FROM image_usage WHERE shared_size > 0 ORDER BY shared_size DESC, name",
        )
        chosen = {row.name: {"repository": row.repository, "reference": row.reference} for row in images}
    else:
        of, same = "repositories", "i.repository = :repository"
        most = sorted(repositories, key=lambda row: -row.shared_size)[:_SHARING]
        chosen = {row.repository: {"repository": row.repository} for row in most if row.shared_size}
    query = f"""
        SELECT DISTINCT b.id, b.size
        FROM images AS i JOIN image_blobs AS o ON o.image_id = i.id JOIN blobs AS b ON b.id = o.blob_id
        WHERE b.stored_at IS NOT NULL AND {same}
    """  # noqa: S608
    contents = [{row.id: row.size for row in _rows(connection, query, **keys)} for keys in chosen.values()]
    matrix = []
    for name, mine in zip(chosen, contents, strict=True):
        cells = []
        for other in contents:
            common = sum(mine[blob] for blob in mine.keys() & other.keys())
            smaller = min(sum(mine.values()), sum(other.values()))
            cells.append({"size": common, "percent": round(100 * common / max(1, smaller)), "self": other is mine})
        matrix.append({"name": name, "cells": cells})
    return {"of": of, "matrix": matrix}


def _label_keys(connection: Connection) -> list[dict[str, Any]]:
    """Return the keys of most images, each with its most frequent value."""
    found = []
    for row in _rows(
        connection,
        'SELECT "key", count(*) AS images, count(DISTINCT value) AS different FROM labels '
        'GROUP BY "key" ORDER BY images DESC, "key" LIMIT :limit',
        limit=_LIST,
    ):
        (most,) = _rows(
            connection,
            'SELECT substr(value, 1, 200) AS value, count(*) AS images FROM labels WHERE "key" = :key '
            "GROUP BY labels.value ORDER BY images DESC, labels.value LIMIT 1",
            key=row.key,
        )
        found.append({"key": row.key, "images": row.images, "different": row.different, "most": most})
    return found


def _images(connection: Connection) -> list[dict[str, Any]]:
    """Return the largest images, and the first of their labels."""
    images = _rows(
        connection,
        """
        SELECT name, repository, reference, digest, os, architecture, variant, substr(author, 1, 200) AS author,
            created, created_at, last_used_at, complete, size, missing_size, unique_size, shared_size
        FROM image_usage ORDER BY size DESC, name LIMIT :limit
        """,
        limit=_ROWS,
    )
    found = []
    for image in images:
        labels = _rows(
            connection,
            """
            SELECT substr(l."key", 1, 200) AS "key", substr(l.value, 1, 200) AS value
            FROM image_labels AS l JOIN images AS i ON i.id = l.image_id
            WHERE i.repository = :repository AND i.reference = :reference ORDER BY l."key"
            """,
            repository=image.repository,
            reference=image.reference,
        )
        found.append({"usage": image, "labels": labels[:_LABELS], "more": max(0, len(labels) - _LABELS)})
    return found


# Words


def _count(number: int, noun: str, nouns: str = "") -> str:
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def _clean(words: str, length: int = _TEXT) -> str:
    """Cut a text that a stranger wrote, and write out what could change the direction or the order of what is read."""
    return printable(cut(words, length))


def _command(created_by: str | None) -> str:
    """Return what is particular to a command: what follows the words that builders put before all of them."""
    words = created_by or ""
    for prefix in ("RUN ", "/bin/sh -c ", "#(nop) "):
        words = words.removeprefix(prefix)
    return _clean(words.removesuffix("# buildkit").strip(), 80)


def _platform(row: Row) -> str:
    """Return what an image is for, as `docker pull --platform` takes it."""
    return _clean("/".join(filter(None, (row.os, row.architecture, row.variant)))) or "none, or several"


def _age(last_used_at: str, now: datetime) -> int:
    """Return how long ago that was, as a place in the scale of colours."""
    return sum(last_used_at < _time(now - timedelta(days=days)) for days in _AGES)


def _age_of(column: str, now: datetime) -> tuple[str, dict[str, str]]:
    """Return the same in SQL, with its parameters."""
    cases = " ".join(f"WHEN {column} >= :limit{age} THEN {age}" for age in range(len(_AGES)))
    limits = {f"limit{age}": _time(now - timedelta(days=days)) for age, days in enumerate(_AGES)}
    return f"CASE {cases} ELSE {len(_AGES)} END", limits


def _time(time: datetime) -> str:
    """Return a time as the index has it."""
    return f"{time.replace(tzinfo=None).isoformat(timespec='microseconds')}Z"


def _policy(script: str) -> str:
    """Return the Content-Security-Policy under which a page can do nothing but run this script."""
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{hashed}'; base-uri 'none'"
