"""SQL queries: what they read, what they must not do, how they end, and how their rows are printed."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cachedb import Cache, CacheError, InvalidQuery
from cachedb.disk.layout import partial_path
from cachedb.index.sqlite import query as query_module
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import DOCUMENT_LIMIT
from tests.cli.test_main import run_on_terminal
from tests.conftest import Run
from tests.support import make
from tests.support.mounting import mounted
from tests.support.processes import cpu_seconds
from tests.support.waiting import wait_until

IMAGE = make.image(1, 2)
ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT {} FROM c"

pytestmark = pytest.mark.usefixtures("check_promises")


@pytest.fixture
def cache(cache: Cache) -> Cache:
    make.save(cache, "app:1", IMAGE)
    return cache


def run_query(cache: Cache, query: str, **parameters: int | float | str | None) -> list[tuple[object, ...]]:
    with cache.sql(query, parameters) as answer:
        return list(answer.rows)


def test_a_query_returns_columns_and_rows(cache: Cache) -> None:
    with cache.sql("SELECT name, blobs AS n FROM image_usage WHERE blobs > :least", {"least": 3}) as answer:
        assert answer.columns == ("name", "n")
        assert list(answer.rows) == [("app:1", 4)]
    assert run_query(cache, "-- a comment\nSELECT value FROM json_each('[1, 2]');") == [(1,), (2,)]
    assert ("name",) in run_query(cache, "SELECT name FROM pragma_table_info('image_usage')")
    assert run_query(cache, "EXPLAIN QUERY PLAN SELECT 1")


def test_human_and_ago_format_sizes_and_times(cache: Cache) -> None:
    assert run_query(cache, "SELECT human(0), human(1234567), human(NULL), human('much')") == [
        ("0 B", "1.23 MB", None, None)
    ]
    (row,) = run_query(
        cache, "SELECT ago(strftime('%Y-%m-%dT%H:%M:%SZ', 'now', '-50 hours')), ago('then'), ago(NULL), ago(1)"
    )
    assert row == ("2 days ago", None, None, None)
    assert run_query(cache, "SELECT ago(strftime('%Y-%m-%d %H:%M', 'now', '-90 minutes'))") == [("1 hour ago",)]


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM images",
        "INSERT INTO trash VALUES ('x', 1)",
        "UPDATE blobs SET size = 0",
        "DROP TABLE images",
        "CREATE TEMP TABLE mine (x)",
        "CREATE VIEW mine AS SELECT 1",
        "ATTACH 'other.db' AS other",
        "VACUUM INTO 'copy.db'",
        "PRAGMA journal_mode = DELETE",
        "PRAGMA query_only = OFF",
        "PRAGMA writable_schema = ON",
        "PRAGMA user_version = 7",
        "BEGIN IMMEDIATE",
        "SAVEPOINT a",
        "REINDEX",
        "ANALYZE",
        "WITH x AS (SELECT 1) DELETE FROM images",
        "EXPLAIN DELETE FROM images",
        "UPDATE labels SET value = ''",
    ],
)
def test_a_query_that_would_write_is_refused(
    cache: Cache, query: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = (cache.directory / "index.db").read_bytes(), sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InvalidQuery, match="only read-only queries are allowed"):
        run_query(cache, query)
    assert ((cache.directory / "index.db").read_bytes(), sorted(path.name for path in tmp_path.iterdir())) == before
    assert cache.is_image_complete("app:1")


def test_the_index_is_opened_read_only(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only connection refuses a write even if the authorizer allows it."""
    monkeypatch.setattr("cachedb.index.sqlite.query._authorizer", lambda: lambda *_: sqlite3.SQLITE_OK)
    for query in ("DELETE FROM images", "PRAGMA user_version = 7", "CREATE TEMP TABLE mine (x)"):
        with pytest.raises(InvalidQuery, match="only read-only queries are allowed"):
            run_query(cache, query)
    assert cache.is_image_complete("app:1")


@pytest.mark.parametrize(
    ("query", "marked"),
    [
        ("SELECT name FORM images", "images"),
        ("SELECT name FROM image_usage WHERE", None),
        ("SELECT nme FROM image_usage", "nme"),
        ("SELECT i.nme FROM image_usage AS i", "nme"),
        ("SELECT 1\nFROM nowhere", "nowhere"),
        ("SELECT 'from' FROM images WHERE ORDER BY from", "ORDER"),
        ("SELECT hum(1)", "hum"),
        ("SELECT digest FROM blobs, garbage", "digest"),
        ("SELECT 1 ) FROM x", ")"),
        ("SELECT 'abc", "'abc"),
        ("SELECT name, human() FROM image_usage", "human"),
        ("SELECT max(sum(size)) FROM blobs", "sum"),
        ("SELECT name FROM image_usage WHERE count(*) > 1", "count"),
        ("SELECT size, rank() OVER w FROM blobs", "w"),
        ("SELECT name -- nme\nFROM image_usage WHERE name = 'nme' AND nme = 1 /* nme */", "nme = "),
    ],
)
def test_an_error_has_the_place_of_the_mistake(cache: Cache, query: str, marked: str | None) -> None:
    with pytest.raises(InvalidQuery) as caught:
        run_query(cache, query)
    place = caught.value.place
    if marked is None:
        assert place == (len(query), len(query))
    else:
        assert place
        assert query[place[0] :].startswith(marked)
        assert query[slice(*place)] == marked.split()[0]


