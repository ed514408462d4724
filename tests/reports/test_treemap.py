"""The treemap: areas are to scale, names lose their first path parts first, and no name covers another one."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachedb.reports import treemap
from cachedb.reports.treemap import Tile
from cachedb.reports.words import shorten_path


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=60), st.floats(10, 2000), st.floats(10, 2000))
def test_areas_are_to_scale_and_fill_the_whole_without_overlap(sizes: list[int], width: float, height: float) -> None:
    sizes.sort(reverse=True)
    boxes = treemap.squarify(sizes, width, height)
    assert len(boxes) == len(sizes)
    near = 1e-6 * (width + height)
    for size, box in zip(sizes, boxes, strict=True):
        assert box.width * box.height == pytest.approx(width * height * size / sum(sizes), rel=1e-6, abs=1e-9)
        assert box.x >= -near
        assert box.y >= -near
        assert box.x + box.width <= width + near
        assert box.y + box.height <= height + near
    # The areas add up to the whole, so they fill it if none overlap.
    for one, other in combinations(boxes, 2):
        beside = one.x + one.width <= other.x + near or other.x + other.width <= one.x + near
        above = one.y + one.height <= other.y + near or other.y + other.height <= one.y + near
        assert beside or above


def test_areas_are_nearly_square_if_possible() -> None:
    assert {(round(box.width), round(box.height)) for box in treemap.squarify([1] * 16, 80, 80)} == {(20, 20)}
    for box in treemap.squarify([6, 6, 4, 3, 2, 2, 1], 600, 400):  # the example of the algorithm's authors
        assert max(box.width / box.height, box.height / box.width) < 3


@pytest.mark.parametrize(
    ("letters", "shown"),
    [
        (50, "registry.corp.example.com/team/checkout-service"),
        (46, "…/team/checkout-service"),
        (23, "…/team/checkout-service"),
        (22, "…/checkout-service"),
        (17, "checkout-service"),
        (16, "checkout-service"),
        (15, "checkou…service"),
        (6, "che…ce"),
    ],
)
def test_a_name_loses_its_first_path_parts_before_its_end(letters: int, shown: str) -> None:
    name = "registry.corp.example.com/team/checkout-service"
    assert shorten_path(name, letters) == shown
    assert len(shown) <= letters


def make_tile(sizes: object, kind: int = 0) -> Tile:
    kinds = ("namespace", "repository", "image", "layer")
    name = f"registry.corp.example.com/team/{kinds[kind]}"
    if isinstance(sizes, int):
        return Tile(name, sizes, kinds[kind], is_path=True)
    assert isinstance(sizes, list)
    inside = [make_tile(size, min(kind + 1, 3)) for size in sizes]
    return Tile(name, sum(tile.size for tile in inside), kinds[kind], inside=inside, is_path=True)


NESTED = st.recursive(st.integers(1, 10**6), lambda inside: st.lists(inside, min_size=1, max_size=5), max_leaves=40)


@pytest.mark.slow
@given(st.lists(NESTED, min_size=1, max_size=6))
def test_no_name_in_a_treemap_covers_another_one_or_leaves_its_tile(sizes: list[object]) -> None:
    tiles = [make_tile(size) for size in sizes]
    treemap.lay_out(tiles)
    labels: list[tuple[float, float, float, float]] = []

    def walk(tiles: list[Tile], x: float, y: float, width: float, height: float) -> None:
        for tile in tiles:
            left, top = x + width * tile.percent.x / 100, y + height * tile.percent.y / 100
            across, down = width * tile.percent.width / 100, height * tile.percent.height / 100
            if tile.label:
                letter = 8.6 if tile.depth == 1 else 7.4 if tile.kind in ("namespace", "repository") else 6.6
                base = top + tile.label_y
                labels.append((left + 5, base - 10, left + 5 + letter * len(tile.label), base + 2))
                assert labels[-1][2] <= left + across
                assert base <= top + down
            walk(tile.inside, left, top, across, down)

    walk(tiles, 0, 0, 1200, 620)
    for one, other in combinations(labels, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_a_heading_moves_the_names_below_it_down() -> None:
    outer = make_tile([[5, 5], 1])
    treemap.lay_out([outer])
    assert outer.label_y < outer.inside[0].label_y < outer.inside[0].inside[0].label_y
