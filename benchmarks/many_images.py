"""Add, remove, list, look up, sweep and collect in caches of many images, at several sizes.

The benchmark writes rows and files without cachedb, which is faster. Each file has only a few bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

from benchmarks.machine import are_installed
from benchmarks.measure import (
    Calls,
    Cost,
    Work,
    add_costs,
    cachedb,
    delete_paths,
    measure_cost,
    measure_seconds,
    print_calls,
    print_note,
    print_table,
    print_works,
    run,
    run_in_child,
    subtract_time,
    take_turns,
)
from benchmarks.plan import Plan

BLOBS = 10  # of an image: its manifest, config and eight layers, none of them shared
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
TIME = "2026-01-31T23:59:59.123456Z"
TAGGED = "team/app-1:0"  # the image that the writer tags
WRITER = """
# Tags an image in a loop until stdin is closed, and prints the start and the duration of each call.
import json, select, sys, time
from cachedb import Cache
with Cache.open(sys.argv[1]) as cache:
    cache.tag(sys.argv[2], "writer/beside:1")
    print("ready", flush=True)
    waits, number = [], 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        number += 1
        began = time.monotonic()
        cache.tag(sys.argv[2], f"writer/beside:{number % 10}")
        waits.append((began, time.monotonic() - began))
print(json.dumps(waits))
"""


def list_sizes(plan: Plan) -> list[int]:
    """Return the numbers of images of the caches."""
    return sorted({min(100, plan.images), plan.images} | ({plan.images // 10} if plan.images >= 20_000 else set()))


def get_cache(plan: Plan, count: int) -> Path:
    """Return a cache of ``count`` images; the first call makes it."""
    directory = plan.place / f"cache-{count}"
    if not directory.exists():
        print_note(f"  writing a cache of {count} images, {count * BLOBS} blobs")
        run_in_child(write_cache, directory, count)
    return directory


def name_of(number: int) -> tuple[str, str]:
    """Return the repository and the tag of an image by its number; the first is 0."""
    return f"team/app-{number % 1000}", str(number // 1000)


def _content(blob: int) -> bytes:
    return b"blob %d" % blob


def _digest(blob: int) -> str:
    return f"sha256:{hashlib.sha256(_content(blob)).hexdigest()}"


def write_cache(directory: Path, count: int) -> None:
    from cachedb import Cache

    with Cache.open(directory):
        pass
    _write_files(directory, range(1, count * BLOBS + 1))
    shell = sqlite3.connect(directory / "index.db")
    numbers = range(count)
    with shell:
        shell.executemany(
            "INSERT INTO blobs (id, digest, size, stored_at) VALUES (?, ?, ?, ?)",
            ((blob, _digest(blob), len(_content(blob)), TIME) for blob in range(1, count * BLOBS + 1)),
        )
        shell.executemany(
            "INSERT INTO images (id, repository, reference, manifest_id, media_type, added_at, last_used_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            ((number + 1, *name_of(number), number * BLOBS + 1, MANIFEST, TIME, TIME) for number in numbers),
        )
        kinds = [("manifest", MANIFEST), ("config", CONFIG), *[("layer", LAYER)] * (BLOBS - 2)]
        shell.executemany(
            "INSERT INTO image_blobs (image_id, position, blob_id, role, media_type) VALUES (?, ?, ?, ?, ?)",
            (
                (number + 1, position, number * BLOBS + 1 + position, *kind)
                for number in numbers
                for position, kind in enumerate(kinds)
            ),
        )
    shell.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shell.close()
    os.sync()


def _write_files(directory: Path, blobs: range) -> None:
    folder = os.open(directory / "blobs" / "sha256", os.O_DIRECTORY)
    for blob in blobs:
        file = os.open(_digest(blob)[7:], os.O_WRONLY | os.O_CREAT, 0o444, dir_fd=folder)
        os.write(file, _content(blob))
        os.close(file)
        if blob % 100_000 == 0:
            print_note(f"    {blob} files")
    os.close(folder)


# Add and remove.


def measure_changes(plan: Plan) -> None:
    """Add and remove images of 12 blobs one by one, with cachedb, a JSON cache and umoci."""
    turns = 1 if plan.quick else 4
    ours: dict[tuple[str, int], Calls] = {}
    for turn in range(turns):
        print_note(f"  turn {turn + 1} of {turns}")
        for count in list_sizes(plan):
            for one in run_in_child(_add_and_remove, get_cache(plan, count), plan.operations // turns):
                if (one.what, count) in ours:
                    ours[one.what, count].extend(one)
                else:
                    ours[one.what, count] = one
    calls = [run_in_child(_commit_rows, plan.folder("commits"), plan.operations)]
    for (what, count), one in ours.items():
        if what == "remove":
            one.wants = (0.005, 0.02)
        one.ratio = f"{one.median / ours[what, list_sizes(plan)[0]].median:.2f} times the smallest cache (want ≤ 2)"
        one.what = f"{what}, {count} images"
        calls.append(one)
    for count in list_sizes(plan):
        if count > 10_000:
            continue
        peers = run_in_child(_use_json_cache, plan.folder("json"), count)
        if are_installed("umoci"):
            peers.append(_use_umoci(plan.folder("umoci"), count))
        for peer in peers:
            peer.ratio = f"{peer.median / ours[peer.what, count].median:.1f} times cachedb"
            peer.what = f"{peer.what}, {count} images"
        calls += peers
    print_calls(calls)


def _commit_rows(directory: Path, count: int) -> Calls:
    """Commit one row at a time; no change of an SQLite index can be faster."""
    shell = sqlite3.connect(directory / "bare.db", isolation_level=None)
    shell.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; CREATE TABLE rows (number INTEGER)")
    insert = "INSERT INTO rows VALUES (?)"
    return _time_calls(
        "one row, one commit", "bare sqlite3", (partial(shell.execute, insert, (n,)) for n in range(count))
    )


def _make_image(number: int) -> tuple[bytes, list[bytes]]:
    """Return a manifest, and its config and ten layers."""
    layers = [b"layer %d of %d" % (layer, number) for layer in range(10)]
    diff_ids = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
    rootfs = {"type": "layers", "diff_ids": diff_ids}
    config = {"architecture": "amd64", "os": "linux", "author": f"author {number}", "rootfs": rootfs}
    blobs = [json.dumps(config).encode(), *layers]

    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": _describe(blobs[0], CONFIG),
        "layers": [_describe(data, LAYER) for data in blobs[1:]],
    }
    return json.dumps(manifest).encode(), blobs


def _describe(data: bytes, media_type: str) -> dict[str, object]:
    return {"mediaType": media_type, "digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)}


def _time_calls(what: str, runner: str, actions: Iterable[Callable[[], object]]) -> Calls:
    each: list[float] = []
    total = measure_cost(lambda: each.extend(measure_seconds(action) for action in actions))
    return Calls(what, runner, each, total)


def _add_and_remove(directory: Path, operations: int) -> list[Calls]:
    from cachedb import Cache

    numbers = range(operations)
    images = [_make_image(number) for number in (*numbers, operations)]
    layouts = directory.parent / "layouts"
    for number in numbers:
        _write_layout(layouts / str(number), _make_image(operations + 1 + number))
    with Cache.open(directory) as cache:

        def add(number: int) -> None:
            manifest, blobs = images[number]
            for data in blobs:
                cache.save_blob(hashlib.sha256(data).hexdigest(), data)
            cache.save_manifest(f"new/image:{number}", manifest)

        def import_layout(number: int) -> None:
            cache.cache_from_tar(layouts / str(number), f"new/layout:{number}")

        def remove(number: int) -> None:
            cache.remove_manifest(f"new/image:{number}")

        add(operations)  # the first call of a process compiles the statements
        remove(operations)
        calls = [
            _time_calls("add", "cachedb, blob by blob", (partial(add, number) for number in numbers)),
            _time_calls("add from a layout", "cachedb", (partial(import_layout, number) for number in numbers)),
            _time_calls("remove", "cachedb", (partial(remove, number) for number in numbers)),
        ]
        cache.remove_manifest(*(f"new/layout:{number}" for number in numbers))
    delete_paths(layouts)
    return calls


def _write_layout(path: Path, image: tuple[bytes, list[bytes]]) -> None:
    manifest, blobs = image
    folder = path / "blobs" / "sha256"
    folder.mkdir(parents=True)
    for data in (manifest, *blobs):
        (folder / hashlib.sha256(data).hexdigest()).write_bytes(data)
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [_describe(manifest, MANIFEST)]}))


class JsonCache:
    """A cache with one JSON file as its index, read whole at open and rewritten whole at each change."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._blobs = directory / "blobs"
        self._blobs.mkdir(exist_ok=True)
        self.images: dict[str, dict[str, Any]] = json.loads((directory / "index.json").read_text())

    def _write(self, name: str, data: bytes) -> None:
        new = self._directory / "new"
        new.write_bytes(data)
        new.rename(self._directory / name)

    def _rewrite(self) -> None:
        self._write("index.json", json.dumps(self.images).encode())

    def add(self, name: str, image: tuple[bytes, list[bytes]]) -> None:
        """Add an image: its manifest first, then one blob after the other."""
        manifest, blobs = image
        self.images[name] = json_entry(name, {})
        self._write(f"blobs/{hashlib.sha256(manifest).hexdigest()}", manifest)
        self._rewrite()
        for data in blobs:
            digest = hashlib.sha256(data).hexdigest()
            self._write(f"blobs/{digest}", data)
            self.images[name]["blobs"][f"sha256:{digest}"] = json_blob(f"sha256:{digest}", len(data))
            self._rewrite()

    def remove(self, name: str) -> None:
        """Remove an image, and the blobs that no other image has."""
        gone = self.images.pop(name)["blobs"]
        used = {digest for image in self.images.values() for digest in image["blobs"]}
        self._rewrite()
        for digest in gone.keys() - used:
            (self._blobs / digest[7:]).unlink(missing_ok=True)


