"""The HTML page: its numbers equal the views, its areas are to scale, and text from images is escaped."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from cachedb import Cache
from cachedb.reports import charts, image_table, tiles
from cachedb.text import printable as clean
from tests.support.make import image, save, save_index
from tests.support.pages import (
    HOSTILE,
    add_hostile_names,
    card_of,
    exact,
    fill,
    name_of,
    only,
    parse,
    render,
    rows_of,
    text_of,
)


@pytest.fixture
def made(directory: Path) -> str:
    fill(directory, 40)
    return render(directory)


def test_the_treemap_has_each_stored_byte_once(made: str, directory: Path) -> None:
    shell = sqlite3.connect(directory / "index.db")
    ((stored,),) = shell.execute("SELECT sum(size) FROM blob_usage WHERE stored")
    sizes = dict(shell.execute("SELECT repository, unique_size FROM repository_usage"))
    images = dict(shell.execute("SELECT reference, unique_size FROM image_usage"))
    shell.close()
    drawn = []

    def walk(tile: ElementTree.Element, area: float, depth: int) -> int:
        total = 0
        for inside in tile.findall("svg"):
            name, size = inside.attrib["data-name"], exact(text_of(only(inside, "title")))
            part = area * float(inside.attrib["width"][:-1]) * float(inside.attrib["height"][:-1]) / 10**4
            assert part == pytest.approx(size / stored, rel=0.01, abs=1e-5)
            if depth == 2 and name in images:
                assert size == images[name]
                drawn.append(name)
            if inside.find("svg") is not None:
                assert walk(inside, part, depth + 1) == pytest.approx(size, abs=stored / 10**5)
            total += size
        return total

    top = only(parse(made), ".//svg[@id='map']")
    assert walk(top, 1, 1) == stored
    assert len(drawn) > 30
    first = {tile.attrib["data-name"]: exact(text_of(only(tile, "title"))) for tile in top.findall("svg")}
    assert first.keys() == {*sizes, "shared by several repositories", "garbage", "held, in no image"}
    assert {name: first[name] for name in sizes} == sizes


@pytest.mark.slow
def test_the_numbers_are_those_of_the_views(made: str, directory: Path) -> None:
    shell = sqlite3.connect(directory / "index.db")
    figures = {
        "Stored": "SELECT sum(size) FROM blob_usage WHERE stored",
        "In one image": "SELECT sum(unique_size) FROM image_usage",
        "In several images": "SELECT sum(size) FROM blob_usage WHERE stored AND images > 1",
        "Held, in no image": "SELECT sum(size) FROM blob_usage WHERE stored AND images = 0 AND held",
        "Garbage": "SELECT sum(size) FROM garbage",
        "Missing": "SELECT sum(size) FROM blob_usage WHERE NOT stored",
    }
    boxes = parse(made).findall(".//dl/div")
    found = {text_of(only(box, "dt")): exact(only(box, "dd/span").attrib["title"]) for box in boxes}
    assert found == {name: shell.execute(query).fetchone()[0] for name, query in figures.items()}
    stored, *parts = list(found.values())[:5]
    assert stored == sum(parts)
    ((incomplete,),) = shell.execute("SELECT count(*) FROM image_usage WHERE NOT complete")
    assert incomplete > 1
    for section, columns, query in (
        ("images", (2, 3, 4), "SELECT name, size, unique_size, shared_size FROM image_usage"),
        ("repositories", (2, 3, 4), "SELECT repository, size, unique_size, shared_size FROM repository_usage"),
    ):
        rows = [
            (name_of(cells[0]), *(exact(cells[column].attrib["title"]) for column in columns))
            for cells in rows_of(made, section)
        ]
        assert rows == shell.execute(f"{query} ORDER BY 2 DESC, 1").fetchall()
    rows = [(cells[0].attrib["title"], exact(cells[1].attrib["title"])) for cells in rows_of(made, "layers")]
    assert rows == shell.execute("SELECT digest, size FROM layers ORDER BY size DESC, digest").fetchall()
    # Keeping only the images of the last week frees all blobs that none of them has.
    ((freed,),) = shell.execute(
        "SELECT sum(size) FROM blob_usage AS u WHERE stored AND images > 0 AND NOT EXISTS ("
        "SELECT 1 FROM image_contents AS c JOIN image_ages AS a ON a.name = c.name "
        "WHERE c.digest = u.digest AND a.unused_days <= 7)"
    )
    shell.close()
    assert exact(rows_of(made, "use")[1][4].attrib["title"]) == freed


def test_the_savings_of_sharing_equal_those_of_df_and_layers_are_shown_separately(cache: Cache) -> None:
    for name in ("app:1", "app:2"):
        save(cache, name, image(1, 2))  # they share a manifest and a config too
    save(cache, "app:3", image(1, 3))
    html = render(cache.directory)
    (several,) = (box for box in parse(html).findall(".//dl/div") if text_of(only(box, "dt")) == "In several images")
    assert exact(only(several, "dd/small/span").attrib["title"]) == cache.get_usage().saved_size
    with cache.sql("SELECT sum(saved_size) FROM shared_layers") as answer:
        ((of_layers,),) = answer.rows
    assert of_layers < cache.get_usage().saved_size
    assert f'Without sharing, all layers would take <span title="{of_layers:,} bytes">' in html


@pytest.mark.slow
def test_text_from_images_is_escaped(made: str) -> None:
    root = parse(made)
    assert len(root.findall(".//script")) == 2
    assert root.findall(".//img") == []
    assert not any(name.startswith("on") for element in root.iter() for name in element.attrib)
    assert not re.search("[\x00-\x09\x0b-\x1f\u202a-\u202e\u2066-\u2069]", made)
    (image_1,) = (cells for cells in rows_of(made, "images") if name_of(cells[0]) == "team/app-1:1.1")
    details = text_of(image_1[0])
    shown = HOSTILE.replace("\u202e", "\\u202e").replace("\x07", "\\x07").replace("\n", "\\n")
    assert f"Author: {shown}" in details
    assert f"key{shown}"[:60] in details
    assert f"=1 {shown}"[:60] in details
    assert any(shown in text_of(cells[4]) for cells in rows_of(made, "layers"))
    assert any("<script>" in text_of(title) for title in root.findall(".//svg//title"))


@pytest.mark.slow
def test_hostile_names_are_escaped_everywhere(made: str, directory: Path) -> None:
    add_hostile_names(directory)
    html = render(directory)
    root = parse(html)
    assert len(root.findall(".//script")) == 2
    assert root.findall(".//img") == []
    assert not any(name.startswith("on") for element in root.iter() for name in element.attrib)
    assert not re.search("[\x00-\x09\x0b-\x1f\u202a-\u202e\u2066-\u2069]", html)
    assert html.count("</script>") == 2
    # The name is in each of these places, so the checks above are about them.
    shown = clean(HOSTILE)
    for identifier in ("holds", "incomplete", "duplicates", "outdated"):
        card = card_of(root, identifier)
        assert shown in text_of(card) or shown[-20:] in text_of(card)
    assert any(shown in element.attrib.get("data-find", "") for element in root.iter("a"))
    assert any(shown in text_of(cells[0]) for cells in rows_of(html, "repositories"))
    assert any(shown in text_of(title) for title in root.findall(".//svg//title"))
    assert any(shown in repository for repository in read_data(html)["repositories"])
    assert "hostile/<" not in text_of(card_of(root, "removal"))


def read_data(html: str) -> dict[str, Any]:
    """Return the data of the page's search."""
    (found,) = parse(html).findall(".//script[@type='application/json']")
    data: dict[str, Any] = json.loads(text_of(found))
    return data