@pytest.mark.parametrize(
    ("query", "suggestion"),
    [
        ("SELECT unique_sise FROM image_usage", "unique_size"),
        ("SELECT g.sise FROM garbage AS g", "size"),
        ("SELECT 1 FROM image_use", "image_usage"),
        ("SELECT xyzzy FROM garbage", None),
        ("SELECT nme FROM image_usage, garbage", "name"),
        # The similar name must be a column of the table that the qualifier names, and be in scope.
        ("SELECT g.stored FROM garbage AS g, blob_usage AS b", "stored_at"),
        ("SELECT g.nme FROM garbage AS g, labels AS l", None),
        ("SELECT imags FROM (SELECT repository FROM repository_usage)", None),
        ("SELECT imags FROM (SELECT images FROM repository_usage)", "images"),
        ("WITH sums AS (SELECT sum(size) AS total FROM blobs) SELECT totl FROM sums", "total"),
        ("WITH sums AS (SELECT 1 AS total) SELECT total FROM sum", "sums"),
        ("SELECT image_usge.name FROM image_usage", "image_usage.name"),
        ("SELECT us.name FROM image_usage AS usg", "usg.name"),
        ("SELECT nme, sze FROM image_usage WHERE blobs > :least", "name"),
        ("SELECT 'nme', name -- nme\nFROM labels WHERE nme = 'nme'", "name"),
        ("EXPLAIN SELECT nme FROM labels", "name"),
        ("SELECT main.labels.nme FROM labels", "name"),
    ],
)
def test_an_error_suggests_a_similar_name(cache: Cache, query: str, suggestion: str | None) -> None:
    with pytest.raises(InvalidQuery) as caught:
        run_query(cache, query)
    assert re.findall(r": did you mean (.*)\?$", str(caught.value)) == ([suggestion] if suggestion else [])


def test_an_error_names_the_views_that_have_the_column(cache: Cache) -> None:
    with pytest.raises(InvalidQuery, match=r"^no such column: freed_size: it is a column of image_usage, repository_"):
        run_query(cache, "SELECT freed_size FROM labels")
    with pytest.raises(InvalidQuery, match=r"^no such column: size$"):
        run_query(cache, "SELECT size FROM labels")


def test_the_place_of_an_unknown_name_is_where_the_suggested_name_works(cache: Cache) -> None:
    query = "SELECT (SELECT names FROM (SELECT 1 AS names)), names FROM labels"
    with pytest.raises(InvalidQuery, match=r"did you mean name\?$") as caught:
        run_query(cache, query)
    assert caught.value.place == (query.rindex("names"), query.rindex("names") + 5)


@pytest.mark.parametrize("query", ["", "  \n", "-- nothing", ";"])
def test_an_empty_query_is_refused(cache: Cache, query: str) -> None:
    with pytest.raises(InvalidQuery, match="there is no query"):
        run_query(cache, query)


def test_several_queries_and_wrong_parameters_are_refused(cache: Cache) -> None:
    with pytest.raises(InvalidQuery, match="only one query is allowed at a time"):
        run_query(cache, "SELECT 1; SELECT 2")
    with pytest.raises(InvalidQuery, match="no value for :least: give one with -p least=VALUE"):
        run_query(cache, "SELECT :least")
    for query in ("SELECT ?, :n", "SELECT ?1, :n"):
        with pytest.raises(InvalidQuery, match="write :NAME instead"):
            run_query(cache, query, n=1)
    with pytest.raises(InvalidQuery, match="type 'list' is not supported"):
        run_query(cache, "SELECT :least", least=[1])  # type: ignore[arg-type]
    with pytest.raises(InvalidQuery, match="the query has no :dyas: it has :days"):
        run_query(cache, "SELECT :days", dyas=1)
    with pytest.raises(InvalidQuery):
        run_query(cache, "SELECT '\0'")
    with pytest.raises(InvalidQuery):
        run_query(cache, "SELECT abs(-9223372036854775808)")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["count(*)", "x"], ids=["before-a-row", "between-rows"])
