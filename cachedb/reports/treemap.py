"""Lay out a treemap: rectangles whose areas are proportional to bytes, and their names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from cachedb.reports.words import shorten_path
from cachedb.text import truncate

__all__ = ["Box", "Tile", "lay_out", "squarify"]


_WIDTH_PIXELS, _HEIGHT_PIXELS = 1200.0, 620.0  # an estimate; tiles are drawn in percent
_LETTER_PIXELS: Final = 6.6  # the width of a letter, on average
_BOLD_LETTER_PIXELS: Final = 7.4  # of the name of a namespace or repository
_HEADING_LETTER_PIXELS: Final = 8.6  # at depth 1, where letters are bold and larger
_LINE_PIXELS: Final = 15
_HEADING_LINE_PIXELS: Final = 18
_MARGIN_PIXELS: Final = 5
_LEAST_LETTERS: Final = 6  # a longer name is not cut to fewer letters, but left out


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
    title: str = ""  # the full name of an image or repository, if the name is only a part of it
    image: str = ""  # the image, if the tile is one
    repository: str = ""  # the repository, if the tile is one
    percent: Box = _WHOLE  # relative to the enclosing tile
    label: str = ""  # the part of the name that fits
    label_y: float = 0  # the base line of the label, in pixels below the top of the tile
    depth: int = 0
    drawn: bool = True
    is_path: bool = False  # a path that is too long loses its first parts; another name loses its end


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


def lay_out(tiles: list[Tile]) -> None:
    """Set the place of each tile, and its label if it fits."""
    area = Box(0, 0, _WIDTH_PIXELS, _HEIGHT_PIXELS)
    _lay_out(tiles, area, area.width * area.height / max(1, sum(tile.size for tile in tiles)), [], 1)


def _lay_out(tiles: list[Tile], area: Box, scale: float, headings: list[Box], depth: int) -> None:
    tiles.sort(key=lambda tile: (-tile.size, tile.name))
    boxes = squarify([tile.size for tile in tiles], area.width, area.height)
    for tile, box in zip(tiles, boxes, strict=True):
        across, down = 100 / area.width, 100 / area.height
        tile.depth = depth
        tile.percent = Box(box.x * across, box.y * down, box.width * across, box.height * down)
        # A tile smaller than a pixel is not drawn: the enclosing tile shows through.
        tile.drawn = depth == 1 or tile.size * scale >= 1
        place = Box(area.x + box.x, area.y + box.y, box.width, box.height)
        label = _place_label(tile, place, headings)
        _lay_out(tile.inside, place, scale, [*headings, label] if label else headings, depth + 1)


def _place_label(tile: Tile, place: Box, headings: list[Box]) -> Box | None:
    """Set the label of a tile, below the headings that cover the tile's upper edge; return its place.

    The script of the page repeats this with the true size of the window.
    """
    is_bold = tile.kind in ("namespace", "repository")
    letter = _HEADING_LETTER_PIXELS if tile.depth == 1 else _BOLD_LETTER_PIXELS if is_bold else _LETTER_PIXELS
    line = _HEADING_LINE_PIXELS if tile.depth == 1 else _LINE_PIXELS
    letters = int((place.width - 2 * _MARGIN_PIXELS) / letter)
    if letters < min(len(tile.name), _LEAST_LETTERS):
        return None
    words = shorten_path(tile.name, letters) if tile.is_path else truncate(tile.name, letters)
    label = Box(place.x + _MARGIN_PIXELS, place.y + 3, len(words) * letter, line)
    for heading in sorted(headings, key=lambda heading: heading.y):
        if _overlap(label, heading):
            label = label._replace(y=heading.y + heading.height)
    if label.y + line > place.y + place.height:
        return None
    tile.label, tile.label_y = words, label.y - place.y + line - 4
    return label


def _overlap(one: Box, other: Box) -> bool:
    return (
        one.x < other.x + other.width
        and other.x < one.x + one.width
        and one.y < other.y + other.height
        and other.y < one.y + one.height
    )