def test_the_data_of_the_search_has_all_images(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(directory, 40)
    monkeypatch.setattr(image_table, "TABLE_ROWS", 5)
    html = render(directory)
    data = read_data(html)
    found = [
        (data["repositories"][row[0]] + row[1], row[4], row[5], row[6], row[7], bool(row[12] & 1))
        for row in data["images"]
    ]
    with closing(sqlite3.connect(directory / "index.db")) as shell:
        expected = shell.execute(
            "SELECT name, size, missing_size, unique_size, shared_size, NOT complete FROM image_usage "
            "ORDER BY size DESC, name"
        ).fetchall()
        images = dict(shell.execute("SELECT digest, images FROM layers ORDER BY size DESC, digest LIMIT 5"))
    assert found == expected
    assert [name_of(cells[0]) for cells in rows_of(html, "images")] == [name for name, *_ in expected[:5]]
    counts = [sum(layer in row[14] for row in data["images"]) for layer in range(5)]
    assert counts == list(images.values())


@pytest.mark.slow
def test_each_counter_says_how_many_images_its_search_finds(made: str, directory: Path) -> None:
    add_hostile_names(directory)
    html = render(directory)
    data = read_data(html)
    found: dict[str, int] = {}
    for one in data["images"]:
        words = [f"is:{fact}" for bit, fact in enumerate(data["facts"]) if one[12] >> bit & 1]
        words += [f"platform:{data['platforms'][platform]}" for platform in one[3]]
        words += [f"layer:{data['layers'][layer]}" for layer in one[14]]
        words += [f"repository:{data['repositories'][one[0]]}", f"used:{data['ages'][one[11]]}"]
        words += [f"base:{data['bases'][one[13]]}"]
        words += [f"is:outdated {words[-1]}"] if "is:outdated" in words else []
        for token in words:
            found[token] = found.get(token, 0) + 1
    counters = [
        (link.attrib["data-find"], int(digits[0].replace(",", "")))
        for link in parse(html).findall(".//a[@data-find]")
        if (digits := re.findall(r"^[\d,]+", text_of(link))) and "manifest" not in text_of(link)
    ]
    kinds = {search.partition(":")[0] for search, _ in counters}
    assert kinds == {"is", "platform", "layer", "repository", "used", "base"}
    for search, count in counters:
        assert found[search] == count, search


def test_an_image_of_several_platforms_counts_for_each(cache: Cache) -> None:
    save_index(cache, "both:1", image(1), image(2, architecture="arm64"))
    save(cache, "one:1", image(1))
    html = render(cache.directory)
    platforms = {name_of(cells[0]): text_of(cells[1]) for cells in rows_of(html, "images")}
    assert platforms == {"both:1": "linux/amd64, linux/arm64", "one:1": "linux/amd64"}
    counts = {link.attrib["data-find"]: text_of(link) for link in parse(html).findall(".//a[@data-find]")}
    assert {find: count for find, count in counts.items() if find.startswith("platform:")} == {
        "platform:linux/amd64": "2",
        "platform:linux/arm64": "1",
    }


def test_an_image_without_a_platform_is_shown_as_unknown(cache: Cache) -> None:
    made = image(1)
    cache.save_manifest("lost:1", made.manifest)
    (cells,) = rows_of(render(cache.directory), "images")
    assert text_of(cells[1]) == "unknown"


def test_names_link_the_tables_and_the_map(made: str) -> None:
    root = parse(made)
    links = {element.attrib["href"] for element in root.iter("a")}
    rows = {row.attrib["id"] for row in root.iter("tr") if "id" in row.attrib}
    tiles_of_rows = {tile.attrib["id"] for tile in root.findall(".//svg[@id]")} - {"map"}
    assert {f"#{identifier}" for identifier in tiles_of_rows} <= links  # from the tables to the map
    assert {f"#{identifier.removeprefix('map-')}" for identifier in tiles_of_rows} <= links  # and back
    assert len(tiles_of_rows) > 30
    layers = {identifier for identifier in rows if identifier.startswith("layer-")}
    assert {link[1:] for link in links if link.startswith("#layer-")} == layers  # from images to layers
    for cells in rows_of(made, "layers"):  # and back
        (link,) = cells[3].findall("a")
        assert link.attrib["href"][1:] in rows


def test_tooltips_of_the_map_name_the_image(made: str, directory: Path) -> None:
    with closing(sqlite3.connect(directory / "index.db")) as shell:
        names = {name for (name,) in shell.execute("SELECT name FROM image_usage")}
    root = parse(made)
    found = 0
    for tile in root.findall(".//svg[@data-name]"):
        if tile.attrib.get("id", "").startswith("map-image-"):
            name = text_of(only(tile, "title")).splitlines()[0]
            assert name in names
            for inside in tile.findall("svg"):
                assert f"in {name}" in text_of(only(inside, "title")).splitlines()
                found += 1
    assert found > 50


def test_the_page_loads_nothing_and_runs_one_script(made: str) -> None:
    root = parse(made)
    policy = only(root, ".//meta[@http-equiv='Content-Security-Policy']").attrib["content"]
    data, code = root.findall(".//script")
    script = text_of(code)
    assert data.attrib["type"] == "application/json"  # a browser runs no such element
    assert "type" not in code.attrib
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    links = [value for element in root.iter() for name, value in element.attrib.items() if name in ("href", "src")]
    assert {link[0] for link in links if link != "data:,"} == {"#"}
    assert {link[1:] for link in links if link[0] == "#"} <= {element.attrib.get("id") for element in root.iter()}
    assert "url(" not in made
    assert "@import" not in made


def test_the_page_is_accessible(made: str) -> None:
    root = parse(made)
    assert root.attrib["lang"] == "en"
    assert {heading.attrib.get("scope") for heading in root.findall(".//th")} == {"col", "row"}
    for table in root.findall(".//table"):
        widths = {len(row) for row in table.iter("tr")}
        assert len(widths) == 1
    for tile in root.findall(".//svg[@data-name]"):
        assert tile.find("title") is not None
    identifiers = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(identifiers) == len(set(identifiers))


@pytest.mark.slow
def test_long_tables_and_small_tiles_are_cut(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(directory, 40)
    monkeypatch.setattr(image_table, "TABLE_ROWS", 5)
    monkeypatch.setattr(tiles, "_TILES", 5)
    html = render(directory)
    assert [len(rows_of(html, section)) for section in ("images", "layers", "repositories")] == [5, 5, 5]
    found = re.findall(r"there are ([\d,]+) more. All of them: <code>([^<]*)</code>", html)
    shell = sqlite3.connect(directory / "index.db")
    assert [int(more) + 5 for more, _ in found] == [len(shell.execute(query).fetchall()) for _, query in found]
    ((stored,),) = shell.execute("SELECT sum(size) FROM blob_usage WHERE stored")
    shell.close()
    for number in (5, 1):
        monkeypatch.setattr(tiles, "_TILES", number)
        top = only(parse(render(directory)), ".//svg[@id='map']").findall("svg")
        assert any("smaller repositor" in tile.attrib["data-name"] for tile in top)
        assert sum(exact(text_of(only(tile, "title"))) for tile in top) == stored


@pytest.mark.slow
def test_the_page_of_20_000_images_is_small(directory: Path) -> None:
    fill(directory, 20_000, repositories=1000)
    html = render(directory)
    assert len(html.encode()) < 7_000_000
    (data,) = re.findall(r'id="all-images">(.*?)</script>', html)
    assert len(json.loads(data)["images"]) == 20_000


def test_an_empty_cache_has_a_page(cache: Cache, directory: Path) -> None:
    html = render(directory)
    assert parse(html).findall(".//svg[@id='map']") == []
    assert "Nothing is stored." in html
    (directory / "x").write_text(html)  # raises if the page has characters that UTF-8 cannot encode


def test_the_page_shows_a_complete_and_an_incomplete_image(cache: Cache, directory: Path) -> None:
    made = image(1, 2)
    for digest, data in made.blobs.items():
        cache.save_blob(digest, data)
    cache.save_manifest("app:1", made.manifest)
    cache.save_manifest("lost:1", image(2, 3).manifest)
    html = render(directory)
    sharing = rows_of(html, "sharing")
    states = {name_of(cells[0]): text_of(cells[0]) for cells in rows_of(html, "images")}
    assert "incomplete" not in states["app:1"]
    assert "incomplete, " in states["lost:1"]
    common = len(made.layers[1])
    assert [exact(cells[column].attrib["title"]) for column, cells in ((2, sharing[0]), (1, sharing[1]))] == [
        common
    ] * 2


def test_missing_blobs_of_a_repository_do_not_count_as_shared(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "_MATRIX_ROWS", 2)
    for name in ("app:1", "other:1"):
        save(cache, name, image(1))
    cache.save_manifest("lost:1", image(2, 3).manifest)
    html = render(cache.directory)
    assert {name_of(cells[0]) for cells in rows_of(html, "sharing")} == {"app", "other"}
    assert {name_of(cells[0]): exact(cells[4].attrib["title"]) for cells in rows_of(html, "repositories")}["lost"] == 0


@contextmanager
def proxy() -> Iterator[tuple[int, list[bytes]]]:
    """Run a proxy that records the requests and closes every connection; yield its port and the requests."""
    requests: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    line = connection.recv(4096).split(b"\r\n")[0]
                if line and b"google" not in line:  # Chromium sends requests of its own to Google
                    requests.append(line)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1], requests
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def browse(chromium: str, path: Path, port: int) -> str:
    """Open a page in a browser that uses the proxy for everything, and return the resulting document."""
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--disable-extensions",
        f"--user-data-dir={path.parent / 'profile'}", f"--proxy-server=http://127.0.0.1:{port}",
        "--proxy-bypass-list=<-loopback>", "--virtual-time-budget=1000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run([chromium, *options], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.slow
def test_in_a_browser_the_page_sorts_searches_and_zooms_without_requests(
    made: str, tmp_path: Path, peer: Callable[[str], str]
) -> None:
    chromium, path = peer("chromium"), tmp_path / "page.html"
    path.write_text(made, encoding="utf-8")
    with proxy() as (port, requests):
        shown = browse(chromium, path, port)
        assert requests == []
        assert 'id="path"' in shown
        assert "Click a rectangle" in shown  # the script ran, under the page's policy

        # This script acts like a user. The page's policy must block it, like any foreign script.
        script = """
            document.querySelector("#images thead th:nth-child(4) button").click();
            const find = document.querySelector("#repositories input");
            find.value = "APP-3";
            find.dispatchEvent(new Event("input"));
            const tile = document.querySelector("#map > svg[data-name='team/app-1']");
            tile.dispatchEvent(new MouseEvent("click", {bubbles: true}));
            document.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));
            document.body.dataset.out = tile.getAttribute("width");
            tile.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
            const picture = new Image();
            picture.src = "http://picture.invalid/x.png";
        """
        path.write_text(made.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
        assert "1 of 7" not in browse(chromium, path, port)
        assert requests == []
        allowed = re.sub(r"<meta http-equiv[^>]*>", "", path.read_text(encoding="utf-8"))
        path.write_text(allowed, encoding="utf-8")
        shown = browse(chromium, path, port)
        assert requests == [b"GET http://picture.invalid/x.png HTTP/1.1"]  # without the policy, the request is made
    before = [exact(cells[3].attrib["title"]) for cells in rows_of(made, "images")]
    (headings,) = re.findall(r'<section id="images">.*?<thead>(.*?)</thead>', shown, re.DOTALL)
    assert re.findall(r'aria-sort="(\w+)"><button>([^<]*)', headings) == [("descending", "Unique")]
    after = [exact(cells[3].attrib["title"]) for cells in rows_of(shown, "images")]
    assert before != after == sorted(before, reverse=True)
    assert "1 of 7" in shown.split('<section id="repositories">')[1]
    assert [name_of(cells[0]) for cells in rows_of(shown, "repositories")] == ["team/app-3"]
    assert re.search(r'<body data-out="\d+\.\d+%">', shown)
    assert re.search(r'<svg [^>]*x="0" y="0" width="100%" height="100%"[^>]*data-name="team/app-1"', shown)


def act(chromium: str, path: Path, html: str, script: str) -> str:
    """Open a page without its policy, run a script in it, and return the resulting document."""
    allowed = re.sub(r"<meta http-equiv[^>]*>", "", html).replace("</body>", f"<script>{script}</script></body>")
    path.write_text(allowed, encoding="utf-8")
    with proxy() as (port, _):
        return browse(chromium, path, port)


@pytest.mark.slow
def test_in_a_browser_the_search_and_the_counters_find_images_that_are_not_listed(
    directory: Path, tmp_path: Path, peer: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chromium, path = peer("chromium"), tmp_path / "page.html"
    monkeypatch.setattr(image_table, "TABLE_ROWS", 5)
    fill(directory, 40)
    add_hostile_names(directory)
    html = render(directory)
    with closing(sqlite3.connect(directory / "index.db")) as shell:
        ((smallest, size),) = shell.execute("SELECT name, size FROM image_usage ORDER BY size LIMIT 1")
        ((used,),) = shell.execute("SELECT last_used_at FROM image_usage ORDER BY size LIMIT 1")
        incomplete = {name for (name,) in shell.execute("SELECT name FROM image_usage WHERE NOT complete")}
        app_3 = {name for (name,) in shell.execute("SELECT name FROM image_usage WHERE repository = 'team/app-3'")}
    search = f"""
        const find = document.querySelector("#images input");
        find.value = "{smallest.upper()} is:nothing";
        find.dispatchEvent(new Event("input"));
        const none = document.querySelectorAll("#images tbody tr").length;
        find.value = "{smallest.upper()}";
        find.dispatchEvent(new Event("input"));
        document.body.dataset.none = none;
    """
    shown = act(chromium, path, html, search)
    assert 'data-none="0"' in shown
    ((cells),) = rows_of(shown, "images")
    assert (name_of(cells[0]), exact(cells[2].attrib["title"])) == (smallest, size)
    assert text_of(cells[8]) == used[:10]
    assert "1 of 44" in shown

    def filter_by(words: str) -> list[str]:
        click = f"document.querySelector(\"a[data-find='{words}']\").click();"
        shown = act(chromium, path, html, f"{click} document.querySelector('#images thead button').click();")
        assert f" of {44}" in shown
        return [name_of(cells[0]) for cells in rows_of(shown, "images")]

    assert len(incomplete) > 5
    shown_names = {clean(name) for name in incomplete}
    found = filter_by("is:incomplete")
    assert set(found) <= shown_names
    assert found == sorted(shown_names)[:5]  # sorted by name, among all images
    assert filter_by("repository:team/app-3") == sorted(app_3)[:5]
    hostile = filter_by("is:held")
    assert len(hostile) == 3
    assert all(name.startswith(clean(f"hostile/{HOSTILE}")) for name in hostile)


@pytest.mark.slow
def test_in_a_browser_links_show_rows_and_tiles_that_were_filtered_or_zoomed_away(
    made: str, tmp_path: Path, peer: Callable[[str], str]
) -> None:
    chromium, path = peer("chromium"), tmp_path / "page.html"
    (row, *_), *_ = [cells for cells in rows_of(made, "images") if cells[0].find(".//a[@class='to']") is not None]
    target = row.find(".//a[@class='to']")
    assert target is not None
    tile = target.attrib["href"][1:]
    script = f"""
        const find = document.querySelector("#images input");
        find.value = "no such image";
        find.dispatchEvent(new Event("input"));
        const rows = () => document.querySelectorAll("#images tbody tr").length;
        const before = rows();
        document.querySelector("#map a[href^='#image-']").dispatchEvent(new MouseEvent("click", {{bubbles: true}}));
        document.body.dataset.rows = before + " " + rows();
        document.querySelector("a[href='#{tile}']").click();
        document.body.dataset.zoomed = document.querySelector("#{tile}").parentNode.getAttribute("width");
        document.querySelector(".command button").click();
    """
    shown = act(chromium, path, made, script)
    assert 'data-rows="0 40"' in shown
    assert 'data-zoomed="100%"' in shown


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("repositories", [7, 40])
def test_in_a_browser_nothing_is_wider_than_the_window_and_no_label_covers_another(
    directory: Path, tmp_path: Path, peer: Callable[[str], str], width: int, repositories: int
) -> None:
    chromium = peer("chromium")
    fill(directory, 120, repositories=repositories)
    script = """
        for (const details of document.querySelectorAll("details")) details.open = true;
        const wide = [document.documentElement, ...document.querySelectorAll(".scroll, pre")]
            .filter(element => element.scrollWidth > element.clientWidth).map(element => element.className || "page");
        const boxes = [...document.querySelectorAll("#map text")].filter(text => text.textContent).map(text => {
            const box = text.getBoundingClientRect(), tile = text.closest("svg").firstElementChild;
            return [text.textContent, box, tile.getBoundingClientRect()];
        });
        const covered = boxes.flatMap(([name, one, tile], number) => boxes.slice(number + 1).filter(
            ([, other, outer]) =>
                Math.min(one.right, tile.right, other.right, outer.right) - Math.max(one.left, other.left) > 1 &&
                Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top) > 3
        ).map(([other]) => name + " and " + other));
        parent.postMessage(JSON.stringify({width: innerWidth, wide, covered, labels: boxes.length}), "*");
    """
    inner, path = tmp_path / "inner.html", tmp_path / "page.html"
    html = re.sub(r"<meta http-equiv[^>]*>", "", render(directory))
    inner.write_text(html.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    # A window of a browser is at least 500 pixels wide, but a frame may be narrower.
    path.write_text(
        "<script>addEventListener('message', event => document.title = event.data)</script>"
        f"<iframe src='{inner.as_uri()}' style='border: 0; width: {width}px; height: 900px'></iframe>"
    )
    with proxy() as (port, _):
        shown = browse(chromium, path, port)
    (title,) = re.findall(r"<title>([^<]*)</title>", shown)
    found = json.loads(title)
    assert found.pop("labels") > (10 if width == 400 else 50)
    assert found == {"width": width, "wide": [], "covered": []}
