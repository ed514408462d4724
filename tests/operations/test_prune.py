"""A prune frees exactly the bytes of its plan, removes nothing else, and lets other processes work."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachedb import Busy, Cache, Limits, Name, NotInCache, Plan, Policy, Remove, SkippedImage
from cachedb.disk import single_flight
from cachedb.disk.sizes import measure_files
from cachedb.operations import prune
from cachedb.operations.plan import make_plan
from tests.conftest import files_of, stored_rows
from tests.support import make
from tests.support.ages import age, set_time
from tests.support.promises import check
from tests.support.pruning import ALL, IMAGES, Image, check_whole, fill, names_of, save_old

EXAMPLES = int(os.environ.get("CACHEDB_FUZZ", "15"))

# What is freed


@pytest.mark.slow
@settings(max_examples=EXAMPLES)
@given(
    IMAGES,
    st.sets(st.integers(0, 5)),
    st.sets(st.integers(0, 5), max_size=2),
    st.sets(st.integers(0, 5), max_size=2),
    st.sets(st.integers(0, 5), max_size=2),
    st.sets(st.integers(0, 5)),
    st.integers(1, 60_000),
    st.booleans(),
)
def test_a_prune_frees_exactly_the_bytes_of_its_plan(
    images: list[Image],
    held: set[int],
    leased: set[int],
    pinned: set[int],
    expired: set[int],
    removed: set[int],
    to_free: int,
    has_garbage: bool,
) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        Cache.open(Path(folder) / "cache") as cache,
        Cache.open(cache.directory) as user,
        ExitStack() as leases,
    ):
        names = fill(cache, images)
        for number in leased:
            if number < len(names):
                leases.enter_context(user.hold(names[number]))
                age(cache, "last_used_at", names[number], days=1)
        for number in held:
            if number < len(names):
                cache.add_hold(names[number])
            with suppress(NotInCache):  # a held layer of images that can be removed
                cache.add_hold(make.digest_of(make.layer(number)))
        cache.pin(*(names[number] for number in pinned if number < len(names)))
        for number in expired:
            if number < len(names):
                age(cache, "expires_at", names[number], seconds=1)
        if has_garbage:
            with Cache.open(cache.directory) as other:
                other.add_blob(b"garbage" * 1000)
        rules = tuple(Remove(names=(names[number],)) for number in removed if number < len(names))
        before = files_of(cache.directory)
        garbage = cache.collect_garbage(dry_run=True)
        plan = cache.plan_prune(Policy(remove=rules), to_free=to_free)
        assert plan.garbage_size == garbage.bytes
        done = cache.prune(Policy(remove=rules), to_free=to_free)
        after = files_of(cache.directory)
        assert done.images == [image.name for image in plan.images]
        assert done.freed_size == plan.freed_size == sum(image.freed_size for image in plan.images)
        assert done.garbage == garbage
        assert sum(before.values()) - sum(after.values()) == plan.freed_size + plan.garbage_size
        assert after == stored_rows(cache.directory)
        if plan.unmet_size:
            files = measure_files(cache.directory).kept
            kept_blobs = {name: size for name, size in plan.kept_sizes.items() if name not in files}
            assert sum(kept_blobs.values()) == sum(after.values())
        else:
            assert plan.kept_sizes == {}


def test_a_prune_says_what_is_used_and_what_is_missing_afterwards(cache: Cache) -> None:
    save_old(cache, "app:1", "app:2")
    cache.add_hold("app:1")
    pruned = cache.prune(Policy(Limits(max_size=1000)))
    usage = cache.get_usage()
    assert pruned.used_size == usage.used_size
    assert pruned.unmet_size > 0
    assert pruned.kept_sizes["held"] == usage.stored.size
    assert cache.prune(ALL).unmet_size == 0


def test_progress_reaches_the_bytes_of_the_plan(cache: Cache) -> None:
    save_old(cache, "app:1", "app:2")
    plan, seen = cache.plan_prune(ALL), list[tuple[int, int]]()
    cache.prune(ALL, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (plan.freed_size, plan.freed_size)


def test_a_prune_leaves_a_cache_that_keeps_its_promises(cache: Cache) -> None:
    names = fill(cache, [([1, 2], "plain"), ([2, 3], "index"), ([3], "half"), ([], "alias"), ([1, 4], "plain")])
    plan = cache.plan_prune(to_free=3000)
    assert cache.prune(to_free=3000).freed_size == plan.freed_size
    assert 0 < len(cache.list_names()) < len(names)
    cache.close()
    check(cache.directory)


# What is removed


def test_the_policy_of_the_cache_is_used_unless_another_is_given(cache: Cache) -> None:
    save_old(cache, "app:1", "app:2")
    (cache.directory / "policy.toml").write_text('[[remove]]\nnames = "app:1"\n')
    assert names_of(cache.plan_prune()) == ["app:1"]
    assert cache.plan_prune(Policy()).images == []
    assert cache.explain_prune("app:1").rule == "remove 1"
    assert cache.prune().images == ["app:1"]


def test_a_use_that_is_not_yet_written_counts(cache: Cache) -> None:
    save_old(cache, "app:1")
    with Cache.open(cache.directory) as other:
        other.get_manifest("app:1")
        assert other.prune(ALL).images == []


def test_a_plan_is_applied_to_nothing_but_its_images(cache: Cache) -> None:
    save_old(cache, "app:1", "app:2", "app:3")
    plan = cache.plan_prune(ALL)
    assert cache.prune(plan=plan.images[:1]).images == ["app:3"]
    assert cache.prune(ALL, plan=[]).images == []
    assert cache.list_names() == ["app:1", "app:2"]


def move(cache: Cache) -> None:
    make.save(cache, "app:1", make.image(200))
    age(cache, "last_used_at", "app:1", days=2)


def touch(cache: Cache) -> None:
    age(cache, "last_used_at", "app:1", days=1)


def hold_it(cache: Cache) -> None:
    cache.add_hold("app:1")


def pin_it(cache: Cache) -> None:
    cache.pin("app:1")


def remove(cache: Cache) -> None:
    cache.remove_manifest("app:1")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (move, "now another image"), (touch, "used since the plan"), (hold_it, "held"), (pin_it, "pinned"),
        (remove, "no longer in the cache"),
    ],
)  # fmt: skip
def test_an_image_that_changes_after_its_plan_stays(cache: Cache, change: Callable[[Cache], None], reason: str) -> None:
    save_old(cache, "app:1", "app:2")
    plan = cache.plan_prune(ALL)
    change(cache)
    if change is move:  # only the digest differs
        set_time(cache, "last_used_at", "app:1", plan.images[1].last_used_at)
    before = cache.list_names()
    done = cache.prune(plan=plan.images)
    assert done.images == ["app:2"]
    assert done.skipped == [SkippedImage(Name.parse("app:1"), reason)]
    assert cache.list_names() == [name for name in before if name != "app:2"]
    check_whole(cache)


def test_an_image_that_a_process_uses_after_its_plan_stays(cache: Cache) -> None:
    save_old(cache, "app:1")
    plan = cache.plan_prune(ALL)
    with cache.hold("app:1"):
        set_time(cache, "last_used_at", "app:1", plan.images[0].last_used_at)
        assert cache.prune(plan=plan.images).skipped == [SkippedImage(Name.parse("app:1"), "in use")]
    check_whole(cache)


# Beside other processes


def test_other_writers_get_the_lock_between_two_batches(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    save_old(cache, *(f"app:{number}" for number in range(8)))
    monkeypatch.setattr(prune, "_BATCH_SECONDS", 0.0)
    batches = []
    done = cache.prune(ALL, progress=lambda *_: batches.append(len(cache.list_names())))
    assert batches == [7, 6, 5, 4, 3, 2, 1, 0]
    assert len(done.images) == 8


def test_one_process_prunes_at_a_time(cache: Cache) -> None:
    save_old(cache, "app:1")
    begun, end = threading.Event(), threading.Event()

    def hold_claim() -> None:
        with single_flight.try_claim(cache.directory, "prune") as has_claim:
            assert has_claim
            begun.set()
            end.wait()

    other = threading.Thread(target=hold_claim)
    other.start()
    begun.wait()
    try:
        with Cache.open(cache.directory, wait=0) as impatient, pytest.raises(Busy, match="prune"):
            impatient.prune(ALL)
        assert cache.list_names() == ["app:1"]
        waiting = threading.Thread(target=lambda: cache.prune(ALL))
        waiting.start()
    finally:
        end.set()
        other.join()
    waiting.join()
    assert cache.list_names() == []


# Planning again

CountPlans = Callable[[Callable[[int], None]], list[Plan]]


@pytest.fixture
def count_plans(monkeypatch: pytest.MonkeyPatch) -> CountPlans:
    """Return a function that lets another one run after each plan of a prune, and returns the list of plans."""
    real, plans = make_plan, list[Plan]()

    def count(change: Callable[[int], None]) -> list[Plan]:
        def plan_and_change(*arguments: Any, **options: Any) -> Plan:
            assert len(plans) < 100
            plans.append(real(*arguments, **options))
            change(len(plans))
            return plans[-1]

        monkeypatch.setattr(prune, "make_plan", plan_and_change)
        return plans

    return count


def use_first(cache: Cache, name: str) -> Callable[[int], None]:
    """Return a function that uses an image after the first plan."""
    return lambda number: age(cache, "last_used_at", name, seconds=0) if number == 1 else None


def test_other_images_go_if_planned_ones_are_used_and_the_limit_would_be_missed(
    cache: Cache, count_plans: CountPlans
) -> None:
    save_old(cache, "app:1", "app:2", "app:3", "app:4")
    with Cache.open(cache.directory) as other:
        other.add_blob(b"garbage" * 10_000)
    sizes = {str(image.name): image.size for image in cache.list_manifests()}
    needed = 70_000 + sizes["app:4"] + 1
    plans, seen = count_plans(use_first(cache, "app:4")), list[tuple[int, int]]()
    done = cache.prune(to_free=needed, progress=lambda done, total: seen.append((done, total)))
    assert [names_of(plan) for plan in plans] == [["app:4", "app:3"], ["app:2"]]
    assert done.images == ["app:3", "app:2"]
    assert done.skipped == [SkippedImage(Name.parse("app:4"), "used since the plan")]
    assert (done.unmet_size, done.garbage, done.garbage_sizes["reclaimable"]) == (0, (1, 70_000), 70_000)
    assert done.freed_size == sizes["app:3"] + sizes["app:2"]
    assert done.blobs == 6
    assert seen == sorted(seen)
    assert seen[-1] == (done.freed_size, done.freed_size)


@pytest.mark.slow
def test_another_plan_measures_a_size_limit_anew(cache: Cache, count_plans: CountPlans) -> None:
    save_old(cache, *(f"app:{number}" for number in range(1, 20)))
    limits = Limits(max_size=cache.get_usage().used_size - 1)
    plans = count_plans(use_first(cache, "app:19"))
    done = cache.prune(Policy(limits))
    assert (len(plans), str(done.images[0]), done.unmet_size) == (2, "app:18", 0)
    assert done.skipped == [SkippedImage(Name.parse("app:19"), "used since the plan")]


def test_an_image_that_goes_with_a_later_plan_is_not_skipped(cache: Cache, count_plans: CountPlans) -> None:
    save_old(cache, "app:1")
    count_plans(lambda number: age(cache, "last_used_at", "app:1", days=1) if number == 1 else None)
    done = cache.prune(to_free=1)
    assert done.images == ["app:1"]
    assert (done.skipped, done.unmet_size) == ([], 0)


def test_a_prune_gives_up_if_its_images_are_used_again_and_again(cache: Cache, count_plans: CountPlans) -> None:
    save_old(cache, "app:1")
    plans = count_plans(lambda number: age(cache, "last_used_at", "app:1", days=1, seconds=number))
    done = cache.prune(to_free=1)
    assert len(plans) == 10
    assert [str(image.name) for image in done.skipped] == ["app:1"]
    assert (done.images, done.unmet_size) == ([], 1)


def test_images_that_only_rules_remove_are_planned_once(cache: Cache, count_plans: CountPlans) -> None:
    save_old(cache, "app:1", "app:2")
    plans = count_plans(use_first(cache, "app:2"))
    assert cache.prune(ALL).images == ["app:1"]
    assert len(plans) == 1


def test_a_limit_that_nothing_can_meet_is_planned_once(cache: Cache, count_plans: CountPlans) -> None:
    save_old(cache, "app:1")
    plans = count_plans(lambda _: None)
    assert cache.prune(to_free=1 << 40).images == ["app:1"]
    assert len(plans) == 1


def test_an_applied_plan_is_never_made_again(cache: Cache, count_plans: CountPlans) -> None:
    save_old(cache, "app:1", "app:2")
    planned = cache.plan_prune(to_free=1)
    age(cache, "last_used_at", "app:2", seconds=0)
    plans = count_plans(lambda _: None)
    done = cache.prune(to_free=1, plan=planned.images)
    assert [str(image.name) for image in done.skipped] == ["app:2"]
    assert (done.images, plans) == ([], [])
