"""A plan for a limit removes the least recently used images, and no image that the limit does not need."""

from __future__ import annotations

import os
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachedb import Cache, Keep, Policy, Remove
from cachedb.operations import least
from tests.support.pruning import names_of, write_rows

EXAMPLES = int(os.environ.get("CACHEDB_FUZZ", "15"))


@pytest.mark.slow
@settings(max_examples=4 * EXAMPLES)
@given(
    st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=12),
    st.lists(st.integers(0, 100), min_size=10, max_size=10),
    st.sets(st.integers(0, 9), max_size=3),
    st.sets(st.integers(0, 11), max_size=3),
    st.sets(st.integers(0, 11), max_size=3),
    st.integers(1, 700),
    st.integers(1, 12),
)
def test_a_plan_is_the_least_recently_used_images_without_those_that_the_target_does_not_need(
    rows_only: Cache,
    images: list[list[int]],
    sizes: list[int],
    leased: set[int],
    kept: set[int],
    removed: set[int],
    to_free: int,
    first_images: int,
) -> None:
    write_rows(rows_only.directory, images, sizes, leased)

    def freed_by(victims: set[int]) -> int:
        dying = {blob for number in victims for blob in images[number]}
        staying = {blob for number in range(len(images)) if number not in victims for blob in images[number]}
        return len(victims) + sum(sizes[blob] for blob in dying - staying - leased if sizes[blob] != 3)

    unused = {blob for blob in range(10) if not any(blob in blobs for blobs in images)}
    garbage_size = sum(sizes[blob] for blob in unused - leased if sizes[blob] != 3)
    policy = Policy(
        keep=tuple(Keep(names=(f"app:{number}",)) for number in sorted(kept)),
        remove=tuple(Remove(names=(f"app:{number}",)) for number in sorted(removed, reverse=True)),
    )
    with patch.object(least, "_FIRST_IMAGES", first_images):
        plan = rows_only.plan_prune(policy, to_free=to_free)

    candidates = [number for number in range(len(images)) if number not in kept]
    by_rule = [number for number in sorted(removed, reverse=True) if number in candidates]
    chosen, target = list(by_rule), to_free - garbage_size
    for number in candidates:
        if number not in by_rule and freed_by(set(chosen)) < target:
            chosen.append(number)
    reached = min(target, freed_by(set(chosen)))
    for number in reversed(chosen[len(by_rule) :]):
        if freed_by(set(chosen) - {number}) >= reached:
            chosen.remove(number)

    assert names_of(plan) == [f"app:{number}" for number in chosen]
    for place, image in enumerate(plan.images, 1):
        assert image.total_freed_size == freed_by(set(chosen[:place]))
        assert image.freed_size == image.total_freed_size - freed_by(set(chosen[: place - 1]))
        assert image.size == 1 + sum(sizes[blob] for blob in set(images[chosen[place - 1]]))
    limit_images = set(chosen[len(by_rule) :])
    assert all(freed_by(set(chosen) - {number}) < reached for number in limit_images), "no proper subset is enough"
    assert plan.garbage_size == garbage_size
    assert plan.unmet_size == max(0, target - freed_by(set(chosen)))


def test_images_that_the_target_does_not_need_stay_if_their_blobs_are_read_one_by_one(
    rows_only: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(least, "_FIRST_IMAGES", 1)
    monkeypatch.setattr(least, "_MOST_IMAGES", 1)
    # The images free 1, 21, 11, 21 and 101 bytes in this order; the first layer dies with the last image.
    write_rows(rows_only.directory, [[0], [1], [2], [3], [0, 4]], [10, 20, 10, 20, 90, 0, 0, 0, 0, 0], set())
    plan = rows_only.plan_prune(to_free=120)
    assert [(str(image.name), image.freed_size) for image in plan.images] == [
        ("app:0", 1), ("app:1", 21), ("app:4", 101)
    ]  # fmt: skip


def test_a_blob_of_an_image_that_stays_and_an_absent_blob_are_not_counted_as_freed(rows_only: Cache) -> None:
    # All three images free 1, 1 and 106 bytes. The first two may stay: they cost 6 bytes and 1 byte more.
    write_rows(rows_only.directory, [[0], [0], [0, 1, 2]], [5, 100, 3, 0, 0, 0, 0, 0, 0, 0], set())
    plan = rows_only.plan_prune(to_free=100)
    assert [(str(image.name), image.freed_size, image.total_freed_size) for image in plan.images] == [
        ("app:2", 101, 101)
    ]  # fmt: skip


def test_a_blob_of_an_image_outside_of_the_plan_may_be_lost_to_an_image_that_stays(rows_only: Cache) -> None:
    # The first three images free 1, 21 and 81 bytes. The layer of 50 bytes is also in the last, which stays anyway.
    write_rows(rows_only.directory, [[0], [1], [2], [0]], [50, 20, 80, 0, 0, 0, 0, 0, 0, 0], set())
    assert names_of(rows_only.plan_prune(to_free=102)) == ["app:1", "app:2"]
