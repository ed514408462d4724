"""A step of a build: take an image from the cache, put a layer on it, hand the result on without copying a byte.

python examples/build_step.py hello:1 FILE hello:2 layout/
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

from cachedb import Cache


def layer_with(file: Path) -> bytes:
    """Return an uncompressed layer that holds one file; the same file gives the same bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo(file.name)
        member.size = file.stat().st_size
        with file.open("rb") as content:
            tar.addfile(member, content)
    return buffer.getvalue()


def add_layer(cache: Cache, base: str, file: Path, target: str) -> None:
    """Save ``target``: the image ``base`` with one more layer."""
    layer = layer_with(file)
    manifest = json.loads(cache.get_manifest(base))
    config = json.loads(cache.get_blob(manifest["config"]["digest"]))

    # What is stored is kept from collection until the manifest that needs it is saved.
    compressed = gzip.compress(layer, mtime=0)
    config["rootfs"]["diff_ids"].append(f"sha256:{hashlib.sha256(layer).hexdigest()}")
    config.setdefault("history", []).append({"created_by": f"add {file.name}"})
    config_bytes = json.dumps(config).encode()
    manifest["config"].update(digest=cache.add_blob(config_bytes), size=len(config_bytes))
    manifest["layers"].append(
        {
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": cache.add_blob(compressed),
            "size": len(compressed),
        }
    )
    cache.save_manifest(target, json.dumps(manifest).encode())


def main() -> None:
    """Run the step with the command line's arguments."""
    base, file, target, layout = sys.argv[1:]
    with Cache.open() as cache:
        add_layer(cache, base, Path(file), target)
        cache.export(target, layout, format="oci-dir", link=True)


if __name__ == "__main__":
    main()
