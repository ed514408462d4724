"""Fill the index of a cache quickly, render its HTML page, and read the page."""

from __future__ import annotations

import random
import re
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

from cachedb import Cache
from cachedb.index.sqlite.database import Database
from cachedb.oci.manifests import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST
from cachedb.reports import page
from tests.support.make import digest_of

HOSTILE = "</title></script><script>alert('x')</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}\u202e\x07\n"


def fill(directory: Path, images: int, *, repositories: int = 7, seed: int = 1) -> None:
    """Make a cache whose index has images with shared, missing and held blobs; it has no files of blobs.

    More than 20 repositories have the namespaces of a registry; fewer are in one namespace.
    """
    Cache.open(directory).close()
    draw = random.Random(seed)
    with closing(sqlite3.connect(directory / "index.db")) as shell, shell:
        index = _Index(shell, draw)
        bases = [index.add_blob(draw.randrange(10**6, 10**8)) for _ in range(3)]
        for number in range(1, images + 1):
            repository = f"team/app-{number % repositories}"
            if repositories > 20:
                repository = f"registry.example.com/team-{number % 5}/app-{number % repositories}"
            own = [index.add_blob(draw.randrange(1, 10**7), stored=draw.random() > 0.1) for _ in range(3)]
            author = HOSTILE if number == 1 else None
            index.add_image(repository, f"1.{number}", [bases[number % 3], *own], author=author)
        for _ in range(3):
            index.add_blob(draw.randrange(10**5, 10**7))
        held = index.add_blob(123456)
        shell.execute("INSERT INTO leases VALUES (?, 'hold-abcdefabcdef', 1)", (digest_of(b"%d" % held),))


def add_hostile_names(directory: Path) -> None:
    """Add images whose names no registry accepts: duplicates, incomplete, held, and with an outdated base."""
    with closing(sqlite3.connect(directory / "index.db")) as shell, shell:
        index = _Index(shell, random.Random(1))
        repository = f"hostile/{HOSTILE}"
        layers = [index.add_blob(10**9), index.add_blob(10**9)]
        missing = index.add_blob(10**9, stored=False)
        manifest = index.add_image(repository, f"old {HOSTILE}", layers, created="2026-01-01T00:00:00.000000Z")
        index.add_image(repository, "new", [index.add_blob(10**9)], created="2026-02-01T00:00:00.000000Z")
        child = index.add_image(repository, f"child {HOSTILE}", [*layers, missing])
        index.add_image(repository, f"second {HOSTILE}", [*layers, missing], manifest=child)
        shell.execute(
            "INSERT INTO lasting_holds VALUES ('hold-000000000000', ?, '2026-01-01T00:00:00.000000Z', NULL)",
            (f"{repository}:child {HOSTILE}",),
        )
        shell.execute(
            "INSERT INTO leases SELECT digest, 'hold-000000000000', 0 FROM blobs WHERE id IN (?, ?)", (manifest, child)
        )


class _Index:
    """Add rows to an index."""

    def __init__(self, shell: sqlite3.Connection, draw: random.Random) -> None:
        self._shell, self._draw = shell, draw
        self._last_blob: int
        ((self._last_blob,),) = shell.execute("SELECT coalesce(max(id), 0) FROM blobs")

    def draw_time(self) -> str:
        days = self._draw.choice([self._draw.uniform(0, 7), self._draw.uniform(0, 300)])
        time = datetime.now(UTC) - timedelta(days=days)
        return f"{time.replace(tzinfo=None).isoformat(timespec='microseconds')}Z"

    def add_blob(self, size: int, *, stored: bool = True) -> int:
        self._last_blob += 1
        number = self._last_blob
        time = self.draw_time() if stored else None
        self._shell.execute("INSERT INTO blobs VALUES (?, ?, ?, ?)", (number, digest_of(b"%d" % number), size, time))
        return number

    def add_image(
        self,
        repository: str,
        reference: str,
        layers: list[int],
        *,
        author: str | None = None,
        created: str | None = None,
        manifest: int | None = None,
    ) -> int:
        """Add an image; return the id of its manifest."""
        manifest = manifest or self.add_blob(700)
        time = self.draw_time()
        os = HOSTILE[:60] if repository.startswith("hostile") else "linux"
        image = self._shell.execute(
            "INSERT INTO images (repository, reference, manifest_id, media_type, added_at, last_used_at, os, "
            "architecture, author, created) VALUES (?, ?, ?, ?, ?, ?, ?, 'amd64', ?, ?) RETURNING id",
            (repository, reference, manifest, OCI_MANIFEST, time, time, os, author, created),
        ).fetchone()[0]
        associations: list[tuple[int, str, str, str | None]]
        associations = [(manifest, "manifest", OCI_MANIFEST, None), (self.add_blob(300), "config", OCI_CONFIG, None)]
        associations += [(layer, "layer", OCI_LAYER, f"RUN make {layer} {HOSTILE}") for layer in layers]
        self._shell.executemany(
            "INSERT INTO image_blobs (image_id, position, blob_id, role, media_type, created_by) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            [(image, position, *association) for position, association in enumerate(associations)],
        )
        self._shell.execute(
            "INSERT INTO image_platforms VALUES (?, 0, ?, ?, 'amd64', NULL)", (image, len(associations) - 1, os)
        )
        for key in (f"key{HOSTILE}", "version"):
            self._shell.execute("INSERT INTO image_labels VALUES (?, ?, ?)", (image, key, f"{image} {HOSTILE}"))
        return manifest


def render(directory: Path) -> str:
    with closing(Database(directory)) as index, index.read() as connection:
        return page.render(connection, directory)


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


def name_of(cell: ElementTree.Element) -> str:
    """Return the name in the first cell of a row."""
    found = cell.find(".//bdi")
    assert found is not None
    return text_of(found)


def card_of(root: ElementTree.Element, identifier: str) -> ElementTree.Element:
    """Return the part of the section on cleaning up whose heading has this identifier."""
    (found,) = (card for card in root.findall(".//section[@id='cleanup']/div/div") if card[0].get("id") == identifier)
    return found
