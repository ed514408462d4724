"""Make the frozen cache of a release, in a checkout of it: `PYTHONPATH=CHECKOUT python tests/frozen/make.py`.

For each revision of the schema there is a cache that its own release has made, with images of buildah's, skopeo's and
our own. One that has landed is never made again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from cachedb import Cache
from cachedb.index.tables import REVISION
from cachedb.oci.manifests import OCI_CONFIG, OCI_MANIFEST
from tests.support import make
from tests.support.registries import Registry

HERE = Path(__file__).resolve().parent

BUILD = """
set -e
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
container=$(buildah from scratch)
echo one > one; echo two > two
buildah config --author 'A. Author' --label org.opencontainers.image.title=frozen --label empty= --cmd /one $container
buildah copy --add-history $container one /one
buildah commit --timestamp 1750000000 $container first
second=$(buildah from first)
buildah copy --add-history $second two /two
buildah commit --timestamp 1750000001 $second frozen:2
buildah push frozen:2 oci-archive:frozen.tar:frozen:2
skopeo copy oci-archive:frozen.tar docker-archive:frozen.docker.tar:docker:2
buildah rm $container $second
buildah rmi frozen:2 first
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["bash", "-c", BUILD], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        directory = Path(folder) / "cache"
        with Cache.open(directory) as cache:
            cache.cache_from_tar(HERE.parent.parent / "examples" / "hello.oci.tar")
            cache.cache_from_tar(Path(folder) / "frozen.tar")
            cache.cache_from_tar(Path(folder) / "frozen.docker.tar")
            cache.tag("frozen:2", "team/frozen:stable")
            cache.associate_blob_with_image("hello:1", cache.add_blob(b"a signature"), media_type="text/plain")
            children = make.image(1, 2), make.image(1, 3, architecture="arm64", compression="gzip")
            for child in children:
                for digest, data in child.blobs.items():
                    cache.save_blob(digest, data)
            cache.save_manifest("several:1", make.index(*children))
            cache.save_manifest("incomplete:1", make.image(4, 5).manifest)
            broken = {
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "config": make.descriptor(b"{not json", OCI_CONFIG),
                "layers": [],
            }
            cache.add_blob(b"{not json")
            cache.save_manifest("broken:1", json.dumps(broken).encode())
            cache.add_blob(b"nothing refers to this")
            if hasattr(cache, "pull"):
                with Registry() as registry:
                    name = registry.add_index(make.index(*children), "some", "1", children)
                    cache.pull(name, platform="linux/arm64")
                cache.tag(name, "some:1")
                cache.remove_manifest(name)
            if hasattr(cache, "add_hold"):
                cache.add_hold("hello:1")
            if hasattr(cache, "pin"):
                cache.cache_from_tar(Path(folder) / "frozen.docker.tar", ttl=6 * 3600)
                cache.pin("hello:1", "team/frozen:stable")
        with tarfile.open(HERE / f"{REVISION}.tar.xz", "w:xz") as tar:
            for name in ("index.db", "blobs"):
                tar.add(directory / name, name)


if __name__ == "__main__":
    main()
