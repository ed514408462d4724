"""Pull more than fits: `python -m tests.attacks.pulls --directory DIR`.

Several processes pull images from a registry that generates their layers. The cache has a limit below the sum of all
images. No pull may fail, a held image must stay whole, and the cache may exceed its limit only by what is in flight.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cachedb import Cache, CacheError
from cachedb.oci.manifests import OCI_LAYER, OCI_MANIFEST
from tests.support import make

BLOCK = 1024 * 1024  # bytes of a layer that are generated at a time
BASES = 4  # layers that images share
POLL_SECONDS = 0.02  # between two measurements of the cache


# The registry


def generate(kind: str, number: int, size: int) -> Iterator[bytes]:
    """Yield the bytes of a layer: a name, then zeros."""
    head = f"{kind} {number} ".encode()
    yield head
    block = bytes(BLOCK)
    for start in range(len(head), size, BLOCK):
        yield block[: min(BLOCK, size - start)]


@cache
def compute_digest(kind: str, number: int, size: int) -> str:
    hasher = hashlib.sha256()
    for chunk in generate(kind, number, size):
        hasher.update(chunk)
    return f"sha256:{hasher.hexdigest()}"


LAYERS: dict[str, tuple[str, int, int]] = {}
"""The arguments of `generate` by digest."""
DOCUMENTS: dict[str, bytes] = {}
"""Manifests and configs by digest."""


@cache
def build(number: int, size: int) -> str:
    """Return the digest of an image's manifest; a quarter of its bytes is a layer that other images share."""
    parts = [("base", number % BASES, size // 4), ("own", number, size - size // 4)]
    digests = [compute_digest(*part) for part in parts]
    LAYERS.update(zip(digests, parts, strict=True))
    config = json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": digests}})
    layers = [
        {"mediaType": OCI_LAYER, "digest": digest, "size": part[2]} for digest, part in zip(digests, parts, strict=True)
    ]
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": make.descriptor(config.encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": layers,
    }
    data = json.dumps(manifest).encode()
    for document in (config.encode(), data):
        DOCUMENTS[make.digest_of(document)] = document
    return make.digest_of(data)


class Handler(BaseHTTPRequestHandler):
    """Answer GET and HEAD for images whose tags are ``NUMBER-SIZE``."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        kind, _, reference = self.path.partition("?")[0].rpartition("/")
        if self.path == "/v2/":
            self._answer(2, {}, iter([b"{}"]))
        elif kind.endswith("/manifests"):
            digest = reference if ":" in reference else build(*map(int, reference.split("-")))
            data = DOCUMENTS[digest]
            headers = {"Content-Type": OCI_MANIFEST, "Docker-Content-Digest": digest}
            self._answer(len(data), headers, iter([data]))
        elif reference in LAYERS:
            self._answer(LAYERS[reference][2], {}, generate(*LAYERS[reference]))
        else:
            data = DOCUMENTS[reference]
            self._answer(len(data), {}, iter([data]))

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, size: int, headers: dict[str, str], chunks: Iterator[bytes]) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(size), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            for chunk in chunks:
                self.wfile.write(chunk)

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""


def serve() -> None:
    """Print the port, and answer until stdin ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


# The processes that pull


class Warnings(logging.Handler):
    """Print the warnings of a process, except that it waits for another one."""

    def emit(self, record: logging.LogRecord) -> None:
        if not hasattr(record, "wait"):
            print(f"warning: {record.getMessage()}", flush=True)


def work(directory: str, names: list[str]) -> None:
    """Pull images, and print a line for each failure."""
    logging.getLogger("cachedb").addHandler(Warnings(logging.WARNING))
    with Cache.open(directory) as opened:
        for name in names:
            try:
                opened.pull(name)
            except CacheError as error:
                print(f"{name}: {type(error).__name__}: {error}", flush=True)


# The attack


def measure(directory: Path, *, with_index: bool = True) -> int:
    """Return the bytes of the files of a cache, each counted once: a blob that is being stored has several names."""
    sizes = dict[int, int]()
    for folder, _, names in os.walk(directory):
        for name in names:
            if with_index or not name.startswith("index.db"):
                with suppress(FileNotFoundError):
                    found = os.lstat(f"{folder}/{name}")
                    sizes[found.st_ino] = found.st_size
    return sum(sizes.values())


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.attacks.pulls", *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def attack(directory: Path, processes: int, images: int, size: int, max_size: int, used_within: str) -> list[str]:
    """Pull all images, print the figures, and return what went wrong."""
    wrong, peak, peak_used, least_free = list[str](), 0, 0, 1 << 62
    with start("--serve") as registry:
        assert registry.stdout is not None
        host = f"127.0.0.1:{int(registry.stdout.readline())}"
        names = [f"{host}/app:{number}-{size}" for number in range(images + 1)]
        held = names.pop()
        with Cache.open(directory) as opened:
            opened.set_policy(f'[limits]\nmax-size = "{max_size}B"\n[[keep]]\nused-within = "{used_within}"\n')
            opened.pull(held)
            opened.add_hold(held)
        begin = time.monotonic()
        workers = [start("--directory", directory, "--work", *names[first::processes]) for first in range(processes)]
        before = os.statvfs(directory)
        while any(worker.poll() is None for worker in workers):
            found = os.statvfs(directory)
            # Without the index: its WAL grows by some megabytes while a pull is in flight.
            peak = max(peak, measure(directory, with_index=False))
            peak_used = max(peak_used, (before.f_bfree - found.f_bfree) * found.f_frsize)
            least_free = min(least_free, found.f_bavail * found.f_frsize)
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - begin
        for worker in workers:
            assert worker.stdout is not None
            wrong += worker.stdout.read().splitlines()
            if worker.returncode:
                wrong.append(f"a process exited with {worker.returncode}")
        registry.kill()
    in_flight = processes * size
    if peak > max_size + in_flight:
        wrong.append(f"the peak of {peak} bytes is above the limit and the {in_flight} bytes in flight")
    with Cache.open(directory) as opened:
        end_size = measure(directory)
        if end_size > max_size:
            wrong.append(f"{end_size} bytes are left, above the limit")
        if not opened.is_image_complete(held):
            wrong.append("the held image is not whole")
        wrong += [f"verify: {problem}" for problem in opened.verify().problems]
        left = len(opened.list_names())
    print(f"pulled {images} images of {size} bytes by {processes} processes in {seconds:.1f} s")
    print(f"limit {max_size}, peak {peak}, at the end {end_size} in {left} images; least free {least_free}")
    print(f"wrong {len(wrong)}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="internal: be the registry")
    parser.add_argument("--work", nargs="*", help="internal: pull these names")
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--size", type=int, default=250_000_000, help="bytes of an image")
    parser.add_argument("--max-size", type=int, default=8_000_000_000, help="the limit of the cache in bytes")
    parser.add_argument("--used-within", default="5s", help="what the policy keeps")
    given = parser.parse_args()
    if given.serve:
        serve()
        return 0
    if given.work is not None:
        work(given.directory, given.work)
        return 0
    wrong = attack(given.directory, given.processes, given.images, given.size, given.max_size, given.used_within)
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
