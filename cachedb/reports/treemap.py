"""Lay out blobs, images and repositories as rectangles for the HTML page."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, NamedTuple

from sqlalchemy import Connection

from cachedb.reports.words import Row, clean_text, fetch_rows, find_age_group, format_command, format_count
from cachedb.text import shorten_digest, truncate

__all__ = ["lay_out_treemap"]


_TILES: Final = 2000  # content smaller than the stored bytes divided by this is merged into one tile
_WIDTH_PIXELS, _HEIGHT_PIXELS = 1200.0, 620.0  # an estimate; tiles are drawn in percent


class Box(NamedTuple):
    """A rectangle inside another one."""

    x: float
    y: float
    width: float
    height: float


_WHOLE: Final = Box(0, 0, 100, 100)


@dataclass
class Tile:
    """A rectangle of the treemap and the rectangles inside it; its area is proportional to its bytes."""

    name: str
    size: int
    kind: str  # determines the colour
    detail: str = ""
    inside: list[Tile] = field(default_factory=list)
    percent: Box = _WHOLE  # relative to the enclosing tile
    label: str = ""  # the part of the name that fits
    depth: int = 0
    drawn: bool = True


def squarify(sizes: Sequence[int], width: float, height: float) -> list[Box]:
    """Divide a rectangle into nearly square boxes with the given sizes.

    The sizes are positive, largest first. Each row lies along the shorter side of the remaining rectangle. A row takes
    sizes until one more would increase its largest aspect ratio (Bruls, Huizing and van Wijk: Squarified Treemaps).
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


