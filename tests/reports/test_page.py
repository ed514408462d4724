"""The HTML page: its numbers equal the views, its areas are to scale, and text from images is escaped."""

from __future__ import annotations

import base64
import hashlib
import random
import re
import socket
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachedb import Cache
from cachedb.index.sqlite.database import Database
from cachedb.oci.manifests import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST
from cachedb.reports import page, treemap
from tests.support.make import digest_of, image, save

HOSTILE = "</title></script><script>alert('x')</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}\u202e\x07\n"


def fill(directory: Path, images: int, seed: int = 1) -> None:
    """Make a cache whose index has images with shared, missing and held blobs; it has no files of blobs."""
    Cache.open(directory).close()
    draw = random.Random(seed)
    shell = sqlite3.connect(directory / "index.db")
    count = 0

    def some_time() -> str:
        time = datetime.now(UTC) - timedelta(days=draw.choice([draw.uniform(0, 7), draw.uniform(0, 300)]))
        return f"{time.replace(tzinfo=None).isoformat(timespec='microseconds')}Z"

    def blob(size: int, *, stored: bool = True) -> int:
        nonlocal count
        count += 1
        time = some_time() if stored else None
        shell.execute("INSERT INTO blobs VALUES (?, ?, ?, ?)", (count, digest_of(b"%d" % count), size, time))
        return count

    bases = [blob(draw.randrange(10**6, 10**8)) for _ in range(3)]
    for number in range(1, images + 1):
        repository = f"team/app-{number % 7}"
        own = [blob(draw.randrange(1, 10**7), stored=draw.random() > 0.1) for _ in range(3)]
        layers = [bases[number % 3], *own]
        time = some_time()
        shell.execute(
            "INSERT INTO images (id, repository, reference, manifest_id, media_type, added_at, last_used_at, os, "
            "architecture, author) VALUES (?, ?, ?, ?, ?, ?, ?, 'linux', 'amd64', ?)",
            (number, repository, f"1.{number}", blob(700), OCI_MANIFEST, time, time, HOSTILE if number == 1 else None),
        )
        associations: list[tuple[int, str, str, str | None]]
        associations = [(count, "manifest", OCI_MANIFEST, None), (blob(300), "config", OCI_CONFIG, None)]
        associations += [(layer, "layer", OCI_LAYER, f"RUN make {layer} {HOSTILE}") for layer in layers]
        for position, association in enumerate(associations):
            shell.execute(
                "INSERT INTO image_blobs (image_id, position, blob_id, role, media_type, created_by) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (number, position, *association),
            )
        for key in (f"key{HOSTILE}", "version"):
            shell.execute("INSERT INTO image_labels VALUES (?, ?, ?)", (number, key, f"{number} {HOSTILE}"))
    for _ in range(3):
        blob(draw.randrange(10**5, 10**7))
    shell.execute("INSERT INTO leases VALUES (?, 'hold-abcdefabcdef', 1)", (digest_of(b"%d" % blob(123456)),))
    shell.commit()
    shell.close()


def render(directory: Path) -> str:
    with closing(Database(directory)) as index, index.read() as connection:
        return page.render(connection, directory)


@pytest.fixture
def made(directory: Path) -> str:
    fill(directory, 40)
    return render(directory)


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=60), st.floats(10, 2000), st.floats(10, 2000))
def test_areas_are_to_scale_and_fill_the_whole_without_overlap(sizes: list[int], width: float, height: float) -> None:
    sizes.sort(reverse=True)
    boxes = treemap.squarify(sizes, width, height)
    assert len(boxes) == len(sizes)
    near = 1e-6 * (width + height)
    for size, box in zip(sizes, boxes, strict=True):
        assert box.width * box.height == pytest.approx(width * height * size / sum(sizes), rel=1e-6, abs=1e-9)
        assert box.x >= -near
        assert box.y >= -near
        assert box.x + box.width <= width + near
        assert box.y + box.height <= height + near
    # The areas add up to the whole, so they fill it if none overlap.
    for one, other in combinations(boxes, 2):
        beside = one.x + one.width <= other.x + near or other.x + other.width <= one.x + near
        above = one.y + one.height <= other.y + near or other.y + other.height <= one.y + near
        assert beside or above


def test_areas_are_nearly_square_if_possible() -> None:
    assert {(round(box.width), round(box.height)) for box in treemap.squarify([1] * 16, 80, 80)} == {(20, 20)}
    for box in treemap.squarify([6, 6, 4, 3, 2, 2, 1], 600, 400):  # the example of the algorithm's authors
        assert max(box.width / box.height, box.height / box.width) < 3


