"""Run a build step: add a layer to a cached image, and export the result as a folder of hard links.

python examples/build_step.py hello:1 FILE hello:2 layout/
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import sys
import tarfile
from pathlib import Path
from typing import Any

from cachedb import Cache, CacheError, InvalidManifest, NotInCache

LAYER_TYPES = {  # media types of a gzip layer, by the media type of the manifest
    "application/vnd.oci.image.manifest.v1+json": "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.docker.distribution.manifest.v2+json": "application/vnd.docker.image.rootfs.diff.tar.gzip",
}
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def build_layer(file: Path) -> bytes:
    """Return an uncompressed layer that holds one file; the same file gives the same bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        content = file.read_bytes()
        member = tarfile.TarInfo(file.name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def read_manifest(cache: Cache, name: str) -> dict[str, Any]:
    """Return an image's manifest; for an index, return the manifest for the host's platform."""
    manifest: dict[str, Any] = json.loads(cache.get_manifest(name))
    if "manifests" in manifest:
        wanted = {"os": "linux", "architecture": ARCHITECTURES.get(platform.machine(), platform.machine())}
        found = [child for child in manifest["manifests"] if wanted.items() <= child.get("platform", {}).items()]
        if not found:
            raise NotInCache(f"{name} has no manifest for {'/'.join(wanted.values())}")
        manifest = json.loads(cache.get_blob(found[0]["digest"]))
    manifest.setdefault("mediaType", "application/vnd.oci.image.manifest.v1+json")  # optional in an OCI manifest
    if manifest["mediaType"] not in LAYER_TYPES:
        raise InvalidManifest(f"{name} is not an image manifest: {manifest['mediaType']!r}")
    return manifest


def add_layer(cache: Cache, base: str, file: Path, target: str) -> None:
    """Save the image ``base`` with one more layer as ``target``."""
    manifest = read_manifest(cache, base)
    blobs = [manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])]
    # The hold raises NotInCache if a blob is missing. It keeps all blobs even if another process removes the base.
    with cache.hold(*blobs):
        config = json.loads(cache.get_blob(manifest["config"]["digest"]))
        diff_ids = config.get("rootfs", {}).get("diff_ids", [])
        if len(diff_ids) != len(manifest["layers"]) or not diff_ids:
            raise InvalidManifest(f"{base} is not a container image: its config does not list its layers")
        layer = build_layer(file)
        diff_ids.append(f"sha256:{hashlib.sha256(layer).hexdigest()}")
        config.setdefault("history", []).append({"created_by": f"add {file.name}"})

        # The cache keeps new blobs from collection until save_manifest.
        config_data, layer_data = json.dumps(config).encode(), gzip.compress(layer, mtime=0)
        manifest["config"].update(digest=cache.add_blob(config_data), size=len(config_data))
        manifest["layers"].append(
            {
                "mediaType": LAYER_TYPES[manifest["mediaType"]],
                "digest": cache.add_blob(layer_data),
                "size": len(layer_data),
            }
        )
        cache.save_manifest(target, json.dumps(manifest).encode())


def main() -> None:
    """Run the step with the arguments of the command line."""
    base, file, target, layout = sys.argv[1:]
    try:
        with Cache.open() as cache:
            add_layer(cache, base, Path(file), target)
            cache.export(target, layout, format="oci-dir", link=True)
    except CacheError as error:
        sys.exit(f"build_step: {error}")


if __name__ == "__main__":
    main()