def test_a_query_that_takes_too_long_is_stopped(cache: Cache, what: str) -> None:
    start = time.monotonic()
    with pytest.raises(CacheError, match=r"took over 0\.2 s"), cache.sql(ENDLESS.format(what), timeout=0.2) as answer:
        for _ in answer.rows:
            pass
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("order", ["ORDER BY x % 7", "GROUP BY -x"])
@pytest.mark.parametrize("stream", [False, True])
def test_sqlites_temporary_files_have_a_size_limit(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, order: str, stream: bool
) -> None:
    monkeypatch.setattr(query_module, "_TEMPORARY_BYTES", 2**20)
    query = f"{ENDLESS.format('x')} {order}"
    message = r"^SQLite needs over 1\.05 MB of temporary files for the query: "
    with pytest.raises(CacheError, match=message), cache.sql(query, timeout=60, stream=stream) as answer:
        list(answer.rows)
    assert run_query(cache, "SELECT count(*) FROM image_usage ORDER BY 1") == [(1,)]


@pytest.mark.slow
def test_the_file_of_a_result_has_a_size_limit(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_module, "_TEMPORARY_BYTES", 2**20)
    message = r"^the rows of the query take over 1\.05 MB: "
    with pytest.raises(CacheError, match=message), cache.sql(ENDLESS.format("x"), timeout=60):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "command", "variable"),
    [
        ("", "prune", "TMPDIR"),
        ("ORDER BY x LIMIT 9 OFFSET 149000", "prune", "SQLITE_TMPDIR"),
        ("ORDER BY x LIMIT 9 OFFSET 149000", "sql", "SQLITE_TMPDIR"),
    ],
)
def test_a_full_folder_of_temporary_files_is_named_and_costs_the_cache_nothing(
    cache: Cache, tmp_path: Path, order: str, command: str, variable: str
) -> None:
    query = f"SELECT x FROM ({ENDLESS.format('hex(randomblob(20)) AS x')} LIMIT 150000) {order}"
    cache.set_policy(f'[[remove]]\nsql = "{query}"\n')
    partial = partial_path(cache.directory, Digest(make.digest_of(b"x")))
    partial.parent.mkdir()
    partial.write_bytes(b"begun")
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as small:
        # A process of its own, because Python and SQLite read the variables once.
        arguments = ["sql", query] if command == "sql" else ["prune"]
        run = [sys.executable, "-m", "cachedb", "--dir", str(cache.directory), *arguments]
        environment = {**os.environ, variable: str(small)}
        full = subprocess.run(run, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert (full.returncode, full.stderr.count("\n")) == (1, 1)
    assert f"name a folder with enough space in {variable}" in full.stderr
    assert partial.exists()
    assert (cache.directory / "reserve").exists()


def test_a_query_reads_one_snapshot_and_blocks_no_writer(cache: Cache) -> None:
    with cache.sql("SELECT name FROM image_usage, json_each('[1, 2, 3]')") as answer:
        first = next(answer.rows)
        with Cache.open(cache.directory) as other:
            other.tag("app:1", "app:2")
            other.remove_manifest("app:1")
        assert [first, *answer.rows] == [("app:1",)] * 3
    assert run_query(cache, "SELECT name FROM image_usage") == [("app:2",)]


def test_several_threads_may_query_at_once(cache: Cache) -> None:
    found: list[list[tuple[object, ...]]] = []

    def ask() -> None:
        found.extend(run_query(cache, "SELECT name FROM image_usage") for _ in range(20))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[("app:1",)]] * 80