def json_entry(name: str, blobs: dict[str, dict[str, object]]) -> dict[str, Any]:
    """Return the entry of an image in a JSON index."""
    repository, reference = name.rsplit(":", 1)
    path = f".cache/manifests/{repository}/{reference}"
    return {
        "repository": repository,
        "reference": reference,
        "manifest_path": path,
        "config_digest": "",
        "blobs": blobs,
    }


def json_blob(digest: str, size: int, is_config: bool = False) -> dict[str, object]:
    """Return the entry of an image's blob in a JSON index."""
    return {
        "digest": digest,
        "size": size,
        "path": f".cache/blobs/sha256/{digest.partition(':')[2]}",
        "is_config": is_config,
        "compressed": not is_config,
        "media_type": "",
    }


def _use_json_cache(directory: Path, count: int) -> list[Calls]:
    index = {}
    for number in range(count):
        name = ":".join(name_of(number))
        blobs = {digest: json_blob(digest, 20) for digest in map(_digest, range(number * 12 + 1, number * 12 + 13))}
        index[name] = json_entry(name, blobs)
    (directory / "index.json").write_text(json.dumps(index))
    cache = JsonCache(directory)
    numbers = range(50 if count <= 100 else 5)  # at larger sizes each call takes long, and few are enough
    add = (partial(cache.add, f"new/image:{number}", _make_image(number)) for number in numbers)
    remove = (partial(cache.remove, f"new/image:{number}") for number in numbers)
    return [_time_calls("add", "a JSON file", add), _time_calls("remove", "a JSON file", remove)]


