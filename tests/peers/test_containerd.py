"""Archives and containerd: `ctr images import` and `ctr images export` keep the digests that cachedb has."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cachedb import Cache
from cachedb.transports.archive.formats import Format
from tests.conftest import find_peer
from tests.peers.test_archives import list_parts
from tests.support import make
from tests.support.make import digest_of

AMD = make.image(1, 2, compression="gzip")
ARM = make.image(1, 3, compression="gzip", architecture="arm64")
MULTI = make.index(AMD, ARM)
NAME = "registry.example/team/app:1"

Ctr = Callable[..., str]

CONFIG = """
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = "{folder}/grpc"
uid = {user}
gid = {group}
[ttrpc]
address = "{folder}/ttrpc"
uid = {user}
gid = {group}
"""
"""containerd's own files and sockets, without what writes elsewhere."""


@pytest.fixture(scope="module")
def socket() -> Iterator[str]:
    """Run containerd, which nothing else uses, and yield the path of its socket."""
    programs = find_peer("containerd"), find_peer("ctr", "apt-get install containerd")
    with tempfile.TemporaryDirectory() as folder:  # a socket's path has at most 107 bytes
        config, log, path = Path(folder, "config.toml"), Path(folder, "log"), f"{folder}/grpc"
        config.write_text(CONFIG.format(folder=folder, user=os.geteuid(), group=os.getegid()))
        command = [programs[0], "--config", str(config)]
        with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
            try:
                end = time.monotonic() + 30
                while _run([programs[1], "--address", path, "version"]).returncode:
                    assert process.poll() is None, log.read_text()
                    assert time.monotonic() < end, log.read_text()
                    time.sleep(0.05)
                yield path
            finally:
                process.terminate()
                process.wait(timeout=30)


@pytest.fixture
def ctr(socket: str, tmp_path: Path) -> Ctr:
    """Return a runner of `ctr` in a namespace of the test, which is empty."""

    def run(*arguments: object) -> str:
        namespace = f"test-{make.hex_of(bytes(tmp_path))[:8]}"
        done = _run([find_peer("ctr"), "--address", socket, "--namespace", namespace, *map(str, arguments)])
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def list_images(ctr: Ctr) -> dict[str, str]:
    """Return the digest of each image in containerd, by name."""
    return {(words := line.split())[0]: words[2] for line in ctr("images", "ls").splitlines()[1:]}


def list_content(ctr: Ctr) -> set[str]:
    """Return the digests of all blobs in containerd."""
    return set(ctr("content", "ls", "--quiet").split())


def export(cache: Cache, tmp_path: Path, form: Format, **options: Any) -> Path:
    target = tmp_path / f"{form}.tar"
    cache.export(NAME, target, format=form, **options)
    return target


@pytest.mark.parametrize("form", ["docker", "oci-archive"])
def test_containerd_imports_an_exported_index_with_its_digests(
    cache: Cache, ctr: Ctr, tmp_path: Path, form: Format
) -> None:
    make.save_index(cache, NAME, AMD, ARM)
    ctr("images", "import", "--no-unpack", "--all-platforms", export(cache, tmp_path, form))
    assert list_images(ctr) == {NAME: digest_of(MULTI)}
    assert list_content(ctr) >= {digest_of(MULTI), *AMD.blobs, *ARM.blobs}
    assert "complete" in ctr("images", "check")


def test_containerd_imports_the_config_and_layers_of_an_exported_docker_archive(
    cache: Cache, ctr: Ctr, tmp_path: Path
) -> None:
    make.save(cache, NAME, AMD)
    ctr("images", "import", "--no-unpack", export(cache, tmp_path, "docker-archive"))
    ((name, digest),) = list_images(ctr).items()
    assert name == NAME
    config, layers = list_parts(ctr("content", "get", digest))
    assert (config, layers) == (digest_of(AMD.config), [*map(digest_of, AMD.layers)])


def test_containerd_imports_the_image_of_an_export_with_referrers(cache: Cache, ctr: Ctr, tmp_path: Path) -> None:
    make.save(cache, NAME, AMD)
    make.attach(cache, NAME, make.artifact("text/sbom", subject=AMD.manifest))
    ctr("images", "import", "--no-unpack", export(cache, tmp_path, "docker", referrers=True))
    assert list_images(ctr) == {NAME: AMD.digest}


def test_an_index_that_containerd_exported_is_imported_with_its_digests(
    cache: Cache, fresh: Cache, ctr: Ctr, tmp_path: Path
) -> None:
    make.save_index(cache, NAME, AMD, ARM)
    ctr("images", "import", "--no-unpack", "--all-platforms", export(cache, tmp_path, "docker"))
    ctr("images", "export", "--all-platforms", tmp_path / "theirs.tar", NAME)
    (image,) = fresh.cache_from_tar(tmp_path / "theirs.tar")
    assert (str(image.name), image.digest) == (NAME, digest_of(MULTI))
    assert {blob.digest for blob in fresh.get_image_blobs(NAME)} == {digest_of(MULTI), *AMD.blobs, *ARM.blobs}


def test_a_partial_index_that_containerd_exported_is_imported_with_its_digest(
    cache: Cache, fresh: Cache, ctr: Ctr, tmp_path: Path
) -> None:
    make.save_index(cache, NAME, AMD, ARM)
    ctr("images", "import", "--no-unpack", "--all-platforms", export(cache, tmp_path, "docker"))
    for blob in sorted(ARM.blobs.keys() - AMD.blobs.keys()):  # as if only linux/amd64 had been fetched
        ctr("content", "rm", blob)
    ctr("images", "export", "--platform", "linux/amd64", tmp_path / "theirs.tar", NAME)
    (image,) = fresh.cache_from_tar(tmp_path / "theirs.tar")
    assert (str(image.name), image.digest) == (NAME, digest_of(MULTI))
    assert {child.platform: child.complete for child in fresh.get_platforms(NAME)} == {
        "linux/amd64": True,
        "linux/arm64": False,
    }