def test_a_read_only_cache_can_be_queried(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        with Cache.open(cache.directory) as other:
            assert run_query(other, "SELECT name FROM image_usage") == [("app:1",)]


def test_views_are_listed_with_columns_and_descriptions(cache: Cache) -> None:
    found = {view.name: view for view in cache.list_views()}
    assert found["garbage"].columns == (
        ("digest", "TEXT", "digest of the blob"),
        ("size", "INTEGER", "bytes"),
        ("stored_at", "TEXT", "time at which it was stored"),
    )
    assert all(view.description and view.definition.startswith("CREATE VIEW") for view in found.values())
    columns = [column for view in found.values() for column in view.columns]
    assert {column.type for column in columns} == {"INTEGER", "REAL", "TEXT"}
    assert all(column.description for column in columns)


# Functions and limits

LONG = "printf('%.*c', 5000000, 'a')"


@pytest.mark.parametrize(
    "call",
    [
        "fts3_tokenizer('simple')",
        "fts3_tokenizer('simple', :pointer)",
        "load_extension('x')",
        "sqlite_log(1, 'x')",
        "json_patch('{}', '{}')",
        "\"FTS3_Tokenizer\"('simple')",
    ],
)
def test_only_harmless_functions_may_be_called(cache: Cache, call: str) -> None:
    parameters = {"pointer": "AAAAAAAA"} if ":pointer" in call else {}
    with pytest.raises(InvalidQuery, match=r"^(the function '\w+' is not allowed in a query|no such function)"):
        run_query(cache, f"SELECT {call}", **parameters)


@pytest.mark.parametrize(
    "value",
    [
        "hex(zeroblob(499999999))",
        "zeroblob(100000000)",
        "randomblob(100000000)",
        "printf('%.*c', 2147483647, 'a')",
        "printf('%.*c', '2147483647x', 'a')",
        "printf('%.*c', -2147483647, 'a')",
        "printf('%.*c', 2e9, 'a')",
        "format('%.2147483647c', 'a')",
        "printf(replace(hex(zeroblob(2000)), '00', '%5000000d'), 1)",
        "printf('%.3000000f%.*f', 1, 3000000, 1)",
        "format('%5.99999999999c', 'a')",
        "length(replace(printf('%.*c', 900000000, 'a'), 'a', 'bb'))",
        f"replace({LONG}, 'a', 'bb')",
        f"replace({LONG}, 'a', {LONG})",  # terabytes, so none may be asked for
        f"{LONG} || {LONG}",
        f"json_array({LONG}, {LONG})",
        f"(SELECT group_concat(x) FROM (SELECT {LONG} AS x UNION ALL SELECT {LONG}))",
    ],
)
def test_a_value_has_a_size_limit(cache: Cache, value: str) -> None:
    with pytest.raises(InvalidQuery, match=r"^a value in the query is over 5\.24 MB: "):
        run_query(cache, f"SELECT length({value})")


def test_the_size_of_a_format_is_checked_before_it_is_made(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[object, ...]] = []
    real = query_module._check_format

    def check_format(text: str, values: Iterator[query_module.Value]) -> None:
        real(text, values)
        made.append((text,))

    monkeypatch.setattr(query_module, "_check_format", check_format)
    for call in ("printf('%3000000d%-.3000000d', 1, 2)", "printf('%*d%*d', 3000000, 1, '-3000000', 2)"):
        with pytest.raises(InvalidQuery, match=r"^a value in the query is over 5\.24 MB: "):
            run_query(cache, f"SELECT length({call})")
    assert made == []


@pytest.mark.parametrize("name", ["printf", "format"])
def test_a_format_returns_what_sqlite_returns(cache: Cache, name: str) -> None:
    plain = sqlite3.connect(":memory:")
    for arguments in (
        "",
        "NULL",
        "'%d of %s: %5.2f%%', 3, 'x', 1.5",
        "'%*d|%-*s|%.*c', 5, 7, 4, 'é', 3, 'z'",
        "'12345678901 %q %w %Q', 'a''b', 'c\"d', NULL",
        "'%s', x'6162'",
        "'%*s', '4', 'a'",
        "'%*d %% %d %.*ld %s', 5, 1, 600000000, 3, 2, 'x'",
        "7",
    ):
        call = f"{name.replace('format', 'printf')}({arguments})"
        assert run_query(cache, f"SELECT {name}({arguments})") == plain.execute(f"SELECT {call}").fetchall(), call
    plain.close()


def test_a_value_may_be_as_long_as_the_longest_document(cache: Cache) -> None:
    assert run_query(cache, "SELECT length(:x)", x="a" * DOCUMENT_LIMIT) == [(DOCUMENT_LIMIT,)]


@pytest.mark.parametrize(
    ("call", "result"),
    [
        (f"instr({LONG}, substr({LONG}, 2500000) || 'b')", 0),
        (f"instr(CAST({LONG} AS BLOB), zeroblob(2500000))", 0),
        (f"length(replace({LONG}, substr({LONG}, 2500000) || 'b', ''))", 5_000_000),
        (f"length(trim({LONG}, replace(substr({LONG}, 2500000), 'a', 'b') || 'a'))", 0),
    ],
)
def test_a_search_in_a_long_text_takes_linear_time(cache: Cache, call: str, result: int) -> None:
    began = time.process_time()
    assert run_query(cache, f"SELECT {call}") == [(result,)]
    assert time.process_time() - began < 20  # SQLite's own functions would take hours


def test_a_search_for_a_long_text_uses_our_functions(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_module, "_instr", lambda *_: -1)
    assert run_query(cache, "SELECT instr(x, x || 'b') FROM (SELECT 'a' AS x)") == [(-1,)]
    assert run_query(cache, "SELECT instr(x, 'short') FROM (SELECT 'a' AS x)") == [(0,)], "SQLite's own is faster here"


def test_a_pattern_has_a_length_limit(cache: Cache) -> None:
    assert run_query(cache, "SELECT 'app:1' LIKE :x", x="%" * 128) == [(1,)]
    for operator in ("LIKE", "GLOB"):
        with pytest.raises(InvalidQuery, match=r"^a pattern of LIKE or GLOB is over 128 bytes: "):
            run_query(cache, f"SELECT 'app:1' {operator} :x", x="%" * 129)


def test_a_query_has_a_limit_of_calls_of_functions(cache: Cache) -> None:
    assert run_query(cache, f"SELECT {' + '.join(['abs(1)'] * 200)}") == [(200,)]
    with pytest.raises(InvalidQuery, match=r"^the query has over 200 function calls: "):
        run_query(cache, f"SELECT {' + '.join(['abs(1)'] * 201)}")


@pytest.mark.parametrize(
    ("query", "limit", "error"),
    [
        ("SELECT {}", 100, "too many columns in result set"),
        ("SELECT count(*) FROM (SELECT {})", 100, "too many columns in result set"),
        ("SELECT 1 ORDER BY {}", 100, "too many terms in ORDER BY clause"),
        ("SELECT json_array({})", 32, "too many arguments on function json_array"),
        ("SELECT printf('%s', {}, 1)", 30, "too many arguments on function printf"),
    ],
)
def test_a_row_and_a_call_have_a_limit_of_values_because_each_may_be_long(
    cache: Cache, query: str, limit: int, error: str
) -> None:
    assert len(run_query(cache, query.format(", ".join("1" * limit)))) == 1
    with pytest.raises(InvalidQuery, match=rf"^{error}: use at most {32 if 'arguments' in error else 100}$"):
        run_query(cache, query.format(", ".join("1" * (limit + 1))))


@pytest.mark.slow
def test_a_loop_of_long_steps_is_stopped(cache: Cache) -> None:
    began = time.process_time()
    with (
        pytest.raises(CacheError, match=r"took over 0\.2 s"),
        cache.sql(ENDLESS.format("sum(length(hex(zeroblob(1000000 + x % 2))))"), timeout=0.2) as answer,
    ):
        list(answer.rows)
    assert time.process_time() - began < 20


VALUES = ("'axbxc'", "'x'", "''", "NULL", "7", "1.5", "x'78'", "'é'", "'axbxcaxb'")


@pytest.mark.parametrize("function", ["instr", "replace", "trim", "ltrim", "rtrim"])
def test_our_functions_return_what_sqlites_functions_return(cache: Cache, function: str) -> None:
    with closing(sqlite3.connect(":memory:")) as plain:
        # Since SQLite 3.53 or earlier, it returns a number as text, even if there is nothing to replace.
        replaces_in_numbers = plain.execute("SELECT typeof(replace(7, '', 5))").fetchone() == ("text",)
        for text in VALUES:
            for part in VALUES:
                call = f"{function}({text}, {part}{', 5' if function == 'replace' else ''})"
                if replaces_in_numbers and call in ("replace(7, '', 5)", "replace(1.5, '', 5)"):
                    continue
                assert (
                    run_query(cache, f"SELECT {call}, instr('a' || 'b', 'b')")[0][:1]
                    == plain.execute(f"SELECT {call}").fetchone()
                ), call


# The command line

PRINTED = {
    "table": 'name    n  t\napp:1  12  a|"b,\\n\n',
    "json": '[\n  {"name": "app:1", "n": 12, "t": "a|\\"b,\\n"}\n]\n',
    "ndjson": '{"name": "app:1", "n": 12, "t": "a|\\"b,\\n"}\n',
    "csv": 'name,n,t\napp:1,12,"a|""b,\n"\n',
    "tsv": 'name\tn\tt\napp:1\t12\t"a|""b,\n"\n',
    "markdown": '| name | n | t |\n| --- | --- | --- |\n| app:1 | 12 | a\\|"b,\\\\n |\n',
}


@pytest.mark.parametrize("form", PRINTED)
def test_rows_are_printed_in_the_chosen_format(cachedb: Run, cache: Cache, form: str) -> None:
    query = "SELECT name, :n + 2 AS n, 'a|\"b,' || char(10) AS t FROM image_usage"
    assert cachedb("sql", "--format", form, "-p", "n=10", query).stdout == PRINTED[form]


STRANGE = {
    "table": "a\\nb  b     c  e       i  a\\nb\n   1  00ff     x\\ry  inf     2\n",
    "json": '[\n  {"a\\nb": 1, "b": "00ff", "c": null, "e": "x\\ry", "i": null, "a\\nb_2": 2}\n]\n',
    "ndjson": '{"a\\nb": 1, "b": "00ff", "c": null, "e": "x\\ry", "i": null, "a\\nb_2": 2}\n',
    "csv": '"a\nb",b,c,e,i,"a\nb"\n1,00ff,,"x\ry",inf,2\n',
    "tsv": '"a\nb"\tb\tc\te\ti\t"a\nb"\n1\t00ff\t\t"x\ry"\tinf\t2\n',
    "markdown": "| a\\\\nb | b | c | e | i | a\\\\nb |\n| --- | --- | --- | --- | --- | --- |\n"
    "| 1 | 00ff |  | x\\\\ry | inf | 2 |\n",
}


@pytest.mark.parametrize("form", STRANGE)
def test_special_values_and_names_are_printed_in_every_format(cachedb: Run, cache: Cache, form: str) -> None:
    """The row has a blob, a carriage return and infinity; a column name is repeated and has two lines."""
    query = "SELECT 1 AS 'a\nb', x'00ff' AS b, NULL AS c, 'x' || char(13) || 'y' AS e, 1e999 AS i, 2 AS 'a\nb'"
    assert cachedb("sql", "--format", form, query, text=False).stdout.decode() == STRANGE[form]


FORMULAS = [
    "=1+1",
    "+1+1",
    "-1+1",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "\uff1d1",
    "\uff0b1",
    "\uff0d1",
    "\uff201",
    "-",
    "+1e",
]


@pytest.mark.parametrize("form", ["csv", "tsv"])
def test_no_cell_is_a_formula_of_a_spreadsheet(cachedb: Run, cache: Cache, form: str) -> None:
    query = f"SELECT value FROM json_each({sqlite_text(json.dumps(FORMULAS))})"
    printed = cachedb("sql", "--format", form, query, text=False).stdout.decode()
    cells = [row[0] for row in csv.reader(io.StringIO(printed, newline=""), delimiter="," if form == "csv" else "\t")]
    assert cells == ["value", *(f"'{text}" for text in FORMULAS)]


def sqlite_text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@pytest.mark.parametrize("form", ["csv", "tsv"])
def test_a_number_stays_a_number_in_a_cell(cachedb: Run, cache: Cache, form: str) -> None:
    query = "SELECT -1 UNION ALL SELECT -1.5 UNION ALL SELECT '-2' UNION ALL SELECT '+3.25e-7' UNION ALL SELECT 'a=1'"
    assert cachedb("sql", "--format", form, query).stdout.splitlines()[1:] == ["-1", "-1.5", "-2", "+3.25e-7", "a=1"]


def test_a_cell_of_markdown_contains_no_html_and_no_link(cachedb: Run, cache: Cache) -> None:
    text = "<img src=x onerror=alert(1)> & ![x](http://example.org/x) `code`"
    printed = cachedb("sql", "--format", "markdown", f"SELECT '{text}' AS '<b>'").stdout.splitlines()
    assert printed[0] == "| &lt;b&gt; |"
    assert printed[2] == ("| &lt;img src=x onerror=alert(1)&gt; &amp; !\\[x\\](http://example.org/x) \\`code\\` |")


@pytest.mark.slow
def test_a_terminal_gets_no_escape_sequence_in_a_cell(cache: Cache) -> None:
    command = [sys.executable, "-m", "cachedb", "--dir", str(cache.directory), "sql", "--format", "csv"]
    shown = run_on_terminal([*command, "SELECT 'a' || char(27) || '[2J' AS x"])
    assert "\x1b[2J" not in shown
    assert "a\\x1b[2J" in shown


@pytest.mark.slow
def test_a_row_wider_than_the_terminal_is_printed_with_one_line_a_value(cache: Cache) -> None:
    command = [sys.executable, "-m", "cachedb", "--dir", str(cache.directory), "sql"]
    cache.tag("app:1", "app:2")
    shown = run_on_terminal([*command, "SELECT * FROM image_usage"]).replace("\r\n", "\n").split("\n\n")
    assert [image.splitlines()[0].split() for image in shown] == [["name", "app:1"], ["name", "app:2"]]
    assert [line.split()[0] for line in shown[0].splitlines()[:4]] == ["name", "repository", "reference", "digest"]
    assert (
        "app:1"
        not in run_on_terminal([*command, "SELECT name, created_at, blobs, size FROM image_usage"]).splitlines()[0]
    )
    assert run_on_terminal([*command, "SELECT * FROM image_usage WHERE 0"]) == "", "there is no row to print"
    assert run_on_terminal([*command, "SELECT name FROM image_usage WHERE 0"]).startswith("\x1b[1m")


@pytest.mark.parametrize("form", PRINTED)
def test_an_empty_result_is_printed_in_every_format(cachedb: Run, cache: Cache, form: str) -> None:
    done = cachedb("sql", "--format", form, "SELECT 1 AS one WHERE 0")
    assert done.returncode == 0
    if form == "json":
        assert json.loads(done.stdout) == []
    else:
        assert done.stdout == {"table": "one\n", "ndjson": "", "markdown": "| one |\n| --- |\n"}.get(form, "one\n")


@pytest.mark.slow
def test_a_parameter_written_as_a_number_is_a_number(cachedb: Run, cache: Cache) -> None:
    for text, kind in {
        "10": "integer",
        "-1.5": "real",
        "1.10": "text",
        "007": "text",
        "1e3": "text",
        "nan": "text",
        "inf": "text",
        "9223372036854775807": "integer",
        "20261128171001123456": "text",
        "": "text",
    }.items():
        done = cachedb("sql", "--format", "csv", "-p", f"x={text}", "SELECT typeof(:x) AS t, :x || '' AS x")
        assert done.stdout == f"t,x\n{kind},{text or ''}\n"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["csv", "markdown", "table"])