def _use_umoci(directory: Path, count: int) -> Calls:
    """Remove names of an image from a layout with `umoci rm`, which collects no blob."""
    layout = directory / "layout"
    manifest, blobs = _make_image(0)
    _write_layout(layout, (manifest, blobs))
    named = [
        {**_describe(manifest, MANIFEST), "annotations": {"org.opencontainers.image.ref.name": f"image-{number}"}}
        for number in range(count)
    ]
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": named}))
    costs = [run("umoci", "rm", "--image", f"{layout}:image-{number}") for number in range(10)]
    total = add_costs(costs, sum(one.seconds for one in costs))
    return Calls("remove", "umoci rm, whole process", [one.seconds for one in costs], total)


# Lists and lookups.


def measure_lists(plan: Plan) -> None:
    """Time the commands that list the whole cache, and compare them with an empty cache."""
    works = []
    empty_cache = get_cache(plan, 0)
    for words, want in ((["stats"], 0.1), (["ls", "-q"], 0.5), (["ls"], None), (["df"], None)):
        alone = Work(f"{' '.join(words)}, no images", "cachedb", partial(run, *cachedb("--dir", empty_cache, *words)))
        works.append(alone)
        for count in list_sizes(plan):
            command = cachedb("--dir", get_cache(plan, count), *words)
            beside = [subtract_time(alone, want if count >= 100_000 else None)]
            works.append(Work(f"{' '.join(words)}, {count} images", "cachedb", partial(run, *command), beside=beside))
    print_works(take_turns(works, plan.rounds))


