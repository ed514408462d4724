"""The views of the index agree with the manifests, configs and files after any sequence of steps."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachedb import Cache, ImageInfo, oci
from cachedb.content.save import find_stored_part, save_image
from cachedb.index.sqlite.database import Database
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import CONFIG_TYPES, OCI_INDEX, OCI_LAYER, OCI_MANIFEST
from cachedb.oci.names import Name
from cachedb.reports import named as report
from tests.conftest import files_of
from tests.support import make
from tests.support.make import ImageContent, descriptor, digest_of, full_config, image_of

EXAMPLES = int(os.environ.get("CACHEDB_FUZZ", "40"))

IMAGES = [
    make.image(1), make.image(1, 2), make.image(1, 2, 3), make.image(2), make.image(2, 1), make.image(),
    make.image(4, 4), make.image(4, 4, 4), make.image(4, 5, 4), make.image(1, architecture="arm64"),
    make.image(1, 2, 5, architecture="arm64"), make.image(3, compression="gzip"), make.image(3, 6, compression="gzip"),
    image_of(full_config(1), 1), image_of(full_config(1, 2, author="B", created=None), 1, 2),
    image_of(b"no config", 2, 3),
    image_of(full_config(1, 2, history=[{"created_by": "COPY x"}, {"created_by": "RUN y"}]), 1, 2),
    image_of(full_config(2, architecture="amd64", config={"Labels": {"version": "1", "empty": "no"}}), 2),
]  # fmt: skip
"""Images that share layers and configs, build on each other, or have no layer or one layer twice."""


def index_of(*children: bytes) -> bytes:
    kinds = [OCI_INDEX if "manifests" in json.loads(child) else OCI_MANIFEST for child in children]
    entries = [descriptor(child, kind) for child, kind in zip(children, kinds, strict=True)]
    if len(entries) > 1:  # the index states some platforms, and leaves others to the configs
        entries[0]["platform"] = {"os": "linux", "architecture": "arm", "variant": "v7"}
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()


def indexes() -> list[bytes]:
    manifests = [made.manifest for made in IMAGES]
    flat = [index_of(*(manifests[n] for n in which)) for which in [(0,), (1, 9), (2, 10, 13), (13, 17), (5, 1), (4, 4)]]
    nested = [index_of(flat[0]), index_of(manifests[0], flat[1]), index_of(flat[3], flat[2], manifests[6])]
    return [*flat, *nested, index_of(nested[1], flat[0])]


INDEXES = indexes()
DOCUMENTS = {digest_of(data): data for data in (*INDEXES, *(made.manifest for made in IMAGES))}
LOOSE = [b"", b"attached", b"in work", make.random_bytes(3000, 9)]
LAYERS = [make.layer(seed) for seed in (1, 2, 7)]
NAMES = ["a:1", "a:2", "b/c:1", "b/c:latest", "localhost:5000/d:1"]
ROLES = ["other", "layer"]

names = st.sampled_from(NAMES)
made_images = st.integers(0, len(IMAGES) - 1)
made_indexes = st.integers(0, len(INDEXES) - 1)
some = st.sets(st.integers(0, 5), max_size=3)
digests = st.sampled_from([digest_of(data) for data in (*LOOSE, *LAYERS, IMAGES[0].config, IMAGES[1].manifest)])

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("save"), names, made_images, st.just(set()) | some),
        st.tuples(st.just("save"), names, made_images, st.just(set())),
        st.tuples(st.just("save_index"), names, made_indexes, st.just(set()) | some, st.none() | some),
        st.tuples(st.just("tag"), names, names | st.sampled_from(["a@", "e@"])),
        st.tuples(st.just("attach"), names, st.sampled_from(LOOSE + LAYERS), st.sampled_from(ROLES)),
        st.tuples(st.just("store"), st.sampled_from(LOOSE + LAYERS), st.booleans()),
        st.tuples(st.just("hold"), names | digests, st.booleans()),
        st.tuples(st.just("remove"), st.sets(names, min_size=1, max_size=2)),
    ),
    min_size=1,
    max_size=20,
)


# The model: what a cache has, without its index.


@dataclass
class Entry:
    """The image of a name."""

    root: bytes
    chosen: set[str] | None = None  # the chosen children of an index; None for all
    attached: list[tuple[str, str]] = field(default_factory=list)  # digest and role


class Part(NamedTuple):
    """A blob at a position of an image."""

    digest: str
    role: str
    media_type: str
    size: int


@dataclass
class World:
    """The names of a cache, its held blobs, and its files."""

    directory: Path
    entries: dict[str, Entry] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)

    def read(self, digest: str) -> bytes | None:
        path = self.directory / "blobs" / digest.replace(":", "/")
        return path.read_bytes() if path.is_file() else None

    def contents(self, name: str) -> list[Part]:
        entry = self.entries[name]
        kind = OCI_INDEX if entry.root in INDEXES else OCI_MANIFEST
        root = Part(digest_of(entry.root), oci.role_of(kind), kind, len(entry.root))
        found: list[Part] = []
        stack, expanded = [root], set[str]()
        while stack:
            part = stack.pop()
            found.append(part)
            if part.role in ("manifest", "index") and part.digest not in expanded:
                expanded.add(part.digest)
                stack.extend(reversed(self._named_by(part, entry.chosen)))
        reached = {part.digest for part in found}
        for digest, role in entry.attached:
            if digest not in reached:
                data = self.read(digest)
                assert data is not None
                found.append(Part(digest, role, ATTACHED[role], len(data)))
        return found

    def _named_by(self, part: Part, chosen: set[str] | None) -> list[Part]:
        data = self.read(part.digest)
        if data is None:
            return []
        document = json.loads(data)
        if part.role == "manifest":
            config, layers = document["config"], document["layers"]
            named = [(config, "config"), *((layer, "layer") for layer in layers)]
        else:
            children = document["manifests"]
            wanted = [child for child in children if chosen is None or child["digest"] in chosen] or children
            named = [(child, oci.role_of(child["mediaType"])) for child in wanted]
        return [Part(entry["digest"], role, entry["mediaType"], entry["size"]) for entry, role in named]

    def configs(self, name: str) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Yield each stored config of an image, and the positions of its layers."""
        contents = self.contents(name)
        for place, part in enumerate(contents):
            if part.role != "config" or (data := self.read(part.digest)) is None or not data.startswith(b"{"):
                continue
            end = next((n for n in range(place + 1, len(contents)) if contents[n].role != "layer"), len(contents))
            yield json.loads(data), list(range(place + 1, end))


