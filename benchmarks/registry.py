"""How fast an image comes from a registry and goes to one, beside skopeo, and how many bytes are moved for it.

    python benchmarks/registry.py ARCHIVE [--rounds 5] [--directory DIR]

ARCHIVE is an OCI archive. docker-registry serves it on loopback, with its storage in memory where there is /dev/shm.
In turns: `cachedb pull` into a cache that has nothing, and `skopeo copy docker://... oci:...`; `cachedb push` and
`skopeo copy oci:... docker://...` to a repository that has nothing. Whole processes, from start to exit; and the same
by a process that has the cache open. The figures are medians.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cachedb import Cache

CACHEDB = [sys.executable, "-m", "cachedb"]


@contextmanager
def docker_registry(storage: Path) -> Iterator[str]:
    """Run docker-registry, and yield its port."""
    config = storage / "config.yml"
    config.write_text(
        f'{{"version": "0.1", "log": {{"level": "info"}}, "http": {{"addr": "0.0.0.0:0"}},'
        f' "storage": {{"filesystem": {{"rootdirectory": "{storage}"}}}}}}'
    )
    with (
        (storage / "log").open("wb") as log,
        subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log) as process,
    ):
        try:
            while not (found := re.search(r'listening on \S*:(\d+)[",]', (storage / "log").read_text())):
                time.sleep(0.05)
            yield found[1]
        finally:
            process.terminate()


class Counter:
    """A port that leads to a host, and counts what comes back from there."""

    def __init__(self, host: str) -> None:
        self.bytes = 0
        self._to = host.rpartition(":")
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            client, _ = self._listening.accept()
            server = socket.create_connection((self._to[0], int(self._to[2])))
            threading.Thread(target=self._copy, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._copy, args=(server, client, True), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        try:
            while data := source.recv(1024 * 1024):
                target.sendall(data)
                self.bytes += len(data) if counted else 0
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def seconds(action: Callable[[], object]) -> float:
    """Return how long an action took."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def run(*command: str) -> None:
    """Run a command, quietly."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def python(code: str) -> list[str]:
    """Return the command that runs code with Cache imported."""
    return [sys.executable, "-c", f"import os\nfrom cachedb import Cache\n{code}"]


def main() -> None:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to work; its file system is what is measured")
    options = parser.parse_args()
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with (
        tempfile.TemporaryDirectory(dir=options.directory) as folder,
        tempfile.TemporaryDirectory(dir=memory) as storage,
        docker_registry(Path(storage)) as port,
    ):
        place, host = Path(folder), f"127.0.0.1:{port}"
        layout = f"oci:{place / 'layout'}:image"
        run("skopeo", "--insecure-policy", "copy", "-q", f"oci-archive:{options.archive}", layout)
        source = f"{host}/image:1"
        run("skopeo", "--insecure-policy", "copy", "-q", "--dest-tls-verify=false", layout, f"docker://{source}")
        times: dict[str, list[float]] = {}
        for turn in range(options.rounds + 1):  # the first warms the page cache
            # Another name for the host each time, or blobs would be taken from repositories of the turns before.
            for name, taken in measure(place, host, f"127.0.1.{turn + 1}:{port}", layout):
                if turn:
                    times.setdefault(name, []).append(taken)
        with Cache.open(place / "cache") as cache:
            size = cache.get_image(source).size
        print(f"{options.archive.name}, {size / 1e6:.0f} MB, {os.cpu_count()} cores, {options.rounds} rounds\n")
        print("| work | median s | min to max s | MB/s | skopeo's time, divided by it |")
        print("| --- | --- | --- | --- | --- |")
        for name, runs in times.items():
            median = statistics.median(runs)
            peer = statistics.median(
                times["skopeo copy, from" if "pull" in name or "from" in name else "skopeo copy, to"]
            )
            spread = f"{min(runs):.2f} to {max(runs):.2f}"
            print(f"| {name} | {median:.2f} | {spread} | {size / median / 1e6:.0f} | {peer / median:.2f} |")
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"\nThe largest of these processes, skopeo's among them, used {largest:.0f} MiB of memory.\n")
        print("| what is moved | bytes, divided by the image's |")
        print("| --- | --- |")
        for name, count in moved(place, host, size):
            print(f"| {name} | {count / size:.3f} |")


def measure(place: Path, host: str, new: str, layout: str) -> Iterator[tuple[str, float]]:
    """Yield what was done, and the seconds it took."""
    source, cached, copied = f"{host}/image:1", place / "cache", place / "copied"
    for path in (cached, copied, place / "open"):
        shutil.rmtree(path, ignore_errors=True)
    Cache.open(cached).close()
    skopeo = ["skopeo", "--insecure-policy", "copy", "-q"]
    yield "cachedb pull", seconds(lambda: run(*CACHEDB, "--dir", str(cached), "pull", source))
    with Cache.open(place / "open") as cache:
        yield "cachedb pull, in an open process", seconds(lambda: cache.pull(source))
    yield (
        "skopeo copy, from",
        seconds(lambda: run(*skopeo, "--src-tls-verify=false", f"docker://{source}", f"oci:{copied}:image")),
    )
    turn = new.partition(":")[0]
    target = f"{new}/cachedb-{turn}/image:1"
    yield "cachedb push", seconds(lambda: run(*CACHEDB, "--dir", str(cached), "push", source, target))
    with Cache.open(cached) as cache:
        target = f"{new}/open-{turn}/image:1"
        yield "cachedb push, in an open process", seconds(lambda: cache.push(source, target))
    target = f"docker://{new}/skopeo-{turn}/image:1"
    yield "skopeo copy, to", seconds(lambda: run(*skopeo, "--dest-tls-verify=false", layout, target))


def moved(place: Path, host: str, size: int) -> Iterator[tuple[str, int]]:
    """Yield what was done, and the bytes that came from the registry."""

    def counted(name: str, action: Callable[[str], None]) -> tuple[str, int]:
        counter = Counter(host)
        action(f"{counter.host}/image:1")
        return name, counter.bytes

    def many(source: str) -> None:
        code = f"with Cache.open({str(place / 'many')!r}) as cache: cache.pull({source!r})"
        running = [subprocess.Popen(python(code)) for _ in range(8)]
        if any(process.wait() for process in running):
            raise SystemExit("a pull failed")

    def killed(source: str) -> None:
        code = (
            "def told(done, total):\n    if done >= total * 0.9: os.kill(os.getpid(), 9)\n"
            f"Cache.open({str(place / 'killed')!r}).pull({source!r}, progress=told)"
        )
        subprocess.run(python(code), check=False)

    def again(source: str) -> None:
        with Cache.open(place / "killed") as cache:
            cache.pull(source)

    yield counted("8 processes pull it at once", many)
    source = Counter(host)
    killed(f"{source.host}/image:1")
    before, source.bytes = source.bytes, 0
    again(f"{source.host}/image:1")
    yield "a pull that is killed at 90 %", before
    yield "the pull after that", source.bytes
    source.bytes = 0
    again(f"{source.host}/image:1")
    yield "another, of a tag that has not moved", source.bytes


if __name__ == "__main__":
    main()
