"""The command `prune`: what it prints and removes, and which policies and plans it takes."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cachedb import Cache
from cachedb.cli import prune
from cachedb.disk.layout import POLICY_FILE
from cachedb.operations.policy import Keep, Limits, Policy, Remove
from cachedb.text import format_size
from tests.conftest import Run, files_of, snapshot
from tests.support.ages import age
from tests.support.make import image, save
from tests.support.mounting import mounted

# The options and the policy

POLICY = Policy(Limits(1000, 0.5, 0.9), (Keep(newest=7),), (Remove(incomplete=True),))


@pytest.mark.parametrize(
    ("given", "merged"),
    [
        ({}, POLICY),
        ({"max_size": 5}, POLICY._replace(limits=Limits(5, 0.5, 0.9))),
        ({"min_free": 7}, POLICY._replace(limits=Limits(1000, 7, 0.9))),
        ({"down_to": 0.2}, POLICY._replace(limits=Limits(1000, 0.5, 0.2))),
        ({"keep": ("app", "re:^a")}, POLICY._replace(keep=(*POLICY.keep, Keep(("app:latest", "re:^a"))))),
        ({"newest": 2}, POLICY._replace(keep=(*POLICY.keep, Keep(newest=2)))),
        ({"unused_for": 60}, POLICY._replace(remove=(Remove(unused_for=60),))),
        (
            {"unused_for": 60, "conditions": ("label=a=b", "label=c", "platform=arm64", "incomplete=false")},
            POLICY._replace(remove=(Remove((), None, (("a", "b"), ("c", None)), "arm64", 60, None, False),)),
        ),
        ({"to_free": 9}, POLICY),
    ],
)
def test_options_replace_limits_and_rules_that_remove_and_add_to_what_is_kept(
    given: dict[str, Any], merged: Policy
) -> None:
    assert prune._merge(POLICY, prune._PruneOptions(**given)) == merged


def test_a_long_age_is_taken_as_the_policy_takes_it(cache: Cache, cachedb: Run) -> None:
    assert cachedb("prune", "--unused-for", "2000w", "--dry-run", "-q").returncode == 0
    cache.set_policy('[[remove]]\nunused-for = "2000w"\n')
    assert cachedb("prune", "--dry-run", "-q").returncode == 0


def test_an_age_of_the_options_is_that_of_a_rule() -> None:
    for given in ({"added_before": 3600}, {"conditions": ("added-before=1h",)}):
        (rule,) = prune._merge(Policy(), prune._PruneOptions(**given)).remove
        assert rule == Remove(added_before=rule.added_before)
        assert rule.added_before == pytest.approx(3600, abs=600)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--keep app --newest 3 --dry-run", "nothing says what to remove: give --max-size, --min-free, --to-free, "),
        ("--down-to 50%", "--down-to is a part of --max-size, which is missing: add --max-size"),
        ("--max-size much", "'much' is not a size"),
        ("--min-free 101%", "'101%' is neither a percentage nor a size: write one as in"),
        ("--max-size 15", """'15' has no unit: write "15GB", or "15B" for bytes"""),
        ("--to-free 1.5", """'1.5' has no unit: write "1.5GB", or "1.5B" for bytes"""),
        ("--min-free 15", """'15' has no unit: write "15%" or "15GB", or "15B" for bytes"""),
        ("--min-free 999999", """'999999' has no unit: write "999999GB", or "999999B" for bytes"""),
        ("--max-size 1GB --down-to 1GB", "'1GB' is not a percentage: write one as in"),
        ("--unused-for 7", "'7' is not a duration"),
        (
            "--unused-for 7d --filter unused-for=8d",
            "--unused-for and --filter unused-for=... exclude each other: give one of them",
        ),
        ("--filter base=app", "--filter takes neither base, digest, pinned, expired nor several platforms"),
        ("--filter platform=arm64 --filter platform=amd64", "--filter takes neither base, digest, pinned, expired nor"),
        ("--filter pinned=false", "--filter takes neither base, digest, pinned, expired nor several"),
        ("--filter expired", "--filter takes neither base, digest, pinned, expired nor several"),
        ("--to-free 1GB --keep re:(", "--keep: 're:(' is not a regular expression"),
        ("--to-free 1GB --keep APP", "'APP' is not a name"),
        ("--dry-run --plan x", "--dry-run and --plan exclude each other: give one of them"),
        ("--apply x --explain app", "--explain and --apply exclude each other: give one of them"),
        ("--apply x --max-size 1GB", "--apply removes what the plan says: give the other options to --plan"),
        ("--apply missing.json", "cannot read 'missing.json': No such file or directory"),
    ],
)
@pytest.mark.usefixtures("cache")
def test_wrong_usage_of_prune_is_one_line(cachedb: Run, line: str, message: str) -> None:
    done = cachedb("prune", *line.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


# What it prints and removes

JUST_USED = '[[keep]]\nused-within = "0s"\n'  # images that were used just now may go, too


@pytest.fixture
def filled(cache: Cache) -> Cache:
    """Return a cache with two images that share a layer, and a policy that may remove both."""
    save(cache, "app:1", image(1, 2))
    save(cache, "app:2", image(2, 3))
    cache.set_policy(JUST_USED)
    return cache


def list_names(cache: Cache) -> list[str]:
    return list(map(str, cache.list_names()))


def test_a_dry_run_removes_nothing_and_prints_each_image_with_its_bytes(filled: Cache, cachedb: Run) -> None:
    before = snapshot(filled.directory)
    done = cachedb("prune", "--unused-for", "0s", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    heading, first, second, empty, summary = done.stdout.splitlines()
    assert heading.split() == ["NAME", "DIGEST", "LAST", "USED", "SIZE", "FREED", "IN", "ALL", "RULE"]
    assert re.match(r"app:1 +sha256:[0-9a-f]{12} +just now +[\d.]+ k?B +[\d.]+ k?B +[\d.]+ k?B +remove 1$", first)
    assert second.startswith("app:2")
    assert empty == ""
    size = sum(files_of(filled.directory).values())
    assert summary == f"would prune 2 images, {format_size(size)}"
    assert snapshot(filled.directory) == before


@pytest.mark.slow
def test_the_json_of_a_dry_run_and_a_plan_file_say_the_same(filled: Cache, cachedb: Run, tmp_path: Path) -> None:
    options = ("prune", "--unused-for", "0s")
    printed = json.loads(cachedb(*options, "--dry-run", "--format", "json").stdout)
    done = cachedb(*options, "--plan", tmp_path / "plan.json")
    size = sum(files_of(filled.directory).values())
    assert done.stdout == f"would prune 2 images, {format_size(size)}\n"
    assert json.loads((tmp_path / "plan.json").read_text()) == printed
    assert [entry["name"] for entry in printed["images"]] == ["app:1", "app:2"]
    assert printed["freed_size"] == printed["images"][-1]["total_freed_size"] == size
    assert cachedb(*options, "--dry-run", "-q").stdout == "app:1\napp:2\n"


def test_a_plan_on_stdout_can_be_applied_from_stdin(filled: Cache, cachedb: Run) -> None:
    made = cachedb("prune", "--unused-for", "0s", "--plan", "-")
    assert made.stderr.startswith("would prune 2 images, ")
    assert cachedb("prune", "--apply", "-", input=made.stdout).stdout.startswith("pruned 2 images, ")
    assert list_names(filled) == []


@pytest.mark.slow
def test_an_applied_plan_removes_exactly_what_was_planned(filled: Cache, cachedb: Run, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    cachedb("prune", "--unused-for", "0s", "--plan", path)
    save(filled, "app:3", image(3, 4))
    save(filled, "app:2", image(5))
    done = cachedb("prune", "--apply", path)
    assert done.returncode == 0
    assert done.stderr == "skipped app:2: now another image\n"
    assert re.fullmatch(r"pruned 1 image, [\d.]+ k?B; [\d.]+ MB used\n", done.stdout)
    assert list_names(filled) == ["app:2", "app:3"]
    found = json.loads(cachedb("prune", "--apply", "-", "--format", "json", input=path.read_text()).stdout)
    assert [entry["name"] for entry in found["skipped"]] == ["app:1", "app:2"]
    assert found["images"] == []


@pytest.mark.slow
def test_prune_removes_what_the_policy_says_and_prints_one_line(filled: Cache, cachedb: Run) -> None:
    filled.set_policy(f'{JUST_USED}names = ["app:2"]\n[[remove]]\nnames = ["app:*"]\n'.replace("0s", "1h"))
    size = sum(files_of(filled.directory).values())
    done = cachedb("prune")
    freed = size - sum(files_of(filled.directory).values())
    assert freed > 0
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"pruned 1 image, {re.escape(format_size(freed))}; [\d.]+ MB used\n", done.stdout)
    assert list_names(filled) == ["app:2"]
    assert cachedb("prune", "--unused-for", "0s", "--keep", "nothing", "-q").stdout == ""


@pytest.mark.slow
def test_prune_prints_the_names_or_the_json_of_what_it_removed(filled: Cache, cachedb: Run) -> None:
    assert cachedb("prune", "--unused-for", "0s", "--keep", "app:2", "-q").stdout == "app:1\n"
    found = json.loads(cachedb("prune", "--unused-for", "0s", "--format", "json").stdout)
    assert found["images"] == [{"name": "app:2"}]
    assert files_of(filled.directory) == {}


def test_the_bytes_to_free_include_garbage(filled: Cache, cachedb: Run) -> None:
    with Cache.open(filled.directory) as other:
        digest = other.add_blob(bytes(100_000))
    assert cachedb("prune", "--to-free", "100kB", "-q").stdout == ""
    assert digest not in files_of(filled.directory)
    assert list_names(filled) == ["app:1", "app:2"]


def test_a_limit_that_cannot_be_met_is_exit_code_1_and_says_what_keeps_the_space(filled: Cache, cachedb: Run) -> None:
    filled.add_hold("app:1")
    for options in (["--dry-run"], []):
        done = cachedb("prune", "--max-size", "1kB", *options)
        assert done.returncode == 1
        assert re.fullmatch(
            r"cachedb: cannot free [\d.]+ MB more, because the rest stays "
            r"\([\d.]+ MB reserve, [\d.]+ kB index, [\d.]+ kB held, .*\d+ B policy\): raise the limit, .*\n",
            done.stderr,
        )
    assert done.stdout.startswith("pruned 1 image, ")
    assert done.stdout.endswith(" of 1 kB used\n")
    assert list_names(filled) == ["app:1"]


@pytest.mark.slow
def test_a_prune_without_a_policy_removes_only_images_whose_lifetime_has_ended(cache: Cache, cachedb: Run) -> None:
    for name in ("app:1", "app:2", "app:3"):
        save(cache, name, image(1, 2))
        age(cache, "last_used_at", name, days=1)
    for name in ("app:1", "app:2"):
        age(cache, "expires_at", name, seconds=1)
    cache.pin("app:2")
    done = cachedb("prune")
    assert (done.returncode, done.stdout.partition(";")[0]) == (0, "pruned 1 image, 0 B")
    assert done.stderr == "cachedb: no policy: only images whose lifetime has ended are removed\n"
    assert list_names(cache) == ["app:2", "app:3"]
    assert cachedb("prune", "-q").stderr == ""
    assert cachedb("prune", "--explain", "app:2").stdout == "app:2 is kept: pinned, though it has expired\n"
    done = cachedb("prune", "--to-free", "1GB", "--dry-run")
    assert "pinned" in done.stderr
    assert "unpin images" in done.stderr


@pytest.mark.slow
def test_explain_says_what_keeps_an_image_or_would_remove_it(filled: Cache, cachedb: Run) -> None:
    explain = ("prune", "--unused-for", "0s", "--explain")
    assert cachedb(*explain, "app:1").stdout == "app:1 would be removed by remove 1\n"
    done = cachedb(*explain, "app:1", "--keep", "app:*", "--format", "json")
    found = json.loads(done.stdout)
    assert (found["name"], found["kept_by"], found["rule"], found["planned"]) == ("app:1", "keep 2", "remove 1", None)
    assert json.loads(cachedb(*explain, "app:1", "--format", "json").stdout)["planned"]["name"] == "app:1"
    assert cachedb(*explain, "other:1").returncode == 3
    assert list_names(filled) == ["app:1", "app:2"]


@pytest.mark.slow
def test_a_query_that_fails_is_an_error_in_its_line_of_the_policy(filled: Cache, cachedb: Run) -> None:
    (filled.directory / POLICY_FILE).write_text(f'{JUST_USED}[[remove]]\nsql = "SELECT nothing FROM image_usage"\n')
    for options in ("--dry-run", "--to-free=1B", "--explain=app:1"):
        done = cachedb("prune", options)
        assert done.returncode == 2
        assert done.stderr.startswith("cachedb: policy.toml, line 4: sql: ")


@pytest.mark.slow
def test_an_empty_cache_and_a_cache_that_can_only_be_read_can_be_planned(cache: Cache, cachedb: Run) -> None:
    assert cachedb("prune", "--max-size", "1TB").stdout.startswith("pruned 0 images, 0 B; ")
    save(cache, "app:1", image(1))
    cache.set_policy(JUST_USED)
    cache.close()
    os.link(cache.directory / "index.db", cache.directory.with_name("link"))
    done = cachedb("prune", "--unused-for", "0s", "--dry-run", "-q")
    assert (done.returncode, done.stdout) == (0, "app:1\n")
    done = cachedb("prune", "--unused-for", "0s")
    assert (done.returncode, done.stdout) == (1, "")
    assert "can only be read" in done.stderr


@pytest.mark.slow
def test_a_prune_of_a_read_only_file_system_fails_in_one_line_and_changes_nothing(
    filled: Cache, cachedb: Run, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    assert cachedb("prune", "--unused-for", "0s", "--plan", plan).returncode == 0
    filled.close()
    before = snapshot(filled.directory)
    with mounted(tmp_path / "view", "--bind", filled.directory) as view:
        subprocess.run(["mount", "-o", "remount,bind,ro", view], check=True)
        for options in (["--unused-for", "0s"], ["--to-free", "1B"], ["--apply", plan]):
            done = cachedb("--dir", view, "prune", *options)
            assert (done.returncode, done.stdout) == (1, "")
            assert re.fullmatch(r"cachedb: .* can only be read: .*\n", done.stderr), done.stderr
        assert cachedb("--dir", view, "prune", "--unused-for", "0s", "--dry-run", "-q").stdout == "app:1\napp:2\n"
    assert snapshot(filled.directory) == before


@pytest.mark.parametrize("option", ["--max-size", "--min-free", "--to-free"])
@pytest.mark.parametrize(
    ("text", "size"),
    [("1000000", 10**6), ("15B", 15), ("1kB", 1000), ("0B", 0), ("0", 0), ("0.0", 0), ("1 GiB", 1024**3)],
)
def test_a_limit_in_bytes_has_a_unit_or_is_large_or_0(option: str, text: str, size: int) -> None:
    (parameter,) = (found for found in prune.prune.params if option in found.opts)
    assert parameter.type.convert(text, None, None) == size


@pytest.fixture
def partly_recent(cache: Cache) -> Cache:
    """Return a cache whose second image stays only because it was used a moment ago."""
    for number in range(1, 4):
        save(cache, f"app:{number}", image(number))
    age(cache, "last_used_at", "app:1", days=1)
    cache.pin("app:3")
    return cache


@pytest.mark.parametrize("options", [["--dry-run"], ["--plan", "plan.json"], ["--plan", "-"], []])
@pytest.mark.usefixtures("partly_recent")
def test_a_prune_says_that_images_used_a_moment_ago_stay(
    cachedb: Run, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cachedb("prune", "--unused-for", "0s", *options)
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == (
        "cachedb: kept 1 image used in the last 10 minutes: to change this time, write a keep rule with used-within"
    )
    assert "app:2" in cachedb("ls").stdout


@pytest.mark.slow
def test_nothing_is_said_of_recent_images_that_no_rule_removes_or_to_programs(
    partly_recent: Cache, cachedb: Run
) -> None:
    for line in ("--unused-for 5m", "--to-free 1B", "--unused-for 0s -q", "--unused-for 0s --format json"):
        done = cachedb("prune", "--dry-run", *line.split())
        assert (done.returncode, done.stderr) == (0, "")
        assert not line.endswith("json") or json.loads(done.stdout)["recent_images"] == 1
    partly_recent.set_policy(JUST_USED)
    assert cachedb("prune", "--unused-for", "0s").stderr == ""
