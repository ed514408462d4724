"""SQL functions: ours, and that those which replace SQLite's return the same in linear time."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from cachedb.callbacks import Callbacks
from cachedb.index.sqlite import functions

LONG = "printf('%.*c', 5000000, 'a')"
MANY = """(
    WITH RECURSIVE numbers(x) AS (SELECT 65536 UNION ALL SELECT x + 1 FROM numbers LIMIT 600000)
    SELECT group_concat(char(x), '') FROM numbers
)"""  # different characters


def run_query(query: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(":memory:")) as connection:
        functions.create_functions(connection, query, Callbacks())
        return connection.execute(query).fetchall()


def test_human_and_ago_format_sizes_and_times() -> None:
    assert run_query("SELECT human(0), human(1234567), human(NULL), human('much')") == [("0 B", "1.23 MB", None, None)]
    (row,) = run_query("SELECT ago(strftime('%Y-%m-%dT%H:%M:%SZ', 'now', '-50 hours')), ago('then'), ago(NULL), ago(1)")
    assert row == ("2 days ago", None, None, None)
    assert run_query("SELECT ago(strftime('%Y-%m-%d %H:%M', 'now', '-90 minutes'))") == [("1 hour ago",)]


def test_the_size_of_a_format_is_checked_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[object, ...]] = []
    real = functions._check_format

    def check_format(text: str, values: Iterator[functions.Value]) -> None:
        real(text, values)
        made.append((text,))

    monkeypatch.setattr(functions, "_check_format", check_format)
    for call in ("printf('%3000000d%-.3000000d', 1, 2)", "printf('%*d%*d', 3000000, 1, '-3000000', 2)"):
        with pytest.raises(sqlite3.DataError, match="too big"):
            run_query(f"SELECT length({call})")
    assert made == []


@pytest.mark.parametrize("name", ["printf", "format"])
def test_a_format_returns_what_sqlite_returns(name: str) -> None:
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
        assert run_query(f"SELECT {name}({arguments})") == plain.execute(f"SELECT {call}").fetchall(), call
    plain.close()


@pytest.mark.parametrize(
    ("call", "result"),
    [
        (f"instr({LONG}, substr({LONG}, 2500000) || 'b')", 0),
        (f"instr(CAST({LONG} AS BLOB), zeroblob(2500000))", 0),
        (f"length(replace({LONG}, substr({LONG}, 2500000) || 'b', ''))", 5_000_000),
        (f"length(trim({LONG}, replace(substr({LONG}, 2500000), 'a', 'b') || 'a'))", 0),
    ],
)
def test_a_search_in_a_long_text_takes_linear_time(call: str, result: int) -> None:
    began = time.process_time()
    assert run_query(f"SELECT {call}") == [(result,)]
    assert time.process_time() - began < 20  # SQLite's own functions would take hours


@pytest.mark.slow
def test_many_characters_are_trimmed_in_linear_time() -> None:
    began = time.process_time()
    assert run_query(f"SELECT length(trim({MANY}, {MANY}))") == [(0,)]
    assert time.process_time() - began < 5


def test_a_search_for_a_long_text_uses_our_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "_instr", lambda *_: -1)
    assert run_query("SELECT instr(x, x || 'b') FROM (SELECT 'a' AS x)") == [(-1,)]
    assert run_query("SELECT instr(x, 'short') FROM (SELECT 'a' AS x)") == [(0,)], "SQLite's own is faster here"


VALUES = ("'axbxc'", "'x'", "''", "NULL", "7", "1.5", "x'78'", "'é'", "'axbxcaxb'")


@pytest.mark.parametrize("function", ["instr", "replace", "trim", "ltrim", "rtrim"])
def test_our_functions_return_what_sqlites_functions_return(function: str) -> None:
    with closing(sqlite3.connect(":memory:")) as plain:
        # Since SQLite 3.53 or earlier, it returns a number as text, even if there is nothing to replace.
        replaces_in_numbers = plain.execute("SELECT typeof(replace(7, '', 5))").fetchone() == ("text",)
        for text in VALUES:
            for part in VALUES:
                call = f"{function}({text}, {part}{', 5' if function == 'replace' else ''})"
                if replaces_in_numbers and call in ("replace(7, '', 5)", "replace(1.5, '', 5)"):
                    continue
                assert (
                    run_query(f"SELECT {call}, instr('a' || 'b', 'b')")[0][:1]
                    == plain.execute(f"SELECT {call}").fetchone()
                ), call
