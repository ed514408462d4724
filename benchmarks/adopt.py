"""Compare the adoption of an `index.json` cache with `cp`, and with a loop that copies with fsync.

Each image has its own manifest, config and two layers. It also has eight of 200 layers that all images share.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.archives import list_files, measure_size
from benchmarks.many_images import CONFIG, LAYER, MANIFEST, json_blob, json_entry
from benchmarks.measure import Cost, Work, compare_time, measure_cost, print_works, run, run_in_child, take_turns
from benchmarks.plan import Plan
from cachedb.operations.adopt import How


def adopt(plan: Plan) -> None:
    """Adopt once in each way, because it takes long; `adopt --move` is last, as it deletes the source."""
    place, images = plan.folder("adopt"), min(plan.images // 2, 10_000)
    old = place / ".cache"
    run_in_child(_write_json_cache, old, images)
    count = measure_size(old)
    print(f"{images} images, {len(list_files(old))} files, {count / 1e6:.0f} MB.\n")
    bare = Work(
        "the loop", "hash, write, fsync and rename", lambda: run_in_child(_copy_files, old, place / "loop"), count
    )

    def work(what: str, runner: str, action: Callable[[], Cost]) -> Work:
        return Work(what, runner, action, count, [compare_time(bare)])

    copy = ["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', str(old), str(place / "cp")]
    works = [
        bare,
        work("copy", "cp -r, and sync", partial(run, *copy)),
        work("adopt", "cachedb", partial(run_in_child, _adopt, old, place / "copied", "copy")),
        work("adopt, again", "cachedb", partial(run_in_child, _adopt, old, place / "copied", "copy")),
        work("adopt --link", "cachedb", partial(run_in_child, _adopt, old, place / "linked", "link")),
        work("adopt --move", "cachedb", partial(run_in_child, _adopt, old, place / "moved", "move")),
    ]
    print_works(take_turns(works, 1, warm=False))
    shutil.rmtree(place)


def _write_json_cache(directory: Path, images: int) -> None:
    chosen = random.Random(1)
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes, media_type: str) -> dict[str, object]:
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{name}", "size": len(data)}

    shared = [blob(chosen.randbytes(200_000), LAYER) for _ in range(200)]
    index = {}
    for number in range(images):
        own = [blob(chosen.randbytes(chosen.randrange(1_000, 20_000)), LAYER) for _ in range(2)]
        config = blob(json.dumps({"architecture": "amd64", "os": "linux", "number": number}).encode(), CONFIG)
        layers = [*chosen.sample(shared, 8), *own]
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers}
        repository, reference = f"registry.example.org/team-{number % 50}/app-{number // 50}", "1.0"
        path = directory / "manifests" / repository / reference
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(json.dumps(manifest).encode())
        entries = {
            str(item["digest"]): json_blob(str(item["digest"]), _size_of(item), item is config)
            for item in (config, *layers)
        }
        index[f"{repository}/{reference}"] = {
            **json_entry(f"{repository}:{reference}", entries),
            "config_digest": config["digest"],
        }
    (directory / "index.json").write_text(json.dumps(index))


def _size_of(descriptor: dict[str, object]) -> int:
    found = descriptor["size"]
    assert isinstance(found, int)
    return found


def _copy_files(source: Path, target: Path) -> Cost:
    """Read, hash, write, fsync and rename each file, one after the other."""

    def write() -> None:
        for path in list_files(source):
            data = path.read_bytes()
            new = target / hashlib.sha256(data).hexdigest()
            with new.with_suffix(".part").open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            new.with_suffix(".part").rename(new)

    target.mkdir()
    return measure_cost(write)


def _adopt(source: Path, target: Path, how: How) -> Cost:
    from cachedb import Cache

    def adopt_all() -> None:
        with Cache.open(target) as cache:
            found = cache.adopt(source, how=how)
            assert not found.left_out, found.left_out[:3]

    return measure_cost(adopt_all)
