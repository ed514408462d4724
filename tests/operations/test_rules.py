"""Rules of a policy: what they keep stays, whatever removes images; what they remove fulfils all conditions."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext

import pytest

from cachedb import Cache, InvalidPolicy, InvalidQuery, Keep, Limits, Policy, Remove
from cachedb.operations.policy import format_policy
from tests.conftest import Run, files_of
from tests.support import make
from tests.support.ages import age
from tests.support.make import full_config, image_of
from tests.support.pruning import ALL, check_whole, names_of, save_old

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
        assert done.returncode == 0
        assert not done.stderr or done.stderr.startswith("cachedb: kept 1 image used in the last 10 minutes: ")


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
    labelled = image_of(full_config(1, architecture="s390x", config={"Labels": {"keep": "yes"}}), 1)
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
        assert cache.prune(ALL).images == ["gone:1"]
    assert cache.prune(ALL).images == ["app:1"]


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
    config = full_config(2, architecture="arm64", config={"Labels": {"ephemeral": "true"}})
    make.save(cache, "app:2", image_of(config, 2))
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


# Mistakes


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
