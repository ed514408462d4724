"""A soak test for any store of images that processes share: load it, kill workers, check all answers.

This module works for any store: write a `Target` for the store and call `run`.

Every worker owns a few image names, its canaries. Their images are made of blobs that all workers share. The worker
notes in shared memory what the store has acknowledged about its canaries, so the successor of a killed worker knows
what must be there. The one operation that was running may have happened or not. All workers add, move and remove
images under the hot names: such an image may be there or not, but it is never wrong or incomplete.

The seed decides which operations a worker chooses, and which worker is killed next, but not their timing.
"""

from __future__ import annotations

import gc
import hashlib
import io
import itertools
import json
import mmap
import os
import random
import re
import select
import shutil
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

WEIGHTS = {
    "has": 400,
    "complete": 60,
    "manifest": 160,
    "blobs": 60,
    "read": 200,
    "add": 20,
    "import": 6,
    "tag": 20,
    "remove": 25,
    "hold": 8,
    "hold and remove": 4,
    "export": 6,
    "collect": 2,
    "verify": 1,
    "reopen": 1,
}
"""How often an operation is chosen: many cheap reads, and enough changes that a read may meet any state."""

KINDS = list(WEIGHTS)
CANARIES = 4  # names that a worker owns
HOT_NAMES = 16
STUCK_SECONDS = 120.0  # the time after which a worker or a check counts as stuck


class Absent(Exception):
    """The store does not have the image or the blob; any other error is a violation."""


class Image(NamedTuple):
    """An image with the content that the store must return."""

    manifest: bytes
    blobs: dict[str, bytes]  # by digest; the manifest first, then the config, then the layers


class Store(Protocol):
    """An open store; one worker uses it. Every method but `add` and `load` may raise `Absent`."""

    def add(self, name: str, image: Image) -> None:
        """Store an image blob by blob under a new or existing name."""

    def load(self, name: str, archive: Path) -> None:
        """Import an OCI archive with one image under a new or existing name."""

    def has(self, digest: str) -> bool:
        """Return whether a blob is stored."""

    def read(self, digest: str) -> bytes:
        """Return a blob's content."""

    def manifest(self, name: str) -> bytes:
        """Return an image's manifest."""

    def blobs(self, name: str) -> list[str]:
        """Return the digests of an image's blobs that are stored, in the order of `Image.blobs`."""

    def complete(self, name: str) -> bool:
        """Return whether all blobs of an image are stored."""

    def tag(self, source: str, target: str) -> None:
        """Give an image a second name, which may exist."""

    def remove(self, name: str) -> None:
        """Remove an image's name, and the blobs that only this image used."""

    def hold(self, name: str) -> AbstractContextManager[dict[str, Path]]:
        """Keep an image's files during the block; yield their paths by digest, in the order of `Image.blobs`."""

    def export(self, name: str, path: Path) -> None:
        """Write an image to an archive with an OCI layout."""

    def collect(self) -> None:
        """Delete the blobs that no image uses."""

    def verify(self, *, quick: bool) -> list[str]:
        """Return the problems of the store."""

    def close(self) -> None:
        """Close the store."""


class Target(Protocol):
    """The store under attack."""

    def open(self, waited: Callable[[float], None]) -> Store:
        """Open the store; call ``waited`` with the seconds of each wait for the write lock."""

    def check(self) -> None:
        """Raise an error that names a broken promise; no other process uses the store meanwhile."""


class Plan(NamedTuple):
    """How to attack, and for how long: the first limit that is reached ends the attack."""

    processes: int
    scratch: Path  # a folder for archives
    seconds: float = float("inf")
    operations: float = float("inf")
    seed: int = 1
    kills_per_second: float = 2.0
    check_every: float = 30.0  # seconds between checks
    pause: float = 0.0  # average seconds between the operations of a worker
    enough: int = 200  # violations that end the attack