ATTACHED = {"other": "application/octet-stream", "layer": OCI_LAYER}


class Builder:
    """Applies steps to a cache and to its model."""

    def __init__(self, world: World, cache: Cache, holder: Cache, holds: ExitStack) -> None:
        self.world, self.cache, self.holder, self.holds = world, cache, holder, holds

    def save(self, name: str, number: int, missing: set[int]) -> None:
        self._store(IMAGES[number], missing)
        self.cache.save_manifest(name, IMAGES[number].manifest)
        self._point(name, IMAGES[number].manifest, None)

    def save_index(self, name: str, number: int, missing: set[int], chosen: set[int] | None) -> None:
        """Save an index.

        Args:
            name: of the index.
            number: its place in `INDEXES`.
            missing: places of children that are not stored, and of blobs of the other children.
            chosen: the places of the chosen platforms; None for all.
        """
        root = INDEXES[number]
        for place, child in enumerate(self._below(root)):
            made = next((made for made in IMAGES if made.manifest == child), None)
            if made and place not in missing:
                self._store(made, missing - {place})
            if place not in missing:
                self.cache.save_blob(digest_of(child), child)
        if chosen is None:
            self.cache.save_manifest(name, root)
            self._point(name, root, None)
            return
        self.cache.save_blob(digest_of(root), root)
        children = [entry["digest"] for entry in json.loads(root)["manifests"]]
        wanted = {digest for place, digest in enumerate(children) if place in chosen} or {children[0]}
        # Save the index as a pull of some platforms does, which keeps the platforms that the image has already.
        parsed, digest = Name.parse(name), Digest(digest_of(root))
        with closing(Database(self.cache.directory)) as index, index.write() as connection:
            wanted |= find_stored_part(connection, self.cache.directory, parsed, digest)
            choose = oci.choose_among({Digest(digest) for digest in wanted})
            save_image(connection, self.cache.directory, parsed, digest, OCI_INDEX, choose)
        self._point(name, root, wanted)

    def tag(self, source: str, target: str) -> None:
        if source in self.world.entries:
            entry = self.world.entries[source]
            name = target + digest_of(entry.root) if target.endswith("@") else target
            self.cache.tag(source, name)
            self.world.entries[name] = Entry(entry.root, entry.chosen, list(entry.attached))

    def attach(self, name: str, data: bytes, role: str) -> None:
        digest = self.cache.add_blob(data)
        if name in self.world.entries and digest not in {part.digest for part in self.world.contents(name)}:
            self.cache.associate_blob_with_image(name, digest, role=role, media_type=ATTACHED[role])  # type: ignore[arg-type]
            self.world.entries[name].attached.append((digest, role))

    def store(self, data: bytes, working: bool) -> None:
        """Store a blob of no image, and keep its lease if `working`."""
        digest = (self.holder if working else self.cache).add_blob(data)
        if working:
            self.world.held.add(digest)

    def hold(self, wanted: str, lasting: bool) -> None:
        if wanted in self.world.entries:
            found = {part.digest for part in self.world.contents(wanted)}
        elif self.world.read(wanted) is not None:
            found = {wanted}
        else:
            return
        if lasting:
            self.cache.add_hold(wanted)
        else:
            self.holds.enter_context(self.holder.hold(wanted))
        self.world.held |= found

    def remove(self, chosen: set[str]) -> None:
        there = chosen & self.world.entries.keys()
        self.cache.remove_manifest(*there)
        for name in there:
            del self.world.entries[name]

    def _store(self, made: ImageContent, missing: set[int]) -> None:
        for place, data in enumerate([made.config, *made.layers]):
            if place not in missing:
                self.cache.save_blob(digest_of(data), data)

    def _below(self, index: bytes) -> list[bytes]:
        found = []
        for entry in json.loads(index)["manifests"]:
            document = DOCUMENTS[entry["digest"]]
            found += [document, *(self._below(document) if document in INDEXES else [])]
        return found

    def _point(self, name: str, root: bytes, chosen: set[str] | None) -> None:
        old = self.world.entries.get(name)
        attached = old.attached if old and old.root == root else []
        self.world.entries[name] = Entry(root, chosen, attached)


