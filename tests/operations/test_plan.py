"""Plans of a prune: what the limits require, the order of removal, and what an explanation says."""

from __future__ import annotations

import os

import pytest
from sqlalchemy import Connection

from cachedb import Cache, CacheError, Keep, Limits, NotInCache, Policy, Remove
from cachedb.disk.sizes import FileSystem, measure_files
from cachedb.index import eviction
from cachedb.operations.plan import explain_unmet
from tests.conftest import snapshot, stored_rows
from tests.support.ages import age
from tests.support.pruning import ALL, names_of, save_old

# Limits


def total_size(cache: Cache) -> int:
    return sum(stored_rows(cache.directory).values()) + measure_files(cache.directory).total_size


def test_a_size_limit_counts_all_files_and_frees_down_to_its_fraction(cache: Cache) -> None:
    save_old(cache, *(f"app:{number}" for number in range(6)))
    (cache.directory / "quarantine").mkdir(exist_ok=True)
    (cache.directory / "quarantine" / "old").write_bytes(b"x" * 5000)
    size = total_size(cache)
    assert cache.plan_prune(Policy(Limits(max_size=size, down_to=0.5))).needed_size == 0
    plan = cache.plan_prune(Policy(Limits(max_size=size - 1)))
    assert (plan.needed_size, names_of(plan), plan.images[0].rule) == (1, ["app:5"], "max-size")
    plan = cache.plan_prune(Policy(Limits(max_size=size - 1, down_to=1 - 9000 / (size - 1))))
    assert plan.needed_size in (9000, 9001, 9002)
    assert plan.freed_size >= plan.needed_size > plan.images[-1].total_freed_size - plan.images[-1].freed_size


