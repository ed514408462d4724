"""The tiles of the treemap: many repositories are grouped by namespace, and each byte is drawn once."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from cachedb.reports.tiles import choose_namespaces
from tests.support.pages import exact, fill, only, parse, render, text_of


def test_a_few_repositories_are_not_grouped() -> None:
    assert choose_namespaces([f"registry.example.com/team-{number % 2}/app-{number}" for number in range(20)]) == {}


def test_many_repositories_are_grouped_by_the_path_without_the_last_part() -> None:
    names = [f"registry.example.com/team-{number % 4}/app-{number}" for number in range(40)]
    found = choose_namespaces([*names, "alpine", "registry.example.com/alone/app"])
    assert found == {name: name.rpartition("/")[0] for name in names}


def test_too_many_namespaces_are_joined() -> None:
    names = [f"registry-{number % 3}.example.com/team-{number // 2}/app-{number}" for number in range(200)]
    assert set(choose_namespaces(names).values()) == {f"registry-{number}.example.com" for number in range(3)}


def test_one_namespace_is_no_group() -> None:
    assert choose_namespaces([f"team/app-{number}" for number in range(40)]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("repositories", [40, 200])
def test_a_treemap_of_namespaces_has_each_stored_byte_once(directory: Path, repositories: int) -> None:
    fill(directory, 200, repositories=repositories)
    top = only(parse(render(directory)), ".//svg[@id='map']")
    with closing(sqlite3.connect(directory / "index.db")) as shell:
        ((stored,),) = shell.execute("SELECT sum(size) FROM blob_usage WHERE stored")
        expected = dict(
            shell.execute(
                """
                WITH users AS (
                    SELECT DISTINCT o.blob_id, substr(i.repository, 1, instr(i.repository, '/app-') - 1) AS namespace
                    FROM image_blobs AS o JOIN images AS i ON i.id = o.image_id
                )
                SELECT min(u.namespace), sum(b.size) FROM (
                    SELECT blob_id, min(namespace) AS namespace FROM users GROUP BY blob_id HAVING count(*) = 1
                ) AS u JOIN blobs AS b ON b.id = u.blob_id WHERE b.stored_at IS NOT NULL GROUP BY u.namespace
                """
            )
        )
    sizes = {tile.attrib["data-name"]: exact(text_of(only(tile, "title"))) for tile in top.findall("svg")}
    assert sum(sizes.values()) == stored
    assert {name: size for name, size in sizes.items() if "/" in name} == expected
    assert len(expected) == 5
    for tile in top.findall("svg"):
        inside = [exact(text_of(only(one, "title"))) for one in tile.findall("svg")]
        if inside:
            assert sum(inside) == pytest.approx(sizes[tile.attrib["data-name"]], abs=stored / 10**5)