# The rows that the views should have.

Row = dict[str, Any]


class Expected:
    """The expected rows of each view, computed from the model by brute force."""

    def __init__(self, world: World, cache: Cache, times: dict[str, str], now: datetime) -> None:
        self.world, self.times, self.now = world, times, now
        self.files = files_of(world.directory)
        self.cache_holds = cache.list_holds()
        self.known = {str(image.name): image for image in cache.list_manifests()}
        self.contents = {name: world.contents(name) for name in world.entries}
        self.sets = {name: {part.digest for part in parts} for name, parts in self.contents.items()}
        declared = {part.digest: part.size for parts in self.contents.values() for part in parts}
        self.sizes = {**declared, **self.files}
        self.layers = {part.digest for parts in self.contents.values() for part in parts if part.role == "layer"}
        self.commands: dict[tuple[str, int], tuple[str | None, str | None]] = {
            (name, position): values for name in world.entries for position, values in self._describe_layers(name)
        }

    def _describe_layers(self, name: str) -> Iterator[tuple[int, tuple[str | None, str | None]]]:
        for document, positions in self.world.configs(name):
            diff_ids = document["rootfs"]["diff_ids"]
            commands = [entry["created_by"] for entry in document["history"] if not entry.get("empty_layer")]
            if len(diff_ids) <= len(positions):
                yield from zip(positions, zip(diff_ids, commands, strict=True), strict=False)

    def users(self, digest: str) -> list[str]:
        return [name for name, found in self.sets.items() if digest in found]

    def size(self, found: set[str]) -> int:
        return sum(self.sizes[digest] for digest in found)

    def created_by(self, digest: str) -> str | None:
        commands = [
            command
            for (name, position), (_, command) in self.commands.items()
            if self.contents[name][position].digest == digest and command is not None
        ]
        return min(commands, default=None)

    def stack(self, name: str) -> list[str]:
        """Return the layers of an image, or an empty list if it has layers of several platforms."""
        roles = [part.role for part in self.contents[name]]
        places = [place for place, role in enumerate(roles) if role == "layer"]
        if not places or places != list(range(places[0], places[-1] + 1)):
            return []
        return [self.contents[name][place].digest for place in places]

    def days(self, time: datetime | None) -> float | None:
        return None if time is None else (self.now - time).total_seconds() / 86400

    def usage(self, found: set[str], others: set[str]) -> Row:
        stored, missing = found & self.files.keys(), found - self.files.keys()
        return {
            "size": self.size(found),
            "missing_size": self.size(missing),
            "unique_size": self.size(stored - others),
            "shared_size": self.size(stored & others),
            "freed_size": self.size(stored - others - self.world.held),
        }

    def image_usage(self) -> Iterator[Row]:
        for name, found in self.sets.items():
            documents = [document for document, _ in self.world.configs(name)]

            def common_value(key: str, of: list[Row] = documents) -> str | None:
                values = {document.get(key) for document in of}
                return values.pop() if len(values) == 1 else None

            parsed, image = Name.parse(name), self.known[name]
            others = set().union(*(other for key, other in self.sets.items() if key != name))
            created = common_value("created")
            yield {
                "name": name,
                "repository": parsed.repository,
                "reference": parsed.reference,
                "digest": digest_of(self.world.entries[name].root),
                "media_type": OCI_INDEX if self.world.entries[name].root in INDEXES else OCI_MANIFEST,
                "os": common_value("os"),
                "architecture": common_value("architecture"),
                "variant": common_value("variant"),
                "author": common_value("author"),
                "created": f"{created[:26]}Z" if created else None,
                "created_at": text(image.added_at),
                "last_used_at": text(image.last_used_at),
                "complete": found <= self.files.keys(),
                "blobs": len(found),
                **self.usage(found, others),
                "added_at": text(image.added_at),
                **self.ages(image),
                "pinned": image.pinned,
                "expires_at": text(image.expires_at) if image.expires_at else None,
            }

    def ages(self, image: ImageInfo) -> Row:
        return {
            "built_days": pytest.approx(self.days(image.created), abs=0.01) if image.created else None,
            "added_days": pytest.approx(self.days(image.added_at), abs=0.01),
            "unused_days": pytest.approx(self.days(image.last_used_at), abs=0.01),
        }

    def platforms(self) -> Iterator[Row]:
        for name, parts in self.contents.items():
            stated = {
                entry["digest"]: entry["platform"]
                for part in parts
                if part.role == "index" and (data := self.world.read(part.digest)) is not None
                for entry in json.loads(data)["manifests"]
                if "platform" in entry
            }
            for place, (manifest, config) in enumerate(pairwise(parts)):
                if manifest.role != "manifest" or config.role != "config" or config.media_type not in CONFIG_TYPES:
                    continue
                data = self.world.read(config.digest)
                document = json.loads(data) if data is not None and data.startswith(b"{") else {}
                platform = stated.get(manifest.digest, document)
                if not platform.get("os"):
                    continue
                layers = list(takewhile(lambda part: part.role == "layer", parts[place + 2 :]))
                known = len(document["rootfs"]["diff_ids"]) if document else None
                found = {part.digest for part in [manifest, config, *layers[:known]]}
                yield {
                    "name": name,
                    **{key: platform.get(key) for key in ("os", "architecture", "variant")},
                    "digest": manifest.digest,
                    "size": self.size(found),
                    "complete": found <= self.files.keys(),
                }

    def image_contents(self) -> Iterator[Row]:
        for name, parts in self.contents.items():
            for position, part in enumerate(parts):
                diff_id, created_by = self.commands.get((name, position), (None, None))
                yield {
                    "name": name,
                    "position": position,
                    "role": part.role,
                    "digest": part.digest,
                    "size": self.sizes[part.digest],
                    "stored": part.digest in self.files,
                    "media_type": part.media_type,
                    "diff_id": diff_id,
                    "created_by": created_by,
                }

    def labels(self) -> Iterator[Row]:
        for name in self.sets:
            found = [document["config"].get("Labels", {}).items() for document, _ in self.world.configs(name)]
            for key, value in set.intersection(*map(set, found)) if found else set():
                yield {"name": name, "key": key, "value": value}

    def image_ages(self) -> Iterator[Row]:
        for row in self.image_usage():
            yield {
                **{key: row[key] for key in ("name", "created", "created_at", "last_used_at")},
                **self.ages(self.known[row["name"]]),
            }

    def image_bases(self) -> Iterator[Row]:
        stacks = {name: self.stack(name) for name in self.sets}
        for name, layers in stacks.items():
            bases = {
                other: len(stack)
                for other, stack in stacks.items()
                if 0 < len(stack) < len(layers) and layers[: len(stack)] == stack
            }
            if bases:
                base = max(bases, key=bases.__getitem__)  # of equal bases the oldest, which comes first
                digest = digest_of(self.world.entries[base].root)
                own = {"base": base, "base_digest": digest, "base_layers": bases[base]}
                yield {"name": name, "layers": len(layers), **own}

    def blob_usage(self) -> Iterator[Row]:
        for digest, size in self.sizes.items():
            yield {
                "digest": digest,
                "size": size,
                "stored": digest in self.files,
                "stored_at": self.times.get(digest),
                "images": len(self.users(digest)),
                "held": digest in self.world.held,
            }

    def layers_(self) -> Iterator[Row]:
        for row in self.blob_usage():
            if row["digest"] in self.layers:
                del row["stored_at"], row["held"]
                yield {**row, "created_by": self.created_by(row["digest"])}

    def shared_layers(self) -> Iterator[Row]:
        for row in self.layers_():
            if row["images"] > 1 and row.pop("stored"):
                created_by = row.pop("created_by")
                yield {**row, "saved_size": row["size"] * (row["images"] - 1), "created_by": created_by}

    def common_layers(self) -> Iterator[Row]:
        own = {name: {part.digest for part in parts if part.role == "layer"} for name, parts in self.contents.items()}
        for name, layers in own.items():
            for other in own.keys() - {name}:
                for digest in layers & own[other]:
                    size, stored = self.sizes[digest], digest in self.files
                    yield {"name": name, "other": other, "digest": digest, "size": size, "stored": stored}

    def repository_usage(self) -> Iterator[Row]:
        of = {name: Name.parse(name).repository for name in self.sets}
        for repository in set(of.values()):
            found = set().union(*(self.sets[name] for name in of if of[name] == repository))
            others = set().union(*(self.sets[name] for name in of if of[name] != repository))
            count = sum(each == repository for each in of.values())
            yield {"repository": repository, "images": count, "blobs": len(found), **self.usage(found, others)}

    def missing_blobs(self) -> Iterator[Row]:
        for row in self.image_contents():
            if not row["stored"]:
                yield {key: row[key] for key in ("name", "position", "role", "digest", "size")}

    def garbage(self) -> Iterator[Row]:
        for row in self.blob_usage():
            if row["stored"] and not row["images"] and not row["held"]:
                yield {key: row[key] for key in ("digest", "size", "stored_at")}

    def lasting_holds(self) -> Iterator[Row]:
        for hold in self.cache_holds:
            yield {
                **{key: getattr(hold, key) for key in ("id", "name", "blobs", "size")},
                "created_at": text(hold.created_at),
                "expires_at": None,
            }

    def growth(self) -> Iterator[Row]:
        blobs = Counter(self.times[digest][:10] for digest in self.files)
        sizes: Counter[str] = Counter()
        for digest, size in self.files.items():
            sizes[self.times[digest][:10]] += size
        added = Counter(text(image.added_at)[:10] for image in self.known.values())
        for day in blobs.keys() | added.keys():
            yield {"day": day, "images": added[day], "blobs": blobs[day], "size": sizes[day]}

    def views(self) -> dict[str, Callable[[], Iterator[Row]]]:
        return {
            "image_usage": self.image_usage,
            "platforms": self.platforms,
            "image_contents": self.image_contents,
            "labels": self.labels,
            "image_ages": self.image_ages,
            "image_bases": self.image_bases,
            "blob_usage": self.blob_usage,
            "layers": self.layers_,
            "shared_layers": self.shared_layers,
            "common_layers": self.common_layers,
            "repository_usage": self.repository_usage,
            "missing_blobs": self.missing_blobs,
            "garbage": self.garbage,
            "holds": self.lasting_holds,
            "growth": self.growth,
        }