class Result(NamedTuple):
    """The work done so far, and the violations found."""

    seconds: float
    operations: dict[str, int]  # by kind
    longest: dict[str, float]  # seconds of the longest operation, by kind
    by_worker: list[int]  # operations of each worker
    steady: list[int]  # the workers that were never replaced
    longest_wait: list[float]  # seconds, by worker
    waits: list[int]  # at index n, how many waits took from 2**(n-1) to 2**n microseconds
    kills: int
    checks: int
    violations: Counter[str]

    def ratio(self) -> float:
        """Return the operations of the busiest steady worker, divided by those of the slowest."""
        done = [self.by_worker[worker] for worker in self.steady]
        return max(done) / max(1, min(done)) if done else 1.0


# Images


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def make_images(seed: int, count: int = 32, layers: int = 24) -> list[Image]:
    """Return images that share layers: most layers have a few kB, three have 100 kB."""
    choices = random.Random(f"images {seed}")
    stored = [choices.randbytes(100_000 if number < 3 else choices.randrange(500, 8000)) for number in range(layers)]
    return [make_image(number, choices.sample(stored, choices.randrange(1, 5))) for number in range(count)]


def make_image(number: int, layers: list[bytes]) -> Image:
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Labels": {"number": str(number)}},
            "rootfs": {"type": "layers", "diff_ids": [digest_of(layer) for layer in layers]},
        }
    ).encode()

    def descriptor(data: bytes, media_type: str) -> dict[str, object]:
        return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}

    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor(config, "application/vnd.oci.image.config.v1+json"),
            "layers": [descriptor(layer, "application/vnd.oci.image.layer.v1.tar") for layer in layers],
        }
    ).encode()
    return Image(manifest, {digest_of(data): data for data in (manifest, config, *layers)})


