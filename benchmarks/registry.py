"""Measure pulls and pushes of an image, compare them with the peers, and count the bytes."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.archives import SKOPEO, measure_size
from benchmarks.machine import are_installed
from benchmarks.measure import (
    Cost,
    Failed,
    Work,
    cachedb,
    compare_speed,
    delete_paths,
    measure_cost,
    print_table,
    print_works,
    run,
    run_in_child,
    take_turns,
)
from benchmarks.plan import Plan
from benchmarks.real_images import TAG


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
                if process.poll() is not None:
                    raise Failed((storage / "log").read_text())
                time.sleep(0.05)
            yield found[1]
        finally:
            process.terminate()


class Counter:
    """A TCP proxy of a host that counts the bytes of its answers."""

    def __init__(self, host: str) -> None:
        self.bytes = 0
        self._target = host.rpartition(":")
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            client, _ = self._listening.accept()
            server = socket.create_connection((self._target[0], int(self._target[2])))
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


def registry(plan: Plan) -> None:
    """Pull into an empty cache, push to an empty repository, and count the bytes that are transferred."""
    if not are_installed("docker-registry", "skopeo"):
        print("This section needs docker-registry and skopeo.\n")
        return
    place, memory = plan.folder("registry"), "/dev/shm" if Path("/dev/shm").is_dir() else None
    layout = plan.image.layout
    with tempfile.TemporaryDirectory(dir=memory) as storage, docker_registry(Path(storage)) as port:
        host = f"127.0.0.1:{port}"
        run(*SKOPEO, "--dest-tls-verify=false", f"oci:{layout}:{TAG}", f"docker://{host}/image:1")
        works = [*_make_pull_works(place, host, layout), *_make_push_works(place, host, port, layout)]
        print_works(take_turns(works, plan.rounds))
        count = measure_size(layout / "blobs")
        rows = [[what, f"{number / count:.3f}"] for what, number in _count_downloads(place, host)]
        print_table(["transfer from the registry", "bytes, divided by the image's"], rows)


def _create_cache(directory: Path) -> None:
    from cachedb import Cache

    Cache.open(directory).close()


def _pull(directory: Path, source: str) -> Cost:
    from cachedb import Cache

    with Cache.open(directory) as cache:
        return measure_cost(lambda: cache.pull(source))


def _push(directory: Path, source: str, target: str) -> Cost:
    from cachedb import Cache

    with Cache.open(directory) as cache:
        return measure_cost(lambda: cache.push(source, target))


def _make_pull_works(place: Path, host: str, layout: Path) -> list[Work]:
    source, target, count = f"{host}/image:1", place / "target", measure_size(layout / "blobs")

    def renew_cache() -> None:
        delete_paths(target)
        run_in_child(_create_cache, target)

    peers = [("skopeo copy", [*SKOPEO, "--src-tls-verify=false", f"docker://{source}", f"oci:{target}:1"])]
    if are_installed("regctl"):
        regctl = ["regctl", "image", "copy", "--host", f"reg={host},tls=disabled", source, f"ocidir://{target}:1"]
        peers.append(("regctl image copy", regctl))
    if are_installed("oras"):
        peers.append(("oras copy", ["oras", "copy", "--from-plain-http", source, "--to-oci-layout", f"{target}:1"]))
    if are_installed("crane"):
        peers.append(("crane pull", ["crane", "pull", "--insecure", "--format", "oci", source, str(target)]))
    works = [
        Work("pull", runner, partial(run, *command), count, (), lambda: delete_paths(target))
        for runner, command in peers
    ]
    beside = [compare_speed(works[0])]
    whole = cachedb("--dir", target, "pull", source)
    return [
        Work("pull", "cachedb, open process", lambda: run_in_child(_pull, target, source), count, beside, renew_cache),
        Work("pull", "cachedb pull", lambda: run(*whole), count, beside, renew_cache),
        *works,
    ]


def _make_push_works(place: Path, host: str, port: str, layout: Path) -> list[Work]:
    source, cache, count = f"{host}/image:1", place / "pushed", measure_size(layout / "blobs")
    run_in_child(_pull, cache, source)
    turn = 0

    def make_target(repository: str) -> str:
        """Return a new name at a new host, so that no blob can be mounted from an earlier repository."""
        nonlocal turn
        turn += 1
        return f"127.0.{turn // 250 + 1}.{turn % 250 + 1}:{port}/{repository}-{turn}/image:1"

    def push_with(command: Callable[[str], list[str]]) -> Cost:
        return run(*command(make_target("peer")))

    def host_of(name: str) -> str:
        return name.partition("/")[0]

    peers: list[tuple[str, Callable[[str], list[str]]]] = [
        ("skopeo copy", lambda to: [*SKOPEO, "--dest-tls-verify=false", f"oci:{layout}:{TAG}", f"docker://{to}"])
    ]
    if are_installed("regctl"):
        copy = ["regctl", "image", "copy", "--host"]
        peers.append(
            (
                "regctl image copy",
                lambda to: [*copy, f"reg={host_of(to)},tls=disabled", f"ocidir://{layout}:{TAG}", to],
            )
        )
    if are_installed("oras"):
        oras = ["oras", "copy", "--from-oci-layout", f"{layout}:{TAG}", "--to-plain-http"]
        peers.append(("oras copy", lambda to: [*oras, to]))
    if are_installed("crane"):
        peers.append(("crane push", lambda to: ["crane", "push", "--insecure", str(layout), to]))
    works = [Work("push", runner, partial(push_with, command), count) for runner, command in peers]
    beside = [compare_speed(works[0])]
    return [
        Work(
            "push",
            "cachedb, open process",
            lambda: run_in_child(_push, cache, source, make_target("open")),
            count,
            beside,
        ),
        Work(
            "push",
            "cachedb push",
            lambda: run(*cachedb("--dir", cache, "push", "--plain-http", source, make_target("whole"))),
            count,
            beside,
        ),
        *works,
    ]


def _count_downloads(place: Path, host: str) -> Iterator[tuple[str, int]]:
    """Yield the name of each transfer, and the bytes that the registry has sent."""

    def python(code: str) -> list[str]:
        return [sys.executable, "-c", f"import os\nfrom cachedb import Cache\n{code}"]

    def pull(source: str) -> Cost:
        return run_in_child(_pull, place / "killed", source)

    counter = Counter(host)
    many = f"with Cache.open({str(place / 'many')!r}) as cache: cache.pull('{counter.host}/image:1')"
    running = [subprocess.Popen(python(many)) for _ in range(8)]
    codes = [process.wait() for process in running]
    if any(codes):
        raise Failed("a pull failed")
    yield "8 processes pull the image at once", counter.bytes
    counter = Counter(host)
    source = f"{counter.host}/image:1"
    killed = (
        "def progress(done, total):\n    if done >= total * 0.9: os.kill(os.getpid(), 9)\n"
        f"Cache.open({str(place / 'killed')!r}).pull({source!r}, progress=progress)"
    )
    subprocess.run(python(killed), check=False)
    yield "a pull that is killed at 90 %", counter.bytes
    counter.bytes = 0
    pull(source)
    yield "the pull after that", counter.bytes
    counter.bytes = 0
    pull(source)
    yield "another pull, of a tag that has not moved", counter.bytes
    shutil.rmtree(place)