def text(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def query_rows(directory: Path, sql: str, *values: object) -> list[Row]:
    """Return the rows of a query as dicts."""
    with closing(sqlite3.connect(f"file:{directory}/index.db?mode=ro", uri=True)) as shell:
        found = shell.execute(sql, values)
        return [dict(zip([column[0] for column in found.description], row, strict=True)) for row in found]


def spread_over_days(directory: Path) -> None:
    """Change the times of blobs and images as if the steps had taken months."""
    with closing(sqlite3.connect(directory / "index.db")) as shell, shell:
        day = "'2026-0' || (1 + {} % 3) || '-0' || (1 + {} % 2) || 'T01:02:03.456789Z'"
        time = day.format("id", "id")
        shell.execute(f"UPDATE blobs SET stored_at = {time} WHERE stored_at IS NOT NULL")
        shell.execute(f"UPDATE images SET added_at = {time}, last_used_at = {day.format('(id + 1)', 'id')}")


def in_order(rows: list[Row]) -> list[Row]:
    """Return the rows sorted by their values, without the ages, which are only approximate."""
    return sorted(rows, key=lambda row: [str(value) for key, value in row.items() if not key.endswith("_days")])


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a folder with an empty cache, in memory if possible."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # there are no power cuts here
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        Cache.open(Path(folder) / "empty").close()
        yield Path(folder)


@pytest.mark.slow
def test_every_view_agrees_with_the_manifests_and_files(place: Path) -> None:
    @settings(max_examples=EXAMPLES, deadline=None)
    @given(STEPS)
    def compare_after_steps(steps: list[tuple[Any, ...]]) -> None:
        directory = Path(tempfile.mkdtemp(dir=place)) / "cache"
        shutil.copytree(place / "empty", directory)
        world = World(directory)
        with Cache.open(directory) as holder, ExitStack() as holds:
            with Cache.open(directory) as cache:
                builder = Builder(world, cache, holder, holds)
                for action, *arguments in steps:
                    getattr(builder, action)(*arguments)
            spread_over_days(directory)
            compare(world, holder)
        shutil.rmtree(directory.parent)

    compare_after_steps()


OUTDATED = report.load_report("outdated-bases").query
NAMES_OF_BASES = ", ".join(
    f"(SELECT u.name FROM images AS i JOIN image_usage AS u USING (repository, reference) WHERE i.id = s.{of}) AS {key}"
    for of, key in (("image_id", "name"), ("base_id", "base"))
) + " FROM bases AS s"  # fmt: skip


def bases_in_report(directory: Path) -> list[Row]:
    """Return the bases that the report outdated-bases computes without the view."""
    return in_order(query_rows(directory, f"{OUTDATED.partition(', newest AS')[0]} SELECT {NAMES_OF_BASES}"))


def test_a_base_needs_equal_lower_layers_and_an_image_of_one_platform(place: Path) -> None:
    with Cache.open(place / "empty") as cache:
        for number, image in enumerate([make.image(1, 2), make.image(3, 2, 4), make.image(1, 2, 4), make.image(1)]):
            cache.save_manifest(f"a:{number}", image.manifest)
        for number in (1, 9):
            cache.save_blob(digest_of(IMAGES[number].manifest), IMAGES[number].manifest)
        cache.save_manifest("several:1", index_of(IMAGES[1].manifest, IMAGES[9].manifest))
    found = bases_in_report(place / "empty")
    assert [(row["name"], row["base"]) for row in found] == [("a:0", "a:3"), ("a:2", "a:0")]
    assert found == in_order(query_rows(place / "empty", "SELECT name, base FROM image_bases"))


def compare(world: World, cache: Cache) -> None:
    """Compare every view with the expected rows, and the freed sizes with dry runs of the cache."""
    directory = world.directory
    times = {row["digest"]: row["stored_at"] for row in query_rows(directory, "SELECT digest, stored_at FROM blobs")}
    expected = Expected(world, cache, times, datetime.now(UTC))
    # Add the blobs that the model does not know: unreferenced ones, and those of images that were removed.
    for row in query_rows(directory, "SELECT digest, size FROM blobs"):
        expected.sizes.setdefault(row["digest"], row["size"])
    for view, rows in expected.views().items():
        found = query_rows(directory, f"SELECT * FROM {view}")
        wanted = list(rows())
        assert in_order(found) == in_order(wanted), view
        assert all(list(row) == list(found[0]) for row in wanted[:1] if found), view
    # The report outdated-bases computes the same bases without the view.
    assert bases_in_report(directory) == in_order(
        [{key: row[key] for key in ("name", "base")} for row in expected.image_bases()]
    )
    for name in world.entries:
        (row,) = query_rows(directory, "SELECT freed_size FROM image_usage WHERE name = ?", name)
        assert row["freed_size"] == cache.remove_manifest(name, dry_run=True).bytes
    for repository in {Name.parse(name).repository for name in world.entries}:
        (row,) = query_rows(directory, "SELECT freed_size FROM repository_usage WHERE repository = ?", repository)
        of = [name for name in world.entries if Name.parse(name).repository == repository]
        assert row["freed_size"] == cache.remove_manifest(*of, dry_run=True).bytes
    (row,) = query_rows(directory, "SELECT count(*) AS blobs, coalesce(sum(size), 0) AS bytes FROM garbage")
    assert tuple(row.values()) == cache.collect_garbage(dry_run=True)


# The reference.

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "sql.md").read_text()
REFERENCE = PAGE.partition("\n## Views\n")[2].partition("\n## ")[0]


