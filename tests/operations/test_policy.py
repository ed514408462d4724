"""Policies: the meaning of their text, and the line of a mistake."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachedb import InvalidPolicy
from cachedb.index.sqlite.database import Database
from cachedb.operations import policy
from cachedb.operations.policy import Keep, Limits, Policy, Remove, format_policy, parse_policy

EXAMPLE = """
[limits]
max-size = "200GB"        # all files of the cache, as df counts them
min-free = "15%"          # of the file system
down-to  = "90%"          # of max-size, so that not every import evicts

[[keep]]                  # a keep always wins, and only for the image itself
names = ["base/*", "re:^release-"]
[[keep]]
repository = "*"
newest = 2                # by the time the name came here
[[keep]]
used-within = "1h"        # 10 minutes if nothing is written

[[remove]]                # without a rule nothing is removed by age
repository = "ci/*"
unused-for = "7d"
newest = 10               # keep ten per repository
[[remove]]
label = "ephemeral=true"
added-before = "24h"
[[remove]]
sql = "SELECT name FROM image_usage WHERE built_days > 365"
"""
MEANING = Policy(
    Limits(max_size=200 * 10**9, min_free=0.15, down_to=0.9),
    (Keep(names=("base/*", "re:^release-")), Keep(repository="*", newest=2), Keep(used_within=3600)),
    (
        Remove(repository="ci/*", unused_for=7 * 86_400, keep_newest=10),
        Remove(labels=(("ephemeral", "true"),), added_before=86_400),
        Remove(sql="SELECT name FROM image_usage WHERE built_days > 365"),
    ),
)


# Parsing


def test_a_policy_means_what_its_words_say() -> None:
    assert parse_policy(EXAMPLE) == MEANING
    assert parse_policy("") == Policy()
    assert parse_policy('[limits]\nmax-size = "1000000"') == Policy(limits=Limits(max_size=1_000_000))


def test_each_value_can_be_written_in_each_of_its_forms() -> None:
    found = parse_policy(
        '[limits]\nmin-free = "20GB"\n'
        '[[keep]]\nnames = "app"\nlabel = ["team", "stage=a=b"]\nplatform = "linux/arm64"\nadded-within = "1h30m"\n'
        '[[remove]]\nincomplete = false\nrepository = "REGISTRY.example:5000/app"\nnames = ["[::1]:5000/app:1"]\n'
    )
    assert found.limits == Limits(min_free=20 * 10**9)
    assert found.keep == (
        Keep(("app:latest",), None, (("team", None), ("stage", "a=b")), "linux/arm64", added_within=5400),
    )
    assert found.remove == (Remove(("[::1]:5000/app:1",), "registry.example:5000/app", incomplete=False),)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("[limit]", 1, "unknown table 'limit': use limits, keep or remove"),
        ("limits = 3", 1, r"limits is not a table: write \[limits\]"),
        ("\n[keep]\nnewest = 2", 2, r"keep is not a list of tables: write \[\[keep\]\]"),
        ("remove = [1]", 1, r"remove is not a list of tables: write \[\[remove\]\]"),
        ('[limits]\n\nmax_size = "1GB"', 3, "unknown key 'max_size': use max-size, min-free or down-to"),
        ('[[keep]]\nunused-for = "7d"', 2, "unknown key 'unused-for': use names, .* or added-within"),
        ('[[remove]]\nused-within = "7d"', 2, "unknown key 'used-within': use names, .* or incomplete"),
        ("[limits]\nmax-size = 200", 2, "max-size: 200 is not a size"),
        ('[limits]\nmax-size = "much"', 2, "max-size: 'much' is not a size"),
        ('[limits]\nmax-size = "15"', 2, """max-size: '15' has no unit: write "15GB", or "15B" for bytes"""),
        ('[limits]\nmax-size = "999999"', 2, "max-size: '999999' has no unit"),
        ('[limits]\nmin-free = " 15"', 2, """min-free: '15' has no unit: write "15%" or "15GB", or "15B" for bytes"""),
        ('[limits]\nmin-free = "101%"', 2, "min-free: '101%' is neither a percentage nor a size"),
        ("[limits]\nmin-free = 0.15", 2, "min-free: 0.15 is neither a percentage nor a size"),
        ('[limits]\nmax-size = "1GB"\ndown-to = "0%"', 3, "down-to: '0%' is not a percentage"),
        ('[limits]\ndown-to = "90%"', 2, "down-to is a part of max-size, which is missing: add max-size"),
        ("[[keep]]\nnewest = 1\n\n[[keep]]\n", 4, "the rule has no condition: use names, "),
        ("[[remove]]", 1, "the rule has no condition: use names, "),
        ("[[keep]]\nnewest = 0", 2, "newest: 0 is not a number of images"),
        ("[[keep]]\nkeep-newest = 1", 2, "unknown key 'keep-newest': use names, "),
        ("[[remove]]\nkeep-newest = 0", 2, "keep-newest: 0 is not a number of images"),
        ("[[remove]]\nkeep-newest = 1\nnewest = 1", 3, "newest is another spelling of keep-newest: give one of them"),
        ("[[keep]]\nnewest = true", 2, "newest: True is not a number of images"),
        ('[[keep]]\nused-within = "7"', 2, "used-within: '7' is not a duration"),
        ("[[keep]]\nnames = []", 2, "names: the list is empty"),
        ('[[keep]]\nnames = ["app", 3]', 2, "names: 3 is not a text"),
        ('[[keep]]\nnames = ["APP"]', 2, "names: 'APP' is not a name"),
        ('[[keep]]\nnames = ["app/[ab"]', 2, r"names: 'app/\[ab' is not a pattern"),
        ('[[keep]]\nnames = ["re:(a"]', 2, r"names: 're:\(a' is not a regular expression"),
        ('[[keep]]\nrepository = "app:1"', 2, "repository: 'app:1' has a tag or a digest"),
        ('[[keep]]\nrepository = "app/[ab*"', 2, r"repository: 'app/\[ab\*' is not a pattern"),
        ('[[keep]]\nlabel = "=true"', 2, "label: '=true' has no key"),
        ('[[keep]]\nplatform = "a/b/c/d"', 2, "platform: 'a/b/c/d' is not a platform"),
        ('[[keep]]\nplatform = "linux/"', 2, "platform: 'linux/' is not a platform"),
        ('[[remove]]\nincomplete = "yes"', 2, "incomplete: 'yes' is neither true nor false"),
        ('[[remove]]\nsql = " "', 2, "sql: ' ' is not a text"),
        ("[limits]\nmax-size 200", 2, "invalid TOML in column 10: expected '=' after a key"),
        ('[limits]\nmax-size = "', 2, "invalid TOML"),
        ("[limits]\n[limits]", 2, "invalid TOML in column 8: cannot declare"),
    ],
)
def test_a_mistake_is_reported_with_its_line(text: str, line: int, message: str) -> None:
    with pytest.raises(InvalidPolicy, match=rf"^policy\.toml, line {line}: {message}") as caught:
        parse_policy(text)
    assert caught.value.line == line
    assert "\n" not in str(caught.value)


def test_the_line_of_a_mistake_is_correct_after_any_toml_syntax() -> None:
    before = (
        '# [[keep]]\n[[keep]]\nsql = """\n[[keep]]\nnewest = 0\n"""\n"names" = [\n  "a",  # newest = 0\n\n  "b",\n]\r\n'
    )
    for wrong in ("newest = 0", '"newest" = 0', "newest=0 # 1", "newest = [\n0,\n]"):
        with pytest.raises(InvalidPolicy, match=r"line 12: newest"):
            parse_policy(f"{before}{wrong}\nplatform = 'linux/amd64'\n[[keep]]\nnewest = 1\n")
    with pytest.raises(InvalidPolicy, match=r"line 2: max-size"):
        parse_policy("keep = []\nlimits = {min-free = '1%', max-size = 3}\n")
    with pytest.raises(InvalidPolicy, match=r"line 2: max-size"):
        parse_policy("limits.min-free = '1%'\nlimits.max-size = 3\n")


def test_a_policy_that_is_nested_deeply_is_refused() -> None:
    with pytest.raises(InvalidPolicy, match=r"nested too deeply|invalid TOML"):
        parse_policy(f"keep = {'[' * 20_000}")


def test_a_number_with_many_digits_is_a_mistake() -> None:
    with pytest.raises(InvalidPolicy, match=r"^policy\.toml, line "):
        parse_policy(f"[[keep]]\nnewest = {'9' * 5000}")


# Formatting

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), min_size=1).filter(str.strip)
COMMON: dict[str, Any] = {
    "names": st.lists(st.from_regex(r"[a-z]{1,9}/\*", fullmatch=True), min_size=1).map(tuple),
    "labels": st.lists(
        st.tuples(TEXTS.filter(lambda text: "=" not in text and text.strip()), st.none() | TEXTS), min_size=1
    ).map(tuple),
    "sql": TEXTS,
}
SECONDS: Any = st.integers(0, 10**9)
COUNTS = st.integers(1, 1000)
KEEPS = st.fixed_dictionaries({"used_within": SECONDS}, optional={**COMMON, "newest": COUNTS}).map(
    lambda fields: Keep(**fields)
)
REMOVES = st.fixed_dictionaries(
    {"unused_for": SECONDS},
    optional={**COMMON, "added_before": SECONDS, "incomplete": st.booleans(), "keep_newest": COUNTS},
).map(lambda fields: Remove(**fields))
PERCENTAGES = st.integers(1, 100).map(lambda percent: percent / 100)
LIMITS = st.builds(Limits, st.integers(0, 10**15 - 1), st.integers(0, 10**15 - 1) | PERCENTAGES, PERCENTAGES)


@pytest.mark.slow
@settings(max_examples=30)
@given(st.builds(Policy, LIMITS, st.lists(KEEPS, max_size=2).map(tuple), st.lists(REMOVES, max_size=2).map(tuple)))
def test_a_formatted_policy_means_the_same(given_policy: Policy) -> None:
    assert parse_policy(format_policy(given_policy)) == given_policy


def test_a_formatted_policy_has_readable_sizes_and_percentages() -> None:
    assert format_policy(MEANING).splitlines()[:8] == [
        "[limits]",
        'max-size = "200GB"',
        'min-free = "15%"',
        'down-to = "90%"',
        "",
        "[[keep]]",
        'names = ["base/*", "re:^release-"]',
        "",
    ]
    assert format_policy(Policy()) == ""


# Checking


@pytest.mark.parametrize("query", ["SELECT nothing FROM images", "DELETE FROM images", "SELECT", "SELECT 1; SELECT 2"])
def test_a_query_that_is_invalid_or_would_write_is_a_mistake_in_its_line(index: Database, query: str) -> None:
    text = f'[[remove]]\nnewest = 1\n[[remove]]\nincomplete = true\nsql = "{query}"\n'
    with pytest.raises(InvalidPolicy, match=r"^rules\.toml, line 5: sql: "):
        policy.check_policy(index, text, "rules.toml")
    parse_policy(text)
    assert policy.check_policy(index, EXAMPLE) == MEANING
