"""Time the adoption of an `index.json` cache, against a bare loop that copies the same files, durably, and `cp`.

python benchmarks/adopt_json_cache.py [--images 10000] [--directory DIR]

Each image has a manifest, a config and two layers of its own, and eight layers of 200 that all images share.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cachedb import Cache
from cachedb.oci import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST


def make(directory: Path, images: int) -> None:
    chosen = random.Random(1)
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes, media_type: str) -> dict[str, object]:
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{name}", "size": len(data)}

    shared = [blob(chosen.randbytes(200_000), f"{OCI_LAYER}+gzip") for _ in range(200)]
    index = {}
    for number in range(images):
        own = [blob(chosen.randbytes(chosen.randrange(1_000, 20_000)), f"{OCI_LAYER}+gzip") for _ in range(2)]
        config = blob(json.dumps({"architecture": "amd64", "os": "linux", "number": number}).encode(), OCI_CONFIG)
        layers = [*chosen.sample(shared, 8), *own]
        manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers}
        repository, reference = f"registry.example.org/team-{number % 50}/app-{number // 50}", "1.0"
        path = directory / "manifests" / repository / reference
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(json.dumps(manifest).encode())
        index[f"{repository}/{reference}"] = {
            "repository": repository,
            "reference": reference,
            "manifest_path": f".cache/manifests/{repository}/{reference}",
            "config_digest": config["digest"],
            "blobs": {
                item["digest"]: {
                    "digest": item["digest"],
                    "size": item["size"],
                    "path": f".cache/blobs/sha256/{str(item['digest']).partition(':')[2]}",
                    "is_config": item is config,
                    "compressed": item is not config,
                    "media_type": "",
                }
                for item in (config, *layers)
            },
        }
    (directory / "index.json").write_text(json.dumps(index))


def loop(source: Path, target: Path) -> None:
    """Read, hash, write, fsync and rename each file, one after the other."""
    target.mkdir()
    for folder, _, names in os.walk(source):
        for name in names:
            data = Path(folder, name).read_bytes()
            new = target / hashlib.sha256(data).hexdigest()
            with new.with_suffix(".half").open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            new.with_suffix(".half").rename(new)


def adopt(source: Path, target: Path, how: str) -> None:
    with Cache.open(target) as cache:
        found = cache.adopt(source, how=how)
        assert not found.left_out, found.left_out[:3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        top = Path(folder)
        old = top / ".cache"
        make(old, options.images)
        files = [path.stat().st_size for path in old.rglob("*") if path.is_file()]
        print(f"{options.images} images, {len(files)} files, {sum(files) / 1e6:.0f} MB")
        os.sync()

        def copy() -> None:
            subprocess.run(["cp", "-r", str(old), str(top / "cp")], check=True)
            subprocess.run(["sync", "-f", str(top)], check=True)

        works: list[tuple[str, Callable[[], None]]] = [
            ("hash, write, fsync and rename, a bare loop", lambda: loop(old, top / "loop")),
            ("cp -r, and sync", copy),
            ("cachedb adopt", lambda: adopt(old, top / "copied", "copy")),
            ("cachedb adopt, again", lambda: adopt(old, top / "copied", "copy")),
            ("cachedb adopt --link", lambda: adopt(old, top / "linked", "link")),
            ("cachedb adopt --move", lambda: adopt(old, top / "moved", "move")),
        ]
        print("| work | seconds | images a second | ratio to the loop |\n| --- | --- | --- | --- |")
        first = 0.0
        for what, work in works:
            began = time.perf_counter()
            work()
            taken = time.perf_counter() - began
            first = first or taken
            print(f"| {what} | {taken:.1f} | {options.images / taken:.0f} | {taken / first:.2f} |", flush=True)
        shutil.rmtree(top / "loop")
        print(f"memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB at most")


if __name__ == "__main__":
    main()