def test_the_reference_describes_the_views_and_their_columns_as_their_comments_do(cache: Cache) -> None:
    parts = re.split(r"^\*\*`(\w+)`\*\*", REFERENCE, flags=re.MULTILINE)[1:]
    described = {
        view: re.findall(r"^\| `(\w+)` \| (\w+) \| (\S.*) \|$", text, re.MULTILINE)
        for view, text in zip(parts[::2], parts[1::2], strict=True)
    }
    views = {
        view.name: [(column.name, column.type.lower(), column.description) for column in view.columns]
        for view in cache.list_views()
    }
    with closing(sqlite3.connect(cache.directory / "index.db")) as shell:
        made = [name for (name,) in shell.execute("SELECT name FROM sqlite_master WHERE type = 'view' ORDER BY rowid")]
    assert list(described) == made
    assert described == views
    assert REFERENCE.count("\n| ") == sum(map(len, views.values())) + 2 * len(views)


def test_the_example_queries_of_the_reference_run(cache: Cache) -> None:
    (queries,) = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)
    statements = queries.strip().split(";\n\n")
    assert len(statements) == 8
    cache.save_manifest("debian:12", IMAGES[0].manifest)
    cache.save_manifest("app:1", IMAGES[1].manifest)
    found = [query_rows(cache.directory, statement.rstrip(";")) for statement in statements]
    assert [len(rows) for rows in found] == [0, 1, 0, 0, 1, 1, 2, 1]