def measure_lookups(plan: Plan) -> None:
    """Time lookups in a loop, and compare them with the same SELECT through bare sqlite3."""
    rows = []
    for count in list_sizes(plan):
        for what, want, ours, bare in run_in_child(_time_lookups, get_cache(plan, count)):
            rows.append(
                [
                    f"{what}, {count} images",
                    f"{ours * 1e6:.1f}",
                    f"{bare * 1e6:.1f}",
                    f"{(ours - bare) * 1e6:.1f} (want ≤ {want})",
                ]
            )
    print_table(["lookup", "cachedb µs", "bare sqlite3 µs", "difference µs"], rows)


def _time_lookups(directory: Path) -> list[tuple[str, int, float, float]]:
    """Return the name of each lookup, its target in µs beyond the bare SELECT, and the seconds of both."""
    from cachedb import Cache

    with Cache.open(directory) as cache:
        count = cache.get_stats().manifest_count
        chosen = random.Random(1)
        digests = [_digest(chosen.randrange(count * BLOBS) + 1) for _ in range(500)]
        names = [name_of(chosen.randrange(count)) for _ in range(200)]
        shell = sqlite3.connect(directory / "index.db", isolation_level=None)

        def has_blob(digest: str) -> object:
            return shell.execute("SELECT 1 FROM blobs WHERE digest = ? AND stored_at IS NOT NULL", (digest,)).fetchone()

        def image_blobs(repository: str, reference: str) -> object:
            query = "SELECT id FROM images WHERE repository = ? AND reference = ?"
            (image,) = shell.execute(query, (repository, reference)).fetchone()
            return shell.execute(
                "SELECT digest, size, role, media_type, position, stored_at, diff_id, created_by "
                "FROM image_blobs JOIN blobs ON blobs.id = blob_id WHERE image_id = ? ORDER BY position",
                (image,),
            ).fetchall()

        pairs: list[tuple[str, int, Callable[[], object], Callable[[], object], int]] = [
            (
                "has_blob",
                30,
                lambda: [cache.has_blob(digest) for digest in digests],
                lambda: [has_blob(digest) for digest in digests],
                len(digests),
            ),
            (
                "get_image_blobs",
                150,
                lambda: [cache.get_image_blobs(":".join(name)) for name in names],
                lambda: [image_blobs(*name) for name in names],
                len(names),
            ),
        ]
        found = []
        for what, want, ours, bare, calls in pairs:
            ours(), bare()  # load the pages into memory for both
            turns = [(measure_seconds(ours), measure_seconds(bare)) for _ in range(15)]
            medians = (statistics.median(times) / calls for times in zip(*turns, strict=True))
            found.append((what, want, *medians))
        shell.close()
        return found


# Sweep and collect.


def sweep(plan: Plan) -> None:
    """Collect in caches without garbage, while a process writes."""
    rows = []
    for count in list_sizes(plan):
        directory = get_cache(plan, count)
        with run_writer(directory) as waits:
            time.sleep(2)
            began = time.monotonic()
            costs = run_in_child(_time_sweeps, directory, plan.rounds)
            ended = time.monotonic()
        before = [wait for moment, wait in waits if moment + wait < began]
        during = [wait for moment, wait in waits if began <= moment + wait and moment <= ended]
        taken = [one.seconds for one in costs]
        rows.append(
            [
                f"{count} images, {count * BLOBS} blobs",
                f"{statistics.median(taken):.3f}{' (want ≤ 0.5)' if count >= 100_000 else ''}",
                f"{min(taken):.3f} to {max(taken):.3f}",
                f"{statistics.median(one.cpu for one in costs):.2f}",
                f"{max(one.peak for one in costs) / 2**20:.0f}",
                format_waits(before),
                f"{format_waits(during)} (want ≤ 100)",
            ]
        )
    columns = ["cache", "sweep, median s", "min to max s", "CPU s", "peak MiB"]
    print_table([*columns, "a writer's wait before: median, longest ms", "and during: median, longest ms"], rows)


