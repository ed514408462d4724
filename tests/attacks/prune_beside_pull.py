"""Pull images beside a process that prunes in a loop: `python -m tests.attacks.prune_beside_pull --help`.

The images share their layers. After each acknowledged pull, the image is gone, because it was pruned meanwhile, or it
has all its blobs. The same attack runs against podman, where `image prune` has this fault: see moby#53321.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cachedb.operations.plan
import cachedb.operations.prune
import cachedb.operations.pull
import cachedb.transports.archive.read  # noqa: F401 - imported once, before the processes are forked
from cachedb import Cache, CacheError, Keep, NotInCache, Policy, Remove
from tests.conftest import find_peer
from tests.peers.test_archives import Tools
from tests.support import leftovers, make, promises
from tests.support.registries import Registry, docker_registry

IMAGES, LAYERS = 24, 10
HOLD_EVERY = 20  # rounds; in the last of them, the image is also held while another prune runs
POLL_SECONDS = 0.0005
FORK = multiprocessing.get_context("fork")
EVERYTHING = Policy(remove=(Remove(unused_for=0),), keep=(Keep(used_within=0),))
"""Remove every image that no process uses and nothing holds, even one that was used a moment ago."""


class Refused(Exception):
    """The store has refused a pull or a prune, or does not have an image whole."""


class Gone(Exception):
    """The store has no such image any more."""


class Store(Protocol):
    """A store of images, as one process uses it. The number of an image is its place among the images."""

    def pull(self, number: int) -> None:
        """Pull or import an image; raise `Refused` if that fails."""

    def prune(self) -> int:
        """Remove all images that are not in use, and return how many; raise `Refused` if that fails."""

    def check(self, number: int) -> None:
        """Raise `Refused` if an image that has a name is not whole, and `Gone` if it has no name."""

    def check_held(self, number: int, wait_for_prune: Callable[[], None]) -> None:
        """Hold an image while another prune runs, and check it again; do nothing if the store has no holds."""


def make_images(seed: int) -> list[make.ImageContent]:
    """Return images that share their layers."""
    choices = random.Random(f"images {seed}")
    return [make.image(*sorted(choices.sample(range(LAYERS), choices.randrange(1, 5)))) for _ in range(IMAGES)]


class CachedbStore:
    """A cache; the images come from a registry or from archives, and are pruned by a rule, a limit or a plan."""

    def __init__(self, directory: Path, scratch: Path, host: str, images: list[make.ImageContent], seed: str) -> None:
        self.cache = Cache.open(directory)
        self.scratch, self.host, self.images, self.random = scratch, host, images, random.Random(seed)
        self.name = ""

    def pull(self, number: int) -> None:
        try:
            if self.random.random() < 0.5:
                self.name = f"{self.host}/app:{number}"
                self.cache.pull(self.name)
            else:
                self.name = f"imported/app:{number}"
                self.cache.cache_from_tar(self.scratch / f"{number}.tar", self.name)
        except CacheError as error:
            raise Refused(f"{type(error).__name__}: {error}") from error

    def prune(self) -> int:
        try:
            way = self.random.choice(["rule", "limit", "plan"])
            if way == "plan":
                return len(self.cache.prune(plan=self.cache.plan_prune(EVERYTHING).images).images)
            if way == "limit":
                return len(self.cache.prune(Policy(keep=EVERYTHING.keep), to_free=1 << 40).images)
            return len(self.cache.prune(EVERYTHING).images)
        except CacheError as error:
            raise Refused(f"{type(error).__name__}: {error}") from error

    def check(self, number: int) -> None:
        try:
            absent = [blob.digest for blob in self.cache.get_image_blobs(self.name) if not blob.stored]
        except NotInCache as error:
            raise Gone from error
        if absent:
            raise Refused(f"the acknowledged image lacks {', '.join(absent)}")

    def check_held(self, number: int, wait_for_prune: Callable[[], None]) -> None:
        with ExitStack() as held:
            try:
                held.enter_context(self.cache.hold(self.name))
            except NotInCache as error:
                raise Gone from error
            wait_for_prune()
            for digest, data in self.images[number].blobs.items():
                try:
                    if self.cache.get_blob_path(digest).read_bytes() != data:
                        raise Refused(f"a held image has other content in {digest}")
                except (CacheError, OSError) as error:
                    raise Refused(f"a held image lacks a blob: {error}") from error


class PodmanStore:
    """A storage of podman; `podman save` reads all blobs of an image, so it fails for one that lacks a layer."""

    def __init__(self, home: Path, host: str, driver: str) -> None:
        self.tools, self.host, self.driver, self.home = Tools(home, find_peer), host, driver, home

    def _run(self, *arguments: object) -> str:
        try:
            return self.tools("podman", "--storage-driver", self.driver, *arguments)
        except AssertionError as error:
            raise Refused(str(error).rpartition("]: ")[2].strip()) from error

    def _name(self, number: int) -> str:
        return f"{self.host}/app:{number}"

    def pull(self, number: int) -> None:
        self._run("pull", "--quiet", "--tls-verify=false", self._name(number))

    def prune(self) -> int:
        return len(self._run("image", "prune", "--all", "--force").split())

    def check(self, number: int) -> None:
        try:
            self._run("image", "exists", self._name(number))
        except Refused as error:
            raise Gone from error
        archive = Path(tempfile.mkdtemp(dir=self.home)) / "image.tar"
        self._run("save", "--quiet", "--format", "oci-archive", "--output", archive, self._name(number))
        archive.unlink()

    def check_held(self, number: int, wait_for_prune: Callable[[], None]) -> None:
        pass  # podman has no holds


# The processes

_COUNTS = ("rounds", "whole", "gone", "held", "failed pulls", "broken images", "prunes", "removed", "failed prunes")


class Shared:
    """What the processes share: counts, the faults that they find, and a lock that pauses the prunes."""

    def __init__(self, workers: int) -> None:
        self.cells = FORK.Array("q", workers * len(_COUNTS), lock=False)
        self.begun, self.ended = FORK.Value("q", 0, lock=False), FORK.Value("q", 0, lock=False)  # prunes
        self.is_stopped = FORK.Value("b", 0, lock=False)
        self.faults: Any = FORK.SimpleQueue()
        self.pausing = FORK.Array("b", workers, lock=False)  # who waits for the lock; the next prune waits for them
        self.lock = FORK.Lock()

    def count(self, worker: int, what: str, number: int = 1) -> None:
        self.cells[worker * len(_COUNTS) + _COUNTS.index(what)] += number

    def sum(self, what: str) -> int:
        return sum(self.cells[_COUNTS.index(what) :: len(_COUNTS)])

    @contextmanager
    def pause(self, worker: int) -> Iterator[None]:
        """Let no prune run during the block."""
        self.pausing[worker] = 1
        with self.lock:
            self.pausing[worker] = 0
            yield

    def wait_for_prune(self) -> None:
        """Wait until a prune has run that began after this call."""
        wanted = self.begun.value + 1
        while self.ended.value < wanted and not self.is_stopped.value:
            time.sleep(POLL_SECONDS)


def pull_in_loop(shared: Shared, worker: int, store: Store, rounds: int, seed: str, *, is_pausing: bool) -> None:
    """Pull images at random, and check each after its acknowledgement.

    Args:
        shared: what the processes share.
        worker: the number of this process.
        store: what is attacked.
        rounds: the pulls of this process.
        seed: of the choice of images.
        is_pausing: no prune runs during a check, for a store whose checks take several steps.
    """
    choices = random.Random(seed)
    for number in range(rounds):
        if shared.is_stopped.value:
            return
        image = choices.randrange(IMAGES)
        try:
            store.pull(image)
        except Refused as error:
            shared.count(worker, "failed pulls")
            shared.faults.put(f"pull: {error}")
        else:
            try:
                with shared.pause(worker) if is_pausing else nullcontext():
                    store.check(image)
                if number % HOLD_EVERY == 0 and not is_pausing:
                    store.check_held(image, shared.wait_for_prune)
                    shared.count(worker, "held")
                shared.count(worker, "whole")
            except Gone:
                shared.count(worker, "gone")
            except Refused as error:
                shared.count(worker, "broken images")
                shared.faults.put(f"check: {error}")
        shared.count(worker, "rounds")


def prune_in_loop(shared: Shared, worker: int, store: Store) -> None:
    """Prune without a pause until the end."""
    while not shared.is_stopped.value:
        while any(shared.pausing):
            time.sleep(POLL_SECONDS)
        with shared.lock:
            shared.begun.value += 1
            try:
                shared.count(worker, "removed", store.prune())
            except Refused as error:
                shared.count(worker, "failed prunes")
                shared.faults.put(f"prune: {error}")
            shared.count(worker, "prunes")
            shared.ended.value += 1


class Result(NamedTuple):
    """What an attack has done and found."""

    seconds: float
    counts: dict[str, int]
    faults: Counter[str]
    exit_codes: list[int | None]  # of the processes; 0 unless one failed

    def __str__(self) -> str:
        lines = [f"{count:>10} {name}" for name, count in self.counts.items()]
        lines += [f"{count:>10} times {text}" for text, count in self.faults.most_common(20)]
        return "\n".join([*lines, f"{self.seconds:10.0f} seconds"])


def attack(
    make_store: Callable[[str], Store], *, rounds: int, seconds: float, pullers: int, is_pausing: bool
) -> Result:
    """Run the processes until the rounds are done or the time is over.

    Args:
        make_store: opens the store in a process, with a seed for its choices.
        rounds: the pulls of all processes.
        seconds: after which the attack ends.
        pullers: the processes that pull.
        is_pausing: as for `pull_in_loop`.
    """
    shared = Shared(pullers + 1)
    start = time.monotonic()

    def pull(worker: int) -> None:
        share = rounds // pullers + (worker < rounds % pullers)
        pull_in_loop(shared, worker, make_store(f"pull {worker}"), share, str(worker), is_pausing=is_pausing)

    workers: list[ForkProcess] = [FORK.Process(target=pull, args=(worker,)) for worker in range(pullers)]
    pruner = FORK.Process(target=lambda: prune_in_loop(shared, pullers, make_store("prune")))
    faults = Counter[str]()

    def take_faults() -> None:
        while not shared.faults.empty():
            faults[shared.faults.get()] += 1

    for process in [*workers, pruner]:
        process.start()
    while any(process.is_alive() for process in workers):
        workers[0].join(0.2) if workers[0].is_alive() else time.sleep(0.2)
        take_faults()
        if time.monotonic() - start > seconds or not pruner.is_alive():
            shared.is_stopped.value = 1
    shared.is_stopped.value = 1
    for process in [*workers, pruner]:
        process.join()
    take_faults()
    counts = {name: shared.sum(name) for name in _COUNTS}
    return Result(time.monotonic() - start, counts, faults, [process.exitcode for process in [*workers, pruner]])


# The stores under attack


@contextmanager
def serve_images(folder: Path, images: list[make.ImageContent]) -> Iterator[str]:
    """Run a registry that has the images as app:0, app:1 and so on; yield its host."""
    try:
        find_peer("docker-registry")
    except Exception:
        with Registry() as registry:
            for number, image in enumerate(images):
                registry.add(image, "app", str(number))
            yield registry.host
        return
    with docker_registry(folder) as host, Cache.open(folder / "source") as source:
        for number, image in enumerate(images):
            make.save(source, f"app:{number}", image)
            source.push(f"app:{number}", f"{host}/app:{number}")
        yield host


def attack_cachedb(folder: Path, *, rounds: int, seconds: float, pullers: int, seed: int) -> Result:
    """Attack a cache, and check its promises at the end."""
    images = make_images(seed)
    for number, image in enumerate(images):
        (folder / f"{number}.tar").write_bytes(make.tar_of(make.oci_files({"": image})))
    held = images[:2]
    with Cache.open(folder / "cache") as cache:
        for number, image in enumerate(held):
            make.save(cache, f"held:{number}", image)
            cache.add_hold(f"held:{number}")
    with serve_images(folder, images) as host:

        def open_store(process: str) -> Store:
            return CachedbStore(folder / "cache", folder, host, images, f"{seed} {process}")

        result = attack(open_store, rounds=rounds, seconds=seconds, pullers=pullers, is_pausing=False)
    with Cache.open(folder / "cache") as cache:
        for number, image in enumerate(held):
            assert cache.get_manifest(f"held:{number}") == image.manifest
            assert all(cache.get_blob(digest) == data for digest, data in image.blobs.items())
    promises.check(folder / "cache")
    return result


def attack_podman(folder: Path, *, rounds: int, seconds: float, pullers: int, seed: int, driver: str) -> Result:
    """Attack a storage of podman."""
    images = make_images(seed)
    with serve_images(folder, images) as host:

        def open_store(process: str) -> Store:
            return PodmanStore(folder / "podman", host, driver)

        open_store("")  # makes the settings
        return attack(open_store, rounds=rounds, seconds=seconds, pullers=pullers, is_pausing=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.prune_beside_pull", description=__doc__)
    parser.add_argument("--store", choices=["cachedb", "podman"], default="cachedb", help="what to attack (cachedb)")
    parser.add_argument("--rounds", type=float, default=1000, help="pulls, each with its check (1000)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after this time")
    parser.add_argument("--pullers", type=int, default=2, help="processes that pull (2)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the images and choices (1)")
    parser.add_argument("--driver", default="overlay", help="storage driver of podman (overlay)")
    parser.add_argument("--directory", type=Path, help="folder for the stores; /dev/shm is faster")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prune-beside-pull-", dir=options.directory) as folder:
        limits = {"seconds": options.seconds, "pullers": options.pullers, "seed": options.seed}
        if options.store == "podman":
            result = attack_podman(Path(folder), rounds=int(options.rounds), driver=options.driver, **limits)
        else:
            result = attack_cachedb(Path(folder), rounds=int(options.rounds), **limits)
    print(result)
    return 1 if result.faults or any(result.exit_codes) else 0


if __name__ == "__main__":
    leftovers.start_watcher()
    sys.exit(main())