# How the views are computed.

KEY_COLUMNS = {
    "image_usage": "name", "image_contents": "name", "labels": "name", "image_ages": "name", "blob_usage": "digest",
    "layers": "digest", "shared_layers": "digest", "common_layers": "name", "repository_usage": "repository",
    "garbage": "digest", "platforms": "name",
}  # fmt: skip
"""The column by which each view is queried for one thing; the other views always read everything."""


@pytest.fixture
def large(place: Path) -> Iterator[sqlite3.Connection]:
    """Yield a connection to the index of a cache with 300 images."""
    directory = place / "empty"
    with Cache.open(directory) as cache:
        for number in (0, 1, 2, 11):
            cache.save_manifest(f"base:{number}", IMAGES[number].manifest)
    with closing(sqlite3.connect(directory / "index.db")) as shell:
        with shell:
            for number in range(296):
                values = {"new": number + 10, "of": 1 + number % 4, "reference": str(number)}
                shell.execute(
                    "INSERT INTO images (id, repository, reference, manifest_id, media_type, added_at, last_used_at) "
                    "SELECT :new, 'app', :reference, manifest_id, media_type, added_at, last_used_at "
                    "FROM images WHERE id = :of",
                    values,
                )
                shell.execute(
                    "INSERT INTO image_blobs SELECT :new, position, blob_id, role, media_type, diff_id, created_by "
                    "FROM image_blobs WHERE image_id = :of",
                    values,
                )
        assert shell.execute("SELECT count(*) FROM image_usage").fetchone() == (300,)
        yield shell