def _time_sweeps(directory: Path, rounds: int) -> list[Cost]:
    from cachedb import Cache

    with Cache.open(directory) as cache:
        return [measure_cost(cache.collect_garbage) for _ in range(rounds)]


def format_waits(waits: list[float]) -> str:
    return f"{statistics.median(waits) * 1000:.1f}, {max(waits) * 1000:.1f}" if waits else "none"


@contextmanager
def run_writer(directory: Path) -> Iterator[list[tuple[float, float]]]:
    """Run a process that writes during the block; then list the start and the duration of each write."""
    waits: list[tuple[float, float]] = []
    command = [sys.executable, "-c", WRITER, str(directory), TAGGED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield waits
        finally:
            waits.extend(json.loads(process.communicate()[0]))


def collect(plan: Plan) -> None:
    """Delete half of the images of the largest cache, and collect their blobs, without and with a writer."""
    count = plan.images // 4 * BLOBS
    bare = run_in_child(_unlink_files, plan.folder("unlinked"), count)
    bare_row = [f"unlink of {count} files, a bare loop, the limit", f"{bare.seconds:.2f}"]
    rows = [[*bare_row, f"{500_000 / count * bare.seconds:.1f}", f"{bare.cpu:.2f}", "", "", "", ""]]
    for beside in (False, True):
        directory = get_cache(plan, plan.images)
        # Delete a quarter each time.
        run_in_child(_delete_images, directory, plan.images // 4)
        with ExitStack() as stack:
            waits = stack.enter_context(run_writer(directory)) if beside else []
            began = time.monotonic()
            freed, taken, holds = run_in_child(_time_collection, directory)
            ended = time.monotonic()
        during = [wait for moment, wait in waits if began <= moment + wait and moment <= ended]
        rows.append(
            [
                f"{freed} blobs{', a writer beside' if beside else ''}",
                f"{taken.seconds:.2f}",
                f"{500_000 / freed * taken.seconds:.1f} (want ≤ 15)",
                f"{taken.cpu:.2f}",
                f"{taken.peak / 2**20:.0f}",
                f"{holds[0] * 1000:.1f} (want ≤ 100)",
                f"{holds[1] * 1000:.1f}",
                format_waits(during),
            ]
        )
        print_note(f"  {rows[-1]}")
    columns = ["collect", "s", "s for 500,000", "CPU s", "peak MiB", "longest hold ms", "median hold ms"]
    print_table([*columns, "a writer's wait: median, longest ms"], rows)
    print("A hold is the time for which the process holds the write lock.\n")
    delete_paths(plan.place / f"cache-{plan.images}")  # another section gets a new one


def _unlink_files(directory: Path, count: int) -> Cost:
    (directory / "blobs" / "sha256").mkdir(parents=True)
    _write_files(directory, range(1, count + 1))
    os.sync()
    folder = directory / "blobs" / "sha256"

    def unlink() -> None:
        for name in os.listdir(folder):
            os.unlink(folder / name)

    return measure_cost(unlink)


def _delete_images(directory: Path, count: int) -> None:
    shell = sqlite3.connect(directory / "index.db")
    shell.execute("PRAGMA foreign_keys = ON")
    with shell:
        some = "SELECT id FROM images WHERE repository LIKE 'team/%' ORDER BY id DESC LIMIT ?"
        shell.execute(f"DELETE FROM images WHERE id IN ({some})", (count,))
    shell.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shell.close()


def _time_collection(directory: Path) -> tuple[int, Cost, tuple[float, float]]:
    """Collect; return the freed blobs, the cost, and the longest and the median hold of the write lock."""
    from cachedb import Cache
    from cachedb.disk import locks
    from cachedb.disk.waiting import Wait

    holds: list[float] = []
    held = locks.hold_lock

    @contextmanager
    def timed(path: Path, wait: bool | Wait = True) -> Iterator[FileIO]:
        with held(path, wait) as file:
            began = time.monotonic()
            yield file
            holds.append(time.monotonic() - began)

    locks.hold_lock = timed
    with Cache.open(directory) as cache:
        holds.clear()
        freed = 0

        def collect_all() -> None:
            nonlocal freed
            freed = cache.collect_garbage().blobs

        taken = measure_cost(collect_all)
        return freed, taken, (max(holds), statistics.median(holds))
