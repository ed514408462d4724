"""Named reports: what each returns, and where the files come from."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachedb import Cache, InvalidName, InvalidQuery, NotInCache
from cachedb.reports import named
from cachedb.reports.parameters import Parameter
from tests.conftest import Run
from tests.support import make
from tests.support.index_file import change_index

BASE = make.image(1, 2)
APP = make.image(1, 2, 3)
OTHER = make.image(1, 2, 4, 5)


@pytest.fixture
def cache(directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cache]:
    monkeypatch.setenv("CACHEDB_REPORTS", str(tmp_path / "reports"))
    with Cache.open(directory) as opened:
        make.save(opened, "base:1", BASE)
        make.save(opened, "app:1", APP)
        make.save(opened, "app:2", OTHER)
        opened.tag("app:1", "app:stable")
        opened.save_manifest("lacking:1", make.image(9).manifest)
        yield opened


def run_report(cache: Cache, which: str, /, **given: str) -> list[dict[str, object]]:
    """Return the rows of a report as dicts."""
    with cache.run_report(which, given) as answer:
        return [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]


VALUES = {"image": "app:1", "images": "app:1 app:2", "size": "1kB", "label": "team", "platform": "linux/amd64"}
"""A value for each type of a required parameter."""


def names(rows: list[dict[str, object]]) -> list[object]:
    return [row["name"] for row in rows]


def test_every_report_has_a_description_and_runs(cache: Cache) -> None:
    found = named.list_reports()
    assert len(found) >= 20
    for one in found:
        assert one.description.endswith(".")
        given = {each.name: VALUES[str(each.kind)] for each in one.parameters if each.default is None}
        run_report(cache, one.name, **given)
        assert all(each.kind for each in one.parameters), "a shipped report checks its parameters"


def test_images_are_listed_by_size_and_by_unique_size(cache: Cache) -> None:
    assert names(run_report(cache, "largest-images", limit="2"))[0] == "app:2"
    assert len(run_report(cache, "largest-images", limit="2")) == 2
    (first, *_) = run_report(cache, "largest-unique")
    own = [OTHER.manifest, OTHER.config, *OTHER.layers[2:]]
    assert (first["name"], first["unique_size"]) == ("app:2", sum(map(len, own)))


def test_reports_show_what_sharing_saves(cache: Cache) -> None:
    (first, *_) = run_report(cache, "most-shared-layers")
    assert first["images"] == 4
    (saved,) = run_report(cache, "saved-by-sharing")
    layers = [len(layer) for layer in BASE.layers]
    assert saved["saved_size"] == sum(3 * size for size in layers) + len(APP.layers[2])  # app:stable has this layer too
    assert saved["size"] == cache.get_stats().total_size


@pytest.mark.parametrize("chosen", [["app:2"], ["app:1"], ["app:1", "app:stable"], ["app:1", "app:stable", "app:2"]])
def test_freed_by_returns_exactly_what_removing_the_images_frees(cache: Cache, chosen: list[str]) -> None:
    (row,) = run_report(cache, "freed-by", names=" ".join(chosen))
    freed = cache.remove_manifest(*chosen, dry_run=True)
    assert (row["blobs"], row["size"], row["images"]) == (freed.blobs, freed.bytes, len(chosen))


def test_a_report_accepts_names_like_a_command(cachedb: Run, cache: Cache) -> None:
    cache.tag("app:1", "localhost:5000/app")
    make.save(cache, "app", make.image(20))
    names = f"localhost:5000/app\n{cachedb('ls', '-q').stdout}"
    (row,) = run_report(cache, "freed-by", names=names)
    freed = cache.remove_manifest(*names.split(), dry_run=True)
    assert (row["blobs"], row["size"], row["images"]) == (freed.blobs, freed.bytes, 7)
    (row,) = run_report(cache, "freed-by", names="app  app localhost:5000/app ")
    assert (row["size"], row["images"]) == (cache.remove_manifest("app", dry_run=True).bytes, 2)
    for empty in ("", " "):
        assert run_report(cache, "freed-by", names=empty) == [{"blobs": 0, "size": 0, "images": 0}]
    for absent in ("5", "localhost:5000", "app:3", "app:1 app:3"):
        with pytest.raises(InvalidQuery, match=r"^invalid value of 'names': \S+ is not in the cache: "):
            run_report(cache, "freed-by", names=absent)
    for invalid in ('a"b', "\\", "app:1:latest"):
        with pytest.raises(InvalidName):
            run_report(cache, "freed-by", names=invalid)
    assert run_report(cache, "added-by", name="app", over="base:1") == run_report(
        cache, "added-by", name="app:latest", over="base:1"
    )
    assert len(run_report(cache, "added-by", name="localhost:5000/app", over="app")) == 5


def test_not_used_lists_images_that_were_not_used_for_long(cache: Cache) -> None:
    assert run_report(cache, "not-used") == []
    change_index(
        cache.directory, "UPDATE images SET last_used_at = '2020-01-01T00:00:00.000000Z' WHERE repository = 'base'"
    )
    assert names(run_report(cache, "not-used")) == ["base:1"]


def test_duplicates_lists_the_names_of_one_manifest_together(cache: Cache) -> None:
    (row,) = run_report(cache, "duplicates")
    assert (row["digest"], row["images"], str(row["names"]).split()) == (APP.digest, 2, ["app:1", "app:stable"])
    assert {str(row["repository"]): (row["tags"], row["manifests"]) for row in run_report(cache, "tags-per-image")}[
        "app"
    ] == (
        3,
        2,
    )


def test_outdated_bases_lists_images_on_an_older_base(cache: Cache) -> None:
    assert run_report(cache, "outdated-bases") == []
    make.save(cache, "base:2", make.image(1, 7))
    change_index(cache.directory, "UPDATE images SET created = '2026-01-01T00:00:00.000000Z'")
    change_index(cache.directory, "UPDATE images SET created = '2026-02-01T00:00:00.000000Z' WHERE reference = '2'")
    found = run_report(cache, "outdated-bases")
    assert [(row["name"], row["base"], row["newer"]) for row in found] == [
        ("app:1", "base:1", "base:2"),
        ("app:2", "base:1", "base:2"),
        ("app:stable", "base:1", "base:2"),
    ]


def test_an_image_is_not_its_own_newer_base(cache: Cache) -> None:
    cache.tag("app:2", "base:2")
    cache.tag("app:2", "base:latest")
    change_index(cache.directory, "UPDATE images SET created = '2026-01-01T00:00:00.000000Z'")
    change_index(cache.directory, "UPDATE images SET created = '2026-02-01T00:00:00.000000Z' WHERE reference <> '1'")
    newer = {(row["name"], row["base"], row["newer"]) for row in run_report(cache, "outdated-bases")}
    assert {name for name, _, _ in newer} == {"app:1", "app:stable"}


def test_images_are_counted_by_architecture_and_by_label(cache: Cache) -> None:
    counts = {row["architecture"]: row["images"] for row in run_report(cache, "by-architecture")}
    assert counts == {"amd64": 4, None: 1}
    assert run_report(cache, "by-label", key="nothing") == []


def test_an_image_for_several_platforms_counts_for_each(cache: Cache) -> None:
    children = APP, make.image(7, architecture="arm64")
    make.save_index(cache, "several:1", *children)
    counts = {row["architecture"]: row["images"] for row in run_report(cache, "by-architecture")}
    assert counts == {"amd64": 5, "arm64": 1, None: 1}
    (arm,) = run_report(cache, "for-platform", platform="linux/arm64")
    assert (arm["name"], arm["digest"]) == ("several:1", children[1].digest)
    assert arm["size"] == sum(map(len, children[1].blobs.values()))
    found = {str(row["name"]): row["digest"] for row in run_report(cache, "for-platform", platform="linux/amd64")}
    assert found.keys() == {"app:1", "app:2", "app:stable", "base:1", "several:1"}
    assert found["several:1"] == APP.digest
    assert run_report(cache, "for-platform", platform="linux/arm64/v9") == []


def test_missing_blobs_and_garbage_are_listed(cache: Cache) -> None:
    assert {str(row["role"]) for row in run_report(cache, "incomplete")} == {"config", "layer"}
    assert set(names(run_report(cache, "incomplete"))) == {"lacking:1"}
    assert run_report(cache, "garbage") == []
    change_index(
        cache.directory,
        f"INSERT INTO blobs (digest, size, stored_at) VALUES ('sha256:{'0' * 64}', 7, '2026-01-01T00:00:00.000000Z')",
    )
    assert [row["size"] for row in run_report(cache, "garbage")] == [7]


def test_layers_are_listed_with_the_command_that_created_them(cache: Cache) -> None:
    (first, *_) = run_report(cache, "largest-layers")
    assert str(first["created_by"]).startswith("layer ")
    once = run_report(cache, "layers-used-once")
    assert {(row["digest"], row["name"]) for row in once} == {
        (make.digest_of(layer), "app:2") for layer in OTHER.layers[2:]
    }


@pytest.mark.parametrize("which", ["largest-layers", "layers-used-once"])
@pytest.mark.parametrize("limit", ["0", "1", "2", "3", "20"])
def test_the_largest_layers_are_found_among_larger_blobs(cache: Cache, which: str, limit: str) -> None:
    once = "AND images = 1" if which == "layers-used-once" else ""
    everything = f"SELECT digest FROM layers WHERE stored {once} ORDER BY size DESC, digest LIMIT {limit}"
    with cache.sql(everything) as answer:
        wanted = [digest for (digest,) in answer.rows]
    assert [row["digest"] for row in run_report(cache, which, limit=limit)] == wanted
    # Add blobs that are larger, but no layers, and more of them than the report looks at first.
    change_index(
        cache.directory,
        "INSERT INTO blobs (digest, size, stored_at) SELECT printf('sha256:%064d', value), 1000000000, "
        "'2026-01-01T00:00:00.000000Z' FROM (WITH RECURSIVE n(value) AS (VALUES (1) UNION ALL "
        "SELECT value + 1 FROM n LIMIT 10100) SELECT value FROM n)",
    )
    assert [row["digest"] for row in run_report(cache, which, limit=limit)] == wanted


def test_added_by_lists_the_blobs_that_one_image_adds_to_another(cache: Cache) -> None:
    rows = run_report(cache, "added-by", name="app:1", over="base:1")
    assert [(row["role"], row["digest"]) for row in rows] == [
        ("manifest", APP.digest),
        ("config", make.digest_of(APP.config)),
        ("layer", make.digest_of(APP.layers[2])),
    ]


def test_usage_by_counts_a_blob_once_for_each_value_of_a_label(cache: Cache) -> None:
    change_index(
        cache.directory,
        "INSERT INTO image_labels SELECT id, 'team', CASE reference WHEN '2' THEN 'two' ELSE 'one' END "
        "FROM images WHERE repository = 'app'",
    )
    one, two, rest = sorted(run_report(cache, "usage-by", key="team"), key=lambda row: str(row["value"] or "zero"))
    assert [(row["value"], row["images"]) for row in (one, two, rest)] == [("one", 2), ("two", 1), (None, 2)]
    shared = sum(map(len, BASE.layers))  # the layers of base:1, which all others have
    assert one["size"] == sum(map(len, APP.blobs.values()))
    assert [row["shared_size"] for row in (one, two, rest)] == [shared] * 3
    assert two["unique_size"] == sum(map(len, OTHER.blobs.values())) - shared
    assert (two["freed_size"], rest["missing_size"]) == (
        two["unique_size"],
        sum(map(len, make.image(9).blobs.values())) - len(make.image(9).manifest),
    )
    (all_of_them,) = run_report(cache, "usage-by", key="absent")
    assert (all_of_them["value"], all_of_them["images"], all_of_them["shared_size"]) == (None, 5, 0)


def test_to_free_lists_the_least_recently_used_images_up_to_a_size(cache: Cache) -> None:
    for day, reference in enumerate(("2", "stable", "1"), 1):
        time = f"2026-01-0{day}T00:00:00.000000Z"
        change_index(cache.directory, f"UPDATE images SET last_used_at = '{time}' WHERE reference = '{reference}'")
    own = cache.remove_manifest("app:2", dry_run=True).bytes
    assert names(run_report(cache, "to-free", size="0")) == []
    assert names(run_report(cache, "to-free", size=str(own))) == ["app:2"]
    assert names(run_report(cache, "to-free", size=str(own + 1))) == ["app:2", "app:stable", "base:1"]
    assert len(run_report(cache, "to-free", size="1GB")) == 5
    make.save(cache, "half:1", make.image(4))
    cache.add_hold("app:2")
    cache.remove_manifest("app:2")  # the hold keeps a layer that half:1 has too
    held = run_report(cache, "to-free", size="1GB")
    assert "half:1" in names(held)
    assert held[-1]["total_freed_size"] == cache.remove_manifest(*map(str, names(held)), dry_run=True).bytes


def test_differences_lists_what_only_one_of_two_images_has(cache: Cache) -> None:
    assert run_report(cache, "differences", name="app:1", other="app:stable") == []
    made = make.image(1, 2, 3, architecture="arm64")
    make.save(cache, "app:arm", made)
    change_index(
        cache.directory, "INSERT INTO image_labels SELECT id, 'team', 'one' FROM images WHERE reference = 'arm'"
    )
    rows = run_report(cache, "differences", name="app:1", other="app:arm")
    assert [(row["name"], row["part"], row["digest"] or row["detail"]) for row in rows] == [
        ("app:1", "manifest", APP.digest),
        ("app:1", "config", make.digest_of(APP.config)),
        ("app:arm", "manifest", made.digest),
        ("app:arm", "config", make.digest_of(made.config)),
        ("app:1", "platform", "linux/amd64"),
        ("app:arm", "label", "team=one"),
        ("app:arm", "platform", "linux/arm64"),
    ]


def test_totals_are_computed_by_repository_and_by_day(cache: Cache) -> None:
    found = {row["repository"]: row["images"] for row in run_report(cache, "by-repository")}
    assert found == {"base": 1, "app": 3, "lacking": 1}
    (today,) = run_report(cache, "growth")
    stats = cache.get_stats()
    assert (today["images"], today["blobs"], today["size"]) == (5, stats.blob_count, stats.total_size)
    assert names(run_report(cache, "oldest", limit="1")) == ["base:1"] or run_report(cache, "oldest")
    assert names(run_report(cache, "newest", limit="1")) == ["lacking:1"]


# Parameters


@pytest.mark.parametrize(
    ("which", "name", "value", "reason"),
    [
        ("not-used", "days", "abc", "'abc' is not a valid value of 'days': give a number of days such as 30 or 0.5"),
        ("not-used", "days", "-1", "'-1' is not a valid value of 'days': "),
        ("not-used", "days", "nan", "'nan' is not a valid value of 'days': "),
        ("not-used", "days", "inf", "'inf' is not a valid value of 'days': "),
        ("largest-images", "limit", "-1", "'-1' is not a valid value of 'limit': give a whole number such as 20"),
        ("largest-images", "limit", "2.5", "'2.5' is not a valid value of 'limit': "),
        ("largest-images", "limit", "9999999999999999999", "'9999999999999999999' is not a valid value of 'limit': "),
        ("largest-images", "limit", "", "'' is not a valid value of 'limit': "),
        ("by-label", "key", "", "'' is not a valid value of 'key': give the key of a label"),
        ("freed-by", "names", "base:2", "invalid value of 'names': base:2 is not in the cache: "),
        ("freed-by", "names", "app:1 team/*", "invalid value of 'names': 'team/*' matches no image: "),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(cache: Cache, which: str, name: str, value: str, reason: str) -> None:
    with pytest.raises(InvalidQuery, match=f"^{re.escape(reason)}"):
        run_report(cache, which, **{name: value})


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("count", "007", 7),
        ("days", "0.5", 0.5),
        ("size", "5GB", 5_000_000_000),
        ("platform", "Linux/ARM64", "linux/arm64"),
        ("platform", "linux/arm/v7", "linux/arm/v7"),
        ("label", "1.10", "1.10"),
        ("text", "10", "10"),
        ("image", "app:1", "app:1"),
        ("image", f"base@{BASE.digest}", "base:1"),
        ("image", f"base@{BASE.digest[:19]}", "base:1"),
        ("images", "app:[12] base:1 app:1", '["app:1", "app:2", "base:1"]'),
    ],
)
def test_a_value_is_converted_to_the_type_of_its_parameter(
    cache: Cache, tmp_path: Path, kind: str, text: str, value: object
) -> None:
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "mine.sql").write_text(f"-- Mine.\n-- :x:{kind} {text}\nSELECT :x AS x")
    assert run_report(cache, "mine") == [{"x": value}]
    assert run_report(cache, "mine", x=text) == [{"x": value}]


@pytest.mark.parametrize("text", ["linux", "linux/", "linux/a/b/c", "linux/amd 64"])
def test_a_platform_has_an_operating_system_and_an_architecture(cache: Cache, tmp_path: Path, text: str) -> None:
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "mine.sql").write_text("-- Mine.\n-- :x:platform\nSELECT :x AS x")
    with pytest.raises(InvalidQuery, match="give a platform such as linux/arm64"):
        run_report(cache, "mine", x=text)


def test_a_line_with_an_unknown_type_is_a_description(cache: Cache, tmp_path: Path) -> None:
    """Such a line was a part of the description before parameters had types."""
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "mine.sql").write_text("-- Mine.\n-- :o:smile\n-- :n image\nSELECT :n AS n")
    (mine,) = [one for one in named.list_reports() if one.name == "mine"]
    assert (mine.description, mine.parameters) == ("Mine. :o:smile", (Parameter("n", None, "image"),))


def test_freed_by_accepts_patterns(cache: Cache) -> None:
    (row,) = run_report(cache, "freed-by", names="app:* base:1")
    freed = cache.remove_manifest("app:1", "app:2", "app:stable", "base:1", dry_run=True)
    assert (row["blobs"], row["size"], row["images"]) == (freed.blobs, freed.bytes, 4)


@pytest.mark.slow
def test_values_are_assigned_in_the_order_of_the_parameters(cachedb: Run, cache: Cache) -> None:
    def run(*arguments: str) -> list[dict[str, object]]:
        done = cachedb("report", *arguments, "--format", "json")
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout))

    added = run_report(cache, "added-by", name="app:1", over="base:1")
    assert run("added-by", "app:1", "base:1") == added
    assert run("added-by", "base:1", "-p", "name=app:1") == added
    assert run("largest-images", "2") == run_report(cache, "largest-images", limit="2")
    assert run("freed-by", "app:1", "app:stable") == run_report(cache, "freed-by", names="app:1 app:stable")
    for arguments in (["garbage", "1"], ["largest-images", "1", "2"], ["added-by", "app:1", "base:1", "app:2"]):
        failed = cachedb("report", *arguments)
        assert (failed.returncode, failed.stderr.startswith("cachedb: too many values for the report ")) == (2, True)
    for arguments in (["not-used", "abc"], ["added-by", "app:1", "nothing"], ["largest-images", "-p", "limit=-1"]):
        assert cachedb("report", *arguments).returncode == 2


def test_a_table_shows_times_and_digests_as_ls_does(cachedb: Run, cache: Cache) -> None:
    printed = cachedb("report", "largest-images", "1").stdout
    assert printed.splitlines()[1].endswith("just now")
    digest = make.digest_of(APP.layers[2])
    rows = cachedb("report", "added-by", "app:1", "base:1").stdout.splitlines()
    assert rows[-1].split()[:2] == ["layer", digest[:19]]
    assert digest in cachedb("report", "added-by", "app:1", "base:1", "--format", "csv").stdout
    query = "SELECT digest, last_used_at FROM image_usage WHERE name = 'app:1'"
    assert APP.digest in cachedb("sql", query).stdout, "sql prints what is in the index"


# Where reports come from


def test_a_users_report_replaces_a_shipped_report_of_the_same_name(cache: Cache, tmp_path: Path) -> None:
    folder = tmp_path / "reports"
    folder.mkdir()
    (folder / "mine.sql").write_text("-- Mine.\n-- :n 1\n-- :m\nSELECT :n + :m AS sum")
    (folder / "garbage.sql").write_text("SELECT 'theirs' AS name")
    found = {one.name: one for one in named.list_reports()}
    assert found["mine"].description == "Mine."
    assert found["mine"].parameters == (Parameter("n", None, "1"), Parameter("m", None, None))
    assert run_report(cache, "mine", m="2.5") == [{"sum": 3.5}]
    assert names(run_report(cache, "garbage")) == ["theirs"]
    with pytest.raises(InvalidQuery, match="needs a value for 'm': give one with -p m=VALUE"):
        run_report(cache, "mine")
    with pytest.raises(InvalidQuery, match="has no parameter 'k': it has n=1, m"):
        run_report(cache, "mine", k="1")


@pytest.mark.slow
def test_a_report_may_have_a_byte_order_mark_crlf_and_leading_blank_lines(
    cachedb: Run, cache: Cache, tmp_path: Path
) -> None:
    folder = tmp_path / "reports"
    folder.mkdir()
    text = "-- Sagt: \u00e9.\n-- :n 1\nSELECT :n AS n"
    (folder / "with a mark.sql").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    (folder / "late.sql").write_text(f"\n\n{text}", encoding="utf-8")
    (folder / ".#late.sql").symlink_to("editor@host.1:2")  # the lock file of Emacs
    (folder / "folder.sql").mkdir()
    found = {one.name: one for one in named.list_reports()}
    for name in ("with a mark", "late"):
        assert (found[name].description, found[name].parameters) == ("Sagt: \u00e9.", (Parameter("n", None, "1"),))
        assert run_report(cache, name, n="2") == [{"n": 2}]
        printed = cachedb("report", name, env={**os.environ, "PYTHONUTF8": "0", "LC_ALL": "POSIX"})
        assert printed.stdout == "n\n1\n"
    assert not {"folder", ".#late"} & found.keys()
    failed = cachedb("report", "folder")
    assert failed.returncode == 3


@pytest.mark.parametrize("name", ["nothing", "../report", "/etc/passwd", "", "a/b"])
def test_an_unknown_report_raises_not_in_cache(name: str) -> None:
    with pytest.raises(NotInCache, match="`cachedb report --list`"):
        named.load_report(name)


@pytest.mark.slow
def test_report_html_writes_a_page_about_the_whole_cache(cachedb: Run, cache: Cache, tmp_path: Path) -> None:
    assert cachedb("report", "--html", str(tmp_path / "page.html")).returncode == 0
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "app:stable" in page
    assert cachedb("report", "--html", "-").stdout.startswith("<!doctype html>")
    failed = cachedb("report", "--html", str(tmp_path / "nowhere" / "page.html"))
    assert (failed.returncode, "cannot write" in failed.stderr) == (2, True)
    assert cachedb("report", "--html", str(tmp_path / "x"), "garbage").returncode == 2
    assert cachedb("report", "--html", str(tmp_path / "x"), "--timeout", "1s").returncode == 2


@pytest.mark.slow
def test_reports_are_printed_in_every_format(cachedb: Run, cache: Cache) -> None:
    assert "largest-images      limit=20" in cachedb("report", "--list").stdout
    listed = json.loads(cachedb("report", "--list", "--format", "json").stdout)
    assert set(listed[0]) == {"name", "description", "parameters", "types", "path", "report"}
    assert ",limit=20," in cachedb("report", "--list", "--format", "csv").stdout
    printed = cachedb("report", "largest-unique", "-p", "limit=1").stdout.splitlines()
    assert (printed[0].split(), len(printed)) == (["name", "unique_size", "size", "freed_size"], 2)
    assert "kB" in printed[1]
    (row,) = json.loads(cachedb("report", "largest-unique", "-p", "limit=1", "--format", "json").stdout)
    assert isinstance(row["unique_size"], int)
    assert cachedb("report", "nothing").returncode == 3
    assert cachedb("report").returncode == 2
    assert cachedb("report", "--list", "garbage").returncode == 2
    assert cachedb("report", "garbage", "-p", "limit").returncode == 2
    assert cachedb("report", "freed-by").returncode == 2


@pytest.mark.slow
def test_a_page_is_written_to_a_fifo_without_replacing_it(cache: Cache, tmp_path: Path, cachedb: Run) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(["cat", fifo], stdout=subprocess.PIPE, text=True) as reader:
        assert cachedb("report", "--html", fifo).returncode == 0
        page, _ = reader.communicate(timeout=60)
    assert page.lower().lstrip().startswith("<!doctype html>")
    assert fifo.is_fifo()


@pytest.mark.slow
def test_a_page_that_cannot_be_written_leaves_the_existing_page_unchanged(
    cachedb: Run, cache: Cache, tmp_path: Path
) -> None:
    page, link = tmp_path / "pages" / "page.html", tmp_path / "link.html"
    page.parent.mkdir()
    page.write_text("as it was")
    page.chmod(0o640)
    link.symlink_to(page)
    limit = (40_000, 40_000)  # bytes; the write fails as on a full disk
    failed = cachedb("report", "--html", link, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert failed.stderr.startswith(f"cachedb: cannot write '{link}': File too large")
    assert page.read_text() == "as it was"
    assert cachedb("report", "--html", link).returncode == 0
    assert page.read_text().endswith("</html>")
    assert (link.is_symlink(), page.stat().st_mode & 0o777, list(page.parent.iterdir())) == (True, 0o640, [page])
    assert "nowhere/page.html': No such file or directory;" in cachedb("report", "--html", "nowhere/page.html").stderr


@pytest.mark.parametrize("report", ["to-free", "not-used"])
def test_images_that_a_pin_or_a_hold_keeps_are_not_proposed(cache: Cache, report: str) -> None:
    change_index(cache.directory, "UPDATE images SET last_used_at = '2020-01-01T00:00:00.000000Z'")
    parameters = {"size": "1GB"} if report == "to-free" else {}
    everything = names(run_report(cache, report, **parameters))
    assert len(everything) == 5
    cache.pin("base:1")
    cache.add_hold("app:2")
    change_index(cache.directory, "UPDATE images SET last_used_at = '2020-01-01T00:00:00.000000Z'")
    rows = run_report(cache, report, **parameters)
    rest = [name for name in everything if name not in ("base:1", "app:2")]
    assert names(rows) == rest
    if report == "to-free":
        assert rows[-1]["total_freed_size"] == cache.remove_manifest(*map(str, rest), dry_run=True).bytes