def scans(shell: sqlite3.Connection, query: str) -> list[str]:
    """Return the full scans in a query's plan, of tables with a row for each blob."""
    (sql,) = shell.execute("SELECT group_concat(sql, ' ') FROM sqlite_master WHERE type = 'view'").fetchone()
    aliases = {"image_blobs", "blobs", *re.findall(r"\b(?:image_blobs|blobs) AS (\w+)", sql)}
    plan = [row[3] for row in shell.execute(f"EXPLAIN QUERY PLAN {query}")]
    return [step for step in plan if step.startswith("SCAN ") and step.split()[1] in aliases]


@pytest.mark.parametrize(("view", "column"), KEY_COLUMNS.items())
def test_a_query_for_one_thing_scans_no_other_blobs(large: sqlite3.Connection, view: str, column: str) -> None:
    assert scans(large, f"SELECT * FROM {view} WHERE {column} = 'x'") == []


def test_a_query_for_the_images_of_a_blob_scans_no_other_blobs(large: sqlite3.Connection) -> None:
    assert scans(large, "SELECT name FROM image_contents WHERE digest = 'x'") == []


def test_bases_are_found_in_one_pass(large: sqlite3.Connection) -> None:
    assert scans(large, "SELECT * FROM image_bases") == ["SCAN image_blobs"]


def test_outdated_bases_are_found_in_one_pass_in_the_order_of_layers(large: sqlite3.Connection) -> None:
    assert scans(large, OUTDATED) == ["SCAN image_blobs"]
    stacks = OUTDATED.partition(", tops AS")[0]
    # The plan has no sort: the scan returns layers in the order of their positions.
    plan = [row[3] for row in large.execute(f"EXPLAIN QUERY PLAN {stacks} SELECT * FROM stacks")]
    assert plan == ["MATERIALIZE stacks", "SCAN image_blobs", "SCAN stacks"]
