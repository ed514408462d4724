"""Plan files: what a plan must have, whoever wrote it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from cachedb import Digest, InvalidPolicy, Name
from cachedb.operations.plan import PlannedImage
from cachedb.operations.plan_file import parse_plan
from tests.support.make import digest_of

DIGEST = Digest(digest_of(b""))
ENTRY: dict[str, Any] = {
    "name": "app:1",
    "digest": DIGEST,
    "last_used_at": "2026-01-31T12:00:00.500000Z",
    "size": 10,
    "freed_size": 7,
    "total_freed_size": 7,
    "rule": "remove 1",
}


def test_a_plan_is_read_as_it_was_written_and_other_fields_are_ignored() -> None:
    used = datetime(2026, 1, 31, 12, 0, 0, 500_000, UTC)
    text = json.dumps({"images": [{**ENTRY, "new": 1}], "freed_size": "ignored", "new": {}})
    assert parse_plan(text, "plan") == [PlannedImage(Name("app", "1"), DIGEST, used, 10, 7, 7, "remove 1")]
    assert parse_plan('{"images": []}', "plan") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "APP"}, "'APP' is not a name"),
        ({"name": 3}, "name is 3"),
        ({"digest": "sha256:12"}, "sha256:12"),
        ({"digest": None}, "digest is None"),
        ({"last_used_at": "yesterday"}, "last_used_at is 'yesterday', and not a time"),
        ({"last_used_at": "2026-01-31T12:00:00"}, "last_used_at is '2026-01-31T12:00:00', and not a time"),
        ({"last_used_at": "0001-01-01T00:00:00+14:00"}, "and not a time"),
        ({"size": "10"}, "size is '10'"),
        ({"size": True}, "size is True"),
        ({"freed_size": -1}, "freed_size is -1"),
        ({"total_freed_size": 1 << 63}, "total_freed_size is 9223372036854775808"),
        ({"total_freed_size": 1.5}, "total_freed_size is 1.5"),
        ({"rule": "x" * 101}, "rule is 'xxx"),
        ({"rule": "\x1b[2J"}, "rule is "),
    ],
)
def test_a_wrong_field_is_named_with_its_place(change: dict[str, Any], message: str) -> None:
    text = json.dumps({"images": [ENTRY, {**ENTRY, "name": "app:2", **change}]})
    with pytest.raises(InvalidPolicy) as caught:
        parse_plan(text, "'plan.json'")
    error = str(caught.value)
    assert error.startswith("'plan.json' is not a plan, because images[1] is wrong (")
    assert message in error
    assert error.endswith(": write a plan with `cachedb prune --plan FILE`")


def test_a_rule_has_up_to_100_characters() -> None:
    (image,) = parse_plan(json.dumps({"images": [{**ENTRY, "rule": "x" * 100}]}), "plan")
    assert image.rule == "x" * 100


@pytest.mark.parametrize("missing", ENTRY)
def test_a_missing_field_is_named(missing: str) -> None:
    with pytest.raises(InvalidPolicy, match=rf"images\[0\] is wrong \({missing} is None\): write a plan"):
        parse_plan(json.dumps({"images": [{key: value for key, value in ENTRY.items() if key != missing}]}), "plan")


def test_an_image_is_listed_once() -> None:
    with pytest.raises(InvalidPolicy, match=r"images\[1\] is wrong \(app:1 is listed twice\): write a plan"):
        parse_plan(json.dumps({"images": [ENTRY, ENTRY]}), "plan")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"images": {}}', '{"images": [3]}', "[" * 100_000, f'{{"images": {"9" * 5000}}}']
)
def test_a_text_of_another_shape_is_no_plan(text: str) -> None:
    with pytest.raises(InvalidPolicy, match=r"^plan is not a plan, because .*: write a plan with"):
        parse_plan(text, "plan")