def test_free_space_is_a_number_of_bytes_or_a_fraction_of_the_file_system(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_old(cache, "app:1", "app:2")
    monkeypatch.setattr("cachedb.operations.plan.measure_file_system", lambda _: FileSystem(100_000, 20_000))
    assert cache.plan_prune(Policy(Limits(min_free=20_000))).needed_size == 0
    plan = cache.plan_prune(Policy(Limits(min_free=20_001)))
    assert (plan.needed_size, names_of(plan), plan.images[0].rule) == (1, ["app:2"], "min-free")
    assert cache.plan_prune(Policy(Limits(min_free=0.25))).needed_size == 5000
    assert cache.plan_prune(Policy(Limits(min_free=0.25, max_size=1 << 60)), to_free=7000).needed_size == 7000


def test_garbage_counts_before_images(cache: Cache) -> None:
    save_old(cache, "app:1")
    with Cache.open(cache.directory) as other:
        other.add_blob(b"x" * 9000)
    partial = cache.directory / "ingest" / "partial"
    partial.mkdir(exist_ok=True)
    download = partial / f"sha256-{'0' * 64}"
    download.write_bytes(b"y" * 500)
    plan = cache.plan_prune(to_free=9000)
    assert (plan.garbage_sizes, plan.images) == ({"reclaimable": 9000, "old partial downloads": 0, "trash": 0}, [])
    os.utime(download, (0, 0))
    trash = cache.directory / "trash" / f"sha256-{'1' * 64}"
    trash.write_bytes(b"z" * 30)
    plan = cache.plan_prune(to_free=9531)
    assert (plan.garbage_size, names_of(plan)) == (9530, ["app:1"])
    done = cache.prune(to_free=9530)
    assert (done.images, done.garbage) == ([], (1, 9000))
    assert done.garbage_sizes == {"reclaimable": 9000, "old partial downloads": 500, "trash": 30} == plan.garbage_sizes
    assert not download.exists()
    assert not trash.exists()


def test_a_missed_limit_is_explained_with_what_to_do() -> None:
    text = explain_unmet(5000, {"index": 3000, "policy": 0, "keep 1": 4000})
    assert text == (
        "cannot free 5 kB more, because the rest stays (4 kB keep 1, 3 kB index): raise the limit, change what the "
        "policy keeps, unpin images, or release holds"
    )
    assert explain_unmet(5, {}).endswith("have been used or held since: prune again later")


@pytest.mark.parametrize("size", [0, -1])
def test_a_number_of_bytes_to_free_must_be_positive(cache: Cache, size: int) -> None:
    for call in (cache.plan_prune, cache.prune):
        with pytest.raises(CacheError, match="to_free"):
            call(to_free=size)


# The order


def test_rules_remove_in_their_order_and_limits_afterwards_by_last_use(cache: Cache) -> None:
    save_old(cache, "a:1", "b:1", "c:1", "d:1")
    policy = Policy(remove=(Remove(names=("a:1",)), Remove(names=("b:1", "a:1"))))
    plan = cache.plan_prune(policy, to_free=1 << 40)
    assert [(str(image.name), image.rule) for image in plan.images] == [
        ("a:1", "remove 1"), ("b:1", "remove 2"), ("d:1", "to-free"), ("c:1", "to-free")
    ]  # fmt: skip
    assert names_of(cache.plan_prune(policy)) == ["a:1", "b:1"]
    assert names_of(cache.plan_prune(policy, to_free=plan.images[1].total_freed_size)) == ["a:1", "b:1"]
    assert names_of(cache.plan_prune(policy, to_free=plan.images[1].total_freed_size + 1)) == ["a:1", "b:1", "d:1"]


def test_expired_images_go_first_and_without_any_policy(cache: Cache) -> None:
    save_old(cache, "a:1", "b:1", "c:1", "d:1")
    age(cache, "expires_at", "b:1", seconds=1)
    age(cache, "expires_at", "a:1", hours=-1)
    policy = Policy(remove=(Remove(names=("[bd]:1",)),))
    plan = cache.plan_prune(policy, to_free=1 << 40)
    assert [(str(image.name), image.rule) for image in plan.images] == [
        ("b:1", "expired"), ("d:1", "remove 1"), ("c:1", "to-free"), ("a:1", "to-free")
    ]  # fmt: skip
    assert cache.prune().images == ["b:1"]
    assert cache.list_names() == ["a:1", "c:1", "d:1"]


# Explaining


def test_an_explanation_says_what_keeps_an_image_or_what_removes_it(cache: Cache) -> None:
    save_old(cache, "a:1", "b:1", "c:1", "d:1")
    cache.add_hold("c:1")
    policy = Policy(keep=(Keep(names=("nope:1",)), Keep(names=("a:1",))), remove=(Remove(names=("[ab]:1",)),))
    texts = {name: str(cache.explain_prune(name, policy)) for name in ("a:1", "b:1", "c:1", "d:1")}
    assert texts == {
        "a:1": "a:1 is kept: keep 2, though remove 1 selects it",
        "b:1": "b:1 would be removed by remove 1",
        "c:1": "c:1 is kept: held",
        "d:1": "d:1 stays: no rule removes it, and no limit requires it",
    }
    found = cache.explain_prune("d:1", policy, to_free=1 << 40)
    assert found.planned is not None
    assert (found.rule, found.planned.rule, found.digest) == (None, "to-free", cache.get_image("d:1").digest)
    for name in ("a:1", "b:1", "c:1"):
        age(cache, "expires_at", name, seconds=1)
    cache.pin("c:1")
    texts = {name: str(cache.explain_prune(name, policy)) for name in ("a:1", "b:1", "c:1")}
    assert texts == {
        "a:1": "a:1 is kept: keep 2, though it has expired",
        "b:1": "b:1 would be removed: it has expired",
        "c:1": "c:1 is kept: pinned, though it has expired",
    }
    with pytest.raises(NotInCache):
        cache.explain_prune("nope:1", policy)


def test_an_explanation_and_its_plan_are_of_one_moment(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    save_old(cache, "app:1")
    read_mark = eviction.read_mark

    def read_and_remove(connection: Connection, rules: eviction.Rules, image_id: int) -> eviction.Mark:
        mark = read_mark(connection, rules, image_id)
        with Cache.open(cache.directory) as other:
            other.remove_manifest("app:1")
        return mark

    monkeypatch.setattr(eviction, "read_mark", read_and_remove)
    assert cache.explain_prune("app:1", ALL).planned is not None
    assert cache.list_names() == []


def test_a_plan_and_an_explanation_change_nothing(cache: Cache) -> None:
    save_old(cache, "app:1")
    before = snapshot(cache.directory)
    assert names_of(cache.plan_prune(ALL)) == ["app:1"]
    assert cache.explain_prune("app:1", ALL).rule == "remove 1"
    assert snapshot(cache.directory) == before
