"""Prune: plans are exact and minimal, what is kept stays, and only what was planned is removed."""

from __future__ import annotations

import os
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection

from cachedb import (
    Busy,
    Cache,
    CacheError,
    InvalidPolicy,
    InvalidQuery,
    Keep,
    Limits,
    Name,
    NotInCache,
    Plan,
    Policy,
    Pruned,
    Remove,
    SkippedImage,
)
from cachedb.disk import single_flight
from cachedb.disk.sizes import FileSystem, measure_files
from cachedb.index import eviction
from cachedb.oci.manifests import OCI_LAYER, OCI_MANIFEST
from cachedb.operations import kept_sizes, least, prune
from cachedb.operations.plan import explain_missing
from cachedb.operations.policy import format_policy
from tests.conftest import Run, files_of, snapshot, stored_rows
from tests.content.test_describe import make_config, make_image
from tests.support import make
from tests.support.ages import age
from tests.support.promises import check

EXAMPLES = int(os.environ.get("CACHEDB_FUZZ", "15"))
ALL = Policy(remove=(Remove(names=("*",)),))
"""A policy that removes all images that nothing keeps."""


def save_old(cache: Cache, *names: str) -> None:
    """Save images that share no layer; the first was used last, all of them days ago."""
    for number, name in enumerate(names):
        make.save(cache, name, make.image(100 + number))
        age(cache, "last_used_at", name, days=2 + number)


def names_of(plan: Plan) -> list[str]:
    return [str(image.name) for image in plan.images]


def prune_all(cache: Cache, *keep: Keep) -> Pruned:
    return cache.prune(ALL._replace(keep=keep))


# Exact


Image = tuple[list[int], str]
IMAGES = st.lists(
    st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(["plain", "plain", "alias", "half", "index"])),
    max_size=6,
)


def fill(cache: Cache, images: list[Image]) -> list[str]:
    """Save images that share layers, some with several platforms, with a second name, or without their layers."""
    names = []
    for number, (seeds, kind) in enumerate(images):
        names.append(name := f"app-{number % 2}:{number}")
        if kind == "alias" and len(names) > 1:
            cache.tag(names[0], name)
        elif kind == "half":
            cache.save_manifest(name, make.image(*seeds).manifest)
        elif kind == "index":
            make.save_index(cache, name, make.image(*seeds), make.image(*seeds[:1], 9, architecture="arm64"))
        else:
            make.save(cache, name, make.image(*seeds))
        age(cache, "last_used_at", name, days=1, seconds=number * 7 % 5)
    return names


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
        if plan.missing_size:
            files = measure_files(cache.directory).kept
            kept_blobs = {name: size for name, size in plan.kept_sizes.items() if name not in files}
            assert sum(kept_blobs.values()) == sum(after.values())
        else:
            assert plan.kept_sizes == {}


def write_rows(directory: Path, images: list[list[int]], sizes: list[int], leased: set[int]) -> None:
    """Replace the rows of an index: images with some blobs, the least recently used first."""
    stored_at = "2026-01-01T00:00:00.000000Z"
    times = [f"2026-01-01T00:00:{number:02}.000000Z" for number in range(len(images))]
    with closing(sqlite3.connect(directory / "index.db")) as shell, shell:
        for table in ("leases", "lasting_holds", "image_blobs", "images", "blobs"):
            shell.execute(f"DELETE FROM {table}")
        shell.executemany(
            "INSERT INTO blobs (id, digest, size, stored_at) VALUES (?, ?, ?, ?)",
            # A blob of size 3 is not stored.
            [(row, f"sha256:{row:064x}", size, None if size == 3 else stored_at) for row, size in enumerate(sizes, 1)],
        )
        for number, blobs in enumerate(images):
            manifest = 1000 + number
            shell.execute("INSERT INTO blobs VALUES (?, ?, 1, ?)", (manifest, f"sha256:{manifest:064x}", stored_at))
            shell.execute(
                "INSERT INTO images (id, repository, reference, manifest_id, media_type, added_at, last_used_at) "
                "VALUES (?, 'app', ?, ?, ?, ?, ?)",
                (number, str(number), manifest, OCI_MANIFEST, times[number], times[number]),
            )
            rows = [(manifest, "manifest"), *((blob + 1, "layer") for blob in blobs)]
            shell.executemany(
                "INSERT INTO image_blobs (image_id, position, blob_id, role, media_type) VALUES (?, ?, ?, ?, ?)",
                [(number, place, blob, role, OCI_LAYER) for place, (blob, role) in enumerate(rows)],
            )
        shell.execute("INSERT INTO lasting_holds VALUES ('hold-000000000000', 'x', ?, NULL)", (stored_at,))
        shell.executemany(
            "INSERT INTO leases VALUES (?, 'hold-000000000000', 0)", [(f"sha256:{blob + 1:064x}",) for blob in leased]
        )