def lay_out_treemap(
    connection: Connection, totals: dict[str, int], repositories: Sequence[Row], ages: Sequence[Row], now: datetime
) -> list[Tile]:
    """Return tiles that show each stored byte once: repositories contain images, which contain layers.

    As in the views, the tile of a repository or image has the bytes that only this repository or image uses. Bytes that
    several repositories use have a separate tile.
    """
    # Smaller blobs are not read but merged into one tile, so this is fast even with millions of blobs.
    min_bytes = max(1, totals["stored"] // _TILES)
    blobs = _make_blob_tiles(connection, min_bytes)
    images = _make_image_tiles(connection, blobs, ages, min_bytes, now)
    small = [row.unique_size for row in repositories if row.unique_size < min_bytes]
    in_several = totals["unique"] + totals["shared"] - sum(row.unique_size for row in repositories)
    others = [
        Tile(format_count(len(small), "smaller repository", "smaller repositories"), sum(small), "rest"),
        Tile("shared by several repositories", in_several, "shared", "each byte is drawn once", blobs[("shared",)]),
        Tile("garbage", totals["garbage"], "garbage", "`cachedb gc` frees it", blobs[("garbage",)]),
        Tile("held, in no image", totals["held"], "held", "by a hold or a process", blobs[("held",)]),
    ]
    for tile in others:
        _add_rest(tile, "smaller layers, configs and manifests", tile.kind)
    tiles = _make_repository_tiles(repositories, blobs, images, ages, min_bytes)
    tiles += [tile for tile in others if tile.size]
    _lay_out(tiles, _WIDTH_PIXELS, _HEIGHT_PIXELS, _WIDTH_PIXELS * _HEIGHT_PIXELS / max(1, totals["stored"]), 1)
    return tiles


def _make_blob_tiles(connection: Connection, min_bytes: int) -> dict[tuple[str, ...], list[Tile]]:
    """Return the blobs of at least ``min_bytes`` bytes, by the kind and name of the tile they belong to."""
    rows = fetch_rows(
        connection,
        """
        SELECT b.digest, b.size, count(DISTINCT i.id) AS images, count(DISTINCT i.repository) AS repositories,
            min(i.repository) AS repository, min(i.reference) AS reference, min(o.role) AS role,
            substr(min(o.created_by), 1, 200) AS created_by, max(CASE WHEN l.digest IS NULL THEN 0 ELSE 1 END) AS held
        FROM blobs AS b LEFT JOIN image_blobs AS o ON o.blob_id = b.id LEFT JOIN images AS i ON i.id = o.image_id
            LEFT JOIN (SELECT DISTINCT digest FROM leases) AS l ON l.digest = b.digest
        WHERE b.stored_at IS NOT NULL AND b.size >= :min_bytes
        GROUP BY b.id, b.digest, b.size
        """,
        min_bytes=min_bytes,
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
        detail = "\n".join(filter(None, (clean_text(blob.created_by or ""), blob.digest, where)))
        name = format_command(blob.created_by) or blob.role or shorten_digest(blob.digest)
        found[place].append(Tile(name, blob.size, place[0], detail))
    return found


def _make_image_tiles(
    connection: Connection,
    blobs: dict[tuple[str, ...], list[Tile]],
    ages: Sequence[Row],
    min_bytes: int,
    now: datetime,
) -> dict[str, list[Tile]]:
    """Return the images by repository, each with its unique bytes and the colour of its age."""
    found: dict[str, list[Tile]] = defaultdict(list)
    for image in fetch_rows(
        connection,
        "SELECT name, repository, reference, unique_size, last_used_at "
        "FROM image_usage WHERE unique_size >= :min_bytes",
        min_bytes=min_bytes,
    ):
        kind = f"age{find_age_group(image.last_used_at, now)}"
        detail = f"{clean_text(image.name)}\nonly in this image\nlast used {image.last_used_at[:10]}"
        layers = blobs["image", image.repository, image.reference]
        tile = Tile(clean_text(image.reference), image.unique_size, kind, detail, layers)
        for layer in tile.inside:
            layer.kind = kind
        _add_rest(tile, "smaller layers, configs and manifests", kind)
        found[image.repository].append(tile)
    for age in ages:
        kind = f"age{age.age}"
        drawn = [tile for tile in found[age.repository] if tile.kind == kind]
        # Many small images share one tile per age.
        if (rest := age.unique_size - sum(tile.size for tile in drawn)) >= max(1, min_bytes // 4):
            found[age.repository].append(Tile(format_count(age.images - len(drawn), "smaller image"), rest, kind))
    return found


def _make_repository_tiles(
    repositories: Sequence[Row],
    blobs: dict[tuple[str, ...], list[Tile]],
    images: dict[str, list[Tile]],
    ages: Sequence[Row],
    min_bytes: int,
) -> list[Tile]:
    """Return the tiles of repositories of at least ``min_bytes`` bytes, with their images inside."""
    inner = {row.repository: row.unique_size for row in repositories}
    for age in ages:
        inner[age.repository] -= age.unique_size
    tiles: list[Tile] = []
    for repository in repositories:
        name = repository.repository
        if repository.unique_size < min_bytes:
            continue  # the caller merges it into one tile
        inside = images[name]
        if inner[name] >= max(1, min_bytes // 4):
            detail = "by images of this repository"
            shared = Tile("shared within the repository", inner[name], "inner", detail, blobs["inner", name])
            _add_rest(shared, "smaller layers", "inner")
            inside.append(shared)
        detail = f"{format_count(repository.images, 'image')}; not in other repositories"
        tile = Tile(clean_text(name), repository.unique_size, "repository", detail, inside)
        _add_rest(tile, "smaller images", "rest")
        tiles.append(tile)
    return tiles


def _add_rest(tile: Tile, name: str, kind: str) -> None:
    """Add a tile for the bytes of a tile that its inner tiles do not cover, if it has inner tiles."""
    rest = tile.size - sum(inside.size for inside in tile.inside)
    if tile.inside and rest > 0:
        tile.inside.append(Tile(name, rest, kind))


def _lay_out(tiles: list[Tile], width: float, height: float, scale: float, depth: int) -> None:
    """Set the place of each tile, and its label if it fits; the label's position depends on the depth."""
    tiles.sort(key=lambda tile: (-tile.size, tile.name))
    for tile, box in zip(tiles, squarify([tile.size for tile in tiles], width, height), strict=True):
        tile.depth = depth
        across, down = 100 / width, 100 / height
        tile.percent = Box(box.x * across, box.y * down, box.width * across, box.height * down)
        # A tile smaller than a pixel is not drawn: the enclosing tile shows through.
        tile.drawn = depth == 1 or tile.size * scale >= 1
        letters = int((box.width - 12) / (8 if depth == 1 else 6.6))
        needed = (22, 22 if box.y > 20 else 40, 60)[depth - 1]
        if letters >= min(len(tile.name), 6) and box.height >= needed:
            tile.label = truncate(tile.name, letters)
        _lay_out(tile.inside, box.width, box.height, scale, depth + 1)