def test_a_character_that_the_users_encoding_lacks_is_escaped(cachedb: Run, cache: Cache, form: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1:strict"}
    done = cachedb("sql", "--format", form, "SELECT char(0xe9, 0x65e5) AS x", text=False, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\xe9\\u65e5" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["sql", "SELECT 1"], ["sql", "--format", "csv", "SELECT 1"], ["df"], ["ls"]])
@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_stdout_or_stderr_is_no_error(cachedb: Run, cache: Cache, arguments: list[str], closed: int) -> None:
    done = cachedb(*arguments, preexec_fn=lambda: os.close(closed))
    assert (done.returncode, done.stderr, bool(done.stdout)) == (0, "", closed == 2)


@pytest.mark.slow
def test_a_query_that_runs_out_of_memory_fails_in_one_line(cachedb: Run, cache: Cache) -> None:
    limit = (400 * 1024 * 1024,) * 2
    query = ENDLESS.format("randomblob(4000000)")
    failed = cachedb("sql", query, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit))
    assert (failed.returncode, failed.stderr.count("\n"), "out of memory" in failed.stderr) == (1, 1, True)


@pytest.mark.slow
def test_a_query_is_read_from_a_file_or_stdin(cachedb: Run, cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "query.sql").write_text("SELECT count(*) AS n FROM images")
    assert cachedb("sql", "--file", str(tmp_path / "query.sql")).stdout == "n\n1\n"
    assert cachedb("sql", "-", input="SELECT 2 AS n").stdout == "n\n2\n"
    assert cachedb("sql", "--file", "-", input="SELECT 3 AS n").stdout == "n\n3\n"
    (tmp_path / "query.sql").write_bytes(b"\xef\xbb\xbfSELECT\r\nnme FROM image_usage")
    with (tmp_path / "query.sql").open("rb") as opened:
        for arguments in (["--file", tmp_path / "query.sql"], ["-"]):
            assert cachedb("sql", *arguments, stdin=opened).stderr.endswith(
                "in line 2:\n  nme FROM image_usage\n  ^^^\n"
            )
    for encoding in ("utf-8:strict", "utf-8:surrogateescape"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        failed = cachedb("sql", "-", input=b"SELECT '\xff'", text=False, env=environment)
        assert (failed.returncode, failed.stderr.count(b"\n"), b"it is not UTF-8 text" in failed.stderr) == (2, 1, True)
    failed = cachedb("sql", "--file", str(tmp_path / "nothing.sql"))
    assert (failed.returncode, "cannot read" in failed.stderr) == (2, True)
    assert cachedb("sql", "--schema", "SELECT 1").returncode == 2


WITHOUT_HEADER = {"table": "app:1  4\n", "csv": "app:1,4\n", "tsv": "app:1\t4\n", "markdown": "| app:1 | 4 |\n"}


@pytest.mark.parametrize("form", WITHOUT_HEADER)
def test_no_header_leaves_out_the_names_of_the_columns(cachedb: Run, cache: Cache, form: str) -> None:
    query = "SELECT name, blobs FROM image_usage"
    assert cachedb("sql", "--no-header", "--format", form, query).stdout == WITHOUT_HEADER[form]
    assert cachedb("sql", "--no-header", "--format", form, f"{query} WHERE 0").stdout == ""
    assert cachedb("report", "--no-header", "--format", form, "garbage").stdout == ""


def test_json_has_booleans_in_the_boolean_columns_of_the_views(cachedb: Run, cache: Cache) -> None:
    query = "SELECT complete, blobs = 4 AS four, 7 AS held, NULL AS stored FROM image_usage"
    (row,) = json.loads(cachedb("sql", "--format", "json", query).stdout)
    assert row == {"complete": True, "four": 1, "held": 7, "stored": None}
    assert row["complete"] is True
    assert cachedb("sql", "--format", "csv", "SELECT complete FROM image_usage").stdout == "complete\n1\n"


def test_sql_without_a_query_lists_the_views_and_the_schema_is_valid_sql(cachedb: Run, cache: Cache) -> None:
    assert "image_usage  " in cachedb("sql").stdout
    views = json.loads(cachedb("sql", "--format", "json").stdout)
    assert "image_usage" in [view["name"] for view in views]
    assert all(view["view"] == view["name"] for view in views), "the old key"
    shell = sqlite3.connect(":memory:")
    shell.executescript(cachedb("sql", "--schema").stdout)
    assert shell.execute("SELECT count(*) FROM image_usage").fetchone() == (0,)
    shell.close()


@pytest.mark.slow
def test_schema_prints_the_columns_of_a_view(cachedb: Run, cache: Cache) -> None:
    printed = cachedb("sql", "--schema", "garbage").stdout.splitlines()
    assert [line.split()[:2] for line in printed] == [
        ["COLUMN", "TYPE"], ["digest", "TEXT"], ["size", "INTEGER"], ["stored_at", "TEXT"],
    ]  # fmt: skip
    views = {view.name: view for view in cache.list_views()}
    listed = json.loads(cachedb("sql", "--schema", "image_usage", "--format", "json").stdout)
    assert listed == [column._asdict() for column in views["image_usage"].columns]
    for name, hint in (("image_usge", "did you mean image_usage?"), ("xyzzy", "`cachedb sql` lists the views")):
        failed = cachedb("sql", "--schema", name)
        assert (failed.returncode, failed.stderr) == (2, f"cachedb: there is no view {name!r}: {hint}\n")


def test_datasette_metadata_describes_every_view_and_column(cachedb: Run, cache: Cache) -> None:
    described = json.loads(cachedb("sql", "--datasette-metadata").stdout)["databases"]["index"]["tables"]
    assert described == {
        view.name: {
            "description": view.description,
            "columns": {column.name: column.description for column in view.columns},
        }
        for view in cache.list_views()
    }
    assert cachedb("sql", "--datasette-metadata", "SELECT 1").returncode == 2


@pytest.mark.slow
def test_the_place_of_an_error_is_marked(cachedb: Run, cache: Cache) -> None:
    failed = cachedb("sql", "SELECT name\nFROM image_usge WHERE 1")
    assert failed.returncode == 2
    assert failed.stderr == (
        "cachedb: no such table: image_usge: did you mean image_usage?, in line 2:\n"
        "  FROM image_usge WHERE 1\n       ^^^^^^^^^^\n"
    )
    failed = cachedb("sql", "DELETE FROM images")
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert cachedb("sql", "--timeout", "1s", ENDLESS.format("count(*)")).returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("what", ["count(*)", "sum(length(human(x)))", "count(ago('2020-01-01'))"])
@pytest.mark.parametrize("form", ["table", "ndjson"])
def test_an_interrupt_ends_a_query(cache: Cache, form: str, what: str) -> None:
    command = [sys.executable, "-m", "cachedb", "sql", "--format", form, ENDLESS.format(what)]
    environment = {**os.environ, "CACHEDB_DIR": str(cache.directory)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        # The query runs at idle priority, so a busy machine gives it little time.
        assert wait_until(lambda: os.sched_getscheduler(process.pid) == os.SCHED_IDLE)
        begun = cpu_seconds(process.pid)
        assert wait_until(lambda: cpu_seconds(process.pid) >= begun + 0.1, 120)
        process.send_signal(signal.SIGINT)
        try:
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, error) == (130, "\ncachedb: interrupted\n")


FIRST = {"json": b"[\n", "ndjson": b'{"x": 1}\n', "csv": b"x\n1\n", "markdown": b"| x |\n| --- |\n| 1 |\n"}


@pytest.mark.slow
@pytest.mark.parametrize("form", FIRST)
def test_rows_are_printed_before_the_query_ends(cache: Cache, form: str) -> None:
    command = [sys.executable, "-m", "cachedb", "sql", "--format", form, ENDLESS.format("x")]
    environment = {**os.environ, "CACHEDB_DIR": str(cache.directory)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        for line in FIRST[form].splitlines(keepends=True):
            assert process.stdout.readline() == line
        process.stdout.close()  # as `head` does
        assert process.wait(timeout=60) == 1
        assert process.stderr
        assert process.stderr.read() == b""


PRINT_PRIORITIES = """
import os, sys
from cachedb import cache
from cachedb.cli import main
def print_priority_of(name):
    method = getattr(cache.Cache, name)
    def print_and_call(*arguments, **options):
        print(name, os.sched_getscheduler(0) == os.SCHED_IDLE, os.getpriority(os.PRIO_PROCESS, 0), file=sys.stderr)
        return method(*arguments, **options)
    setattr(cache.Cache, name, print_and_call)
for name in ("open", "sql", "run_report", "get_html_report", "close"):
    print_priority_of(name)
REFUSE
main.cli(sys.argv[1:])
"""


def read_priorities(directory: Path, *arguments: str, refuse: str = "") -> dict[str, tuple[str, int]]:
    """Return, for each method that a command calls, whether it runs at idle priority, and its nice value."""
    command = [sys.executable, "-c", PRINT_PRIORITIES.replace("REFUSE", refuse), "--dir", str(directory), *arguments]
    stderr = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {name: (idle, int(nice)) for name, idle, nice in map(str.split, stderr.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "method"),
    [
        (("sql", "SELECT 1"), "sql"),
        (("report", "garbage"), "run_report"),
        (("report", "--html", "-"), "get_html_report"),
    ],
)
def test_a_query_runs_at_idle_priority_once_the_cache_is_open(
    cache: Cache, arguments: tuple[str, ...], method: str
) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    found = read_priorities(cache.directory, *arguments)
    assert found["open"] == ("False", own)  # opening may take the write lock
    assert found[method] == ("True", own)
    if os.geteuid() == 0:  # other users cannot raise their priority again
        assert found["close"] == ("False", own)


@pytest.mark.slow
def test_a_query_is_nice_if_idle_priority_is_not_allowed(cache: Cache) -> None:
    refuse = "def refuse(*_): raise PermissionError\nos.sched_setscheduler = refuse"
    found = read_priorities(cache.directory, "sql", "SELECT 1", refuse=refuse)
    assert found["sql"] == ("False", 19)
