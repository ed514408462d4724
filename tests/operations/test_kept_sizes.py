"""A plan that misses its limit says how many bytes each rule, pin and hold keeps."""

from __future__ import annotations

import pytest

from cachedb import Cache, Keep, Policy
from cachedb.disk.sizes import measure_files
from cachedb.operations import kept_sizes
from tests.support import make
from tests.support.ages import age
from tests.support.pruning import names_of, save_old, write_rows


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
    assert plan.unmet_size == (1 << 40) - plan.freed_size
    assert plan.kept_sizes == {
        "keep 1": sizes["keep/a:1"],
        "pinned": sizes["pinned:1"],
        "held": sizes["held:1"] + len(held_blob),
        "used within 10 minutes": sizes["recent:1"],
        **measure_files(cache.directory).kept,
    }


def test_a_plan_counts_what_stays_in_every_batch(rows_only: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    images, sizes = [[0, 9], [1], [9], [5, 3]], [10, 0, 0, 3, 0, 60, 0, 0, 0, 90]
    write_rows(rows_only.directory, images, sizes, {5})
    rows_only.pin("app:0", "app:1", "app:2")  # the first and the last share a layer
    expected = rows_only.plan_prune(to_free=1 << 40)
    monkeypatch.setattr(kept_sizes, "_MOST_IMAGES", 1)
    assert rows_only.plan_prune(to_free=1 << 40) == expected
    assert [image.freed_size for image in expected.images] == [1]
    assert (expected.kept_sizes["pinned"], expected.kept_sizes["held"]) == (103, 60)