class _Parser(HTMLParser):
    """A strict parser of HTML: every element must be closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.builder, self.open = ElementTree.TreeBuilder(), list[str]()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, names)
        self.builder.start(tag, {name: value or "" for name, value in attributes})
        if tag in ("meta", "link", "input", "wbr"):
            self.builder.end(tag)
        else:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.builder.end(tag)

    def handle_data(self, data: str) -> None:
        if self.open:
            self.builder.data(data)


def parse(html: str) -> ElementTree.Element:
    parser = _Parser()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser.builder.close()


def only(element: ElementTree.Element, path: str) -> ElementTree.Element:
    (found,) = element.findall(path)
    return found


def exact(title: str) -> int:
    """Return the exact number of bytes in a title."""
    (found,) = re.findall(r"([\d,]+) bytes", title)
    return int(found.replace(",", ""))


def rows_of(html: str, section: str) -> list[list[ElementTree.Element]]:
    """Return the cells of the rows of a section's table."""
    return [list(row) for row in parse(html).findall(f".//section[@id='{section}']//tbody/tr")]


def text_of(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


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
            (text_of(only(cells[0], "bdi")), *(exact(cells[column].attrib["title"]) for column in columns))
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


def test_text_from_images_is_escaped(made: str) -> None:
    root = parse(made)
    assert len(root.findall(".//script")) == 1
    assert root.findall(".//img") == []
    assert not any(name.startswith("on") for element in root.iter() for name in element.attrib)
    assert not re.search("[\x00-\x09\x0b-\x1f\u202a-\u202e\u2066-\u2069]", made)
    (image_1,) = (cells for cells in rows_of(made, "images") if text_of(only(cells[0], "bdi")) == "team/app-1:1.1")
    details = text_of(image_1[9])
    shown = HOSTILE.replace("\u202e", "\\u202e").replace("\x07", "\\x07").replace("\n", "\\n")
    assert f"Author: {shown}" in details
    assert f"key{shown}"[:60] in details
    assert f"=1 {shown}"[:60] in details
    assert any(shown in text_of(cells[3]) for cells in rows_of(made, "layers"))
    assert any("<script>" in text_of(title) for title in root.findall(".//svg//title"))


def test_the_page_loads_nothing_and_runs_one_script(made: str) -> None:
    root = parse(made)
    policy = only(root, ".//meta[@http-equiv='Content-Security-Policy']").attrib["content"]
    script = text_of(only(root, ".//script"))
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


def test_long_tables_and_small_tiles_are_cut(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(directory, 40)
    monkeypatch.setattr(page, "_TABLE_ROWS", 5)
    monkeypatch.setattr(treemap, "_TILES", 5)
    html = render(directory)
    assert [len(rows_of(html, section)) for section in ("images", "layers", "repositories")] == [5, 5, 5]
    found = re.findall(r"there are ([\d,]+) more. All of them: <code>([^<]*)</code>", html)
    shell = sqlite3.connect(directory / "index.db")
    assert [int(more) + 5 for more, _ in found] == [len(shell.execute(query).fetchall()) for _, query in found]
    ((stored,),) = shell.execute("SELECT sum(size) FROM blob_usage WHERE stored")
    shell.close()
    for tiles in (5, 1):
        monkeypatch.setattr(treemap, "_TILES", tiles)
        top = only(parse(render(directory)), ".//svg[@id='map']").findall("svg")
        assert any("smaller repositor" in tile.attrib["data-name"] for tile in top)
        assert sum(exact(text_of(only(tile, "title"))) for tile in top) == stored


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
    states = {text_of(only(cells[0], "bdi")): text_of(cells[0]) for cells in rows_of(html, "images")}
    assert states["app:1"] == "app:1"
    assert "incomplete, " in states["lost:1"]
    common = len(made.layers[1])
    assert [exact(cells[column].attrib["title"]) for column, cells in ((2, sharing[0]), (1, sharing[1]))] == [
        common
    ] * 2


def test_missing_blobs_of_a_repository_do_not_count_as_shared(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_MATRIX_ROWS", 2)
    for name in ("app:1", "other:1"):
        save(cache, name, image(1))
    cache.save_manifest("lost:1", image(2, 3).manifest)
    html = render(cache.directory)
    assert {text_of(cells[0])[2:] for cells in rows_of(html, "sharing")} == {"app", "other"}
    assert {text_of(cells[0]): exact(cells[4].attrib["title"]) for cells in rows_of(html, "repositories")}["lost"] == 0


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
    before = [int(cells[3].attrib["data-v"]) for cells in rows_of(made, "images")]
    (headings,) = re.findall(r'<section id="images">.*?<thead>(.*?)</thead>', shown, re.DOTALL)
    assert re.findall(r'aria-sort="(\w+)"><button>([^<]*)', headings) == [("descending", "Unique")]
    body = shown.split('<section id="images">')[1].split("<tbody>")[1].split("</tbody>")[0]
    after = [int(row.split('data-v="')[2].split('"')[0]) for row in body.split("<tr>")[1:]]
    assert before != after == sorted(before, reverse=True)
    repositories = shown.split('<section id="repositories">')[1]
    assert "1 of 7" in repositories
    assert repositories.count("<tr hidden") == 6
    assert re.search(r'<body data-out="\d+\.\d+%">', shown)
    assert re.search(r'<svg x="0" y="0" width="100%" height="100%"[^>]*data-name="team/app-1"', shown)