def write_archive(path: Path, image: Image) -> None:
    entry = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": digest_of(image.manifest),
        "size": len(image.manifest),
    }
    files = {f"blobs/{digest.replace(':', '/')}": data for digest, data in image.blobs.items()}
    files["oci-layout"] = b'{"imageLayoutVersion":"1.0.0"}'
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def read_archive(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return the digest of the manifest in an OCI archive, and all blobs by the digests in their paths."""
    with tarfile.open(path) as tar:
        files = {}
        for member in tar:
            content = tar.extractfile(member)
            if content is not None:
                files[member.name] = content.read()
    (entry,) = json.loads(files["index.json"])["manifests"]
    blobs = {
        name.removeprefix("blobs/").replace("/", ":"): data for name, data in files.items() if name.startswith("blobs/")
    }
    return entry["digest"], blobs


# Shared memory, which outlives a worker

REMOVED, UNKNOWN = 0, -1
"""The state of a canary is the number of its image, from 1 on, or one of these."""

_BUCKETS = 40
_CELLS = 2 * len(KINDS) + _BUCKETS + CANARIES + 4
_WAIT, _GENERATION = 0, 1


class Slot:
    """A worker's part of the shared memory: 8-byte integers, which no kill can tear; times in µs."""

    def __init__(self, cells: memoryview) -> None:
        parts = itertools.accumulate((len(KINDS), len(KINDS), _BUCKETS, CANARIES, 2, 2), initial=0)
        self.done, self.longest, self.waits, self.canaries, self.intended, self.other = (
            cells[start:end] for start, end in itertools.pairwise(parts)
        )

    def waited(self, seconds: float) -> None:
        microseconds = int(seconds * 1e6)
        self.waits[microseconds.bit_length()] += 1
        self.other[_WAIT] = max(self.other[_WAIT], microseconds)


class Shared(NamedTuple):
    """The memory and the pipe that the workers and their parent share."""

    state: memoryview  # one cell: WAIT, WORK or STOP
    slots: list[Slot]
    reports: int  # the end of the pipe to which workers write violations


WAIT, WORK, STOP = 0, 1, 2


def share(processes: int, reports: int) -> Shared:
    cells = memoryview(mmap.mmap(-1, 8 * (1 + processes * _CELLS))).cast("q")
    starts = range(1, len(cells) - _CELLS + 1, _CELLS)
    return Shared(cells[:1], [Slot(cells[start : start + _CELLS]) for start in starts][:processes], reports)


def report(shared: Shared, text: str) -> None:
    """Send a violation to the parent: in one write, which is not torn, and survives a kill of the worker."""
    os.write(shared.reports, text.replace("\n", " ").encode()[:4000] + b"\n")


# Workers


class Violation(Exception):
    """The store gave a wrong answer or did something wrong."""


class Worker:
    """A process that uses the store and checks every answer against what it knows."""

    def __init__(self, target: Target, plan: Plan, shared: Shared, number: int, images: list[Image]) -> None:
        self.target, self.shared, self.number, self.images = target, shared, number, images
        self.slot = shared.slots[number]
        self.random = random.Random(f"{plan.seed} {number} {self.slot.other[_GENERATION]}")
        self.scratch, self.pause = plan.scratch, plan.pause
        self.by_digest = {digest_of(image.manifest): number for number, image in enumerate(images, 1)}
        self.content = {digest: data for image in images for digest, data in image.blobs.items()}
        self.digests = list(self.content)
        self.canary: int | None = None  # the canary of the current operation, if it uses one
        self.store = target.open(self.slot.waited)
        self.operations: dict[str, Callable[[], None]] = {
            "has": self.has,
            "complete": self.complete,
            "manifest": self.manifest,
            "blobs": self.blobs,
            "read": self.read,
            "add": self.add,
            "import": self.load,
            "tag": self.tag,
            "remove": self.remove,
            "hold": self.hold,
            "hold and remove": self.hold_and_remove,
            "export": self.export,
            "collect": self.collect,
            "verify": self.verify,
            "reopen": self.reopen,
        }

    def work(self) -> None:
        """Do one operation after another until the state is STOP or the parent has died."""
        parent = os.getppid()
        weights = list(itertools.accumulate(WEIGHTS.values()))
        numbers = range(len(KINDS))
        operations = [self.operations[kind] for kind in KINDS]
        slot, state = self.slot, self.shared.state
        while state[0] == WAIT:
            time.sleep(0.001)
        self.attempt("settle", self.settle)
        while state[0] == WORK and os.getppid() == parent:
            kind = self.random.choices(numbers, cum_weights=weights)[0]
            began = time.perf_counter()
            self.attempt(KINDS[kind], operations[kind])
            took = int((time.perf_counter() - began) * 1e6)
            slot.done[kind] += 1
            if took > slot.longest[kind]:
                slot.longest[kind] = took
            if self.pause:
                time.sleep(self.random.expovariate(1 / self.pause))
        self.store.close()

    def attempt(self, kind: str, operation: Callable[[], None]) -> None:
        """Do an operation; if it fails, report a violation and set its canary to UNKNOWN."""
        self.canary = None
        try:
            operation()
        except Absent as error:
            # Allowed for a hot name, and for a canary that was removed or is unknown.
            if self.canary is None or self.slot.canaries[self.canary] in (REMOVED, UNKNOWN):
                return
            report(self.shared, f"{kind}: an acknowledged image is gone: {error}")
        except Exception as error:
            report(self.shared, f"{kind}: {type(error).__name__}: {error}")
        else:
            return
        if self.canary is not None:
            self.slot.canaries[self.canary] = UNKNOWN
        self.slot.intended[0] = 0

    def choose_name(self) -> str:
        """Choose the name for an operation: a canary's, or a hot one."""
        if self.random.random() < 0.5:
            self.canary = self.random.randrange(CANARIES)
            return self.name_of(self.canary)
        return f"hot:{self.random.randrange(HOT_NAMES)}"

    def name_of(self, canary: int) -> str:
        return f"worker-{self.number}/canary:{canary}"

    def choose_image(self) -> int:
        return self.random.randrange(1, len(self.images) + 1)

    def change(self, state: int, call: Callable[[], object]) -> None:
        """Change a canary: note the new state as intended, call the store, and note it as acknowledged."""
        slot, canary = self.slot, self.canary
        if canary is None:
            call()
            return
        slot.intended[1] = state
        slot.intended[0] = canary + 1
        try:
            call()
        except Absent:
            slot.intended[0] = 0
            raise
        slot.canaries[canary] = state
        slot.intended[0] = 0

    def settle(self) -> None:
        """Find out whether the operation that a killed predecessor had begun has happened; either is right."""
        if not self.slot.intended[0]:
            return
        self.canary = canary = self.slot.intended[0] - 1
        possible = (self.slot.canaries[canary], self.slot.intended[1])
        try:
            found = self.by_digest.get(digest_of(self.store.manifest(self.name_of(canary))), UNKNOWN)
        except Absent:
            found = REMOVED
        if found not in possible and UNKNOWN not in possible:
            raise Violation(f"a canary is {self.describe(found)}, not one of {[*map(self.describe, possible)]}")
        self.slot.canaries[canary] = found
        self.slot.intended[0] = 0

    def describe(self, state: int) -> str:
        return {REMOVED: "removed", UNKNOWN: "unknown"}.get(state, f"image {state}")

    def identify_image(self, manifest_digest: str) -> Image:
        """Return the image with this manifest; raise `Violation` if the canary should have another one."""
        found = self.by_digest.get(manifest_digest)
        if found is None:
            raise Violation(f"manifest {manifest_digest} was never stored")
        if self.canary is not None:
            state = self.slot.canaries[self.canary]
            if state not in (found, UNKNOWN):
                raise Violation(f"{self.name_of(self.canary)} is image {found}, but was {self.describe(state)}")
        return self.images[found - 1]

    # Operations

    def has(self) -> None:
        canary = self.random.randrange(CANARIES)
        mine = self.slot.canaries[canary]
        if mine > 0:
            self.canary = canary
            digest = self.random.choice(list(self.images[mine - 1].blobs))
            if not self.store.has(digest):
                raise Violation(f"a blob of an acknowledged image is not stored: {digest}")
        else:
            self.store.has(self.random.choice(self.digests))

    def complete(self) -> None:
        name = self.choose_name()
        if not self.store.complete(name):
            raise Violation(f"{name} is incomplete")
        if self.canary is not None and self.slot.canaries[self.canary] == REMOVED:
            raise Violation(f"{name} is complete, but was removed")

    def manifest(self) -> None:
        manifest = self.store.manifest(self.choose_name())
        if self.identify_image(digest_of(manifest)).manifest != manifest:
            raise Violation("the content of a manifest has changed")

    def blobs(self) -> None:
        name = self.choose_name()
        found = self.store.blobs(name)
        image = self.identify_image(found[0]) if found else None
        if image is None or list(image.blobs) != found:
            raise Violation(f"{name} is incomplete: only {len(found)} of its blobs are stored")

    def read(self) -> None:
        canary = self.random.randrange(CANARIES)
        mine = self.slot.canaries[canary]
        if mine > 0 and self.random.random() < 0.7:
            self.canary = canary
            digest = self.random.choice(list(self.images[mine - 1].blobs))
        else:
            digest = self.random.choice(self.digests)
        if self.store.read(digest) != self.content[digest]:
            raise Violation(f"the content of a blob has changed: {digest}")

    def add(self) -> None:
        name, image = self.choose_name(), self.choose_image()
        self.change(image, lambda: self.store.add(name, self.images[image - 1]))

    def load(self) -> None:
        name, image = self.choose_name(), self.choose_image()
        self.change(image, lambda: self.store.load(name, archive_path(self.scratch, image)))

    def tag(self) -> None:
        name = self.choose_name()
        if self.canary is None:
            self.store.tag(name, f"hot:{self.random.randrange(HOT_NAMES)}")
            return
        source = self.random.randrange(CANARIES)
        state = self.slot.canaries[source]
        if state <= 0:
            self.canary = source
            self.store.tag(self.name_of(source), f"hot:{self.random.randrange(HOT_NAMES)}")
            if state == REMOVED:
                raise Violation(f"{self.name_of(source)} was tagged, but was removed before")
            return
        try:
            self.change(state, lambda: self.store.tag(self.name_of(source), name))
        except Absent:
            self.canary = source
            raise

    def remove(self) -> None:
        name = self.choose_name()
        may_exist = self.canary is None or self.slot.canaries[self.canary] != REMOVED
        self.change(REMOVED, lambda: self.store.remove(name))
        if not may_exist:
            raise Violation(f"{name} was removed twice")
        if self.canary is not None:
            self.check_removed(name)

    def check_removed(self, name: str) -> None:
        try:
            self.store.manifest(name)
        except Absent:
            return
        raise Violation(f"{name} exists, but was removed")

    def hold(self) -> None:
        with self.store.hold(self.choose_name()) as paths:
            image = self.identify_image(next(iter(paths), ""))
            if self.random.random() < 0.3:
                time.sleep(self.random.random() * 0.02)
            check_content("a held blob", image, {digest: path.read_bytes() for digest, path in paths.items()})

    def hold_and_remove(self) -> None:
        """Hold an image, remove it and collect garbage; the held blobs must stay."""
        name = self.choose_name()
        with self.store.hold(name) as paths:
            image = self.identify_image(next(iter(paths), ""))
            self.change(REMOVED, lambda: self.store.remove(name))
            self.store.collect()
            check_content("a held blob", image, {digest: path.read_bytes() for digest, path in paths.items()})

    def export(self) -> None:
        path = self.scratch / f"export-{self.number}.tar"
        path.unlink(missing_ok=True)
        self.store.export(self.choose_name(), path)
        manifest, found = read_archive(path)
        check_content("an exported blob", self.identify_image(manifest), found)

    def collect(self) -> None:
        self.store.collect()

    def verify(self) -> None:
        if problems := self.store.verify(quick=self.random.random() < 0.5):
            raise Violation(f"{len(problems)} problems: {problems[0]}")

    def reopen(self) -> None:
        self.store.close()
        self.store = self.target.open(self.slot.waited)

    def check_canaries(self) -> None:
        """Check the state of every canary, and all bytes of its image."""
        self.attempt("settle", self.settle)
        for canary in range(CANARIES):
            self.attempt("canary", lambda canary=canary: self.check_canary(canary))  # type: ignore[misc]

    def check_canary(self, canary: int) -> None:
        self.canary, name, state = canary, self.name_of(canary), self.slot.canaries[canary]
        if state == REMOVED:
            self.check_removed(name)
        elif state != UNKNOWN:
            image = self.identify_image(digest_of(self.store.manifest(name)))
            check_content("a blob", image, {digest: self.store.read(digest) for digest in self.store.blobs(name)})


def check_content(what: str, image: Image, found: dict[str, bytes]) -> None:
    if missing := image.blobs.keys() - found.keys():
        raise Violation(f"{what} is missing: {min(missing)}")
    for digest, data in image.blobs.items():
        if found[digest] != data:
            raise Violation(f"the content of {what} has changed: {digest}")


def archive_path(scratch: Path, image: int) -> Path:
    return scratch / f"image-{image}.tar"


# The parent


def run(target: Target, plan: Plan, progress: Callable[[Result], None] = lambda result: None) -> Result:
    """Attack a store in rounds: work and kills, then a check of all promises while no worker runs.

    Odd rounds end when the workers have finished their current operations. Even rounds end with a kill of all workers,
    unless the plan has no kills. ``progress`` is called about once a second.
    """
    images = make_images(plan.seed)
    for number, image in enumerate(images, 1):
        write_archive(archive_path(plan.scratch, number), image)
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    attack = Attack(target, plan, images, share(plan.processes, writing), reading, progress)
    gc.collect()
    gc.freeze()  # the workers share these pages
    try:
        while not attack.is_over():
            attack.work()
            attack.end_round()
            attack.check()
    finally:
        attack.kill_all()
        gc.unfreeze()
        os.close(reading)
        os.close(writing)
    return attack.result()


class Attack:
    """A running attack: its workers, its kills, and its violations."""

    def __init__(
        self,
        target: Target,
        plan: Plan,
        images: list[Image],
        shared: Shared,
        reports: int,
        progress: Callable[[Result], None],
    ) -> None:
        self.target, self.plan, self.images, self.shared, self.progress = target, plan, images, shared, progress
        self.reports = reports
        self.unread = b""
        self.random = random.Random(f"killer {plan.seed}")
        self.workers: dict[int, int] = {}  # number by process
        self.began = time.monotonic()
        self.worked = 0.0  # seconds of work, without the checks
        self.kills = self.checks = self.rounds = 0
        self.violations: Counter[str] = Counter()

    def is_over(self) -> bool:
        done = sum(self.count_operations(worker) for worker in range(self.plan.processes))
        return (
            self.worked >= self.plan.seconds
            or done >= self.plan.operations
            or self.violations.total() >= self.plan.enough
        )

    def count_operations(self, worker: int) -> int:
        return sum(self.shared.slots[worker].done)

    def work(self) -> None:
        """Run all workers until the next check is due, and kill one at random times."""
        self.rounds += 1
        self.shared.state[0] = WAIT
        for number in range(self.plan.processes):
            self.start(number)
        self.shared.state[0] = WORK
        now = time.monotonic()
        until = now + min(self.plan.check_every, self.plan.seconds - self.worked)
        next_kill, next_progress = self.draw_next_kill(now), now + 1
        while now < until and not self.is_over():
            select.select([self.reports], [], [], max(0.0, min(next_kill, until, now + 0.05) - now))
            before, now = now, time.monotonic()
            self.worked += now - before
            self.read_reports()
            self.replace_lost()
            if now >= next_kill:
                self.kill_one()
                next_kill = self.draw_next_kill(now)
            if now >= next_progress:
                self.progress(self.result())
                next_progress = now + 1

    def draw_next_kill(self, now: float) -> float:
        rate = self.plan.kills_per_second
        return now + self.random.expovariate(rate) if rate else float("inf")

    def start(self, number: int) -> None:
        self.shared.slots[number].other[_GENERATION] += 1
        self.workers[self.fork(lambda: self.new_worker(number).work())] = number

    def new_worker(self, number: int) -> Worker:
        return Worker(self.target, self.plan, self.shared, number, self.images)

    def fork(self, call: Callable[[], None]) -> int:
        """Fork a child that calls a function; return its process ID."""
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
                call()
                status = 0
            except Exception as error:
                report(self.shared, f"open or close: {type(error).__name__}: {error}")
                status = 0
            finally:
                os._exit(status)
        return child

    def read_reports(self) -> None:
        try:
            while data := os.read(self.reports, 1 << 16):
                self.unread += data
        except BlockingIOError:
            pass
        *lines, self.unread = self.unread.split(b"\n")
        # Remove digests and process IDs, so that equal violations have equal texts.
        self.violations.update(re.sub(r"(?<![0-9a-z])[0-9a-f]{6,}|\d+(?=-)", "…", line.decode()) for line in lines)

    def replace_lost(self) -> None:
        """Replace workers that ended by themselves, and report those that died."""
        for child, number in list(self.workers.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                del self.workers[child]
                if status:
                    self.violations[f"a worker died: {os.waitstatus_to_exitcode(status)}"] += 1
                self.start(number)

    def kill_one(self) -> None:
        child = self.random.choice(list(self.workers))
        number = self.workers.pop(child)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        self.kills += 1
        self.start(number)

    def kill_all(self) -> None:
        for child in self.workers:
            os.kill(child, signal.SIGKILL)
        for child in self.workers:
            os.waitpid(child, 0)
        self.kills += len(self.workers)
        self.workers.clear()

    def end_round(self) -> None:
        if self.plan.kills_per_second and self.rounds % 2 == 0:
            self.kill_all()
            return
        self.shared.state[0] = STOP
        deadline = time.monotonic() + STUCK_SECONDS
        for child in list(self.workers):
            self.await_end(child, deadline, "a worker")
            del self.workers[child]

    def await_end(self, child: int, deadline: float, what: str) -> None:
        """Wait for a child until the deadline, then kill it."""
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            self.read_reports()
            if ended:
                if status:
                    self.violations[f"{what} died: {os.waitstatus_to_exitcode(status)}"] += 1
                return
            if time.monotonic() > deadline:
                self.violations[f"{what} did not end"] += 1
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return
            time.sleep(0.005)

    def check(self) -> None:
        """Check the promises and every canary in a child, because the parent never opens the store."""
        self.await_end(self.fork(self.check_all), time.monotonic() + STUCK_SECONDS, "the check")
        self.checks += 1
        for path in self.plan.scratch.iterdir():
            if not path.name.startswith("image-"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def check_all(self) -> None:
        try:
            self.target.check()
        except Exception as error:
            report(self.shared, f"the promises: {type(error).__name__}: {error}")
        for number in range(self.plan.processes):
            worker = self.new_worker(number)
            worker.check_canaries()
            worker.store.close()

    def result(self) -> Result:
        slots = self.shared.slots
        return Result(
            seconds=self.worked,
            operations={kind: sum(slot.done[place] for slot in slots) for place, kind in enumerate(KINDS)},
            longest={kind: max(slot.longest[place] for slot in slots) / 1e6 for place, kind in enumerate(KINDS)},
            by_worker=[self.count_operations(number) for number in range(len(slots))],
            steady=[number for number, slot in enumerate(slots) if slot.other[_GENERATION] == 1],
            longest_wait=[slot.other[_WAIT] / 1e6 for slot in slots],
            waits=[sum(slot.waits[place] for slot in slots) for place in range(_BUCKETS)],
            kills=self.kills,
            checks=self.checks,
            violations=self.violations.copy(),
        )


# The verdict


def find_unfair_waits(result: Result, *, longest: float = 1.0, ratio: float = 3.0) -> list[str]:
    """Return messages about waits that are too long or unfair, for a run without kills.

    Args:
        result: of the run.
        longest: seconds that every wait must stay below.
        ratio: how many times the work of the slowest worker the busiest may do.
    """
    faults = []
    if max(result.longest_wait) >= longest:
        faults.append(f"the longest wait was {max(result.longest_wait):.3f} s: the limit is {longest:g} s")
    if result.ratio() > ratio:
        faults.append(f"the busiest worker did {result.ratio():.2f} times the work of the slowest: limit {ratio:g}")
    return faults


def format_result(result: Result) -> Iterable[str]:
    """Yield the result as lines of text."""
    total = sum(result.operations.values())
    yield f"{'operation':18} {'times':>10} {'longest, s':>11}"
    for kind, count in result.operations.items():
        yield f"{kind:18} {count:10} {result.longest[kind]:11.3f}"
    yield f"{'all':18} {total:10}   {total / max(result.seconds, 0.001):.0f} a second for {result.seconds:.0f} s"
    yield f"collections {result.operations['collect'] + result.operations['hold and remove']}"
    yield f"kills {result.kills}, checks of all promises {result.checks}"
    longest = max(range(len(result.longest_wait)), key=result.longest_wait.__getitem__)
    yield (
        f"waits for the write lock {sum(result.waits)}: half under {quantile(result.waits, 0.5):.6f} s, "
        f"99 % under {quantile(result.waits, 0.99):.6f} s, 99.99 % under {quantile(result.waits, 0.9999):.6f} s, "
        f"longest {result.longest_wait[longest]:.3f} s (worker {longest})"
    )
    if result.steady:
        done = [result.by_worker[worker] for worker in result.steady]
        yield (
            f"operations of the busiest and the slowest of {len(done)} workers that ran all the time: "
            f"{max(done)} and {min(done)}, ratio {result.ratio():.2f}"
        )
    yield f"violations {result.violations.total()}"
    for text, count in result.violations.most_common(30):
        yield f"  {count} times: {text}"


def quantile(waits: list[int], part: float) -> float:
    """Return the seconds that a part of the waits stayed below, up to a power of two in microseconds."""
    wanted, seen = part * sum(waits), 0
    for place, count in enumerate(waits):
        seen += count
        if seen >= wanted:
            return float(2**place) / 1e6
    return 0.0
