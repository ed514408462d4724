"""Write a thousand blobs of 64 KiB with cachedb, with other stores, and with a bare loop."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from benchmarks.archives import SKOPEO, import_image, list_files
from benchmarks.machine import are_installed
from benchmarks.measure import (
    Cost,
    Work,
    compare_with_limit,
    delete_paths,
    measure_cost,
    print_works,
    run,
    run_in_child,
    take_turns,
)
from benchmarks.plan import Plan

BLOB_BYTES = 64 * 1024
LAYER = "application/vnd.oci.image.layer.v1.tar"


def stores(plan: Plan) -> None:
    """Write the blobs of one image into each store."""
    count = 200 if plan.quick else 1_000
    place = plan.folder("stores")
    layout, store = place / "layout", place / "store"
    write_layout(layout, count)
    total = count * BLOB_BYTES

    def work(what: str, runner: str, function: Callable[[Path, Path], Cost], *limits: Work) -> Work:
        beside = [compare_with_limit(*limits, want=0.8)] if limits else []
        return Work(
            what, runner, lambda: run_in_child(function, layout, store), total, beside, lambda: delete_paths(store)
        )

    bare = work("write, fsync, rename", "a bare loop, the limit", _write_each)
    works = [
        bare,
        work("all written, then synced", "a bare loop", _write_in_batches),
        Work(
            "import of the layout",
            "cachedb, open process",
            lambda: run_in_child(import_image, store, layout),
            total,
            [compare_with_limit(bare, want=0.8)],
            lambda: delete_paths(store),
        ),
        work("save_blob, one by one", "cachedb, open process", _save_each, bare),
    ]
    if are_installed("skopeo"):
        copy = [*SKOPEO, f"oci:{layout}:small", f"dir:{store}"]
        works.append(Work("copy to dir:", "skopeo", lambda: run(*copy), total, before=lambda: delete_paths(store)))
    if importlib.util.find_spec("disk_objectstore"):
        works.append(work("loose objects", "disk-objectstore", _loose_objects))
        works.append(work("one pack", "disk-objectstore", _packed_objects))
    if importlib.util.find_spec("diskcache"):
        works.append(work("set, one by one (no fsync)", "diskcache", _disk_cache))
    print_works(take_turns(works, plan.rounds))


def write_layout(path: Path, count: int) -> None:
    """Write an image layout with one image of ``count`` small layers."""
    chosen = random.Random(count)
    blobs = path / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes, media_type: str) -> dict[str, object]:
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{name}", "size": len(data)}

    layers = [blob(chosen.randbytes(BLOB_BYTES), LAYER) for _ in range(count)]
    rootfs = {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]}
    config = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs}
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": layers,
    }
    described = blob(json.dumps(manifest).encode(), str(manifest["mediaType"]))
    described["annotations"] = {"org.opencontainers.image.ref.name": "small"}
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [described]}))
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def _read_contents(layout: Path) -> list[tuple[str, bytes]]:
    return [(path.name, path.read_bytes()) for path in list_files(layout / "blobs")]


def _write_each(layout: Path, store: Path) -> Cost:
    contents = _read_contents(layout)

    def write() -> None:
        for name, data in contents:
            with (store / "new").open("wb", buffering=0) as file:
                file.write(data)
                os.fsync(file.fileno())
            (store / "new").rename(store / name)

    store.mkdir()
    return measure_cost(write)


def _write_in_batches(layout: Path, store: Path) -> Cost:
    contents = _read_contents(layout)

    def write() -> None:
        opened = []
        for name, data in contents:
            descriptor = os.open(store / f"{name}.new", os.O_WRONLY | os.O_CREAT)
            os.write(descriptor, data)
            opened.append(descriptor)
        for descriptor in opened:
            os.fsync(descriptor)
            os.close(descriptor)
        for name, _ in contents:
            (store / f"{name}.new").rename(store / name)

    store.mkdir()
    return measure_cost(write)


def _save_each(layout: Path, store: Path) -> Cost:
    from cachedb import Cache

    contents = _read_contents(layout)
    with Cache.open(store) as cache:
        return measure_cost(lambda: [cache.save_blob(name, data) for name, data in contents])


def _loose_objects(layout: Path, store: Path) -> Cost:
    contents = _read_contents(layout)
    container = importlib.import_module("disk_objectstore").Container(store)
    container.init_container(hash_type="sha256")
    try:
        return measure_cost(lambda: [container.add_streamed_object(io.BytesIO(data)) for _, data in contents])
    finally:
        container.close()


def _packed_objects(layout: Path, store: Path) -> Cost:
    contents = [data for _, data in _read_contents(layout)]
    container = importlib.import_module("disk_objectstore").Container(store)
    container.init_container(hash_type="sha256")
    try:
        return measure_cost(lambda: container.add_objects_to_pack(contents))
    finally:
        container.close()


def _disk_cache(layout: Path, store: Path) -> Cost:
    contents = _read_contents(layout)
    with importlib.import_module("diskcache").Cache(str(store), size_limit=2**40) as cache:
        return measure_cost(lambda: [cache.set(name, data) for name, data in contents])