@pytest.fixture(scope="module")
def rows_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cache]:
    """Yield a cache for indexes whose blobs have no files."""
    with Cache.open(tmp_path_factory.mktemp("rows") / "cache") as cache:
        yield cache


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
    assert plan.missing_size == max(0, target - freed_by(set(chosen)))


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


def test_a_plan_counts_what_stays_in_every_batch(rows_only: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    images, sizes = [[0, 9], [9], [5, 3]], [10, 0, 0, 3, 0, 60, 0, 0, 0, 90]
    write_rows(rows_only.directory, images, sizes, {5})
    rows_only.pin("app:0", "app:1")
    expected = rows_only.plan_prune(to_free=1 << 40)
    monkeypatch.setattr(kept_sizes, "_MOST_IMAGES", 1)
    assert rows_only.plan_prune(to_free=1 << 40) == expected
    assert [image.freed_size for image in expected.images] == [1]
    assert (expected.kept_sizes["pinned"], expected.kept_sizes["held"]) == (102, 60)


# What is kept


def hold(cache: Cache) -> None:
    cache.add_hold("team/kept:1")


def pin(cache: Cache) -> None:
    cache.pin("team/kept:1")


def use(cache: Cache) -> None:
    age(cache, "last_used_at", "team/kept:1", minutes=9)


def use_before(cache: Cache) -> None:
    age(cache, "last_used_at", "team/kept:1", hours=3)


@contextmanager
def work_with(cache: Cache) -> Iterator[None]:
    with cache.hold("team/kept:1"):
        age(cache, "last_used_at", "team/kept:1", days=9)
        yield


def nothing(_: Cache) -> None:
    pass


KEEPS: dict[str, tuple[Callable[[Cache], AbstractContextManager[None] | None], tuple[Keep, ...]]] = {
    "a name": (nothing, (Keep(names=("gone:1", "team/kept:1")), Keep(names=("nope",)))),
    "a pattern": (nothing, (Keep(names=("nope:*", "team/*")),)),
    "an expression": (nothing, (Keep(names=("re:kept",)),)),
    "a repository": (nothing, (Keep(repository="team/kept"),)),
    "a pattern of repositories": (nothing, (Keep(repository="*/[!x]ept"),)),
    "a label": (nothing, (Keep(labels=(("keep", "yes"),)),)),
    "a platform": (nothing, (Keep(platform="linux/s390x"),)),
    "the newest": (nothing, (Keep(repository="team/*", newest=1),)),
    "a time since the last use": (use_before, (Keep(used_within=14400),)),
    "a time since it came": (nothing, (Keep(added_within=3600),)),
    "a query": (nothing, (Keep(sql="SELECT name FROM image_usage WHERE repository LIKE 'team/%' UNION SELECT 7"),)),
    "a hold": (hold, ()),
    "a lease of a process": (work_with, ()),
    "a pin": (pin, ()),
    "a use a moment ago": (use, ()),
}  # fmt: skip
"""Ways to keep the image team/kept:1: what happens to it before a prune, and the rules of the policy."""


def prune_by_rules(cache: Cache, _: Run, keep: tuple[Keep, ...]) -> None:
    assert cache.prune(ALL._replace(keep=keep)).skipped == []


def prune_for_a_limit(cache: Cache, _: Run, keep: tuple[Keep, ...]) -> None:
    assert cache.prune(Policy(keep=keep), to_free=1 << 40).skipped == []


def prune_by_a_plan(cache: Cache, _: Run, keep: tuple[Keep, ...]) -> None:
    plan = cache.plan_prune(Policy(keep=keep), to_free=1 << 40)
    done = cache.prune(plan=plan.images)
    assert (done.images, done.skipped) == ([image.name for image in plan.images], [])


def let_all_expire(cache: Cache, _: Run, keep: tuple[Keep, ...]) -> None:
    for image in cache.list_manifests():
        age(cache, "expires_at", str(image.name), seconds=1)
    assert cache.prune(Policy(keep=keep)).skipped == []


def apply_a_plan(cache: Cache, cachedb: Run, keep: tuple[Keep, ...]) -> None:
    cache.set_policy(format_policy(ALL._replace(keep=keep)))
    path = cache.directory.with_name("plan.json")
    for option in ("--plan", "--apply"):
        done = cachedb("prune", option, path)
        assert (done.returncode, done.stderr) == (0, "")


def save_beyond_the_limit(cache: Cache, _: Run, keep: tuple[Keep, ...]) -> None:
    cache.set_policy(format_policy(Policy(Limits(max_size=1), keep)))
    cache.add_blob(b"one more blob")  # then the cache prunes automatically


WAYS: dict[str, Callable[[Cache, Run, tuple[Keep, ...]], None]] = {
    "rules": prune_by_rules,
    "a limit": prune_for_a_limit,
    "a lifetime": let_all_expire,
    "a plan": prune_by_a_plan,
    "--apply": apply_a_plan,
    "an automatic prune": save_beyond_the_limit,
}
"""Ways to remove all images that nothing keeps."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KEEPS)
def test_what_is_kept_stays_whatever_removes_images(cache: Cache, cachedb: Run, kind: str, way: str) -> None:
    keep_it, keep = KEEPS[kind]
    labelled = make_image(make_config(1, architecture="s390x", config={"Labels": {"keep": "yes"}}), 1)
    make.save(cache, "team/kept:1", labelled)
    age(cache, "last_used_at", "team/kept:1", days=9)
    save_old(cache, "gone:1", "other:2")
    age(cache, "added_at", "gone:1", days=1)
    age(cache, "added_at", "other:2", days=1)
    if kind == "a name":
        cache.tag("team/kept:1", "gone:1")
        age(cache, "last_used_at", "gone:1", days=3)
    with keep_it(cache) or nullcontext():
        WAYS[way](cache, cachedb, keep)
        expected = ["gone:1", "team/kept:1"] if kind == "a name" else ["team/kept:1"]
        assert cache.list_names() == expected
        assert cache.is_image_complete("team/kept:1")
        check_whole(cache)


def test_an_image_that_a_process_works_with_is_kept(cache: Cache) -> None:
    save_old(cache, "app:1", "gone:1")
    with cache.hold("app:1"):
        age(cache, "last_used_at", "app:1", days=9)
        assert str(cache.explain_prune("app:1", ALL)) == "app:1 is kept: in use, though remove 1 selects it"
        assert prune_all(cache).images == ["gone:1"]
    assert prune_all(cache).images == ["app:1"]


@pytest.mark.parametrize("in_plan", [True, False])
def test_leases_of_dead_processes_and_expired_holds_keep_nothing(cache: Cache, in_plan: bool) -> None:
    save_old(cache, "app:1", "app:2")
    cache.add_hold("app:1", seconds=0.01)
    digest = cache.get_image("app:2").digest
    with closing(sqlite3.connect(cache.directory / "index.db")) as shell, shell:
        shell.execute("INSERT INTO leases VALUES (?, '1-abcdefabcdef', 1)", (digest,))
        shell.execute("UPDATE lasting_holds SET expires_at = '2020-01-01T00:00:00.000000Z'")
    plan = cache.plan_prune(ALL)
    assert names_of(plan) == ["app:2", "app:1"]
    done = cache.prune(plan=plan.images) if in_plan else cache.prune(ALL)
    assert done.images == ["app:2", "app:1"]
    assert done.freed_size == plan.freed_size
    assert files_of(cache.directory) == {}


def test_images_used_in_the_last_10_minutes_stay_unless_a_rule_says_for_how_long(cache: Cache) -> None:
    save_old(cache, "app:1", "app:2")
    age(cache, "last_used_at", "app:1", minutes=9)
    age(cache, "last_used_at", "app:2", minutes=11)
    assert names_of(cache.plan_prune(ALL)) == ["app:2"]
    assert names_of(cache.plan_prune(ALL._replace(keep=(Keep(used_within=60),)))) == ["app:2", "app:1"]
    assert names_of(cache.plan_prune(ALL._replace(keep=(Keep(used_within=3600),)))) == []


def test_a_use_that_is_not_yet_written_counts(cache: Cache) -> None:
    save_old(cache, "app:1")
    with Cache.open(cache.directory) as other:
        other.get_manifest("app:1")
        assert other.prune(ALL).images == []


def test_the_newest_are_counted_among_those_that_the_other_conditions_select(cache: Cache) -> None:
    names = [f"app:{number}" for number in range(4)] + ["db:0", "db:1"]
    save_old(cache, *names)
    for number, name in enumerate(names):
        age(cache, "added_at", name, days=20 - number)
    assert sorted(names_of(cache.plan_prune(ALL._replace(keep=(Keep(newest=1, repository="*"),))))) == [
        "app:0", "app:1", "app:2", "db:0"
    ]  # fmt: skip
    policy = ALL._replace(keep=(Keep(newest=1, names=("app:[01]",)),))
    assert "app:1" not in names_of(cache.plan_prune(policy))
    assert len(names_of(cache.plan_prune(policy))) == 5
    removing = Policy(remove=(Remove(keep_newest=2, repository="app"),))
    assert sorted(names_of(cache.plan_prune(removing))) == ["app:0", "app:1"]
    old = Policy(remove=(Remove(keep_newest=1, unused_for=3.5 * 86_400),))
    assert sorted(names_of(cache.plan_prune(old))) == ["app:2", "db:0"]


# What is removed


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Remove(names=("app:1",)), ["app:1"]),
        (Remove(names=("app",)), []),
        (Remove(names=("app:[12]", "re:^db")), ["app:1", "app:2", "db:1"]),
        (Remove(repository="d*"), ["db:1"]),
        (Remove(repository="app:1"), []),
        (Remove(unused_for=3.5 * 86_400), ["db:1", "half:1"]),
        (Remove(added_before=86_400), ["app:2"]),
        (Remove(incomplete=True), ["half:1"]),
        (Remove(incomplete=False, names=("*:1",)), ["app:1", "db:1"]),
        (Remove(labels=(("ephemeral", None),)), ["app:2"]),
        (Remove(labels=(("ephemeral", "no"),)), []),
        (Remove(platform="arm64"), ["app:2"]),
        (Remove(platform="arm64", repository="db"), []),
        (Remove(sql="SELECT name FROM image_usage WHERE complete = 0"), ["half:1"]),
        (Remove(sql="SELECT 'nope:1' UNION SELECT 'db:1' UNION SELECT NULL"), ["db:1"]),
    ],
)  # fmt: skip
def test_a_rule_removes_the_images_that_fulfil_all_of_its_conditions(
    cache: Cache, rule: Remove, expected: list[str]
) -> None:
    make.save(cache, "app:1", make.image(1))
    config = make_config(2, architecture="arm64", config={"Labels": {"ephemeral": "true"}})
    make.save(cache, "app:2", make_image(config, 2))
    make.save(cache, "db:1", make.image(3))
    cache.save_manifest("half:1", make.image(4).manifest)
    for days, name in enumerate(["app:1", "app:2", "db:1", "half:1"], 2):
        age(cache, "last_used_at", name, days=days)
    age(cache, "added_at", "app:2", days=2)
    plan = cache.plan_prune(Policy(remove=(rule,)))
    assert sorted(names_of(plan)) == expected
    assert {image.rule for image in plan.images} <= {"remove 1"}
    assert cache.prune(Policy(remove=(rule,))).images == names_of(plan)
    assert set(cache.list_names()) == {"app:1", "app:2", "db:1", "half:1"} - set(expected)


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


@pytest.mark.parametrize("rule", [Keep(), Remove()])
def test_a_rule_without_conditions_is_refused(cache: Cache, rule: Keep | Remove) -> None:
    save_old(cache, "app:1")
    policy = Policy(keep=(rule,)) if isinstance(rule, Keep) else Policy(remove=(rule,))
    for call in (cache.plan_prune, cache.prune):
        with pytest.raises(InvalidPolicy):
            call(policy)
    assert cache.list_names() == ["app:1"]


def test_a_wrong_query_or_one_that_writes_removes_nothing(cache: Cache) -> None:
    save_old(cache, "app:1")
    for query in ("SELECT nope FROM image_usage", "DELETE FROM images"):
        for policy in (ALL._replace(keep=(Keep(sql=query),)), Policy(remove=(Remove(sql=query),))):
            with pytest.raises(InvalidQuery):
                cache.prune(policy)
    assert cache.list_names() == ["app:1"]


def test_the_policy_of_the_cache_is_used_unless_another_is_given(cache: Cache) -> None:
    save_old(cache, "app:1", "app:2")
    (cache.directory / "policy.toml").write_text('[[remove]]\nnames = "app:1"\n')
    assert names_of(cache.plan_prune()) == ["app:1"]
    assert cache.plan_prune(Policy()).images == []
    assert cache.explain_prune("app:1").rule == "remove 1"
    assert cache.prune().images == ["app:1"]


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


def test_an_unreachable_limit_says_what_keeps_the_space(cache: Cache) -> None:
    save_old(cache, "keep/a:1", "held:1", "recent:1", "gone:1", "pinned:1")
    cache.add_hold("held:1")
    cache.pin("pinned:1")
    held_blob = make.layer(103)
    cache.add_hold(make.digest_of(held_blob))
    cache.tag("keep/a:1", "also/a:1")  # its blobs count for the first rule
    age(cache, "last_used_at", "also/a:1", days=1)
    age(cache, "last_used_at", "recent:1", minutes=1)
    sizes = {str(image.name): image.size for image in cache.list_manifests()}
    plan = cache.plan_prune(Policy(keep=(Keep(names=("keep/*",)), Keep(names=("also/*",)))), to_free=1 << 40)
    assert names_of(plan) == ["gone:1"]
    assert plan.freed_size == sizes["gone:1"] - len(held_blob)
    assert plan.missing_size == (1 << 40) - plan.freed_size
    assert plan.kept_sizes == {
        "keep 1": sizes["keep/a:1"],
        "pinned": sizes["pinned:1"],
        "held": sizes["held:1"] + len(held_blob),
        "used within 10 minutes": sizes["recent:1"],
        **measure_files(cache.directory).kept,
    }


def test_a_missed_limit_is_explained_with_what_to_do() -> None:
    text = explain_missing(5000, {"index": 3000, "policy": 0, "keep 1": 4000})
    assert text == (
        "cannot free 5 kB more, because the rest stays (4 kB keep 1, 3 kB index): raise the limit, change what the "
        "policy keeps, unpin images, or release holds"
    )
    assert explain_missing(5, {}).endswith("have been used or held since: prune again later")


def test_a_prune_says_what_is_used_and_what_is_missing_afterwards(cache: Cache) -> None:
    save_old(cache, "app:1", "app:2")
    cache.add_hold("app:1")
    pruned = cache.prune(Policy(Limits(max_size=1000)))
    usage = cache.get_usage()
    assert pruned.used_size == usage.used_size
    assert pruned.missing_size > 0
    assert pruned.kept_sizes["held"] == usage.stored.size
    assert cache.prune(ALL).missing_size == 0


@pytest.mark.parametrize("size", [0, -1])
def test_a_number_of_bytes_to_free_must_be_positive(cache: Cache, size: int) -> None:
    for call in (cache.plan_prune, cache.prune):
        with pytest.raises(CacheError, match="to_free"):
            call(to_free=size)


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


# Applying


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
        with closing(sqlite3.connect(cache.directory / "index.db")) as shell, shell:
            time = plan.images[1].last_used_at.replace(tzinfo=None).isoformat(timespec="microseconds")
            shell.execute("UPDATE images SET last_used_at = ? WHERE reference = '1'", (f"{time}Z",))
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
        age_to(cache, plan)
        assert cache.prune(plan=plan.images).skipped == [SkippedImage(Name.parse("app:1"), "in use")]
    check_whole(cache)


def age_to(cache: Cache, plan: Plan) -> None:
    """Give the images of a plan the last use that they had in it."""
    with closing(sqlite3.connect(cache.directory / "index.db")) as shell, shell:
        for image in plan.images:
            text = image.last_used_at.replace(tzinfo=None).isoformat(timespec="microseconds")
            shell.execute("UPDATE images SET last_used_at = ? WHERE reference = ?", (f"{text}Z", image.name.reference))


def check_whole(cache: Cache) -> None:
    files = files_of(cache.directory)
    assert files == stored_rows(cache.directory)
    for image in cache.list_manifests():
        assert image.complete
        assert {blob.digest for blob in cache.get_image_blobs(image.name)} <= files.keys()


def test_a_plan_is_applied_to_nothing_but_its_images(cache: Cache) -> None:
    save_old(cache, "app:1", "app:2", "app:3")
    plan = cache.plan_prune(ALL)
    assert cache.prune(plan=plan.images[:1]).images == ["app:3"]
    assert cache.prune(ALL, plan=[]).images == []
    assert cache.list_names() == ["app:1", "app:2"]


def test_progress_reaches_the_bytes_of_the_plan(cache: Cache) -> None:
    save_old(cache, "app:1", "app:2")
    plan, seen = cache.plan_prune(ALL), list[tuple[int, int]]()
    cache.prune(ALL, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (plan.freed_size, plan.freed_size)


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


def test_a_plan_and_an_explanation_change_nothing(cache: Cache) -> None:
    save_old(cache, "app:1")
    before = snapshot(cache.directory)
    assert names_of(cache.plan_prune(ALL)) == ["app:1"]
    assert cache.explain_prune("app:1", ALL).rule == "remove 1"
    assert snapshot(cache.directory) == before


def test_a_prune_leaves_a_cache_that_keeps_its_promises(cache: Cache) -> None:
    names = fill(cache, [([1, 2], "plain"), ([2, 3], "index"), ([3], "half"), ([], "alias"), ([1, 4], "plain")])
    plan = cache.plan_prune(to_free=3000)
    assert cache.prune(to_free=3000).freed_size == plan.freed_size
    assert 0 < len(cache.list_names()) < len(names)
    cache.close()
    check(cache.directory)
